"""Sinks are found where a few tokens own the variance and nowhere else, and kept as exactly as their type can."""

from __future__ import annotations

import pytest
import torch

from teacher_cache.codecs.sinks import FAR, Surroundings, describe_kept, describe_sinks, squared_distance, store_sinks
from teacher_cache.contract.manifest import SinkRecord
from teacher_cache.errors import TeacherError

WIDTH = 24


def ordinary(tokens: int, seed: int = 0) -> torch.Tensor:
    return 3 + torch.randn(tokens, WIDTH, generator=torch.Generator().manual_seed(seed))


def record(dtype: str = "float16") -> SinkRecord:
    return SinkRecord(distance=10.0, share=0.01, variance=0.9, dtype=dtype)  # type: ignore[arg-type]


def test_far_tokens_are_ten_times_as_far_as_the_median_one() -> None:
    values = ordinary(1000)
    around = Surroundings.of(values)
    exact = values.double()
    distance = (exact - exact.median(dim=0).values).square().sum(1)
    assert around.typical == pytest.approx(float(distance.median()), rel=1e-5)
    assert around.squared_limit == pytest.approx(FAR * float(distance.median()), rel=1e-5)
    direction = torch.nn.functional.normalize(torch.ones(WIDTH), dim=0)
    probes = around.centre_D + torch.tensor([[0.99], [1.01]]) * around.squared_limit**0.5 * direction
    assert around.far(probes).tolist() == [False, True]


@pytest.mark.parametrize("scale", [1e-6, 1.0, 1e6])
def test_the_rule_has_no_unit_and_no_origin(scale: float) -> None:
    values = ordinary(1000)
    values[::100] *= 100
    assert torch.equal(Surroundings.of(scale * values).far(scale * values), Surroundings.of(values).far(values))
    assert Surroundings.of(values).far(values).nonzero()[:, 0].tolist() == list(range(0, 1000, 100))


def test_surroundings_do_not_move_with_sinks() -> None:
    values = ordinary(1000)
    alone = Surroundings.of(values)
    values[:100] += 1e5
    among = Surroundings.of(values)
    assert among.typical == pytest.approx(alone.typical, rel=0.3)
    assert float(squared_distance(among.centre_D[None], alone.centre_D)[0]) < 0.1 * alone.typical


def test_where_most_tokens_are_the_same_none_is_far() -> None:
    values = torch.ones(10, WIDTH)
    values[0] = 1e4
    assert not Surroundings.of(values).far(values).any()


@pytest.mark.parametrize(
    ("far", "total", "found"),
    [
        (0, 1e6, False),  # none are far
        (8, 1.04, False),  # far, but the variance is that of the others
        (8, 1.10, True),
        (125, 1e6, True),
        (126, 1e6, False),  # more than an eighth: no exceptions
    ],
)
def test_few_tokens_that_own_enough_are_sinks(far: int, total: float, found: bool) -> None:
    around = Surroundings(centre_D=torch.zeros(WIDTH), typical=1.0)
    sinks = describe_sinks(around, tokens=1000, far=far, total=total, ordinary=1.0, largest=100.0)
    assert (sinks is not None) == found
    if sinks is not None:
        assert sinks == SinkRecord(
            distance=10.0,
            share=far / 1000,
            variance=pytest.approx(1 - (1 - far / 1000) / total),  # type: ignore[arg-type]
            dtype="float16",
        )


def test_sinks_that_may_be_too_large_for_half_precision_are_kept_in_float32() -> None:
    around = Surroundings(centre_D=torch.zeros(WIDTH), typical=1.0)
    types = {
        largest: describe_sinks(around, tokens=1000, far=8, total=1e6, ordinary=1.0, largest=largest)
        for largest in (32_000.0, 33_000.0)
    }
    assert [one and one.dtype for one in types.values()] == ["float16", "float32"]
    values = torch.full((2, WIDTH), 1e6)
    assert store_sinks(values, record("float32")).tolist() == values.tolist()


def test_what_is_stored_is_within_half_a_unit_in_the_last_place() -> None:
    values = 1000 * ordinary(50)
    stored = torch.from_numpy(store_sinks(values, record()))
    assert stored.dtype == torch.float16
    assert bool(((stored.double() - values.double()).abs() <= values.double().abs() * 2.0**-11).all())


@pytest.mark.parametrize("value", [70_000.0, float("inf"), float("nan")])
def test_what_cannot_be_stored_is_refused(value: float) -> None:
    values = ordinary(3)
    values[1, 2] = value
    with pytest.raises(TeacherError, match="float16 cannot hold"):
        store_sinks(values, record())


def test_the_user_is_told_how_many_and_what_they_own() -> None:
    assert describe_kept(None) == ""
    said = describe_kept(record())
    assert "1.00% of the tokens" in said and "90% of the variance" in said and "float16" in said
