"""The flags of `kdeval fidelity`: what would leave nothing to measure is refused."""

from __future__ import annotations

from typing import Any

import pytest

from student_train.evaluate.fidelity.settings import FidelitySettings
from teacher_cache.errors import SettingsError


def test_everything_has_a_default() -> None:
    settings = FidelitySettings()
    assert (settings.student, settings.cache, settings.rows) == ("student", ("cache.zarr",), None)
    assert FidelitySettings(rows=1, batch_size=1).rows == 1


@pytest.mark.parametrize(
    "options, said", [({"batch_size": 0}, "--batch-size 0 leaves nothing"), ({"rows": 0}, "--rows 0 leaves nothing")]
)
def test_nothing_to_measure(options: dict[str, Any], said: str) -> None:
    with pytest.raises(SettingsError, match=said):
        FidelitySettings(**options)
