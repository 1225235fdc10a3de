"""Which student layers learn the attention of which teacher layers, from flags and a manifest alone."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest

from student_train.methods.attention_pairs import (
    attention_pairs,
    cached_layer,
    describe_pairs,
    needs_of,
    request_of,
    spec_of,
    views_of_pairs,
)
from student_train.methods.base import StudentNeeds
from teacher_cache.contract.batch import TargetRequest
from teacher_cache.contract.manifest import Manifest
from teacher_cache.contract.targets import TargetSpecs
from teacher_cache.errors import SettingsError

TWO_LAYERS: Any = SimpleNamespace(num_hidden_layers=2)


@pytest.fixture
def manifest(tiny_teacher: Any, live_cache: Any) -> Manifest:
    """A teacher of 4 layers; attention 2 was computed in the plain view, attention 4 in the masked one."""
    held: Manifest = live_cache(tiny_teacher(), attention=(2, 4)).manifest
    first, second = held.targets.attention
    return replace(held, targets=TargetSpecs(attention=(first, replace(second, view="masked"))))


@pytest.mark.parametrize(
    "asked, pairs",
    [
        ("3", ((2, 3),)),  # of the student's last layer
        ("1:2,2:4", ((1, 2), (2, 4))),
        (" 2:4 , 1:2, 2:4 ", ((1, 2), (2, 4))),
        ("2:1", ((2, 1),)),
    ],
)
def test_what_is_asked_for(manifest: Manifest, asked: str, pairs: tuple[tuple[int, int], ...]) -> None:
    assert attention_pairs(manifest, TWO_LAYERS, asked) == pairs


@pytest.mark.parametrize("asked", ["", "x", "1:", ":2", "1:2:3", "0:1", "3:1", "5", "1:5", "0", "-1", "1;2"])
def test_what_cannot_be_read_or_is_no_layer(manifest: Manifest, asked: str) -> None:
    with pytest.raises(SettingsError, match=f"--attention-layer '{asked}'"):
        attention_pairs(manifest, TWO_LAYERS, asked)


@pytest.mark.parametrize("held, chosen", [((2, 3, 4), 3), ((3,), 3), ((2,), 2), ((1, 2), 2), ((), 3)])
def test_by_default_the_last_but_one_or_what_there_is(manifest: Manifest, held: tuple[int, ...], chosen: int) -> None:
    first = manifest.targets.attention[0]
    targets = TargetSpecs(attention=tuple(replace(first, layer=layer) for layer in held))
    there = replace(manifest, targets=targets)
    assert cached_layer(there) == chosen
    assert attention_pairs(there, TWO_LAYERS, None) == ((2, chosen),)


def test_what_pairs_read_of_cache_and_student(manifest: Manifest) -> None:
    pairs = ((1, 2), (2, 2), (2, 4))
    views = views_of_pairs(manifest, pairs)
    assert views == {2: "plain", 4: "masked"} and spec_of(manifest, 4).view == "masked"
    assert request_of(pairs) == TargetRequest(attention_layers=(2, 4))
    assert needs_of(pairs, views, "plain") == StudentNeeds(attention_layers=frozenset({1, 2}))
    assert needs_of(pairs, views, "masked") == StudentNeeds(attention_layers=frozenset({2}))
    assert describe_pairs(pairs, (1.0, 0.5, 0.0), views) == {
        "pairs": [[1, 2], [2, 2], [2, 4]],
        "weights": [1.0, 0.5, 0.0],
        "view": "masked+plain",
    }
