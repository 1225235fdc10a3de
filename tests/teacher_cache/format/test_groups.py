"""Groups that need each other, share masks or are lost: what is read is right, and a build leads out of every state."""

from __future__ import annotations

import shutil
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from teacher_cache.build.build import build_cache
from teacher_cache.build.settings import BuildSettings
from teacher_cache.contract.batch import TargetRequest
from teacher_cache.errors import SpaceError, StoreError, TargetsError
from teacher_cache.format.groups import read_commits, read_groups
from teacher_cache.read.reader import CacheReader
from teacher_cache.storage.local import LocalStorage
from teacher_cache.verify.evict import evict_damage
from teacher_cache.verify.verify import verify_store

Settings = Callable[..., BuildSettings]
ATTENTION = TargetRequest(attention_layers=(4,))


def flip(file: Path) -> None:
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(bytes(data))


def queries(store: str) -> torch.Tensor:
    return CacheReader.open(store).read_rows(0, 40, ATTENTION)["plain"].attention[4].query_BTD


@pytest.fixture(scope="module")
def chain(small_settings: Settings, tmp_path_factory: pytest.TempPathFactory) -> BuildSettings:
    """Hidden state 2; hidden state 3 (extension 1); attention 4, which is computed from it (extension 2). Read only."""
    settings = small_settings(tmp_path_factory.mktemp("chain") / "cache.zarr", targets="hidden", layers="2")
    build_cache(settings)
    build_cache(replace(settings, layers="3"))
    build_cache(replace(settings, targets="attention", attention_layer=4))
    return settings


@pytest.fixture
def settings(chain: BuildSettings, tmp_path: Path) -> BuildSettings:
    """A copy to damage."""
    return replace(chain, out=str(shutil.copytree(chain.out, tmp_path / "cache.zarr")))


def test_what_needs_an_unfinished_extension_is_left_out_and_named_and_finished_with_it(
    settings: BuildSettings, chain: BuildSettings
) -> None:
    flip(Path(settings.out, "hidden/3/codes/c/1/0/0"))
    _, eviction = evict_damage(LocalStorage(settings.out))
    assert [group.name for group in eviction.groups] == ["extension 1"]
    assert eviction.left_out == ("extension 2",)
    reader = CacheReader.open(settings.out)
    assert (reader.manifest.targets.hidden_layers(), reader.manifest.targets.attention_layers()) == ((2,), ())
    reader.read_rows(0, 40, TargetRequest(hidden_layers=(2,)))
    with pytest.raises(TargetsError) as refused:
        reader.require(ATTENTION)
    assert "extension 1 (hidden 3) is left out: it is unfinished; run the same `kdcache build`" in str(refused.value)
    assert "extension 2 (attention 4) is left out: it needs hidden 3 (plain view, float16)" in str(refused.value)
    # the command of extension 2 alone
    assert build_cache(replace(settings, targets="attention", attention_layer=4)).computed_rows == 16
    assert torch.equal(queries(settings.out), queries(chain.out))
    assert verify_store(LocalStorage(settings.out)).whole


def test_masks_of_an_unfinished_extension_are_missed_by_those_that_use_them(
    small_settings: Settings, tmp_path: Path
) -> None:
    settings = small_settings(tmp_path / "cache.zarr", targets="hidden", layers="2")
    build_cache(settings)
    build_cache(replace(settings, targets="logits"))
    masked = replace(settings, layers="3", hs_view="masked")
    build_cache(masked)
    want = CacheReader.open(settings.out).read_rows(0, 40, TargetRequest(hidden_layers=(3,)))["masked"].hidden[3]
    flip(tmp_path / "cache.zarr/logits/ids/low/c/0/0/0")
    _, eviction = evict_damage(LocalStorage(settings.out))
    assert eviction.left_out == ("extension 2",)
    assert CacheReader.open(settings.out).manifest.targets.hidden_layers() == (2,)
    assert build_cache(masked).computed_rows == 16
    have = CacheReader.open(settings.out).read_rows(0, 40, TargetRequest(hidden_layers=(3,)))["masked"].hidden[3]
    assert torch.equal(have, want)


def test_an_extension_is_given_up_by_deleting_its_folder(small_settings: Settings, tmp_path: Path) -> None:
    out = tmp_path / "cache.zarr"
    settings = small_settings(out, targets="hidden", layers="2")
    for layers in ("2", "3", "4"):
        build_cache(replace(settings, layers=layers))
    request = TargetRequest(hidden_layers=(2, 3, 4))
    before = CacheReader.open(out).read_rows(0, 40, request)["plain"].hidden
    shutil.rmtree(out / "extensions/1")
    # what a build must not take for its own: it writes only what is not there
    shutil.copy(out / "hidden/2/variance/c", out / "hidden/3/variance/c")
    reader = CacheReader.open(out)
    assert [group.name for group in read_groups(reader.storage)] == ["the first build", "extension 2"]
    assert reader.manifest.targets.hidden_layers() == (2, 4)
    report = verify_store(reader.storage)
    assert report.whole and all(key.startswith("hidden/3/") for key in report.unknown)
    assert build_cache(replace(settings, layers="3")).computed_rows == 40
    after = CacheReader.open(out)
    for layer, values in after.read_rows(0, 40, request)["plain"].hidden.items():
        assert torch.equal(values, before[layer])
    assert after.hidden_variance(3) != after.hidden_variance(2)
    report = verify_store(reader.storage)
    assert report.whole and not report.unknown
    assert [group.name for group in report.groups] == ["the first build", "extension 2", "extension 3"]


def test_what_was_given_up_is_missed_by_name(settings: BuildSettings, chain: BuildSettings) -> None:
    shutil.rmtree(Path(settings.out, "extensions/1"))
    reader = CacheReader.open(settings.out)
    assert reader.manifest.targets.attention_layers() == ()
    with pytest.raises(StoreError, match=r"extension 2 is read with, hidden 3 \(plain.*delete 'extensions/2/'"):
        build_cache(replace(settings, targets="attention", attention_layer=4))
    build_cache(replace(settings, layers="3"))
    assert torch.equal(queries(settings.out), queries(chain.out))


@pytest.mark.parametrize("lost", [False, True])
def test_an_unfinished_extension_without_a_manifest_does_not_close_the_store(
    settings: BuildSettings, lost: bool
) -> None:
    out = Path(settings.out)
    for number in (1, 2):
        (out / f"extensions/{number}/seal.json").unlink()
    manifest = out / "extensions/1/zarr.json"
    if lost:
        manifest.unlink()
    else:
        manifest.write_text(manifest.read_text().replace('"seed": 0', '"seed": 1'))
    assert CacheReader.open(out).manifest.targets.hidden_layers() == (2,)
    assert build_cache(settings).computed_rows == 0
    report, eviction = evict_damage(LocalStorage(out))
    assert [finding.key for finding in report.findings] == ["extensions/1/zarr.json"]
    assert eviction.given_up == ("extension 1",) and not eviction.beyond_repair
    assert not (out / "extensions/1/commits/00000000.json").exists()
    assert (out / "extensions/2/commits/00000000.json").exists()
    build_cache(replace(settings, layers="3"))
    build_cache(replace(settings, targets="attention", attention_layer=4))
    assert verify_store(LocalStorage(out)).whole


@pytest.fixture
def two_with_masks(
    small_settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> tuple[BuildSettings, BuildSettings]:
    """Two extensions that were begun and stopped before their first block, so that each has the masks."""
    settings = small_settings(tmp_path / "cache.zarr", targets="hidden", layers="2")
    build_cache(settings)
    masked = replace(settings, layers="3", hs_view="masked")
    both = masked, replace(masked, targets="logits,hidden", layers="4")
    with monkeypatch.context() as small_disk:
        small_disk.setattr(LocalStorage, "free_bytes", lambda self: 1000)
        for one in both:
            with pytest.raises(SpaceError):
                build_cache(one)
    return both


def masks_of(store: Path) -> list[str]:
    prefixes = [path.parent for path in sorted(store.glob("extensions/*/commits"))]
    return [path.name for path in prefixes if "masked/count" in (path / "commits/00000000.json").read_text()]


@pytest.mark.parametrize("order", [(0, 1), (1, 0)], ids=["older first", "newer first"])
def test_either_of_two_extensions_that_were_begun_can_be_finished_first(
    two_with_masks: tuple[BuildSettings, BuildSettings], order: tuple[int, int]
) -> None:
    requests = TargetRequest(hidden_layers=(3,), masked=True), TargetRequest(logits=True)
    out = two_with_masks[0].out
    first, second = order
    assert build_cache(two_with_masks[first]).computed_rows == 40
    # whatever else is read, the masks are those of the finished one
    for allow_unsealed in (False, True):
        reader = CacheReader.open(out, allow_unsealed=allow_unsealed)
        before = reader.read_rows(0, 40, requests[first])["masked"].input_ids_BT
    assert build_cache(two_with_masks[second]).computed_rows == 40
    for request in requests:
        assert torch.equal(CacheReader.open(out).read_rows(0, 40, request)["masked"].input_ids_BT, before)
    assert masks_of(Path(out)) == ["1", "2"]
    assert verify_store(LocalStorage(out)).whole


def test_eviction_leaves_the_masks_that_another_extension_has_too(
    two_with_masks: tuple[BuildSettings, BuildSettings],
) -> None:
    hidden, logits = two_with_masks
    out = Path(hidden.out)
    for one in two_with_masks:
        build_cache(one)
    flip(out / "hidden/3/codes/c/1/0/0")
    _, eviction = evict_damage(LocalStorage(out))
    assert [(group.name, group.blocks) for group in eviction.groups] == [("extension 1", (1,))]
    assert eviction.left_out == ()
    assert not verify_store(LocalStorage(out)).findings
    CacheReader.open(out).read_rows(0, 40, TargetRequest(logits=True))
    assert build_cache(hidden).computed_rows == 16
    # masks that are damaged are those of both; making them again for one mends the other
    flip(out / "masked/positions/c/2/0/0")
    _, eviction = evict_damage(LocalStorage(out))
    assert [(group.name, group.blocks) for group in eviction.groups] == [("extension 1", (2,))]
    assert not (out / "masked/positions/c/2/0/0").exists()
    assert build_cache(hidden).computed_rows == 8
    assert verify_store(LocalStorage(out)).whole
    assert build_cache(logits).computed_rows == 0


def test_commits_are_read_several_at_a_time(chain: BuildSettings) -> None:
    class Slow(LocalStorage):
        """Reads of two commits end together, or not at all."""

        together = threading.Barrier(2, timeout=10)

        def read(self, key: str, most_bytes: int | None = None) -> bytes:
            if "/0000000" in key and not key.endswith("2.json"):
                self.together.wait()
            return super().read(key, most_bytes)

    storage = Slow(chain.out)
    commits = read_commits(storage, read_groups(storage)[0])
    assert [commits[block].block for block in commits] == [0, 1, 2]
