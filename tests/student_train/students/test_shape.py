"""Shapes, and the configurations of every family derived from them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from transformers import AutoConfig, AutoModel, PreTrainedConfig

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


def test_attention_windows_follow_the_chosen_layers() -> None:
    teacher = AutoConfig.for_model("longformer", num_hidden_layers=4, attention_window=[8, 16, 32, 64])
    assert derive_config(teacher, shape(2, 32, 4, 64), (2, 4)).attention_window == [16, 64]


def settled_layers(config: PreTrainedConfig) -> set[int]:
    """Layers, counted from 0, that have settings of their own."""
    return {int(index) for index in config.to_dict().get("per_layer_config") or {}}


def test_settings_of_single_layers_follow_the_chosen_layers() -> None:
    teacher = AutoConfig.for_model(
        "neomme", num_hidden_layers=4, hidden_size=48, num_attention_heads=3, num_key_value_heads=3, head_dim=16
    )
    assert settled_layers(teacher) == {1, 3}
    for layers, settled in {(2, 4): {0, 1}, (1, 4): {1}}.items():
        assert settled_layers(derive_config(teacher, shape(2, 48, 3, 96), layers)) == settled


@pytest.mark.parametrize(
    "family, sizes, wanted, head_width, key_heads",
    [
        ("nomic_bert", {}, shape(2, 24, 4, 48), 6, None),
        ("nomic_bert", {}, shape(2, 48, 4, 96), 12, None),
        ("eurobert", {"num_key_value_heads": 4}, shape(2, 24, 2, 48), 12, 2),
        # two heads share a key head, in the student too, where that can be
        ("eurobert", {"num_key_value_heads": 2}, shape(2, 24, 2, 48), 12, 1),
        ("eurobert", {"num_key_value_heads": 2}, shape(2, 24, 3, 48), 8, 3),
        ("eurobert", {"num_key_value_heads": 2}, shape(2, 48, 4, 96), 12, 2),
        # heads that are wider than their share of the width stay so in a student of the teacher's sizes
        ("eurobert", {"num_key_value_heads": 4, "head_dim": 16}, shape(2, 48, 4, 96), 16, 4),
    ],
)
def test_widths_of_heads_follow_the_shape(
    family: str, sizes: dict[str, int], wanted: StudentShape, head_width: int, key_heads: int | None
) -> None:
    config = {"num_hidden_layers": 4, "hidden_size": 48, "num_attention_heads": 4, "head_dim": 12}
    config |= {"vocab_size": 200, "pad_token_id": 0, "bos_token_id": 2, "eos_token_id": 3}
    teacher = AutoConfig.for_model(family, **(config | sizes))
    student = derive_config(teacher, wanted, (2, 4))
    assert (student.head_dim, getattr(student, "num_key_value_heads", None)) == (head_width, key_heads)
    model = AutoModel.from_config(student)
    query = next(module for name, module in model.named_modules() if name.endswith(("q_proj", "qkv_proj", "Wqkv")))
    assert query.weight.shape[0] % (wanted.heads * head_width) == 0


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
