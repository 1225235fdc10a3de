"""`kdeval perplexity` on real files: what it prints, leaves behind and refuses."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import pytest

from cli.kdeval import main
from tests.student_train.evaluate.causal_models import make_causal, make_texts

TEXTS = make_texts(6, 20)


@pytest.fixture
def student(tmp_path: Path) -> Path:
    return make_causal(tmp_path / "student", "llama")


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "text.txt"
    path.write_text("\n".join(TEXTS) + "\n", encoding="utf-8")
    return path


def test_record(student: Path, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    teacher = make_causal(tmp_path / "teacher", "gpt2", seed=1)
    packed = tmp_path / "more.jsonl.gz"
    with gzip.open(packed, "wt", encoding="utf-8") as file:
        file.write(json.dumps({"text": TEXTS[0]}))
    flags = ["--student", str(student), "--teacher", str(teacher), "--text", str(text), str(packed), "--device", "cpu"]
    assert main(["perplexity", *flags, "--seq-len", "20", "--stride", "5", "--batch-size", "3", "--json"]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed == json.loads((student / "perplexity.json").read_text())
    assert (printed["evaluation"], printed["student"], printed["teacher"]) == ("perplexity", str(student), str(teacher))
    assert {"software", "git_revision", "command", "created"} <= printed.keys()
    assert (printed["documents"], printed["seq_len"], printed["stride"]) == (7, 20, 5)
    size = sum(len(text.encode()) for text in [*TEXTS, TEXTS[0]])
    assert [printed["scores"][role]["bytes"] for role in ("student", "teacher")] == [size, size]
    assert main(["report", str(student)]) == 0
    assert f"{printed['scores']['student']['bits_per_byte']:.4f}" in (student / "report.html").read_text()


def test_table(student: Path, text: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["perplexity", "--student", str(student), "--text", str(text), "--device", "cpu"]) == 0
    out = capsys.readouterr()
    assert "perplexity │ bits a byte" in out.out.replace("┃", "│") and "teacher" not in out.out
    assert "6 documents" in out.err


def test_refusals(student: Path, text: Path, tiny_teacher: Any, capsys: pytest.CaptureFixture[str]) -> None:
    for flags, message in (
        (["--student", str(tiny_teacher("bert")), "--text", str(text)], "measure it with `kdeval fidelity`"),
        (["--student", str(student), "--text", "nowhere.txt"], "no file matches the corpus 'nowhere.txt'"),
        (["--student", str(student), "--text", str(text), "--stride", "64"], "--stride 64 goes past"),
    ):
        assert main(["perplexity", *flags, "--device", "cpu"]) == 1
        assert message in capsys.readouterr().err
    assert not (student / "perplexity.json").exists()
