"""Relations seen from a token and as matrices: the same numbers, each in its place, within half precision."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from teacher_cache.codecs.relations import RelationCodec
from teacher_cache.errors import TeacherError

ROWS, HEADS, POSITIONS = 3, 2, 5


@pytest.fixture
def values_BTAT() -> torch.Tensor:
    """Relation of token i of a row to token j in a head, [B, T, A, T]: probabilities over j."""
    return torch.randn(ROWS, POSITIONS, HEADS, POSITIONS, generator=torch.Generator().manual_seed(0)).softmax(-1)


def test_a_matrix_has_the_relations_of_token_i_in_row_i(values_BTAT: torch.Tensor) -> None:
    codec = RelationCodec(HEADS)
    coded = codec.encode(values_BTAT.flatten(2).flatten(0, 1))
    (spec,) = codec.arrays(HEADS * POSITIONS)
    assert (spec.name, spec.dtype, spec.row_shape) == ("", "float16", (HEADS, POSITIONS, POSITIONS))
    assert coded[""].shape == (ROWS, *spec.row_shape) and coded[""].dtype == spec.dtype
    for row, token, head in np.ndindex(ROWS, POSITIONS, HEADS):
        assert np.array_equal(coded[""][row, head, token], values_BTAT[row, token, head].half().numpy())


def test_what_is_decoded_is_within_the_bound(values_BTAT: torch.Tensor) -> None:
    codec, values_ND = RelationCodec(HEADS), values_BTAT.flatten(2).flatten(0, 1)
    have_ND = codec.decode({"": torch.from_numpy(codec.encode(values_ND)[""])})
    assert have_ND.dtype == torch.float32 and have_ND.shape == values_ND.shape
    error_ND = (have_ND.double() - values_ND.double()).abs()
    assert bool((error_ND <= codec.error_bound_ND(values_ND)).all())
    assert 0 < float(error_ND.max()) < 2.0**-11


def test_relations_of_undefined_vectors_are_refused(values_BTAT: torch.Tensor) -> None:
    values_BTAT[1, 2, 0, 3] = torch.nan
    with pytest.raises(TeacherError, match="infinite or undefined"):
        RelationCodec(HEADS).encode(values_BTAT.flatten(2).flatten(0, 1))
