"""Adding targets to a finished store computes only what is missing and leaves alone what is there."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from teacher_cache.build.build import Silent, build_cache
from teacher_cache.build.settings import BuildSettings
from teacher_cache.contract.batch import TargetRequest
from teacher_cache.errors import StoreError, TargetsError
from teacher_cache.format.protocol import read_checked, write_checked
from teacher_cache.read.info import describe_store
from teacher_cache.read.pool import open_caches
from teacher_cache.read.reader import CacheReader
from teacher_cache.storage.local import LocalStorage
from teacher_cache.verify.evict import evict_damage
from teacher_cache.verify.verify import verify_store

Settings = Callable[..., BuildSettings]


def files_of(store: Path) -> dict[str, bytes]:
    return {
        file.relative_to(store).as_posix(): file.read_bytes() for file in sorted(store.rglob("*")) if file.is_file()
    }


@pytest.fixture
def base(small_settings: Settings, tmp_path: Path) -> tuple[BuildSettings, dict[str, bytes]]:
    """A finished store of hidden state 2 alone, and what it consists of."""
    settings = small_settings(tmp_path / "cache.zarr", targets="hidden", layers="2", precision="nmse:1e-2")
    build_cache(settings)
    return settings, files_of(Path(settings.out))


def with_everything(settings: BuildSettings, small_settings: Settings, logits: str = "topk") -> BuildSettings:
    """All three targets, with hidden states 2, 3 and 4."""
    return small_settings(Path(settings.out), layers="2,3,4", precision="nmse:1e-2", logits=logits)


@pytest.mark.parametrize("logits", ["topk", "sample"])
def test_added_targets_equal_those_of_a_store_that_had_them_from_the_start(
    base: tuple[BuildSettings, dict[str, bytes]], small_settings: Settings, tmp_path: Path, logits: str
) -> None:
    settings, before = base
    report = build_cache(with_everything(settings, small_settings, logits))
    assert report.computed_rows == 40
    after = files_of(Path(settings.out))
    assert {key: after[key] for key in before} == before, "what was there stays as it was"
    assert not any(key.startswith(("hidden/2", "input_ids")) for key in after.keys() - before.keys())
    whole = small_settings(tmp_path / "whole.zarr", layers="2,3,4", precision="nmse:1e-2", logits=logits)
    build_cache(whole)
    want_files = files_of(Path(whole.out))
    shards = [key for key in want_files if "/c/" in key]
    assert shards
    for key in shards:
        assert after[key] == want_files[key], key
    request = TargetRequest(hidden_layers=(2, 3, 4), attention_layers=(3,), logits=True)
    have, want = (CacheReader.open(one.out).read_rows(0, 40, request) for one in (settings, whole))
    for view in ("plain", "masked"):
        assert torch.equal(have[view].input_ids_BT, want[view].input_ids_BT)
        for layer, values in want[view].hidden.items():
            assert torch.equal(have[view].hidden[layer], values)
    assert torch.equal(have["plain"].attention[3].query_BTD, want["plain"].attention[3].query_BTD)
    info = describe_store(settings.out)
    assert [(group.sealed, group.missing_blocks) for group in info.groups] == [(True, ()), (True, ())]
    assert info.bytes_per_array == describe_store(whole.out).bytes_per_array


def test_nothing_is_computed_twice(base: tuple[BuildSettings, dict[str, bytes]], small_settings: Settings) -> None:
    settings, _ = base
    wider = with_everything(settings, small_settings)
    assert build_cache(wider).computed_rows == 40
    for again in (wider, settings):
        assert build_cache(again).computed_rows == 0


def test_an_unfinished_extension_is_not_read_and_is_finished_later(
    base: tuple[BuildSettings, dict[str, bytes]], small_settings: Settings
) -> None:
    settings, _ = base
    out, wider = Path(settings.out), with_everything(settings, small_settings)
    build_cache(wider)
    whole = files_of(out)
    (out / "extensions/1/seal.json").unlink()
    (out / "extensions/1/commits/00000001.json").unlink()
    next((out / "hidden/3/codes").glob("*/c/1/0/0")).unlink()
    assert CacheReader.open(out).manifest.targets.hidden_layers() == (2,)
    group = describe_store(out).groups[1]
    assert (group.sealed, group.missing_blocks) == (False, (1,))
    assert build_cache(settings).computed_rows == 0, "the first targets are all there"
    assert build_cache(wider).computed_rows == 16
    assert files_of(out) == whole


def test_what_an_extension_lost_is_refilled(
    base: tuple[BuildSettings, dict[str, bytes]], small_settings: Settings
) -> None:
    settings, before = base
    out, wider = Path(settings.out), with_everything(settings, small_settings)
    build_cache(wider)
    whole = files_of(out)
    next((out / "hidden/4/codes").glob("*/c/2/0/0")).unlink()
    (out / "input_ids/c/0/0/0").unlink()
    assert build_cache(wider).computed_rows == 16 + 8
    assert files_of(out) == whole
    assert {key: whole[key] for key in before} == before


def test_another_precision_of_a_target_that_is_there_is_refused(
    base: tuple[BuildSettings, dict[str, bytes]], small_settings: Settings
) -> None:
    settings, before = base
    with pytest.raises(StoreError, match="hidden 2: the store has 'plain view, nmse:0.01'"):
        build_cache(small_settings(Path(settings.out), layers="2,3", precision="int8"))
    with pytest.raises(StoreError, match="--seed"):
        build_cache(small_settings(Path(settings.out), layers="2,3", precision="nmse:1e-2", seed=1))
    assert files_of(Path(settings.out)) == before


def test_attention_shares_a_hidden_state_of_an_earlier_group(small_settings: Settings, tmp_path: Path) -> None:
    out = tmp_path / "cache.zarr"
    build_cache(small_settings(out, targets="hidden", layers="2"))
    report = build_cache(small_settings(out, targets="attention"))
    manifest = json.loads((out / "extensions/1/zarr.json").read_text())["attributes"]
    assert manifest["targets"]["attention"][0]["form"] == "shared"
    assert report.written_bytes == 0
    whole = small_settings(tmp_path / "whole.zarr", targets="hidden,attention", layers="2")
    build_cache(whole)
    request = TargetRequest(attention_layers=(3,))
    have, want = (CacheReader.open(path).read_rows(0, 40, request)["plain"] for path in (out, whole.out))
    assert torch.equal(have.attention[3].value_BTD, want.attention[3].value_BTD)


def test_a_hidden_state_added_later_does_not_become_the_attentions(small_settings: Settings, tmp_path: Path) -> None:
    out = tmp_path / "cache.zarr"
    build_cache(small_settings(out, targets="attention", precision="nmse:1e-2"))
    request = TargetRequest(attention_layers=(3,))
    before = CacheReader.open(out).read_rows(0, 40, request)["plain"].attention[3].key_BTD
    build_cache(small_settings(out, targets="hidden", layers="2", precision="nmse:1e-2"))
    reader = CacheReader.open(out)
    assert reader.manifest.targets.attention[0].form == "projected"
    assert torch.equal(reader.read_rows(0, 40, request)["plain"].attention[3].key_BTD, before)


def test_what_is_added_in_the_masked_views_is_read_in_each_of_them(small_settings: Settings, tmp_path: Path) -> None:
    """A store of plain hidden states gets logits, then other states and attention of the masked views, two of each."""
    out, changes = tmp_path / "cache.zarr", {"precision": "nmse:1e-2", "views": 2}
    build_cache(small_settings(out, targets="hidden", layers="2", **changes))
    build_cache(small_settings(out, targets="logits", **changes))
    masked = {**changes, "targets": "hidden,attention", "layers": "4", "hs_view": "masked"}
    build_cache(small_settings(out, **masked))
    build_cache(small_settings(tmp_path / "whole.zarr", **{**masked, "targets": None}))
    have, want = CacheReader.open(out), CacheReader.open(tmp_path / "whole.zarr")
    request = TargetRequest(hidden_layers=(4,), attention_layers=(3,), logits=True)
    assert have.views_for(request) == ("masked",)
    seen = []
    for view in range(2):
        mine, theirs = (one.read_rows(3, 37, request, masked_view=view)["masked"] for one in (have, want))
        assert torch.equal(mine.input_ids_BT, theirs.input_ids_BT)
        assert torch.equal(mine.hidden[4], theirs.hidden[4])
        assert torch.equal(mine.attention[3].query_BTD, theirs.attention[3].query_BTD)
        assert torch.equal(mine.logits.log_probs_BMK, theirs.logits.log_probs_BMK)
        seen.append(mine.hidden[4])
    assert not torch.equal(*seen)
    both = have.read_rows(3, 37, TargetRequest(hidden_layers=(2, 4)), masked_view=1)
    assert set(both) == {"plain", "masked"}
    assert torch.equal(both["masked"].hidden[4], seen[1])


def test_the_parts_of_a_corpus_hold_every_row_once(small_settings: Settings, tmp_path: Path) -> None:
    whole = small_settings(tmp_path / "whole.zarr", targets="hidden")
    build_cache(whole)
    request = TargetRequest(hidden_layers=(2,))
    want = CacheReader.open(whole.out).read_rows(0, 40, request)["plain"]
    have = []
    for number in (1, 2, 3):
        settings = small_settings(tmp_path / f"{number}.zarr", targets="hidden", part=f"{number}/3")
        build_cache(settings)
        reader = CacheReader.open(settings.out)
        assert reader.manifest.first_row == sum(len(part.row_id_B) for part in have)
        have.append(reader.read_rows(0, reader.rows, request)["plain"])
    assert torch.equal(torch.cat([part.row_id_B for part in have]), want.row_id_B)
    assert torch.equal(torch.cat([part.input_ids_BT for part in have]), want.input_ids_BT)
    shutil.rmtree(tmp_path / "1.zarr")


class Notes(Silent):
    """What a build says."""

    def __init__(self) -> None:
        self.said: list[str] = []

    def note(self, text: str) -> None:
        self.said.append(text)


@pytest.mark.parametrize("prefix, name", [("", "the first build"), ("extensions/1/", "extension 1")])
def test_a_seal_that_was_deleted_is_missed_and_made_anew(
    base: tuple[BuildSettings, dict[str, bytes]], small_settings: Settings, prefix: str, name: str
) -> None:
    settings, _ = base
    out, wider = Path(settings.out), with_everything(settings, small_settings)
    build_cache(wider)
    whole = files_of(out)
    assert not any(group.seal_lost for group in verify_store(out).groups)
    (out / f"{prefix}seal.json").unlink()

    report = verify_store(out)
    assert not report.whole
    assert [group.name for group in report.groups if group.seal_lost] == [name]
    told = "its seal is missing though everything else of it is there; run the same `kdcache build`"
    with pytest.raises((StoreError, TargetsError), match=told):
        open_caches(str(out)).require(TargetRequest(hidden_layers=(3,)))

    # other commits than were sealed must not come under a new seal
    commit = out / f"{prefix}commits/00000001.json"
    fields = read_checked(commit.read_bytes())
    first = sorted(fields["shards"])[0]
    fields["shards"][first]["sha256"] = "0" * 64
    commit.write_bytes(write_checked(fields))
    list_key = f"{prefix}commits.sha256"
    assert list_key in [finding.key for finding in verify_store(out).findings]
    with pytest.raises(StoreError, match=f"commits of {name} are not those that '{list_key}' lists"):
        build_cache(wider)
    commit.write_bytes(whole[commit.relative_to(out).as_posix()])

    notes = Notes()
    assert build_cache(wider, notes).computed_rows == 0
    assert f"{name} lacks its seal alone; its commits are as they were listed, and it is sealed anew" in notes.said
    assert files_of(out) == whole


def test_blocks_that_are_built_again_are_no_lost_seal(
    base: tuple[BuildSettings, dict[str, bytes]],
) -> None:
    settings, before = base
    out = Path(settings.out)
    (out / "input_ids/c/1/0/0").unlink()
    evict_damage(LocalStorage(out))
    assert not (out / "commits.sha256").exists()
    assert not any(one.seal_lost for one in verify_store(out).groups)
    notes = Notes()
    build_cache(settings, notes)
    assert not any("lacks its seal" in said for said in notes.said)
    assert files_of(out) == before
