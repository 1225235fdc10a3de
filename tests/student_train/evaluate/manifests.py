"""A manifest of a small teacher, to plan by."""

from __future__ import annotations

from typing import Any

from teacher_cache.contract.manifest import CorpusRecord, Manifest, TeacherRecord
from teacher_cache.contract.targets import AttentionSpec, HiddenSpec, LogitsSpec, TargetSpecs


def make_manifest(
    *, hidden: tuple[int, ...] = (2, 3, 4), attention: tuple[int, ...] = (3,), logits: bool = True, **changes: Any
) -> Manifest:
    teacher = TeacherRecord(
        name="tiny",
        revision=None,
        weights_sha256="0" * 64,
        model_type="bert",
        layers=4,
        hidden_size=32,
        heads=4,
        vocab_size=200,
        max_positions=64,
        has_mlm_head=True,
    )
    targets = TargetSpecs(
        logits=LogitsSpec(entries=8, codec="float16") if logits else None,
        hidden=tuple(HiddenSpec(layer=layer, codec="float16") for layer in hidden),
        attention=tuple(AttentionSpec(layer=layer, form="vectors", codec="float16") for layer in attention),
    )
    corpus = CorpusRecord(specs=("text",), fingerprint="0", documents=1, tokens=1, rows=1000)
    settings: dict[str, Any] = {
        "teacher": teacher,
        "tokenizer_sha256": "0",
        "corpus": corpus,
        "seq_len": 32,
        "row_mode": "packed",
        "rows": 1000,
        "block_rows": 64,
        "seed": 0,
        "views": 1,
        "mlm_probability": 0.15,
        "temperature": 1.0,
        "dtype": "float32",
        "targets": targets,
    }
    return Manifest(**{**settings, **changes})
