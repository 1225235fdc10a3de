"""MiniLMv2 on real activations: our loss against an independent implementation of the paper, in float64.

Wang et al., "MiniLMv2: Multi-Head Self-Attention Relation Distillation for Compressing Pretrained Transformers",
Findings of ACL 2021, equations 2 to 5: queries, keys and values of all heads are concatenated, split into relation
heads, related by scaled dot products, and the rows' distributions compared by the KL divergence.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModel, AutoTokenizer, BertConfig, BertModel

from student_train.losses.relations import relation_loss
from teacher_cache.contract.batch import AttentionVectors
from teacher_cache.models.attention_tap import enable_tap, record_attention

TEXTS = (
    "The cat sat on the mat.",
    "Distillation transfers what a large network has learnt to a small one, which is then cheap enough to be used.",
    "Knowledge!",
)


def minilm_by_the_paper(teacher_TD: Tensor, student_TD: Tensor, heads: int) -> Tensor:
    """Equation 5 for one relation of one row without padding: mean over heads and positions."""
    relations = []
    for vectors_TD in (teacher_TD, student_TD):
        parts = vectors_TD.double().chunk(heads, dim=1)
        scores = [part @ part.T / part.shape[1] ** 0.5 for part in parts]
        relations.append(torch.stack([torch.softmax(each, dim=1) for each in scores]))
    teacher_ATT, student_ATT = relations
    return (teacher_ATT * (teacher_ATT / student_ATT).log()).sum(-1).mean()


@pytest.fixture(scope="module")
def activations(shared_teacher: Path) -> tuple[AttentionVectors, AttentionVectors, Tensor]:
    """Vectors of layer 5 of the teacher and of the last layer of a narrower student, on three texts."""
    words = AutoTokenizer.from_pretrained(shared_teacher)(list(TEXTS), padding=True, return_tensors="pt")
    teacher = AutoModel.from_pretrained(shared_teacher).eval()
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=teacher.config.vocab_size, hidden_size=192, num_hidden_layers=3, num_attention_heads=6,
        intermediate_size=768, initializer_range=0.1,
    )  # fmt: skip
    student = BertModel(config).eval()
    found = []
    for model, layer in ((teacher, 5), (student, 3)):
        enable_tap(model)
        with torch.no_grad(), record_attention(model, [layer]) as recorded:
            model(input_ids=words["input_ids"], attention_mask=words["attention_mask"])
        found.append(recorded.vectors[layer])
    return found[0], found[1], words["attention_mask"].sum(1)


@pytest.mark.parametrize("heads", [24, 12])
def test_value_and_gradient_on_real_activations(activations: Any, heads: int) -> None:
    teacher, student, length_B = activations
    names = ("query_BTD", "key_BTD", "value_BTD")
    # one weight each, so that a mix-up of the three would show
    weights = (1.0, 0.5, 2.0)
    ours = AttentionVectors(**{name: getattr(student, name).clone().requires_grad_() for name in names})
    loss = relation_loss(ours, teacher, length_B, heads=heads, weights=weights)
    loss.total.backward()
    assert int(loss.count) == int(length_B.sum())

    plain = {name: getattr(student, name).double().requires_grad_() for name in names}
    total = torch.zeros((), dtype=torch.float64)
    for weight, name in zip(weights, names, strict=True):
        for row, length in enumerate(length_B.tolist()):
            pair = getattr(teacher, name)[row, :length], plain[name][row, :length]
            total = total + weight * length * minilm_by_the_paper(*pair, heads)
    total.backward()
    assert 0.1 < float(total / length_B.sum()) < 100
    assert float(loss.total) == pytest.approx(float(total), rel=1e-5)
    for name in names:
        found, expected = getattr(ours, name).grad, plain[name].grad
        assert found is not None and expected is not None
        assert float((found.double() - expected).norm() / expected.norm()) < 1e-5
