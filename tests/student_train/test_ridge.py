"""Ridge regression from accumulated moments, against plain least squares on all rows."""

from __future__ import annotations

import pytest
import torch

from student_train.ridge import LinearMap, PairMoments, Statistics, fit_ridge, normalised_error, pool, ridge_errors
from tests.plain_ridge import plain_ridge_error


def correlated(count: int, width: int, seed: int) -> torch.Tensor:
    """Vectors whose components have very different variances, as hidden states have."""
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(width, width, generator=torch.Generator().manual_seed(99), dtype=torch.float64)
    scales = torch.logspace(1, -2, width, dtype=torch.float64)
    return torch.randn(count, width, generator=generator, dtype=torch.float64) * scales @ mixing


def statistics_of(x: torch.Tensor, y: torch.Tensor, batch: int = 17) -> Statistics:
    moments = PairMoments(x.shape[1], y.shape[1])
    for part_x, part_y in zip(x.split(batch), y.split(batch), strict=True):
        moments.add(part_x, part_y)
    return moments.statistics()


def fit(x: torch.Tensor, y: torch.Tensor) -> LinearMap:
    half = len(x) // 2
    return fit_ridge(statistics_of(x[:half], y[:half]), statistics_of(x[half:], y[half:]))


@pytest.mark.parametrize("shift", [0.0, 3e3])
def test_accumulated_ridge_is_plain_ridge(shift: float) -> None:
    x, x_test = correlated(400, 12, 0) + shift, correlated(300, 12, 1) + shift
    target = torch.randn(12, 7, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    y, y_test = (part.tanh() @ target + 5 for part in (x - shift, x_test - shift))
    linear = fit(x, y)
    found = normalised_error(linear, statistics_of(x_test, y_test))
    assert found == pytest.approx(plain_ridge_error(x, y, x_test, y_test, linear.strength), rel=1e-6)
    assert 0.05 < found < 0.95  # neither trivially perfect nor trivially useless


def test_exact_linear_relation_has_no_error() -> None:
    x, x_test = correlated(300, 10, 0), correlated(200, 10, 1)
    target = torch.randn(10, 4, dtype=torch.float64)
    linear = fit(x, x @ target - 2)
    assert normalised_error(linear, statistics_of(x_test, x_test @ target - 2)) < 1e-6


def test_unrelated_vectors_are_not_overfitted() -> None:
    """With hardly more pairs than components, plain least squares would do far worse than guessing the mean."""
    x, x_test = correlated(70, 60, 0), correlated(500, 60, 1)
    y, y_test = correlated(70, 5, 2), correlated(500, 5, 3)
    linear = fit(x, y)
    assert plain_ridge_error(x, y, x_test, y_test, 1e-9) > 3
    assert 0.95 < normalised_error(linear, statistics_of(x_test, y_test)) < 1.3


def test_pooled_statistics_are_those_of_all_pairs() -> None:
    x, y = correlated(90, 6, 0), correlated(90, 3, 1) + 4
    pooled = pool(statistics_of(x[:30], y[:30]), statistics_of(x[30:] + 2, y[30:] - 1))
    whole = statistics_of(torch.cat([x[:30], x[30:] + 2]), torch.cat([y[:30], y[30:] - 1]))
    assert pooled.count == whole.count
    for name in ("mean_x", "mean_y", "covariance_xx", "covariance_xy", "variance_y"):
        torch.testing.assert_close(getattr(pooled, name), getattr(whole, name))


def test_the_strength_is_the_best_between_the_two_sets() -> None:
    """Every strength tried by hand: fit on one set, count squared errors on the other, both ways round."""
    x, y = correlated(80, 30, 0), correlated(80, 30, 0).tanh() @ correlated(30, 4, 5) + 20 * correlated(80, 4, 6)
    sets = [(x[:40], y[:40]), (x[40:], y[40:] + 1)]
    both_x = torch.cat([x for x, _ in sets])
    unit = (both_x - both_x.mean(0)).square().mean() * len(both_x)

    def squares(strength: float) -> float:
        total = 0.0
        for (fit_x, fit_y), (test_x, test_y) in (sets, sets[::-1]):
            own_unit = (fit_x - fit_x.mean(0)).square().mean() * len(fit_x)
            error = plain_ridge_error(fit_x, fit_y, test_x, test_y, float(strength * unit / own_unit))
            total += error * float((test_y - test_y.mean(0)).square().sum())
        return total

    chosen = fit_ridge(statistics_of(*sets[0]), statistics_of(*sets[1])).strength
    assert 1e-6 < chosen < 100
    assert squares(chosen) < min(squares(chosen * 2), squares(chosen / 2))


def test_errors_of_every_strength_are_plain_errors() -> None:
    x, x_test = correlated(60, 12, 0), correlated(50, 12, 1) + 3
    y, y_test = (part.tanh() @ correlated(12, 4, 5) for part in (x, x_test))
    fitted, tested = statistics_of(x, y), statistics_of(x_test, y_test + 2)
    unit = float((x - x.mean(0)).square().mean())
    strengths = [1e-6, 1e-2, 1.0, 30.0]
    found = ridge_errors(fitted, tested, torch.tensor(strengths, dtype=torch.float64) * unit)
    plain = [plain_ridge_error(x, y, x_test, y_test + 2, strength) for strength in strengths]
    assert (found / tested.variance_y).tolist() == pytest.approx(plain, rel=1e-6)


def test_correlated_tokens_are_not_taken_for_evidence() -> None:
    """Rows whose tokens are nearly copies of each other: far fewer independent pairs than tokens."""

    def rows(count: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
        noise = 0.01 * correlated(count * 20, 40, seed + 1)
        return correlated(count, 40, seed).repeat_interleave(20, 0) + noise, correlated(
            count, 5, seed + 2
        ).repeat_interleave(20, 0)

    x, y = rows(20, 0)
    x_test, y_test = rows(100, 10)
    assert plain_ridge_error(x, y, x_test, y_test, 1e-6) > 2
    assert normalised_error(fit(x, y), statistics_of(x_test, y_test)) < 1.2


def test_fewer_pairs_than_components() -> None:
    x, x_test = correlated(40, 60, 0), correlated(300, 60, 1)
    target = torch.randn(60, 5, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
    linear = fit(x, x @ target)
    found = normalised_error(linear, statistics_of(x_test, x_test @ target))
    assert found == pytest.approx(plain_ridge_error(x, x @ target, x_test, x_test @ target, linear.strength), rel=1e-4)
    assert found < 0.9
