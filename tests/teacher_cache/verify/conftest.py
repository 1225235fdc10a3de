"""A finished store of two groups, and copies of it to damage."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from teacher_cache.build.build import build_cache
from teacher_cache.build.settings import BuildSettings

Settings = Callable[..., BuildSettings]


@pytest.fixture(scope="session")
def grown_settings(small_settings: Settings) -> Callable[[Path], BuildSettings]:
    """`nmse_store` with one layer more."""
    return lambda out: small_settings(out, precision="nmse:1e-2", views=2, layers="2,3,4")


@pytest.fixture(scope="session")
def grown_store(
    nmse_store: Path,
    grown_settings: Callable[[Path], BuildSettings],
    tmp_path_factory: pytest.TempPathFactory,
) -> Path:
    """A finished store of two groups: hidden state 3 was added. Read only."""
    out = tmp_path_factory.mktemp("grown") / "cache.zarr"
    shutil.copytree(nmse_store, out)
    build_cache(grown_settings(out))
    return out


@pytest.fixture
def store(grown_store: Path, tmp_path: Path) -> Path:
    """A copy to damage."""
    return Path(shutil.copytree(grown_store, tmp_path / "cache.zarr"))
