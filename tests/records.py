"""Records of trainings, as tests compare them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

TIMES = ("seconds", "wait", "memory")
"""What no two runs share."""


def without_times(records: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The records without the times, and the memory, that no two runs share."""
    return [{key: value for key, value in record.items() if key not in TIMES} for record in records]
