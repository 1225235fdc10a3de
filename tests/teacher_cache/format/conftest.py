from __future__ import annotations

from collections.abc import Callable

import pytest

from teacher_cache.contract.manifest import CorpusRecord, Manifest, TeacherRecord
from teacher_cache.contract.targets import TargetSpecs


@pytest.fixture(scope="session")
def small_manifest() -> Callable[..., Manifest]:
    """The manifest of a store that keeps the targets given, small enough to work out by hand what follows from it."""
    return make_manifest


def make_manifest(targets: TargetSpecs, **changes: object) -> Manifest:
    """5 rows of 4 tokens in blocks of 2, two masked views with one place a row; a teacher of width 32 and 300 ids."""
    teacher = TeacherRecord(
        name="t", revision=None, weights_sha256="0" * 64, model_type="bert", layers=4, hidden_size=32, heads=4,
        vocab_size=300, max_positions=64, has_mlm_head=True,
    )  # fmt: skip
    return Manifest(
        teacher=teacher,
        tokenizer_sha256="0",
        corpus=CorpusRecord(specs=(), fingerprint="0", documents=1, tokens=20, rows=5),
        seq_len=4,
        row_mode="packed",
        rows=5,
        block_rows=2,
        seed=0,
        views=2,
        mlm_probability=0.15,
        temperature=1.0,
        dtype="float32",
        targets=targets,
        **changes,  # type: ignore[arg-type]
    )
