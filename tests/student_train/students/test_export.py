"""The exported student: what any user gets from the directory, and what is not in it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoTokenizer,
    GenerationConfig,
    PreTrainedModel,
)

from student_train.methods.model import DistillationModel
from student_train.methods.objective import make_objective
from student_train.students.export import export_student
from student_train.students.student import StudentPlan, build_student, plan_student, with_weights
from teacher_cache.errors import StudentError
from tests.causal_models import FAMILIES as CAUSAL
from tests.causal_models import make_model, save_teacher

FAMILIES = ["bert", "roberta", "xlm-roberta", "distilbert", "modernbert", "electra"]
IDS = torch.tensor([[2, 17, 40, 99, 150, 33, 3], [2, 60, 61, 62, 63, 64, 3]])
FILES = {"config.json", "model.safetensors", "provenance.json", "tokenizer.json", "tokenizer_config.json"}


def trained_student(live_cache: Any, folder: Path, methods: dict[str, float]) -> PreTrainedModel:
    """A student after a few real steps on every loss, inside the module that training wraps it in."""
    cache = live_cache(folder, hidden=(2, 4), attention=(3,), logits=True)
    built = build_student(
        plan_student("2x24:4", teacher_folder=folder, init="random", with_mlm_head="od" in methods, seq_len=12), seed=0
    )
    objective = make_objective(methods, source=cache, student=built.model.config, mapping="uniform")
    model = DistillationModel(built.model, objective).train()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    for step in range(3):
        optimizer.zero_grad()
        losses = model(cache.batch((12, 5), seed=step))
        torch.stack([loss.total / loss.count for loss in losses.values()]).sum().backward()
        optimizer.step()
    return model.student


def export(model: PreTrainedModel, out: Path, folder: Path, **provenance: Any) -> None:
    export_student(model, out, teacher_folder=folder, seq_len=12, provenance={"made": "here", **provenance})


@torch.no_grad()
def outputs(model: PreTrainedModel) -> torch.Tensor:
    return model.eval()(input_ids=IDS)[0]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("head", [True, False])
def test_round_trip(family: str, head: bool, tiny_teacher: Any, live_cache: Any, tmp_path: Path) -> None:
    methods = {"mha": 1.0, "hs": 1.0} | ({"od": 1.0} if head else {})
    student = trained_student(live_cache, tiny_teacher(family), methods)
    export(student, tmp_path, tiny_teacher(family))
    assert {file.name for file in tmp_path.iterdir()} == FILES
    assert len({file.stat().st_mode for file in tmp_path.iterdir()}) == 1
    loader = AutoModelForMaskedLM if head else AutoModel
    loaded, report = loader.from_pretrained(tmp_path, output_loading_info=True)
    assert {name for name in report["missing_keys"] if "pooler." not in name} == set()
    assert not report["unexpected_keys"] and not report["mismatched_keys"]
    assert torch.equal(outputs(loaded), outputs(student))
    if head:
        assert loaded.get_output_embeddings().weight is loaded.get_input_embeddings().weight


@pytest.mark.parametrize("family", FAMILIES)
def test_nothing_of_training_is_in_it(family: str, tiny_teacher: Any, live_cache: Any, tmp_path: Path) -> None:
    methods = {"mha": 1.0, "hs": 1.0, "od": 1.0}
    student = trained_student(live_cache, tiny_teacher(family), methods)
    rates = {name: value for name, value in student.config.to_dict().items() if "dropout" in name}
    export(student, tmp_path, tiny_teacher(family))
    with safe_open(tmp_path / "model.safetensors", "pt") as weights:
        stored = sum(weights.get_tensor(name).numel() for name in weights.keys())  # noqa: SIM118 - not a mapping
    assert stored == sum(parameter.numel() for parameter in student.parameters())
    text = (tmp_path / "config.json").read_text()
    config = json.loads(text)
    assert "tap" not in text and str(tiny_teacher(family)) not in text and "attn_implementation" not in text
    assert {name: value for name, value in config.items() if "dropout" in name} == rates
    assert config["architectures"] == [type(student).__name__]
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    assert tokenizer.model_max_length == 12
    assert tokenizer.get_vocab() == AutoTokenizer.from_pretrained(tiny_teacher(family)).get_vocab()
    assert len(tokenizer("babo " * 50, truncation=True)["input_ids"]) == 12
    assert json.loads((tmp_path / "provenance.json").read_text()) == {"made": "here"}


@pytest.mark.parametrize("family, types", [("roberta", 1), ("distilbert", 0), ("bert", 2)])
def test_the_tokenizer_gives_what_the_student_reads(
    family: str, types: int, tiny_teacher: Any, live_cache: Any, tmp_path: Path
) -> None:
    """A teacher may come with BERT's tokenizer, which numbers the texts of a pair, and have one type or none."""
    teacher, folder = tiny_teacher(family, **({"type_vocab_size": types} if types else {})), tmp_path / "teacher"
    shutil.copytree(teacher, folder)
    named = ["input_ids", "token_type_ids", "attention_mask"]
    config = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps(config | {"model_input_names": named}))
    student = trained_student(live_cache, teacher, {"mha": 1.0})
    export(student, tmp_path / "out", folder)
    pair = AutoTokenizer.from_pretrained(tmp_path / "out")("ba", "da", return_tensors="pt")
    assert list(pair) == (named if types == 2 else ["input_ids", "attention_mask"])
    assert AutoModel.from_pretrained(tmp_path / "out")(**pair)[0].isfinite().all()


def test_training_goes_on_after_an_export(tiny_teacher: Any, live_cache: Any, tmp_path: Path) -> None:
    student = trained_student(live_cache, tiny_teacher(), {"mha": 1.0})
    implementation = student.config._attn_implementation
    export(student, tmp_path, tiny_teacher())
    assert student.config._attn_implementation == implementation


def test_an_earlier_export_is_replaced_and_other_files_stay(tiny_teacher: Any, live_cache: Any, tmp_path: Path) -> None:
    student = trained_student(live_cache, tiny_teacher(), {"hs": 1.0})
    (tmp_path / "metrics.jsonl").write_text("{}\n")
    (tmp_path / ".export-unfinished").mkdir()
    (tmp_path / ".export-unfinished" / "left-over.bin").write_bytes(b"half")
    export(student, tmp_path, tiny_teacher(), step=1)
    with torch.no_grad():
        student.get_input_embeddings().weight.mul_(2)
    export(student, tmp_path, tiny_teacher(), step=2)
    assert {file.name for file in tmp_path.iterdir()} == FILES | {"metrics.jsonl"}
    assert json.loads((tmp_path / "provenance.json").read_text())["step"] == 2
    assert torch.equal(outputs(AutoModel.from_pretrained(tmp_path)), outputs(student))


def test_a_student_that_does_not_load_back_is_not_put_in_place(
    tiny_teacher: Any, live_cache: Any, tmp_path: Path
) -> None:
    student = trained_student(live_cache, tiny_teacher(), {"hs": 1.0})
    export(student, tmp_path, tiny_teacher())
    before = (tmp_path / "model.safetensors").read_bytes()
    student.register_module("projection", torch.nn.Linear(24, 32))
    with pytest.raises(StudentError, match=r"unexpected ones \['projection\.bias', 'projection\.weight'\]"):
        export(student, tmp_path, tiny_teacher())
    assert (tmp_path / "model.safetensors").read_bytes() == before


def test_the_real_teacher_in_miniature(shared_teacher: Path, tmp_path: Path) -> None:
    built = build_student(
        plan_student(None, teacher_folder=shared_teacher, init="auto", with_mlm_head=True, seq_len=128), seed=0
    )
    assert built.description == (
        "bert 3x384:12:1536: embeddings, masked-LM head, layers 2, 4, 6 copied from the teacher"
    )
    export_student(built.model, tmp_path, teacher_folder=shared_teacher, seq_len=128, provenance={})
    loaded, report = AutoModelForMaskedLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"]
    assert loaded.cls.predictions.decoder.weight is loaded.bert.embeddings.word_embeddings.weight
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    assert tokenizer.model_max_length == 128 and tokenizer("Hello world")["input_ids"][0] == tokenizer.cls_token_id


# ---- what was written computes what was trained ---------------------------------------------------------------------


def twin_of(model: PreTrainedModel) -> PreTrainedModel:
    """The model as `with_weights` gives it, from what an engine would."""
    weights = {name: value.detach().clone() for name, value in model.named_parameters(remove_duplicate=False)}
    return with_weights(model, weights)


@pytest.mark.parametrize("family", ["bert", "modernbert", "llama", "gemma2", "gpt2", "recurrent_gemma"])
def test_weights_in_another_model_compute_the_same(family: str, tiny_teacher: Any) -> None:
    """Buffers that no folder holds come along, and so do tables that are no buffers."""
    folder = None if family in ("llama", "gemma2", "gpt2", "recurrent_gemma") else tiny_teacher(family)
    model = make_model(family) if folder is None else AutoModelForMaskedLM.from_pretrained(folder).eval()
    twin = twin_of(model).eval()
    assert all(value.device.type == "cpu" for value in (*twin.parameters(), *twin.buffers()))
    with torch.no_grad():
        assert torch.equal(twin(input_ids=IDS % 100)[0], model(input_ids=IDS % 100)[0])


def test_an_export_that_computes_something_else_is_not_put_in_place(
    tiny_teacher: Any, live_cache: Any, tmp_path: Path
) -> None:
    student = trained_student(live_cache, tiny_teacher("modernbert"), {"hs": 1.0})
    export(student, tmp_path, tiny_teacher("modernbert"))
    before = (tmp_path / "provenance.json").read_bytes()
    changed = twin_of(student)
    for name, buffer in changed.named_buffers():
        if name.endswith("inv_freq"):
            buffer.mul_(1.5)
    with pytest.raises(StudentError, match=r"computes something else than the one .* differ by 0\.\d+ of .*modernbert"):
        export(changed, tmp_path, tiny_teacher("modernbert"), step=2)
    assert (tmp_path / "provenance.json").read_bytes() == before


def test_a_configuration_that_loses_something_is_noticed(tiny_teacher: Any, live_cache: Any, tmp_path: Path) -> None:
    """The norms' epsilon is read when a model is made: what is changed later is trained with and not written."""
    student = trained_student(live_cache, tiny_teacher(), {"od": 1.0, "hs": 1.0})
    for module in student.modules():
        if isinstance(module, torch.nn.LayerNorm):
            module.eps = 0.5
    with pytest.raises(StudentError, match="computes something else"):
        export(student, tmp_path, tiny_teacher())
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_compared_in_its_own_type(dtype: torch.dtype, tiny_teacher: Any, tmp_path: Path) -> None:
    model = AutoModelForMaskedLM.from_pretrained(tiny_teacher("roberta"), dtype=dtype)
    export(model, tmp_path, tiny_teacher("roberta"))
    assert model.training is False
    assert AutoModelForMaskedLM.from_pretrained(tmp_path).dtype == dtype


# ---- causal LMs -----------------------------------------------------------------------------------------------------

TEMPLATE = "{% for each in messages %} {{ each['content'] }}{% endfor %}"


def export_decoder(plan: StudentPlan, out: Path) -> PreTrainedModel:
    student = build_student(plan, seed=0).model
    export_student(student, out, teacher_folder=plan.teacher_folder, seq_len=24, provenance={})
    return student


def save_chat_teacher(folder: Path, family: str = "llama", **sizes: Any) -> Path:
    save_teacher(folder, family, **sizes)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.chat_template, tokenizer.model_max_length = TEMPLATE, 48
    tokenizer.save_pretrained(folder)
    return folder


# Qwen 2 brings a tokenizer of its own, which reads nothing of the words of this one
@pytest.mark.parametrize("family", [family for family in CAUSAL if family != "qwen2"])
def test_a_decoder_is_exported_and_writes(family: str, tmp_path: Path) -> None:
    teacher = save_chat_teacher(tmp_path / "teacher", family)
    plan = plan_student("2x32", teacher_folder=teacher, init="auto", with_mlm_head=True, seq_len=24)
    out = tmp_path / "out"
    student = export_decoder(plan, out)
    loaded, tokenizer = AutoModelForCausalLM.from_pretrained(out), AutoTokenizer.from_pretrained(out)
    inputs = tokenizer("babo dafe", return_tensors="pt")
    assert set(inputs) == {"input_ids", "attention_mask"}
    with torch.no_grad():
        assert torch.equal(loaded(**inputs).logits, student.eval()(**inputs).logits)
    written = loaded.generate(**inputs, max_new_tokens=5, do_sample=False)
    assert written.shape[0] == 1 and inputs.input_ids.shape[1] < written.shape[1] <= inputs.input_ids.shape[1] + 5
    assert loaded.generation_config.eos_token_id == 0 and loaded.generation_config.pad_token_id == 0
    # a decoder goes on behind what it was trained on: its text is cut where the teacher's is
    assert tokenizer.model_max_length == 48 and tokenizer.pad_token is None
    chat = tokenizer.apply_chat_template([{"role": "user", "content": "babo dafe"}], tokenize=False)
    assert chat == " babo dafe" and tokenizer.chat_template == TEMPLATE


def test_writing_ends_where_the_teachers_does(tmp_path: Path) -> None:
    """Chat models end a turn with another token than a text, and only their settings for generation know."""
    teacher = save_chat_teacher(tmp_path / "teacher", pad_token_id=None, eos_token_id=3)
    GenerationConfig(eos_token_id=[7, 3], do_sample=True, temperature=0.6).save_pretrained(teacher)
    plan = plan_student("2x32", teacher_folder=teacher, init="auto", with_mlm_head=True, seq_len=24)
    export_decoder(plan, tmp_path / "out")
    found = GenerationConfig.from_pretrained(tmp_path / "out")
    assert (found.eos_token_id, found.pad_token_id) == ([7, 3], 7) and not found.do_sample


@pytest.mark.parametrize("padding", [-1, 2**31 - 1])
def test_what_is_no_id_is_not_taken_over_for_writing(padding: int, tmp_path: Path) -> None:
    """Transformers saves no settings with a negative id: a training would end without its student."""
    teacher = save_chat_teacher(tmp_path / "teacher", pad_token_id=None, eos_token_id=3)
    (teacher / "generation_config.json").write_text(json.dumps({"pad_token_id": padding, "eos_token_id": [3, -5]}))
    plan = plan_student("2x32", teacher_folder=teacher, init="auto", with_mlm_head=True, seq_len=24)
    export_decoder(plan, tmp_path / "out")
    found = GenerationConfig.from_pretrained(tmp_path / "out")
    assert (found.eos_token_id, found.pad_token_id) == (3, 3)


def test_a_decoders_text_is_cut_at_its_last_position(tmp_path: Path) -> None:
    teacher = save_chat_teacher(tmp_path / "teacher")
    plan = plan_student(
        str(save_teacher(tmp_path / "student", "gpt2", max_position_embeddings=30)),
        teacher_folder=teacher, init="auto", with_mlm_head=True, seq_len=24,
    )  # fmt: skip
    export_decoder(plan, tmp_path / "out")
    assert AutoTokenizer.from_pretrained(tmp_path / "out").model_max_length == 30


def test_chat_templates_beside_the_first_one_come_along(tmp_path: Path) -> None:
    teacher = save_chat_teacher(tmp_path / "teacher")
    tokenizer = AutoTokenizer.from_pretrained(teacher)
    tokenizer.chat_template = {"default": TEMPLATE, "tools": "tools" + TEMPLATE}
    tokenizer.save_pretrained(teacher)
    plan = plan_student("2x32", teacher_folder=teacher, init="auto", with_mlm_head=True, seq_len=24)
    for _ in range(2):
        export_decoder(plan, tmp_path / "out")
    assert AutoTokenizer.from_pretrained(tmp_path / "out").chat_template == tokenizer.chat_template
