"""Which rows of a cache are for training and which are held out for validation.

Rows are stored in shuffled order, so the last ones are as good a sample as any, and naming them takes one number: every
run on the same store with the same share holds out the same rows, whatever its seed, and so does every evaluation.
"""

from __future__ import annotations

from teacher_cache.errors import SettingsError


def held_out_rows(rows: int, share: float) -> int:
    """How many rows at the end of a store of `rows` rows are held out: max(1, round(share * rows)).

    Raises:
        SettingsError: no row would be left for training.
    """
    held_out = max(1, round(share * rows))
    if held_out >= rows:
        raise SettingsError(
            f"the cache has {rows!r} rows and --valid-share {share!r} holds out {held_out} of them: no row is left to "
            "train on; build a larger cache or hold out a smaller share"
        )
    return held_out
