"""Losses of hidden states against their formulas in float64, one position at a time, and what must not change them."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from student_train.losses.hidden import (
    attended_state_loss,
    deviation,
    first_token_loss,
    hidden_state_loss,
    transport_costs,
    transported_state_loss,
)
from student_train.losses.sums import LossSum

LENGTHS = (7, 3, 1)
STUDENT_WIDTH, WIDTH, LAYERS = 5, 8, 4
VARIANCES = (3.5, 20.0, 0.7, 8.0)
DEVIATIONS = tuple(deviation(variance, WIDTH) for variance in VARIANCES)
FLOW = ((0.25, 0.0, 0.1, 0.0), (0.0, 0.3, 0.0, 0.35))


def random(*shape: int, seed: int = 0, scale: float = 1.0) -> Tensor:
    return scale * torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def real(positions: int = 7) -> Tensor:
    return torch.arange(positions)[None, :] < torch.tensor(LENGTHS)[:, None]


def teacher_states() -> list[Tensor]:
    return [random(3, 7, WIDTH, seed=10 + n, scale=scale) for n, scale in enumerate(DEVIATIONS)]


def student_states() -> list[Tensor]:
    return [random(3, 7, STUDENT_WIDTH, seed=20 + n).requires_grad_() for n in range(2)]


def maps(seed: int = 0) -> list[nn.Linear]:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return [nn.Linear(STUDENT_WIDTH, WIDTH) for _ in range(2)]


def test_sinks_add_nothing_and_are_counted() -> None:
    """However large they are, and to the last bit as if they were what the student says."""
    student, teacher, projection = student_states()[0], teacher_states()[0], maps()[0]
    ordinary_BT = real()
    ordinary_BT[:, 0] = False
    huge = teacher.clone()
    huge[:, 0] *= 1e4
    found = hidden_state_loss(student, huge, real(), projection, VARIANCES[0], ordinary_BT)
    expected = sum(
        float((projection(student[row, position]) - teacher[row, position]).double().square().sum()) / VARIANCES[0]
        for row, length in enumerate(LENGTHS)
        for position in range(1, length)
    )
    assert found.total.item() == pytest.approx(expected, rel=1e-5) and int(found.count) == sum(LENGTHS)
    assert torch.equal(
        hidden_state_loss(student, teacher, real(), projection, VARIANCES[0]).total,
        hidden_state_loss(student, teacher, real(), projection, VARIANCES[0], real()).total,
    )


def attended(students: list[Tensor], teachers: list[Tensor], mask: Tensor, projections: list[Any]) -> LossSum:
    """Both student layers, as `alp` adds them."""
    parts = [
        attended_state_loss(states, teachers, mask, projection, DEVIATIONS)
        for states, projection in zip(students, projections, strict=True)
    ]
    return LossSum(parts[0].total + parts[1].total, parts[0].count)


def transported(students: list[Tensor], teachers: list[Tensor], mask: Tensor, projections: list[Any]) -> LossSum:
    mapped = [projection(states) for states, projection in zip(students, projections, strict=True)]
    costs = transport_costs(mapped, teachers, mask, DEVIATIONS)
    return transported_state_loss(mapped, teachers, mask, DEVIATIONS, FLOW, costs)


def matched(students: list[Tensor], teachers: list[Tensor], mask: Tensor, projections: list[Any]) -> LossSum:
    return hidden_state_loss(students[0], teachers[1], mask, projections[0], VARIANCES[1])


def first_tokens(students: list[Tensor], teachers: list[Tensor], mask: Tensor, projections: list[Any]) -> LossSum:
    return first_token_loss(students[0], teachers[1], projections[0])


LOSSES: dict[str, Callable[[list[Tensor], list[Tensor], Tensor, list[Any]], LossSum]] = {
    "pairs": matched,
    "skip": first_tokens,
    "emd": transported,
    "alp": attended,
}


# ---- each loss written out, in float64 ------------------------------------------------------------------------------


def apply(projection: nn.Linear, state: Tensor) -> Tensor:
    return projection.weight.double() @ state.double() + projection.bias.double()


def matched_by_hand(student: Tensor, teacher: list[Tensor], projection: nn.Linear) -> Tensor:
    return (apply(projection, student) - teacher[1].double()).square().sum() / VARIANCES[1]


def attended_by_hand(student: Tensor, teacher: list[Tensor], projection: nn.Linear) -> Tensor:
    """Passban et al. 2021, section 3: weights by a softmax of dot products, their mean as the target of the MSE."""
    query = apply(projection, student)
    keys = [state.double() / scale for state, scale in zip(teacher, DEVIATIONS, strict=True)]
    exponentials = [(query @ key / math.sqrt(WIDTH)).exp() for key in keys]
    combined = sum(part / sum(exponentials) * key for part, key in zip(exponentials, keys, strict=True))
    return (query - combined).square().mean()


def transported_by_hand(student: Tensor, teacher: list[Tensor], projection: nn.Linear, shares: Any) -> Tensor:
    """Li et al. 2020, section 3: sum f d / sum f, d the mean squared errors."""
    query, total = apply(projection, student), torch.zeros((), dtype=torch.float64)
    for share, state, scale in zip(shares, teacher, DEVIATIONS, strict=True):
        total = total + share / sum(map(sum, FLOW)) * (query - state.double() / scale).square().mean()
    return total


def by_hand(name: str, students: list[Tensor], teachers: list[Tensor], projections: list[nn.Linear]) -> Tensor:
    total = torch.zeros((), dtype=torch.float64)
    for row, length in enumerate(LENGTHS):
        for i in range(length):
            teacher = [states[row, i] for states in teachers]
            if name == "pairs":
                total = total + matched_by_hand(students[0][row, i], teacher, projections[0])
            for layer, projection in enumerate(projections):
                if name == "alp":
                    total = total + attended_by_hand(students[layer][row, i], teacher, projection)
                elif name == "emd":
                    total = total + transported_by_hand(students[layer][row, i], teacher, projection, FLOW[layer])
        if name == "skip":
            # Sun et al. 2019, section 3.2: normalised states of the first token
            ours, theirs = apply(projections[0], students[0][row, 0]), teachers[1][row, 0].double()
            total = total + (ours / ours.norm() - theirs / theirs.norm()).square().sum()
    return total


@pytest.mark.parametrize("name", LOSSES)
def test_values_and_gradients_are_those_of_the_formula(name: str) -> None:
    found = []
    for loss in (lambda *parts: LOSSES[name](*parts[:2], real(), parts[2]).total, lambda *parts: by_hand(name, *parts)):
        students, projections = student_states(), maps()
        total = loss(students, teacher_states(), projections)
        total.backward()
        gradients = [parameter.grad for projection in projections for parameter in projection.parameters()]
        found.append((total.item(), [part for part in (*(s.grad for s in students), *gradients) if part is not None]))
    (value, gradients), (expected, expected_gradients) = found
    assert value == pytest.approx(expected, rel=1e-5)
    assert len(gradients) == len(expected_gradients) >= 3
    for ours, theirs in zip(gradients, expected_gradients, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", LOSSES)
def test_what_is_counted(name: str) -> None:
    loss = LOSSES[name](student_states(), teacher_states(), real(), list(maps()))
    assert int(loss.count) == (len(LENGTHS) if name == "skip" else sum(LENGTHS))
    assert loss.count.dtype == torch.int64 and loss.total.dtype == torch.float32


# ---- what must not change them --------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", LOSSES)
def test_a_rotation_of_targets_and_maps_changes_nothing(name: str) -> None:
    rotation, _ = torch.linalg.qr(random(WIDTH, WIDTH, seed=5).double())
    rotation = rotation.float()
    rotated = maps()
    with torch.no_grad():
        for projection in rotated:
            projection.weight.copy_(rotation.T @ projection.weight)
            projection.bias.copy_(rotation.T @ projection.bias)
    before = LOSSES[name](student_states(), teacher_states(), real(), maps()).total.item()
    turned = [states @ rotation for states in teacher_states()]
    assert LOSSES[name](student_states(), turned, real(), rotated).total.item() == pytest.approx(before, rel=1e-5)
    # and a rotation of the targets alone is not for free
    assert LOSSES[name](student_states(), turned, real(), maps()).total.item() != pytest.approx(before, rel=1e-4)


@pytest.mark.parametrize("name", LOSSES)
def test_padding_changes_neither_values_nor_gradients(name: str) -> None:
    found = []
    for padding, columns in ((0.0, 0), (1e3, 5)):
        students, projections = student_states(), maps()
        padded = [torch.cat([states, torch.zeros(3, columns, STUDENT_WIDTH)], dim=1) for states in students]
        mask = torch.cat([real(), torch.zeros(3, columns, dtype=torch.bool)], dim=1)
        taught = [torch.cat([states, torch.zeros(3, columns, WIDTH)], dim=1) for states in teacher_states()]
        taught = [torch.where(mask[..., None], states, padding) for states in taught]
        padded = [torch.where(mask[..., None], states, -padding) for states in padded]
        loss = LOSSES[name](padded, taught, mask, projections)
        loss.total.backward()
        gradients = [part.grad for part in (*students, *projections[0].parameters()) if part.grad is not None]
        found.append((loss, gradients))
        assert not any(gradient[~real()].any() for gradient in gradients if gradient.ndim == 3)
    assert found[1][0].total.item() == pytest.approx(found[0][0].total.item(), rel=1e-6)
    assert found[1][0].count == found[0][0].count
    for ours, theirs in zip(found[1][1], found[0][1], strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", LOSSES)
def test_rows_are_independent_and_their_order_permutes_their_losses(name: str) -> None:
    def rows(order: list[int]) -> float:
        students = [states[order] for states in student_states()]
        return LOSSES[name](
            students, [states[order] for states in teacher_states()], real()[order], maps()
        ).total.item()

    alone = [rows([row]) for row in range(3)]
    assert len({round(value, 4) for value in alone}) == 3
    assert rows([0, 1, 2]) == pytest.approx(sum(alone), rel=1e-5)
    assert rows([2, 0, 1]) == pytest.approx(sum(alone), rel=1e-5)
    assert rows([1, 2]) == pytest.approx(alone[1] + alone[2], rel=1e-5)


def test_hidden_state_loss_leaves_out_padding_that_is_no_number() -> None:
    teacher = random(3, 7, WIDTH)
    teacher[~real()] = float("nan")
    assert math.isfinite(hidden_state_loss(student_states()[0], teacher, real(), maps()[0], 3.5).total.item())


def test_hidden_state_loss_is_one_per_position_for_the_best_constant() -> None:
    teacher = random(3, 7, WIDTH)
    flat = teacher[real()]
    variance = float((flat - flat.mean(0)).square().sum(1).mean())
    constant = nn.Linear(STUDENT_WIDTH, WIDTH)
    with torch.no_grad():
        constant.weight.zero_()
        constant.bias.copy_(flat.mean(0))
    loss = hidden_state_loss(student_states()[0], teacher, real(), constant, variance)
    assert (loss.total / loss.count).item() == pytest.approx(1, rel=1e-5)


def test_first_tokens_of_one_width_need_no_map_and_have_no_scale() -> None:
    student, teacher = random(3, 7, WIDTH), random(3, 7, WIDTH, seed=1)
    loss = first_token_loss(student, teacher, None).total.item()
    assert 0 < loss < 4 * 3
    assert first_token_loss(100 * student, 0.01 * teacher, None).total.item() == pytest.approx(loss, rel=1e-5)
    assert first_token_loss(7 * teacher, teacher, None).total.item() == pytest.approx(0, abs=1e-5)
    assert first_token_loss(-teacher, teacher, None).total.item() == pytest.approx(4 * 3)
    assert first_token_loss(student.bfloat16(), teacher, None).total.dtype == torch.float32


def test_a_flow_to_one_layer_is_the_loss_of_that_pair() -> None:
    students, teachers, projections = student_states(), teacher_states(), maps()
    mapped = [projections[0](students[0])]
    costs = transport_costs(mapped, teachers, real(), DEVIATIONS)
    alone = transported_state_loss(mapped, teachers, real(), DEVIATIONS, ((0.0, 0.0, 2.0, 0.0),), costs).total
    scaled = [states / scale for states, scale in zip(teachers, DEVIATIONS, strict=True)]
    pair = hidden_state_loss(students[0], scaled[2], real(), projections[0], WIDTH).total
    assert alone.item() == pytest.approx(pair.item(), rel=1e-5)
    ours, theirs = (torch.autograd.grad(total, students[0], retain_graph=True)[0] for total in (alone, pair))
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)


def test_costs_are_those_of_all_pairs_and_need_no_gradient() -> None:
    students, teachers, projections = student_states(), teacher_states(), maps()
    mapped = [projection(states) for states, projection in zip(students, projections, strict=True)]
    costs = transport_costs(mapped, teachers, real(), DEVIATIONS)
    assert costs.shape == (2, LAYERS) and costs.dtype == torch.float64 and not costs.requires_grad
    for i, states in enumerate(mapped):
        for j, (teacher, scale) in enumerate(zip(teachers, DEVIATIONS, strict=True)):
            expected = (states - teacher / scale)[real()].double().square().sum() / WIDTH
            assert costs[i, j].item() == pytest.approx(expected.item(), rel=1e-5)


def test_attention_to_one_layer_is_the_loss_of_that_pair() -> None:
    """A teacher layer that is far more like the student than the others gets all the weight."""
    students, projections = student_states(), maps()
    near = 30 * projections[0](students[0]).detach()
    teachers = [random(3, 7, WIDTH, seed=3, scale=0.01), near]
    loss = attended_state_loss(students[0], teachers, real(), lambda state: 30 * projections[0](state), (1.0, 1.0))
    assert loss.total.item() == pytest.approx(0, abs=1e-4)


@pytest.mark.parametrize("name", ["emd", "alp"])
def test_memory_grows_with_the_student_layers_and_not_with_the_pairs(name: str) -> None:
    """What autograd keeps beside the targets, the student's own states and the map: one teacher-wide state."""
    kept: dict[int, int] = {}
    student, projection, mask = random(3, 7, WIDTH).requires_grad_(), nn.Linear(WIDTH, WIDTH), real()
    teachers = [random(3, 7, WIDTH, seed=n) for n in range(24)]
    known = {tensor.data_ptr() for tensor in (student, *projection.parameters(), *teachers)}

    def keep(tensor: Tensor) -> Tensor:
        if tensor.data_ptr() not in known and tensor.shape[-1] == WIDTH:
            kept[tensor.data_ptr()] = tensor.numel()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        if name == "alp":
            loss = attended_state_loss(student, teachers, mask, projection, [1.0] * 24).total
        else:
            mapped = [projection(student)]
            costs = transport_costs(mapped, teachers, mask, [1.0] * 24)
            loss = transported_state_loss(mapped, teachers, mask, [1.0] * 24, [[1 / 24] * 24], costs).total
    assert list(kept.values()) == [student.numel()]
    loss.backward()
