"""Rows of a store for an export: documents read alone, and scales from rows that measure nothing."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer

from student_train.evaluate.export.cache_rows import calibration_rows, run_apart, texts_of
from teacher_cache.build.build import build_cache
from teacher_cache.build.settings import BuildSettings
from teacher_cache.contract.batch import TargetBatch, TargetRequest
from teacher_cache.errors import SettingsError
from teacher_cache.read.pool import open_caches
from teacher_cache.read.reader import CacheReader


def feed(ids, mask):
    return {"input_ids": ids.numpy(), "attention_mask": mask.numpy()}


def as_they_are(targets: TargetBatch) -> TargetBatch:
    return targets


def test_documents_of_a_row_are_run_alone() -> None:
    ids_BT = torch.tensor([[5, 6, 7, 8, 9, 0], [5, 5, 5, 0, 0, 0]])
    starts_BT = torch.tensor([[1, 0, 1, 0, 0, 0], [1, 0, 0, 0, 0, 0]]).bool()
    targets = TargetBatch(
        input_ids_BT=ids_BT.int(), length_B=torch.tensor([5, 3]), row_id_B=torch.arange(2), starts_BT=starts_BT
    )

    def sums_so_far(ids, mask):
        return (ids * mask).cumsum(1)[..., None].float()

    found = run_apart(sums_so_far, targets)[..., 0]
    assert found.tolist() == [[5, 11, 7, 15, 24, 0], [5, 10, 15, 0, 0, 0]]
    joined = TargetBatch(input_ids_BT=ids_BT.int(), length_B=targets.length_B, row_id_B=targets.row_id_B)
    assert run_apart(sums_so_far, joined)[0, :5, 0].tolist() == [5, 11, 18, 26, 35]


def test_scales_come_from_rows_that_are_not_held_out(
    tiny_parts: tuple[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    reader, read = open_caches(tiny_parts), []
    read_rows = reader.read_rows

    def note(first: int, last: int, *asked: object):
        read.extend(range(first, last))
        return read_rows(first, last, *asked)

    monkeypatch.setattr(reader, "read_rows", note)
    held_out = (range(91, 101), range(129, 134))
    rows = calibration_rows(reader, held_out, 40, feed, as_they_are)
    assert rows.rows == 40 == sum(len(each["input_ids"]) for each in rows.feeds) == len(read)
    # of both stores, as their sizes ask for: 91 and 28 rows
    assert read == [*range(30), *range(101, 111)]
    with pytest.raises(SettingsError, match="all are"):
        calibration_rows(reader, (range(101), range(101, 134)), 8, feed, as_they_are)


def test_texts_have_no_masked_words(tiny_teacher: Any, tiny_corpus: Path, tmp_path: Path) -> None:
    settings = BuildSettings(
        teacher=str(tiny_teacher("bert")), corpus=(str(tiny_corpus),), out=str(tmp_path / "cache.zarr"),
        targets="logits", seq_len=24, max_rows=8, device="cpu",
    )  # fmt: skip
    build_cache(settings)
    reader = CacheReader.open(settings.out)
    (read,) = reader.read_rows(3, 5, TargetRequest()).values()
    assert read.places is not None, "of this store the masked view is read"
    ids_BT, length_B = reader.load_array("input_ids", 0)[3:5], reader.load_array("length", 0)[3:5]
    assert (read.input_ids_BT.numpy() != ids_BT).any()
    written = [ids[:length].tolist() for ids, length in zip(ids_BT, length_B, strict=True)]
    tokenizer = AutoTokenizer.from_pretrained(tiny_teacher("bert"))
    assert texts_of(reader, (range(3, 5),)) == tokenizer.batch_decode(written, skip_special_tokens=True)
