"""The real harness on a tiny student: tasks from local files, scores counted by hand, what it is refused."""

from __future__ import annotations

import json
import math
import sys
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from student_train.evaluate.lm_eval.harness import measure_lm_eval, require_harness
from student_train.evaluate.lm_eval.records import LmEvalReport
from student_train.evaluate.lm_eval.settings import LmEvalSettings
from teacher_cache.errors import SettingsError, StudentError, TaskError
from tests.student_train.evaluate.causal_models import make_causal

CONTEXTS = ("the old", "a new", "the Straße", "day naïve", "x y")
QUESTIONS = [
    {"question": context, "choices": ["cat", "dog sees", "bird"], "answer": place % 3}
    for place, context in enumerate(CONTEXTS)
]
CHOICE = """
task: animals
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{question}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: "{{{{answer}}}}"
metric_list: [{{metric: acc}}, {{metric: acc_norm}}]
metadata: {{version: 2.0}}
"""
TEXT = """
task: words
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{{{question}}}}"
metric_list: [{{metric: bits_per_byte}}]
"""
GROUP = "group: both\ntask: [animals, words]\naggregate_metric_list: [{metric: acc, weight_by_size: true}]\n"


@pytest.fixture(scope="module")
def tasks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tasks")
    data = folder / "questions.jsonl"
    data.write_text("".join(json.dumps(question) + "\n" for question in QUESTIONS))
    (folder / "animals.yaml").write_text(CHOICE.format(data=data))
    (folder / "words.yaml").write_text(TEXT.format(data=data))
    (folder / "both.yaml").write_text(GROUP)
    return folder


@pytest.fixture(scope="module")
def student(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_causal(tmp_path_factory.mktemp("student") / "model", "gpt2")


def measure(student: Path, tasks: Path | None, *names: str, **flags: Any) -> LmEvalReport:
    pytest.importorskip("lm_eval", reason="lm-evaluation-harness is not installed (extra 'lm-eval')")
    include = None if tasks is None else str(tasks)
    settings = LmEvalSettings(student=str(student), tasks=names, include_path=include, device="cpu", **flags)
    return measure_lm_eval(settings, device="cpu", show=lambda doing: None)


@cache
def loaded(folder: Path) -> tuple[Any, Any]:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64).eval()
    return model, AutoTokenizer.from_pretrained(folder)


@torch.no_grad()
def plain_nats(folder: Path, context: str, text: str) -> float:
    """Of a text after a context, or where there is none, after an end of text; in float64."""
    model, tokenizer = loaded(folder)
    before = tokenizer(context).input_ids or [tokenizer.eos_token_id]
    ids = [*before, *tokenizer(context + text).input_ids[len(before) if context else 0 :]]
    given = len(before)
    log_probs_TV = model(input_ids=torch.tensor([ids])).logits[0].log_softmax(-1)
    return -sum(float(log_probs_TV[place - 1, ids[place]]) for place in range(given, len(ids)))


def test_scores_are_those_counted_by_hand(student: Path, tasks: Path, capsys: pytest.CaptureFixture[str]) -> None:
    report = measure(student, tasks, "both", batch_size=2)
    assert capsys.readouterr().out == ""  # standard output is the command's
    assert [(each.task, each.group) for each in report.results] == [
        ("both", None), ("animals", "both"), ("words", "both"),
    ]  # fmt: skip
    both, animals, words = report.results
    right = [
        min(each["choices"], key=lambda choice: plain_nats(student, each["question"], f" {choice}"))
        == each["choices"][each["answer"]]
        for each in QUESTIONS
    ]
    assert animals.metrics["acc"].value == sum(right) / 5 == both.metrics["acc"].value
    assert animals.metrics["acc"].higher_is_better is True and animals.metrics["acc"].stderr is not None
    assert (animals.shots, animals.examples, animals.version, both.examples) == (0, 5, "2.0", None)
    assert animals.main == "acc_norm"
    texts = [each["question"] for each in QUESTIONS]
    nats = sum(plain_nats(student, "", text) for text in texts)
    expected = nats / math.log(2) / sum(len(text.encode()) for text in texts)
    assert words.metrics["bits_per_byte"].value == pytest.approx(expected, rel=1e-4)
    assert LmEvalReport.from_json(json.loads(json.dumps(report.to_json(), allow_nan=False))) == report


def test_tasks_by_name_with_a_limit(student: Path, tasks: Path) -> None:
    report = measure(student, tasks, "words", "animals", limit=2, num_fewshot=1)
    assert [(each.task, each.group, each.examples) for each in report.results] == [
        ("words", None, 2), ("animals", None, 2),
    ]  # fmt: skip
    assert report.results[1].shots == 1 and "first 2 questions" in report.notes[0]
    whole = measure(student, tasks, "animals")
    assert whole.results[0].config_sha256 == measure(student, tasks, "animals").results[0].config_sha256
    assert whole.results[0].config_sha256 != report.results[1].config_sha256  # the shots are part of it


def test_tasks_that_cannot_be(student: Path, tasks: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("lm_eval", reason="lm-evaluation-harness is not installed (extra 'lm-eval')")
    from lm_eval.tasks import manager

    # the harness's own are fourteen thousand, which takes twenty seconds to find out
    monkeypatch.setattr(manager, "__file__", str(tmp_path / "none" / "manager.py"))
    (tmp_path / "none").mkdir()
    with pytest.raises(TaskError, match=r"no task nothing, neither in --include-path .* nor among its own"):
        measure(student, tasks, "nothing")
    broken = tmp_path / "broken"
    broken.mkdir()
    (broken / "animals.yaml").write_text(CHOICE.format(data=tmp_path / "nowhere.jsonl"))
    with pytest.raises(TaskError, match="cannot run animals"):
        measure(student, broken, "animals")


def test_encoders(tiny_teacher: Any, tasks: Path) -> None:
    with pytest.raises(StudentError, match="`kdeval finetune`"):
        measure(tiny_teacher("bert"), tasks, "animals")


def test_where_it_is_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    with pytest.raises(SettingsError, match=r"pip install 'kdcache\[lm-eval\]'"):
        require_harness()
