"""Losses over the whole vocabulary, a run of positions at a time, against plain formulas on all logits in float64."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from student_train.losses import vocabulary
from student_train.losses.distributions import KeptTargets, SampledTargets, TopkTargets
from student_train.losses.vocabulary import LogitsTerm, projected_losses, recomputed_losses

VOCABULARY, POSITIONS, WIDTH, KEPT = 23, 11, 6, 5
REAL = torch.arange(POSITIONS) < 9


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def topk() -> TopkTargets:
    log_probs_PV = random(POSITIONS, VOCABULARY, seed=1).log_softmax(1)
    log_probs_PK, ids_PK = log_probs_PV.topk(KEPT)
    return TopkTargets(ids_PK, log_probs_PK, log_probs_PV.scatter(1, ids_PK, -math.inf).logsumexp(1), REAL)


def sampled() -> SampledTargets:
    generator = torch.Generator().manual_seed(2)
    ids_PK = torch.rand(POSITIONS, VOCABULARY, generator=generator).argsort(1)[:, :KEPT]
    return SampledTargets(ids_PK, torch.randint(1, 9, (POSITIONS, KEPT), generator=generator), REAL)


def original() -> SampledTargets:
    ids_P1 = torch.randint(VOCABULARY, (POSITIONS, 1), generator=torch.Generator().manual_seed(3))
    return SampledTargets(ids_P1, torch.ones_like(ids_P1), REAL)


TERMS = {
    "tail": [LogitsTerm(topk(), 1.0, 1.0)],
    "tail at 2": [LogitsTerm(topk(), 2.0, 3.0)],
    "renormalised": [LogitsTerm(KeptTargets(*topk()[:2], REAL), 1.5, 1.0)],
    "sampled": [LogitsTerm(sampled(), 1.0, 1.0)],
    "tokens": [LogitsTerm(original(), 1.0, 1.0)],
    "tail and tokens": [LogitsTerm(topk(), 2.0, 1.0), LogitsTerm(original(), 1.0, 0.5)],
    "tokens and renormalised": [LogitsTerm(original(), 1.0, 4.0), LogitsTerm(KeptTargets(*topk()[:2], REAL), 1.0, 0.1)],
}


def plain_loss(logits_PV: Tensor, term: LogitsTerm) -> Tensor:
    """tau^2 KL in float64 by autograd, from probabilities alone."""
    targets, tau = term.targets, term.temperature
    q_PV = (logits_PV.double() / tau).softmax(1)
    q_PK = q_PV.gather(1, targets.ids_PK)
    if isinstance(targets, SampledTargets):
        p_PK = targets.counts_PK.double() / targets.counts_PK.sum(1, keepdim=True)
    else:
        p_PK = targets.log_probs_PK.double().exp()
    if isinstance(targets, KeptTargets):
        p_PK, q_PK = p_PK / p_PK.sum(1, keepdim=True), q_PK / q_PK.sum(1, keepdim=True)
    kl_P = (p_PK * (p_PK / q_PK).log()).sum(1)
    if isinstance(targets, TopkTargets):
        rest_P = targets.log_tail_P.double().exp()
        kl_P = kl_P + rest_P * (rest_P / (1 - q_PK.sum(1))).log()
    return tau**2 * kl_P[targets.real_P].sum()


def inputs(dtype: torch.dtype = torch.float32) -> list[Tensor]:
    shapes = (POSITIONS, WIDTH), (VOCABULARY, WIDTH), (VOCABULARY,)
    return [random(*shape, seed=7 + n).to(dtype).requires_grad_() for n, shape in enumerate(shapes)]


def plain(terms: Sequence[LogitsTerm]) -> tuple[Tensor, list[Tensor]]:
    """The losses, and the gradients of their weighted sum."""
    hidden, weight, bias = inputs(torch.float64)
    losses = torch.stack([plain_loss(hidden @ weight.T + bias, term) for term in terms])
    total = sum(term.weight * loss for term, loss in zip(terms, losses, strict=True))
    return losses.detach(), list(torch.autograd.grad(total, [hidden, weight, bias]))  # type: ignore[arg-type]


def projected(parts: list[Tensor], terms: Sequence[LogitsTerm], at_a_time: int) -> Tensor:
    return projected_losses(*parts, terms, logits_at_a_time=at_a_time)


def recomputed(parts: list[Tensor], terms: Sequence[LogitsTerm], at_a_time: int) -> Tensor:
    hidden, weight, bias = parts

    def head(hidden_PD: Tensor) -> Tensor:
        return torch.nn.functional.linear(hidden_PD, weight, bias)

    return recomputed_losses(head, hidden, terms, vocab_size=VOCABULARY, logits_at_a_time=at_a_time)


WAYS = [projected, recomputed]


def weighted(losses: Tensor, terms: Sequence[LogitsTerm]) -> Tensor:
    return (losses * torch.tensor([term.weight for term in terms])).sum()


@pytest.mark.parametrize("positions_at_a_time", [0, 1, 4, POSITIONS, 99])
@pytest.mark.parametrize("name", TERMS)
@pytest.mark.parametrize("way", WAYS)
def test_losses_and_gradients_whatever_the_run(way: Callable[..., Tensor], name: str, positions_at_a_time: int) -> None:
    terms, parts = TERMS[name], inputs()
    expected, expected_gradients = plain(terms)
    # the odd one: a run is whole positions
    losses = way(parts, terms, positions_at_a_time * VOCABULARY + 1)
    torch.testing.assert_close(losses.detach().double(), expected, rtol=1e-5, atol=1e-6)
    gradients = torch.autograd.grad(0.25 * weighted(losses, terms), parts)
    for found, wanted in zip(gradients, expected_gradients, strict=True):
        torch.testing.assert_close(found.double(), 0.25 * wanted, rtol=1e-4, atol=1e-5)


def test_two_losses_in_one_pass_are_each_by_itself() -> None:
    terms = TERMS["tail and tokens"]
    parts = inputs()
    together = projected(parts, terms, 4 * VOCABULARY)
    gradients = torch.autograd.grad(weighted(together, terms), parts)
    separately = [projected(parts, [term], 4 * VOCABULARY) for term in terms]
    torch.testing.assert_close(together, torch.cat(separately))
    wanted = torch.autograd.grad(
        sum(term.weight * loss for term, (loss,) in zip(terms, separately, strict=True)), parts
    )
    for found, expected in zip(gradients, wanted, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


def test_a_bias_is_not_needed() -> None:
    hidden, weight, _ = inputs()
    losses = projected_losses(hidden, weight, None, TERMS["tail"], logits_at_a_time=4 * VOCABULARY)
    gradients = torch.autograd.grad(losses.sum(), [hidden, weight])
    with_zeros = projected([hidden, weight, torch.zeros(VOCABULARY)], TERMS["tail"], 4 * VOCABULARY)
    for found, expected in zip(gradients, torch.autograd.grad(with_zeros.sum(), [hidden, weight]), strict=True):
        torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("way", WAYS)
def test_no_positions_at_all(way: Callable[..., Tensor]) -> None:
    _, weight, bias = inputs()
    term = LogitsTerm(SampledTargets(*(part[:0] for part in sampled())), 1.0, 1.0)
    losses = way([torch.zeros(0, WIDTH), weight, bias], [term], VOCABULARY)
    assert losses.tolist() == [0] and not torch.autograd.grad(losses.sum(), weight)[0].any()


def test_the_same_numbers_every_time() -> None:
    def once() -> list[Tensor]:
        parts = inputs()
        losses = projected(parts, TERMS["tail and tokens"], 4 * VOCABULARY)
        return [losses, *torch.autograd.grad(weighted(losses, TERMS["tail and tokens"]), parts)]

    assert all(torch.equal(one, other) for one, other in zip(once(), once(), strict=True))


# ---- what a backward pass may be ------------------------------------------------------------------------------------


@pytest.mark.parametrize("upstream", [[1.0, 1.0], [1.0, 0.0], [0.0, 0.5]])
def test_losses_in_another_proportion_than_their_weights_have_no_gradient(upstream: list[float]) -> None:
    losses = projected(inputs(), TERMS["tail and tokens"], 4 * VOCABULARY)
    with pytest.raises(RuntimeError, match="in the proportion of their weights"):
        (losses * torch.tensor(upstream)).sum().backward()


def test_there_is_one_backward_pass() -> None:
    losses = projected(inputs(), TERMS["tail"], 4 * VOCABULARY)
    losses.sum().backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="one backward pass"):
        losses.sum().backward()


def test_a_weight_that_is_also_read_elsewhere_gets_both_gradients() -> None:
    _, weight, bias = inputs(torch.float64)
    ids_P = torch.arange(POSITIONS)
    terms = TERMS["tail"]
    (found,) = torch.autograd.grad(projected([weight[ids_P].tanh(), weight, bias], terms, 4 * VOCABULARY), weight)
    (expected,) = torch.autograd.grad(plain_loss(weight[ids_P].tanh() @ weight.T + bias, terms[0]), weight)
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-9)


def test_sums_of_bfloat16_gradients_are_float32() -> None:
    """Of 4,000 positions, one at a time: a sum in bfloat16 would stop growing after a few hundred."""
    positions = 4_000
    hidden, weight = random(1, WIDTH).repeat(positions, 1).bfloat16(), random(3, WIDTH, seed=1).bfloat16()
    parts = [part.requires_grad_() for part in (hidden, weight, torch.zeros(3, dtype=torch.bfloat16))]
    ids_P1 = torch.zeros(positions, 1, dtype=torch.int64)
    terms = [LogitsTerm(SampledTargets(ids_P1, torch.ones_like(ids_P1), torch.ones(positions).bool()), 1.0, 1.0)]
    losses = projected(parts, terms, 3)
    assert losses.dtype == torch.float32
    gradients = torch.autograd.grad(losses.sum(), parts)
    in_float64 = [part.detach().double().requires_grad_() for part in parts]
    expected = plain_loss(in_float64[0] @ in_float64[1].T + in_float64[2], terms[0])
    assert losses.item() == pytest.approx(expected.item(), rel=1e-2)
    for found, wanted in zip(gradients, torch.autograd.grad(expected, in_float64), strict=True):
        assert found.dtype == torch.bfloat16
        assert (found.double() - wanted).norm() < 0.02 * wanted.norm()


# ---- what it costs --------------------------------------------------------------------------------------------------


class Watch(TorchDispatchMode):
    """Matrix products, and the most elements of any tensor that an operation returns."""

    def __init__(self) -> None:
        super().__init__()
        self.products, self.largest = 0, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        self.products += func.overloadpacket in (torch.ops.aten.mm, torch.ops.aten.addmm, torch.ops.aten.addmm_)
        for tensor in result if isinstance(result, tuple | list) else (result,):
            if isinstance(tensor, Tensor):
                self.largest = max(self.largest, tensor.numel())
        return result


@pytest.mark.parametrize(("trained", "products"), [((0, 1, 2), 3), ((0,), 2), ((1, 2), 2), ((), 1)])
def test_no_product_is_computed_twice_or_for_nothing(trained: tuple[int, ...], products: int) -> None:
    parts = [part.requires_grad_(place in trained) for place, part in enumerate(inputs())]
    with Watch() as watch:
        losses = projected(parts, TERMS["tail and tokens"], POSITIONS * VOCABULARY)
        if trained:
            weighted(losses, TERMS["tail and tokens"]).backward()
    assert watch.products == products
    assert [part.grad is not None for part in parts] == [place in trained for place in range(3)]
    with torch.no_grad(), Watch() as watch:
        without = projected(inputs(), TERMS["tail and tokens"], POSITIONS * VOCABULARY)
    assert watch.products == 1
    torch.testing.assert_close(without, losses.detach(), rtol=0, atol=0)


@pytest.mark.parametrize("way", WAYS)
def test_runs_of_the_other_way_are_computed_again_and_none_is_kept(way: Callable[..., Tensor]) -> None:
    with Watch() as watch:
        way(inputs(), TERMS["tail"], 4 * VOCABULARY).sum().backward()
    assert watch.products == {projected: 3 * 3, recomputed: 3 * 4}[way]
    assert watch.largest == max(4 * VOCABULARY, VOCABULARY * WIDTH)


@pytest.mark.parametrize(("names", "way"), list(itertools.product([("topk",), ("sampled", "topk")], WAYS)))
def test_a_vocabulary_of_250002_never_makes_all_logits(names: tuple[str, ...], way: Callable[..., Tensor]) -> None:
    vocabulary, positions, width = 250_002, 40, 4
    ids_PK = torch.arange(8).repeat(positions, 1) + vocabulary - 8
    real_P = torch.ones(positions, dtype=torch.bool)
    targets = {
        "topk": TopkTargets(
            ids_PK, torch.full((positions, 8), math.log(0.1)), torch.full((positions,), math.log(0.2)), real_P
        ),
        "sampled": SampledTargets(ids_PK, torch.ones(positions, 8, dtype=torch.int32), real_P),
    }
    terms = [LogitsTerm(targets[name], 1.0, 1.0) for name in names]
    parts = [random(*shape).requires_grad_() for shape in ((positions, width), (vocabulary, width), (vocabulary,))]
    at_a_time = 8 * vocabulary
    with Watch() as watch:
        if way is projected:
            projected(parts, terms, at_a_time).sum().backward()
        else:
            hidden, weight, bias = parts
            recomputed_losses(
                lambda hidden_PD: torch.nn.functional.linear(hidden_PD, weight, bias), hidden, terms,
                vocab_size=vocabulary, logits_at_a_time=at_a_time,
            ).sum().backward()  # fmt: skip
    assert watch.largest == at_a_time
    assert parts[1].grad is not None and parts[1].grad[-8:].abs().min() > 0


def test_runs_are_longer_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    cpu, gpu = torch.device("cpu"), torch.device("cuda")
    assert vocabulary._positions_at_a_time(None, cpu, 250_002) == 134
    assert vocabulary._positions_at_a_time(None, gpu, 250_002) == 1073
    assert vocabulary._positions_at_a_time(500, gpu, 200) == 2 and vocabulary._positions_at_a_time(1, cpu, 200) == 1


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_gpu_adds_to_the_sum_in_the_product_itself(dtype: torch.dtype) -> None:
    device = torch.device("cuda", torch.cuda.current_device())
    assert vocabulary._adds_into_wider_sums(device)
    generator = torch.Generator().manual_seed(0)
    hidden_PE, weight_VE = (
        torch.randn(shape, generator=generator).to(device, dtype) for shape in ((300, 64), (500, 64))
    )
    sums = vocabulary._Gradients(hidden_PE, weight_VE, None, (False, True, False))
    gradient_PV = torch.randn(300, 500, generator=generator).to(device)
    for positions in (slice(0, 200), slice(200, 300)):
        sums.add(positions, gradient_PV[positions])
    expected_VE = gradient_PV.to(dtype).double().T @ hidden_PE.double()
    # far below what rounding the product to the student's type would leave
    torch.testing.assert_close(sums.for_weight.double(), expected_VE, rtol=0, atol=1e-4)
