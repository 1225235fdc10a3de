"""Relation heads and masks: from widths by one rule, from flags where they fit, else an error that says what fits."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from transformers import BertConfig, DeepseekV3Config, LlamaConfig, PreTrainedConfig

from student_train.methods.objective import plan_objective
from student_train.methods.relation_heads import RelationFlags, default_heads, vector_widths
from teacher_cache.build.build import build_cache
from teacher_cache.build.settings import BuildSettings
from teacher_cache.errors import SettingsError
from teacher_cache.read.reader import CacheReader


@pytest.fixture(scope="module")
def causal_source(causal_teacher: Path, causal_corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> CacheReader:
    """Attention of layer 3 of a Llama whose queries are 32 wide, keys and values 16."""
    out = str(tmp_path_factory.mktemp("heads") / "cache.zarr")
    build_cache(
        BuildSettings(
            teacher=str(causal_teacher), corpus=(str(causal_corpus),), out=out, targets="attention", max_rows=8,
            seq_len=16, precision="float16", device="cpu",
        )
    )  # fmt: skip
    return CacheReader.open(out)


def llama(width: int, heads: int, shared: int) -> LlamaConfig:
    return LlamaConfig(
        hidden_size=width, num_attention_heads=heads, num_key_value_heads=shared, num_hidden_layers=2, vocab_size=105
    )


def relations(source: CacheReader, student: PreTrainedConfig, flags: RelationFlags) -> dict[str, object]:
    plan = plan_objective(
        {"mha": 1.0},
        source=source,
        student=student,
        relation_heads=flags.heads,
        relation_heads_kv=flags.key_value_heads,
        relation_mask=flags.mask,
    )
    return plan.made["mha"].describe()


def test_heads_follow_the_widths_of_each_stream() -> None:
    # SmolLM2-135M, and a student of two thirds of its width
    assert default_heads((576, 192, 192), (384, 128, 128)) == (32, 8)
    assert default_heads((768, 768, 768), (384, 384, 384)) == (48, 48)
    assert vector_widths(LlamaConfig(hidden_size=96, num_attention_heads=4, num_key_value_heads=2, head_dim=32)) == (
        128, 64, 64,
    )  # fmt: skip
    assert vector_widths(BertConfig(hidden_size=96, num_attention_heads=4)) == (96, 96, 96)
    latent = DeepseekV3Config(
        hidden_size=96,
        num_attention_heads=4,
        num_key_value_heads=4,
        qk_nope_head_dim=16,
        qk_rope_head_dim=8,
        v_head_dim=12,
    )
    assert vector_widths(latent) == (96, 96, 48)


def test_a_causal_teacher_says_heads_and_mask(causal_source: CacheReader) -> None:
    student = llama(24, 3, 1)
    said = relations(causal_source, student, RelationFlags())
    assert (said["relation_heads"], said["key_value_heads"], said["relation_mask"]) == (2, 1, "causal")
    said = relations(causal_source, student, RelationFlags(heads=8, key_value_heads=4, mask="full"))
    assert (said["relation_heads"], said["key_value_heads"], said["relation_mask"]) == (8, 4, "full")
    # as many of keys and values as of queries need not be said
    assert "key_value_heads" not in relations(causal_source, student, RelationFlags(heads=1))


@pytest.mark.parametrize(
    "flags, told",
    [
        (
            RelationFlags(heads=3),
            "--relation-heads 3 .* teacher's query width 32 and the student's query width 24: .* nearest .* 2 or 4",
        ),
        (
            RelationFlags(key_value_heads=16),
            "--relation-heads-kv 16 .* teacher's key width 16 and the student's key width 8: .* nearest .* is 8",
        ),
    ],
)
def test_heads_that_do_not_divide_are_refused(causal_source: CacheReader, flags: RelationFlags, told: str) -> None:
    with pytest.raises(SettingsError, match=told):
        relations(causal_source, llama(24, 3, 1), flags)


def test_a_masked_lm_has_no_causal_mask(tiny_teacher: Callable[..., Path], tiny_corpus: Path, tmp_path: Path) -> None:
    out = str(tmp_path / "cache.zarr")
    build_cache(
        BuildSettings(
            teacher=str(tiny_teacher()), corpus=(str(tiny_corpus),), out=out, targets="attention", max_rows=8,
            seq_len=16, precision="float16", device="cpu",
        )
    )  # fmt: skip
    source, student = CacheReader.open(out), BertConfig(hidden_size=32, num_attention_heads=4, num_hidden_layers=2)
    with pytest.raises(SettingsError, match="--relation-mask 'causal': the teacher .* is a masked LM"):
        relations(source, student, RelationFlags(mask="causal"))
    for flags in (RelationFlags(), RelationFlags(mask="full")):
        assert relations(source, student, flags) == {
            "relation_heads": 2, "pairs": [[2, 3]], "weights": [1.0, 1.0, 1.0], "view": "plain",
        }  # fmt: skip
