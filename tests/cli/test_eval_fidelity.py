"""`kdeval fidelity` on real stores and students: what it prints, what it leaves behind, what it refuses."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

from cli.kdeval import main
from student_train.evaluate.fidelity.records import FidelityReport
from teacher_cache.build.build import build_cache
from teacher_cache.build.settings import BuildSettings


@pytest.fixture(scope="module")
def cache(tiny_teacher: Any, tiny_corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store with every target of a tiny BERT: 100 rows of 32 tokens in blocks of 8."""
    out = tmp_path_factory.mktemp("kdeval") / "cache.zarr"
    build_cache(
        BuildSettings(
            teacher=str(tiny_teacher("bert")),
            corpus=(str(tiny_corpus),),
            out=str(out),
            seq_len=32,
            max_rows=100,
            block_rows=8,
            layers="all",
            k=16,
            precision="float16",
        )
    )
    return out


@pytest.fixture
def teacher_as_student(tiny_teacher_copy: Any) -> Path:
    """The teacher itself as a student from elsewhere."""
    return Path(tiny_teacher_copy("bert"))


def test_any_encoder_with_the_same_vocabulary(
    cache: Path, teacher_as_student: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["fidelity", "--student", str(teacher_as_student), "--cache", str(cache), "--json"]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed == json.loads((teacher_as_student / "fidelity.json").read_text())
    assert {"software", "git_revision", "command", "created", "fingerprints"} <= printed.keys()
    assert all(len(fingerprint) == 64 for fingerprint in printed["fingerprints"].values())
    report = FidelityReport.from_json(printed)
    assert (report.first_row, report.last_row) == (98, 99)
    # the student's last layer stands against the cached third; what the two agree on is all that the teacher computes
    assert report.relations[0].teacher_layer == 3
    assert {(pair.student_layer, pair.teacher_layer) for pair in report.hidden} == {(i, i) for i in range(1, 5)}
    # one row of 32 tokens is all that there is to fit a map of 32 components on
    assert max(pair.nmse for pair in report.hidden) < 0.05
    assert report.distribution is not None
    assert report.distribution.kl == pytest.approx(0, abs=1e-4)
    assert report.distribution.top1_agreement == 1


def test_more_rows_than_one_block(cache: Path, teacher_as_student: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Rows of a recorded split, read across blocks in batches that straddle nothing: every token is counted once."""
    provenance = {
        "cache": {"path": "elsewhere.zarr", "identity_sha256": "other", "rows": 100},
        "held_out_rows": {"first": 70, "count": 30},
        "objective": {"mha": {"pairs": [[3, 3]], "relation_heads": 8}},
    }
    (teacher_as_student / "provenance.json").write_text(json.dumps(provenance))
    arguments = ["fidelity", "--student", str(teacher_as_student), "--cache", str(cache), "--json", "--batch-size", "3"]
    assert main(arguments) == 0
    report = FidelityReport.from_json(json.loads(capsys.readouterr().out))
    assert (report.first_row, report.last_row, report.held_out) == (70, 99, False)
    assert 29 * 32 < report.tokens <= 30 * 32
    assert report.relations[0].total == pytest.approx(0, abs=1e-4)
    assert "other contents" in report.notes[0]
    assert main([*arguments, "--rows", "5"]) == 0
    assert json.loads(capsys.readouterr().out)["first_row"] == 95


def test_table(cache: Path, tiny_teacher: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    student = Path(
        shutil.copytree(tiny_teacher("bert", head=False, num_hidden_layers=2, hidden_size=24), tmp_path / "s")
    )
    assert main(["fidelity", "--student", str(student), "--cache", str(cache)]) == 0
    printed = capsys.readouterr().out
    assert "relation KL, query" in printed and "hidden NMSE, mean" in printed
    assert "no masked-LM head" in printed and "output KL  " not in printed


def test_refusals(cache: Path, tiny_teacher: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def refused(*arguments: str) -> str:
        assert main(["fidelity", *arguments]) == 1
        output = capsys.readouterr()
        assert output.out == "" and "Traceback" not in output.err
        return output.err

    student = str(tiny_teacher("bert"))
    assert "vocabulary" in refused("--student", str(tiny_teacher("xlm-roberta")), "--cache", str(cache))
    assert "no student directory" in refused("--student", str(tmp_path / "nowhere"), "--cache", str(cache))
    assert "nowhere.zarr" in refused("--student", student, "--cache", str(tmp_path / "nowhere.zarr"))
    assert "--rows 0" in refused("--student", student, "--cache", str(cache), "--rows", "0")
    placed = ("--student", student, "--cache", str(cache), "--device-map", "auto")
    assert "--device-map does nothing without --exact" in refused(*placed)
    absent = refused(*placed, "--exact", "--max-memory", "97:1GB")
    assert "--max-memory names device 97, which is not there" in absent
    assert list(Path(student).glob("fidelity*")) == []


@pytest.mark.parametrize(
    "record",
    [
        {"cache": "elsewhere"},
        {"cache": {"rows": 100}},
        {"cache": {"rows": 100}, "held_out_rows": {"count": 1000}},
        {"objective": []},
        {"objective": {"mha": 3}},
        {"objective": {"mha": {"pairs": [[9, 3]], "relation_heads": 8}}},
        {"objective": {"mha": {"pairs": [[4, 3]], "relation_heads": 7}}},
        {"objective": {"hs": {"pairs": [[1, 2], [9, 4]]}}},
        {"objective": {"hs": {"pairs": "all"}}},
    ],
)
def test_a_record_of_something_else_is_noted_and_left_aside(
    record: dict[str, Any], cache: Path, teacher_as_student: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (teacher_as_student / "provenance.json").write_text(json.dumps(record))
    assert main(["fidelity", "--student", str(teacher_as_student), "--cache", str(cache), "--json"]) == 0
    report = FidelityReport.from_json(json.loads(capsys.readouterr().out))
    assert "no record of kdtrain" in report.notes[0]
    assert (report.first_row, report.last_row) == (98, 99) and report.relations[0].teacher_layer == 3


@pytest.mark.parametrize("family", ["vit", "encoder-decoder", "bart"])
def test_what_is_no_encoder_is_refused_by_family(
    family: str, cache: Path, teacher_as_student: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (teacher_as_student / "config.json").write_text(json.dumps({"model_type": family}))
    assert main(["fidelity", "--student", str(teacher_as_student), "--cache", str(cache)]) == 1
    printed = capsys.readouterr()
    assert printed.out == "" and f"is of family {family!r}" in printed.err


def test_a_student_of_nan_has_no_record(
    cache: Path, teacher_as_student: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    weights = load_file(teacher_as_student / "model.safetensors")
    weights["bert.embeddings.LayerNorm.weight"].fill_(float("nan"))
    save_file(weights, teacher_as_student / "model.safetensors", metadata={"format": "pt"})
    assert main(["fidelity", "--student", str(teacher_as_student), "--cache", str(cache), "--json"]) == 1
    printed = capsys.readouterr()
    assert printed.out == "" and "are not finite numbers" in printed.err
    assert not (teacher_as_student / "fidelity.json").exists()
