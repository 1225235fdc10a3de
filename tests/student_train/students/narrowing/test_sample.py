"""The rows that a narrower student is fitted on: training rows only, of every store its share."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from student_train.data.first_rows import FirstRows
from student_train.settings import TrainSettings
from student_train.students.narrowing import sample as sample_module
from student_train.students.narrowing.sample import read_sample
from student_train.train.prepare import prepare_run
from teacher_cache.contract.batch import TargetRequest
from teacher_cache.read.pool import open_caches


def test_rows_come_from_every_store_in_proportion(tiny_parts: tuple[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sample_module, "SAMPLE_TOKENS", 12 * 24)
    source = open_caches(tiny_parts)
    rows = (range(90), range(101, 131))
    first_rows = FirstRows(source=source, rows=rows)
    masked, plain = (read_sample(first_rows, with_mlm_head=head) for head in (True, False))
    for view, ours in (("masked", masked), ("plain", plain)):
        request = TargetRequest(masked=view == "masked")
        expected = [source.read_rows(start, start + count, request)[view] for start, count in ((0, 9), (101, 3))]
        assert torch.equal(ours.input_ids_BT, torch.cat([each.input_ids_BT for each in expected]))
        assert torch.equal(ours.real_BT, torch.cat([each.real_BT() for each in expected]))
        assert ours.tokens == sum(int(each.length_B.sum()) for each in expected)
    batches = masked.batches()
    assert torch.equal(torch.cat([batch.input_ids_BT for batch in batches]), masked.input_ids_BT)


def test_a_run_slices_a_narrower_student_without_its_held_out_rows(tiny_store: Path, tmp_path: Path) -> None:
    settings = TrainSettings(
        cache=(str(tiny_store),), method="mha", student="2x16:4", steps=0, valid_share=0.5, out=str(tmp_path / "out")
    )
    run = prepare_run(settings)
    reader = open_caches([str(tiny_store)])
    tokens = int(reader.read_rows(0, 101 - 50, TargetRequest())["plain"].length_B.sum())
    assert f"sliced from the teacher: fitted on {tokens:,} tokens, 16 components" in run.built.description
