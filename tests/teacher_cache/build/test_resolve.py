"""Settings and a teacher make exactly one set of targets, or a refusal before anything is written."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from transformers import EuroBertConfig, EuroBertForMaskedLM

from teacher_cache.build.build import build_cache
from teacher_cache.build.resolve import make_manifest, plan_targets, resolve_seq_len
from teacher_cache.build.settings import BuildSettings
from teacher_cache.contract.batch import TargetRequest
from teacher_cache.contract.manifest import Manifest
from teacher_cache.contract.streams import VECTORS
from teacher_cache.contract.targets import TargetSpecs
from teacher_cache.corpus.corpus import Rows
from teacher_cache.errors import SettingsError, StoreError, TeacherError
from teacher_cache.read.info import describe_store
from teacher_cache.read.reader import CacheReader
from teacher_cache.teacher.teacher import Teacher

Settings = Callable[..., BuildSettings]


def test_relation_mode_follows_the_family(small_settings: Settings, tmp_path: Path) -> None:
    modes = {}
    for family in ("bert", "modernbert"):
        settings = small_settings(tmp_path / f"{family}.zarr", family, max_rows=4)
        build_cache(settings)
        modes[family] = CacheReader.open(settings.out).manifest.targets.attention[0].mode
    assert modes == {"bert": "hidden", "modernbert": "qkv"}
    with pytest.raises(TeacherError, match="modernbert.*--relations qkv"):
        build_cache(small_settings(tmp_path / "no.zarr", "modernbert", relations="hidden"))


def test_relation_heads_are_the_stores(small_settings: Settings, tmp_path: Path) -> None:
    settings = small_settings(tmp_path / "cache.zarr", targets="attention", relations="matrix", max_rows=8)
    build_cache(settings)
    bits = describe_store(settings.out).bits_per_value()
    assert all(4 < bits[f"attention/3/relations/{name}"] <= 17 for name in VECTORS)
    assert CacheReader.open(settings.out).manifest.targets.attention[0].heads == 2
    with pytest.raises(StoreError, match="matrix of 2 relation heads.*matrix of 4 relation heads"):
        build_cache(replace(settings, relation_heads=4))
    with pytest.raises(SettingsError, match="--relation-heads 3 does not divide the teacher's width 32"):
        build_cache(replace(settings, relation_heads=3))
    with pytest.raises(SettingsError, match="--relation-heads 4 would change nothing"):
        replace(settings, relations="qkv", relation_heads=4)


def test_attention_narrower_than_the_hidden_states_is_kept_as_wide_as_it_is(
    small_settings: Settings, tiny_tokenizer: Callable[..., Any], tmp_path: Path
) -> None:
    config = EuroBertConfig(
        vocab_size=200, hidden_size=32, num_hidden_layers=4, num_attention_heads=4, num_key_value_heads=2,
        intermediate_size=64, max_position_embeddings=64, pad_token_id=0, bos_token_id=2, eos_token_id=3,
    )  # fmt: skip
    EuroBertForMaskedLM(config).save_pretrained(tmp_path / "teacher")
    tiny_tokenizer("bert").save_pretrained(tmp_path / "teacher")
    settings = small_settings(tmp_path / "cache.zarr", teacher=str(tmp_path / "teacher"))
    with pytest.raises(TeacherError, match="does not compute attention layer 3 .* another width.* use --relations qkv"):
        build_cache(replace(settings, targets="attention", relations="hidden"))
    assert not (tmp_path / "cache.zarr").exists()
    build_cache(replace(settings, targets="attention"))
    reader = CacheReader.open(tmp_path / "cache.zarr")
    (spec,) = reader.manifest.targets.attention
    assert (spec.form, spec.widths, reader.manifest.widest) == ("vectors", (32, 16, 16), 32)
    vectors = reader.read_rows(0, 4, TargetRequest(attention_layers=(3,)))["plain"].attention[3]
    assert [getattr(vectors, f"{name}_BTD").shape[2] for name in VECTORS] == [32, 16, 16]
    matrices = replace(settings, targets="attention", relations="matrix", out=str(tmp_path / "matrices.zarr"))
    with pytest.raises(SettingsError, match="--relation-heads 32 does not divide the teacher's width 16"):
        build_cache(replace(matrices, relation_heads=32))
    build_cache(replace(matrices, relation_heads=4))
    (spec,) = CacheReader.open(matrices.out).manifest.targets.attention
    assert (spec.form, spec.widths, spec.heads) == ("matrix", None, 4)


def test_matrices_of_a_causal_teacher_are_refused(
    small_settings: Settings, causal_teacher: Path, causal_corpus: Path, tmp_path: Path
) -> None:
    settings = small_settings(
        tmp_path / "cache.zarr", teacher=str(causal_teacher), corpus=(str(causal_corpus),), targets="attention",
        relations="matrix",
    )  # fmt: skip
    with pytest.raises(SettingsError, match="--relations matrix: teacher .* causal LM, .* use --relations qkv"):
        build_cache(settings)
    assert not (tmp_path / "cache.zarr").exists()


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"seq_len": 65}, "--seq-len 65 is beyond the 64 positions"),
        ({"layers": "2,9"}, "names layer 9, the teacher has layers 1 to 4"),
        ({"attention_layer": 5}, "--attention-layer 5 does not exist"),
        ({"k": 100000}, "more than the 200 ids"),
        ({"k": 256, "logits": "sample"}, "256 draws .* ask for 1 to 255"),
    ],
)
def test_what_the_teacher_cannot_give_is_refused(
    small_settings: Settings, tmp_path: Path, changes: dict[str, object], message: str
) -> None:
    with pytest.raises(SettingsError, match=message):
        build_cache(small_settings(tmp_path / "cache.zarr", **changes))
    assert not (tmp_path / "cache.zarr").exists()


def plan(settings: BuildSettings, teacher: Teacher) -> tuple[TargetSpecs, list[str], bool]:
    """Targets, what the user is told, and whether attention comes with projections."""
    said: list[str] = []
    targets, projections = plan_targets(settings, teacher, said.append)
    return targets, said, bool(projections)


@pytest.mark.parametrize(
    "flags, form, exact",
    [
        ({}, "shared", True),
        ({"layers": "4"}, "input", True),
        ({"layers": "4", "precision": "nmse:1e-2"}, "projected", True),
        ({"targets": "attention", "k": None, "layers": "uniform+last"}, "input", True),
        ({"relations": "hidden"}, "shared", True),
        ({"relations": "qkv"}, "vectors", False),
        ({"relations": "matrix", "precision": "int4"}, "matrix", False),
    ],
)
def test_attention_is_held_where_it_costs_least(
    small_settings: Settings, small_teacher: Teacher, flags: dict[str, object], form: str, exact: bool
) -> None:
    targets, said, projected = plan(small_settings(Path("never.zarr"), **flags), small_teacher)
    (spec,) = targets.attention
    assert (spec.form, projected, said) == (form, exact, [])
    assert spec.codec == ("nmse:0.01" if form == "projected" else "float16")
    assert spec.heads == (2 if form == "matrix" else None)


@pytest.mark.parametrize(
    "flags, told",
    [
        (
            {"targets": "logits"},
            ["--layers 2,4 is not used: it is about hidden, .* logits alone", "--attention-la"],
        ),
        (
            {"targets": "hidden", "logits": "topk", "temperature": 3.0, "attention_layer": None},
            ["--logits topk --k 8 --temperature 3.0 is not used: .* add logits to --targets if it is meant"],
        ),
        ({"targets": "hidden", "k": None, "attention_layer": None}, []),
    ],
)
def test_flags_of_targets_that_are_not_kept_are_told(
    small_settings: Settings, small_teacher: Teacher, flags: dict[str, object], told: list[str]
) -> None:
    _, said, _ = plan(small_settings(Path("never.zarr"), **flags), small_teacher)
    assert len(said) == len(told) and all(map(re.match, told, said))


@pytest.mark.parametrize(
    "flags, entries, codec",
    [
        ({"k": None}, 64, "float16"),
        ({"precision": "int8"}, 8, "root8"),
        ({"precision": "nmse:1e-1"}, 8, "root8"),
        ({"logits": "sample", "k": None}, 50, "exact"),
        ({"logits": "sample", "k": 255, "precision": "float16"}, 255, "exact"),
    ],
)
def test_log_probabilities_have_two_bytes_or_one_and_draws_are_exact(
    small_settings: Settings, small_teacher: Teacher, flags: dict[str, object], entries: int, codec: str
) -> None:
    targets, _, _ = plan(small_settings(Path("never.zarr"), targets="logits", **flags), small_teacher)
    assert targets.logits is not None
    assert (targets.logits.entries, targets.logits.codec) == (entries, codec)
    assert not targets.hidden and not targets.attention


def test_defaults_that_depend_on_the_teacher(small_settings: Settings, small_teacher: Teacher) -> None:
    """Its last layer but one, the layers of a student of half its depth, and all targets that it can give."""
    settings = small_settings(Path("never.zarr"), layers="uniform+last", attention_layer=None, seq_len=None)
    targets, _, _ = plan(settings, small_teacher)
    assert targets.attention_layers() == (3,)
    assert targets.hidden_layers() == (2, 3, 4)
    assert resolve_seq_len(settings, small_teacher) == 64, "of the 512 that are usual it can read so many"
    assert resolve_seq_len(replace(settings, seq_len=5), small_teacher) == 5


def test_of_a_small_vocabulary_every_id_is_kept_unless_more_are_asked_for(
    small_settings: Settings, small_teacher: Teacher, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As of ESM's 33 amino acids and marks, of which the usual 64 cannot be kept; here 200, the usual 300."""
    monkeypatch.setattr("teacher_cache.build.settings._DEFAULT_ENTRIES", {"topk": 300})
    targets, _, _ = plan(small_settings(Path("never.zarr"), targets="logits", k=None), small_teacher)
    assert targets.logits is not None and targets.logits.entries == 200
    with pytest.raises(SettingsError, match="--k 300 is more than the 200 ids"):
        plan(small_settings(Path("never.zarr"), targets="logits", k=300), small_teacher)


def test_what_a_headless_teacher_cannot_give_is_left_out_and_said(
    small_settings: Settings, tiny_teacher: Callable[..., Path]
) -> None:
    teacher = Teacher.load(str(tiny_teacher("bert", head=False)), device="cpu")
    targets, said, _ = plan(small_settings(Path("never.zarr"), k=None), teacher)
    assert targets.logits is None and targets.hidden and targets.attention
    (line,) = said
    assert line.endswith("has no language-modelling head: building hidden, attention (no logits)")
    with pytest.raises(TeacherError, match="would come from random weights; use --targets hidden,attention"):
        plan(small_settings(Path("never.zarr"), targets="logits"), teacher)


def test_masked_views_need_a_mask_token(small_settings: Settings, tiny_teacher: Callable[..., Path]) -> None:
    teacher = Teacher.load(str(tiny_teacher("bert")), device="cpu")
    teacher.tokenizer.mask_token = None
    plan(small_settings(Path("never.zarr"), targets="hidden,attention"), teacher)
    for flags in ({"targets": "logits"}, {"targets": "hidden", "hs_view": "masked"}):
        with pytest.raises(TeacherError, match="has no mask token: .* --targets hidden,attention with --hs-view plain"):
            plan(small_settings(Path("never.zarr"), **flags), teacher)


def test_matrices_that_take_much_memory_are_told(small_settings: Settings, small_teacher: Teacher) -> None:
    """3 vectors x 2 bytes x 8 heads x 64^2 positions x 8192 rows are 1.5 GiB."""
    flags = {"targets": "attention", "relations": "matrix", "relation_heads": 8, "seq_len": 64}
    flags |= {"k": None, "layers": BuildSettings.layers}
    _, said, _ = plan(small_settings(Path("never.zarr"), block_rows=8192, **flags), small_teacher)
    (line,) = said
    assert line.startswith("relation matrices take 1.5 GiB of memory for each block of 8192 rows")
    assert line.endswith("a smaller --block-rows takes less")
    assert plan(small_settings(Path("never.zarr"), block_rows=4096, **flags), small_teacher)[1] == []


def test_the_manifest_says_what_was_asked_and_what_was_found(
    small_settings: Settings, small_teacher: Teacher, small_rows: Rows
) -> None:
    settings = small_settings(Path("never.zarr"), views=3, seed=5, temperature=2.0, mlm_probability=0.2)
    targets, _, _ = plan(settings, small_teacher)
    manifest = make_manifest(settings, small_teacher, targets, small_rows, 24)
    assert (manifest.seq_len, manifest.rows, manifest.block_rows, manifest.views) == (24, 40, 16, 3)
    assert (manifest.seed, manifest.temperature, manifest.mlm_probability) == (5, 2.0, 0.2)
    assert (manifest.teacher, manifest.corpus, manifest.dtype) == (small_teacher.record, small_rows.record, "float32")
    assert manifest.targets == targets and not manifest.calibration and not manifest.inputs_held
    assert Manifest.from_json(json.loads(json.dumps(manifest.to_json()))) == manifest
    second = make_manifest(settings, small_teacher, targets, small_rows.part(2, 2), 24)
    assert (second.first_row, second.rows) == (20, 20)


def test_a_block_far_beyond_all_rows_is_refused_before_it_is_held(small_settings: Settings, tmp_path: Path) -> None:
    settings = small_settings(tmp_path / "cache.zarr", max_rows=8, block_rows=10**6)
    with pytest.raises(SettingsError, match="--block-rows 1000000 is more than the 8 rows .* give at most 1024"):
        build_cache(settings)
    assert not any((tmp_path / "cache.zarr").rglob("*"))
