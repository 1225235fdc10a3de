"""Batches in a student's ids: the losses they lead to are those of the distribution conditional on kept ids."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch

from student_train.losses.distributions import SampledTargets, logits_loss, within_vocabulary
from student_train.methods.od import make_distribution_transfer, make_token_prediction
from student_train.students.vocabulary.kept_ids import KeptIds
from student_train.students.vocabulary.mapping import IdMapping
from teacher_cache.contract.batch import SampledLogits, TopkLogits

KEPT = KeptIds.of([*range(5), *range(5, 200, 2)], 200, 1)


def test_inputs_labels_and_targets(tiny_teacher: Any, live_cache: Any) -> None:
    cache = live_cache(tiny_teacher("bert"), logits=True)
    before = cache.batch([12, 7, 5])["masked"]
    after = IdMapping(KEPT).batch(before)
    numbers = {old: own for own, old in enumerate(KEPT.ids_K.tolist())}
    for old, own in zip(before.input_ids_BT.flatten().tolist(), after.input_ids_BT.flatten().tolist(), strict=True):
        assert own == numbers.get(old, numbers[1])
    assert after.places is not None and before.places is not None
    assert isinstance(before.logits, TopkLogits) and isinstance(after.logits, TopkLogits)
    pairs = [
        (before.places.label_ids_BM, after.places.label_ids_BM),
        (before.logits.ids_BMK, after.logits.ids_BMK),
    ]
    for olds, owns in pairs:
        assert owns.dtype == olds.dtype
        for old, own in zip(olds.flatten().tolist(), owns.flatten().tolist(), strict=True):
            assert own == numbers.get(old, len(KEPT))
    assert torch.equal(after.places.positions_BM, before.places.positions_BM)
    assert torch.equal(after.logits.log_probs_BMK, before.logits.log_probs_BMK)
    assert after.hidden.keys() == before.hidden.keys()


@pytest.mark.parametrize("topk_loss", ["tail", "renormalise"])
def test_the_loss_is_that_of_kept_ids(topk_loss: Any, tiny_teacher: Any, live_cache: Any) -> None:
    """Against every place by itself, in float64."""
    cache = live_cache(tiny_teacher("bert"), logits=True)
    plain = cache.batch([12, 7, 5])["masked"]
    config = type("Config", (), {"vocab_size": len(KEPT)})()
    transfer = make_distribution_transfer(cache.manifest, config, topk_loss, trimmed=True)
    targets = transfer.targets(IdMapping(KEPT).batch(plain))
    logits = torch.randn(len(targets.real_P), len(KEPT), dtype=torch.float64, requires_grad=True)
    loss = logits_loss(logits, targets)
    expected, left_out = torch.zeros((), dtype=torch.float64), 0
    log_q = logits.log_softmax(1)
    for place, (ids, log_p) in enumerate(
        zip(plain.logits.ids_BMK.flatten(0, 1), plain.logits.log_probs_BMK.double().flatten(0, 1), strict=True)
    ):
        if not plain.places.real_BM().flatten()[place]:
            continue
        kept = [(KEPT.own(int(each)), float(p)) for each, p in zip(ids, log_p, strict=True)]
        there = [(own, math.exp(p)) for own, p in kept if own is not None]
        left_out += len(kept) - len(there)
        if not there:
            continue
        q = torch.stack([log_q[place, own].exp() for own, _ in there])
        p = torch.tensor([each for _, each in there], dtype=torch.float64)
        if topk_loss == "tail":
            p, q = (torch.cat([each, 1 - each.sum(0, keepdim=True)]) for each in (p, q))
        else:
            p, q = p / p.sum(), q / q.sum()
        expected = expected + (p * (p / q).log()).sum()
    assert left_out > 0
    # the mass outside is stored in float32
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-6)
    gradients = [torch.autograd.grad(each, logits, retain_graph=True)[0] for each in (loss, expected)]
    torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-6)


def test_draws_are_unbiased_for_the_distribution_over_kept_ids() -> None:
    """Over all 5^3 ways to draw 3 of 5 ids, of which 0, 2 and 3 are kept."""
    p = torch.tensor([0.1, 0.25, 0.2, 0.15, 0.3], dtype=torch.float64)
    kept = KeptIds.of([0, 2, 3], 5, 0)
    mapping, share, some = IdMapping(kept), torch.zeros(3, dtype=torch.float64), 0.0
    logits = torch.tensor([[0.3, -0.2, 0.5]], dtype=torch.float64, requires_grad=True)
    gradient = torch.zeros(1, 3, dtype=torch.float64)
    for draws in itertools.product(range(5), repeat=3):
        ids = sorted(set(draws))
        own = mapping._targets(torch.tensor([ids]))
        targets = SampledTargets(own, torch.tensor([[draws.count(each) for each in ids]]), torch.tensor([True]))
        found = within_vocabulary(targets, 3)
        chance = float(p[list(draws)].prod())
        if not found.real_P.item():
            continue
        some += chance
        counts = found.counts_PK.double()
        share += chance * torch.zeros(1, 3).double().scatter_add(1, found.ids_PK.long(), counts / counts.sum())[0]
        gradient += chance * torch.autograd.grad(logits_loss(logits, found), logits)[0]
    conditional = p[kept.ids_K] / p[kept.ids_K].sum()
    torch.testing.assert_close(share / some, conditional)
    torch.testing.assert_close(gradient / some, logits.detach().softmax(1) - conditional)


def test_places_of_dropped_labels_have_no_hard_loss(tiny_teacher: Any, live_cache: Any) -> None:
    cache = live_cache(tiny_teacher("bert"), logits=True)
    plain = cache.batch([12, 12, 12])["masked"]
    config = type("Config", (), {"vocab_size": len(KEPT)})()
    targets = make_token_prediction(cache.manifest, config, trimmed=True).targets(IdMapping(KEPT).batch(plain))
    labels, real = plain.places.label_ids_BM.flatten(), plain.places.real_BM().flatten()
    kept = torch.tensor([KEPT.own(int(label)) is not None for label in labels])
    assert torch.equal(targets.real_P, real & kept)
    assert 0 < int(targets.real_P.sum()) < int(real.sum())


def test_devices_and_draws() -> None:
    logits = SampledLogits(ids_BMK=torch.tensor([[[6, 7, 0]]]), counts_BMK=torch.tensor([[[2, 1, 0]]]))
    mapping = IdMapping(KEPT)
    assert mapping.dropped(logits.ids_BMK).tolist() == [[[True, False, False]]]
    assert mapping.inputs(torch.tensor([6, 7])).tolist() == [1, KEPT.own(7)]
