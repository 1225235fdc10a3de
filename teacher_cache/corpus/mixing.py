"""Several sources of text as one corpus: which share of the rows each gives, and an order that keeps to the shares.

A source's share is its weight, `SPEC@WEIGHT`, or its number of tokens to the power of alpha: 1 leaves sources as they
are, 0 makes them equal, 0.3 is what XLM-R draws its languages with (Conneau et al., ACL 2020, section 3.1). XLM-R
repeats the text of small languages; here no row is kept twice, and where a source runs out the others fill its share.

Rows are drawn without replacement, each with a probability in proportion to its share of its source's: row r comes at
-log(1 - u_r) / w_r, u_r being uniform (Efraimidis and Spirakis, Information Processing Letters 2006). So the first N
rows are the same however many more are kept, and the rows of one source are in the order that they have alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from teacher_cache.errors import SettingsError
from teacher_cache.random_bits import uniform_bits


@dataclass(frozen=True, kw_only=True)
class Mix:
    """What is mixed: specifications without their weights, and either those weights or alpha."""

    specs: tuple[str, ...]
    weights: tuple[float, ...] | None = None
    alpha: float | None = None

    @classmethod
    def of(cls, corpus: Sequence[str], alpha: float | None) -> Mix | None:
        """What these specifications and --mix-alpha ask for; None if sources are to be taken as they are.

        Raises:
            SettingsError: weights of some only, or weights and alpha.
        """
        parsed = [_split_weight(spec) for spec in corpus]
        weights = [weight for _, weight in parsed if weight is not None]
        if weights and alpha is not None:
            raise SettingsError(
                f"--mix-alpha {alpha!r} and weights such as {corpus[0]!r} both say how much of each corpus to take; "
                "give one of them"
            )
        if weights and len(weights) < len(parsed):
            lacking = next(spec for spec, weight in parsed if weight is None)
            raise SettingsError(
                f"--corpus {lacking!r} has no weight and others have: its share of the rows is not said; give each one "
                f"or none, such as {lacking + '@1'!r}"
            )
        if not weights and alpha is None:
            return None
        return cls(specs=tuple(spec for spec, _ in parsed), weights=tuple(weights) or None, alpha=alpha)

    def shares(self, tokens: Sequence[int]) -> NDArray[np.float64]:
        """The share of each source in the rows, given its number of tokens; 0 where it has none."""
        sizes = np.asarray(tokens, dtype=np.float64)
        wanted = np.asarray(self.weights) if self.weights is not None else sizes ** float(self.alpha or 0)
        wanted = np.where(sizes > 0, wanted, 0)
        return np.asarray(wanted / wanted.sum())

    def order_rows(
        self, seed: int, source_of_row: NDArray[np.int64], tokens: Sequence[int], max_rows: int | None
    ) -> tuple[NDArray[np.int64], list[tuple[str, int]]]:
        """All rows in their final order, and how many of the first `max_rows` come from each source.

        `source_of_row` numbers the source of each row, `tokens` counts the tokens of each source.
        """
        order = mixed_order(seed, source_of_row, self.shares(tokens))
        counts = np.bincount(source_of_row[order[:max_rows]], minlength=len(self.specs)).tolist()
        return order, list(zip(self.specs, counts, strict=True))

    def identity(self) -> dict[str, Any]:
        """What decides the order of the rows, beside the text."""
        return {"weights": self.weights, "alpha": self.alpha}


def mixed_order(seed: int, source_of_row: NDArray[np.int64], shares: NDArray[np.float64]) -> NDArray[np.int64]:
    """Row numbers in their final order, of rows whose sources are given."""
    uniform = uniform_bits(seed, np.arange(len(source_of_row))) / 2.0**64
    rows = np.bincount(source_of_row, minlength=len(shares))
    weight_of_source = shares / np.maximum(rows, 1)
    return np.argsort(-np.log1p(-uniform) / weight_of_source[source_of_row], kind="stable")


def _split_weight(spec: str) -> tuple[str, float | None]:
    """`novels.txt@0.3` as its two parts; a file of that very name is no weight."""
    name, at, text = spec.rpartition("@")
    if not at or Path(spec).expanduser().exists():
        return spec, None
    try:
        weight = float(text)
    except ValueError:
        return spec, None
    if not 0 < weight < float("inf"):
        raise SettingsError(f"--corpus {spec!r} asks for a share of {text}: give a positive weight, or leave it out")
    return name, weight
