"""No decoded value is further from the original than the codec declares, whatever the values."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from teacher_cache.codecs.base import VectorCodec
from teacher_cache.codecs.fixed import make_codec
from teacher_cache.contract.targets import FIXED_PRECISIONS, nmse_target, parse_precision
from teacher_cache.errors import SettingsError, TeacherError


def round_trip(codec: VectorCodec, values_ND: torch.Tensor) -> torch.Tensor:
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


def test_the_bounds_are_tight() -> None:
    """A bound that nothing comes near would let a worse codec pass."""
    values_ND = torch.randn(2000, 64, generator=torch.Generator().manual_seed(0))
    for precision in FIXED_PRECISIONS:
        codec = make_codec(precision)
        error_ND = (round_trip(codec, values_ND) - values_ND).abs()
        assert float((error_ND / codec.error_bound_ND(values_ND)).max()) > 0.9


def test_int8_keeps_signs_among_subnormal_numbers() -> None:
    """A scale of a few units in the last place is rounded so far that codes could be beyond a byte."""
    values_ND = torch.arange(-600, 601).to(torch.float32)[:, None] * 2.0**-149
    decoded_ND = round_trip(make_codec("int8"), values_ND)
    assert bool((decoded_ND * values_ND.sign() >= 0).all())


def test_values_that_cannot_be_held_are_refused() -> None:
    with pytest.raises(TeacherError, match="float16 cannot hold.*70000.*--precision int8"):
        make_codec("float16").encode(torch.tensor([[1.0, 70000.0]]))
    with pytest.raises(TeacherError, match="infinite or undefined"):
        make_codec("int8").encode(torch.tensor([[1.0, float("nan")]]))
    with pytest.raises(TeacherError, match="int4 cannot hold.*500000, limit 458528.*--precision int8"):
        make_codec("int4").encode(torch.tensor([[1.0, -5e5]]))
    with pytest.raises(TeacherError, match="infinite or undefined"):
        make_codec("int4").encode(torch.tensor([[1.0, float("inf")]]))
    with pytest.raises(SettingsError, match="'int7'.*float16, int8, int4"):
        make_codec("int7")


@pytest.mark.parametrize("width", [1, 2, 31, 32, 33, 64, 70])
def test_int4_is_what_its_docstring_says(width: int) -> None:
    """The documented layout in float64, one value at a time."""
    values_ND = torch.randn(5, width, generator=torch.Generator().manual_seed(width)) * 3
    codec = make_codec("int4")
    coded = codec.encode(values_ND)
    have_ND = round_trip(codec, values_ND).double()
    for token in range(5):
        for component in range(width):
            group = values_ND[token, component // 32 * 32 : (component // 32 + 1) * 32].double()
            scale = float(np.float16(float(group.abs().max()) / 7))
            assert coded["scale"][component // 32, token] == scale
            code = round(float(values_ND[token, component]) / scale)
            if component == width - 1 and width % 2:
                assert coded["last"][token] == code
            else:
                assert int(coded["codes"][component // 2, token]) >> 4 * (component % 2) & 15 == code + 8
            assert have_ND[token, component] == pytest.approx(code * scale, rel=1e-6)


@settings(max_examples=200, deadline=None)
@given(largest=st.floats(0, 458_528, width=32), share=st.floats(-1, 1, width=32))
def test_int4_codes_neither_saturate_nor_vanish(largest: float, share: float) -> None:
    """Any magnitude, the smallest float32 numbers included: the scale covers the group, if it is not all zeros."""
    values_ND = torch.tensor([[largest, share * largest, -largest]])
    codec = make_codec("int4")
    coded = codec.encode(values_ND)
    halves = [int(half) for byte in coded["codes"][:, 0] for half in (byte & 15, byte >> 4)]
    assert min(halves) >= 1 and abs(int(coded["last"][0])) <= 7
    assert (coded["scale"] > 0).all() == (largest > 0)
    error_ND = (round_trip(codec, values_ND).double() - values_ND.double()).abs()
    assert bool((error_ND <= codec.error_bound_ND(values_ND)).all())


def test_precisions_are_written_in_one_way() -> None:
    assert {parse_precision(text) for text in ("nmse:1e-2", "nmse:0.01", "nmse:.010")} == {"nmse:0.01"}
    assert [parse_precision(text) for text in FIXED_PRECISIONS] == list(FIXED_PRECISIONS)
    assert nmse_target("nmse:0.01") == 0.01
    assert nmse_target("int8") is None


@pytest.mark.parametrize(
    "text", ["nmse:", "nmse:0", "nmse:1", "nmse:nan", "nmse:-1e-2", "nmse:1e-9", "int7", "nmse", "1e-2"]
)
def test_unknown_precisions_are_refused(text: str) -> None:
    with pytest.raises(SettingsError, match="--precision.*float16, int8, int4 or nmse:X"):
        parse_precision(text)
