"""First weights: which parameters of the teacher end up where, family by family, and what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AlbertConfig, AlbertModel, AutoModelForMaskedLM, PreTrainedModel

from student_train.students.initialise import find_layers
from student_train.students.narrowing.sample import TokenSample
from student_train.students.student import BuiltStudent, build_student, plan_student
from teacher_cache.errors import SettingsError, StudentError
from teacher_cache.models.families import encoder_of
from tests.causal_models import make_model, save_teacher

FAMILIES = ["bert", "roberta", "xlm-roberta", "distilbert", "modernbert", "electra"]
IDS = torch.tensor([[2, 17, 40, 99, 150, 33, 3], [2, 60, 61, 62, 63, 64, 3]])


def build(
    spec: str, teacher: Path, init: str = "auto", *, head: bool = True, rows: bool = False, seed: int = 0
) -> BuiltStudent:
    return build_student(
        plan_student(spec, teacher_folder=teacher, init=init, with_mlm_head=head, seq_len=32),
        seed=seed,
        read_sample=sample if rows else None,
    )


def sample() -> TokenSample:
    ids_BT = torch.randint(5, 200, (40, 20), generator=torch.Generator().manual_seed(0))
    return TokenSample(input_ids_BT=ids_BT, real_BT=torch.ones_like(ids_BT, dtype=torch.bool))


def layer_weights(model: PreTrainedModel, layer: int) -> dict[str, Tensor]:
    return dict(find_layers(encoder_of(model))[1][layer - 1].named_parameters())


def around_weights(model: PreTrainedModel) -> dict[str, Tensor]:
    name, _ = find_layers(encoder_of(model))
    return {key: value for key, value in encoder_of(model).named_parameters() if not key.startswith(name)}


def equal(first: dict[str, Tensor], second: dict[str, Tensor]) -> bool:
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


@torch.no_grad()
def logits(model: PreTrainedModel) -> Tensor:
    return model.eval()(input_ids=IDS).logits


@pytest.mark.parametrize("family", FAMILIES)
def test_a_student_of_all_teacher_layers_computes_what_the_teacher_computes(family: str, tiny_teacher: Any) -> None:
    teacher = AutoModelForMaskedLM.from_pretrained(tiny_teacher(family))
    student = build("4x32", tiny_teacher(family)).model
    assert torch.equal(logits(student), logits(teacher))
    assert not torch.equal(logits(build("4x32", tiny_teacher(family), "random").model), logits(teacher))


@pytest.mark.parametrize(
    ("family", "init", "layers"),
    [
        *((family, "teacher:4,1", (4, 1)) for family in FAMILIES),
        ("bert", "auto", (2, 4)), ("modernbert", "auto", (2, 4)), ("bert", "teacher:1,3", (1, 3)),
    ],
)  # fmt: skip
def test_layers_go_where_the_plan_says(family: str, init: str, layers: tuple[int, ...], tiny_teacher: Any) -> None:
    teacher = AutoModelForMaskedLM.from_pretrained(tiny_teacher(family))
    built = build("2x32", tiny_teacher(family), init)
    for number, layer in enumerate(layers, start=1):
        ours, theirs = layer_weights(built.model, number), layer_weights(teacher, layer)
        # ModernBERT's first layer has no attention norm: it stays behind, or starts at 1
        shared = ours.keys() & theirs.keys()
        assert ours.keys() ^ theirs.keys() <= {"attn_norm.weight"}
        assert equal({name: ours[name] for name in shared}, {name: theirs[name] for name in shared})
    assert equal(around_weights(built.model), around_weights(teacher))
    numbers = tuple(f"layer {number} from teacher layer {layer}" for number, layer in enumerate(layers, start=1))
    assert built.copied == ("embeddings", *numbers, "masked-LM head")
    copied = f"embeddings, masked-LM head, layers {layers[0]}, {layers[1]} copied from the teacher"
    assert built.description == f"{family} 2x32:4:64: {copied}"


@pytest.mark.parametrize("family", FAMILIES)
def test_embeddings_alone(family: str, tiny_teacher: Any) -> None:
    teacher = AutoModelForMaskedLM.from_pretrained(tiny_teacher(family))
    built = build("2x32", tiny_teacher(family), "embeddings")
    random = build("2x32", tiny_teacher(family), "random").model
    assert equal(around_weights(built.model), around_weights(teacher))
    assert equal(layer_weights(built.model, 1), layer_weights(random, 1))
    assert built.copied == ("embeddings",)


@pytest.mark.parametrize("family", FAMILIES)
def test_equal_sizes_are_copied_bit_for_bit_whatever_rows_there_are(family: str, tiny_teacher: Any) -> None:
    copied, again = (build("2x32", tiny_teacher(family), rows=rows) for rows in (False, True))
    assert equal(dict(copied.model.named_parameters()), dict(again.model.named_parameters()))
    assert copied.description == again.description and "copied from the teacher" in copied.description


@pytest.mark.parametrize(
    ("family", "init", "layers"),
    [
        *((family, "auto", (2, 4)) for family in FAMILIES if family != "modernbert"),
        ("bert", "teacher:last", (3, 4)), ("electra", "teacher:4,1", (4, 1)),
    ],
)  # fmt: skip
def test_another_width_is_sliced_and_says_so(
    family: str, init: str, layers: tuple[int, ...], tiny_teacher: Any
) -> None:
    built = build("2x24:3:48", tiny_teacher(family), init, rows=True)
    numbers = tuple(f"layer {number} from teacher layer {layer}, sliced" for number, layer in enumerate(layers, 1))
    assert built.copied == ("embeddings, sliced", *numbers, "masked-LM head, sliced")
    named = f"embeddings, masked-LM head, layers {layers[0]}, {layers[1]} sliced from the teacher: "
    prefix, _, kept = built.description.partition("fitted on 800 tokens, 24 components with ")
    assert prefix == f"{family} 2x24:3:48: {named}"
    assert kept.endswith("% of the variance of its hidden states, 3 of 4 heads, 48 of 64 feed-forward units")
    random = build("2x24:3:48", tiny_teacher(family), "random").model
    ours, noise = (dict(model.named_parameters()) for model in (built.model, random))
    same = {name for name in ours if torch.equal(ours[name], noise[name])}
    assert not same and all(torch.isfinite(value).all() for value in ours.values())
    assert built.model.get_output_embeddings().weight is built.model.get_input_embeddings().weight
    assert built.model.training == random.training


def test_sliced_weights_are_a_function_of_the_rows_alone(tiny_teacher: Any) -> None:
    first, again, other = (build("2x24:3", tiny_teacher(), rows=True, seed=seed).model for seed in (0, 0, 1))
    assert equal(dict(first.named_parameters()), dict(again.named_parameters()))
    assert equal(dict(first.named_parameters()), dict(other.named_parameters()))


def test_a_sliced_student_of_a_teacher_without_head(tiny_teacher: Any) -> None:
    built = build("2x24:3", tiny_teacher(head=False), rows=True)
    random = build("2x24:3", tiny_teacher(head=False), "random").model
    assert torch.equal(built.model.cls.predictions.bias, random.cls.predictions.bias)
    assert "masked-LM head" not in built.description and built.copied[0] == "embeddings, sliced"
    base = build("2x24:3", tiny_teacher(), head=False, rows=True)
    assert encoder_of(base.model) is base.model and "masked-LM head" not in base.description


def test_what_cannot_be_sliced_says_why(tiny_teacher: Any) -> None:
    modern = tiny_teacher("modernbert")
    built = build("2x24:3:48", modern, rows=True)
    assert built.copied == () and built.description.endswith("and layers of family 'modernbert' cannot be sliced")
    with pytest.raises(SettingsError, match="layers of family 'modernbert' cannot be sliced"):
        build("2x24:3:48", modern, "teacher:1,2", rows=True)
    wider = build("2x48:4", tiny_teacher(), rows=True)
    assert wider.copied == () and wider.description.endswith(
        "a wider student than the teacher cannot be sliced from it"
    )
    # here the student's embeddings would enter its layers as they are
    electra = build("2x16:4", tiny_teacher("electra"), rows=True)
    assert "the teacher's have a width of their own" in electra.description and "layer" not in str(electra.copied)


def test_another_width_without_rows_starts_at_random_and_says_why(tiny_teacher: Any) -> None:
    built = build("2x16", tiny_teacher())
    random = build("2x16", tiny_teacher(), "random").model
    assert equal(dict(built.model.named_parameters()), dict(random.named_parameters()))
    assert built.copied == ()
    assert "random weights" in built.description and "width 16 (teacher: 32)" in built.description


def test_factorised_embeddings_fit_students_of_any_width(tiny_teacher: Any) -> None:
    teacher = AutoModelForMaskedLM.from_pretrained(tiny_teacher("electra"))
    built = build("2x24:4", tiny_teacher("electra"))
    assert built.copied == ("embeddings",)
    ours, theirs = (model.get_input_embeddings().weight for model in (built.model, teacher))
    assert torch.equal(ours, theirs) and "width 24 (teacher: 32)" in built.description


def test_other_heads_of_the_same_width_keep_the_layers_random(tiny_teacher: Any) -> None:
    built = build("2x32:8", tiny_teacher())
    random = build("2x32:8", tiny_teacher(), "random").model
    assert equal(layer_weights(built.model, 1), layer_weights(random, 1))
    assert built.copied == ("embeddings", "masked-LM head")
    assert "layers do not fit: heads 8 (teacher: 4), and there are no rows" in built.description


def test_a_teacher_without_head_leaves_the_head_random(tiny_teacher: Any) -> None:
    built = build("2x32", tiny_teacher(head=False))
    random = build("2x32", tiny_teacher(head=False), "random").model
    ours, theirs = (model.cls.predictions.transform.dense.weight for model in (built.model, random))
    assert torch.equal(ours, theirs)
    assert built.copied[0] == "embeddings" and "masked-LM head" not in built.copied


def test_a_student_without_head_takes_the_rest(tiny_teacher: Any) -> None:
    teacher = AutoModelForMaskedLM.from_pretrained(tiny_teacher())
    built = build("2x32", tiny_teacher(), head=False)
    assert equal(around_weights(built.model), around_weights(teacher))
    assert built.copied[0] == "embeddings" and "masked-LM head" not in built.copied


def test_the_copy_is_a_copy(tiny_teacher: Any) -> None:
    before = (tiny_teacher() / "model.safetensors").read_bytes()
    built = build("2x32", tiny_teacher())
    with torch.no_grad():
        for parameter in built.model.parameters():
            parameter.zero_()
    assert (tiny_teacher() / "model.safetensors").read_bytes() == before
    assert float(logits(build("2x32", tiny_teacher()).model).abs().max()) > 0


def test_weights_from_another_student(tiny_teacher: Any, tmp_path: Path) -> None:
    first = build("2x16", tiny_teacher(), "random").model
    with torch.no_grad():
        first.get_input_embeddings().weight.mul_(3)
    first.save_pretrained(tmp_path)
    built = build("2x16", tiny_teacher(), str(tmp_path))
    assert equal(dict(built.model.named_parameters()), dict(first.named_parameters()))
    with pytest.raises(StudentError, match=r"bert 2x16:4:32\) has other parameters than the student \(bert 3x16:4:32"):
        build("3x16", tiny_teacher(), str(tmp_path))
    with pytest.raises(StudentError, match="210 vocabulary entries"):
        build("2x16", tiny_teacher(), str(tiny_teacher(vocab_size=210)))


def test_plans_that_do_not_fit_are_refused(tiny_teacher: Any) -> None:
    with pytest.raises(SettingsError, match="names layer 5, the teacher has layers 1 to 4"):
        build("2x32", tiny_teacher(), "teacher:1,5")
    with pytest.raises(SettingsError, match="names 3 teacher layers for a student of 2"):
        build("2x32", tiny_teacher(), "teacher:1,2,3")
    with pytest.raises(SettingsError, match=r"width 16 \(teacher: 32\).*the teacher's layers do not fit"):
        build("2x16", tiny_teacher(), "teacher:1,2")
    with pytest.raises(SettingsError, match=r"width 16 \(teacher: 32\).*the teacher's embeddings do not fit"):
        build("2x16", tiny_teacher(), "embeddings", rows=True)


def test_families_that_share_one_layer_are_named() -> None:
    config = AlbertConfig(
        hidden_size=32, num_hidden_layers=3, num_attention_heads=4, intermediate_size=64, vocab_size=50
    )
    with pytest.raises(StudentError, match="family 'albert' keeps no list of 3 layers"):
        find_layers(AlbertModel(config))


# ---- decoders -------------------------------------------------------------------------------------------------------


def build_decoder(spec: str, teacher: Path, init: str = "auto") -> BuiltStudent:
    return build_student(plan_student(spec, teacher_folder=teacher, init=init, with_mlm_head=True, seq_len=24), seed=0)


@pytest.mark.parametrize("init, layers", [("auto", (2, 4)), ("teacher:last", (3, 4)), ("teacher:1,4", (1, 4))])
@pytest.mark.parametrize("family, tied", [("llama", False), ("llama", True), ("gpt2", True), ("gemma2", True)])
def test_decoders_take_over_embeddings_head_and_layers(
    family: str, tied: bool, init: str, layers: tuple[int, ...], tmp_path: Path
) -> None:
    folder = save_teacher(tmp_path / "teacher", family, tie_word_embeddings=tied)
    teacher = make_model(family, tie_word_embeddings=tied)
    built = build_decoder("2x32", folder, init)
    named = f"embeddings, language-modelling head, layers {layers[0]}, {layers[1]} copied from the teacher"
    assert built.description.endswith(f": {named}") and built.whole_layers
    assert built.copied[0] == "embeddings" and built.copied[-1] == "language-modelling head"
    ours, theirs = built.model.get_output_embeddings(), teacher.get_output_embeddings()
    assert torch.equal(ours.weight, theirs.weight)
    assert (ours.weight is built.model.get_input_embeddings().weight) == tied
    (prefix, targets), (_, sources) = find_layers(encoder_of(built.model)), find_layers(encoder_of(teacher))
    for target, layer in zip(targets, layers, strict=True):
        copies, originals = target.state_dict(), sources[layer - 1].state_dict()
        assert all(torch.equal(value, originals[name]) for name, value in copies.items())
    around = {name: value for name, value in encoder_of(teacher).state_dict().items() if not name.startswith(prefix)}
    found = encoder_of(built.model).state_dict()
    assert around and all(torch.equal(found[name], value) for name, value in around.items())


def test_a_tied_head_of_another_width_is_not_said_to_be_copied(tmp_path: Path) -> None:
    for tied in (True, False):
        folder = save_teacher(tmp_path / str(tied), tie_word_embeddings=tied)
        built = build_decoder("2x24:2", folder)
        assert built.copied == ()
        assert "random weights; embeddings and layers do not fit: width 24 (teacher: 32)" in built.description
        assert built.description.endswith("are turned by other rotary frequencies (3 or 6 heads would do)")
        with pytest.raises(SettingsError, match="width 24 .teacher: 32.*the teacher's embeddings do not fit"):
            build_decoder("2x24:2", folder, "embeddings")


def test_layers_with_other_key_heads_are_not_copied(tmp_path: Path) -> None:
    folder = save_teacher(tmp_path / "teacher")
    built = build_decoder("2x32:4:64:1", folder)
    assert built.copied == ("embeddings", "language-modelling head") and not built.whole_layers
    assert "; layers do not fit: key/value heads 1 (teacher: 2), and there are no rows to" in built.description
    with pytest.raises(SettingsError, match="key/value heads 1 .teacher: 2.*the teacher's layers do not fit it"):
        build_decoder("2x32:4:64:1", folder, "teacher:2,4")


def build_on_rows(spec: str, folder: Path, init: str = "auto") -> BuiltStudent:
    ids_BT = torch.randint(1, 100, (30, 20), generator=torch.Generator().manual_seed(0))
    sample = TokenSample(input_ids_BT=ids_BT, real_BT=torch.ones_like(ids_BT, dtype=torch.bool))
    plan = plan_student(spec, teacher_folder=folder, init=init, with_mlm_head=True, seq_len=20)
    return build_student(plan, seed=0, read_sample=lambda: sample)


@pytest.mark.parametrize(
    ("family", "spec"),
    [
        *(("llama", spec) for spec in ("2x24:3:48:3", "2x16:2", "2x32:4:64:1", "2x32:4:40:2", "2x16:4")),
        *((family, spec) for family in ("mistral", "qwen2", "qwen3") for spec in ("2x24:3:48:3", "2x32:4:64:1")),
    ],
)
def test_a_decoder_of_other_sizes_is_sliced_and_says_so(family: str, spec: str, tmp_path: Path) -> None:
    built = build_on_rows(spec, save_teacher(tmp_path, family))
    assert "embeddings, language-modelling head, layers 2, 4 sliced from the teacher: fitted on" in built.description
    assert built.copied[1] == "layer 1 from teacher layer 2, sliced" and not built.whole_layers
    assert all(parameter.isfinite().all() for parameter in built.model.parameters())
    assert built.model(torch.arange(1, 20)[None]).logits.isfinite().all()


@pytest.mark.parametrize("family", ["gpt2", "gpt_neox", "gemma2"])
def test_a_decoder_of_another_make_is_refused_by_name(family: str, tmp_path: Path) -> None:
    folder = save_teacher(tmp_path, family)
    assert build_on_rows("2x32:4:40", folder).description.endswith(f"layers of family {family!r} cannot be sliced")
    with pytest.raises(SettingsError, match=f"layers of family {family!r} cannot be sliced.*give the student the"):
        build_on_rows("2x32:4:40", folder, "teacher:1,2")


def test_layers_of_another_make_are_not_copied_in_part(tmp_path: Path) -> None:
    """Qwen names by their number the layers without experts, and a student's second one is not its teacher's."""
    sizes = {
        "mlp_only_layers": [1],
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 16,
        "decoder_sparse_step": 1,
    }
    folder = save_teacher(tmp_path / "teacher", "qwen3_moe", **sizes)
    assert build_decoder("2x32", folder, "teacher:1,2").whole_layers
    built = build_decoder("2x32", folder)
    assert "embeddings" in built.copied and not built.whole_layers
    assert "layers do not fit: 'mlp." in built.description and "(teacher layer 2: " in built.description
    with pytest.raises(SettingsError, match="teacher layer 4: none.*do not fit it"):
        build_decoder("2x32", folder, "teacher:1,4")


def test_what_balances_experts_is_copied_with_its_layer(tmp_path: Path) -> None:
    sizes = {
        "n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "first_k_dense_replace": 0,
        "n_group": 1, "topk_group": 1, "num_key_value_heads": 4, "head_dim": 8, "n_shared_experts": 1,
    }  # fmt: skip
    teacher = make_model("glm4_moe", **sizes)
    biases = [buffer for name, buffer in teacher.named_buffers() if name.endswith("e_score_correction_bias")]
    for number, bias in enumerate(biases, start=1):
        bias.fill_(number)
    folder = save_teacher(tmp_path / "teacher", "glm4_moe", **sizes)
    teacher.save_pretrained(folder)
    for spec, expected in (("2x32", [2, 4]), (str(folder), [1, 2, 3, 4])):
        model = build_decoder(spec, folder).model
        found = [each for name, each in model.named_buffers() if name.endswith("e_score_correction_bias")]
        assert [int(each[0]) for each in found] == expected
