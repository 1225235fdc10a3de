"""Which attention heads a student takes over, and what becomes of them where its heads are smaller.

A student of fewer heads keeps those that write most into its stream. A student of more heads gets some of the teacher's
several times, each copy with values of its own. Where a student's head has fewer components, its queries and keys keep
what matters most to their products, and its values keep what varies most. Where it has more components, the queries of
the further ones are 0, so that the head computes the same.
Shapes: N positions, d components of a teacher head, e of a student head.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from student_train.students.narrowing.basis import leading_vectors

_RELATIVE_FLOOR = 1e-9


@dataclass(frozen=True, kw_only=True)
class HeadMap:
    """The teacher head behind a student head, and what takes its queries, keys and values to the student's."""

    head: int
    query_ed: Tensor
    key_ed: Tensor
    value_ed: Tensor


def choose_heads(importance: Tensor, count: int) -> list[tuple[int, int]]:
    """For each of `count` student heads: a teacher head, and how many student heads before have the same."""
    heads = len(importance)
    if count <= heads:
        return [(head, 0) for head in sorted(importance.topk(count).indices.tolist())]
    taken = [head * heads // count for head in range(count)]
    return [(head, taken[:place].count(head)) for place, head in enumerate(taken)]


def map_head(head: int, query_Nd: Tensor, key_Nd: Tensor, value_Nd: Tensor, *, components: int, copy: int) -> HeadMap:
    """The maps of one head to `components`; `copy` tells apart student heads of the same teacher head."""
    query_ed, key_ed = _map_scores(query_Nd.double().cpu(), key_Nd.double().cpu(), components)
    value_ed = map_values(value_Nd.double().cpu(), components, copy)
    return HeadMap(head=head, query_ed=query_ed, key_ed=key_ed, value_ed=value_ed)


def _map_scores(query_Nd: Tensor, key_Nd: Tensor, components: int) -> tuple[Tensor, Tensor]:
    """Maps such that q' . k' / sqrt(e) is close to q . k / sqrt(d) in the mean square over all pairs."""
    size = query_Nd.shape[1]
    scale = (components / size) ** 0.25
    if components >= size:
        padded_ed = scale * torch.eye(components, size, dtype=torch.float64)
        return padded_ed, padded_ed.clone()
    # what a query adds to the scores of all keys changes no attention
    key_Nd = key_Nd - key_Nd.mean(0)
    root_query, inverse_query = _roots(query_Nd.T @ query_Nd / len(query_Nd))
    root_key, inverse_key = _roots(key_Nd.T @ key_Nd / len(key_Nd))
    left, strength, right = torch.linalg.svd(root_query @ root_key)
    strength_e1 = scale * strength[:components, None].sqrt()
    return strength_e1 * (left[:, :components].T @ inverse_query), strength_e1 * (right[:components] @ inverse_key)


def map_values(value_Nd: Tensor, components: int, copy: int) -> Tensor:
    """[e, d]: the leading components of values that vary; `copy` number n gets the n-th run of them."""
    size = value_Nd.shape[1]
    value_ed = torch.zeros(components, size, dtype=torch.float64)
    if components >= size:
        basis_dd = torch.eye(size, dtype=torch.float64)
    else:
        centred_Nd = value_Nd - value_Nd.mean(0)
        basis_dd = leading_vectors(centred_Nd.T @ centred_Nd, size)
    own_ed = basis_dd.T[copy * components : (copy + 1) * components]
    value_ed[: len(own_ed)] = own_ed
    return value_ed


def _roots(moments_dd: Tensor) -> tuple[Tensor, Tensor]:
    """The symmetric square root of a matrix of second moments, and its inverse."""
    values_d, vectors_dd = torch.linalg.eigh(moments_dd)
    roots_d = values_d.clamp_min(_RELATIVE_FLOOR * values_d[-1] + torch.finfo(torch.float64).tiny).sqrt()
    return (vectors_dd * roots_d) @ vectors_dd.T, (vectors_dd / roots_d) @ vectors_dd.T
