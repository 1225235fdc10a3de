"""A teacher with sinks through a whole store: built, read, derived, compared with the teacher, refused once changed."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import zarr
from transformers import AutoModelForMaskedLM

from cli import kdcache
from teacher_cache.build.build import build_cache
from teacher_cache.build.plan import plan_build
from teacher_cache.build.settings import BuildSettings
from teacher_cache.contract.batch import TargetBatch, TargetRequest, concatenate
from teacher_cache.contract.streams import VECTORS
from teacher_cache.derive.derive import derive_store
from teacher_cache.derive.settings import DeriveSettings
from teacher_cache.derive.source_rows import SourcePiece, SourceRows
from teacher_cache.errors import StoreError, TeacherError
from teacher_cache.models.attention_tap import enable_tap, record_attention
from teacher_cache.read.info import describe_store
from teacher_cache.read.reader import CacheReader
from teacher_cache.storage.base import open_storage
from teacher_cache.verify.deep.deep import deep_check
from tests.forged import edit_array, forge_entries, reseal
from tests.sinks import COMPONENT, plant_sinks

TARGET = 1e-2
LAYERS = (1, 2, 4)
SETTINGS: dict[str, Any] = {
    "seq_len": 24, "max_rows": 120, "block_rows": 16, "batch_size": 16, "targets": "hidden,attention",
    "layers": "1,2,4", "attention_layer": 3, "precision": f"nmse:{TARGET}", "device": "cpu",
}  # fmt: skip


@pytest.fixture(scope="module")
def teacher(tiny_teacher: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A BERT whose first tokens of documents are sinks."""
    folder = Path(shutil.copytree(tiny_teacher(), tmp_path_factory.mktemp("sinks") / "teacher"))
    plant_sinks(folder, token_id=2)  # [CLS]
    return folder


@pytest.fixture(scope="module")
def store(teacher: Path, tiny_corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("store") / "cache.zarr"
    build_cache(BuildSettings(teacher=str(teacher), corpus=(str(tiny_corpus),), out=str(out), **SETTINGS))
    return out


def read_all(reader: CacheReader, **request: tuple[int, ...]) -> TargetBatch:
    wanted = {"hidden_layers": LAYERS, "attention_layers": (3,)} | request
    (targets,) = reader.read_rows(0, reader.rows, TargetRequest(**wanted)).values()
    return targets


def live(teacher: Path, targets: TargetBatch) -> tuple[dict[int, torch.Tensor], torch.Tensor]:
    """Hidden states by layer, and queries, keys and values of layer 3 side by side, as the teacher's user gets them."""
    model = AutoModelForMaskedLM.from_pretrained(teacher).eval()
    enable_tap(model)
    with torch.no_grad(), record_attention(model, [3]) as recorded:
        given = model.base_model(
            targets.input_ids_BT, attention_mask=targets.real_BT().long(), output_hidden_states=True
        )
    return dict(enumerate(given.hidden_states)), stack(recorded.vectors[3])


def stack(vectors: object) -> torch.Tensor:
    return torch.cat([getattr(vectors, f"{name}_BTD") for name in VECTORS], dim=2)


def nmse(have_ND: torch.Tensor, want_ND: torch.Tensor) -> float:
    have_ND, want_ND = have_ND.double(), want_ND.double()
    return float((have_ND - want_ND).square().sum() / (want_ND - want_ND.mean(0)).square().sum())


def test_ordinary_tokens_have_the_declared_error_and_sinks_that_of_float16(teacher: Path, store: Path) -> None:
    reader = CacheReader.open(store)
    targets = read_all(reader)
    hidden, vectors_BTD = live(teacher, targets)
    first_BT = (targets.input_ids_BT == 2) & targets.real_BT()
    for layer in LAYERS:
        record = reader.manifest.calibration[f"hidden/{layer}"]
        assert record.sinks is not None and record.sinks.dtype == "float16"
        assert record.sinks.variance > 0.9
        assert record.sinks.share == pytest.approx(float(first_BT.sum() / targets.real_BT().sum()), rel=0.3)
        sinks_BT = targets.hidden_sinks[layer]
        assert torch.equal(sinks_BT, first_BT)
        assert torch.equal(targets.ordinary_BT(layer), targets.real_BT() & ~first_BT)
        have_BTD, want_BTD = targets.hidden[layer], hidden[layer]
        assert torch.equal(have_BTD[sinks_BT], want_BTD[sinks_BT].half().float())
        ordinary_BT = targets.ordinary_BT(layer)
        assert nmse(have_BTD[ordinary_BT], want_BTD[ordinary_BT]) == pytest.approx(TARGET, rel=0.15)
        assert record.nmse == pytest.approx(TARGET, rel=0.15)
    # attention is computed from hidden state 2
    assert torch.equal(targets.attention_sinks[3], first_BT)
    have_BTD = stack(targets.attention[3])
    assert torch.allclose(have_BTD[first_BT], vectors_BTD[first_BT], atol=2e-2)
    ordinary_BT = targets.ordinary_attention_BT(3)
    assert nmse(have_BTD[ordinary_BT], vectors_BTD[ordinary_BT]) < 3 * TARGET


def test_rotated_coordinates_of_sinks_are_those_of_what_is_stored(store: Path) -> None:
    reader = CacheReader.open(store)
    plain, rotated = read_all(reader), read_all(reader, rotated_layers=LAYERS)
    for layer in LAYERS:
        rotation = reader.rotation(layer)
        assert rotation is not None
        sinks_BT = plain.hidden_sinks[layer]
        stored_SD = plain.hidden[layer][sinks_BT].double()
        want = (stored_SD - rotation.mean_D.double()) @ rotation.basis_DK.double()
        assert torch.allclose(rotated.hidden[layer][sinks_BT].double(), want, rtol=1e-4, atol=1e-2)


def test_the_example_of_the_format_reads_sinks_with_plain_zarr(store: Path) -> None:
    page = (Path(__file__).resolve().parents[2] / "teacher_cache/format/README.md").read_text()
    (example,) = (code for code in re.findall(r"^```python\n(.*?)^```", page, re.M | re.S) if "def read_nmse" in code)
    names: dict[str, Any] = {}
    exec(example.partition("\nvectors = ")[0], names)
    want = read_all(CacheReader.open(store))
    for layer in LAYERS:
        have_RTD = names["read_nmse"](zarr.open_group(store, mode="r"), f"hidden/{layer}", block=1)
        real_RT = want.real_BT()[16:32]
        assert np.allclose(have_RTD[real_RT], want.hidden[layer][16:32][real_RT], rtol=1e-5, atol=1e-4)


def test_any_range_of_rows_has_its_own_sinks(store: Path) -> None:
    reader = CacheReader.open(store)
    everything = read_all(reader)
    (part,) = reader.read_rows(13, 37, TargetRequest(hidden_layers=(2,), attention_layers=(3,))).values()
    assert torch.equal(part.hidden[2], everything.hidden[2][13:37])
    assert torch.equal(part.hidden_sinks[2], everything.hidden_sinks[2][13:37])
    assert torch.equal(part.attention_sinks[3], everything.attention_sinks[3][13:37])
    pieces = part.rows(2, 5)
    assert torch.equal(pieces.hidden_sinks[2], everything.hidden_sinks[2][15:18])


def test_the_variance_of_a_store_is_that_of_ordinary_tokens(teacher: Path, store: Path) -> None:
    reader = CacheReader.open(store)
    (targets,) = reader.read_rows(0, 64, TargetRequest(hidden_layers=LAYERS)).values()
    for layer in LAYERS:
        values_ND = targets.hidden[layer][targets.ordinary_BT(layer)].double()
        want = float((values_ND - values_ND.mean(0)).square().sum(1).mean())
        assert reader.hidden_variance(layer) == pytest.approx(want, rel=1e-6)


def test_the_forecast_knows_the_bytes_of_sinks(
    teacher: Path, store: Path, tiny_corpus: Path, time_to_try: None
) -> None:
    plan = plan_build(
        BuildSettings(teacher=str(teacher), corpus=(str(tiny_corpus),), out=str(store) + "-not", **SETTINGS)
    )
    written = describe_store(store).bytes_per_array
    (group,) = plan.groups
    for name in ("count", "index", "value"):
        path = f"hidden/2/sinks/{name}"
        assert group.bytes_per_array[path] == pytest.approx(written[path], rel=0.15)


def test_the_teacher_agrees_with_what_is_stored_of_sinks(store: Path) -> None:
    report = deep_check(open_storage(store), 24, device="cpu")
    assert report.ok, report.checks


@pytest.mark.parametrize("wrong", ["-1", "beyond", "falling", "count", "nan"])
def test_sinks_that_have_no_place_are_not_derived(wrong: str, store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = SourceRows(CacheReader.open(store))
    stream = next(stream for stream in source.reader.layout.nmse_streams if stream.calibration.sinks is not None)
    tokens = source.manifest.block_rows * source.manifest.seq_len
    forged = {"-1": [-1, 3], "beyond": [3, tokens], "falling": [5, 4]}.get(wrong, [3, 4])
    piece = SourcePiece(block=0, start=0, stop=2, to=0)
    assert source.sinks(stream, piece)
    count, value = 10**6 if wrong == "count" else 2, np.nan if wrong == "nan" else None
    forge_entries(monkeypatch, "sinks", index=forged, count=count, value=value)
    with pytest.raises(StoreError, match=rf"{stream.path}/sinks/(index|count|value)"):
        source.sinks(stream, piece)


@pytest.mark.parametrize("way", ["kept", "coarsened", "moved"])
def test_derived_stores_keep_sinks_as_they_are(store: Path, tmp_path: Path, way: str) -> None:
    out = tmp_path / "derived.zarr"
    flags = {"kept": {}, "coarsened": {"precision": "nmse:1e-1"}, "moved": {"row_range": "5:93"}}[way]
    derive_store(DeriveSettings(src=str(store), dst=str(out), **flags))
    before, after = (read_all(CacheReader.open(one)) for one in (store, out))
    if way == "moved":
        before = before.rows(5, 93)
    reader = CacheReader.open(out)
    for layer in LAYERS:
        sinks_BT = after.hidden_sinks[layer]
        assert torch.equal(sinks_BT, before.hidden_sinks[layer]) and sinks_BT.any()
        assert torch.equal(after.hidden[layer][sinks_BT], before.hidden[layer][sinks_BT])
        records = [CacheReader.open(one).manifest.calibration[f"hidden/{layer}"] for one in (store, out)]
        assert records[0].sinks == records[1].sinks
    assert torch.equal(after.attention_sinks[3], before.attention_sinks[3])
    report = deep_check(reader.storage, 24, device="cpu")
    assert report.ok, report.checks


def test_a_store_in_a_fixed_precision_finds_its_sinks_when_it_becomes_nmse(
    teacher: Path, tiny_corpus: Path, tmp_path: Path
) -> None:
    settings = SETTINGS | {"precision": "float16", "targets": "hidden"}
    settings.pop("attention_layer")
    source, out = tmp_path / "float16.zarr", tmp_path / "nmse.zarr"
    build_cache(BuildSettings(teacher=str(teacher), corpus=(str(tiny_corpus),), out=str(source), **settings))
    derive_store(DeriveSettings(src=str(source), dst=str(out), precision=f"nmse:{TARGET}"))
    exact, coded = (read_all(CacheReader.open(one), attention_layers=()) for one in (source, out))
    assert not exact.hidden_sinks
    for layer in LAYERS:
        sinks_BT, ordinary_BT = coded.hidden_sinks[layer], coded.ordinary_BT(layer)
        assert torch.equal(sinks_BT, (coded.input_ids_BT == 2) & coded.real_BT())
        assert torch.equal(coded.hidden[layer][sinks_BT], exact.hidden[layer][sinks_BT])
        error = nmse(coded.hidden[layer][ordinary_BT], exact.hidden[layer][ordinary_BT])
        assert error == pytest.approx(TARGET, rel=0.15)


def test_queries_keys_and_values_in_their_own_metric_have_sinks(
    tiny_teacher: Callable[..., Path], tiny_corpus: Path, tmp_path: Path
) -> None:
    """Attention alone, in the form `projected`, of a teacher whose attention sees the sinks."""
    teacher = Path(shutil.copytree(tiny_teacher(), tmp_path / "teacher"))
    plant_sinks(teacher, token_id=2, seen=0.3)
    out = tmp_path / "cache.zarr"
    settings = SETTINGS | {"targets": "attention"}
    settings.pop("layers")
    build_cache(BuildSettings(teacher=str(teacher), corpus=(str(tiny_corpus),), out=str(out), **settings))
    reader = CacheReader.open(out)
    record = reader.manifest.calibration["attention/3/projected"]
    assert record.sinks is not None
    targets = read_all(reader, hidden_layers=())
    _, want_BTD = live(teacher, targets)
    have_BTD, sinks_BT, ordinary_BT = (
        stack(targets.attention[3]),
        targets.attention_sinks[3],
        targets.ordinary_attention_BT(3),
    )
    assert torch.equal(sinks_BT, (targets.input_ids_BT == 2) & targets.real_BT())
    assert nmse(have_BTD[ordinary_BT], want_BTD[ordinary_BT]) == pytest.approx(TARGET, rel=0.2)
    error_S = (have_BTD - want_BTD)[sinks_BT].norm(dim=1) / want_BTD[sinks_BT].norm(dim=1)
    assert float(error_S.max()) < 2.0**-11
    report = deep_check(reader.storage, 24, device="cpu")
    assert report.ok, report.checks


def test_each_masked_view_has_sinks_of_its_own(teacher: Path, tiny_corpus: Path, tmp_path: Path) -> None:
    """In a store, and in one of some of its rows."""
    settings = SETTINGS | {"targets": "hidden", "layers": "2", "hs_view": "masked", "views": 2}
    settings.pop("attention_layer")
    stores = tmp_path / "cache.zarr", tmp_path / "part.zarr"
    build_cache(BuildSettings(teacher=str(teacher), corpus=(str(tiny_corpus),), out=str(stores[0]), **settings))
    derive_store(DeriveSettings(src=str(stores[0]), dst=str(stores[1]), row_range="5:93"))
    model = AutoModelForMaskedLM.from_pretrained(teacher).eval().base_model
    for view in (0, 1):
        whole, part = (
            reader.read_rows(0, reader.rows, TargetRequest(hidden_layers=(2,)), masked_view=view)["masked"]
            for reader in map(CacheReader.open, stores)
        )
        with torch.no_grad():
            given = model(whole.input_ids_BT, attention_mask=whole.real_BT().long(), output_hidden_states=True)
        sinks_BT = whole.hidden_sinks[2]
        assert torch.equal(sinks_BT, (whole.input_ids_BT == 2) & whole.real_BT())
        stored_SD, live_SD = whole.hidden[2][sinks_BT], given.hidden_states[2][sinks_BT]
        assert torch.allclose(stored_SD, live_SD, rtol=2.0**-10, atol=1e-3)
        assert torch.equal(part.hidden_sinks[2], sinks_BT[5:93])
        assert torch.equal(part.hidden[2], whole.hidden[2][5:93])


def test_the_user_is_told(store: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert kdcache.main(["info", str(store)]) == 0
    (line,) = (line for line in capsys.readouterr().out.splitlines() if line.startswith("hidden/2: sinks"))
    record = CacheReader.open(store).manifest.calibration["hidden/2"].sinks
    assert record is not None and f"{record.share:.2%} of the tokens" in line and "float16" in line


def test_stores_are_read_as_one_though_only_some_have_sinks(
    store: Path, tiny_teacher: Callable[..., Path], tiny_corpus: Path, tmp_path: Path
) -> None:
    """Of every calibrated layer it is said which tokens are sinks, also where none are."""
    batch = read_all(CacheReader.open(store))
    other = tmp_path / "other.zarr"
    build_cache(BuildSettings(teacher=str(tiny_teacher()), corpus=(str(tiny_corpus),), out=str(other), **SETTINGS))
    without = read_all(CacheReader.open(other))
    assert not any(one.any() for one in (*without.hidden_sinks.values(), *without.attention_sinks.values()))
    assert not list(other.rglob("sinks"))
    both = concatenate([batch, without])
    assert torch.equal(both.hidden_sinks[2], torch.cat([batch.hidden_sinks[2], without.hidden_sinks[2]]))


@pytest.mark.parametrize(
    ("array", "edit", "message"),
    [
        ("count", lambda count: count.fill(-3), "counts -3 entries"),
        ("count", lambda count: count.fill(10**6), "counts 1000000 entries"),
        ("index", lambda index: index.fill(10**6), "holds 1000000"),
        ("index", lambda index: index.fill(0), "above the one before it"),
        ("value", lambda value: value.fill(np.inf), "a finite number"),
    ],
)
def test_what_no_build_writes_of_sinks_is_refused(
    store: Path, tmp_path: Path, array: str, edit: Callable[[np.ndarray], None], message: str
) -> None:
    changed = Path(shutil.copytree(store, tmp_path / "changed.zarr"))
    edit_array(changed, f"hidden/2/sinks/{array}", 1, edit)
    reseal(changed)
    with pytest.raises(StoreError, match=message):
        read_all(CacheReader.open(changed))


@pytest.mark.parametrize("name", ["count/c/1/0", "index/c/1/0/0", "value/c/1/0/0/0"])
def test_a_flipped_bit_in_sinks_is_refused(store: Path, tmp_path: Path, name: str) -> None:
    changed = Path(shutil.copytree(store, tmp_path / "changed.zarr"))
    shard = changed / "hidden/2/sinks" / name
    data = bytearray(shard.read_bytes())
    data[len(data) // 2] ^= 1
    shard.write_bytes(data)
    with pytest.raises(StoreError, match="hidden/2/sinks"):
        read_all(CacheReader.open(changed))


def test_wrong_sinks_do_not_pass_the_comparison_with_the_teacher(store: Path, tmp_path: Path) -> None:
    changed = Path(shutil.copytree(store, tmp_path / "changed.zarr"))

    def move(value: np.ndarray) -> None:
        value[:, :, COMPONENT + 1] += 3

    for block in range(8):
        edit_array(changed, "hidden/4/sinks/value", block, move)
    reseal(changed)
    report = deep_check(open_storage(changed), 24, device="cpu")
    (line,) = [check for check in report.checks if check.problem]
    assert line.target == "hidden/4" and "sinks" in line.problem


def test_more_sinks_than_there_is_room_for_stop_the_build(store: Path) -> None:
    from teacher_cache.format.packed_streams import Sinks, StreamPacker

    layout = CacheReader.open(store).layout
    stream = layout.stream("hidden/2")
    room = layout.arrays["hidden/2/sinks/index"].block_shape[1]
    full, more = StreamPacker(layout, stream), StreamPacker(layout, stream)
    full.put_sinks(Sinks(np.arange(room), np.ones((room, 32), dtype=np.float16)))
    assert full.finish()["hidden/2/sinks/count"].tolist() == [room]
    more.put_sinks(Sinks(np.arange(room + 1), np.ones((room + 1, 32), dtype=np.float16)))
    with pytest.raises(TeacherError, match=f"has {room + 1} tokens in one block.*room is for {room}"):
        more.finish()
