"""The transport problem against closed forms and brute force, the layer weights against the formula, the state."""

from __future__ import annotations

import math
import sys
from itertools import combinations, permutations

import numpy as np
import pytest
import torch

from student_train.methods.transport import LARGEST_RATIO, LayerTransport, attend_to_costs, solve_transport
from teacher_cache.errors import SettingsError


def weights(layers: int, generator: np.random.Generator) -> np.ndarray:
    drawn = generator.random(layers) + 0.1
    return drawn / drawn.sum()


def least_cost(costs: np.ndarray, sources: np.ndarray, sinks: np.ndarray) -> float:
    """The best of all vertices: every choice of S + L - 1 cells that determines a flow."""
    rows, columns = costs.shape
    cells = [(i, j) for i in range(rows) for j in range(columns)]
    best = math.inf
    for chosen in combinations(cells, rows + columns - 1):
        system = np.zeros((rows + columns, len(chosen)))
        for place, (i, j) in enumerate(chosen):
            system[i, place] = system[rows + j, place] = 1
        if np.linalg.matrix_rank(system) < len(chosen):
            continue
        flow, *_ = np.linalg.lstsq(system, np.concatenate([sources, sinks]), rcond=None)
        if (flow > -1e-9).all():
            best = min(best, sum(share * costs[cell] for share, cell in zip(flow, chosen, strict=True)))
    return best


@pytest.mark.parametrize(("rows", "columns"), [(1, 4), (2, 2), (2, 4), (3, 3), (3, 4)])
def test_flows_are_the_best_of_all_vertices(rows: int, columns: int) -> None:
    generator = np.random.default_rng(rows * columns)
    costs, sources, sinks = generator.random((rows, columns)), weights(rows, generator), weights(columns, generator)
    flow = solve_transport(costs, sources, sinks)
    assert (flow * costs).sum() == pytest.approx(least_cost(costs, sources, sinks), rel=1e-9)


@pytest.mark.parametrize(("rows", "columns"), [(1, 1), (3, 6), (6, 12), (12, 24), (5, 3)])
def test_flows_have_the_marginals_and_few_entries(rows: int, columns: int) -> None:
    generator = np.random.default_rng(0)
    sources, sinks = weights(rows, generator), weights(columns, generator)
    flow = solve_transport(1e3 * generator.random((rows, columns)), sources, sinks)
    assert flow.min() >= 0 and (flow > 0).sum() <= rows + columns - 1
    np.testing.assert_allclose(flow.sum(1), sources, rtol=1e-9)
    np.testing.assert_allclose(flow.sum(0), sinks, rtol=1e-9)


def test_costs_of_distance_on_a_line_give_the_flow_that_keeps_the_order() -> None:
    """The closed form: f_ij = |[W_i-1, W_i] and [U_j-1, U_j]| in common, and cost sum |W - U| over the places."""
    generator = np.random.default_rng(1)
    sources, sinks = weights(6, generator), weights(6, generator)
    places = np.arange(6)
    ends, other = np.cumsum(sources), np.cumsum(sinks)
    common = np.minimum.outer(ends, other) - np.maximum.outer(ends - sources, other - sinks)
    distance = np.abs(np.subtract.outer(places, places)).astype(float)
    # squares are strictly convex, so that no other flow is as good
    np.testing.assert_allclose(solve_transport(distance**2, sources, sinks), np.maximum(common, 0), atol=1e-12)
    flow = solve_transport(distance, sources, sinks)
    assert (flow * distance).sum() == pytest.approx(np.abs(ends - other).sum())


def test_equal_weights_of_equal_depths_assign_layer_to_layer() -> None:
    costs = np.random.default_rng(2).random((5, 5))
    best = min(permutations(range(5)), key=lambda order: sum(costs[i, j] for i, j in enumerate(order)))
    flow = solve_transport(costs, np.full(5, 0.2), np.full(5, 0.2))
    np.testing.assert_allclose(flow, 0.2 * np.eye(5)[list(best)], atol=1e-12)


def test_costs_that_are_all_zero_have_a_flow_too() -> None:
    assert solve_transport(np.zeros((2, 3)), np.full(2, 1 / 2), np.full(3, 1 / 3)).sum() == pytest.approx(1)


def test_weights_are_the_cost_attention_at_a_temperature_of_the_number_of_layers() -> None:
    """Li et al. 2020, section 3: the unit cost of each layer, their sum over it, a softmax with temperature."""
    costs = [0.8, 1.0, 2.0, 1.4]
    inverse = [sum(costs) / cost for cost in costs]
    shares = [math.exp(value / len(costs)) for value in inverse]
    assert attend_to_costs(np.asarray(costs)).tolist() == pytest.approx([share / sum(shares) for share in shares])


def test_a_layer_that_costs_nothing_does_not_take_everything() -> None:
    found = attend_to_costs(np.asarray([0.0, 1.0, 1.0, 2.0]))
    assert found[0] / found[1] == pytest.approx(math.exp(LARGEST_RATIO - 1))
    assert attend_to_costs(np.zeros(3)).tolist() == [1 / 3] * 3


def observed(transport: LayerTransport, costs: torch.Tensor, positions: int, passes: int) -> None:
    """A step whose batch is cut into passes of uneven shares."""
    shares = torch.arange(1, passes + 1, dtype=torch.float64)
    for share in shares / shares.sum():
        transport.observe(costs * positions * share, torch.tensor(positions // passes))


def test_a_step_updates_weights_from_the_flow_and_the_flow_from_the_weights() -> None:
    transport, costs = LayerTransport(2, 3), torch.rand(2, 3, generator=torch.Generator().manual_seed(0)).double()
    assert transport.flow.tolist() == [[1 / 6] * 3] * 2
    observed(transport, costs, 60, passes=1)
    transport.finish_step()
    # under the first flow a layer's unit cost is the mean of its costs
    np.testing.assert_allclose(transport.student_weights, attend_to_costs(costs.mean(1).numpy()))
    np.testing.assert_allclose(transport.teacher_weights, attend_to_costs(costs.mean(0).numpy()))
    expected = solve_transport(costs.numpy(), transport.student_weights, transport.teacher_weights)
    np.testing.assert_allclose(transport.flow, expected)
    before, flow = transport.student_weights, transport.flow
    observed(transport, 2 * costs, 60, passes=1)
    transport.finish_step()
    unit_costs = (flow * 2 * costs.numpy()).sum(1) / before
    np.testing.assert_allclose(transport.student_weights, attend_to_costs(unit_costs))


def test_passes_and_the_number_of_positions_change_nothing() -> None:
    costs = torch.rand(3, 6, generator=torch.Generator().manual_seed(1)).double()
    found = []
    for positions, passes in ((60, 1), (60, 4), (600, 2)):
        transport = LayerTransport(3, 6)
        for _ in range(2):
            observed(transport, costs, positions, passes)
            transport.finish_step()
        found.append(transport.flow)
    for flow in found[1:]:
        np.testing.assert_allclose(flow, found[0], rtol=1e-9, atol=1e-12)


def test_nothing_changes_in_evaluation_without_a_batch_or_by_what_is_no_number() -> None:
    transport = LayerTransport(2, 3)
    before = transport.describe()
    transport.eval()
    transport.observe(torch.rand(2, 3).double(), torch.tensor(5))
    transport.train()
    transport.finish_step()
    for value in (math.nan, math.inf):
        transport.observe(torch.full((2, 3), value).double(), torch.tensor(5))
        transport.finish_step()
    transport.observe(torch.zeros(2, 3).double(), torch.tensor(0))
    transport.finish_step()
    assert transport.describe() == before


def test_the_state_comes_back_exactly() -> None:
    transport, again = LayerTransport(3, 6), LayerTransport(3, 6)
    steps = torch.rand(4, 3, 6, generator=torch.Generator().manual_seed(2)).double()
    for costs in steps[:2]:
        observed(transport, costs, 60, passes=3)
        transport.finish_step()
    state = transport.state()
    again.restore(state)
    # a training that goes on changes nothing of what was saved
    for costs in steps[2:]:
        for each in (transport, again):
            observed(each, costs, 60, passes=3)
            each.finish_step()
    assert again.describe() == transport.describe()
    assert np.array_equal(again.flow, transport.flow) and not np.array_equal(state["flow"], transport.flow)


def test_without_scipy_it_says_what_to_install_before_the_first_step(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "scipy", None)  # as where it is not installed
    with pytest.raises(SettingsError, match=r"--mapping 'emd' needs scipy.*pip install 'kdcache\[emd\]'"):
        LayerTransport(2, 3)
