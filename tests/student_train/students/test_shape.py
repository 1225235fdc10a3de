"""Shapes, and the configurations of every family derived from them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from transformers import AutoConfig

from student_train.student_shape import StudentShape, read_shape
from student_train.students.shape import default_spec, derive_config, shape_of, student_shape
from teacher_cache.errors import SettingsError, StudentError

FAMILIES = ["bert", "roberta", "xlm-roberta", "distilbert", "modernbert", "electra"]


def shape(layers: int, hidden_size: int, heads: int, intermediate_size: int) -> StudentShape:
    return StudentShape(layers=layers, hidden_size=hidden_size, heads=heads, intermediate_size=intermediate_size)


def test_default_students() -> None:
    def default(*sizes: int) -> str:
        teacher = shape(*sizes, 4096)
        return str(read_shape(default_spec(teacher)).completed(teacher_heads=teacher.heads))

    assert default(24, 1024, 16) == "6x768:16:3072"
    assert default(12, 768, 12) == "6x768:12:3072"
    assert default(6, 384, 12) == "3x384:12:1536"
    assert default(24, 1024, 10) == "6x768:12:3072"  # 10 does not divide 768


@pytest.mark.parametrize("family", FAMILIES)
def test_derived_configurations_have_the_shape_and_keep_the_rest(family: str, tiny_teacher: Any) -> None:
    teacher = AutoConfig.from_pretrained(tiny_teacher(family))
    assert shape_of(teacher) == shape(4, 32, 4, 64)
    wanted = shape(2, 24, 3, 40)
    student = derive_config(teacher, wanted, (2, 4))
    assert shape_of(student) == wanted
    assert type(student) is type(teacher)
    changed = {
        name
        for name in teacher.to_dict().keys() | student.to_dict().keys()
        if teacher.to_dict().get(name) != student.to_dict().get(name)
    }
    sizes = {"hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size"}
    assert {teacher.attribute_map.get(name, name) for name in sizes} - {"intermediate_size"} <= changed
    allowed = {"dim", "n_layers", "n_heads", "hidden_dim", "layer_types", "architectures", "dtype", "_name_or_path"}
    assert changed <= sizes | allowed


def test_settings_kept_per_layer_follow_the_chosen_layers(tiny_teacher: Any) -> None:
    teacher = AutoConfig.from_pretrained(tiny_teacher("modernbert"))
    assert teacher.layer_types == ["full_attention", "sliding_attention", "sliding_attention", "full_attention"]
    assert derive_config(teacher, shape(2, 32, 4, 64), (2, 4)).layer_types == ["sliding_attention", "full_attention"]
    assert len(teacher.layer_types) == 4


def test_the_default_student_keeps_the_teachers_proportions(tiny_teacher: Any) -> None:
    teacher = AutoConfig.from_pretrained(tiny_teacher("modernbert"))
    assert student_shape(None, teacher) == shape(2, 32, 4, 64)
    assert student_shape(read_shape("1x16"), teacher) == shape(1, 16, 4, 32)


def test_a_deeper_student_is_refused(tiny_teacher: Any) -> None:
    with pytest.raises(SettingsError, match="'5x32' has 5 layers, the teacher 4"):
        student_shape(read_shape("5x32"), AutoConfig.from_pretrained(tiny_teacher()))


def test_a_family_without_a_known_feed_forward_width_is_named(tmp_path: Path) -> None:
    from transformers import GPT2Config

    with pytest.raises(StudentError, match="'gpt2'"):
        shape_of(GPT2Config(n_layer=2, n_embd=32, n_head=4))
