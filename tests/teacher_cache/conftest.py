"""Small real stores, built once per session, and a manifest written by hand.

The tests of a wing lie in the folder of its name. Those in this folder that name no file are claims that several wings
keep together: a build that is killed, extended, or sent to a bucket.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from teacher_cache.build.build import build_cache
from teacher_cache.build.settings import BuildSettings
from teacher_cache.contract.manifest import CorpusRecord, Manifest, TeacherRecord
from teacher_cache.contract.targets import TargetSpecs


@pytest.fixture(scope="session")
def small_settings(tiny_teacher: Callable[..., Path], tiny_corpus: Path) -> Callable[..., BuildSettings]:
    """Settings of a store of 40 rows x 24 tokens in blocks of 16, with every target."""

    def settings(out: Path, family: str = "bert", **changes: object) -> BuildSettings:
        values: dict[str, object] = {
            "teacher": str(tiny_teacher(family)),
            "corpus": (str(tiny_corpus),),
            "out": str(out),
            "seq_len": 24,
            "max_rows": 40,
            "block_rows": 16,
            "batch_size": 5,
            "k": 8,
            "layers": "2,4",
            "attention_layer": 3,
            "precision": "float16",
        }
        return BuildSettings(**{**values, **changes})  # type: ignore[arg-type]

    return settings


@pytest.fixture(scope="session")
def small_store(small_settings: Callable[..., BuildSettings], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished float16 store of a tiny BERT teacher. Read only: copy it to change it."""
    out = tmp_path_factory.mktemp("small") / "cache.zarr"
    build_cache(small_settings(out))
    return out


@pytest.fixture(scope="session")
def nmse_store(small_settings: Callable[..., BuildSettings], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished store like `small_store` in the `nmse` codec, with two masked views. Read only."""
    out = tmp_path_factory.mktemp("nmse") / "cache.zarr"
    build_cache(small_settings(out, precision="nmse:1e-2", views=2))
    return out


@pytest.fixture(scope="session")
def causal_settings(causal_teacher: Path, causal_corpus: Path) -> Callable[..., BuildSettings]:
    """Settings of a causal store of up to 40 rows x 24 tokens in blocks of 8: draws after every position."""

    def settings(out: Path, **changes: object) -> BuildSettings:
        values: dict[str, object] = {
            "teacher": str(causal_teacher),
            "corpus": (str(causal_corpus),),
            "out": str(out),
            "seq_len": 24,
            "max_rows": 40,
            "block_rows": 8,
            "batch_size": 5,
            "k": 8,
            "layers": "2,4",
        }
        return BuildSettings(**{**values, **changes})  # type: ignore[arg-type]

    return settings


@pytest.fixture(scope="session")
def causal_store(causal_settings: Callable[..., BuildSettings], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished causal store of draws and float16 hidden states, documents isolated. Read only."""
    out = tmp_path_factory.mktemp("causal") / "cache.zarr"
    build_cache(causal_settings(out, targets="logits,hidden", precision="float16"))
    return out


@pytest.fixture(scope="session")
def plain_manifest() -> Callable[..., Manifest]:
    """`plain_manifest(targets, **changes)`: a manifest written by hand: 40 rows of 24 positions in blocks of 16.

    Its teacher has 4 layers of width 32 and 200 ids; 4 places of a row are kept for masked positions.
    """

    def manifest(targets: TargetSpecs, **changes: Any) -> Manifest:
        teacher = TeacherRecord(
            name="teacher", revision=None, weights_sha256="ab" * 32, model_type="bert", layers=4, hidden_size=32,
            heads=4, vocab_size=200, max_positions=64, has_mlm_head=True,
        )  # fmt: skip
        values: dict[str, Any] = {
            "teacher": teacher,
            "tokenizer_sha256": "cd" * 32,
            "corpus": CorpusRecord(specs=("text.txt",), fingerprint="ef" * 32, documents=9, tokens=999, rows=50),
            "seq_len": 24,
            "row_mode": "packed",
            "rows": 40,
            "block_rows": 16,
            "seed": 0,
            "views": 1,
            "mlm_probability": 0.15,
            "temperature": 1.0,
            "dtype": "float32",
            "targets": targets,
        }
        return Manifest(**{**values, **changes})

    return manifest
