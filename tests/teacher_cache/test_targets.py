"""Top-k with tail mass against plain float64."""

from __future__ import annotations

import pytest
import torch

from teacher_cache.targets import topk_log_probabilities


@pytest.mark.parametrize("temperature", [1.0, 0.5, 4.0])
@pytest.mark.parametrize("scale", [0.1, 3.0, 40.0])
def test_topk_and_tail_against_float64(temperature: float, scale: float) -> None:
    logits_PV = torch.randn(30, 500, generator=torch.Generator().manual_seed(1)) * scale
    have = topk_log_probabilities(logits_PV, 16, temperature)
    for place in range(30):
        probabilities = torch.softmax(logits_PV[place].double() / temperature, 0)
        order = torch.argsort(probabilities, descending=True)
        assert torch.equal(have.ids_PK[place], order[:16])
        assert torch.allclose(have.log_probs_PK[place].double(), probabilities[order[:16]].log(), rtol=1e-5, atol=1e-5)
        tail = probabilities[order[16:]].sum().log()
        assert have.log_tail_P[place].double() == pytest.approx(float(tail), rel=1e-5, abs=1e-5)


def test_kept_mass_and_tail_are_one_even_where_the_tail_is_tiny() -> None:
    logits_PV = torch.zeros(1, 100)
    logits_PV[0, 0] = 40.0
    have = topk_log_probabilities(logits_PV, 1, 1.0)
    # 1 - p would be 0 in float32; the tail is 99 e^-40
    assert float(have.log_tail_P[0]) == pytest.approx(-40 + torch.log(torch.tensor(99.0)).item(), rel=1e-6)


def test_the_whole_vocabulary_leaves_no_tail() -> None:
    have = topk_log_probabilities(torch.randn(3, 8), 8, 1.0)
    assert torch.isneginf(have.log_tail_P).all()
    assert torch.allclose(have.log_probs_PK.exp().sum(1), torch.ones(3), atol=1e-6)
