"""`kdeval fidelity --exact`: the student against the teacher itself, at the places of a store."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoModelForMaskedLM

from student_train.evaluate.fidelity.fidelity import measure_fidelity
from student_train.evaluate.load import load_student
from teacher_cache.build.build import build_cache
from teacher_cache.build.settings import BuildSettings
from teacher_cache.contract.batch import TargetRequest
from teacher_cache.errors import StudentError
from teacher_cache.models.placing import Placement
from teacher_cache.read.reader import CacheReader
from tests import causal_models

LITTLE = Placement(most_bytes={"cpu": 40_000}, cpu_only=True)
"""Less than the embeddings and layers of any tiny teacher."""


@pytest.fixture(scope="module")
def store(causal_teacher: Path, causal_corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Hidden states alone: to run the teacher, nothing of its distribution has to be kept."""
    out = tmp_path_factory.mktemp("exact") / "cache.zarr"
    build_cache(
        BuildSettings(
            teacher=str(causal_teacher), corpus=(str(causal_corpus),), out=str(out), seq_len=32, max_rows=12,
            block_rows=4, targets="hidden", layers="2", device="cpu",
        )
    )  # fmt: skip
    return out


def test_the_teacher_is_its_own_best_student(store: Path, causal_teacher: Path) -> None:
    report = measure_fidelity(causal_teacher, [str(store)], exact=True)
    assert report.distribution is not None
    assert report.distribution.kl == pytest.approx(0, abs=1e-6) and report.distribution.top1_agreement == 1
    assert report.distribution.to_what == "all ids, temperature 1"
    assert any("to the teacher itself" in note for note in report.notes)
    with pytest.raises(StudentError, match="the cache holds no output distributions"):
        measure_fidelity(causal_teacher, [str(store)])


def test_a_teacher_may_lie_on_the_disk(causal_teacher: Path) -> None:
    placed = load_student(causal_teacher, placement=LITTLE)
    on_disk = [parameter.device.type == "meta" for parameter in placed.encoder.parameters()]
    assert sum(on_disk) > len(on_disk) // 2


def test_of_another_model_it_is_what_each_document_alone_gives(
    store: Path, causal_teacher: Path, tmp_path: Path
) -> None:
    student = causal_models.save_teacher(tmp_path, seed=7)
    report = measure_fidelity(student, [str(store)], exact=True, batch_size=2)
    assert measure_fidelity(student, [str(store)], exact=True, batch_size=2, placement=LITTLE) == report
    models = [AutoModelForCausalLM.from_pretrained(folder).double().eval() for folder in (causal_teacher, student)]
    rows = range(report.first_row, report.last_row + 1)
    batch = CacheReader.open(store).read_rows(rows.start, rows.stop, TargetRequest(next_tokens=True))["plain"]
    assert batch.starts_BT is not None
    kl, agreed, places = 0.0, 0, 0
    for ids_T, starts_T, length in zip(batch.input_ids_BT, batch.starts_BT, batch.length_B.tolist(), strict=True):
        starts = [*starts_T[:length].nonzero()[:, 0].tolist(), length]
        for start, stop in pairwise(starts):
            if stop - start < 2:
                continue
            with torch.no_grad():
                log_p, log_q = (m(ids_T[None, start:stop]).logits[0, :-1].log_softmax(-1) for m in models)
            kl += float((log_p.exp() * (log_p - log_q)).sum())
            agreed += int((log_p.argmax(-1) == log_q.argmax(-1)).sum())
            places += stop - start - 1
    assert report.distribution is not None and report.distribution.positions == places > 0
    assert report.distribution.kl == pytest.approx(kl / places, rel=1e-4)
    assert report.distribution.top1_agreement == pytest.approx(agreed / places)


def test_masked_students_too(tiny_teacher: Any, tiny_corpus: Path, tmp_path: Path) -> None:
    teacher, student, out = tiny_teacher("bert"), tiny_teacher("bert", seed=3), tmp_path / "cache.zarr"
    build_cache(
        BuildSettings(
            teacher=str(teacher), corpus=(str(tiny_corpus),), out=str(out), seq_len=24, max_rows=12, block_rows=4,
            targets="logits", logits="sample", k=8, device="cpu",
        )
    )  # fmt: skip
    report, drawn = (measure_fidelity(student, [str(out)], exact=exact) for exact in (True, False))
    assert drawn.distribution is not None and drawn.distribution.to_what == "8 drawn ids, temperature 1"
    assert measure_fidelity(student, [str(out)], exact=True, placement=LITTLE) == report
    models = [AutoModelForMaskedLM.from_pretrained(folder).double().eval() for folder in (teacher, student)]
    rows = range(report.first_row, report.last_row + 1)
    batch = CacheReader.open(out).read_rows(rows.start, rows.stop, TargetRequest(masked=True))["masked"]
    assert batch.places is not None and report.distribution is not None
    with torch.no_grad():
        log_p, log_q = (
            m(batch.input_ids_BT, attention_mask=batch.real_BT().long())
            .logits.take_along_dim(batch.places.positions_BM[..., None], dim=1)[batch.places.real_BM()]
            .log_softmax(-1)
            for m in models
        )
    assert report.distribution.positions == len(log_p)
    assert report.distribution.kl == pytest.approx(float((log_p.exp() * (log_p - log_q)).sum()) / len(log_p), rel=1e-4)


def test_without_a_masked_view_there_is_nothing_to_run_it_on(
    tiny_teacher: Any, tiny_corpus: Path, tmp_path: Path
) -> None:
    out = tmp_path / "cache.zarr"
    build_cache(
        BuildSettings(
            teacher=str(tiny_teacher("bert")), corpus=(str(tiny_corpus),), out=str(out), seq_len=24, max_rows=60,
            block_rows=30, targets="hidden", layers="2", device="cpu",
        )
    )  # fmt: skip
    with pytest.raises(StudentError, match="the cache holds no masked view to run the teacher on"):
        measure_fidelity(tiny_teacher("bert"), [str(out)], exact=True)
