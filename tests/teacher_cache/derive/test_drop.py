"""Giving up targets of a finished store: what is left is a whole store, at every moment and after every kill."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch

from teacher_cache.build.build import build_cache
from teacher_cache.build.settings import BuildSettings
from teacher_cache.contract.batch import TargetRequest
from teacher_cache.derive.drop import DropReport, drop_targets
from teacher_cache.derive.drop_settings import DropSettings
from teacher_cache.errors import SettingsError, StoreError, TargetsError
from teacher_cache.format.groups import read_groups
from teacher_cache.format.writer import GroupWriter
from teacher_cache.read.info import describe_store
from teacher_cache.read.reader import CacheReader
from teacher_cache.storage.base import Storage, open_storage
from teacher_cache.storage.local import LocalStorage
from teacher_cache.verify.evict import evict_damage
from teacher_cache.verify.verify import verify_store

if TYPE_CHECKING:
    from tests.conftest import S3Server

Settings = Callable[..., BuildSettings]
LEFT = TargetRequest(hidden_layers=(2, 4), attention_layers=(3,))


@pytest.fixture(scope="module")
def grown(small_settings: Settings, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Logits, hidden state 2 and attention 3, which shares it; extension 1: hidden 3 and 4; extension 2: attention 1,
    which has an input of its own.
    """
    out = tmp_path_factory.mktemp("grown") / "cache.zarr"
    for changes in (
        {"layers": "2"},
        {"layers": "2,3,4"},
        {"layers": "2", "targets": "attention", "attention_layer": 1},
    ):
        build_cache(small_settings(out, precision="nmse:1e-2", **changes))
    return out


@pytest.fixture
def store(grown: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(grown, tmp_path / "cache.zarr"))


def drop(store: Path | str | Storage, *targets: str, **changes: Any) -> DropReport:
    storage = open_storage(store) if isinstance(store, str | Path) else store
    return drop_targets(storage, DropSettings(targets=targets, **changes))


def files_of(store: Path) -> dict[str, bytes]:
    return {file.relative_to(store).as_posix(): file.read_bytes() for file in store.rglob("*") if file.is_file()}


def read_left(reader: CacheReader) -> list[torch.Tensor]:
    batch = reader.read_rows(0, 40, LEFT)["plain"]
    return [batch.input_ids_BT, *batch.hidden.values(), batch.attention[3].key_BTD]


def assert_left(reader: CacheReader, want: CacheReader) -> None:
    assert all(map(torch.equal, read_left(reader), read_left(want)))


def test_what_is_left_is_a_whole_store_and_what_was_given_up_is_gone(store: Path, grown: Path) -> None:
    before, open_already = files_of(store), CacheReader.open(store)
    report = drop(store, "logits")
    after = files_of(store)
    gone = before.keys() - after.keys()
    assert gone and all(key.startswith(("logits/", "masked/")) for key in gone)
    assert not any(key.startswith(("logits/", "masked/")) for key in after)
    assert (report.freed_objects, report.freed_bytes) == (len(gone), sum(len(before[key]) for key in gone))
    assert report.given_up == {"the first build": ("logits",)}
    assert list(report.left) == ["hidden 2", "attention 3", "hidden 3", "hidden 4", "attention 1"]
    changed = {key for key in before.keys() & after.keys() if before[key] != after[key]}
    assert changed == {"seal.json"} and after.keys() - before.keys() == {"given-up/1.json"}
    found = verify_store(store)
    assert found.whole and not found.unknown
    sealed = read_groups(LocalStorage(store))[0].seal
    assert sealed is not None
    assert not any(key.startswith(("logits", "masked")) for key in (*sealed.objects, *sealed.bytes_per_array))
    # whoever reads: from now on, since before, and by what was recorded of it
    reader, old = CacheReader.open(store), CacheReader.open(grown)
    for one in (reader, open_already):
        assert_left(one, old)
    assert reader.identity_sha256 == old.identity_sha256
    with pytest.raises(TargetsError, match="lacks logits"):
        reader.require(TargetRequest(logits=True))
    info = describe_store(store)
    assert "logits" not in info.manifest.to_json()["targets"] or info.manifest.targets.logits is None
    assert not any(path.startswith(("logits", "masked")) for path in info.bytes_per_array)


def test_what_was_given_up_is_built_again_and_given_up_again(
    store: Path, grown: Path, small_settings: Settings
) -> None:
    whole = small_settings(store, precision="nmse:1e-2", layers="2,3,4")
    drop(store, "logits", "hidden:3")
    assert build_cache(whole).computed_rows == 40
    report = verify_store(store)
    assert report.whole and not report.unknown and [group.name for group in report.groups][-1] == "extension 3"
    request = TargetRequest(hidden_layers=(3,), logits=True)
    have, want = (CacheReader.open(path).read_rows(0, 40, request) for path in (store, grown))
    assert torch.equal(have["masked"].logits.log_probs_BMK, want["masked"].logits.log_probs_BMK)
    assert torch.equal(have["plain"].hidden[3], want["plain"].hidden[3])
    assert build_cache(whole).computed_rows == 0
    found = drop(store, "logits")
    assert found.given_up.keys() == {"the first build", "extension 3"} and found.freed_bytes
    report = verify_store(store)
    assert report.whole and not report.unknown
    assert_left(CacheReader.open(store), CacheReader.open(grown))


def test_an_extension_goes_whole_by_number_and_by_its_targets(store: Path, grown: Path, tmp_path: Path) -> None:
    other = Path(shutil.copytree(grown, tmp_path / "other.zarr"))
    report = drop_targets(LocalStorage(store), DropSettings(extension=1))
    assert report.given_up == {"extension 1": ("hidden 3", "hidden 4")}
    assert drop(other, "hidden:3,hidden:4") == DropReport(
        **{**{name: getattr(report, name) for name in report.__dataclass_fields__}, "path": str(other)}
    )
    assert files_of(store) == files_of(other)
    assert not (store / "extensions/1").exists() or not any((store / "extensions/1").rglob("*.*"))
    found = verify_store(store)
    assert found.whole and not found.unknown and [group.name for group in found.groups] == [
        "the first build", "extension 2",
    ]  # fmt: skip


def test_a_part_of_an_extension_and_a_second_time(store: Path) -> None:
    drop(store, "hidden:3")
    assert (store / "extensions/1/given-up/1.json").exists()
    drop(store, "attention:1", "logits")
    drop(store, "attention")
    assert [file.name for file in (store / "given-up").iterdir()] == ["2.json"]
    report = verify_store(store)
    assert report.whole and not report.unknown
    assert CacheReader.open(store).manifest.targets.hidden_layers() == (2, 4)
    again = files_of(store)
    assert drop(store, "attention").freed_objects == 0
    assert files_of(store) == again


@pytest.mark.parametrize(
    "asked, told",
    [
        (
            ("hidden:2",),
            r"hidden 2 \(plain view, nmse:0.01\) cannot be given up, because the first build .*attention 3",
        ),
        (("hidden",), r"because the first build .* is read with it.*keep it, or name them as well"),
        (("hidden:7",), r"--targets hidden:7: .* holds no such target.*it holds logits, hidden 2"),
        (("logits", "hidden", "attention"), "would hold no target any more.*delete the whole store"),
    ],
)
def test_what_others_need_and_what_is_not_there_is_refused(
    store: Path, grown: Path, asked: tuple[str, ...], told: str
) -> None:
    with pytest.raises(TargetsError, match=told):
        drop(store, *asked)
    assert files_of(store) == files_of(grown)
    with pytest.raises(TargetsError, match=r"no such extension.*it has extension 1, extension 2"):
        drop_targets(LocalStorage(store), DropSettings(extension=3))


def test_masks_that_others_need_are_refused(small_settings: Settings, tmp_path: Path) -> None:
    out = tmp_path / "cache.zarr"
    build_cache(small_settings(out, targets="logits"))
    build_cache(small_settings(out, targets="hidden", layers="2", hs_view="masked"))
    with pytest.raises(TargetsError, match=r"masked views cannot be given up, because extension 1 \(hidden 2\)"):
        drop(out, "logits")
    drop(out, "hidden")
    with pytest.raises(TargetsError, match="would hold no target"):
        drop(out, "logits")


def test_nothing_changes_where_it_is_only_asked_what_would(store: Path, grown: Path) -> None:
    said = drop(store, "logits", dry_run=True)
    assert files_of(store) == files_of(grown)
    assert said == drop(store, "logits")


def test_an_unfinished_store_and_one_that_is_being_written_are_refused(store: Path) -> None:
    with LocalStorage(store).lock(), pytest.raises(StoreError, match="being written by another process"):
        drop(store, "logits")
    (store / "seal.json").unlink()
    with pytest.raises(StoreError, match="is unfinished.*finish it first; run the same"):
        drop(store, "logits")
    with pytest.raises(StoreError, match="no store at"):
        drop(store / "nothing", "logits")
    assert not (store / "nothing").exists()


@pytest.mark.parametrize(
    "values, told",
    [
        ({}, "give --targets or --extension"),
        ({"targets": ("logits",), "extension": 1}, "both say what is to be given up"),
        ({"extension": 0}, "--extension 0 does not exist: extensions count from 1"),
        ({"targets": ("logit",)}, "'logit' names no target: did you mean logits"),
        ({"targets": ("logits:2",)}, "'logits:2' names no target"),
        ({"targets": ("hidden:x",)}, "'hidden:x' names no target"),
        ({"targets": ("hidden:",)}, "'hidden:' names no target"),
        ({"targets": ("hidden:²",)}, "names no target"),
        ({"targets": ("hidden:2,",)}, "'' names no target"),
    ],
)
def test_what_cannot_be_asked_for(values: dict[str, Any], told: str) -> None:
    with pytest.raises(SettingsError, match=told):
        DropSettings(**values)


class KilledError(Exception):
    pass


class Ending:
    """A storage whose process ends before the n-th change, or after it; everything else is the real one's."""

    def __init__(self, base: LocalStorage, before: int) -> None:
        self._base, self._left = base, before

    def __getattr__(self, name: str) -> Any:
        return getattr(self._base, name)

    def _change(self) -> None:
        if self._left == 0:
            raise KilledError
        self._left -= 1

    def write(self, key: str, data: bytes) -> None:
        self._change()
        self._base.write(key, data)

    def delete(self, key: str) -> None:
        self._change()
        self._base.delete(key)


def ends(count: int) -> Iterator[int]:
    """Every change that decides something, and some of the many deletions."""
    yield from (number for number in range(count) if number < 5 or number % 60 == 0 or number > count - 8)


@pytest.mark.parametrize("asked", [("logits",), ("hidden:3", "hidden:4", "attention")])
def test_killed_at_any_moment_it_is_the_old_store_or_the_new_one_and_the_same_command_ends_it(
    grown: Path, tmp_path: Path, asked: tuple[str, ...]
) -> None:
    done = Path(shutil.copytree(grown, tmp_path / "done.zarr"))
    changes = drop(done, *asked).freed_objects + 2 * len(asked)
    want, old = files_of(done), CacheReader.open(grown)
    seen = set()
    for number in ends(changes):
        store = Path(shutil.copytree(grown, tmp_path / f"{number}.zarr"))
        try:
            drop(Ending(LocalStorage(store), number), *asked)  # type: ignore[arg-type]
        except KilledError:
            reader = CacheReader.open(store)
            targets = reader.manifest.targets
            request = TargetRequest(
                hidden_layers=targets.hidden_layers(),
                attention_layers=targets.attention_layers(),
                logits=targets.logits is not None,
            )
            batch, same = reader.read_rows(0, 40, request), old.read_rows(0, 40, request)
            for view, found in batch.items():
                assert torch.equal(found.input_ids_BT, same[view].input_ids_BT)
                assert all(torch.equal(values, same[view].hidden[layer]) for layer, values in found.hidden.items())
            seen.add(targets.logits is None)
            assert not verify_store(store).findings
            try:
                drop(store, *asked)
            except TargetsError:
                assert files_of(store) == want, "it had come to its end"
        assert files_of(store) == want, number
        shutil.rmtree(store)
    assert seen == ({True, False} if asked == ("logits",) else {False})


def test_what_was_never_given_up_is_mended_with_the_rest(grown: Path, tmp_path: Path) -> None:
    """A command that ended before its word counted says nothing to a build later on."""
    store = Path(shutil.copytree(grown, tmp_path / "store.zarr"))
    want, built = files_of(store), CacheReader.open(store).manifest.targets
    with pytest.raises(KilledError):
        drop(Ending(LocalStorage(store), 1), "logits")  # type: ignore[arg-type]
    assert (store / "given-up/1.json").exists()
    group = read_groups(LocalStorage(store))[0]
    writer = GroupWriter(LocalStorage(store), group).unseal()
    assert read_groups(LocalStorage(store))[0].manifest.targets == group.manifest.targets
    writer.seal()
    assert files_of(store) == want and CacheReader.open(store).manifest.targets == built


def test_a_bucket_gives_up_what_a_folder_does(grown: Path, s3: S3Server) -> None:
    location = f"{s3.bucket('drop')}/one.zarr"
    bucket, folder = open_storage(location), LocalStorage(grown)
    for key in folder.list():
        bucket.write(key, folder.read(key))
    copy = {key: folder.read(key) for key in folder.list()}
    report = drop(location, "logits", "hidden:3")
    assert report.freed_objects == len(copy) + 2 - len(bucket.list())
    found = verify_store(location)
    assert found.whole and not found.unknown
    assert_left(CacheReader.open(location), CacheReader.open(grown))


def test_what_is_damaged_afterwards_is_found_and_mended_without_what_was_given_up(
    store: Path, small_settings: Settings
) -> None:
    drop(store, "logits")
    whole = files_of(store)
    (store / "input_ids/c/1/0/0").write_bytes(b"damaged")
    _, eviction = evict_damage(LocalStorage(store))
    assert [group.blocks for group in eviction.groups] == [(1,)]
    assert build_cache(small_settings(store, precision="nmse:1e-2", layers="2", targets="hidden")).computed_rows == 16
    again = files_of(store)
    assert again.keys() == whole.keys() and not verify_store(store).findings
    assert {key for key in whole if whole[key] != again[key]} <= {
        "commits/00000001.json", "commits.sha256", "seal.json",
    }  # fmt: skip


@pytest.mark.parametrize("change", [b"", b"{}", b'{"folders": ["../x"], "sha256": "0"}'])
def test_a_record_of_what_was_given_up_that_is_damaged_is_refused(store: Path, change: bytes) -> None:
    drop(store, "logits")
    (store / "given-up/1.json").write_bytes(change)
    with pytest.raises(StoreError, match=r"'given-up/1.json' cannot be read"):
        CacheReader.open(store)
    report = verify_store(store)
    assert [finding.key for finding in report.findings] == ["given-up/1.json"]
    (store / "given-up/1.json").unlink()
    with pytest.raises(StoreError, match=r"'given-up/1.json' cannot be read"):
        CacheReader.open(store)
    _, eviction = evict_damage(LocalStorage(store))
    assert [finding.key for finding in eviction.beyond_repair] == ["given-up/1.json"]


def test_nothing_is_left_of_an_extension_whose_folder_was_deleted_by_hand(store: Path, grown: Path) -> None:
    (store / "notes.txt").write_text("mine")
    (store / "hidden" / "notes.txt").write_text("mine")
    shutil.rmtree(store / "extensions/1")
    report = verify_store(store)
    assert report.whole and any(key.startswith("hidden/3/") for key in report.unknown)
    _, eviction = evict_damage(LocalStorage(store))
    assert eviction.cleared and all(key.startswith(("hidden/3/", "hidden/4/")) for key in eviction.cleared)
    report = verify_store(store)
    assert report.whole and set(report.unknown) == {"notes.txt", "hidden/notes.txt"}
    assert CacheReader.open(store).manifest.targets.hidden_layers() == (2,)


def test_nothing_is_left_of_an_extension_that_was_never_finished_and_lost_its_manifest(store: Path) -> None:
    for name in ("seal.json", "zarr.json"):
        (store / "extensions/1" / name).unlink()
    _, eviction = evict_damage(LocalStorage(store))
    assert eviction.given_up == ("extension 1",) and eviction.cleared
    report = verify_store(store)
    assert report.whole and not report.unknown


def test_what_may_be_of_a_group_whose_manifest_is_damaged_stays(store: Path) -> None:
    (store / "extensions/1/zarr.json").write_bytes(b"{")
    shutil.rmtree(store / "extensions/2")
    _, eviction = evict_damage(LocalStorage(store))
    assert eviction.beyond_repair and not eviction.cleared
