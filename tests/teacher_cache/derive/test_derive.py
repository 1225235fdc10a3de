"""A derived store holds what its source holds, coarser where asked for, and says truly how much coarser."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
import zarr

from teacher_cache.build.build import build_cache
from teacher_cache.build.settings import BuildSettings
from teacher_cache.contract.batch import SampledLogits, TargetBatch, TargetRequest
from teacher_cache.contract.streams import VECTORS
from teacher_cache.derive.derive import DeriveReport, derive_into, derive_store
from teacher_cache.derive.settings import DeriveSettings
from teacher_cache.derive.source_rows import SourceRows, find_pieces
from teacher_cache.errors import SettingsError, StoreError
from teacher_cache.format.groups import read_groups
from teacher_cache.format.layout import DISTINCT
from teacher_cache.format.small_arrays import read_constant
from teacher_cache.read.load import BlockLoader
from teacher_cache.read.reader import CacheReader
from teacher_cache.storage.base import open_storage
from teacher_cache.storage.local import LocalStorage
from teacher_cache.verify.evict import evict_damage

if TYPE_CHECKING:
    from tests.conftest import S3Server

Settings = Callable[..., BuildSettings]
EVERYTHING = TargetRequest(hidden_layers=(2, 4), attention_layers=(3,), logits=True)


class Notes(list[str]):
    """Progress that is kept."""

    rows = (0, 0)

    def note(self, text: str) -> None:
        self.append(text)

    def committed(self, rows: int, total: int, written_bytes: int) -> None:
        self.rows = (rows, total)


def derive(source: Path, out: Path, **flags: Any) -> CacheReader:
    report = derive_store(DeriveSettings(src=str(source), dst=str(out), **flags), Notes())
    reader = CacheReader.open(out)
    assert report.rows == report.written_rows == reader.rows
    return reader


@pytest.fixture(scope="module")
def sample_store(small_settings: Settings, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Drawn ids of two masked views, queries, keys and values, documents of many lengths, in one byte."""
    out = tmp_path_factory.mktemp("sample") / "cache.zarr"
    settings = small_settings(
        out, logits="sample", k=20, views=2, relations="qkv", rows="document", precision="int8", hs_view="masked"
    )
    build_cache(settings)
    return out


def codes(reader: CacheReader, path: str, first: int, last: int) -> np.ndarray[Any, Any]:
    """The codes [D, W, N] of some rows of a calibrated stream."""
    stream, rows = reader.layout.stream(path), SourceRows(reader)
    pieces = find_pieces(reader.manifest, first, last)
    return np.concatenate([np.stack([*map(np.asarray, rows.codes(stream, one))], axis=1) for one in pieces], axis=2)


def assert_equal_rows(have: TargetBatch, want: TargetBatch) -> None:
    """Every input is the same, and every target: bit for bit but for the order of sums in a matrix product."""
    assert torch.equal(have.input_ids_BT, want.input_ids_BT)
    assert torch.equal(have.row_id_B, want.row_id_B)
    assert have.hidden.keys() == want.hidden.keys() and have.attention.keys() == want.attention.keys()
    for n, values in want.hidden.items():
        assert torch.allclose(have.hidden[n], values, rtol=1e-6, atol=1e-6)
    for n, vectors in want.attention.items():
        for name in (f"{vector}_BTD" for vector in VECTORS):
            assert torch.allclose(getattr(have.attention[n], name), getattr(vectors, name), rtol=1e-6, atol=1e-6)
    if want.places is not None:
        assert have.places is not None
        for name in ("positions_BM", "label_ids_BM", "count_B"):
            assert torch.equal(getattr(have.places, name), getattr(want.places, name))
    assert type(have.logits) is type(want.logits)
    for name in vars(want.logits) if want.logits is not None else ():
        assert torch.equal(getattr(have.logits, name), getattr(want.logits, name))


@pytest.mark.parametrize("rows", ["0:40", "16:40", "5:37", "30:31", "31:33"])
@pytest.mark.parametrize("store", ["small_store", "nmse_store", "sample_store"])
def test_rows_come_out_as_they_are_in_the_source(
    store: str, rows: str, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    path: Path = request.getfixturevalue(store)
    source, (first, last) = CacheReader.open(path), map(int, rows.split(":"))
    last = min(last, source.rows)
    reader = derive(path, tmp_path / "out.zarr", row_range=f"{first}:{last}")
    assert (reader.rows, reader.manifest.first_row) == (last - first, first)
    assert reader.manifest.corpus == source.manifest.corpus
    assert reader.manifest.calibration == source.manifest.calibration
    for stream in reader.manifest.calibration:
        assert np.array_equal(codes(reader, stream, 0, reader.rows), codes(source, stream, first, last))
        for name in ("basis", "mean", "step"):
            constants = [read_constant(one.storage, f"{stream}/{name}") for one in (reader, source)]
            assert np.array_equal(*constants)
    for masked_view in range(source.manifest.views):
        have = reader.read_rows(0, reader.rows, EVERYTHING, masked_view=masked_view)
        want = source.read_rows(first, last, EVERYTHING, masked_view=masked_view)
        assert have.keys() == want.keys()
        for view in want:
            assert_equal_rows(have[view], want[view])
    assert reader.hidden_variance(4) == source.hidden_variance(4)
    have_R, want_R = (
        zarr.open_array(str(store), path="document", mode="r")[...].ravel() for store in (reader.path, path)
    )
    assert np.array_equal(have_R[: reader.rows], want_R[first:last])


@pytest.mark.parametrize("store", ["small_store", "nmse_store"])
def test_attention_outlives_the_hidden_state_it_shared(
    store: str, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    path: Path = request.getfixturevalue(store)
    reader = derive(path, tmp_path / "out.zarr", targets="attention")
    assert reader.manifest.targets.attention[0].form == "input"
    assert sorted(file.name for file in Path(reader.path).iterdir() if file.is_dir()) == [
        "attention", "commits", "document", "input_ids", "length", "row_id", "teacher",
    ]  # fmt: skip
    wanted = TargetRequest(attention_layers=(3,))
    reader.require(wanted)
    assert reader.views_for(wanted) == ("plain",)
    have, want = (one.read_rows(0, 40, wanted)["plain"].attention[3] for one in (reader, CacheReader.open(path)))
    for vector in VECTORS:
        assert torch.equal(getattr(have, f"{vector}_BTD"), getattr(want, f"{vector}_BTD"))
    # and once more from there
    again = derive(Path(reader.path), tmp_path / "again.zarr", row_range="3:")
    assert torch.allclose(again.read_rows(0, 37, wanted)["plain"].attention[3].key_BTD, want.key_BTD[3:], atol=1e-6)


def test_relation_matrices_are_kept(small_settings: Settings, tmp_path: Path) -> None:
    settings = small_settings(tmp_path / "in.zarr", relations="matrix", targets="attention", hs_view="masked", views=2)
    build_cache(settings)
    reader = derive(Path(settings.out), tmp_path / "out.zarr", row_range="7:30", precision="nmse:1e-1")
    assert reader.manifest.targets == CacheReader.open(settings.out).manifest.targets
    for masked_view in range(2):
        have, want = (
            one.read_rows(first, first + 23, TargetRequest(attention_layers=(3,)), masked_view=masked_view)["masked"]
            for one, first in ((reader, 0), (CacheReader.open(settings.out), 7))
        )
        assert torch.equal(have.input_ids_BT, want.input_ids_BT)
        for name, values in vars(want.attention[3]).items():
            assert torch.equal(getattr(have.attention[3], name), values)


def test_padding_stays_nothing(sample_store: Path, tmp_path: Path) -> None:
    reader = derive(sample_store, tmp_path / "out.zarr", precision="nmse:1e-1", row_range="3:30")
    streams = set(reader.manifest.calibration)
    assert streams == {"hidden/2", "hidden/4", *(f"attention/3/{vector}" for vector in VECTORS)}
    rows = SourceRows(reader)
    for path in streams:
        padding_N = np.concatenate([rows.padding(piece) for piece in find_pieces(reader.manifest, 0, reader.rows)])
        codes_DWN = codes(reader, path, 0, reader.rows)
        assert padding_N.any() and not codes_DWN[:, :, padding_N].any() and codes_DWN[:, :, ~padding_N].any()
    (targets,) = reader.read_rows(0, reader.rows, EVERYTHING, masked_view=1).values()
    assert isinstance(targets.logits, SampledLogits)


def test_a_source_of_several_groups_becomes_one(small_settings: Settings, tmp_path: Path) -> None:
    for layers in ("2", "2,4"):
        build_cache(small_settings(tmp_path / "in.zarr", targets="hidden", layers=layers))
    assert len(read_groups(LocalStorage(tmp_path / "in.zarr"))) == 2
    reader = derive(tmp_path / "in.zarr", tmp_path / "out.zarr", max_rows=20)
    (group,) = read_groups(reader.storage)
    assert group.manifest.targets.hidden_layers() == (2, 4) and not group.manifest.inputs_held


def test_from_a_bucket_into_a_bucket(nmse_store: Path, s3: S3Server, tmp_path: Path) -> None:
    flags: dict[str, Any] = {"precision": "nmse:5e-2", "targets": "hidden", "layers": "4"}
    bucket = s3.bucket("derive")
    remote = open_storage(f"{bucket}/in.zarr")
    for file in filter(Path.is_file, nmse_store.rglob("*")):
        remote.write_file(file.relative_to(nmse_store).as_posix(), file)
    for source, out in ((nmse_store, tmp_path / "out.zarr"), (f"{bucket}/in.zarr", f"{bucket}/out.zarr")):
        derive_store(DeriveSettings(src=str(source), dst=str(out), **flags), Notes())
    copied = open_storage(f"{bucket}/out.zarr")
    have = {key: copied.read(key) for key in copied.list() if key not in ("zarr.json", "seal.json")}
    assert have == all_but_provenance(tmp_path / "out.zarr")
    with pytest.raises(SettingsError, match="lies in SRC"):
        derive_store(DeriveSettings(src=f"{bucket}/in.zarr/", dst=f"{bucket}/in.zarr", **flags), Notes())


class Failing(LocalStorage):
    """A disk that fails after so many writes."""

    def __init__(self, location: Path, writes: int) -> None:
        super().__init__(location)
        self.writes = writes

    def write(self, key: str, data: bytes) -> None:
        self.writes -= 1
        if self.writes < 0:
            raise OSError("the disk is gone")
        super().write(key, data)


def all_but_provenance(store: Path) -> dict[str, bytes]:
    files = {file.relative_to(store).as_posix(): file for file in sorted(store.rglob("*")) if file.is_file()}
    return {key: file.read_bytes() for key, file in files.items() if key not in ("zarr.json", "seal.json")}


def test_a_derivation_that_broke_off_goes_on(nmse_store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("teacher_cache.derive.derive._MOST_AT_ONCE", 1)  # one block after the other
    flags: dict[str, Any] = {"precision": "nmse:5e-2", "row_range": "2:40", "targets": "hidden", "layers": "4"}
    derive(nmse_store, tmp_path / "whole.zarr", **flags)
    want = all_but_provenance(tmp_path / "whole.zarr")
    out = tmp_path / "out.zarr"
    settings = DeriveSettings(src=str(nmse_store), dst=str(out), **flags)
    operations = Failing(out, 10_000)
    derive_into(operations, settings, Notes())
    writes = 10_000 - operations.writes
    # before the first block, in the midst of the last one, before the seal
    for after, rows in ((5, 38), (writes - 5, 6), (writes - 1, 0)):
        shutil.rmtree(out)
        with pytest.raises(OSError, match="the disk is gone"):
            derive_into(Failing(out, after), settings, Notes())
        with pytest.raises(StoreError):
            CacheReader.open(out)
        assert derive_store(settings, Notes()).written_rows == rows, f"after {after} of {writes} writes"
        assert all_but_provenance(out) == want
        CacheReader.open(out).teacher_folder()


def test_a_finished_store_is_left_alone_or_mended(small_store: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.zarr"
    settings = DeriveSettings(src=str(small_store), dst=str(out), targets="hidden")

    def again() -> tuple[DeriveReport, Notes]:
        notes = Notes()
        return derive_store(settings, notes), notes

    again()
    before = all_but_provenance(out)
    report, notes = again()
    assert report.written_rows == 0 and notes[-1].endswith("is complete already: 40 rows; nothing to do")
    (out / "hidden/2/codes/c/1/0/0").unlink()
    report, notes = again()
    assert report.written_rows == 16 and notes.rows == (40, 40)
    assert all_but_provenance(out) == before


def test_a_store_that_is_being_mended_is_not_sealed(small_store: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.zarr"
    settings = DeriveSettings(src=str(small_store), dst=str(out), targets="hidden")
    derive_store(settings, Notes())
    before = all_but_provenance(out)
    (out / "hidden/2/codes/c/1/0/0").unlink()

    class Ends(Notes):
        def committed(self, rows: int, total: int, written_bytes: int) -> None:
            if written_bytes:
                raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        derive_store(settings, Ends())
    with pytest.raises(StoreError, match="is unfinished"):
        CacheReader.open(out)
    assert derive_store(settings, Notes()).written_rows == 0
    assert all_but_provenance(out) == before


def test_a_derived_store_with_added_targets_is_mended(
    small_settings: Settings, small_store: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out.zarr"
    settings = DeriveSettings(src=str(small_store), dst=str(out), targets="hidden", layers="2", precision="int8")
    derive_store(settings, Notes())
    build_cache(small_settings(out, targets="hidden", layers="3", precision="int8"))
    before = all_but_provenance(out)
    shard = out / "hidden/2/codes/c/1/0/0"
    shard.write_bytes(shard.read_bytes()[:-1] + b"?")
    evict_damage(LocalStorage(out))
    with pytest.raises(StoreError, match=r"(?s)same `kdcache build` or `kdcache derive` again.* was made .* by: "):
        CacheReader.open(out)
    assert derive_store(settings, Notes()).written_rows == 16
    assert all_but_provenance(out) == before
    assert CacheReader.open(out).manifest.targets.hidden_layers() == (2, 3)


def test_damage_in_the_source_is_not_handed_on(small_store: Path, tmp_path: Path) -> None:
    source = Path(shutil.copytree(small_store, tmp_path / "in.zarr"))
    shard = source / "hidden/2/codes/c/1/0/0"
    shard.write_bytes(shard.read_bytes()[:-1] + b"?")
    for number, flags in enumerate(({}, {"row_range": "3:"}, {"precision": "nmse:1e-1"})):
        with pytest.raises(StoreError, match="'hidden/2/codes/c/1/0/0' .*has other contents"):
            derive(source, tmp_path / f"{number}.zarr", **flags)


def test_a_place_that_holds_something_else_is_left_alone(
    small_settings: Settings, small_store: Path, nmse_store: Path, tmp_path: Path
) -> None:
    (tmp_path / "thesis.txt").write_text("precious")
    with pytest.raises(StoreError, match="not a store"):
        derive(small_store, tmp_path)
    for inside in (small_store, small_store / "hidden" / "new"):
        with pytest.raises(SettingsError, match="lies in SRC"):
            derive(small_store, inside)
    assert not (small_store / "hidden" / "new").exists()
    out = tmp_path / "out.zarr"
    derive(nmse_store, out, precision="nmse:1e-1")
    before = all_but_provenance(out)
    with pytest.raises(StoreError, match="hidden 2: it has 'plain view, nmse:0.1', asked for is '.*nmse:0.01'"):
        derive(nmse_store, out)
    with pytest.raises(StoreError, match=r"first row \(--part\): it has 0, asked for is 4"):
        derive(nmse_store, out, precision="nmse:1e-1", row_range="4:")
    # the same settings, but the first steps were taken from another store
    build_cache(small_settings(tmp_path / "other.zarr", precision="nmse:1e-2", views=2, max_rows=41))
    with pytest.raises(StoreError, match="was begun from another store"):
        derive(tmp_path / "other.zarr", out, precision="nmse:1e-1", max_rows=40)
    assert all_but_provenance(out) == before and (out / "seal.json").exists()
    derive_kept = tmp_path / "kept.zarr"
    derive(nmse_store, derive_kept)
    with pytest.raises(StoreError, match="hidden/2: it has other codes than hidden/2 of SRC"):
        derive(tmp_path / "other.zarr", derive_kept, max_rows=40)


def test_draws_that_have_no_room_are_refused(
    sample_store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where rows move, entries are placed by these counts."""
    load = BlockLoader.load_array

    def forge(self: BlockLoader, path: str, block: int, part: Any = None) -> Any:
        array = load(self, path, block, part)
        return np.full_like(array, 21) if path == DISTINCT else array

    monkeypatch.setattr(BlockLoader, "load_array", forge)
    with pytest.raises(StoreError, match=f"'{DISTINCT}' of block 0 holds 21, which must be at most 20"):
        derive_store(DeriveSettings(src=str(sample_store), dst=str(tmp_path / "out.zarr"), row_range="5:30"))
