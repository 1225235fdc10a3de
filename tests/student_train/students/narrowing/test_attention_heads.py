"""Heads of fewer and of more components: what their scores lose, and nothing where nothing has to be lost."""

from __future__ import annotations

import torch

from student_train.students.narrowing.attention_heads import choose_heads, map_head


def vectors(count: int = 3, positions: int = 60, size: int = 8) -> list[torch.Tensor]:
    draw = torch.Generator().manual_seed(0)
    mix = 0.7 ** torch.arange(size)
    return [
        torch.randn(positions, size, generator=draw) * mix + torch.randn(size, generator=draw) for _ in range(count)
    ]


def test_the_heads_that_write_most_stay_in_their_order() -> None:
    assert choose_heads(torch.tensor([1.0, 5.0, 0.5, 3.0]), 2) == [(1, 0), (3, 0)]
    assert choose_heads(torch.ones(2), 2) == [(0, 0), (1, 0)]
    assert choose_heads(torch.ones(2), 5) == [(0, 0), (0, 1), (0, 2), (1, 0), (1, 1)]


def test_scores_of_fewer_components_are_the_best_there_are() -> None:
    query, key, value = (each.double() for each in vectors())
    maps = map_head(0, query, key, value, components=3, copy=0)
    # scores up to what is the same for all keys of a query
    exact = query @ (key - key.mean(0)).T / 8**0.5
    ours = (query @ maps.query_ed.T) @ ((key - key.mean(0)) @ maps.key_ed.T).T / 3**0.5
    lost = (exact - ours).square().sum()
    torch.testing.assert_close(lost, torch.linalg.svdvals(exact)[3:].square().sum())


def test_copies_of_a_head_share_its_values() -> None:
    query, key, value = vectors()
    copies = [map_head(0, query, key, value, components=4, copy=copy).value_ed for copy in (0, 1)]
    torch.testing.assert_close(torch.cat(copies) @ torch.cat(copies).T, torch.eye(8, dtype=torch.float64))
    varying = [(value.double() @ value_ed.T).var(0).sum() for value_ed in copies]
    assert varying[0] > varying[1]


def test_more_components_change_no_score() -> None:
    query, key, value = (each.double() for each in vectors())
    maps = map_head(0, query, key, value, components=12, copy=0)
    ours = (query @ maps.query_ed.T) @ (key @ maps.key_ed.T).T / 12**0.5
    torch.testing.assert_close(ours, query @ key.T / 8**0.5)
    torch.testing.assert_close(value @ maps.value_ed.T, torch.cat([value, torch.zeros(60, 4)], 1))
