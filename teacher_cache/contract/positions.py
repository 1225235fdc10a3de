"""At how many positions of a row the next token's distribution is kept: what `--positions` says. Standard library only.

`all` places of a row, every N-th of them, or a share drawn at random. What a place is, and which are drawn, is the
corpus's subject (`corpus/next_tokens.py`).
"""

from __future__ import annotations

import re

from teacher_cache.errors import SettingsError
from teacher_cache.wording import did_you_mean

_EVERY, _SHARE = "every:", "share:"
_WHOLE_NUMBER = re.compile(r"[0-9]{1,9}")


def parse_positions(text: str) -> str:
    """What `--positions` names, equal choices written equally: `every:1` and `share:1.0` are `all`.

    Raises:
        SettingsError: there is no such choice.
    """
    if text == "all":
        return text
    step, share = step_of(text), share_of(text)
    if step is None and share is None:
        name = text.partition(":")[0]
        raise SettingsError(
            f"--positions {text!r} is unknown: after which tokens the next one's distribution is kept is not said; "
            f"{did_you_mean(name, ('all', 'every', 'share'))} all, every:N for every N-th of a row's places (N from 1 "
            "to 999999999), or share:X for a random share of them (X above 0, at most 1), such as every:4 or share:0.25"
        )
    if step == 1 or share == 1:
        return "all"
    return f"{_EVERY}{step}" if step is not None else f"{_SHARE}{share!r}"


def places_per_row(positions: str, seq_len: int) -> int:
    """M: room for the places of a row of `seq_len` (T) tokens, all but the last of which may have a next one.

    `all`: T - 1; `every:N`: ceil((T - 1) / N); `share:X`: max(1, round(X * (T - 1))).

    Raises:
        SettingsError: see `parse_positions`.
    """
    positions, places = parse_positions(positions), seq_len - 1
    step, share = step_of(positions), share_of(positions)
    if step is not None:
        return -(-places // step)
    return places if share is None else max(1, round(share * places))


def step_of(positions: str) -> int | None:
    """N of `every:N`; None of anything else."""
    number = positions.removeprefix(_EVERY)
    if number == positions or not _WHOLE_NUMBER.fullmatch(number):
        return None
    return int(number) or None


def share_of(positions: str) -> float | None:
    """X of `share:X`; None of anything else."""
    number = positions.removeprefix(_SHARE)
    if number == positions:
        return None
    try:
        share = float(number)
    except ValueError:
        return None
    return share if 0 < share <= 1 else None
