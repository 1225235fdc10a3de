"""No decoded value is further from the original than the codec declares, whatever the values."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from teacher_cache.codec import LogProbabilityCodec, VectorCodec, make_codec
from teacher_cache.contract import FIXED_PRECISIONS, nmse_target, parse_precision
from teacher_cache.errors import SettingsError, TeacherError


def round_trip(codec: VectorCodec | LogProbabilityCodec, values_ND: torch.Tensor) -> torch.Tensor:
    coded = codec.encode(values_ND)
    specs = {spec.name: spec for spec in codec.arrays(values_ND.shape[1])}
    assert coded.keys() == specs.keys()
    for name, array in coded.items():
        components = specs[name].components
        assert array.dtype == np.dtype(specs[name].dtype)
        assert array.shape == ((len(values_ND),) if components is None else (components, len(values_ND)))
    return codec.decode({name: torch.from_numpy(np.array(array)) for name, array in coded.items()})


@pytest.mark.parametrize("precision", FIXED_PRECISIONS)
@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 2**31), exponent=st.floats(-12, 4), rows=st.integers(1, 40), width=st.integers(1, 70))
def test_error_is_within_the_bound(precision: str, seed: int, exponent: float, rows: int, width: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    values_ND = torch.randn(rows, width, generator=generator) * 10.0**exponent
    values_ND[0] *= torch.rand(width, generator=generator) < 0.5  # exact zeros, now and then a whole row of them
    codec = make_codec(precision)
    error_ND = (round_trip(codec, values_ND).double() - values_ND.double()).abs()
    assert bool((error_ND <= codec.error_bound_ND(values_ND)).all())


@pytest.mark.parametrize("precision", FIXED_PRECISIONS)
@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 2**31), sharpness=st.floats(0.01, 30))
def test_log_probabilities_are_within_the_bound(precision: str, seed: int, sharpness: float) -> None:
    logits_NV = torch.randn(17, 50, generator=torch.Generator().manual_seed(seed)) * sharpness
    log_probs_NK = logits_NV.log_softmax(1).topk(8).values
    codec = LogProbabilityCodec(precision)
    error_NK = (round_trip(codec, log_probs_NK).double() - log_probs_NK.double()).abs()
    assert bool((error_NK <= codec.error_bound_ND(log_probs_NK)).all())


def test_the_bounds_are_tight() -> None:
    """A bound that nothing comes near would let a worse codec pass."""
    values_ND = torch.randn(2000, 64, generator=torch.Generator().manual_seed(0))
    for precision in FIXED_PRECISIONS:
        codec = make_codec(precision)
        error_ND = (round_trip(codec, values_ND) - values_ND).abs()
        assert float((error_ND / codec.error_bound_ND(values_ND)).max()) > 0.9


def test_values_that_cannot_be_held_are_refused() -> None:
    with pytest.raises(TeacherError, match="float16 cannot hold.*70000.*--precision int8"):
        make_codec("float16").encode(torch.tensor([[1.0, 70000.0]]))
    with pytest.raises(TeacherError, match="infinite or undefined"):
        make_codec("int8").encode(torch.tensor([[1.0, float("nan")]]))
    with pytest.raises(SettingsError, match="'int7'.*float16, int8"):
        make_codec("int7")


def test_precisions_are_written_in_one_way() -> None:
    assert {parse_precision(text) for text in ("nmse:1e-2", "nmse:0.01", "nmse:.010")} == {"nmse:0.01"}
    assert [parse_precision(text) for text in FIXED_PRECISIONS] == list(FIXED_PRECISIONS)
    assert nmse_target("nmse:0.01") == 0.01
    assert nmse_target("int8") is None


@pytest.mark.parametrize(
    "text", ["nmse:", "nmse:0", "nmse:1", "nmse:nan", "nmse:-1e-2", "nmse:1e-9", "int7", "nmse", "1e-2"]
)
def test_unknown_precisions_are_refused(text: str) -> None:
    with pytest.raises(SettingsError, match="--precision.*float16, int8 or nmse:X"):
        parse_precision(text)
