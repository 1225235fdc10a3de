"""Students by shape and from folders: what is built, what is refused."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForMaskedLM, PreTrainedModel

from student_train.students.shape import head_width, shape_of
from student_train.students.student import BuiltStudent, build_student, plan_student
from teacher_cache.errors import SettingsError, StudentError
from teacher_cache.models.families import encoder_of
from tests.causal_models import FAMILIES as CAUSAL
from tests.causal_models import VOCABULARY, make_model, save_teacher

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


def test_students_that_predict_something_else_are_refused(tiny_teacher: Any, causal_teacher: Path) -> None:
    with pytest.raises(StudentError, match="is a causal LM, and the teacher of this cache a masked LM.*choose a stud"):
        build(str(causal_teacher), tiny_teacher(), init="auto")
    with pytest.raises(StudentError, match="is a masked LM, and the teacher of this cache a causal LM.*choose a stud"):
        build(str(tiny_teacher()), causal_teacher, init="auto")
    with pytest.raises(StudentError, match="is a masked LM, and the teacher of this cache a causal LM.*choose a stud"):
        build("2x32", causal_teacher, init=str(tiny_teacher()))


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
    with pytest.raises(StudentError, match="weights of its base model"):
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


# ---- causal LMs -----------------------------------------------------------------------------------------------------

SHAPES = ("2x32", "2x24:2", "3x48:6:96:3", "2x16:1", "2x32:4:64:1", "2x12:4", "2x8:8")


@pytest.fixture(scope="module")
def causal_teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A llama of 4 layers, 4 heads that share 2 of keys and values, and a head that is not tied to the embeddings."""
    return save_teacher(tmp_path_factory.mktemp("causal") / "teacher", tie_word_embeddings=False)


def widths_of_projections(model: PreTrainedModel) -> tuple[int, int, int]:
    """Rows of the first layer's query, key and value matrices, whatever the family calls and joins them."""
    shape, width = shape_of(model.config), head_width(model.config)
    for name, module in model.named_modules():
        rows = getattr(module, "out_features", getattr(module, "nf", None))
        if name.endswith(("query_key_value", "c_attn")):
            shared = (shape.key_value_heads or shape.heads) * width
            assert rows is not None
            return rows - 2 * shared, shared, shared
        if name.endswith("q_proj"):
            siblings = [model.get_submodule(name.replace("q_proj", other)) for other in ("k_proj", "v_proj")]
            return rows, *(each.out_features for each in siblings)  # type: ignore[return-value]
    raise AssertionError(model.config.model_type)


@pytest.mark.parametrize("family", CAUSAL)
def test_every_shape_of_a_decoder_runs_or_is_refused_by_name(family: str, tmp_path: Path) -> None:
    teacher, built = save_teacher(tmp_path / "teacher", family), 0
    for spec in SHAPES:
        refusal = None
        try:
            student = build(spec, teacher, init="auto", with_mlm_head=True, seq_len=24).model
        except (SettingsError, StudentError) as error:
            refusal = str(error)
        if refusal is not None:
            assert f"family {family!r}" in refusal and spec in refusal
            continue
        built += 1
        shape, width = shape_of(student.config), head_width(student.config)
        key_width = (shape.key_value_heads or shape.heads) * width
        assert str(shape).startswith(spec) and (spec == "2x32" or width == shape.hidden_size // shape.heads)
        assert widths_of_projections(student) == (shape.heads * width, key_width, key_width)
        ids = torch.arange(24)[None]
        logits = student.train()(ids, use_cache=False).logits
        assert logits.shape == (1, 24, len(VOCABULARY))
        logits.square().mean().backward()
        assert all(each.grad is None or each.grad.isfinite().all() for each in student.parameters())
    assert built >= 3


@pytest.mark.parametrize("family, spec, turned", [
    ("llama", "2x12:4", "heads have 3 components"), ("llama", "2x8:8", "heads have 1 comp"),
    ("phi", "2x12:4", "heads have 1 of 3 comp"), ("gpt_neox", "2x32:8", "heads have 1 of 4 comp"),
])  # fmt: skip
def test_rotary_positions_on_an_odd_number_of_components_are_refused(
    family: str, spec: str, turned: str, tmp_path: Path
) -> None:
    """Some of them run, on heads that rotation has made wider than their values."""
    with pytest.raises(StudentError, match=f"family '{family}' gives no student {spec}:.*pairs, and its {turned}"):
        build(spec, save_teacher(tmp_path / "teacher", family), with_mlm_head=True, seq_len=24)


def test_a_folder_of_another_family_and_padding(causal_teacher: Path, tmp_path: Path) -> None:
    for entries in (len(VOCABULARY), len(VOCABULARY) + 8):
        other = save_teacher(tmp_path / str(entries), "gpt2", seed=3, vocab_size=entries)
        built = build(str(other), causal_teacher, init="auto", with_mlm_head=True, isolated=True)
        assert built.copied == ("base model", "language-modelling head")
        expected = make_model("gpt2", seed=3, vocab_size=entries).state_dict()
        assert all(torch.equal(value, expected[name]) for name, value in built.model.state_dict().items())


@pytest.mark.parametrize("setting", [{"rms_norm_eps": 0.1}, {"hidden_act": "gelu"}, {}])
def test_weights_of_a_folder_come_with_its_settings(
    setting: dict[str, Any], causal_teacher: Path, tmp_path: Path
) -> None:
    """In those of the teacher, whose sizes are the same, they would be another model."""
    other = save_teacher(tmp_path / "other", seed=3, tie_word_embeddings=False, **setting)
    built = build("4x32:4:64:2", causal_teacher, init=str(other), with_mlm_head=True, seq_len=24)
    ids = torch.arange(24)[None]
    expected = make_model("llama", seed=3, tie_word_embeddings=False, **setting)(ids, use_cache=False).logits
    assert torch.equal(built.model.eval()(ids, use_cache=False).logits, expected)


def test_a_folder_without_the_head_of_a_decoder_gets_a_random_one(causal_teacher: Path, tmp_path: Path) -> None:
    bare = save_teacher(tmp_path / "bare", tie_word_embeddings=False)
    encoder_of(make_model("llama", tie_word_embeddings=False)).save_pretrained(bare)
    built = build(str(bare), causal_teacher, init="auto", with_mlm_head=True)
    assert built.copied == ("base model",)
    assert built.description.endswith("', which has no language-modelling head that fits: that one is random")


def test_too_few_positions_of_a_decoder_are_refused(causal_teacher: Path, tmp_path: Path) -> None:
    short = save_teacher(tmp_path / "short", "gpt2", max_position_embeddings=16)
    with pytest.raises(StudentError, match="reads at most 16 positions, the rows of the cache have 17"):
        build(str(short), causal_teacher, init="auto", with_mlm_head=True, seq_len=17)


@pytest.mark.parametrize("family, why", [("opt", "they see each other: final states"), ("bloom", "takes no positions")])
def test_students_whose_documents_see_each_other_are_refused(
    family: str, why: str, causal_teacher: Path, tmp_path: Path
) -> None:
    folder = save_teacher(tmp_path / "student", family)
    built = build(str(folder), causal_teacher, init="auto", with_mlm_head=True)
    assert built.description.startswith(f"{family} 4x32:4")
    with pytest.raises(
        StudentError, match=f"of family '{family}' does not keep apart .*{why}.* with --segments joined"
    ):
        build(str(folder), causal_teacher, init="auto", with_mlm_head=True, isolated=True)


def test_encoders_keep_documents_apart_too(tiny_teacher: Any) -> None:
    assert build("2x32", tiny_teacher("roberta"), init="auto", isolated=True).whole_layers
