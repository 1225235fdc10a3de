"""A student of `kdtrain` with everything that an export can have: files, card, tokenizer, ONNX and int8, measured."""

from __future__ import annotations

import json
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnx
import pytest
import torch
from huggingface_hub import ModelCard
from transformers import AutoModelForMaskedLM, AutoTokenizer

import student_train
from cli.kdeval import main
from student_train.evaluate.onnx.records import OnnxReport
from teacher_cache.build.build import build_cache
from teacher_cache.build.settings import BuildSettings
from teacher_cache.read.pool import open_caches

TEXTS = (".json", ".md", ".jinja", ".txt")


@dataclass(frozen=True)
class Exported:
    student: Path
    out: Path
    record: dict[str, Any]

    @property
    def card(self) -> ModelCard:
        return ModelCard.load(self.out / "README.md")

    def file(self, name: str) -> dict[str, Any]:
        return next(each for each in self.record["onnx"]["files"] if each["file"] == name)


@pytest.fixture(scope="module")
def exported(trained_run: Path, tiny_store: Path, tmp_path_factory: pytest.TempPathFactory) -> Exported:
    """A student of kdtrain with everything that an export can have; do not write there."""
    folder = tmp_path_factory.mktemp("machine")
    student, out = folder / "student", folder / "published"
    shutil.copytree(trained_run, student)
    printed = folder / "printed.json"
    flags = ["--onnx", "--int8", "both", "--cache", str(tiny_store), "--language", "en", "--license", "mit"]
    few = ["--seconds", "0.2", "--length", "8", "--batch-size", "3", "--calibration-rows", "9", "--rows", "6"]
    with printed.open("w") as stdout, pytest.MonkeyPatch.context() as patch:
        patch.setattr("sys.stdout", stdout)
        patch.setattr("sys.argv", ["kdeval", "export", str(student)])
        assert main(["export", str(student), "--out", str(out), *flags, *few, "--json"]) == 0
    return Exported(student, out, json.loads(printed.read_text()))


def test_nothing_else_is_in_the_folder(exported: Exported) -> None:
    wanted = {"README.md", "config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"}
    wanted |= {f"onnx/model{kind}.onnx" for kind in ("", "_int8_dynamic", "_int8_static")}
    assert set(exported.record["files"]) == wanted
    assert {str(file.relative_to(exported.out)) for file in exported.out.rglob("*") if file.is_file()} == wanted
    assert (exported.student / "checkpoints").exists()
    assert not list(exported.out.parent.glob(".*unfinished"))
    ours = (exported.student / "model.safetensors").read_bytes()
    assert ours == (exported.out / "model.safetensors").read_bytes()


def test_no_path_of_the_machine_is_in_it(exported: Exported) -> None:
    code = Path(student_train.__file__).parents[1]
    places = [str(exported.student.parent), str(exported.student.parents[2]), str(Path.home()), sys.prefix, str(code)]
    for file in exported.out.rglob("*"):
        if file.suffix in (*TEXTS, ".onnx"):
            content = file.read_bytes()
            assert [place for place in places if place.encode() in content] == [], file


def test_the_tokenizer_reads_what_the_student_reads(exported: Exported) -> None:
    student, ours = (AutoTokenizer.from_pretrained(folder) for folder in (exported.student, exported.out))
    assert (student.model_max_length, ours.model_max_length) == (24, 64)
    assert "| was trained on rows of | 24 tokens |" in exported.card.content
    assert "| reads at most | 64 tokens |" in exported.card.content
    assert len(ours(" ".join(["babo"] * 99), truncation=True)["input_ids"]) == 64
    told = json.loads((exported.out / "tokenizer.json").read_text())
    assert told["truncation"] is told["padding"] is None


def test_the_card_holds_what_the_records_hold(exported: Exported) -> None:
    data, text = exported.card.data, exported.card.content
    assert (data.pipeline_tag, data.library_name, data.language, data.license) == (
        exported.record["pipeline"], "transformers", "en", "mit",
    )  # fmt: skip
    assert data.base_model is None  # the teacher was a folder
    assert {"kdcache", "knowledge-distillation", "onnx", "int8"} <= set(data.tags)
    fidelity = json.loads((exported.student / "fidelity.json").read_text())
    values = [each.metric_value for each in data.eval_results]
    assert fidelity["hidden"][0]["nmse"] in values and fidelity["relations"][0]["query"] in values
    assert exported.file("onnx/model.onnx")["timings"][0]["median_ms"] in values
    provenance = json.loads((exported.student / "provenance.json").read_text())
    for said in (provenance["cache"]["identity_sha256"], provenance["cache"]["corpus"]["fingerprint"]):
        assert said in text
    assert "kdeval fidelity --student it --json" in text


def test_named_axes_and_errors(exported: Exported) -> None:
    for name in ("model", "model_int8_dynamic", "model_int8_static"):
        graph = onnx.load(exported.out / "onnx" / f"{name}.onnx").graph
        axes = [[axis.dim_param for axis in each.type.tensor_type.shape.dim] for each in graph.input]
        assert [each.name for each in graph.input] == ["input_ids", "attention_mask"]
        assert axes == [["batch", "sequence"]] * 2
        assert [each.name for each in graph.output] == [exported.record["onnx"]["output"]]
    assert exported.file("onnx/model.onnx")["max_error"] < 1e-4


def test_int8_is_measured(exported: Exported) -> None:
    report = OnnxReport.from_json(exported.record["onnx"])
    assert (report.rows, report.held_out, report.calibration_rows) == (6, True, 9)
    whole, exact, dynamic, static = report.files
    assert whole.bytes == (exported.student / "model.safetensors").stat().st_size and not report.notes
    assert whole.file is None and exact.cosine == pytest.approx(1, abs=1e-6)
    assert exact.hidden_nmse == pytest.approx(whole.hidden_nmse, abs=1e-4)
    for file in (dynamic, static):
        assert file.cosine is not None and 0.9 < file.cosine < 1
        assert file.hidden_nmse is not None and file.max_error > exact.max_error
        assert file.bytes < exact.bytes
        assert [(timing.batch_size, timing.seq_len) for timing in file.timings] == [(1, 8), (3, 8)]
    kept = json.loads((exported.student / "onnx.json").read_text())
    assert kept["evaluation"] == "onnx" and kept["files"] == exported.record["onnx"]["files"]


def test_a_comparison_has_the_int8_files(exported: Exported, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["compare", str(exported.student), "--json"]) == 0
    (row,) = json.loads(capsys.readouterr().out)["rows"]
    best = OnnxReport.from_json(exported.record["onnx"]).int8
    assert best is not None and row["int8"]["cosine"] == best.cosine and row["int8"]["bytes"] == best.bytes
    assert main(["compare", str(exported.student)]) == 0
    assert "int8 cosine" in capsys.readouterr().out


def test_logits_are_compared_with_the_teachers(
    tiny_teacher_copy: Any, tiny_store: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The teacher as its own student: what its file is off by is what int8 does."""
    flags = ["--int8", "dynamic", "--cache", str(tiny_store), "--rows", "4", "--seconds", "0.1", "--length", "8"]
    student = str(tiny_teacher_copy("bert"))
    assert main(["export", student, "--out", str(tmp_path / "out"), *flags, "--json"]) == 0
    report = OnnxReport.from_json(json.loads(capsys.readouterr().out)["onnx"])
    whole, small = report.files
    assert report.output == "logits" and whole.hidden_nmse is None
    assert whole.output_kl is not None and small.output_kl is not None
    assert whole.output_kl < small.output_kl < 0.1
    assert small.agreement is not None and 0.5 < small.agreement < 1
    assert small.cosine is not None and 0.9 < small.cosine < 1


def test_files_in_half_precision(tiny_teacher_copy: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """What PyTorch was measured in is twice as large."""
    student, out = tiny_teacher_copy("bert", num_hidden_layers=1), tmp_path / "out"
    model = AutoModelForMaskedLM.from_pretrained(student, dtype=torch.bfloat16)
    model.save_pretrained(student)
    flags = ["--int8", "dynamic", "--seconds", "0.1", "--length", "8"]
    assert main(["export", str(student), "--out", str(out), *flags, "--json"]) == 0
    whole = OnnxReport.from_json(json.loads(capsys.readouterr().out)["onnx"]).files[0]
    assert (whole.name, whole.bytes) == ("PyTorch, float32", 4 * model.num_parameters())
    assert "the files of the weights are in bfloat16" in (out / "README.md").read_text()


def test_documents_of_a_decoders_row_are_read_alone(
    causal_teacher: Path, causal_corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Where they saw each other, the model in PyTorch would be far from its own cached states."""
    store, student = tmp_path / "cache.zarr", tmp_path / "student"
    shutil.copytree(causal_teacher, student)
    build_cache(
        BuildSettings(
            teacher=str(causal_teacher), corpus=(str(causal_corpus),), out=str(store), seq_len=32, max_rows=20,
            targets="hidden", layers="4", precision="float16", device="cpu",
        )
    )  # fmt: skip
    reader = open_caches(str(store))
    cache = {"identity_sha256": reader.identity_sha256, "rows": reader.rows}
    held_out = {"first": reader.rows - 8, "count": 8}
    record = {"cache": cache, "held_out_rows": held_out, "settings": {}}
    (student / "provenance.json").write_text(json.dumps(record))
    flags = ["--onnx", "--onnx-output", "hidden", "--cache", str(store), "--rows", "8", "--seconds", "0.1"]
    assert main(["export", str(student), "--out", str(tmp_path / "out"), *flags, "--length", "8", "--json"]) == 0
    whole, exact = OnnxReport.from_json(json.loads(capsys.readouterr().out)["onnx"]).files
    assert whole.hidden_nmse == pytest.approx(0, abs=1e-3) == exact.hidden_nmse
    assert exact.cosine == pytest.approx(1, abs=1e-5) and exact.agreement is None
