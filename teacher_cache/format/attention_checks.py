"""Do the fields of an attention target in a manifest go together?"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def check_relations(place: str, spec: Mapping[str, Any]) -> None:
    """Check heads, codec and widths of a specification that stands at `place` of a manifest.

    Raises:
        ValueError: one of them does not go with the form.
    """
    matrix, heads, codec = spec["form"] == "matrix", spec["heads"], spec["codec"]
    if matrix != (heads is not None):
        raise ValueError(f"the field '{place}.heads' is {heads!r}: relations kept as matrices have heads, others none")
    if matrix and codec != "float16":
        raise ValueError(f"the field '{place}.codec' is {codec!r}: relations kept as matrices are float16")
    if (widths := spec.get("widths")) is not None and spec["form"] not in ("vectors", "replayed"):
        raise ValueError(
            f"the field '{place}.widths' is {widths!r}: vectors that are replayed or kept themselves have some"
        )


def check_replay(place: str, spec: Mapping[str, Any], hidden_size: int) -> None:
    """Check what is said of positions to replay, of a teacher whose hidden states are so wide.

    Raises:
        ValueError: it does not go with the form, or with the widths of queries and keys.
    """
    replay = spec.get("replay")
    if (spec["form"] == "replayed") != (replay is not None):
        raise ValueError(
            f"the field '{place}.replay' is {replay!r}: attention of the form 'replayed' has one, no other"
        )
    if replay is None:
        return
    head_width, rotated = replay["head_width"], replay["rotated"]
    widths = spec.get("widths") or [hidden_size] * 3
    if any(width % head_width for width in widths[:2]):
        raise ValueError(
            f"the field '{place}.replay.head_width' is {head_width}: it must divide the widths of queries and keys, "
            f"{widths[0]} and {widths[1]}"
        )
    if rotated > head_width or rotated % 2:
        raise ValueError(
            f"the field '{place}.replay.rotated' is {rotated}: it must be an even number up to {head_width}"
        )
