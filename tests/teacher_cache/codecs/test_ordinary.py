"""Tokens that own the variance and are not kept apart are noticed, and streams without such tokens are left alone."""

from __future__ import annotations

import pytest
import torch

from teacher_cache.codecs.nmse import Transform, calibrate
from teacher_cache.codecs.ordinary import measure_ordinary
from teacher_cache.codecs.sample import CalibrationSample

WIDTH = 32
NEAR = 60.0
"""Not ten times as far as others, but enough to own more than half of the variance."""


def tokens(count: int, seed: int, *, sink_size: float = 0.0) -> torch.Tensor:
    """Vectors with a spread of variances; every fiftieth is a sink where `sink_size` says how large one is."""
    draw = torch.Generator().manual_seed(seed)
    values_NH = torch.randn(count, WIDTH, generator=draw) * torch.linspace(2.0, 0.1, WIDTH) + 1.0
    if sink_size:
        values_NH[::50, 3] += sink_size
    return values_NH


def coded(sink_size: float, target: float) -> tuple[torch.Tensor, Transform]:
    sample = CalibrationSample()
    sample.fit(tokens(4000, 0, sink_size=sink_size))
    sample.tune.append(tokens(1000, 1, sink_size=sink_size))
    sample.check.append(tokens(1000, 2, sink_size=sink_size))
    return sample.check[0], calibrate(sample, target, None)[0]


@pytest.mark.parametrize("target", [1e-3, 1e-2, 1e-1])
def test_a_stream_without_sinks_has_nothing_to_say(target: float) -> None:
    found = measure_ordinary(*coded(0.0, target), None)
    assert found.error < 2 * target and found.variance_outside < 0.35
    assert found.note("hidden/2", target) is None


@pytest.mark.parametrize("target", [1e-2, 1e-1])
def test_tokens_too_near_to_be_kept_apart_are_named_with_what_is_left_of_the_others(target: float) -> None:
    values_NH, transform = coded(NEAR, target)
    found = measure_ordinary(values_NH, transform, None)
    assert found.variance_outside > 0.5
    note = found.note("hidden/15", target)
    assert note is not None and "hidden/15" in note and "--precision int8" in note


def test_the_error_is_that_of_a_plain_computation() -> None:
    values_NH, transform = coded(NEAR, 1e-1)
    exact = values_NH.double()
    codes = ((exact - transform.mean_D.double()) @ transform.basis_DK.double() / transform.step).round()
    given = codes @ transform.basis_DK.double().T * transform.step + transform.mean_D.double()
    distance = (exact - exact.mean(0)).square().sum(1)
    ordinary = distance.argsort()[:900]
    lost = (exact - given)[ordinary].square().sum() / (exact[ordinary] - exact[ordinary].mean(0)).square().sum()
    found = measure_ordinary(values_NH, transform, None)
    assert found.error == pytest.approx(float(lost), rel=1e-3)
    assert found.variance_outside == pytest.approx(1 - float(distance[ordinary].sum() / distance.sum()), abs=1e-4)


def test_what_is_kept_apart_says_nothing_of_the_others() -> None:
    sample = CalibrationSample()
    sample.fit(tokens(4000, 0, sink_size=400.0))
    sample.tune.append(tokens(1000, 1, sink_size=400.0))
    sample.check.append(tokens(1000, 2, sink_size=400.0))
    transform, record = calibrate(sample, 1e-2, None)
    found = measure_ordinary(sample.check[0], transform, None, record.sinks)
    assert found.note("hidden/2", 1e-2) is None and found.variance_outside < 0.35
