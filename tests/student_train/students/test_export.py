"""The exported student: what any user gets from the directory, and what is not in it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from transformers import AutoModel, AutoModelForMaskedLM, AutoTokenizer, PreTrainedModel

from student_train.methods.model import DistillationModel
from student_train.methods.objective import make_objective
from student_train.students.export import export_student
from student_train.students.student import build_student, plan_student
from teacher_cache.errors import StudentError

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
