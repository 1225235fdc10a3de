"""Top-k, its tail mass and draws against plain float64."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from teacher_cache.codecs.sparse_logits import draw_samples, sample_points, topk_log_probabilities
from teacher_cache.errors import TeacherError


def random_logits(places: int, vocab_size: int, scale: float = 1.0, seed: int = 0) -> torch.Tensor:
    return torch.randn(places, vocab_size, generator=torch.Generator().manual_seed(seed)) * scale


def points_of(places: int, draws: int, seed: int = 0) -> np.ndarray:
    return sample_points(seed, np.arange(places), 0, np.arange(places) % 7, draws)


# ---- most probable ids ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("temperature", [1.0, 0.5, 4.0])
@pytest.mark.parametrize("scale", [0.1, 3.0, 40.0])
def test_topk_and_tail_against_float64(temperature: float, scale: float) -> None:
    logits_PV = random_logits(30, 500, scale, seed=1)
    have = topk_log_probabilities(logits_PV, 16, temperature)
    for place in range(30):
        probabilities = torch.softmax(logits_PV[place].double() / temperature, 0)
        order = torch.argsort(probabilities, descending=True)
        assert torch.equal(have.ids_PK[place], order[:16])
        assert torch.allclose(have.log_probs_PK[place].double(), probabilities[order[:16]].log(), rtol=1e-5, atol=1e-5)
        tail = probabilities[order[16:]].sum().log()
        assert have.log_tail_P[place].double() == pytest.approx(float(tail), rel=1e-5, abs=1e-5)


def test_kept_mass_and_tail_are_one_even_where_the_tail_is_tiny() -> None:
    logits_PV = torch.zeros(1, 100)
    logits_PV[0, 0] = 40.0
    have = topk_log_probabilities(logits_PV, 1, 1.0)
    # 1 - p would be 0 in float32; the tail is 99 e^-40
    assert float(have.log_tail_P[0]) == pytest.approx(-40 + torch.log(torch.tensor(99.0)).item(), rel=1e-6)


def test_the_whole_vocabulary_leaves_no_tail() -> None:
    have = topk_log_probabilities(random_logits(3, 8), 8, 1.0)
    assert torch.isneginf(have.log_tail_P).all()
    assert torch.allclose(have.log_probs_PK.exp().sum(1), torch.ones(3), atol=1e-6)


# ---- points ---------------------------------------------------------------------------------------------------------


def test_points_are_one_in_each_share_and_depend_on_names_alone() -> None:
    row_id_P, place_P = np.array([5, 5, 9, 2**40]), np.array([0, 1, 0, 76])
    points_PN = sample_points(3, row_id_P, 1, place_P, 50)
    assert points_PN.dtype == np.float64
    assert np.array_equal(np.floor(points_PN * 50), np.tile(np.arange(50), (4, 1)))
    for place in range(4):
        alone_PN = sample_points(3, row_id_P[place : place + 1], 1, place_P[place : place + 1], 50)
        assert np.array_equal(alone_PN[0], points_PN[place])
    others = (
        sample_points(4, row_id_P, 1, place_P, 50),
        sample_points(3, row_id_P + 1, 1, place_P, 50),
        sample_points(3, row_id_P, 0, place_P, 50),
        sample_points(3, row_id_P, 1, place_P + 1, 50),
    )
    assert all((other_PN != points_PN).all() for other_PN in others)


def test_points_stay_the_same_for_ever() -> None:
    """Stores that were built in parts, or with other versions of the libraries, must agree."""
    expected = [0.0059383013351346214, 0.4440673043173257, 0.9069786721402856]
    assert sample_points(7, np.array([11]), 2, np.array([5]), 3)[0].tolist() == expected


# ---- draws ----------------------------------------------------------------------------------------------------------


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 2**31),
    vocab_size=st.integers(1, 3000),
    scale=st.sampled_from([0.0, 0.5, 4.0, 60.0]),
    temperature=st.sampled_from([1.0, 0.5, 3.0]),
)
def test_draws_invert_the_cumulative_distribution(seed: int, vocab_size: int, scale: float, temperature: float) -> None:
    logits_PV, points_PN = random_logits(9, vocab_size, scale, seed), points_of(9, 21, seed)
    ids_PN = draw_samples(logits_PV, points_PN, temperature)
    assert ids_PN.dtype == np.int32
    assert (np.diff(ids_PN, axis=1) >= 0).all()
    ends_PV = torch.softmax(logits_PV.double() / temperature, 1).cumsum(1).numpy()
    for place in range(9):
        # a point as near to the end of an id as float32 cannot tell falls on either side of it
        above, below = (np.searchsorted(ends_PV[place], points_PN[place] + d, side="right") for d in (1e-6, -1e-6))
        assert (below <= ids_PN[place]).all()
        assert (ids_PN[place] <= np.minimum(above, vocab_size - 1)).all()
        assert (np.diff(ends_PV[place], prepend=0)[ids_PN[place]] > 0).all()


def shares_of(logits_V: torch.Tensor, places: int, draws: int) -> np.ndarray:
    """How often each id is drawn, as a share of all draws at so many places with the same logits."""
    ids_PN = draw_samples(logits_V.expand(places, -1), points_of(places, draws), 1.0)
    return np.bincount(ids_PN.ravel(), minlength=len(logits_V)) / ids_PN.size


@pytest.mark.parametrize("vocab_size, scale", [(5, 1.0), (97, 2.0), (1030, 0.7)])
def test_the_expected_share_of_an_id_is_its_probability(vocab_size: int, scale: float) -> None:
    """Pearson's chi-square against the full distribution; independent draws would have the mean V - 1."""
    logits_V = random_logits(1, vocab_size, scale)[0]
    share_V, p_V = shares_of(logits_V, 6000, 40), torch.softmax(logits_V.double(), 0).numpy()
    chi_square = 6000 * 40 * ((share_V - p_V) ** 2 / p_V).sum()
    assert chi_square < vocab_size - 1 + 4 * np.sqrt(2 * vocab_size)
    assert (np.abs(share_V - p_V) < 5 * np.sqrt(p_V / (6000 * 40))).all()


def test_ids_at_the_ends_of_a_long_vocabulary_get_their_share() -> None:
    """Half of the mass on ids at both ends and around the ends of runs, half spread over 250,002 ids."""
    vocab_size, single = 250_002, np.array([0, 1, 511, 512, 1023, 131_072, 249_855, 249_856, 250_000, 250_001])
    p_V = np.full(vocab_size, 0.5 / vocab_size)
    p_V[single] += 0.05
    share_V = shares_of(torch.from_numpy(np.log(p_V)).float(), 400, 50)
    assert np.abs(share_V[single] - p_V[single]).max() < 5 * np.sqrt(0.05 / (400 * 50))
    # and none is favoured by its place in the vocabulary
    share_V[single] = 0
    assert np.abs(share_V.reshape(6, -1).sum(axis=1) - 0.5 / 6).max() < 5 * np.sqrt(0.08 / (400 * 50))


def test_draws_vary_less_than_independent_ones() -> None:
    logits_PV = random_logits(3000, 60, 2.0)
    p_PV = torch.softmax(logits_PV.double(), 1).numpy()
    ids_PN = draw_samples(logits_PV, points_of(3000, 50), 1.0)
    counts_PV = np.stack([np.bincount(ids_N, minlength=60) for ids_N in ids_PN])
    variance = ((counts_PV / 50 - p_PV) ** 2).sum(axis=1).mean()
    independent = (p_PV * (1 - p_PV) / 50).sum(axis=1).mean()
    assert variance < 0.6 * independent
    assert np.abs((counts_PV / 50 - p_PV).mean(axis=0)).max() < 5 * np.sqrt(0.25 / (50 * 3000))


@settings(max_examples=20, deadline=None)
@given(cuts=st.lists(st.integers(1, 39), max_size=5), vocab_size=st.sampled_from([3, 700, 30_522]))
def test_draws_do_not_depend_on_the_batch(cuts: list[int], vocab_size: int) -> None:
    logits_PV, points_PN = random_logits(40, vocab_size, 2.0), points_of(40, 50)
    whole_PN = draw_samples(logits_PV, points_PN, 1.0)
    bounds = [0, *sorted(set(cuts)), 40]
    parts = [draw_samples(logits_PV[a:b], points_PN[a:b], 1.0) for a, b in pairwise(bounds)]
    assert np.array_equal(np.concatenate(parts), whole_PN)


def test_ids_without_probability_are_never_drawn() -> None:
    logits_PV = torch.full((4, 2000), float("-inf"))
    possible = [(0,), (1999,), (700, 701), (44, 45, 1024)]
    for place, ids in enumerate(possible):
        logits_PV[place, list(ids)] = 5.0
    points_PN = np.tile(np.array([0.0, 2.0**-60, 0.5, 1 - 2.0**-53, 1.0]), (4, 1))
    ids_PN = draw_samples(logits_PV, points_PN, 1.0)
    for place, ids in enumerate(possible):
        assert set(ids_PN[place].tolist()) <= set(ids)
        assert ids_PN[place, 0] == ids[0] and ids_PN[place, -1] == ids[-1]


def test_the_logits_stay_as_they_were() -> None:
    logits_PV = random_logits(3, 64)  # a vocabulary that fills its runs
    before_PV = logits_PV.clone()
    draw_samples(logits_PV, points_of(3, 5), 2.0)
    assert torch.equal(logits_PV, before_PV)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_logits_without_a_distribution_are_refused(bad: float) -> None:
    logits_PV = random_logits(3, 50)
    logits_PV[1, 7] = bad
    with pytest.raises(TeacherError, match="undefined or infinite.*--dtype float32"):
        draw_samples(logits_PV, points_of(3, 5), 1.0)
