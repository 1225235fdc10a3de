"""The components that a narrower student keeps: mean-free axes, and as much variance as so many can hold."""

from __future__ import annotations

import torch

from student_train.students.narrowing.basis import StateMoments, make_basis, ordinary_moments


def moments_of(states: torch.Tensor) -> StateMoments:
    moments = StateMoments(states.shape[1])
    for batch in states.split(64):
        moments.add(batch)
    return moments


def correlated(positions: int, width: int, seed: int) -> torch.Tensor:
    draw = torch.Generator().manual_seed(seed)
    states = torch.randn(positions, width, generator=draw) @ torch.randn(width, width, generator=draw)
    return states * 0.6 ** torch.arange(width)


def test_states_without_a_mean_over_components_are_kept_best() -> None:
    states = correlated(1000, 12, 0)
    states = states - states.mean(1, keepdim=True) - (states - states.mean(1, keepdim=True)).mean(0)
    basis = make_basis([moments_of(states)], 12, 6)
    kept = basis.project(states).square().sum() / states.square().sum()
    strengths = torch.linalg.svdvals(states).square()
    best = strengths[:5].sum() / strengths.sum()
    torch.testing.assert_close(kept, best, rtol=1e-5, atol=0)
    assert abs(basis.kept - float(best)) < 1e-5


def test_the_students_states_have_no_mean_and_the_teachers_lengths() -> None:
    basis = make_basis([moments_of(correlated(500, 12, seed)) for seed in (1, 2)], 12, 6)
    within = basis.map_DS.T @ basis.map_DS
    # an isometry but for the direction (1, ..., 1) in both
    torch.testing.assert_close(within, torch.eye(6, dtype=torch.float64) - 1 / 6)
    torch.testing.assert_close(basis.map_DS.sum(0), torch.zeros(6, dtype=torch.float64))
    assert 0.5 < basis.kept < 1
    scale = torch.arange(1.0, 13.0, dtype=torch.float64)
    torch.testing.assert_close(basis.scale(scale), (basis.map_DS.T @ scale.diag() @ basis.map_DS).diagonal())


def test_every_place_counts_the_same() -> None:
    loud, quiet = correlated(300, 12, 1), correlated(300, 12, 2)
    first, second = (make_basis([moments_of(loud * by), moments_of(quiet)], 12, 6) for by in (1.0, 1000.0))
    torch.testing.assert_close(first.map_DS, second.map_DS, rtol=0, atol=1e-4)


def test_at_equal_width_nothing_changes() -> None:
    basis = make_basis([moments_of(correlated(300, 12, 1))], 12, 12)
    weight = torch.randn(5, 12)
    assert basis.kept == 1 and torch.equal(basis.reader(weight), weight)
    assert torch.equal(basis.writer(weight.T), weight.T) and torch.equal(basis.scale(weight[0]), weight[0])


def test_sinks_have_no_say_and_without_them_nothing_changes() -> None:
    states = correlated(1000, 12, 0)
    plain = ordinary_moments(states.split(64))
    assert torch.equal(plain.covariance(), moments_of(states).covariance())
    apart = torch.arange(1000) % 100 == 70
    with_sinks = states.clone()
    with_sinks[apart] += 1e4
    found = ordinary_moments(with_sinks.split(64))
    torch.testing.assert_close(found.covariance(), moments_of(states[~apart]).covariance())
    torch.testing.assert_close(found.second_moments(), moments_of(states[~apart]).second_moments())
    one_far = correlated(8000, 12, 0)
    one_far[500] *= 15 * float(one_far.square().sum(1).median() / one_far[500].square().sum()) ** 0.5
    # far, but it owns too little to be kept apart
    assert ordinary_moments(one_far.split(64)).count == 8000
