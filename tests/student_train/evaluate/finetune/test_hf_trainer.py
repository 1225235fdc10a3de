"""One run of the Hugging Face Trainer: what it is asked for, what it leaves, and predictions by kind of task."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoTokenizer

from student_train.evaluate.finetune import hf_trainer
from student_train.evaluate.finetune.examples import Examples
from student_train.evaluate.finetune.hf_trainer import train_and_predict
from student_train.evaluate.finetune.inputs import Inputs, encode
from student_train.evaluate.finetune.model import load_for_task
from student_train.evaluate.finetune.settings import FinetuneSettings
from student_train.evaluate.finetune.tasks import TASKS
from teacher_cache.errors import StudentError

SETTINGS = FinetuneSettings(task="sst2", train_file="a", dev_file="b", epochs=2, batch_size=4)
TEXTS = ("babo bada", "dabo deda", "babo", "dabo dabo deda", "bada bada", "deda")
LABELS = (0, 1, 0, 1, 0, 1)


def run(folder: Path, *, seed: int = 0, advance: Any = lambda step, steps: None) -> tuple[Any, dict[str, list[Any]]]:
    """The trained model, and what it predicts of the examples that it was trained on."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    examples = Examples(origin="test", inputs=tuple((text,) for text in TEXTS), labels=LABELS)
    inputs = encode(tokenizer, examples, TASKS["sst2"], tags=(), max_length=16)
    model = load_for_task(folder, TASKS["sst2"], TASKS["sst2"].labels, seed)
    found = train_and_predict(
        model, tokenizer, inputs, {"dev": inputs, "again": inputs}, TASKS["sst2"], SETTINGS, learning_rate=1e-3,
        seed=seed, device="cpu", advance=advance,
    )  # fmt: skip
    return model, found


def test_a_run_is_a_function_of_its_seed(tiny_teacher: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two epochs of two batches; nothing is left in the folder that it ran in."""
    monkeypatch.chdir(tmp_path)
    folder, steps = tiny_teacher("bert", initializer_range=0.02), []
    model, found = run(folder, advance=lambda step, of: steps.append((step, of)))
    assert steps == [(1, 4), (2, 4), (3, 4), (4, 4)]
    assert found["dev"] == found["again"] and set(found["dev"]) <= {0, 1} and len(found["dev"]) == 6
    assert list(tmp_path.iterdir()) == []
    again, other = run(folder)[0], run(folder, seed=1)[0]
    states = [each.state_dict() for each in (model, again, other)]
    assert all(torch.equal(value, states[1][name]) for name, value in states[0].items())
    assert not torch.equal(states[0]["classifier.weight"], states[2]["classifier.weight"])


def test_what_the_trainer_is_asked_for() -> None:
    found = hf_trainer._arguments("scratch", SETTINGS, 3e-5, 7, "cpu")
    assert (found.learning_rate, found.seed, found.num_train_epochs) == (3e-5, 7, 2)
    assert (found.warmup_steps, found.weight_decay, found.lr_scheduler_type) == (0.1, 0.01, "linear")
    assert found.per_device_train_batch_size == found.per_device_eval_batch_size == 4
    assert found.report_to == [] and found.save_strategy == "no" and found.use_cpu and not found.bf16


def test_segment_numbers_go_where_the_model_has_no_embedding_for_them() -> None:
    inputs = Inputs(features=({"input_ids": [1], "token_type_ids": [0]},), cut=0)
    for types, kept in ((2, {"input_ids", "token_type_ids"}), (1, {"input_ids"}), (0, {"input_ids"})):
        (features,) = hf_trainer._readable(inputs, SimpleNamespace(config=SimpleNamespace(type_vocab_size=types)))
        assert features.keys() == kept
    assert hf_trainer._readable(inputs, SimpleNamespace(config=SimpleNamespace()))[0].keys() == {"input_ids"}


def test_decisions_by_kind_of_task() -> None:
    nothing = Inputs(features=(), cut=0)
    scores = np.array([[0.5, 2.0, 1.0], [3.0, -1.0, 0.0]])
    assert hf_trainer._decide(scores, nothing, TASKS["mnli"], 1e-5) == [1, 0]
    # some models give their hidden states beside the scores
    assert hf_trainer._decide((scores, None), nothing, TASKS["mnli"], 1e-5) == [1, 0]
    assert hf_trainer._decide(np.array([[2.5], [4.0]]), nothing, TASKS["stsb"], 1e-5) == [2.5, 4.0]
    words = Inputs(features=(), word_tokens=((1, None, 2), (2,)), cut=0)
    tags = np.zeros((2, 4, 3))
    tags[0, 1, 2] = tags[0, 2, 1] = tags[1, 2, 2] = 1
    # shorter rows are padded with -100, which nobody asks for
    tags[1, 3] = -100
    assert hf_trainer._decide(tags, words, TASKS["ner"], 1e-5) == [[2, None, 1], [2]]


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_outputs_that_are_no_numbers(value: float) -> None:
    with pytest.raises(StudentError, match=r"--lr 0\.5 the model's outputs are NaN or infinite"):
        hf_trainer._decide(np.array([[0.0, value]]), Inputs(features=(), cut=0), TASKS["sst2"], 0.5)
