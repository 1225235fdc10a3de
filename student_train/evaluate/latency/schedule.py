"""Which sizes of input to time within a given number of seconds, and how many of these each may take.

A large teacher needs minutes for one large batch on one core, a small student milliseconds for one sentence. So a pair
of passes (student and teacher) is timed once at the smallest sizes, larger ones are predicted in proportion to their
tokens, and sizes are admitted from the smallest on while the least number of passes fits. A size is timed in every
combination of backend and threads or in none, so that what is reported can be compared. Nothing is run here but the
function that times one pair.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

LEAST_RUNS = 3
WARM_UP_RUNS = 1


@dataclass(frozen=True, order=True)
class Size:
    """An input of [batch_size, seq_len] token ids; sorts by its number of tokens."""

    tokens: int
    batch_size: int
    seq_len: int

    @classmethod
    def of(cls, batch_size: int, seq_len: int) -> Size:
        """The size of so many sequences of so many tokens."""
        return cls(batch_size * seq_len, batch_size, seq_len)

    def __str__(self) -> str:
        return f"batch {self.batch_size} x {self.seq_len} tokens"


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """Seconds that each admitted size may take by number of threads; and what the sizes left out would take in all."""

    seconds: Mapping[Size, Mapping[int, float]]
    left_out: Mapping[Size, float]


def plan_sizes(
    sizes: Sequence[Size],
    threads: Sequence[int],
    *,
    seconds: float,
    time_pair: Callable[[Size], float],
    trial_share: float = 0.01,
) -> Schedule:
    """Divide `seconds` among the sizes.

    Args:
        sizes: what is asked for; the smallest is always admitted.
        threads: the number of threads of each combination that every size is timed in.
        seconds: for everything together.
        time_pair: seconds of one pass of each model, warm, with the largest number of threads.
        trial_share: a size is timed if a pair is expected to take less than this share of `seconds`; the others are
            predicted.
    """
    needed = {
        size: {count: (WARM_UP_RUNS + LEAST_RUNS) * pair * max(threads) / count for count in set(threads)}
        for size, pair in _predict(sorted(sizes), seconds * trial_share, time_pair).items()
    }
    totals = {size: sum(by_threads[count] for count in threads) for size, by_threads in needed.items()}
    admitted: list[Size] = []
    spent = 0.0
    for size, total in totals.items():
        if not admitted or spent + total <= seconds:
            admitted.append(size)
            spent += total
    spare = max(0.0, seconds - spent) / (len(admitted) * len(threads))
    return Schedule(
        seconds={size: {count: need + spare for count, need in needed[size].items()} for size in admitted},
        left_out={size: totals[size] for size in totals if size not in admitted},
    )


def _predict(ascending: Sequence[Size], limit: float, time_pair: Callable[[Size], float]) -> dict[Size, float]:
    """Seconds per pair: timed as long as one is expected to take less than `limit`, in proportion from there on."""
    known: dict[Size, float] = {}
    per_token = 0.0
    for size in ascending:
        predicted = per_token * size.tokens
        if not known or predicted <= limit:
            known[size] = time_pair(size)
            per_token = known[size] / size.tokens
        else:
            known[size] = predicted
    return known
