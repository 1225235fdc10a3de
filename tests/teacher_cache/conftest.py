"""Small real stores, built once per session."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from teacher_cache.build.build import build_cache
from teacher_cache.build.settings import BuildSettings


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
