"""`kdeval lm-eval` with the real harness: what it prints and leaves behind, and where it is not installed."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from cli.kdeval import main
from tests.student_train.evaluate.causal_models import make_causal

TASK = """
task: animals
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{question}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: "{{{{answer}}}}"
metric_list: [{{metric: acc}}]
"""


@pytest.fixture
def student(tmp_path: Path) -> Path:
    return make_causal(tmp_path / "student", "llama")


@pytest.fixture
def tasks(tmp_path: Path) -> Path:
    folder = tmp_path / "tasks"
    folder.mkdir()
    question = {"question": "the cat", "choices": ["sees", "hears"], "answer": 0}
    (folder / "animals.jsonl").write_text(f"{json.dumps(question)}\n" * 4)
    (folder / "animals.yaml").write_text(TASK.format(data=folder / "animals.jsonl"))
    return folder


def test_record(student: Path, tasks: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("lm_eval", reason="lm-evaluation-harness is not installed (extra 'lm-eval')")
    flags = ["--student", str(student), "--tasks", "animals", "--include-path", str(tasks), "--device", "cpu"]
    assert main(["lm-eval", *flags, "--json"]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed == json.loads((student / "lm-eval.json").read_text())
    assert printed["evaluation"] == "lm-eval" and {"software", "command", "harness"} <= printed.keys()
    [result] = printed["results"]
    assert (result["task"], result["examples"], result["main"]) == ("animals", 4, "acc")
    assert result["metrics"]["acc"]["value"] in (0.0, 1.0)
    assert main(["lm-eval", *flags]) == 0
    assert "animals" in capsys.readouterr().out
    assert main(["compare", str(student)]) == 0
    assert "animals acc" in capsys.readouterr().out


def test_where_it_is_not_installed(
    student: Path, tasks: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    assert main(["lm-eval", "--student", str(student), "--tasks", "animals"]) == 1
    assert "pip install 'kdcache[lm-eval]'" in capsys.readouterr().err
    assert not (student / "lm-eval.json").exists()
