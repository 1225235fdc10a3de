"""The report of a run: a real, trained student with all its records, and what a page says of records that lack."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest

from student_train.evaluate.fidelity.heat_maps import relation_maps
from student_train.evaluate.report.report import make_report
from teacher_cache.build.build import build_cache
from teacher_cache.build.settings import BuildSettings
from teacher_cache.errors import StudentError, TargetsError, TrainingError
from tests.student_train.evaluate.report.pages import Page

SECTIONS = ("training", "fidelity", "relations", "tasks", "latency", "provenance", "reproduce")


def test_everything_that_is_known(trained_run: Path, tiny_store: Path) -> None:
    text = make_report(str(trained_run), [str(tiny_store)])
    page = Page(text)
    assert set(SECTIONS) < page.text.keys()
    assert "<student> & co" in page.text[""] and "2x16:2:" in page.text[""]
    assert "Its loss on held-out rows fell from" in page.text[""] and "Nobody has measured" in page.text[""]
    # nothing is fetched: what is named lies in the page itself
    assert all(address.startswith(("#", "data:")) for address in page.addresses)
    assert "http" not in re.sub(r"base64,[^\"]*", "", text) and "<script" not in text and "@import" not in text
    pictures = page.pictures()
    assert len(pictures) == 3 and all(ElementTree.fromstring(picture).tag.endswith("svg") for picture in pictures)
    assert len(text) < 1_000_000
    assert "hidden NMSE, mean" in page.text["fidelity"] and "10 held-out rows" in page.text["fidelity"]
    assert "student layer 2 and teacher layer 3" in page.text["relations"]
    assert "kdeval finetune" in page.text["tasks"] and "kdeval latency" in page.text["latency"]
    provenance = json.loads((trained_run / "provenance.json").read_text())
    for value in (provenance["cache"]["identity_sha256"], provenance["software"]["torch"], "--weight-decay", "0.01"):
        assert value in page.text["provenance"]
    assert provenance["command"] in page.text["reproduce"] and "--student it --json" in page.text["reproduce"]
    assert provenance["cache"]["command"] in page.text["reproduce"], "the store is made again, too"


def test_a_cache_without_attention(trained_run: Path, tmp_path: Path, make_tiny_store: Any) -> None:
    store = make_tiny_store(tmp_path / "c.zarr", max_rows=8, targets="hidden", layers="4")
    with pytest.raises(TargetsError, match="--targets attention"):
        relation_maps(trained_run, [str(store)])
    page = Page(make_report(str(trained_run), [str(store)]))
    assert (
        "holds no attention" in page.text["relations"] and "kdcache build --targets attention" in page.text["relations"]
    )


def test_a_cache_that_the_student_cannot_read_leaves_out_that_section_alone(
    trained_run: Path, tmp_path: Path, tiny_teacher: Any, tiny_corpus: Path
) -> None:
    """Token ids of another vocabulary."""
    out = tmp_path / "c.zarr"
    sizes = {"max_rows": 4, "seq_len": 24, "rows": "document", "targets": "attention"}
    teacher = str(tiny_teacher("roberta"))
    build_cache(BuildSettings(teacher=teacher, corpus=(str(tiny_corpus),), out=str(out), device="cpu", **sizes))
    page = Page(make_report(str(trained_run), [str(out)]))
    assert "has other ids for" in page.text["relations"] and "On held-out rows" in page.text["training"]


def test_records_of_tasks_and_latency(trained_run: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(trained_run, tmp_path / "copy"))
    languages = {"de": {"scores": [0.5, 0.6]}, "sw": {"scores": [0.3, 0.4]}}
    task = {"task": "xnli", "metric": "accuracy", "scores": [0.4, 0.5], "seeds": [0, 1], "learning_rates": [1e-4, 3e-5]}
    (copy / "finetune-xnli.json").write_text(json.dumps({"evaluation": "finetune", **task, "by_test": languages}))
    timing = {
        "backend": "pytorch", "device": "cuda", "dtype": "bfloat16", "threads": 2, "batch_size": 1, "seq_len": 64,
        "median_ms": 2.0, "p90_ms": 2.5, "p99_ms": 3.25, "runs": 9, "teacher_median_ms": 9.0, "speedup": 4.5,
    }  # fmt: skip
    latency = {"evaluation": "latency", "parameters": 5_000_000, "teacher_parameters": None, "measurements": [timing]}
    (copy / "latency.json").write_text(json.dumps(latency))
    page = Page(make_report(str(copy)))
    assert "sw30.0040.0035.00 ± 7.07" in page.text["tasks"] and "0.0001, 3e-05" in page.text["tasks"]
    assert "GPUbfloat161642.002.503.259.004.50×" in page.text["latency"]
    assert "45.0 on xnli (accuracy × 100)" in page.text[""] and "4.5 times as fast" in page.text[""]


def test_a_model_from_elsewhere_and_stale_records(trained_run: Path, tiny_teacher_copy: Any) -> None:
    teacher = tiny_teacher_copy("bert")
    shutil.copy(trained_run / "fidelity.json", teacher / "fidelity.json")
    page = Page(make_report(str(teacher)))
    assert "fidelity.json is of other weights" in page.text["fidelity"] and "kdeval fidelity" in page.text["fidelity"]
    for anchor, command in (("training", "kdtrain"), ("relations", "--cache CACHE"), ("latency", "--teacher TEACHER")):
        assert command in page.text[anchor]
    assert "No record names a command" in page.text["reproduce"] and not page.pictures()


@pytest.mark.parametrize("line, named", [("{", "cannot be read"), ('{"step": 1, "loss": 2}', "line 1.*'lr'")])
def test_damaged_metrics_are_refused(line: str, named: str, tiny_teacher_copy: Any) -> None:
    folder = tiny_teacher_copy("bert")
    (folder / "metrics.jsonl").write_text(line + "\n")
    with pytest.raises((StudentError, TrainingError), match=f"metrics.jsonl.*{named}"):
        make_report(str(folder))


def test_a_long_training_stays_small(tiny_teacher_copy: Any) -> None:
    folder = tiny_teacher_copy("bert")
    record = {"loss": 1.0, "mha": 0.5, "hs": 5.0, "lr": 0.1, "grad_norm": 1.0, "seconds": 0.1, "wait": 0.0, "memory": 9}
    lines = [{"step": step, "tokens": 100 * step, **record} for step in range(1, 20_001)]
    lines += [{"step": step, "valid_loss": 1 / step} for step in range(10, 20_001, 10)]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    text = make_report(str(folder))
    page = Page(text)
    assert len(text) < 300_000 and "mha" not in page.text[""] and "20,000" in page.text["training"]
