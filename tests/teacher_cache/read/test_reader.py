"""A reader gives what was committed or refuses; it never gives anything else."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import zarr

from teacher_cache.contract.batch import TargetRequest, concatenate
from teacher_cache.errors import DamagedStoreError, StoreError
from teacher_cache.format.groups import read_seal
from teacher_cache.format.protocol import (
    COMMIT_HASHES,
    METADATA,
    SEAL,
    commit_hashes_size,
    digest_object,
    read_manifest,
    write_manifest,
)
from teacher_cache.read.reader import CacheReader
from teacher_cache.storage.local import LocalStorage
from teacher_cache.threads import ReadingThreads

EVERYTHING = TargetRequest(hidden_layers=(2, 4), attention_layers=(3,), logits=True)


@pytest.fixture
def copy(small_store: Path, tmp_path: Path) -> Path:
    """A store to damage."""
    return Path(shutil.copytree(small_store, tmp_path / "cache.zarr"))


@pytest.mark.parametrize("store", ["small_store", "nmse_store"])
def test_any_row_range_is_a_slice_of_the_whole(store: str, request: pytest.FixtureRequest) -> None:
    reader = CacheReader.open(request.getfixturevalue(store))
    whole = reader.read_rows(0, 40, EVERYTHING)
    for start, stop in ((0, 1), (15, 17), (3, 35), (39, 40)):
        part = reader.read_rows(start, stop, EVERYTHING)
        for view in ("plain", "masked"):
            want = whole[view].rows(start, stop)
            assert torch.equal(part[view].input_ids_BT, want.input_ids_BT)
            assert part[view].hidden.keys() == want.hidden.keys()
            for n in want.hidden:
                # equal but for the order of a matrix product's sums, where the codec has one
                assert torch.allclose(part[view].hidden[n], want.hidden[n], rtol=1e-5, atol=1e-5)
        part_logits, want_logits = part["masked"].logits, whole["masked"].rows(start, stop).logits
        assert part_logits is not None
        assert want_logits is not None
        assert torch.equal(part_logits.ids_BMK, want_logits.ids_BMK)
        assert torch.equal(part_logits.log_tail_BM, want_logits.log_tail_BM)
    halves = [whole["masked"].rows(0, 20), whole["masked"].rows(20, 40)]
    assert torch.equal(concatenate(halves).row_id_B, whole["masked"].row_id_B)


class Recorded(ReadingThreads):
    """Threads that remember what they were given."""

    def __init__(self) -> None:
        super().__init__(3, "reading")
        self.tasks: list[list[str]] = []

    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
        self.tasks.append(args[0])
        return super().submit(fn, *args, **kwargs)


class Afar:
    """A folder's storage as one that is not known to be near."""

    def __init__(self, storage: object) -> None:
        self._storage = storage

    def __getattr__(self, name: str) -> Any:
        return getattr(self._storage, name)


@pytest.mark.parametrize("afar", [False, True])
@pytest.mark.parametrize("store", ["small_store", "nmse_store", "causal_store"])
def test_threads_share_a_block_and_load_what_one_would(store: str, afar: bool, request: pytest.FixtureRequest) -> None:
    reader = CacheReader.open(request.getfixturevalue(store))
    if afar:
        reader._objects.storage = Afar(reader.storage)  # type: ignore[assignment]
    manifest = reader.manifest
    asked = TargetRequest(
        hidden_layers=tuple(spec.layer for spec in manifest.targets.hidden),
        attention_layers=tuple(spec.layer for spec in manifest.targets.attention),
        logits=manifest.targets.logits is not None,
    )
    for view in reader.views_for(asked):
        threads = Recorded()
        together = reader.load_block(1, asked, view, threads=threads).arrays
        alone = reader.load_block(1, asked, view).arrays
        assert together.keys() == alone.keys()
        assert all(np.array_equal(together[path], alone[path]) for path in alone)
        assert sorted(path for task in threads.tasks for path in task) == sorted(alone)
        if afar:
            # a request each, so that no thread waits for several
            assert len(threads.tasks) == len(alone)
        else:
            assert all(len(task) == 1 for task in threads.tasks if any("/codes/" in path for path in task))
            assert len(threads.tasks) < len(alone)


def test_plain_zarr_reads_the_documented_layout(small_store: Path) -> None:
    """Without a line of ours: row 17, position 5, hidden state 4, as layout.py says."""
    codes = zarr.open_array(str(small_store / "hidden/4/codes"), mode="r")
    block, row, position, positions = 17 // 16, 17 % 16, 5, 24
    plain = np.asarray(codes[block])[:, row * positions + position].astype(np.float32)
    ours = CacheReader.open(small_store).read_rows(17, 18, TargetRequest(hidden_layers=(4,)))["plain"]
    assert np.array_equal(plain, ours.hidden[4][0, position].numpy())
    assert codes.shape == (3, 32, 16 * 24)


def test_plain_zarr_reads_the_packed_layout(nmse_store: Path) -> None:
    """Without a line of ours: row 17, position 5, hidden state 4 from packed codes, escapes, basis, mean and step."""
    folder = nmse_store / "hidden/4"
    block, token, tokens = 17 // 16, (17 % 16) * 24 + 5, 16 * 24
    codes = []
    for name, limit, per_byte in (("wide", 0, 1), ("byte", 0, 1), ("pair", 7, 2), ("triple", 2, 3), ("five", 1, 5)):
        if (folder / "codes" / name).exists():
            packed = np.asarray(zarr.open_array(str(folder / "codes" / name), mode="r")[block])
            assert packed.shape[1] == -(-tokens // per_byte)
            digits = packed[:, token // per_byte].astype(int)
            if per_byte > 1:
                digits = digits // (2 * limit + 1) ** (per_byte - 1 - token % per_byte) % (2 * limit + 1) - limit
            codes += list(digits)
    codes += [0] * (32 - len(codes))
    count, index, value = (
        np.asarray(zarr.open_array(str(folder / "escapes" / n), mode="r")[block])[0]
        for n in ("count", "index", "value")
    )
    for where, escaped in zip(index[:count], value[:count], strict=True):
        if where % tokens == token:
            codes[where // tokens] = escaped
    basis, mean, step = (np.asarray(zarr.open_array(str(folder / n), mode="r")[...]) for n in ("basis", "mean", "step"))
    ours = CacheReader.open(nmse_store).read_rows(17, 18, TargetRequest(hidden_layers=(4,)))["plain"]
    assert np.allclose(mean + basis @ np.array(codes) * step, ours.hidden[4][0, 5].numpy(), atol=1e-4)


@pytest.mark.parametrize("masked_view", [-1, 2])
def test_masked_views_that_there_are_not_are_no_damage(nmse_store: Path, masked_view: int) -> None:
    reader = CacheReader.open(nmse_store)
    with pytest.raises(ValueError, match=f"masked view {masked_view} is not within 0..2"):
        reader.read_rows(0, 3, TargetRequest(logits=True), masked_view=masked_view)
    # there is one plain view, whichever of the masked ones goes with it
    reader.read_rows(0, 3, TargetRequest(hidden_layers=(2,)), masked_view=masked_view)


def test_rotated_coordinates_turn_back_into_hidden_states(nmse_store: Path, small_store: Path) -> None:
    reader = CacheReader.open(nmse_store)
    requests = [
        TargetRequest(hidden_layers=(2,), attention_layers=(3,), rotated_layers=layers) for layers in ((), (2,))
    ]
    plain, rotated = (reader.decode(reader.load_block(1, request, "plain"), 3, 9) for request in requests)
    rotation = reader.rotation(2)
    assert rotation is not None
    again = rotation.synthesise(rotated.hidden[2].flatten(0, 1)).view_as(plain.hidden[2])
    assert torch.allclose(again, plain.hidden[2], atol=1e-5)
    assert not torch.allclose(rotated.hidden[2], plain.hidden[2], atol=1e-2)
    assert torch.equal(rotated.attention[3].key_BTD, plain.attention[3].key_BTD)
    assert CacheReader.open(small_store).rotation(2) is None


def test_variance_is_that_of_the_stored_states(small_store: Path) -> None:
    reader = CacheReader.open(small_store)
    targets = reader.read_rows(0, 40, TargetRequest(hidden_layers=(2,)))["plain"]
    values = targets.hidden[2][targets.real_BT()].double()
    want = ((values - values.mean(0)) ** 2).sum(1).mean()
    assert reader.hidden_variance(2) == pytest.approx(float(want), rel=1e-6)


Damage = Callable[[Path], object]


def flip(file: Path) -> None:
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(bytes(data))


def swap(one: Path, other: Path) -> None:
    first, second = one.read_bytes(), other.read_bytes()
    one.write_bytes(second)
    other.write_bytes(first)


DAMAGES: dict[str, tuple[Damage, str]] = {
    "a flipped bit": (lambda store: flip(store / "hidden/2/codes/c/1/0/0"), "other contents"),
    "a truncated shard": (lambda store: (store / "hidden/2/codes/c/1/0/0").write_bytes(b"short"), "bytes instead of"),
    "an empty shard": (lambda store: (store / "logits/ids/low/c/1/0/0").write_bytes(b""), "bytes instead of"),
    "a deleted shard": (lambda store: (store / "input_ids/c/1/0/0").unlink(), "is missing"),
    "two swapped shards": (
        lambda store: swap(store / "hidden/2/codes/c/1/0/0", store / "hidden/4/codes/c/1/0/0"),
        "instead of|other contents",
    ),
    "a changed commit": (lambda store: flip(store / "commits/00000001.json"), "changed after|cannot be read"),
    "a commit in place of another": (
        lambda store: shutil.copy2(store / "commits/00000000.json", store / "commits/00000001.json"),
        "changed after the store was sealed",
    ),
    "a deleted commit": (lambda store: (store / "commits/00000001.json").unlink(), "cannot be read"),
}  # fmt: skip


@pytest.mark.parametrize("name", DAMAGES)
def test_damage_is_refused_and_the_rest_still_reads(copy: Path, name: str) -> None:
    damage, message = DAMAGES[name]
    damage(copy)
    reader = CacheReader.open(copy)
    with pytest.raises(StoreError, match=message):
        reader.read_rows(16, 32, EVERYTHING)
    assert len(reader.read_rows(0, 16, EVERYTHING)["plain"].input_ids_BT) == 16


@pytest.mark.parametrize("key", ["hidden/2/variance/c", "hidden/2/codes/zarr.json", "zarr.json"])
def test_changed_metadata_is_refused_on_opening(copy: Path, key: str) -> None:
    file = copy / key
    data = file.read_bytes()
    file.write_bytes(data + b" " if key.endswith("json") else data[:-1] + bytes([data[-1] ^ 1]))
    with pytest.raises(StoreError, match="damaged"):
        CacheReader.open(copy)


def test_changed_teacher_weights_are_refused(copy: Path) -> None:
    flip(copy / "teacher/model.safetensors")
    with pytest.raises(StoreError, match="other contents"):
        CacheReader.open(copy).teacher_folder()


def test_unsealed_stores_are_refused_unless_asked(copy: Path) -> None:
    (copy / "seal.json").unlink()
    with pytest.raises(StoreError, match="unfinished.*same `kdcache build`"):
        CacheReader.open(copy)
    assert CacheReader.open(copy, allow_unsealed=True).rows == 40


def test_an_unfinished_store_counts_its_whole_blocks_and_names_its_command(copy: Path) -> None:
    (copy / "seal.json").unlink()
    (copy / "hidden/2/codes/c/1/0/0").unlink()
    command = json.loads((copy / "zarr.json").read_text())["attributes"]["command"]
    with pytest.raises(StoreError) as refused:
        CacheReader.open(copy)
    assert "unfinished (2 of 3 blocks)" in str(refused.value)
    assert str(refused.value).endswith(command)


def test_newer_formats_and_other_folders_are_refused(copy: Path, tmp_path: Path) -> None:
    metadata = json.loads((copy / "zarr.json").read_text())
    metadata["attributes"]["format_version"] = 2
    (copy / "zarr.json").write_text(json.dumps(metadata))
    with pytest.raises(StoreError, match="format version 2.*reads version 1"):
        CacheReader.open(copy)
    with pytest.raises(StoreError, match="no store at"):
        CacheReader.open(tmp_path / "nowhere")
    zarr.create_group(str(tmp_path / "other.zarr"))
    with pytest.raises(StoreError, match="some other zarr group"):
        CacheReader.open(tmp_path / "other.zarr")


@pytest.mark.parametrize("content", ["[]", "{", '{"attributes": null}', '{"attributes": []}'])
def test_other_json_is_not_a_store(tmp_path: Path, content: str) -> None:
    (tmp_path / "zarr.json").write_text(content)
    with pytest.raises(StoreError, match="not a store"):
        CacheReader.open(tmp_path)


@pytest.mark.parametrize("damage", ["flipped", "deleted"])
def test_a_damaged_list_of_commits_is_refused(copy: Path, damage: str) -> None:
    """It is damage of no block, which could be skipped; what its size shows is found on opening."""
    if damage == "deleted":
        (copy / "commits.sha256").unlink()
        with pytest.raises(StoreError, match="'commits.sha256' is missing"):
            CacheReader.open(copy)
        return
    flip(copy / "commits.sha256")
    reader = CacheReader.open(copy)
    with pytest.raises(StoreError, match="'commits.sha256' has other contents") as caught:
        reader.read_rows(0, 16, EVERYTHING)
    assert not isinstance(caught.value, DamagedStoreError)


def test_a_damaged_seal_is_refused(copy: Path) -> None:
    (copy / "seal.json").write_text("[]")
    with pytest.raises(StoreError, match="damaged: 'seal.json'"):
        CacheReader.open(copy)


class Counted(LocalStorage):
    """Files that count the bytes that are read of them."""

    read_bytes = 0

    def read(self, key: str, most_bytes: int | None = None) -> bytes:
        data = super().read(key, most_bytes)
        self.read_bytes += len(data)
        return data

    def stream(self, key: str) -> Iterator[bytes]:
        for piece in super().stream(key):
            self.read_bytes += len(piece)
            yield piece


def test_opening_reads_as_much_however_many_rows_there_are(small_store: Path, tmp_path: Path) -> None:
    """No block is looked for: those of these stores are not even there, and of the list of commits only its size."""
    stores = [Counted(resized(small_store, tmp_path / f"{rows}.zarr", rows)) for rows in (10**3, 10**7)]
    readers = [CacheReader.of(store) for store in stores]
    assert [reader.rows for reader in readers] == [10**3, 10**7]
    small, large = (store.read_bytes for store in stores)
    assert 1000 < small <= large <= small + 100  # digits of the numbers of rows


def resized(store: Path, target: Path, rows: int) -> Path:
    """What opening could look at of a store of so many rows in blocks of 64."""
    shutil.copytree(store, target, ignore=shutil.ignore_patterns("c", "commits"))
    for constant in store.glob("**/c"):
        if not (constant / "1").exists():
            whole = shutil.copytree if constant.is_dir() else shutil.copy2
            whole(constant, target / constant.relative_to(store))
    storage = LocalStorage(target)
    write_manifest(storage, "", replace(read_manifest(storage), rows=rows, block_rows=64))
    seal = read_seal(LocalStorage(store), "")
    assert seal is not None
    blocks = -(-rows // 64)
    with (target / COMMIT_HASHES).open("r+b") as file:
        file.truncate(commit_hashes_size(blocks))
    commits = replace(seal.objects[COMMIT_HASHES], size=commit_hashes_size(blocks))
    objects = {**seal.objects, METADATA: digest_object(storage, METADATA), COMMIT_HASHES: commits}
    sealed = replace(seal, rows=rows, blocks=blocks, objects=objects)
    storage.write(SEAL, sealed.to_bytes())
    return target
