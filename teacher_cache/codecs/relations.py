"""Relations of tokens as matrices in half precision: the baseline that benchmarks compare stored vectors with.

A matrix of a relation head holds softmax(x_i . x_j / sqrt(d)) of every two tokens i and j of a row. Seen from token i
that is a vector: its relation to each of T tokens in each of A heads, A * T numbers, which is what this codec is given
and gives back. It stores them as the matrices that training reads, whole rows at a time: T times the bytes of a vector.

Shapes: B rows, T positions, A relation heads, N = B * T tokens.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from teacher_cache.codecs.base import Coded, CodedArraySpec, refuse_infinite
from teacher_cache.codecs.fixed import Float16Codec

if TYPE_CHECKING:
    import torch


class RelationCodec:
    """Vectors [N, A * T] of all tokens of B rows <-> one array of matrices [B, A, T, T], relative error 2^-11."""

    name = "relations"

    def __init__(self, heads: int) -> None:
        self.heads = heads

    def arrays(self, width: int) -> tuple[CodedArraySpec, ...]:
        """One array, which has the stream's own path."""
        positions = width // self.heads
        return (
            CodedArraySpec(name="", dtype="float16", components=None, row_shape=(self.heads, positions, positions)),
        )

    def encode(self, values_ND: torch.Tensor) -> Coded:
        """Round to half precision, which holds every probability.

        Raises:
            TeacherError: a value is not finite.
        """
        import torch

        refuse_infinite(values_ND)
        values_BTAT = values_ND.unflatten(1, (self.heads, -1)).unflatten(0, (-1, values_ND.shape[1] // self.heads))
        return {"": values_BTAT.transpose(1, 2).to(torch.float16).contiguous().cpu().numpy()}

    def decode(self, coded: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """Half precision to float32."""
        import torch

        return coded[""].transpose(1, 2).flatten(2).flatten(0, 1).to(torch.float32)

    def error_bound_ND(self, values_ND: torch.Tensor) -> torch.Tensor:
        """That of half precision."""
        return Float16Codec().error_bound_ND(values_ND)
