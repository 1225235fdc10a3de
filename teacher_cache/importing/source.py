"""What a source gives: rows of token ids with the distributions that something else computed after them.

A source knows its files and one row at a time, by number, so that rows can be put into the order of a store and a
killed import goes on at any block. What a row says is checked elsewhere (`checks.py`): a source refuses what it cannot
read as its shape.

Shapes: T tokens of a row, P positions of it after which a distribution is known, E entries of all of these, one after
another.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NoReturn, Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from teacher_cache.errors import SourceError

SHAPES = {
    "vllm": "prompt_logprobs as vLLM gives them",
    "openai": "logprobs of completions as OpenAI-like servers give them",
    "distillkit": "log-probabilities as DistillKit packs them",
    "hidden": "hidden states in safetensors files",
    "columns": "columns of top ids and their log-probabilities",
}
"""What the files of each shape hold, in words."""


@dataclass(frozen=True, kw_only=True)
class Distributions:
    """Ids and log-probabilities of the token after each of P positions, in whatever order an entry lists them.

    `position_P` ascends: the distribution is that of token `position + 1`, given tokens 0 to `position`. `count_P` says
    how many of the E entries each position has; `top_P` how many of those are its most probable ids, where a token that
    is none of them is listed beside them. `rounding` is how far beyond 1 probabilities may sum up in this source, which
    those of bfloat16 do by up to 0.004.
    """

    position_P: NDArray[np.int64]
    count_P: NDArray[np.int64]
    top_P: NDArray[np.int64]
    ids_E: NDArray[np.int64]
    log_probs_E: NDArray[np.float64]
    rounding: float = 1e-2

    def first(self, length: int) -> Distributions:
        """Those that are of the first `length` tokens of the row."""
        places = int(np.searchsorted(self.position_P, length - 1))
        entries = int(self.count_P[:places].sum())
        return Distributions(
            position_P=self.position_P[:places],
            count_P=self.count_P[:places],
            top_P=self.top_P[:places],
            ids_E=self.ids_E[:entries],
            log_probs_E=self.log_probs_E[:entries],
            rounding=self.rounding,
        )


@dataclass(frozen=True, kw_only=True)
class SourceRow:
    """One row as a source gives it: T token ids, and what is known of them.

    Distributions after some of them, or hidden states [T, D] by layer, of one shape in all rows; and which tokens a
    model is to learn, None where that is all of them.
    """

    input_ids_T: NDArray[np.int64]
    distributions: Distributions | None = None
    hidden: Mapping[int, torch.Tensor] = field(default_factory=dict)
    learnt_T: NDArray[np.bool_] | None = None

    def first(self, length: int) -> SourceRow:
        """What is known of its first `length` tokens."""
        return SourceRow(
            input_ids_T=self.input_ids_T[:length],
            distributions=None if self.distributions is None else self.distributions.first(length),
            hidden={layer: values_TD[:length] for layer, values_TD in self.hidden.items()},
            learnt_T=None if self.learnt_T is None else self.learnt_T[:length],
        )


class Source(Protocol):
    """Files of one shape.

    `unit_R` numbers, for each row, what has to be read at once to get at it: rows of a unit are kept together.
    `fingerprint` is a hash of the contents of all files, in order, and of all that decides what they are read as.
    """

    @property
    def shape(self) -> str: ...

    @property
    def files(self) -> Sequence[Path]: ...

    @property
    def fingerprint(self) -> str: ...

    @property
    def unit_R(self) -> NDArray[np.int64]: ...

    def read(self, row: int) -> SourceRow:
        """Row `row` of all files, from 0. Not thread-safe.

        Raises:
            SourceError: it is not what the shape says.
        """

    def where(self, row: int) -> str:
        """How a message names a row: its file, and its line or number there."""

    def notes(self) -> Iterable[str]:
        """What the user should know of what has been read so far."""


def refuse(where: str, what: str) -> NoReturn:
    """Refuse a source for what is in one row.

    Raises:
        SourceError: always.
    """
    raise SourceError(f"{where}: {what}")
