"""Moments are those of all tokens, or of those that are not far, as plain sums have them."""

from __future__ import annotations

import pytest
import torch

from teacher_cache.codecs.sample import CalibrationSample, share_rows

WIDTH = 24


def correlated(tokens: int, seed: int) -> torch.Tensor:
    """Vectors with a large mean and a spectrum that falls by three orders of magnitude."""
    mixing = torch.randn(WIDTH, WIDTH, generator=torch.Generator().manual_seed(0))
    values = torch.randn(tokens, WIDTH, generator=torch.Generator().manual_seed(seed))
    return (values * torch.logspace(1, -2, WIDTH)) @ mixing + 50 * torch.arange(WIDTH)


def test_far_tokens_that_own_little_are_tokens_like_any_other() -> None:
    """To the last bit: moments are those of all tokens, as they are without anything that looks for sinks."""
    values = correlated(4000, 1)
    values[1234, 3] += 700
    sample = CalibrationSample()
    for part in values.split(300):
        sample.fit(part)
    assert sample.far(values).nonzero()[:, 0].tolist() == [1234]
    count, mean, covariance, sinks = sample.ordinary()
    assert count == 4000 and sinks is None
    shift = values[:300].mean(dim=0)
    shifted = [part - shift for part in values.split(300)]
    want = sum(part.double().sum(dim=0) for part in shifted) / 4000
    outer = sum((part.T @ part).double() for part in shifted) / 4000
    assert isinstance(want, torch.Tensor)
    assert torch.equal(mean, want + shift.double()) and torch.equal(covariance, outer - torch.outer(want, want))


def test_moments_of_ordinary_tokens_have_the_digits_of_a_sample_without_the_others() -> None:
    """Sinks a thousand times as large would eat them: against plain float64. The first part has none."""
    values = correlated(4000, 1)
    apart = torch.zeros(4000, dtype=torch.bool)
    apart[350::100] = True
    values[apart] *= 1000
    sample = CalibrationSample()
    for part in values.split(300):
        sample.fit(part)
    count, mean, covariance, sinks = sample.ordinary()
    exact = values[~apart].double()
    assert sinks is not None and sinks.share == pytest.approx(float(apart.float().mean())) and count == len(exact)
    assert torch.allclose(mean, exact.mean(dim=0), rtol=1e-6)
    want = torch.cov(exact.T, correction=0)
    assert float((covariance - want).abs().max()) < 1e-4 * float(want.diagonal().max())
    total = values.double()
    owned = 1 - float((exact - exact.mean(0)).square().sum() / (total - total.mean(0)).square().sum())
    assert sinks.variance == pytest.approx(owned, rel=1e-4)
    assert torch.equal(sample.far(values), apart)


@pytest.mark.parametrize("tokens", [1, 2, 3, 40])
def test_what_is_far_does_not_hang_on_how_many_tokens_come_at_once(tokens: int) -> None:
    """A row of two tokens, one of which is a sink, says nothing of the others."""
    values = torch.randn(1200, WIDTH, generator=torch.Generator().manual_seed(1))
    values[:: max(tokens, 20), 3] -= 3000
    sample, whole = CalibrationSample(), CalibrationSample()
    for part in values.split(tokens):
        sample.fit(part)
    whole.fit(values)
    assert sample.count == whole.count == 1200
    assert sample.ordinary()[0] == whole.ordinary()[0] < 1200
    assert sample.ordinary()[3] is not None and torch.equal(sample.far(values), whole.far(values))


@pytest.mark.parametrize("rows", [1, 2, 128, 1000, 20_000])
def test_rows_are_shared_out_in_full(rows: int) -> None:
    fit, tune, check = share_rows(rows, 128, 384)
    assert min(fit, tune, check) >= 1 and tune == check
    assert fit + 2 * tune <= max(rows, 3) and fit + 2 * tune <= 384
