"""Encoders with a fresh head: whose weights are whose, and which directories are refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForSequenceClassification

from student_train.evaluate.finetune.model import load_for_task, load_tokenizer
from student_train.evaluate.finetune.tasks import TASKS
from tests.student_train.evaluate.causal_models import make_causal


@pytest.mark.parametrize("family", ["bert", "roberta", "xlm-roberta", "distilbert", "electra", "modernbert"])
@pytest.mark.parametrize("task", ["rte", "ner"])
def test_encoder_of_the_directory_and_head_of_the_seed(family: str, task: str, tiny_teacher: Any) -> None:
    folder = tiny_teacher(family)
    names = ("entailment", "not_entailment")
    states = [load_for_task(folder, TASKS[task], names, seed).state_dict() for seed in (0, 0, 1)]
    assert all(torch.equal(value, states[1][name]) for name, value in states[0].items())
    differing = {name for name, value in states[0].items() if not torch.equal(value, states[2][name])}
    assert any("classifier" in name and name.endswith("weight") for name in differing)
    assert all("classifier" in name or "pooler" in name for name in differing)
    stored = load_file(folder / "model.safetensors")
    shared = [name for name in states[0] if name in stored]
    assert len(shared) > 20 and all(torch.equal(states[0][name], stored[name]) for name in shared)


def test_head_of_an_earlier_finetuning_is_not_used(tiny_teacher: Any, tmp_path: Path) -> None:
    for classes in (2, 3):
        model = AutoModelForSequenceClassification.from_pretrained(tiny_teacher("bert"), num_labels=classes)
        torch.nn.init.constant_(model.classifier.weight, 7.0)
        model.save_pretrained(tmp_path / "tuned")
        loaded = load_for_task(tmp_path / "tuned", TASKS["sst2"], TASKS["sst2"].labels, 0)
        assert loaded.classifier.weight.shape[0] == 2
        assert loaded.classifier.weight.abs().max() < 2
        assert torch.equal(loaded.base_model.embeddings.word_embeddings.weight,
                           model.base_model.embeddings.word_embeddings.weight)  # fmt: skip


@pytest.mark.parametrize("config_says", [None, 7])
def test_the_head_of_a_decoder_reads_the_last_token_of_each_text(tmp_path: Path, config_says: int | None) -> None:
    """Whatever stands behind it in a batch, and whichever id, if any, the configuration calls padding."""
    folder = make_causal(tmp_path / "decoder", "qwen2", pad_token_id=config_says)
    tokenizer = load_tokenizer(folder, TASKS["sst2"])
    assert tokenizer.pad_token == tokenizer.eos_token, "decoders come without one of their own"
    model = load_for_task(folder, TASKS["sst2"], TASKS["sst2"].labels, 0, pad_id=tokenizer.pad_token_id).eval()
    texts = ["the cat", "a dog hears the old bird and sees", "new"]
    together = tokenizer(texts, padding=True, return_tensors="pt")
    with torch.no_grad():
        found = model(input_ids=together.input_ids, attention_mask=together.attention_mask).logits
        for text, logits in zip(texts, found, strict=True):
            torch.testing.assert_close(logits, model(**tokenizer(text, return_tensors="pt")).logits[0])
    assert not torch.allclose(found[0], found[1])
