"""The pictures of a report: what is drawn, that it is the same every time, and that it stays small."""

from __future__ import annotations

import base64
from dataclasses import replace
from xml.etree import ElementTree

import numpy as np
import pytest

from student_train.evaluate.fidelity.heat_maps import RelationMaps
from student_train.evaluate.report import plots
from student_train.evaluate.report.plots import plot_fidelity_layers, plot_relation_maps, plot_training_curves
from teacher_cache.contract.streams import VECTORS
from tests.student_train.evaluate.reports import make_report


def test_tokens_of_any_script_are_words_of_the_picture() -> None:
    tokens = ("東京", "<&>", "$x$", "##ing")
    values = dict.fromkeys(VECTORS, np.full((4, 4), 0.25, np.float32))
    maps = RelationMaps(
        tokens=tokens, row=0, held_out=True, view="plain", student_layer=1, teacher_layer=2, heads=2, teacher=values,
        student=values, kl=dict.fromkeys(VECTORS, 0.0),
    )  # fmt: skip
    address = plot_relation_maps(maps)
    assert plot_relation_maps(maps) == address
    picture = base64.b64decode(address.partition(",")[2]).decode()
    words = {element.text for element in ElementTree.fromstring(picture).iter() if element.text}
    assert set(tokens) <= words


def document(address: str) -> ElementTree.Element:
    assert address.startswith("data:image/svg+xml;base64,")
    return ElementTree.fromstring(base64.b64decode(address.partition(",")[2]).decode())


def records_of(steps: int, **parts: float) -> list[dict[str, float]]:
    return [
        {"step": step, "loss": 10 / step, "lr": 0.1, "tokens": 100 * step, "seconds": 0.5, "wait": 0.1, **parts}
        for step in range(1, steps + 1)
    ]


@pytest.mark.parametrize("steps", [1, 3, 5000])
def test_training_curves(steps: int) -> None:
    """Of one step and of many: a picture of about the same size, and the same one every time."""
    records = [{"step": 0, "valid_loss": 4.0}, *records_of(steps, mha=1.0, hs=2.0), {"step": steps, "valid_loss": 1.0}]
    address = plot_training_curves(records)
    assert document(address).tag.endswith("svg") and len(address) < 150_000
    assert plot_training_curves(records) == address


def test_a_training_that_was_not_validated() -> None:
    assert document(plot_training_curves(records_of(4))).tag.endswith("svg")


def test_rates_are_of_the_steps_between() -> None:
    """Also where many steps are one point: 100 tokens in each half second."""
    for steps in (5, 1000):
        points, rates = plots._rates(records_of(steps))
        assert len(points) == len(rates) <= 400 and rates == pytest.approx([200.0] * len(rates))
    assert [len(part) for part in plots._bins(list(range(1000)))] == [3] * 333 + [1]


def test_thinned_records_keep_the_last() -> None:
    records = [{"step": step} for step in range(103)]
    thin = plots.thin_out(records, 20)
    assert 20 <= len(thin) <= 22 and thin[-1] == {"step": 102} and list(thin) == sorted(thin, key=lambda r: r["step"])
    assert list(plots.thin_out(records[:5], 20)) == records[:5]


@pytest.mark.parametrize("lacking", ["hidden", "relations", "nothing"])
def test_bars_for_each_pair_of_layers(lacking: str) -> None:
    report = make_report()
    shown = report if lacking == "nothing" else replace(report, **{lacking: ()})
    assert document(plot_fidelity_layers(shown)).tag.endswith("svg")
