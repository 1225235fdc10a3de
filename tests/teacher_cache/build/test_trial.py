"""A few rows stand for all rows of a store: which are fitted, which are tried, what is added up."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from teacher_cache.build.trial import Trial, _add, _protocol_bytes, fitted_rows
from teacher_cache.codecs.sample import CalibrationSample, share_rows
from teacher_cache.contract.manifest import Manifest
from teacher_cache.contract.targets import TargetSpecs
from teacher_cache.corpus.corpus import Rows
from teacher_cache.format.groups import read_groups
from teacher_cache.format.protocol import read_manifest
from teacher_cache.format.transforms import read_projections
from teacher_cache.format.writer import GroupWriter
from teacher_cache.storage.local import LocalStorage
from teacher_cache.storage.overlay import Overlay
from teacher_cache.teacher.teacher import Teacher

Plain = Callable[..., Manifest]


@pytest.mark.parametrize("rows, sample", [(512, 64), (2000, 64), (96, 64), (40, 40), (20_000, 16), (130, 64)])
def test_a_fitted_share_of_the_sample_costs_what_the_rows_of_the_store_do(
    small_store: Path, rows: int, sample: int
) -> None:
    """A row that is fitted gains e / n over the best rotation, another loses as much; n rows are fitted."""
    small = read_manifest(LocalStorage(small_store))
    manifest = replace(small, rows=rows, seq_len=128, teacher=replace(small.teacher, hidden_size=384))
    fitted = len(fitted_rows(manifest, sample))
    of_build = share_rows(rows, 128, 384)[0]
    in_sample = (sample - 2 * fitted) / sample / fitted
    in_store = (rows - 2 * of_build) / rows / of_build
    assert in_sample == pytest.approx(in_store, abs=1 / fitted**2), "but for whole rows"


def fitted_of(rows: int, sample: int, manifest: Manifest) -> list[int]:
    return sorted(fitted_rows(replace(manifest, rows=rows), sample))


@given(rows=st.integers(1, 100_000), data=st.data())
def test_fitted_rows_are_spread_over_the_sample(plain_manifest: Plain, rows: int, data: st.DataObject) -> None:
    """At least one, never more than every second one but for the first, and none far from the next."""
    sample = data.draw(st.integers(1, min(rows, 64)))
    fitted = fitted_of(rows, sample, plain_manifest(TargetSpecs()))
    assert fitted and set(fitted) <= set(range(sample))
    gaps = np.diff([*fitted])
    assert not len(gaps) or gaps.max() - gaps.min() <= 1


def test_each_row_of_a_sample_goes_where_it_belongs() -> None:
    """Fitted ones into the moments; of those that are held, pairs of rows turn by turn to tune and to check on."""
    sample = CalibrationSample()
    rows = [torch.full((2, 3), float(row)) for row in range(8)]
    for row, values_ND in enumerate(rows):
        _add(sample, row, values_ND, fitted=row in (1, 6), held=row < 6)
    assert [float(part[0, 0]) for part in sample.tune] == [0, 1, 4, 5]
    assert [float(part[0, 0]) for part in sample.check] == [2, 3]
    assert sample.count == 4
    mean_H, covariance_HH = sample.moments()
    assert mean_H.tolist() == [3.5] * 3 and torch.allclose(covariance_HH, torch.full((3, 3), 6.25).double())


def test_commits_and_seal_are_counted_as_they_are_written(nmse_store: Path) -> None:
    """A plan knows neither hashes nor sizes, but how much room they take."""
    storage = LocalStorage(nmse_store)
    (group,) = read_groups(storage)
    assert group.seal is not None
    known = _protocol_bytes(group, [0, 1, 2], [key for key in group.seal.objects if key != "commits.sha256"])
    sizes = storage.list()
    there = sum(size for key, size in sizes.items() if key.startswith("commits") or key == "seal.json")
    assert known == pytest.approx(there, rel=0.05)
    fewer = _protocol_bytes(group, [1], [key for key in group.seal.objects if key != "commits.sha256"])
    assert (known - fewer) == pytest.approx(2 * sizes["commits/00000001.json"], rel=0.05)


def test_a_trial_of_a_store_that_is_there_writes_to_the_draft_alone(
    small_teacher: Teacher, small_rows: Rows, nmse_store: Path, notes: Any, time_to_try: None
) -> None:
    """Two blocks are missing: their first rows are tried, coded by the constants of the store."""
    draft = Overlay(LocalStorage(nmse_store))
    for key in ("seal.json", "commits/00000000.json", "commits/00000002.json"):
        draft.delete(key)
    (group,) = read_groups(draft)
    projections = {3: read_projections(draft, group.manifest, 3)}
    trial = Trial(draft, small_teacher, projections, small_rows, 8, notes)
    found = trial.forecast(GroupWriter(draft, group))
    assert (found.rows, found.blocks, trial.sample_rows) == (24, 2, 24)
    assert trial.calibration_seconds == 0, "nothing is left to calibrate"
    base = LocalStorage(nmse_store).list()
    for path, size in found.bytes_per_array.items():
        # the last block is half full: an empty one counts for what is not there
        there = sum(base[key] for key in base if key.startswith((f"{path}/c/0", f"{path}/c/2")))
        assert size == pytest.approx(there, rel=0.05), path
    assert not any("/c/" in key and key.startswith("input_ids") for key in draft.written), "no shard is written"
    assert notes.lines == ["trying 40 rows"]
