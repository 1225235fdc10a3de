"""Blocks of a derived store: rows moved, codes kept or made coarser."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import zarr
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from teacher_cache.build.inputs import Silent
from teacher_cache.codecs.logits import TopkEntries
from teacher_cache.codecs.packing import ranges
from teacher_cache.contract.batch import TargetRequest, TopkLogits
from teacher_cache.derive import source_rows
from teacher_cache.derive.derive import derive_store
from teacher_cache.derive.origins import plan_derivation
from teacher_cache.derive.recode import BlockDeriver, cut_topk
from teacher_cache.derive.settings import DeriveSettings
from teacher_cache.derive.source_rows import SourcePiece, SourceRows
from teacher_cache.errors import StoreError
from teacher_cache.format.layout import StoreLayout
from teacher_cache.read.reader import CacheReader
from tests.forged import forge_entries


def derive(source: Path, out: Path, **flags: Any) -> CacheReader:
    derive_store(DeriveSettings(src=str(source), dst=str(out), **flags), Silent())
    return CacheReader.open(out)


def test_what_stays_where_it_was_in_a_block_is_copied_byte_by_byte(nmse_store: Path, tmp_path: Path) -> None:
    reader = derive(nmse_store, tmp_path / "out.zarr", row_range="16:40", layers="4", k=4)
    for spec in reader.layout.arrays.values():
        kept = not spec.path.startswith("logits")
        before = spec.path.replace("attention/3/input", "hidden/2")
        for block in range(reader.manifest.blocks):
            shards = [
                (root / path / "c" / str(number)).joinpath(*"0" * len(spec.block_shape)).read_bytes()
                for root, path, number in (
                    (Path(reader.path), spec.path, block),
                    (nmse_store, before, block + 1),
                )
            ]
            assert (shards[0] == shards[1]) == kept, spec.path
    folder, files = reader.teacher_folder(), nmse_store / "teacher"
    assert (folder / "model.safetensors").read_bytes() == (files / "model.safetensors").read_bytes()


def test_plain_zarr_reads_rows_that_moved(small_store: Path, tmp_path: Path) -> None:
    derive(small_store, tmp_path / "out.zarr", row_range="5:40", targets="hidden", layers="4")
    stores = (tmp_path / "out.zarr", small_store)
    have, want = (np.asarray(zarr.open_array(str(store / "hidden/4/codes"), mode="r")) for store in stores)
    assert have.shape == (3, 32, 16 * 24)
    assert np.array_equal(have[1][:, 24:48], want[1][:, 6 * 24 : 7 * 24])  # row 17 there was row 22
    assert not have[2][:, 3 * 24 :].any()


def kept_mass(logits: TopkLogits) -> torch.Tensor:
    return logits.log_probs_BMK.exp().sum(dim=-1) + logits.log_tail_BM.exp()


@pytest.mark.parametrize("store, flags", [("small_store", {}), ("nmse_store", {"row_range": "7:29"})])
def test_fewer_ids_leave_their_mass_to_the_tail(
    store: str, flags: dict[str, str], tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    path: Path = request.getfixturevalue(store)
    source, wanted = CacheReader.open(path), TargetRequest(logits=True)
    reader = derive(path, tmp_path / "out.zarr", targets="logits", k=3, **flags)
    first = reader.manifest.first_row
    for masked_view in range(source.manifest.views):
        have = reader.read_rows(0, reader.rows, wanted, masked_view=masked_view)["masked"]
        want = source.read_rows(first, first + reader.rows, wanted, masked_view=masked_view)["masked"]
        assert isinstance(have.logits, TopkLogits) and isinstance(want.logits, TopkLogits) and want.places is not None
        real_BM = want.places.real_BM()
        assert torch.equal(have.logits.ids_BMK, want.logits.ids_BMK[..., :3])
        assert torch.equal(have.logits.log_probs_BMK, want.logits.log_probs_BMK[..., :3])
        assert torch.equal(have.logits.log_tail_BM[~real_BM], want.logits.log_tail_BM[~real_BM])
        dropped = want.logits.log_probs_BMK[..., 3:].double().exp().sum(-1) + want.logits.log_tail_BM.double().exp()
        assert torch.allclose(have.logits.log_tail_BM[real_BM].double(), dropped[real_BM].log(), atol=2e-3)
        assert torch.allclose(kept_mass(have.logits)[real_BM], kept_mass(want.logits)[real_BM], atol=2e-3)
        assert torch.allclose(kept_mass(have.logits)[real_BM], torch.tensor(1.0), atol=0.03)


def test_log_probabilities_of_a_half_precision_store_take_a_byte_where_vectors_are_coarser(
    small_store: Path, tmp_path: Path
) -> None:
    reader = derive(small_store, tmp_path / "out.zarr", targets="logits", precision="int8")
    spec = reader.manifest.targets.logits
    assert spec is not None and (spec.codec, spec.entries) == ("root8", 8)
    readers = (reader, CacheReader.open(small_store))
    have, want = (one.read_rows(0, 40, TargetRequest(logits=True))["masked"].logits for one in readers)
    assert isinstance(have, TopkLogits) and isinstance(want, TopkLogits)
    assert torch.equal(have.log_tail_BM, want.log_tail_BM)
    assert torch.allclose(have.log_probs_BMK.exp(), want.log_probs_BMK.exp(), atol=2e-2)


def topk(log_probs: list[list[float]], tail: list[float]) -> TopkEntries:
    log_probs_PK = torch.tensor(log_probs)
    return TopkEntries(
        ids_PK=torch.arange(log_probs_PK.numel()).view_as(log_probs_PK),
        log_probs_PK=log_probs_PK,
        log_tail_P=torch.tensor(tail),
    )


@given(
    masses=st.lists(st.floats(1e-30, 1), min_size=2, max_size=6).map(lambda values: sorted(values, reverse=True)),
    data=st.data(),
)
def test_no_mass_is_lost_where_ids_are(masses: list[float], data: st.DataObject) -> None:
    """Beside plain float64; the last mass is the tail."""
    masses = [mass / sum(masses) for mass in masses]
    entries = data.draw(st.integers(1, len(masses) - 1))
    found = cut_topk(topk([[math.log(mass) for mass in masses[:-1]]], [math.log(masses[-1])]), entries)
    assert found.ids_PK.tolist() == [list(range(entries))]
    assert found.log_probs_PK.exp()[0].tolist() == pytest.approx(masses[:entries], rel=1e-4)
    assert float(found.log_tail_P.exp()) == pytest.approx(sum(masses[entries:]), rel=1e-4)


def test_rounded_masses_that_add_up_to_more_than_one_leave_a_tail_of_one() -> None:
    topk = TopkEntries(
        ids_PK=torch.arange(52, dtype=torch.int32)[None],
        log_probs_PK=torch.full((1, 52), 1.03 / 52).log(),
        log_tail_P=torch.tensor([-90.0]),
    )
    assert float(cut_topk(topk, 1).log_tail_P) == 0.0


def test_a_tail_without_mass_stays_without() -> None:
    nothing = -math.inf
    found = cut_topk(topk([[0.0, nothing, nothing], [-1.0, -2.0, -3.0]], [nothing, nothing]), 1)
    assert found.log_tail_P[0] == nothing
    assert float(found.log_tail_P[1]) == pytest.approx(math.log(math.exp(-2) + math.exp(-3)))
    whole = topk([[-1.0, -2.0]], [-3.0])
    assert torch.allclose(cut_topk(whole, 2).log_tail_P, whole.log_tail_P)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=30)
@given(st.data())
def test_coarser_codes_are_the_nearest_in_another_order(
    nmse_store: Path, monkeypatch: pytest.MonkeyPatch, data: st.DataObject
) -> None:
    """Whichever rows are read, however few components at a time; the codes beside what any reader decodes."""
    source = SourceRows(CacheReader.open(nmse_store))
    stream, ratio = source.reader.layout.stream("hidden/4"), data.draw(st.floats(0.01, 1))
    assert stream.calibration is not None and len([1 for _ in ranges(stream.calibration.components)]) > 1
    place_D = torch.tensor(data.draw(st.permutations(range(stream.width))))
    start = data.draw(st.integers(0, source.manifest.block_rows - 1))
    stop = data.draw(st.integers(start + 1, source.manifest.block_rows))
    monkeypatch.setattr(source_rows, "VALUES_AT_ONCE", data.draw(st.sampled_from([1, 200, 2**18])))
    piece = SourcePiece(block=0, start=start, stop=stop, to=0)
    ((codes_DN,), (coarser_DN,)) = (list(source.codes(stream, piece, *how)) for how in ((), (place_D, ratio)))
    request = TargetRequest(hidden_layers=(4,), rotated_layers=(4,))
    (batch,) = source.reader.read_rows(start, stop, request).values()
    exact_ND = (batch.hidden[4].flatten(0, 1) / stream.calibration.step).round()
    assert torch.equal(codes_DN.T, exact_ND) and bool(codes_DN.any())
    assert torch.equal(coarser_DN[place_D], codes_DN * ratio)


@pytest.mark.parametrize("wrong", ["-1", "beyond", "falling", "count"])
def test_escapes_that_have_no_place_are_refused(wrong: str, nmse_store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """They would be written elsewhere, or end in an error of numpy's."""
    source = SourceRows(CacheReader.open(nmse_store))
    stream = source.reader.layout.stream("hidden/4")
    values = stream.width * source.manifest.block_rows * source.manifest.seq_len
    forged = {"-1": [-1, 3], "beyond": [3, values], "falling": [5, 4], "count": [3, 4]}[wrong]
    forge_entries(monkeypatch, "escapes", index=forged, count=10**6 if wrong == "count" else 2)
    with pytest.raises(StoreError, match=r"hidden/4/escapes/(index|count)"):
        list(source.codes(stream, SourcePiece(block=0, start=0, stop=2, to=0)))


def test_rows_of_two_blocks_make_one_of_whole_numbers_that_did_not_change(small_store: Path) -> None:
    """Every array of a derived block that begins in the midst of one of the source, beside zarr's rows in a line."""
    reader = CacheReader.open(small_store)
    derivation = plan_derivation(reader.layout, DeriveSettings(src="in.zarr", dst="out.zarr", row_range="11:35"))
    values = BlockDeriver(SourceRows(reader), derivation, StoreLayout.of(derivation.manifest), {}).derive(0)
    assert set(values) == {spec.path for spec in reader.layout.arrays.values()}
    per_row = {"hidden/2/codes": 24, "hidden/4/codes": 24, "logits/log_probs": 4, "logits/log_tail": 4}
    for path, have in values.items():
        assert isinstance(have, np.ndarray)
        blocks = np.asarray(zarr.open_array(str(small_store / path), mode="r"))
        if path.startswith(("logits", "hidden")):
            count = per_row.get(path, 4)
            line = np.concatenate(list(blocks), axis=-1)
            assert np.array_equal(have, line[..., 11 * count : 27 * count]), path
        else:
            assert np.array_equal(have, np.concatenate(list(blocks))[11:27]), path


def test_a_block_that_stays_where_it_was_is_handed_on_as_bytes(small_store: Path) -> None:
    reader = CacheReader.open(small_store)
    derivation = plan_derivation(reader.layout, DeriveSettings(src="in.zarr", dst="out.zarr", row_range="16:40"))
    deriver = BlockDeriver(SourceRows(reader), derivation, StoreLayout.of(derivation.manifest), {})
    for block in range(2):
        for path, have in deriver.derive(block).items():
            (shard,) = (file for file in (small_store / path / "c" / str(block + 1)).rglob("*") if file.is_file())
            assert have == shard.read_bytes(), path
