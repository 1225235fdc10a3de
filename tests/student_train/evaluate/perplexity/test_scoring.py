"""Nats of windows: those of plain log-probabilities in float64, in memory that the number of ids does not decide."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from student_train.evaluate.perplexity import scoring
from student_train.evaluate.perplexity.scoring import Scorer
from student_train.evaluate.perplexity.windows import Window
from tests.student_train.evaluate.causal_models import SIZES

FAMILIES = ("llama", "gpt2", "qwen2", "gemma2", "cohere")
"""Grouped queries; positions in a table; a bias; soft caps of the logits; a scale of the logits."""


def make_model(family: str, vocab_size: int = 60, **sizes: Any) -> PreTrainedModel:
    torch.manual_seed(1)
    config = AutoConfig.for_model(
        family, vocab_size=vocab_size, bos_token_id=0, eos_token_id=1, pad_token_id=None, **{**SIZES, **sizes}
    )
    if family == "gemma2":
        config.final_logit_softcapping = 2.0
    if family == "cohere":
        config.logit_scale = 0.5
    return AutoModelForCausalLM.from_config(config).eval()


def some_windows(vocab_size: int = 60) -> list[Window]:
    draw = torch.Generator().manual_seed(0)
    sizes = ((12, 11), (7, 2), (12, 5), (2, 1))
    return [
        Window(tuple(torch.randint(vocab_size, (length,), generator=draw).tolist()), count) for length, count in sizes
    ]


@torch.no_grad()
def plain_nats(model: PreTrainedModel, window: Window) -> float:
    """All logits of one window alone, in float64."""
    log_probs_TV = model.double()(input_ids=torch.tensor([window.ids])).logits[0].log_softmax(-1)
    first = len(window.ids) - window.predicted
    return -sum(float(log_probs_TV[place - 1, window.ids[place]]) for place in range(first, len(window.ids)))


@pytest.mark.parametrize("family", FAMILIES)
def test_nats_are_those_of_all_logits(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scoring, "CHUNK_LOGITS", 60 * 4)  # 19 predictions in five pieces
    model, found = make_model(family), some_windows()
    together = Scorer(model).nats(found)
    alone = [Scorer(model).nats([window]) for window in found]
    expected = [plain_nats(model, window) for window in found]
    assert alone == pytest.approx(expected, rel=2e-5)
    assert together == pytest.approx(sum(expected), rel=1e-5)  # padding changes nothing


class LargestTensor(TorchDispatchMode):
    """The most elements of any tensor that an operation returns."""

    def __init__(self) -> None:
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        leaves = [leaf for leaf in tree_leaves(result) if isinstance(leaf, torch.Tensor)]
        # views of the weights are no memory
        fresh = [leaf for leaf in leaves if leaf._base is None and not func.is_view]
        self.elements = max([self.elements, *(leaf.numel() for leaf in fresh)])
        return result


def test_262144_ids_in_bounded_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    vocabulary = 262_144
    small = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1, "num_key_value_heads": 1}
    model = make_model("llama", vocabulary, **small, tie_word_embeddings=True)
    monkeypatch.setattr(scoring, "CHUNK_LOGITS", 4 * vocabulary)
    draw = torch.Generator().manual_seed(0)
    long = [Window(tuple(torch.randint(vocabulary, (12,), generator=draw).tolist()), 11) for _ in range(2)]
    scorer = Scorer(model)
    with LargestTensor() as seen:
        nats = scorer.nats(long)
    assert seen.elements <= 4 * vocabulary  # where all logits would be 24 times as many
    assert nats == pytest.approx(sum(plain_nats(model, window) for window in long), rel=1e-5)
