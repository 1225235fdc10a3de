"""Which components of the teacher's hidden states a narrower student keeps.

The principal components of the residual stream over all places that the student has (the embedding output, and what
both norms of its layers put out); each place counts the same. One set of components serves all places, because the
blocks of a layer only add to the stream. Layer norms subtract the mean over the components, so the components are laid
into those directions of the student's stream whose mean is 0, of which there are S - 1. At equal width the stream stays
as it is. Sinks, a few tokens that would own the variance (`codecs/sinks.py`), have no say: all would be theirs.
Shapes: D components of the teacher, S of the student, N positions.
"""

from __future__ import annotations

from collections.abc import Iterable
from copy import deepcopy
from dataclasses import dataclass

import torch
from torch import Tensor

from teacher_cache.codecs.sinks import Surroundings, describe_sinks


@dataclass(frozen=True, kw_only=True)
class Basis:
    """`map_DS` takes the teacher's stream to the student's; `kept` is the share of the variance that it keeps.

    `is_whole` says that the student's stream is the teacher's.
    """

    map_DS: Tensor
    kept: float
    is_whole: bool = False

    def project(self, states: Tensor) -> Tensor:
        """[..., D] of the teacher's stream as [..., S] of the student's."""
        return states @ self.map_DS.to(states)

    def reader(self, weight_OD: Tensor) -> Tensor:
        """The weight of a linear map that reads the teacher's stream, for reading the student's."""
        return weight_OD @ self.map_DS.to(weight_OD)

    def writer(self, weight_DI: Tensor) -> Tensor:
        """The weight of a linear map that writes to the teacher's stream, for writing to the student's."""
        return self.map_DS.to(weight_DI).T @ weight_DI

    def scale(self, scale_D: Tensor) -> Tensor:
        """An elementwise scale of the teacher's stream: the diagonal of what it is in the student's."""
        return (self.map_DS.to(scale_D) ** 2).T @ scale_D


class StateMoments:
    """Mean and second moments of states that come in batches."""

    def __init__(self, width: int) -> None:
        self.count = 0
        self._sum_D = torch.zeros(width, dtype=torch.float64)
        self._products_DD = torch.zeros(width, width, dtype=torch.float64)

    def add(self, states_ND: Tensor) -> None:
        """Count these states."""
        self.count += len(states_ND)
        self._sum_D += states_ND.double().sum(0).cpu()
        self._products_DD += (states_ND.T @ states_ND).double().cpu()

    def second_moments(self) -> Tensor:
        """E[h h']."""
        return self._products_DD / self.count

    def covariance(self) -> Tensor:
        """E[(h - mean) (h - mean)']."""
        mean_D = self._sum_D / self.count
        return self.second_moments() - torch.outer(mean_D, mean_D)


def ordinary_moments(parts: Iterable[Tensor]) -> StateMoments:
    """Moments of one place over all its states that are no sinks, which come in parts [N, D] (at least one)."""
    everything = near = None
    surroundings, far = None, 0
    for states_ND in parts:
        if surroundings is None:
            surroundings, everything = Surroundings.of(states_ND), StateMoments(states_ND.shape[1])
        assert everything is not None
        far_N = surroundings.far(states_ND)
        far += int(far_N.sum())
        if far and near is None:
            near = deepcopy(everything)
        everything.add(states_ND)
        if near is not None:
            near.add(states_ND[~far_N])
    assert everything is not None and surroundings is not None
    if near is None:
        return everything
    total, ordinary = (float(moments.covariance().trace()) for moments in (everything, near))
    sinks = describe_sinks(surroundings, tokens=everything.count, far=far, total=total, ordinary=ordinary, largest=0.0)
    return everything if sinks is None else near


def make_basis(places: Iterable[StateMoments], width: int, student_width: int) -> Basis:
    """The components that keep most of the states of all places."""
    if student_width == width:
        return Basis(map_DS=torch.eye(width, dtype=torch.float64), kept=1.0, is_whole=True)
    moments_DD, covariance_DD = torch.zeros(2, width, width, dtype=torch.float64)
    for place in places:
        covariance = place.covariance()
        weight = 1 / covariance.trace().clamp_min(torch.finfo(torch.float64).tiny)
        covariance_DD += weight * covariance
        # not around the mean: it counts in what a norm divides by
        moments_DD += weight * place.second_moments()
    mean_free_DD = torch.eye(width, dtype=torch.float64) - 1 / width
    vectors_DK = leading_vectors(mean_free_DD @ moments_DD @ mean_free_DD, student_width - 1)
    kept = (vectors_DK.T @ covariance_DD @ vectors_DK).trace() / covariance_DD.trace()
    return Basis(map_DS=vectors_DK @ _mean_free_axes(student_width).T, kept=float(kept))


def leading_vectors(moments_DD: Tensor, count: int) -> Tensor:
    """[D, count]: the eigenvectors of the largest eigenvalues, their largest entries positive."""
    vectors_DK: Tensor = torch.linalg.eigh(moments_DD).eigenvectors.flip(1)[:, :count]
    return vectors_DK * vectors_DK.gather(0, vectors_DK.abs().argmax(0, keepdim=True)).sign()


def _mean_free_axes(width: int) -> Tensor:
    """[S, S - 1]: orthonormal axes whose components sum to 0, by a reflection that takes e_1 to (1, ..., 1)."""
    mirror_S = torch.full((width,), width**-0.5, dtype=torch.float64)
    mirror_S[0] += 1
    reflection_SS: Tensor = torch.eye(width, dtype=torch.float64)
    reflection_SS -= 2 * torch.outer(mirror_S, mirror_S) / mirror_S.square().sum()
    return reflection_SS[:, 1:]
