"""The report of a run: a real, trained student with all its records, and what a page says of records that lack."""

from __future__ import annotations

import base64
import json
import re
import shutil
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest
import torch
from transformers import AutoModelForMaskedLM

from student_train.evaluate.fidelity.fidelity import measure_fidelity
from student_train.evaluate.fidelity.heat_maps import RelationMaps, relation_maps
from student_train.evaluate.report.plots import plot_relation_maps
from student_train.evaluate.report.report import make_report
from student_train.settings import TrainSettings
from student_train.train.train import train
from teacher_cache.build.build import build_cache
from teacher_cache.build.settings import BuildSettings
from teacher_cache.contract.batch import TargetRequest
from teacher_cache.contract.streams import VECTORS
from teacher_cache.errors import StudentError, TargetsError, TrainingError
from teacher_cache.models.attention import relation_matrices
from teacher_cache.models.attention_tap import enable_tap, record_attention
from teacher_cache.read.pool import open_caches

SECTIONS = ("training", "fidelity", "relations", "tasks", "latency", "provenance", "reproduce")


class Page(HTMLParser):
    """Sections by id, their text, and every address that the page names; elements must be closed in order."""

    VOID = frozenset({"meta", "img"})

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.text: dict[str, str] = {}
        self.addresses: list[str] = []
        self.section = ""
        self.feed(text)
        assert not self.open

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        found = dict(attributes)
        self.addresses += [value for name in ("src", "href") if (value := found.get(name))]
        if tag == "section":
            self.section = found["id"] or ""
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text[self.section] = self.text.get(self.section, "") + data

    def pictures(self) -> list[str]:
        """The SVG documents."""
        found = [address for address in self.addresses if address.startswith("data:image/svg+xml;base64,")]
        return [base64.b64decode(address.partition(",")[2]).decode() for address in found]


@pytest.fixture(scope="module")
def run(tiny_store: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A student of six steps, with a record of its fidelity."""
    out = tmp_path_factory.mktemp("run") / "<student> & co"
    train(
        TrainSettings(
            method="mha+hs", weights="1,0.1", cache=(str(tiny_store),), student="2x16:2", out=str(out), steps=6,
            valid_every=2, valid_share=0.1, device="cpu",
        )
    )  # fmt: skip
    report = measure_fidelity(str(out), [str(tiny_store)])
    record = {"evaluation": "fidelity", **report.to_json(), "command": "kdeval fidelity --student 'it' --json"}
    (out / "fidelity.json").write_text(json.dumps(record))
    return out


def test_everything_that_is_known(run: Path, tiny_store: Path) -> None:
    text = make_report(str(run), [str(tiny_store)])
    page = Page(text)
    assert set(SECTIONS) < page.text.keys()
    assert "<student> & co" in page.text[""] and "2x16:2:" in page.text[""]
    # nothing is fetched: what is named lies in the page itself
    assert all(address.startswith(("#", "data:")) for address in page.addresses)
    assert "http" not in re.sub(r"base64,[^\"]*", "", text) and "<script" not in text and "@import" not in text
    pictures = page.pictures()
    assert len(pictures) == 3 and all(ElementTree.fromstring(picture).tag.endswith("svg") for picture in pictures)
    assert len(text) < 1_000_000
    assert "hidden NMSE, mean" in page.text["fidelity"] and "10 held-out rows" in page.text["fidelity"]
    assert "student layer 2 and teacher layer 3" in page.text["relations"]
    assert "kdeval finetune" in page.text["tasks"] and "kdeval latency" in page.text["latency"]
    provenance = json.loads((run / "provenance.json").read_text())
    for value in (provenance["cache"]["identity_sha256"], provenance["software"]["torch"], "--weight-decay", "0.01"):
        assert value in page.text["provenance"]
    assert provenance["command"] in page.text["reproduce"] and "--student 'it' --json" in page.text["reproduce"]


def test_relations_are_those_of_the_models(run: Path, tiny_store: Path, tiny_teacher: Any) -> None:
    """The teacher's against the teacher itself, the student's against the student, both on the row from the store."""
    maps = relation_maps(run, [str(tiny_store)])
    batch = open_caches([str(tiny_store)]).read_rows(
        maps.row, maps.row + 1, TargetRequest(attention_layers=(maps.teacher_layer,))
    )[maps.view]  # fmt: skip
    assert maps.held_out and maps.row >= 91 and maps.heads == 2
    for folder, layer, found in (
        (tiny_teacher("bert"), maps.teacher_layer, maps.teacher),
        (run, maps.student_layer, maps.student),
    ):
        model = AutoModelForMaskedLM.from_pretrained(folder).eval().base_model
        enable_tap(model)
        with torch.no_grad(), record_attention(model, {layer}) as recorded:
            model(input_ids=batch.input_ids_BT.long(), attention_mask=batch.real_BT().long())
        for name in VECTORS:
            vectors = getattr(recorded.vectors[layer], f"{name}_BTD")
            mean = relation_matrices(vectors, maps.heads, batch.real_BT())[0].mean(0).numpy()
            size = len(maps.tokens)
            windows = np.lib.stride_tricks.sliding_window_view(mean, (size, size))
            assert np.abs(windows - found[name]).max((-1, -2)).min() < 2e-3
    assert all(kl > 0 for kl in maps.kl.values())


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


def test_a_cache_without_attention(run: Path, tmp_path: Path, make_tiny_store: Any) -> None:
    store = make_tiny_store(tmp_path / "c.zarr", max_rows=8, targets="hidden", layers="4")
    with pytest.raises(TargetsError, match="--targets attention"):
        relation_maps(run, [str(store)])
    page = Page(make_report(str(run), [str(store)]))
    assert (
        "holds no attention" in page.text["relations"] and "kdcache build --targets attention" in page.text["relations"]
    )


def test_a_cache_that_the_student_cannot_read_leaves_out_that_section_alone(
    run: Path, tmp_path: Path, tiny_teacher: Any, tiny_corpus: Path
) -> None:
    """Token ids of another vocabulary."""
    out = tmp_path / "c.zarr"
    sizes = {"max_rows": 4, "seq_len": 24, "rows": "document", "targets": "attention"}
    teacher = str(tiny_teacher("roberta"))
    build_cache(BuildSettings(teacher=teacher, corpus=(str(tiny_corpus),), out=str(out), device="cpu", **sizes))
    page = Page(make_report(str(run), [str(out)]))
    assert "has other ids for" in page.text["relations"] and "On held-out rows" in page.text["training"]


def test_records_of_tasks_and_latency(run: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(run, tmp_path / "copy"))
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
    assert "xnli, accuracy × 10045.0" in page.text[""] and "4.5×" in page.text[""]


def test_a_model_from_elsewhere_and_stale_records(run: Path, tiny_teacher_copy: Any) -> None:
    teacher = tiny_teacher_copy("bert")
    shutil.copy(run / "fidelity.json", teacher / "fidelity.json")
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
