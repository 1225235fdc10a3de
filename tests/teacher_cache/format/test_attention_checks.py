"""Attention targets whose fields contradict each other are named with the value."""

from __future__ import annotations

from typing import Any

import pytest

from teacher_cache.format.attention_checks import check_relations, check_replay

REPLAY = {"head_width": 8, "rotated": 6}
REPLAYED: dict[str, Any] = {
    "form": "replayed",
    "heads": None,
    "codec": "int8",
    "widths": [32, 16, 20],
    "replay": REPLAY,
}


def check(spec: dict[str, Any]) -> None:
    check_relations("targets.attention.0", spec)
    check_replay("targets.attention.0", spec, 32)


@pytest.mark.parametrize(
    "changes",
    [{}, {"widths": None}, {"replay": {"head_width": 16, "rotated": 16}}, {"form": "vectors", "replay": None}],
)
def test_what_goes_together_passes(changes: dict[str, Any]) -> None:
    check({**REPLAYED, **changes})


@pytest.mark.parametrize(
    "changes, said",
    [
        ({"replay": None}, r"'targets.attention.0.replay' is None: .* 'replayed' has one"),
        ({"form": "vectors"}, r"'targets.attention.0.replay' is \{.*\}"),
        ({"form": "input", "replay": None}, r"'targets.attention.0.widths' is \[32, 16, 20\]"),
        ({"replay": {"head_width": 12, "rotated": 6}}, r"head_width' is 12: .* 32 and 16"),
        ({"widths": None, "replay": {"head_width": 24, "rotated": 6}}, r"head_width' is 24: .* 32 and 32"),
        ({"replay": {"head_width": 8, "rotated": 10}}, r"rotated' is 10: .* even number up to 8"),
        ({"replay": {"head_width": 8, "rotated": 5}}, r"rotated' is 5"),
        ({"heads": 4}, r"'targets.attention.0.heads' is 4"),
    ],
)
def test_what_does_not_is_named(changes: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        check({**REPLAYED, **changes})
