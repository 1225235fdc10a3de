"""Stored distributions beside distributions written by hand: what is right passes, every kind of wrong is found.

The head hands final states on as logits, so that a test says what the teacher gives.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from teacher_cache.codecs.logits import LogProbabilityCodec
from teacher_cache.codecs.sparse_logits import sample_points
from teacher_cache.contract.batch import Places, SampledLogits, TargetBatch, TopkLogits
from teacher_cache.contract.manifest import Manifest
from teacher_cache.contract.targets import LogitsSpec, TargetSpecs
from teacher_cache.teacher.outputs import TeacherOutputs
from teacher_cache.verify.deep.logits import DrawComparison, TopkComparison
from teacher_cache.verify.deep.rows import DeepRow

VOCABULARY, PLACES = 200, 4
TOPK = LogitsSpec(entries=5, codec="float16")
DRAWS = LogitsSpec(entries=9, codec="exact", form="sample")
POSITIONS = [3, 7, 12]


class GivenLogits:
    """A teacher whose final states are its logits."""

    device = torch.device("cpu")

    def head(self) -> Callable[[torch.Tensor], torch.Tensor]:
        return lambda final_PD: final_PD


def make_row(logits: Any, final_TV: torch.Tensor, noise: float = 0.0) -> DeepRow:
    final_BTD = final_TV[None]
    targets = TargetBatch(
        input_ids_BT=torch.zeros(1, 24, dtype=torch.long),
        length_B=torch.tensor([24]),
        row_id_B=torch.tensor([17]),
        places=Places(
            positions_BM=torch.tensor([[*POSITIONS, 0]]),
            label_ids_BM=torch.zeros(1, PLACES),
            count_B=torch.tensor([3]),
        ),
        logits=logits,
    )
    live, alone = (TeacherOutputs(hidden={}, attention={}, final_BTD=one) for one in (final_BTD, final_BTD + noise))
    return DeepRow(targets=targets, masked_view=1, plain_ids_BT=targets.input_ids_BT, live=live, alone=alone)


def given_logits(seed: int = 0) -> torch.Tensor:
    return 3 * torch.randn(24, VOCABULARY, generator=torch.Generator().manual_seed(seed))


def stored_topk(final_TV: torch.Tensor, temperature: float = 1.0) -> TopkLogits:
    """What a store keeps of it in half precision, by plain float64."""
    log_probs_PV = (final_TV[POSITIONS].double() / temperature).log_softmax(dim=1)
    top = log_probs_PV.topk(TOPK.entries, dim=1)
    tail_P = (1 - top.values.exp().sum(dim=1)).log()
    pad = torch.nn.functional.pad
    return TopkLogits(
        ids_BMK=pad(top.indices, (0, 0, 0, 1))[None],
        log_probs_BMK=pad(top.values.half().float(), (0, 0, 0, 1))[None],
        log_tail_BM=pad(tail_P.half().float(), (0, 1))[None],
    )


def stored_draws(final_TV: torch.Tensor) -> SampledLogits:
    """Draw n at the n-th point, one at a time."""
    points = sample_points(0, np.array([17] * 3), 1, np.arange(3), DRAWS.entries)
    ids_MK = torch.zeros(PLACES, DRAWS.entries, dtype=torch.long)
    counts_MK = torch.zeros(PLACES, DRAWS.entries, dtype=torch.int32)
    for place, position in enumerate(POSITIONS):
        end_V = final_TV[position].double().softmax(dim=0).cumsum(dim=0)
        drawn = [int(torch.searchsorted(end_V, point)) for point in points[place]]
        for number, token in enumerate(sorted(set(drawn))):
            ids_MK[place, number], counts_MK[place, number] = token, drawn.count(token)
    return SampledLogits(ids_BMK=ids_MK[None], counts_BMK=counts_MK[None])


@pytest.fixture(scope="module")
def problems(plain_manifest: Callable[..., Manifest]) -> Callable[..., dict[str, str]]:
    """The problem found with one row, by target."""

    def compare(row: DeepRow, spec: LogitsSpec, temperature: float = 1.0) -> dict[str, str]:
        manifest = plain_manifest(TargetSpecs(logits=spec), views=2, temperature=temperature)
        kind = TopkComparison if spec.form == "topk" else DrawComparison
        comparison = kind(manifest, spec, GivenLogits())  # type: ignore[arg-type]
        comparison.add(row)
        return {check.target: check.problem for check in comparison.results()}

    return compare


@pytest.mark.parametrize("temperature", [0.5, 1.0, 4.0])
def test_what_was_stored_in_half_precision_passes(problems: Callable[..., dict[str, str]], temperature: float) -> None:
    final_TV = given_logits()
    row = make_row(stored_topk(final_TV, temperature), final_TV)
    assert problems(row, TOPK, temperature) == {"logits ids": "", "logits probabilities": "", "logits tail": ""}
    if temperature != 1:
        assert problems(row, TOPK, 1.0)["logits probabilities"]


def test_what_was_stored_in_a_byte_passes_where_a_byte_is_declared(problems: Callable[..., dict[str, str]]) -> None:
    final_TV = given_logits()
    exact, codec = stored_topk(final_TV), LogProbabilityCodec("root8")
    coded = codec.decode(torch.from_numpy(codec.encode(exact.log_probs_BMK[0].clamp_max(0))))[None]
    row = make_row(replace(exact, log_probs_BMK=coded), final_TV)
    assert not any(problems(row, replace(TOPK, codec="root8")).values())
    assert problems(row, TOPK)["logits probabilities"], "half precision would be closer"


def changed(logits: TopkLogits, **values: Any) -> TopkLogits:
    copies = {name: getattr(logits, name).clone() for name in values}
    for name, (place, value) in values.items():
        copies[name][0][place] = value
    return replace(logits, **copies)


WRONG: dict[str, tuple[Callable[[TopkLogits], TopkLogits], str]] = {
    "an id that is not among them": (lambda x: changed(x, ids_BMK=((1, 4), 0)), "logits ids"),
    "an id twice": (lambda x: changed(x, ids_BMK=((1, 4), int(x.ids_BMK[0, 1, 0]))), "logits ids"),
    "an id beyond the vocabulary": (lambda x: changed(x, ids_BMK=((0, 2), VOCABULARY)), "logits ids"),
    "a negative id": (lambda x: changed(x, ids_BMK=((0, 2), -1)), "logits ids"),
    "a probability": (lambda x: changed(x, log_probs_BMK=((2, 0), -0.01)), "logits probabilities"),
    "an undefined probability": (lambda x: changed(x, log_probs_BMK=((2, 4), math.nan)), "logits probabilities"),
    "a tail": (lambda x: changed(x, log_tail_BM=(1, -0.05)), "logits tail"),
    "no tail": (lambda x: changed(x, log_tail_BM=(1, -math.inf)), "logits tail"),
    "an undefined tail": (lambda x: changed(x, log_tail_BM=(0, math.nan)), "logits tail"),
}


@pytest.mark.parametrize("name", WRONG)
def test_one_wrong_number_is_found(problems: Callable[..., dict[str, str]], name: str) -> None:
    final_TV = given_logits(3)
    change, target = WRONG[name]
    assert problems(make_row(change(stored_topk(final_TV)), final_TV), TOPK)[target]


def test_what_stands_at_places_without_a_masked_position_means_nothing(
    problems: Callable[..., dict[str, str]],
) -> None:
    final_TV = given_logits()
    logits = changed(stored_topk(final_TV), ids_BMK=((3, 0), 9999), log_tail_BM=(3, math.nan))
    assert not any(problems(make_row(logits, final_TV), TOPK).values())


def test_which_of_two_equals_was_taken_does_not_matter(problems: Callable[..., dict[str, str]]) -> None:
    """Ids 40 and 41 are both as probable as the last that fits."""
    final_TV = torch.zeros(24, VOCABULARY)
    final_TV[:, :4], final_TV[:, 40:42] = 5.0, 3.0
    logits = stored_topk(final_TV)
    for last in (40, 41):
        assert not any(problems(make_row(changed(logits, ids_BMK=((0, 4), last)), final_TV), TOPK).values())
    assert problems(make_row(changed(logits, ids_BMK=((0, 4), 42)), final_TV), TOPK)["logits ids"]


@settings(max_examples=20)
@given(seed=st.integers(0, 2**31))
def test_draws_at_their_points_pass(problems: Callable[..., dict[str, str]], seed: int) -> None:
    final_TV = given_logits(seed)
    assert problems(make_row(stored_draws(final_TV), final_TV), DRAWS) == {"logits draws": ""}


DRAWN_WRONG: dict[str, Callable[[torch.Tensor, torch.Tensor], object]] = {
    "the next id": lambda ids, counts: ids[0, 1].add_(1),
    "an id beyond the vocabulary": lambda ids, counts: ids[0, 1, 0].fill_(VOCABULARY),
    "a negative id": lambda ids, counts: ids[0, 0, 0].fill_(-3),
    "a draw too many": lambda ids, counts: counts[0, 2, 0].add_(1),
    "a draw too few": lambda ids, counts: counts[0, 2, 0].sub_(1),
    "none at all": lambda ids, counts: counts.zero_(),
}


@pytest.mark.parametrize("name", DRAWN_WRONG)
def test_one_wrong_draw_is_found(problems: Callable[..., dict[str, str]], name: str) -> None:
    final_TV = given_logits(5)
    drawn = stored_draws(final_TV)
    DRAWN_WRONG[name](drawn.ids_BMK, drawn.counts_BMK)
    assert problems(make_row(drawn, final_TV), DRAWS)["logits draws"]


def test_draws_of_another_row_or_view_are_found(problems: Callable[..., dict[str, str]]) -> None:
    final_TV = given_logits(7)
    row = make_row(stored_draws(final_TV), final_TV)
    assert problems(replace(row, masked_view=0), DRAWS)["logits draws"]
    assert problems(replace(row, targets=replace(row.targets, row_id_B=torch.tensor([18]))), DRAWS)["logits draws"]


@pytest.mark.parametrize("spec", [TOPK, DRAWS], ids=["topk", "draws"])
@pytest.mark.parametrize("token, beside", [(VOCABULARY - 1, VOCABULARY), (0, -1)])
def test_an_id_beyond_the_vocabulary_is_not_taken_for_the_nearest(
    problems: Callable[..., dict[str, str]], spec: LogitsSpec, token: int, beside: int
) -> None:
    """The nearest would be right: it is by far the most probable id."""
    final_TV = given_logits(11)
    final_TV[:, token] = 30.0
    right = stored_topk(final_TV) if spec is TOPK else stored_draws(final_TV)
    assert not any(problems(make_row(right, final_TV), spec).values())
    right.ids_BMK[right.ids_BMK == token] = beside
    assert any(problems(make_row(right, final_TV), spec).values())


def test_a_flat_tail_of_dropped_entries_is_within_its_bound(plain_manifest: Callable[..., Manifest]) -> None:
    """Derived from a store that kept half of the ids in half precision: each is off by a share of its own logarithm."""
    final_TV = 0.3 * given_logits(5)
    fine_PV = final_TV[POSITIONS].double().log_softmax(dim=1)
    top = fine_PV.topk(VOCABULARY // 2, dim=1)
    coded_PK = top.values.half()
    # all rounded the same way, as far as they can be
    off_PK = torch.where(
        coded_PK.double() < top.values, torch.nextafter(coded_PK, torch.zeros_like(coded_PK)), coded_PK
    )
    rest_P = 1 - top.values.exp().sum(dim=1)
    tail_P = (off_PK.double().exp()[:, TOPK.entries :].sum(dim=1) + rest_P).log().half()
    stored = stored_topk(final_TV)
    pad = torch.nn.functional.pad
    derived = replace(stored, log_tail_BM=pad(tail_P.float(), (0, 1))[None])
    manifest = plain_manifest(TargetSpecs(logits=TOPK))
    comparison = TopkComparison(manifest, TOPK, GivenLogits())  # type: ignore[arg-type]
    comparison.add(make_row(derived, final_TV))
    assert not [check for check in comparison.results() if check.problem]
