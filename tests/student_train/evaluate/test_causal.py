"""Causal models that are measured: loaded whole or refused, told from encoders."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from cli.kdeval import main
from student_train.evaluate.causal import is_causal, load_causal, model_folder
from student_train.evaluate.load import load_student
from teacher_cache.errors import StudentError
from tests.student_train.evaluate.causal_models import make_causal
from tests.student_train.evaluate.left_records import read_text


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return make_causal(tmp_path / "model", "llama", tie_word_embeddings=False)


def test_a_causal_model(folder: Path) -> None:
    loaded = load_causal(str(folder), "student", instead="")
    assert (loaded.positions, loaded.config.vocab_size) == (64, 300)
    assert not loaded.model.training and not any(each.requires_grad for each in loaded.model.parameters())
    assert loaded.model.dtype == torch.float32
    text = "the cat sees the größer"
    assert loaded.tokenizer().decode(loaded.tokenizer()(text, add_special_tokens=False).input_ids) == text
    assert len(loaded.fingerprint) == 64


def test_what_is_causal(folder: Path, tiny_teacher: Any, tmp_path: Path) -> None:
    assert is_causal(folder)
    assert not is_causal(tiny_teacher("bert"))
    (tmp_path / "config.json").write_text('{"model_type": "t5"}')
    assert not is_causal(tmp_path)
    with pytest.raises(StudentError, match="bert.* is a masked language model, .*: take another"):
        load_causal(str(tiny_teacher("bert")), "student", instead="take another")
    with pytest.raises(StudentError, match="an encoder-decoder"):
        load_causal(str(tmp_path), "teacher", instead="")


def test_models_that_are_not_there(tmp_path: Path) -> None:
    with pytest.raises(StudentError, match="no student directory"):
        model_folder(str(tmp_path / "nowhere"), "student")
    with pytest.raises(StudentError, match="cannot be had from the hub"):
        model_folder("nobody/nothing", "teacher", tokenizer=True)


def test_a_head_that_would_be_random_and_a_tokenizer_that_cannot_be_read(folder: Path) -> None:
    (folder / "tokenizer.json").write_text("{")
    with pytest.raises(StudentError, match="the tokenizer of student .* cannot be read"):
        load_causal(str(folder), "student", instead="").tokenizer()
    weights = load_file(folder / "model.safetensors")
    del weights["lm_head.weight"]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(StudentError, match=r"lacks 1 weights of its head, 'lm_head\.weight'"):
        load_causal(str(folder), "student", instead="")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "tie_word_embeddings": True}))
    assert load_causal(str(folder), "student", instead="").config.tie_word_embeddings


@pytest.mark.parametrize("tied", [True, False])
def test_a_decoder_that_was_fine_tuned_is_no_language_model(
    tied: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its head over the vocabulary would be its embeddings, or random; what it does is one pass, and that is timed."""
    student = make_causal(tmp_path / "student", "llama", tie_word_embeddings=tied)
    saved, text = tmp_path / "saved", tmp_path / "text.tsv"
    rows = [f"the {'cat' if number % 2 else 'dog'} sees {number}\t{number % 2}" for number in range(12)]
    text.write_text("\n".join(["sentence\tlabel", *rows]) + "\n")
    files = ["--train-file", str(text), "--dev-file", str(text)]
    flags = "--task sst2 --seeds 1 --epochs 1 --max-length 16 --device cpu".split()
    assert main(["finetune", "--student", str(student), *files, *flags, "--save", str(saved)]) == 0
    capsys.readouterr()
    assert not is_causal(saved) and load_student(saved).head is None
    assert main(["perplexity", "--student", str(saved), "--text", str(text)]) == 1
    assert "is a LlamaForSequenceClassification, fine-tuned for a task" in capsys.readouterr().err
    timing = "--batch-sizes 1 --lengths 8 --seconds 0.2 --backends pytorch --json".split()
    assert main(["latency", "--student", str(saved), *timing]) == 0
    timed = json.loads(capsys.readouterr().out)
    assert timed["measurements"] and not timed.get("generation")
    assert main(["compare", str(saved)]) == 0
    assert "kdeval perplexity" not in capsys.readouterr().out
    # what earlier versions measured of it
    read_text(saved, 9.0)
    assert main(["export", str(saved), "--out", str(tmp_path / "out")]) == 0
    card = (tmp_path / "out" / "README.md").read_text()
    assert "pipeline_tag: text-classification" in card and "type: perplexity" not in card
    assert "perplexity.json was left out" in card
