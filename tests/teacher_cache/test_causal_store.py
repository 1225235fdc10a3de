"""What is done with a store is done with a causal one: refused by name, extended, derived, planned, verified, and read
with others as one.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from teacher_cache.build.build import build_cache
from teacher_cache.build.plan import plan_build
from teacher_cache.build.settings import BuildSettings
from teacher_cache.contract.batch import SampledLogits, TargetBatch, TargetRequest, TopkLogits
from teacher_cache.derive.derive import derive_store
from teacher_cache.derive.settings import DeriveSettings
from teacher_cache.errors import DistillationError, SettingsError, StoreError, TeacherError
from teacher_cache.read.info import describe_store
from teacher_cache.read.pool import open_caches
from teacher_cache.read.reader import CacheReader
from teacher_cache.storage.local import LocalStorage
from teacher_cache.verify.deep.deep import deep_check
from teacher_cache.verify.verify import verify_store
from tests.causal_models import make_tokenizer, save_teacher

Settings = Callable[..., BuildSettings]
EVERYTHING = TargetRequest(hidden_layers=(2, 4), logits=True, next_tokens=True)


def read(store: str | Path, request: TargetRequest = EVERYTHING) -> TargetBatch:
    reader = CacheReader.open(store)
    return reader.read_rows(0, reader.rows, request)["plain"]


def assert_same(have: TargetBatch, want: TargetBatch) -> None:
    assert torch.equal(have.input_ids_BT, want.input_ids_BT) and torch.equal(have.row_id_B, want.row_id_B)
    assert have.hidden.keys() == want.hidden.keys()
    for layer, values in want.hidden.items():
        assert torch.equal(have.hidden[layer], values)
    for one, other in ((have.places, want.places), (have.logits, want.logits)):
        assert type(one) is type(other)
        for name, values in vars(other).items():
            assert torch.equal(getattr(one, name), values), name
    assert (have.starts_BT is None) == (want.starts_BT is None)
    assert have.starts_BT is None or torch.equal(have.starts_BT, want.starts_BT)  # type: ignore[arg-type]


# ---- what cannot be built -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "family, why",
    [
        ("opt", r"packed and alone are not the same to it: KL\(alone \|\| packed\) is \d"),
        ("recurrent_gemma", r"packed and alone are not the same to it: KL\(alone \|\| packed\) is \d"),
        ("bloom", "takes no positions"),
    ],
)
def test_a_family_that_cannot_keep_documents_apart_is_refused_and_builds_joined(
    causal_settings: Settings, tmp_path: Path, family: str, why: str
) -> None:
    teacher = save_teacher(tmp_path / "teacher", family, vocab_size=112)
    settings = causal_settings(tmp_path / "cache.zarr", teacher=str(teacher), max_rows=8)
    with pytest.raises(TeacherError, match=f"family {family!r} .*{why}.*--segments joined"):
        build_cache(settings)
    assert not Path(settings.out).exists()
    build_cache(replace(settings, segments="joined"))
    batch = read(settings.out, TargetRequest(logits=True))
    assert batch.starts_BT is None
    assert deep_check(LocalStorage(settings.out), 8).ok


@pytest.mark.parametrize(
    "changes, told",
    [
        ({"views": 2}, "--views: teacher .* is a causal LM.*--positions"),
        ({"mlm_probability": 0.3}, "--mlm-probability: teacher .* is a causal LM"),
        ({"hs_view": "masked", "targets": "hidden"}, "--hs-view masked: teacher .* is a causal LM"),
        ({"seq_len": 65}, "--seq-len 65 is beyond the 64 positions"),
        ({"k": 106, "logits": "topk"}, "--k 106 is more than the 105 ids"),
        ({"k": 256}, "--k 256 draws a position cannot be kept: .* 1 to 255, or for --logits topk"),
        ({"targets": "attention", "relations": "matrix"}, "--relations matrix: teacher .* is a causal LM"),
        ({"layers": "5", "targets": "hidden"}, "names layer 5, the teacher has layers 1 to 4"),
    ],
)
def test_what_a_causal_teacher_cannot_give_is_refused(
    causal_settings: Settings, tmp_path: Path, changes: dict[str, Any], told: str
) -> None:
    with pytest.raises(DistillationError, match=told):
        build_cache(causal_settings(tmp_path / "cache.zarr", **changes))
    assert not (tmp_path / "cache.zarr").exists()


def test_positions_mean_nothing_to_a_masked_lm(small_settings: Settings, tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match="--positions: teacher .* is a masked LM.*causal LM such as Llama"):
        build_cache(small_settings(tmp_path / "cache.zarr", positions="all"))
    with pytest.raises(SettingsError, match="--positions 'some' is unknown"):
        small_settings(tmp_path / "cache.zarr", positions="some")


def test_an_encoder_decoder_is_refused(causal_settings: Settings, tmp_path: Path) -> None:
    from transformers import T5Config, T5ForConditionalGeneration

    config = T5Config(vocab_size=105, d_model=16, d_kv=4, d_ff=16, num_layers=1, num_heads=2)
    T5ForConditionalGeneration(config).save_pretrained(tmp_path / "teacher")
    make_tokenizer().save_pretrained(tmp_path / "teacher")
    with pytest.raises(TeacherError, match="family 't5', an encoder-decoder: only masked LMs .* and causal LMs"):
        build_cache(causal_settings(tmp_path / "cache.zarr", teacher=str(tmp_path / "teacher")))


def test_a_checkpoint_without_its_head(causal_settings: Settings, causal_teacher: Path, tmp_path: Path) -> None:
    """Hidden states can be had of it, logits are refused; never are they random."""
    from transformers import AutoModel

    AutoModel.from_pretrained(causal_teacher).save_pretrained(tmp_path / "teacher")
    make_tokenizer().save_pretrained(tmp_path / "teacher")
    settings = causal_settings(tmp_path / "cache.zarr", teacher=str(tmp_path / "teacher"), precision="float16")
    with pytest.raises(TeacherError, match="no language-modelling head"):
        build_cache(replace(settings, targets="logits"))
    build_cache(replace(settings, targets="hidden"))
    assert not CacheReader.open(settings.out).manifest.teacher.has_mlm_head
    assert read(settings.out, TargetRequest(hidden_layers=(4,))).hidden[4].shape[2] == 32


def test_generation_settings_that_contradict_each_other_do_not_stop_a_build(
    causal_settings: Settings, causal_teacher: Path, tmp_path: Path
) -> None:
    """Published checkpoints have temperatures without sampling, which Transformers refuses to save."""
    teacher = Path(shutil.copytree(causal_teacher, tmp_path / "teacher"))
    written = {"do_sample": False, "temperature": 0.6, "top_p": 0.9, "eos_token_id": 0}
    (teacher / "generation_config.json").write_text(json.dumps(written))
    build_cache(causal_settings(tmp_path / "cache.zarr", teacher=str(teacher), max_rows=4))


# ---- what goes on ---------------------------------------------------------------------------------------------------


def test_a_store_says_what_it_is(causal_store: Path) -> None:
    fields = json.loads((causal_store / "zarr.json").read_text())["attributes"]
    assert (fields["teacher"]["kind"], fields["segments"], fields["positions"]) == ("causal-lm", "isolated", "all")
    assert "masked" not in {path.split("/")[0] for path in describe_store(causal_store).bytes_per_array}
    assert describe_store(causal_store).to_json()["manifest"]["positions"] == "all"


@pytest.mark.parametrize("first", ["logits", "hidden"])
def test_targets_are_added_in_either_order(
    causal_settings: Settings, causal_store: Path, tmp_path: Path, first: str
) -> None:
    settings = causal_settings(tmp_path / "cache.zarr", targets=first, precision="float16")
    build_cache(settings)
    inputs = {path: path.read_bytes() for path in (tmp_path / "cache.zarr").rglob("*") if path.is_file()}
    assert build_cache(replace(settings, targets="logits,hidden")).computed_rows == 40
    assert all(path.read_bytes() == data for path, data in inputs.items()), "what was there stays as it was"
    assert_same(read(settings.out), read(causal_store))
    assert build_cache(replace(settings, targets="logits,hidden")).computed_rows == 0
    assert verify_store(settings.out).whole
    assert deep_check(LocalStorage(settings.out), 40).ok


@pytest.mark.parametrize(
    "changes, told",
    [
        ({"segments": "joined"}, "corpus|--segments"),
        ({"positions": "every:2"}, "--positions: the store has 'all', this command asks for 'every:2'"),
        ({"k": 9}, "logits: the store has"),
    ],
)
def test_other_settings_do_not_go_on_with_a_store(
    causal_settings: Settings, causal_store: Path, changes: dict[str, Any], told: str
) -> None:
    with pytest.raises(StoreError, match=told):
        build_cache(causal_settings(causal_store, targets="logits,hidden", precision="float16", **changes))


@pytest.mark.parametrize("written, meant", [("every:1", "all"), ("share:0.50", "share:0.5"), ("every:04", "every:4")])
def test_a_choice_of_positions_is_kept_as_it_is_meant(
    causal_settings: Settings, tmp_path: Path, written: str, meant: str
) -> None:
    """However it is written: a store names it in one way, and goes on when it is asked for in another."""
    settings = causal_settings(tmp_path / "cache.zarr", targets="logits", positions=written, max_rows=8)
    build_cache(settings)
    assert CacheReader.open(settings.out).manifest.positions == meant
    assert build_cache(replace(settings, positions=meant)).computed_rows == 0


def test_batch_and_block_sizes_change_nothing(causal_settings: Settings, causal_store: Path, tmp_path: Path) -> None:
    other = causal_settings(tmp_path / "cache.zarr", targets="logits", positions="share:0.5", block_rows=16)
    build_cache(other)
    same = replace(other, out=str(tmp_path / "same.zarr"), block_rows=3, batch_size=2)
    build_cache(same)
    request = TargetRequest(logits=True)
    have, want = read(same.out, request), read(other.out, request)
    assert_same(have, want)


@pytest.mark.parametrize(
    "built, derived",
    [
        ({"logits": "topk", "k": 12, "precision": "float16"}, {"k": 5}),
        ({"logits": "topk", "k": 12, "precision": "nmse:1e-2"}, {"k": 5, "row_range": "3:30"}),
        ({"logits": "sample", "precision": "float16"}, {"row_range": "11:37", "precision": "int8"}),
        ({"logits": "sample", "precision": "nmse:1e-2", "positions": "every:3"}, {"precision": "nmse:1e-1"}),
        ({"logits": "topk", "segments": "joined", "precision": "float16"}, {"k": 3, "max_rows": 10, "layers": "4"}),
    ],
)
def test_a_smaller_store_is_derived(
    causal_settings: Settings, tmp_path: Path, built: dict[str, Any], derived: dict[str, Any]
) -> None:
    settings = causal_settings(tmp_path / "cache.zarr", targets="logits,hidden", **built)
    build_cache(settings)
    small = tmp_path / "small.zarr"
    derive_store(DeriveSettings(src=settings.out, dst=str(small), **derived))
    first, _, last = derived.get("row_range", f"0:{derived.get('max_rows', 40)}").partition(":")
    want = CacheReader.open(settings.out).read_rows(int(first), int(last), EVERYTHING)["plain"]
    layers = (4,) if "layers" in derived else (2, 4)
    have = read(small, TargetRequest(hidden_layers=layers, logits=True))
    assert torch.equal(have.input_ids_BT, want.input_ids_BT)
    for name in ("positions_BM", "label_ids_BM", "count_B"):
        assert torch.equal(getattr(have.places, name), getattr(want.places, name))
    assert (have.starts_BT is None) == ("segments" in built)
    assert have.starts_BT is None or torch.equal(have.starts_BT, want.starts_BT)  # type: ignore[arg-type]
    if isinstance(want.logits, SampledLogits):
        assert isinstance(have.logits, SampledLogits)
        widths = min(have.logits.ids_BMK.shape[2], want.logits.ids_BMK.shape[2])
        assert torch.equal(have.logits.ids_BMK[..., :widths], want.logits.ids_BMK[..., :widths])
        assert torch.equal(have.logits.counts_BMK[..., :widths], want.logits.counts_BMK[..., :widths])
        assert have.logits.counts_BMK.sum() == want.logits.counts_BMK.sum()
    else:
        assert isinstance(have.logits, TopkLogits) and isinstance(want.logits, TopkLogits)
        real_BM, k = want.places.real_BM(), derived["k"]  # type: ignore[union-attr]
        assert torch.equal(have.logits.ids_BMK[real_BM], want.logits.ids_BMK[real_BM][:, :k])
        mass = have.logits.log_probs_BMK.exp().sum(-1) + have.logits.log_tail_BM.exp()
        assert (mass[real_BM] - 1).abs().max() < 0.06
    assert verify_store(small).whole
    assert deep_check(LocalStorage(small), 16).ok, deep_check(LocalStorage(small), 16).checks


def test_stores_of_parts_are_read_as_one(causal_settings: Settings, causal_store: Path, tmp_path: Path) -> None:
    whole = read(causal_store)
    paths = []
    for part in (1, 2):
        settings = causal_settings(
            tmp_path / f"{part}.zarr", targets="logits,hidden", precision="float16", part=f"{part}/2"
        )
        build_cache(settings)
        paths.append(settings.out)
    source = open_caches(paths)
    assert source.rows == 40
    assert_same(source.read_rows(0, 40, EVERYTHING)["plain"], whole)
    other = causal_settings(tmp_path / "joined.zarr", segments="joined", targets="logits,hidden", precision="float16")
    build_cache(other)
    with pytest.raises(StoreError, match="--segments: 'isolated' and 'joined'"):
        open_caches([paths[0], other.out])


@pytest.mark.parametrize(
    "changes",
    [{"targets": "logits"}, {"targets": "logits,hidden", "logits": "topk", "positions": "every:4"}],
    ids=["draws", "most probable"],
)
@pytest.mark.usefixtures("time_to_try")
def test_a_plan_says_what_the_build_then_writes(
    causal_settings: Settings, tmp_path: Path, changes: dict[str, Any]
) -> None:
    settings = causal_settings(tmp_path / "cache.zarr", max_rows=400, seq_len=12, rows="packed", **changes)
    plan = plan_build(settings)
    build_cache(settings)
    info = describe_store(settings.out)
    assert plan.groups[0].total_bytes == pytest.approx(sum(info.bytes_per_array.values()), rel=0.05)
    assert plan.total_bytes == pytest.approx(info.total_bytes, rel=0.05)
    inputs = ("input_ids", "length", "row_id", "document", "segments/starts", "next/kept")
    assert plan.groups[0].bytes_per_target()["inputs"] == sum(plan.groups[0].bytes_per_array[path] for path in inputs)


# ---- whether it is right --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"logits": "topk", "precision": "float16"},
        {"logits": "topk", "segments": "joined", "temperature": 2.0},
        {"positions": "share:0.3", "rows": "document"},
    ],
)
def test_deep_verification_passes_what_was_built(
    causal_settings: Settings, tmp_path: Path, changes: dict[str, Any]
) -> None:
    settings = causal_settings(tmp_path / "cache.zarr", targets="logits,hidden", max_rows=20, **changes)
    build_cache(settings)
    report = deep_check(LocalStorage(settings.out), 20)
    assert report.ok, report.checks
    targets = {check.target for check in report.checks}
    assert {"hidden/2", "hidden/4"} < targets and any(target.startswith("logits") for target in targets)
    assert "masked inputs" not in targets
