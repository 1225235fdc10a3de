"""Which groups of heads a decoder's student takes over, and which components of them.

A group is a head of keys and values with all the queries that share it. Groups are kept whole as far as the student has
queries for them: chosen are the groups that write most into the stream, and in each the queries that do. A student of
more groups, or of more queries in one, gets some of them several times. Rotary positions turn pairs of components by
angles of their own, so that no two pairs can be mixed: a head of fewer components keeps those pairs that the student's
own positions turn in the same way, which are every second one where heads are half as wide. Values are not turned:
theirs keep what varies most.
Shapes: H teacher heads, d components of one, e of a student head.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from student_train.students.narrowing.attention_heads import choose_heads, map_values

_SAME_FREQUENCY = 1e-4


@dataclass(frozen=True, kw_only=True)
class GroupChoice:
    """The teacher's group behind one of the student's, and its heads of queries behind the student's.

    `copy` says how many groups of the student before it have the same.
    """

    group: int
    heads: tuple[int, ...]
    copy: int


def choose_groups(importance_H: Tensor, teacher_groups: int, groups: int, sharing: int) -> list[GroupChoice]:
    """For each of `groups` groups of the student, `sharing` queries in each."""
    importance_GH = importance_H.view(teacher_groups, -1)
    theirs = importance_GH.shape[1]
    of_groups = importance_GH.topk(min(sharing, theirs), dim=1).values.sum(1)
    return [
        GroupChoice(
            group=group,
            heads=tuple(group * theirs + head for head, _ in choose_heads(importance_GH[group], sharing)),
            copy=copy,
        )
        for group, copy in choose_heads(of_groups, groups)
    ]


def matching_pairs(frequencies: Tensor, teacher_frequencies: Tensor) -> list[tuple[int, int]] | None:
    """(student pair, teacher pair) that are turned alike, one for each pair of the narrower head; None if one lacks."""
    swapped = len(frequencies) > len(teacher_frequencies)
    few, many = (part.double().cpu() for part in (frequencies, teacher_frequencies))
    few, many = (many, few) if swapped else (few, many)
    nearest = (few[:, None].log() - many[None].log()).abs().min(1)
    if (nearest.values > _SAME_FREQUENCY).any() or len(set(nearest.indices.tolist())) < len(few):
        return None
    pairs = list(enumerate(nearest.indices.tolist()))
    return [(mine, theirs) for theirs, mine in pairs] if swapped else pairs


def turned_map(pairs: list[tuple[int, int]], components: int, teacher_components: int) -> Tensor:
    """[e, d]: takes a teacher's query or key before rotary positions to a student's; not scaled."""
    map_ed = torch.zeros(components, teacher_components, dtype=torch.float64)
    for mine, theirs in pairs:
        map_ed[mine, theirs] = 1
        map_ed[mine + components // 2, theirs + teacher_components // 2] = 1
    return map_ed


def value_map(values_Nd: Tensor, components: int, copy: int) -> Tensor:
    """[e, d]: takes a teacher's values to a student's."""
    # further groups of the same as wide values would have none left
    return map_values(values_Nd.double().cpu(), components, copy if components < values_Nd.shape[1] else 0)


def side_by_side(maps: list[tuple[int, Tensor]], teacher_heads: int) -> Tensor:
    """[heads e, H d]: the map of all heads as one; each comes with the number of the teacher's head behind it."""
    components, size = maps[0][1].shape
    whole = torch.zeros(len(maps) * components, teacher_heads * size, dtype=torch.float64)
    for place, (head, map_ed) in enumerate(maps):
        whole[place * components : (place + 1) * components, head * size : (head + 1) * size] = map_ed
    return whole
