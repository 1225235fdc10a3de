"""Layer mappings against tables worked out by hand from the published formulas."""

from __future__ import annotations

import math
from fractions import Fraction

import pytest

from student_train.attention_layers import read_attention_layers
from student_train.layer_map import MAPPINGS, parse_mapping, read_mapping
from teacher_cache.errors import SettingsError

# (teacher layers, student layers) -> mapping -> teacher layers of student layer 1 | 2 | ..., "-" for none
TABLES = {
    (24, 12): {
        "last1": "-|-|-|-|-|-|-|-|-|-|-|24",
        "last": "13|14|15|16|17|18|19|20|21|22|23|24",
        "uniform": "2|4|6|8|10|12|14|16|18|20|22|24",
        "uniform-cons": "1,2|3,4|5,6|7,8|9,10|11,12|13,14|15,16|17,18|19,20|21,22|23,24",
        "uniform+last": "2,13|4,14|6,15|8,16|10,17|12,18|14,19|16,20|18,21|20,22|22,23|24",
        "skip": "2|4|6|8|10|12|14|16|18|20|22|-",
    },
    (24, 6): {
        "last1": "-|-|-|-|-|24",
        "last": "19|20|21|22|23|24",
        "uniform": "4|8|12|16|20|24",
        "uniform-cons": "1,2,3,4|5,6,7,8|9,10,11,12|13,14,15,16|17,18,19,20|21,22,23,24",
        "uniform+last": "4,19|8,20|12,21|16,22|20,23|24",
        "skip": "4|8|12|16|20|-",
    },
    # k = 1.5: i k + 1/2 = 2, 3.5, 5, 6.5, 8, 9.5, 11, 12.5; i k = 1.5, 3, 4.5, 6, 7.5, 9, 10.5, 12
    (12, 8): {
        "last1": "-|-|-|-|-|-|-|12",
        "last": "5|6|7|8|9|10|11|12",
        "uniform": "2|3|5|6|8|9|11|12",
        "uniform-cons": "1|2,3|4|5,6|7|8,9|10|11,12",
        "uniform+last": "2,5|3,6|5,7|6,8|8,9|9,10|11|12",
        "skip": "2|3|5|6|8|9|11|-",
    },
    # k = 2.4: i k + 1/2 = 2.9, 5.3, 7.7, 10.1, 12.5; i k = 2.4, 4.8, 7.2, 9.6, 12
    (12, 5): {
        "last1": "-|-|-|-|12",
        "last": "8|9|10|11|12",
        "uniform": "2|5|7|10|12",
        "uniform-cons": "1,2|3,4|5,6,7|8,9|10,11,12",
        "uniform+last": "2,8|5,9|7,10|10,11|12",
        "skip": "2|5|7|10|-",
    },
    (6, 3): {
        "last1": "-|-|6",
        "last": "4|5|6",
        "uniform": "2|4|6",
        "uniform-cons": "1,2|3,4|5,6",
        "uniform+last": "2,4|4,5|6",
        "skip": "2|4|-",
    },
}


def written_pairs(text: str) -> tuple[tuple[int, int], ...]:
    rows = enumerate(text.split("|"), start=1)
    return tuple((layer, int(taught)) for layer, row in rows if row != "-" for taught in row.split(","))


@pytest.mark.parametrize(
    ("depths", "name"), [(depths, name) for depths, table in TABLES.items() for name in table], ids=str
)
def test_tables_worked_out_by_hand(depths: tuple[int, int], name: str) -> None:
    mapping = parse_mapping(name, *depths)
    assert mapping.pairs == written_pairs(TABLES[depths][name])
    assert mapping.form == ("skip" if name == "skip" else "pairs")
    assert mapping.text == name


def test_every_named_mapping_is_in_the_tables_but_those_that_weigh_all() -> None:
    assert {*TABLES[6, 3], "emd", "alp"} == set(MAPPINGS)


@pytest.mark.parametrize("name", ["emd", "alp"])
def test_mappings_that_weigh_all_pairs_have_all(name: str) -> None:
    mapping = parse_mapping(name, 3, 2)
    assert mapping.pairs == ((1, 1), (1, 2), (1, 3), (2, 1), (2, 2), (2, 3))
    assert (mapping.form, mapping.weighs_all) == (name, True)
    assert mapping.student_layers == (1, 2) and mapping.teacher_layers == (1, 2, 3)


@pytest.mark.parametrize(
    ("text", "teacher_layers", "student_layers", "pairs"),
    [
        ("last + uniform", 6, 3, ((1, 2), (1, 4), (2, 4), (2, 5), (3, 6))),
        ("1:4,2:8,3:12", 12, 3, ((1, 4), (2, 8), (3, 12))),
        ("3:12,1:4,1:4", 12, 3, ((1, 4), (3, 12))),
        ("last1+1:1", 6, 3, ((1, 1), (3, 6))),
        ("uniform-cons+last1", 4, 3, ((1, 1), (2, 2), (3, 3), (3, 4))),
        # of a deeper student only layers that are named can learn
        ("last1", 2, 3, ((3, 2),)),
        ("1:1,3:2", 2, 3, ((1, 1), (3, 2))),
        ("emd", 1, 2, ((1, 1), (2, 1))),
    ],
)
def test_pairs(text: str, teacher_layers: int, student_layers: int, pairs: tuple[tuple[int, int], ...]) -> None:
    assert parse_mapping(text, teacher_layers, student_layers).pairs == pairs


def test_formulas_for_every_depth() -> None:
    for teacher_layers in range(1, 49):
        for student_layers in range(1, teacher_layers + 1):
            k = Fraction(teacher_layers, student_layers)
            student = range(1, student_layers + 1)
            uniform = parse_mapping("uniform", teacher_layers, student_layers).pairs
            assert uniform == tuple((i, math.floor(i * k + Fraction(1, 2))) for i in student)
            consecutive = parse_mapping("uniform-cons", teacher_layers, student_layers).pairs
            assert consecutive == tuple(
                (i, j) for i in student for j in range(math.floor((i - 1) * k) + 1, math.floor(i * k) + 1)
            )
            # every teacher layer once, no student layer without one
            assert [j for _, j in consecutive] == list(range(1, teacher_layers + 1))
            assert {i for i, _ in consecutive} == set(student)


@pytest.mark.parametrize("text", ["", "unifrom", "1:2,", "1-2", "1:", "a:b", "uniform+", "1:2:3", "-1:2"])
def test_unreadable_text_lists_the_names(text: str) -> None:
    with pytest.raises(SettingsError, match=r"last1, last, uniform, uniform-cons, uniform\+last, skip, emd") as caught:
        parse_mapping(text, 12, 6)
    assert repr(text) in str(caught.value)


@pytest.mark.parametrize(
    ("text", "close"), [("unifrom", "uniform"), ("uniform_cons+last", "uniform-cons"), ("edm", "emd"), ("LAST1", None)]
)
def test_a_name_that_is_close_is_offered(text: str, close: str | None) -> None:
    with pytest.raises(SettingsError) as caught:
        parse_mapping(text, 12, 6)
    assert (f"did you mean {close}" if close else ": give one of") in str(caught.value)


@pytest.mark.parametrize(
    ("text", "what"),
    [
        ("1:13", "layer 13 of the teacher, which has layers 1 to 12: .*; name layers that exist"),
        ("7:12", "layer 7 of the student.*choose a --student of 7 layers or more"),
        ("0:1", "layer 0 of the student.*match; name"),
    ],
)
def test_layers_that_do_not_exist_are_named(text: str, what: str) -> None:
    with pytest.raises(SettingsError, match=what):
        parse_mapping(text, 12, 6)


@pytest.mark.parametrize("text", ["uniform", "last", "uniform-cons", "uniform+last", "skip", "last1+last"])
def test_a_deeper_student_is_refused_where_each_layer_needs_one_of_its_own(text: str) -> None:
    with pytest.raises(SettingsError, match="at most 6 layers, or --mapping last1, emd, alp or pairs such as 7:6"):
        parse_mapping(text, 6, 7)


@pytest.mark.parametrize("text", ["skip+last", "uniform+emd", "alp+emd", "alp+1:2", "emd+emd"])
def test_what_has_a_loss_of_its_own_stands_alone(text: str) -> None:
    with pytest.raises(SettingsError, match="stands alone; give --mapping (skip|emd|alp), or a sum without it"):
        parse_mapping(text, 12, 6)


def test_a_student_of_one_layer_has_nothing_to_skip_to() -> None:
    with pytest.raises(SettingsError, match="only that one: .*--student of 2 layers or more, or --mapping last1"):
        parse_mapping("skip", 12, 1)


@pytest.mark.parametrize(
    ("text", "what"),
    [
        ("unifrom+lsat", "cannot be read at 'unifrom': did you mean uniform"),
        ("0:1", "layer 0 of the student: layers are numbered from 1"),
        ("uniform+1:0", "layer 0 of the teacher: layers are numbered from 1"),
        ("skip+last", "stands alone"),
    ],
)
def test_what_can_be_for_no_models_is_refused_as_text(text: str, what: str) -> None:
    with pytest.raises(SettingsError, match=what):
        read_mapping(text)


@pytest.mark.parametrize(
    ("text", "depth", "what"),
    [("1:4,3:2", 2, "layer 3 of the student, which has layers 1 to 2"), ("skip", 1, "has only that one")],
)
def test_what_the_student_alone_rules_out_needs_no_teacher(text: str, depth: int, what: str) -> None:
    plan = read_mapping(text)
    plan.check_student(depth + 1)
    with pytest.raises(SettingsError, match=what):
        plan.check_student(depth)


@pytest.mark.parametrize(
    ("text", "pairs"), [("5", ((3, 5),)), (" 2:4, 3:5", ((2, 4), (3, 5))), ("3:5,1:2,1:2", ((1, 2), (3, 5)))]
)
def test_attention_layers(text: str, pairs: tuple[tuple[int, int], ...]) -> None:
    assert read_attention_layers(text).for_depths(6, 3) == pairs


@pytest.mark.parametrize(
    ("text", "what"),
    [
        ("", "cannot be read at ''"),
        ("last", "cannot be read at 'last'"),
        ("5,2:4", "cannot be read at '5'"),
        ("0", "layer 0 of the teacher"),
        ("0:5", "layer 0 of the student"),
    ],
)
def test_attention_layers_that_can_be_of_no_models(text: str, what: str) -> None:
    with pytest.raises(SettingsError, match=f"--attention-layer {text!r} .*{what}"):
        read_attention_layers(text)
