"""Everything that is not what was written is named, refused by readers, and made again where a build can do that."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from threading import Lock
from typing import TYPE_CHECKING, Any

import pytest

from teacher_cache.build.build import build_cache
from teacher_cache.build.settings import BuildSettings
from teacher_cache.contract.batch import TargetRequest
from teacher_cache.errors import StoreError
from teacher_cache.format.protocol import NOT_AN_OBJECT, Commit, Seal
from teacher_cache.read.info import describe_store
from teacher_cache.read.reader import CacheReader
from teacher_cache.storage.base import open_storage
from teacher_cache.storage.local import LocalStorage
from teacher_cache.verify.evict import evict_damage
from teacher_cache.verify.verify import VerifyReport, verify_store

if TYPE_CHECKING:
    from tests.conftest import S3Server

Settings = Callable[..., BuildSettings]
EVERYTHING = TargetRequest(hidden_layers=(2, 3, 4), attention_layers=(3,), logits=True)


@pytest.fixture(scope="module")
def grown_settings(small_settings: Settings) -> Callable[[Path], BuildSettings]:
    """`nmse_store` with one layer more."""
    return lambda out: small_settings(out, precision="nmse:1e-2", views=2, layers="2,3,4")


@pytest.fixture(scope="module")
def grown_store(
    nmse_store: Path,
    grown_settings: Callable[[Path], BuildSettings],
    tmp_path_factory: pytest.TempPathFactory,
) -> Path:
    """A finished store of two groups: hidden state 3 was added. Read only."""
    out = tmp_path_factory.mktemp("grown") / "cache.zarr"
    shutil.copytree(nmse_store, out)
    build_cache(grown_settings(out))
    return out


@pytest.fixture
def store(grown_store: Path, tmp_path: Path) -> Path:
    """A copy to damage."""
    return Path(shutil.copytree(grown_store, tmp_path / "cache.zarr"))


def files_of(store: Path) -> dict[str, bytes]:
    return {
        file.relative_to(store).as_posix(): file.read_bytes() for file in sorted(store.rglob("*")) if file.is_file()
    }


def check(store: Path) -> VerifyReport:
    return verify_store(LocalStorage(store))


def read_everything(store: Path) -> None:
    reader = CacheReader.open(store)
    reader.read_rows(0, reader.rows, EVERYTHING)
    reader.teacher_folder()


def test_a_finished_store_is_whole_and_every_byte_of_it_is_accounted_for(store: Path) -> None:
    report = check(store)
    assert report.whole
    assert not report.findings
    assert not report.unknown
    assert [(group.name, group.sealed, group.blocks) for group in report.groups] == [
        ("the first build", True, 3),
        ("extension 1", True, 3),
    ]
    files = files_of(store)
    read = {key for key in files if key.startswith(("commits/", "extensions/1/commits/")) or key.endswith("seal.json")}
    assert report.objects == len(files) - len(read)
    assert report.bytes == sum(len(data) for key, data in files.items() if key not in read)


def test_progress_counts_up_to_everything(store: Path) -> None:
    class Progress:
        def __init__(self) -> None:
            self.seen: list[tuple[int, int, int, int]] = []

        def checked(self, done: int, total: int, bytes_done: int, bytes_total: int) -> None:
            self.seen.append((done, total, bytes_done, bytes_total))

    progress = Progress()
    report = verify_store(LocalStorage(store), progress)
    assert [one[0] for one in progress.seen] == list(range(1, report.objects + 1))
    assert progress.seen[-1] == (report.objects, report.objects, report.bytes, report.bytes)


def test_what_nothing_accounts_for_is_unknown_and_no_damage(store: Path) -> None:
    (store / "notes.txt").write_text("mine")
    (store / "hidden/2/codes/extra").mkdir()
    (store / "hidden/2/codes/extra/zarr.json").write_text("{}")
    (store / "commits/00000007.json").write_text("{}")
    report = check(store)
    assert report.whole
    assert dict(report.unknown) == {
        "notes.txt": 4,
        "hidden/2/codes/extra/zarr.json": 2,
        "commits/00000007.json": 2,
    }


# ---- damage ---------------------------------------------------------------------------------------------------------


def flip(file: Path) -> None:
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(bytes(data))


def swap(one: Path, other: Path) -> None:
    first, second = one.read_bytes(), other.read_bytes()
    one.write_bytes(second)
    other.write_bytes(first)


def edit(file: Path, old: str, new: str) -> None:
    text = file.read_text()
    assert old in text
    file.write_text(text.replace(old, new, 1))


def drop_block(store: Path, block: int) -> None:
    for key in Commit.from_bytes((store / f"commits/{block:08d}.json").read_bytes()).shards:
        (store / key).unlink()


def forge_seal(store: Path, **changes: Any) -> None:
    """A seal that agrees with itself, not with the store."""
    seal = Seal.from_bytes((store / "seal.json").read_bytes())
    (store / "seal.json").write_bytes(replace(seal, **changes).to_bytes())


@dataclass(frozen=True)
class Damage:
    """What is done to a store, one key that must be named with its part, group and block, and the reader's view."""

    do: Callable[[Path], object]
    key: str
    part: str
    what: str
    block: int | None = None
    group: str = "the first build"
    readable: bool = False
    mendable: bool = True
    shared: bool = False


WEIGHTS, QUERY = "teacher/model.safetensors", "attention/3/projection/query/weight"
DAMAGES = {
    "a flipped bit": Damage(lambda s: flip(s / "input_ids/c/1/0/0"), "input_ids/c/1/0/0", "shard", "other contents", 1),
    "a truncated shard": Damage(
        lambda s: (s / "hidden/2/escapes/value/c/1/0/0").write_bytes(b"short"),
        "hidden/2/escapes/value/c/1/0/0", "shard", "has 5 bytes instead of", 1,
    ),
    "an empty shard": Damage(
        lambda s: (s / "logits/ids/low/c/2/0/0").write_bytes(b""), "logits/ids/low/c/2/0/0", "shard", "has 0 bytes", 2
    ),
    "a missing shard": Damage(lambda s: (s / "length/c/0/0").unlink(), "length/c/0/0", "shard", "is missing", 0),
    "two swapped shards": Damage(
        lambda s: swap(s / "input_ids/c/0/0/0", s / "input_ids/c/1/0/0"), "input_ids/c/1/0/0", "shard", "", 1
    ),
    "a commit without its shards": Damage(
        lambda s: drop_block(s, 1), "masked/count/c/1/0", "shard", "is missing", 1
    ),
    "a missing commit": Damage(
        lambda s: (s / "commits/00000001.json").unlink(), "commits/00000001.json", "commit", "is missing", 1
    ),
    "an empty commit": Damage(
        lambda s: (s / "commits/00000001.json").write_bytes(b""), "commits/00000001.json", "commit", "cannot be read", 1
    ),
    "two swapped commits": Damage(
        lambda s: swap(s / "commits/00000000.json", s / "commits/00000001.json"),
        "commits/00000000.json", "commit", "is not the one that was sealed", 0,
    ),
    "an added layer's shard": Damage(
        lambda s: flip(s / "hidden/3/escapes/count/c/2/0"),
        "hidden/3/escapes/count/c/2/0", "shard", "other contents", 2, group="extension 1",
    ),
    "an edited manifest": Damage(
        lambda s: edit(s / "zarr.json", '"seed": 0', '"seed": 7'),
        "zarr.json", "manifest", "does not match its own checksum", mendable=False,
    ),
    "a lost manifest": Damage(
        lambda s: (s / "extensions/1/zarr.json").unlink(),
        "extensions/1/zarr.json", "manifest", "is missing", group="extension 1", mendable=False,
    ),
    "an edited seal": Damage(
        lambda s: edit(s / "seal.json", '"rows": 40', '"rows": 41'),
        "seal.json", "seal", "does not match its own checksum",
    ),
    "a seal of fewer blocks": Damage(
        lambda s: forge_seal(s, blocks=1), "seal.json", "seal", "other rows or blocks than the manifest"
    ),
    "a damaged list of commits": Damage(
        lambda s: flip(s / "commits.sha256"), "commits.sha256", "seal", "other contents than were written"
    ),
    "a lost list of commits": Damage(
        lambda s: (s / "extensions/1/commits.sha256").unlink(),
        "extensions/1/commits.sha256", "seal", "is missing", group="extension 1",
    ),
    "a seal with other totals": Damage(
        lambda s: forge_seal(s, bytes_per_array={"input_ids": 1}),
        "seal.json", "seal", "other bytes than the commits", readable=True,
    ),
    "an edited zarr.json": Damage(
        lambda s: edit(s / "input_ids/zarr.json", '"int32"', '"int16"'),
        "input_ids/zarr.json", "metadata", "other contents",
    ),
    "a lost zarr.json of a group": Damage(
        lambda s: (s / "hidden/zarr.json").unlink(), "hidden/zarr.json", "metadata", "is missing", shared=True
    ),
    "a lost zarr.json around projections": Damage(
        lambda s: (s / "attention/3/zarr.json").unlink(), "attention/3/zarr.json", "metadata", "is missing"
    ),
    "a projection": Damage(lambda s: flip(s / f"{QUERY}/c/0/0"), f"{QUERY}/c/0/0", "constant", "other contents"),
    "a variance": Damage(
        lambda s: flip(s / "hidden/4/variance/c"), "hidden/4/variance/c", "constant", "other contents"
    ),
    "a rotation": Damage(
        lambda s: flip(s / "hidden/2/basis/c/0/0"),
        "hidden/2/basis/c/0/0", "constant", "other contents", mendable=False,
    ),
    "an added layer's step": Damage(
        lambda s: (s / "hidden/3/step/zarr.json").unlink(),
        "hidden/3/step/zarr.json", "constant", "is missing", group="extension 1", mendable=False,
    ),
    "the teacher's weights": Damage(lambda s: flip(s / WEIGHTS), WEIGHTS, "teacher", "other contents"),
    "a lost file of the teacher": Damage(
        lambda s: (s / "teacher/config.json").unlink(), "teacher/config.json", "teacher", "is missing"
    ),
    "an edited list of the teacher's files": Damage(
        lambda s: edit(s / "teacher.json", "config", "confit"), "teacher.json", "teacher", "other contents"
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", DAMAGES)
def test_damage_is_named_and_refused_and_evicted_where_it_can_be_mended(store: Path, name: str) -> None:
    damage = DAMAGES[name]
    damage.do(store)
    report = check(store)
    assert not report.whole
    found = {finding.key: finding for finding in report.findings}[damage.key]
    assert (found.part, found.block, found.group) == (damage.part, damage.block, damage.group)
    assert damage.what in found.what
    assert found.array == (damage.key.partition("/c/")[0] if damage.part == "shard" else None)
    assert not report.unknown
    if damage.readable:
        read_everything(store)
    else:
        with pytest.raises(StoreError):
            read_everything(store)
    before = files_of(store)
    again, eviction = evict_damage(LocalStorage(store))
    assert again == report
    if not damage.mendable:
        assert [finding.key for finding in eviction.beyond_repair] == [damage.key]
        assert not eviction.groups
        assert files_of(store) == before
        return
    assert not eviction.beyond_repair
    (group,) = eviction.groups
    assert group.name == damage.group
    # what is left is right; the other group still misses what both share
    assert {finding.key for finding in check(store).findings} == ({damage.key} if damage.shared else set())
    prefix = "extensions/1/" if damage.group == "extension 1" else ""
    assert not (store / prefix / "seal.json").exists()
    for block in range(3):
        assert (store / prefix / f"commits/{block:08d}.json").exists() == (block not in group.blocks)


BLOCKS = [name for name, damage in DAMAGES.items() if damage.mendable and damage.block is not None]
OTHERS = [name for name, damage in DAMAGES.items() if damage.mendable and damage.block is None and "a seal" not in name]


@pytest.mark.parametrize(
    "names", [BLOCKS[:6], BLOCKS[6:], OTHERS[:4], OTHERS[4:]], ids=["shards", "commits", "metadata", "teacher"]
)
def test_what_was_evicted_is_made_again_byte_for_byte(
    store: Path, grown_store: Path, grown_settings: Callable[[Path], BuildSettings], names: list[str]
) -> None:
    for name in names:
        DAMAGES[name].do(store)
    _, eviction = evict_damage(LocalStorage(store))
    dropped = sum(len(group.blocks) for group in eviction.groups)
    report = build_cache(grown_settings(store))
    assert (report.computed_rows == 0) == (dropped == 0)
    assert files_of(store) == files_of(grown_store)
    assert check(store).whole
    read_everything(store)


def test_a_group_that_cannot_be_mended_is_left_alone_and_the_other_is_mended(store: Path, grown_store: Path) -> None:
    for name in ("a rotation", "a missing shard", "an added layer's shard"):
        DAMAGES[name].do(store)
    _, eviction = evict_damage(LocalStorage(store))
    assert [finding.key for finding in eviction.beyond_repair] == ["hidden/2/basis/c/0/0"]
    assert [(group.name, group.blocks) for group in eviction.groups] == [("extension 1", (2,))]
    assert (store / "seal.json").exists()
    assert (store / "commits/00000000.json").exists()
    # with the rotation from a copy it goes on
    shutil.copy(grown_store / "hidden/2/basis/c/0/0", store / "hidden/2/basis/c/0/0")
    _, eviction = evict_damage(LocalStorage(store))
    assert [(group.name, group.blocks) for group in eviction.groups] == [("the first build", (0,))]


def test_a_build_does_not_seal_damage_beside_the_blocks_that_it_makes_again(
    store: Path, grown_settings: Callable[[Path], BuildSettings]
) -> None:
    for name in ("a missing shard", "the teacher's weights"):
        DAMAGES[name].do(store)
    with pytest.raises(StoreError, match="'teacher/model.safetensors' has other contents.*kdcache verify --evict"):
        build_cache(grown_settings(store))
    assert (store / "seal.json").exists()


def test_nothing_is_evicted_while_somebody_writes(store: Path) -> None:
    DAMAGES["a missing shard"].do(store)
    with LocalStorage(store).lock(), pytest.raises(StoreError, match="being written by another process"):
        evict_damage(LocalStorage(store))


def test_what_is_no_store_is_said(tmp_path: Path) -> None:
    with pytest.raises(StoreError, match="no store at"):
        check(tmp_path / "nowhere")
    with pytest.raises(StoreError, match="no store at"):
        evict_damage(LocalStorage(tmp_path / "nowhere"))
    assert not (tmp_path / "nowhere").exists()
    (tmp_path / "thesis.txt").write_text("precious")
    with pytest.raises(StoreError, match="is not a store"):
        check(tmp_path)


def test_another_format_version_is_refused_not_called_damage(store: Path) -> None:
    edit(store / "zarr.json", '"format_version": 1', '"format_version": 2')
    (store / "seal.json").unlink()
    with pytest.raises(StoreError, match="format version 2"):
        check(store)


# ---- unfinished stores ----------------------------------------------------------------------------------------------


def test_of_an_unfinished_store_blocks_are_checked_and_missing_ones_listed(store: Path) -> None:
    for key in ("seal.json", "extensions/1/seal.json", "commits/00000001.json"):
        (store / key).unlink()
    (store / "input_ids/c/1/0/0").write_bytes(b"in flight")
    report = check(store)
    assert not report.findings
    assert not report.unknown
    assert not report.whole
    assert [(group.sealed, group.missing_blocks) for group in report.groups] == [(False, (1,)), (False, ())]
    for key in ("input_ids/c/2/0/0", "hidden/3/escapes/count/c/0/0"):
        flip(store / key)
    assert {finding.key: finding.block for finding in check(store).findings} == {
        "input_ids/c/2/0/0": 2,
        "hidden/3/escapes/count/c/0/0": 0,
    }


def test_after_every_single_write_of_a_build_nothing_is_damaged_or_unknown(
    small_settings: Settings,
    grown_settings: Callable[[Path], BuildSettings],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A build and one that adds a layer, either killed at any moment, leave only what a check knows."""
    store, lock, looks = tmp_path / "cache.zarr", Lock(), 0

    def looked_at(write: Callable[..., None]) -> Callable[..., None]:
        def write_and_look(storage: LocalStorage, key: str, *what: object) -> None:
            nonlocal looks
            with lock:
                write(storage, key, *what)
                if storage.location == str(store) and (store / "zarr.json").exists():
                    report = check(store)
                    assert not report.findings, f"after {key}"
                    assert not report.unknown, f"after {key}"
                    looks += 1

        return write_and_look

    for name in ("write", "write_file", "delete"):
        monkeypatch.setattr(LocalStorage, name, looked_at(getattr(LocalStorage, name)))
    build_cache(small_settings(store, precision="nmse:1e-2", views=2))
    build_cache(grown_settings(store))
    assert check(store).whole
    assert looks > len(files_of(store)) - 5


UNSEALED = {
    "metadata": (lambda s: edit(s / "input_ids/zarr.json", '"int32"', '"int16"'), "input_ids/zarr.json"),
    "a rotation": (lambda s: flip(s / "hidden/2/basis/c/0/0"), "hidden/2/basis/c/0/0"),
    "a lost rotation": (lambda s: (s / "hidden/2/basis/c/0/0").unlink(), "hidden/2/basis/zarr.json"),
    "a shape": (lambda s: edit(s / "hidden/2/mean/zarr.json", "32", "31"), "hidden/2/mean/c/0"),
    "a manifest": (lambda s: edit(s / "zarr.json", '"seed": 0', '"seed": 1'), "zarr.json"),
    "a teacher": (lambda s: flip(s / WEIGHTS), WEIGHTS),
    "a teacher's list": (lambda s: edit(s / "teacher.json", "config", "confit"), "teacher.json"),
    "rows of a commit": (lambda s: edit(s / "commits/00000000.json", "16", "17"), "commits/00000000.json"),
}


@pytest.mark.parametrize("name", UNSEALED)
def test_damage_is_found_before_there_is_a_seal(nmse_store: Path, tmp_path: Path, name: str) -> None:
    store = Path(shutil.copytree(nmse_store, tmp_path / "cache.zarr"))
    (store / "seal.json").unlink()
    do, key = UNSEALED[name]
    do(store)
    assert key in [finding.key for finding in check(store).findings]


def test_an_unfinished_store_is_mended_as_well(nmse_store: Path, small_settings: Settings, tmp_path: Path) -> None:
    store = Path(shutil.copytree(nmse_store, tmp_path / "cache.zarr"))
    (store / "seal.json").unlink()
    for name in ("metadata", "a teacher", "rows of a commit"):
        UNSEALED[name][0](store)
    _, eviction = evict_damage(LocalStorage(store))
    assert eviction.groups[0].blocks == (0,)
    build_cache(small_settings(store, precision="nmse:1e-2", views=2))
    assert files_of(store) == files_of(nmse_store)


# ---- elsewhere ------------------------------------------------------------------------------------------------------


def test_a_store_in_object_storage_is_checked_alike(s3: S3Server, grown_store: Path) -> None:
    location = f"{s3.bucket('verify')}/cache.zarr"
    storage = open_storage(location)
    for key, data in files_of(grown_store).items():
        storage.write(key, data)
    assert verify_store(storage).whole
    storage.write("input_ids/c/1/0/0", b"other")
    storage.delete("hidden/3/escapes/count/c/2/0")
    report, eviction = evict_damage(storage)
    assert [finding.key for finding in report.findings] == ["hidden/3/escapes/count/c/2/0", "input_ids/c/1/0/0"]
    assert [(group.name, group.blocks) for group in eviction.groups] == [
        ("the first build", (1,)),
        ("extension 1", (2,)),
    ]
    assert storage.size("seal.json") is None
    assert not verify_store(storage).findings


def test_info_points_to_verify_where_a_finished_store_has_lost_something(store: Path) -> None:
    DAMAGES["a missing shard"].do(store)
    info = describe_store(store)
    assert info.groups[0].sealed
    assert info.missing_blocks == (0,)


def test_commits_and_seals_are_what_was_written_byte_for_byte(store: Path) -> None:
    for key, kind in (("commits/00000000.json", Commit), ("seal.json", Seal)):
        data = (store / key).read_bytes()
        assert kind.from_bytes(data).to_bytes() == data
        for changed in (data + b" ", data.replace(b"\n", b"\r\n"), json.dumps(json.loads(data)).encode()):
            with pytest.raises(ValueError, match="checksum"):
                kind.from_bytes(changed)
        for place in range(0, len(data), 3):
            flipped = bytearray(data)
            flipped[place] ^= 1
            with pytest.raises(NOT_AN_OBJECT):
                kind.from_bytes(bytes(flipped))
