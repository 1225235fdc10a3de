"""Students by shape and from folders: what is built, what is refused."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForMaskedLM, GPT2Config, GPT2LMHeadModel

from student_train.students.shape import shape_of
from student_train.students.student import BuiltStudent, build_student, plan_student
from teacher_cache.errors import SettingsError, StudentError
from teacher_cache.models.families import encoder_of

FAMILIES = ["bert", "roberta", "xlm-roberta", "distilbert", "modernbert", "electra"]


def build(spec: str | None, teacher: Path, **options: Any) -> BuiltStudent:
    asked: dict[str, Any] = {"init": "random", "with_mlm_head": False, "seed": 0, "seq_len": 32, **options}
    seed = asked.pop("seed")
    return build_student(plan_student(spec, teacher_folder=teacher, **asked), seed=seed)


@pytest.mark.parametrize("family", FAMILIES)
def test_students_of_every_family_by_shape(family: str, tiny_teacher: Any) -> None:
    teacher = tiny_teacher(family)
    base = build("2x16", teacher)
    assert encoder_of(base.model) is base.model
    assert not any("pooler" in name for name, _ in base.model.named_parameters())
    assert {parameter.dtype for parameter in base.model.parameters()} == {torch.float32}
    masked = build("2x16", teacher, with_mlm_head=True)
    assert str(shape_of(masked.model.config)) == "2x16:4:32"
    assert masked.model.get_output_embeddings().weight is masked.model.get_input_embeddings().weight
    ids = torch.arange(5, 25)[None]
    assert masked.model(input_ids=ids).logits.shape == (1, 20, 200)
    assert masked.description == f"{family} 2x16:4:32: random weights" and masked.copied == ()


def test_random_weights_are_a_function_of_the_seed_alone(tiny_teacher: Any) -> None:
    first = build("2x32", tiny_teacher(), seed=1).model.state_dict()
    torch.manual_seed(123)
    before = torch.get_rng_state()
    again = build("2x32", tiny_teacher(), seed=1).model.state_dict()
    assert torch.equal(before, torch.get_rng_state())
    other = build("2x32", tiny_teacher(), seed=2).model.state_dict()
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not torch.equal(first["embeddings.word_embeddings.weight"], other["embeddings.word_embeddings.weight"])


def test_a_teacher_in_half_precision_gives_students_in_float32(tiny_teacher: Any, tmp_path: Path) -> None:
    half = AutoModelForMaskedLM.from_pretrained(tiny_teacher(), dtype=torch.float16)
    half.save_pretrained(tmp_path)
    for init in ("random", "auto"):
        student = build("2x32", tmp_path, init=init).model
        assert {parameter.dtype for parameter in student.parameters()} == {torch.float32}


# ---- from folders ---------------------------------------------------------------------------------------------------


def test_a_folder_gives_its_own_weights(tiny_teacher: Any) -> None:
    teacher, other = tiny_teacher(), tiny_teacher(seed=5, num_hidden_layers=2)
    built = build(str(other), teacher, init="auto", with_mlm_head=True)
    expected = AutoModelForMaskedLM.from_pretrained(other).state_dict()
    assert all(torch.equal(value, expected[name]) for name, value in built.model.state_dict().items())
    assert built.copied == ("base model", "masked-LM head") and repr(str(other)) in built.description


def test_a_folder_of_another_family_with_the_same_vocabulary(tiny_teacher: Any) -> None:
    built = build(str(tiny_teacher("distilbert")), tiny_teacher("bert"), init="auto", with_mlm_head=True)
    assert built.model.config.model_type == "distilbert"


def test_a_folder_without_a_head_gets_a_random_one(tiny_teacher: Any) -> None:
    built = build(str(tiny_teacher(head=False, seed=5)), tiny_teacher(), init="auto", with_mlm_head=True)
    assert built.copied == ("base model",)
    assert built.description.endswith("', which has no masked-LM head that fits: that one is random")


@pytest.mark.parametrize("init", ["random", "embeddings", "teacher:1,2"])
def test_a_folder_and_another_initialisation_contradict(init: str, tiny_teacher: Any) -> None:
    with pytest.raises(SettingsError, match="has its own weights"):
        build(str(tiny_teacher(seed=5)), tiny_teacher(), init=init)


def test_another_vocabulary_is_refused(tiny_teacher: Any, tiny_teacher_copy: Any) -> None:
    with pytest.raises(StudentError, match="has 210 vocabulary entries, the teacher 200"):
        build(str(tiny_teacher(vocab_size=210)), tiny_teacher(), init="auto")
    renamed = tiny_teacher_copy(seed=5)
    tokenizer = renamed / "tokenizer.json"
    words = tokenizer.read_text()
    assert '"babo"' in words
    tokenizer.write_text(words.replace('"babo"', '"zzzz"'))
    with pytest.raises(StudentError, match="other ids for 2 tokens such as 'babo'"):
        build(str(renamed), tiny_teacher(), init="auto")


@pytest.mark.parametrize(("family", "positions"), [("bert", 48), ("roberta", 50), ("modernbert", 48)])
def test_too_few_positions_are_refused(family: str, positions: int, tiny_teacher: Any) -> None:
    short = tiny_teacher(family, max_position_embeddings=positions)
    with pytest.raises(StudentError, match="reads at most 48 positions, the rows of the cache have 49"):
        build(str(short), tiny_teacher(family), init="auto", seq_len=49)
    build(str(short), tiny_teacher(family), init="auto", seq_len=48)


def test_decoders_are_refused(tiny_teacher: Any, tmp_path: Path) -> None:
    GPT2LMHeadModel(GPT2Config(n_layer=2, n_embd=32, n_head=4, vocab_size=200)).save_pretrained(tmp_path)
    with pytest.raises(StudentError, match="family 'gpt2'"):
        build(str(tmp_path), tiny_teacher(), init="auto")


def test_folders_that_are_no_models_are_refused(tiny_teacher: Any, tiny_teacher_copy: Any, tmp_path: Path) -> None:
    with pytest.raises(StudentError, match="no Hugging Face model folder"):
        build(str(tmp_path / ".."), tiny_teacher(), init="auto")
    broken = tiny_teacher_copy()
    weights = broken / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(StudentError, match="no Hugging Face model folder"):
        build(str(broken), tiny_teacher(), init="auto")
    broken_tokenizer = shutil.copytree(tiny_teacher(), tmp_path / "broken-tokenizer")
    (broken_tokenizer / "tokenizer.json").write_text("{}")
    with pytest.raises(StudentError, match="tokenizer in .*broken-tokenizer' cannot be read"):
        build(str(broken_tokenizer), tiny_teacher(), init="auto")
    shutil.copy(tiny_teacher("distilbert") / "model.safetensors", weights)
    with pytest.raises(StudentError, match="weights of its encoder"):
        build(str(broken), tiny_teacher(), init="auto")


def test_what_is_neither_shape_nor_folder_is_refused(tiny_teacher: Any) -> None:
    with pytest.raises(SettingsError, match="'no/such/folder' is neither a shape nor a folder"):
        build("no/such/folder", tiny_teacher())


def test_a_folder_called_like_a_shape_does_not_hide_the_shape(
    tiny_teacher: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "2x16").mkdir()
    (tmp_path / "random").mkdir()
    monkeypatch.chdir(tmp_path)
    assert build("2x16", tiny_teacher(), init="random").model.config.hidden_size == 16
    with pytest.raises(SettingsError, match="'' is neither a shape nor a folder"):
        build("", tiny_teacher())
