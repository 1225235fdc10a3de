"""The declared error holds on values that calibration has not seen, and what cannot be coded is refused."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from teacher_cache.codecs.nmse import (
    Quantiser,
    Transform,
    calibrate,
    find_step,
    fold_projections,
    projections_of_projected,
    rounding_error,
)
from teacher_cache.codecs.sample import CalibrationSample
from teacher_cache.contract.manifest import TransformRecord
from teacher_cache.contract.streams import VECTORS
from teacher_cache.errors import TeacherError
from teacher_cache.models.attention import AttentionProjections, Projection, project_hidden

WIDTH = 24


def correlated(tokens: int, seed: int) -> torch.Tensor:
    """Vectors with a large mean and a spectrum that falls by three orders of magnitude."""
    mixing = torch.randn(WIDTH, WIDTH, generator=torch.Generator().manual_seed(0))
    scale = torch.logspace(1, -2, WIDTH)
    values = torch.randn(tokens, WIDTH, generator=torch.Generator().manual_seed(seed))
    return (values * scale) @ mixing + 50 * torch.arange(WIDTH)


def make_projections() -> AttentionProjections:
    generator = torch.Generator().manual_seed(5)
    return AttentionProjections(
        **{
            name: Projection(
                weight=torch.randn(WIDTH, WIDTH, generator=generator), bias=torch.randn(WIDTH, generator=generator)
            )
            for name in VECTORS
        }
    )


def calibrated(
    target: float, projections: AttentionProjections | None = None
) -> tuple[Transform, TransformRecord, Quantiser]:
    sample = CalibrationSample()
    for part in correlated(2000, 1).split(300):
        sample.fit(part)
    sample.tune.append(correlated(2000, 2))
    sample.check.append(correlated(2000, 3))
    transform, record = calibrate(sample, target, projections)
    return transform, record, Quantiser(transform, projections)


def nmse(have_ND: torch.Tensor, want_ND: torch.Tensor) -> float:
    have_ND, want_ND = have_ND.double(), want_ND.double()
    return float((have_ND - want_ND).square().sum() / (want_ND - want_ND.mean(0)).square().sum())


@pytest.mark.parametrize("target", [1e-3, 1e-2, 1e-1])
def test_the_error_on_unseen_values_is_the_declared_one(target: float) -> None:
    transform, record, quantiser = calibrated(target)
    values = correlated(3000, 4)
    codes_KN = quantiser.quantise(values)
    assert codes_KN.dtype == torch.int16
    assert nmse(transform.synthesise(codes_KN.T.float() * transform.step), values) == pytest.approx(target, rel=0.1)
    assert record.nmse == pytest.approx(target, rel=0.1)
    assert sum(record.components.values()) == WIDTH


def test_rotated_coordinates_are_the_principal_ones() -> None:
    """Against plain float64: an orthonormal basis in which the fitted covariance is diagonal."""
    transform, _, _ = calibrated(1e-2)
    basis = transform.basis_DK.double()
    assert torch.allclose(basis.T @ basis, torch.eye(WIDTH, dtype=torch.float64), atol=1e-5)
    rotated = torch.cov(((correlated(2000, 1).double()) @ basis).T)
    outside = rotated - torch.diag(rotated.diagonal())
    assert float(outside.abs().max()) < 1e-5 * float(rotated.diagonal().max())


def test_projected_coding_declares_the_error_of_queries_keys_and_values() -> None:
    projections, target = make_projections(), 1e-2
    transform, record, quantiser = calibrated(target, projections)
    hidden = correlated(3000, 4)
    coordinates = quantiser.quantise(hidden).T.float() * transform.step
    have = project_hidden(coordinates[None], projections_of_projected(transform, projections.widths))
    want = project_hidden(hidden[None], projections)
    stacked = [torch.cat([getattr(v, f"{name}_BTD")[0] for name in VECTORS], dim=1) for v in (have, want)]
    assert nmse(*stacked) == pytest.approx(target, rel=0.1)
    assert record.nmse == pytest.approx(target, rel=0.1)
    # the same components as a hidden state has, not three times as many
    assert transform.basis_DK.shape == (3 * WIDTH, WIDTH)


def test_folded_projections_equal_projecting_after_the_inverse_rotation() -> None:
    projections = make_projections()
    transform, _, quantiser = calibrated(1e-2)
    coordinates = quantiser.quantise(correlated(50, 4)).T.float() * transform.step
    folded = project_hidden(coordinates[None], fold_projections(transform, projections))
    plain = project_hidden(transform.synthesise(coordinates)[None], projections)
    for name in VECTORS:
        have, want = (getattr(v, f"{name}_BTD") for v in (folded, plain))
        assert torch.allclose(have, want, rtol=1e-4, atol=1e-3 * float(want.std()))


def test_the_step_costs_what_it_should() -> None:
    coordinates = correlated(4000, 1)
    for target in (1e-4, 1e-2, 0.3):
        error = target * float((coordinates - coordinates.mean(0)).square().sum(1).mean())
        assert rounding_error(coordinates, find_step(coordinates, error)) == pytest.approx(error, rel=0.02)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1e12])
def test_values_that_no_step_can_count_are_refused(value: float) -> None:
    _, _, quantiser = calibrated(1e-2)
    values = correlated(5, 1)
    values[3, 7] = value
    with pytest.raises(TeacherError, match="16 bits hold 32767"):
        quantiser.quantise(values)


def test_what_the_teacher_gives_at_padding_is_nobodys_business() -> None:
    _, _, quantiser = calibrated(1e-2)
    values = correlated(5, 1)
    want = quantiser.quantise(values)
    values[3:] = torch.tensor([[float("nan")], [1e12]])
    codes = quantiser.quantise(values, torch.arange(5) >= 3)
    assert torch.equal(codes[:, :3], want[:, :3])
    assert not codes[:, 3:].any()


def test_constant_states_are_coded_without_error() -> None:
    sample = CalibrationSample()
    sample.fit(torch.ones(9, WIDTH))
    sample.tune.append(torch.ones(9, WIDTH))
    sample.check.append(torch.ones(9, WIDTH))
    transform, record = calibrate(sample, 1e-2, None)
    codes_KN = Quantiser(transform, None).quantise(torch.ones(4, WIDTH))
    assert record.nmse == 0
    assert torch.allclose(transform.synthesise(codes_KN.T.float() * transform.step), torch.ones(4, WIDTH), atol=1e-5)


def with_sinks(tokens: int, seed: int, *, size: float = 1e5) -> torch.Tensor:
    """Every 125th token is a sink."""
    values = correlated(tokens, seed)
    values[::125, 3] += size
    return values


def sampled(projections: AttentionProjections | None = None, *, size: float = 1e5) -> CalibrationSample:
    sample = CalibrationSample(projections)
    for part in with_sinks(2000, 1, size=size).split(300):
        sample.fit(part)
    sample.tune.append(with_sinks(2000, 2, size=size))
    sample.check.append(with_sinks(2000, 3, size=size))
    return sample


@pytest.mark.parametrize("projected", [False, True])
@pytest.mark.parametrize("target", [1e-2, 1e-1])
def test_the_declared_error_is_that_of_ordinary_tokens(target: float, projected: bool) -> None:
    """Sinks are 0.8% of the tokens and own more than 99% of the variance."""
    projections = make_projections() if projected else None
    transform, record = calibrate(sampled(projections), target, projections)
    assert record.sinks is not None and record.sinks.variance > 0.99
    assert record.sinks.share == pytest.approx(0.008, abs=0.001) and record.sinks.dtype == "float32"
    quantiser = Quantiser(transform, projections, record.sinks)
    values = with_sinks(3000, 4)
    coded = values.double()
    if projections is not None:
        maps = [getattr(projections, name) for name in VECTORS]
        coded = torch.cat([coded @ one.weight.double().T + one.bias for one in maps], dim=1)
    sinks = quantiser.find_sinks(values)
    assert sinks is not None and sinks.nonzero()[:, 0].tolist() == list(range(0, 3000, 125))
    codes_KN = quantiser.quantise(values, None, sinks)
    assert not codes_KN[:, sinks].any()
    have = transform.synthesise(codes_KN.T.float() * transform.step)
    assert nmse(have[~sinks], coded[~sinks]) == pytest.approx(target, rel=0.1)
    assert record.nmse == pytest.approx(target, rel=0.1)
    stored = torch.from_numpy(quantiser.keep(values[sinks])).double()
    assert torch.allclose(stored, coded[sinks], rtol=1e-5, atol=1e-2)


def test_rotation_mean_and_step_are_those_of_a_sample_without_the_sinks() -> None:
    transform, record = calibrate(sampled(), 1e-2, None)
    assert record.sinks is not None
    alone = CalibrationSample()
    for seed, add in ((1, alone.fit), (2, alone.tune.append), (3, alone.check.append)):
        values = with_sinks(2000, seed)
        keep = torch.arange(2000) % 125 != 0
        for part in values[keep].split(300) if seed == 1 else [values[keep]]:
            add(part)
    without, plain = calibrate(alone, 1e-2, None)
    assert plain.sinks is None
    assert transform.step == pytest.approx(without.step, rel=1e-3) and record.nmse == pytest.approx(
        plain.nmse, rel=1e-3
    )
    assert torch.allclose(transform.mean_D, without.mean_D, rtol=1e-4, atol=1e-3)


def test_padding_is_no_sink() -> None:
    transform, record = calibrate(sampled(), 1e-2, None)
    quantiser = Quantiser(transform, None, record.sinks)
    values = with_sinks(3, 4)
    values[2] = float("nan")
    sinks = quantiser.find_sinks(values, torch.tensor([False, False, True]))
    assert sinks is not None and sinks.tolist() == [True, False, False]


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("part", ["fit", "tune", "check"])
def test_infinite_values_are_refused_though_they_are_far(part: str, value: float) -> None:
    """In whichever rows of the sample they are: an error that is measured on them would be declared as 0."""
    sample = CalibrationSample()
    values = {"fit": correlated(2000, 1), "tune": correlated(100, 2), "check": correlated(100, 3)}
    values[part][7] = value
    sample.fit(values["fit"])
    sample.tune.append(values["tune"])
    sample.check.append(values["check"])
    with pytest.raises(TeacherError, match="infinite or undefined"):
        calibrate(sample, 1e-2, None)


def test_a_distance_beyond_all_numbers_finds_no_sinks() -> None:
    """Its square is infinite: a record that somebody wrote must not end in an OverflowError."""
    transform, record = calibrate(sampled(), 1e-2, None)
    assert record.sinks is not None
    found = Quantiser(transform, None, replace(record.sinks, distance=1e200)).find_sinks(with_sinks(500, 4))
    assert found is not None and not found.any()
