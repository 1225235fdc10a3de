"""Entities of tags, worked out by hand; what a scheme cannot read is refused."""

from __future__ import annotations

import pytest

from student_train.evaluate.finetune.tag_schemes import PREFIXES, check_tags, find_scheme, score_entities
from teacher_cache.errors import TaskError


def tags_of(letters: str) -> list[str]:
    return [letter if letter == "O" else f"{letter}-PER" for letter in letters]


@pytest.mark.parametrize(
    "scheme, labels, predictions, f1",
    [
        ("BILOU", "UOO", "UUO", 2 / 3),
        ("BILOU", "BILO", "BLUO", 0),
        ("BILOU", "BLOO", "BLBL", 2 / 3),
        ("BILOU", "BILOU", "BILOU", 1),
        ("IOBES", "SOO", "SSO", 2 / 3),
        ("IOBES", "BIEO", "BESO", 0),
        ("IOBES", "BEOO", "BEBE", 2 / 3),
        ("BMES", "BMEO", "BESO", 0),
        ("BMES", "BMMEOS", "BMMEOS", 1),
        # half an entity is none where both ends are marked
        ("BILOU", "BILO", "BIOO", 0),
        ("IOE", "IEEO", "IIEO", 0),
        ("IOE", "IEEO", "IEEO", 1),
        ("IOB", "IIBI", "BIBI", 1),
        ("IOB", "BIOB", "BIOO", 2 / 3),
    ],
)
def test_entities_count_as_a_whole(scheme: str, labels: str, predictions: str, f1: float) -> None:
    found = score_entities([tags_of(predictions)], [tags_of(labels)], scheme)
    assert found["f1"] == pytest.approx(f1)


@pytest.mark.parametrize("scheme", PREFIXES)
def test_the_letters_tell_the_scheme(scheme: str) -> None:
    tags = [*(f"{letter}-PER" for letter in PREFIXES[scheme]), "O"]
    assert find_scheme(tags, "'x'") == scheme


def test_letters_of_no_scheme_are_refused() -> None:
    with pytest.raises(TaskError, match=r"the tags of 'x' begin with 'E', 'U', which no scheme .*BILOU: B, I, L, U"):
        find_scheme(["E-PER", "U-LOC", "O"], "'x'")


@pytest.mark.parametrize("tags", ["B-PER O", "O L-PER", "B-PER", "I-PER L-PER", "B-PER L-LOC", "B-PER U-PER"])
def test_entities_that_are_cut_in_the_labels_are_refused(tags: str) -> None:
    with pytest.raises(TaskError, match=r"'x' holds 'a b', tagged .* cannot follow .* in BILOU"):
        check_tags(["a", "b"], tags.split(), "BILOU", "x")


def test_labels_that_are_whole_pass() -> None:
    check_tags(["a"] * 6, tags_of("BILOUU"), "BILOU", "x")
    check_tags(["a"] * 6, tags_of("IOIIBO"), "IOB", "x")
