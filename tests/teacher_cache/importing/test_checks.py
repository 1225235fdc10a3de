"""The most probable ids of a place, and the mass outside them, against plain float64."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from teacher_cache.errors import SourceError
from teacher_cache.importing.checks import most_probable
from teacher_cache.importing.source import Distributions

VOCABULARY = 12


def listed(*entries: dict[int, float], rounding: float = 1e-3) -> Distributions:
    """Distributions after positions 0, 1, …, as mappings of ids to log-probabilities."""
    counts = np.array([len(entry) for entry in entries])
    return Distributions(
        position_P=np.arange(len(entries)),
        count_P=counts,
        top_P=counts,
        ids_E=np.array([number for entry in entries for number in entry]),
        log_probs_E=np.array([value for entry in entries for value in entry.values()], dtype=np.float64),
        rounding=rounding,
    )


@given(st.integers(0, 2**32 - 1), st.integers(1, VOCABULARY), st.integers(1, 6))
def test_what_is_kept_is_the_largest_and_the_rest_is_the_tail(seed: int, entries: int, places: int) -> None:
    draw = np.random.default_rng(seed)
    logits = draw.normal(scale=4, size=(places, VOCABULARY))
    log_probs = logits - np.log(np.exp(logits).sum(1, keepdims=True))
    counts = draw.integers(1, VOCABULARY + 1, size=places)
    given_ = [
        {int(number): float(row[number]) for number in draw.permutation(VOCABULARY)[:count]}
        for row, count in zip(log_probs, counts, strict=True)
    ]
    found = most_probable(listed(*given_), entries, VOCABULARY, "here")
    for place, entry in enumerate(given_):
        best = sorted(entry, key=lambda number: -entry[number])[:entries]
        ids, values = found.ids_PK[place].tolist(), found.log_probs_PK[place].tolist()
        assert ids[: len(best)] == best and len(set(ids)) == entries
        assert values[: len(best)] == pytest.approx([entry[number] for number in best], abs=1e-5)
        assert all(value == -math.inf for value in values[len(best) :])
        rest = 1 - sum(math.exp(entry[number]) for number in best)
        tail = 0.0 if len(best) == VOCABULARY else rest
        assert math.exp(float(found.log_tail_P[place])) == pytest.approx(tail, abs=1e-6)


def test_places_are_filled_up_from_the_end_of_the_vocabulary() -> None:
    """With ids that are not listed: where paddings and reserved tokens are, and never one that is listed."""
    found = most_probable(listed({11: -1.0, 3: -2.0}), 4, VOCABULARY, "here")
    assert found.ids_PK.tolist() == [[11, 3, 10, 9]]


def test_a_little_more_than_1_is_made_1_and_a_little_above_0_is_0() -> None:
    found = most_probable(listed({1: math.log(0.6), 2: math.log(0.4004)}, {5: 5e-4}), 2, VOCABULARY, "here")
    assert torch.allclose(found.log_probs_PK.exp().sum(1), torch.ones(2)) and found.log_tail_P.isneginf().all()
    assert found.log_probs_PK[1, 0] == 0.0
    loose = listed({1: math.log(0.6), 2: math.log(0.44)}, rounding=0.05)
    assert most_probable(loose, 2, VOCABULARY, "here").log_probs_PK[0].exp().sum() == pytest.approx(1)


@pytest.mark.parametrize(
    "entry, told",
    [
        ({12: -1.0}, "id 12 is beyond the vocabulary of 12"),
        ({-1: -1.0}, "id -1 is beyond"),
        ({1: float("nan")}, "the log-probability of id 1 is not a number"),
        ({1: 0.01}, "is 0.01, above 0"),
        ({1: float("inf")}, "is inf, above 0"),
        ({1: -0.5, 2: -0.5}, "are 1.21306 together, more than 1"),
        ({1: float("-inf")}, "none of its ids has any probability"),
    ],
)
def test_what_is_no_part_of_a_distribution(entry: dict[int, float], told: str) -> None:
    """Named by the token whose distribution it is: position 1 is followed by token 2."""
    with pytest.raises(SourceError, match=f"here, the distribution of token 2: .*{told}"):
        most_probable(listed({3: -1.0}, entry), 1, VOCABULARY, "here")
