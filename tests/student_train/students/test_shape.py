"""Shapes, and the configurations of every family derived from them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, PreTrainedConfig

from student_train.student_shape import StudentShape, read_shape
from student_train.students.narrowing.slicing import find_obstacle
from student_train.students.shape import default_spec, derive_config, head_width, shape_of, student_shape
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
    "family, sizes, asked, width, key_heads",
    [
        ("nomic_bert", {}, "2x24:4:48", 6, None),
        ("nomic_bert", {}, "2x48:4:96", 12, None),
        ("eurobert", {"num_key_value_heads": 4}, "2x24:2:48", 12, 2),
        # two heads share a key head, in the student too, where that can be
        ("eurobert", {"num_key_value_heads": 2}, "2x24:2:48", 12, 1),
        ("eurobert", {"num_key_value_heads": 2}, "2x24:3:48", 8, 3),
        ("eurobert", {"num_key_value_heads": 2}, "2x48:4:96", 12, 2),
        ("eurobert", {"num_key_value_heads": 1}, "2x24:3:48", 8, 1),
        ("eurobert", {"num_key_value_heads": 4}, "2x24:4:48:2", 6, 2),
        ("eurobert", {"num_key_value_heads": 2}, "2x24:2:48:2", 12, 2),
        # heads that are wider than their share of the width stay so in a student of the teacher's sizes
        ("eurobert", {"num_key_value_heads": 4, "head_dim": 16}, "2x48:4:96", 16, 4),
    ],
)
def test_widths_of_heads_follow_the_shape(
    family: str, sizes: dict[str, int], asked: str, width: int, key_heads: int | None
) -> None:
    config = {"num_hidden_layers": 4, "hidden_size": 48, "num_attention_heads": 4, "head_dim": 12}
    config |= {"vocab_size": 200, "pad_token_id": 0, "bos_token_id": 2, "eos_token_id": 3}
    teacher = AutoConfig.for_model(family, **(config | sizes))
    wanted = student_shape(read_shape(asked), teacher)
    student = derive_config(teacher, wanted, (2, 4))
    assert (student.head_dim, getattr(student, "num_key_value_heads", None)) == (width, key_heads)
    assert shape_of(student) == wanted and head_width(student) == width
    model = AutoModel.from_config(student)
    query = next(module for name, module in model.named_modules() if name.endswith(("q_proj", "qkv_proj", "Wqkv")))
    assert query.weight.shape[0] % (wanted.heads * width) == 0


def test_the_default_student_keeps_the_teachers_proportions(tiny_teacher: Any) -> None:
    teacher = AutoConfig.from_pretrained(tiny_teacher("modernbert"))
    assert student_shape(None, teacher) == shape(2, 32, 4, 64)
    assert student_shape(read_shape("1x16"), teacher) == shape(1, 16, 4, 32)


@pytest.mark.parametrize(
    ("family", "sizes", "found"),
    [
        # Llama 3.2 1B, TinyLlama, Qwen3 0.6B, Qwen2.5 0.5B and Mistral 7B
        ("llama", (2048, 16, 32, 8, 8192, None), "6x768:12:3072:3"),
        ("llama", (2048, 22, 32, 4, 5632, None), "6x768:12:2112:3"),
        ("qwen3", (1024, 28, 16, 8, 3072, 128), "6x768:6:2304:3"),
        ("qwen2", (896, 24, 14, 2, 4864, None), "6x768:12:4169"),
        ("mistral", (4096, 32, 32, 8, 14336, None), "6x768:6:2688:3"),
    ],
)
def test_the_default_student_of_a_decoder_can_be_sliced_from_it(
    family: str, sizes: tuple[int | None, ...], found: str
) -> None:
    """Its heads are as wide as the teacher's, whose positions turn them."""
    names = ("hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "intermediate_size")
    given = dict(zip((*names, "head_dim"), sizes, strict=True))
    teacher = AutoConfig.for_model(family, vocab_size=100, **{name: size for name, size in given.items() if size})
    wanted = student_shape(None, teacher)
    assert str(wanted) == found
    with torch.device("meta"):
        student = AutoModelForCausalLM.from_config(derive_config(teacher, wanted, (1, 4, 7, 10, 13, 16)))
        assert find_obstacle(student, AutoModelForCausalLM.from_config(teacher)) is None


def test_a_deeper_student_is_refused(tiny_teacher: Any) -> None:
    with pytest.raises(SettingsError, match="'5x32' has 5 layers, the teacher 4"):
        student_shape(read_shape("5x32"), AutoConfig.from_pretrained(tiny_teacher()))


def test_families_whose_feed_forward_width_cannot_be_set_are_named() -> None:
    with pytest.raises(StudentError, match="'bloom' names its feed-forward width in none of the known ways"):
        shape_of(AutoConfig.for_model("bloom", n_layer=2, hidden_size=32, n_head=4))
    with pytest.raises(StudentError, match="'gemma3n_text' has a feed-forward width for each layer"):
        shape_of(AutoConfig.for_model("gemma3n_text"))


def decoder(family: str, **sizes: Any) -> PreTrainedConfig:
    settings = {"num_hidden_layers": 4, "hidden_size": 48, "num_attention_heads": 4, "vocab_size": 50}
    ids = {"bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0}
    return AutoConfig.for_model(family, **(settings | ids | sizes))


def test_a_feed_forward_width_that_is_left_open_is_four_times_the_hidden_one() -> None:
    assert shape_of(decoder("gpt2")) == shape(4, 48, 4, 192)
    assert derive_config(decoder("gpt2"), shape(2, 24, 2, 50), (2, 4)).n_inner == 50


@pytest.mark.parametrize(
    ("teacher", "asked", "found", "settings"),
    [
        # the first Falcon has one key head or as many as heads, the later ones any number
        (decoder("falcon"), "2x48", "2x48:4:192:1", {"multi_query": True}),
        (decoder("falcon"), "2x24:3:96:3", "2x24:3:96", {"multi_query": False, "num_kv_heads": 3}),
        (
            decoder("falcon", new_decoder_architecture=True, num_kv_heads=2), "2x48:8", "2x48:8:192:4",
            {"num_kv_heads": 4},
        ),
        (decoder("gpt_bigcode"), "2x48:6", "2x48:6:192:1", {"multi_query": True, "num_key_value_heads": 1}),
        (decoder("gpt_bigcode"), "2x48:6:192:6", "2x48:6:192", {"multi_query": False, "num_key_value_heads": 6}),
        # attention is scaled by the width of a head, if it was, or stays as it is
        (
            decoder("gemma2", head_dim=12, num_key_value_heads=2, query_pre_attn_scalar=12, intermediate_size=96),
            "2x48:8", "2x48:8:96:4", {"head_dim": 6, "query_pre_attn_scalar": 6},
        ),
        (
            decoder("gemma2", head_dim=16, num_key_value_heads=2, query_pre_attn_scalar=99, intermediate_size=96),
            "2x48:8", "2x48:8:96:4", {"head_dim": 6, "query_pre_attn_scalar": 99},
        ),
        (decoder("qwen3", head_dim=32, num_key_value_heads=2, intermediate_size=96), "2x48", "2x48:4:96:2",
         {"head_dim": 32}),
        (decoder("opt", word_embed_proj_dim=48, ffn_dim=96), "2x24", "2x24:4:48", {"word_embed_proj_dim": 24}),
        (decoder("opt", word_embed_proj_dim=16, ffn_dim=96), "2x24", "2x24:4:48", {"word_embed_proj_dim": 16}),
    ],
)  # fmt: skip
def test_what_families_call_their_key_heads(
    teacher: PreTrainedConfig, asked: str, found: str, settings: dict[str, Any]
) -> None:
    wanted = student_shape(read_shape(asked), teacher)
    student = derive_config(teacher, wanted, (2, 4))
    assert str(wanted) == found == str(shape_of(student))
    assert {name: getattr(student, name) for name in settings} == settings


def test_key_heads_that_a_family_cannot_have_are_refused() -> None:
    with pytest.raises(SettingsError, match="student 2x48:4:96:2: in family 'gpt_neox' every head has keys .* out$"):
        student_shape(read_shape("2x48:4:96:2"), decoder("gpt_neox"))
    with pytest.raises(SettingsError, match="in family 'falcon' all heads share one .* ask for 1 or 4 key/value heads"):
        student_shape(read_shape("2x48:4:96:2"), decoder("falcon"))
