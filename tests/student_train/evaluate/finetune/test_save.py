"""The model that a fine-tuning keeps: a task of one's own, saved, loaded by others, exported and measured again."""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnx
import pytest
import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from cli.kdeval import main
from student_train.evaluate.compare.compare import compare_runs
from student_train.evaluate.compare.table import markdown
from student_train.evaluate.origins import read_saved
from student_train.evaluate.report.report import make_report
from tests.student_train.evaluate.report.pages import Page

TRAINED = "--seeds 2 --lr 1e-3 --epochs 1 --batch-size 8 --max-length 16 --device cpu".split()
OWN = ["--columns", "one,other", "--label-column", "alike", "--metric", "f1"]


@dataclass(frozen=True)
class Saved:
    student: Path
    folder: Path
    files: list[str]
    record: dict[str, Any]


def write_pairs(path: Path, count: int, seed: int) -> list[tuple[str, str, str]]:
    """Two words, and whether both begin with the same letter."""
    draw = random.Random(seed)
    words = "bada bafe bagi baha dabo deda defe degi".split()
    pairs = [(draw.choice(words), draw.choice(words)) for _ in range(count)]
    rows = [(one, other, "ja" if one[0] == other[0] else "nein") for one, other in pairs]
    path.write_text("\n".join("\t".join(row) for row in [("one", "other", "alike"), *rows]) + "\n")
    return rows


@pytest.fixture(scope="module")
def saved(tiny_teacher: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Saved:
    """A tiny BERT fine-tuned on pairs of words; do not write there."""
    folder = tmp_path_factory.mktemp("saved")
    write_pairs(folder / "train.tsv", 32, 0)
    write_pairs(folder / "dev.tsv", 24, 1)
    student = folder / "student"
    shutil.copytree(tiny_teacher("bert", num_hidden_layers=1, initializer_range=0.02), student)
    tokenizer = AutoTokenizer.from_pretrained(student)
    names = [*tokenizer.model_input_names, "token_type_ids"]
    tokenizer.init_kwargs["model_input_names"] = tokenizer.model_input_names = names
    tokenizer.save_pretrained(student)  # as BERT's own, which number the texts of a pair
    files = ["--train-file", str(folder / "train.tsv"), "--dev-file", str(folder / "dev.tsv")]
    flags = [*OWN, *files, *TRAINED, "--cache-dir", str(folder / "kept")]
    saves = ["--student", str(student), "--task", "pairs", *flags, "--save", str(folder / "model")]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sys.argv", ["kdeval", "finetune", *saves])  # where records take the command from
        assert main(["finetune", *saves]) == 0
    return Saved(student, folder / "model", files, json.loads((folder / "model" / "finetuned.json").read_text()))


def test_what_is_kept_is_what_was_measured(saved: Saved) -> None:
    record = json.loads((saved.student / "finetune-pairs.json").read_text())
    best = max(range(2), key=lambda seed: record["scores"][seed])
    assert (saved.record["seed"], saved.record["measures"]["dev"]["f1"]) == (best, record["scores"][best])
    assert record["sources"] == saved.record["sources"] == {"train": saved.files[1], "dev": saved.files[3]}
    assert (saved.record["labels"], saved.record["metric"]) == (["ja", "nein"], "f1")
    model = AutoModelForSequenceClassification.from_pretrained(saved.folder).eval()
    tokenizer = AutoTokenizer.from_pretrained(saved.folder)
    assert model.config.id2label == {0: "ja", 1: "nein"}
    rows = [line.split("\t") for line in Path(saved.files[3]).read_text().splitlines()[1:]]
    inputs = tokenizer([row[0] for row in rows], [row[1] for row in rows], padding=True, return_tensors="pt")
    with torch.no_grad():
        predicted = model(**inputs).logits.argmax(1).tolist()
    right = sum(model.config.id2label[number] == row[2] for number, row in zip(predicted, rows, strict=True))
    assert right / len(rows) == pytest.approx(saved.record["measures"]["dev"]["accuracy"])


def test_its_record_says_how_it_was_chosen_and_what_to_know_of_its_scores(saved: Saved) -> None:
    assert "it is the best on dev of 2 seeds: its score there is a little high" in saved.record["notes"]
    assert saved.record["notes"] == list(read_saved(saved.folder).notes)


def test_report_and_comparison_know_it(saved: Saved) -> None:
    score = f"{100 * saved.record['measures']['dev']['f1']:.2f}"
    page = Page(make_report(str(saved.folder))).text
    assert "fine-tuned on no task" not in page["tasks"] and f"dev24{score}" in page["tasks"]
    assert "the best on dev of 2 seeds" in page["tasks"]
    assert "These very weights, fine-tuned on pairs, score" in page[""] and "how it does on a task" not in page[""]
    assert "kdtrain did not train it" in page["provenance"] and "kdeval finetune" in page["reproduce"]
    found = compare_runs([str(saved.folder)])
    assert found.to_json()["rows"][0]["fine_tuned"]["scores"] == {"dev": saved.record["measures"]["dev"]["f1"]}
    assert f"| pairs {score} |" in markdown(found)
    notes = "\n".join(found.notes)
    assert "was itself fine-tuned on pairs" in notes and "the best on dev of 2 seeds" in notes
    assert "no scores of any run" not in notes and "not trained by kdtrain" not in notes


def test_a_result_from_before_is_trained_again(saved: Saved, tmp_path: Path) -> None:
    kept = str(saved.folder.parent / "kept")
    flags = [*OWN, *saved.files, *TRAINED, "--cache-dir", kept, "--save", str(tmp_path / "again")]
    assert main(["finetune", "--student", str(saved.student), "--task", "pairs", *flags]) == 0
    ours, theirs = (folder / "model.safetensors" for folder in (tmp_path / "again", saved.folder))
    assert ours.read_bytes() == theirs.read_bytes()


def test_an_export_is_measured_on_the_task(saved: Saved, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    assert (
        main(["export", str(saved.folder), "--out", str(out), "--int8", "dynamic", "--seconds", "0.1", "--json"]) == 0
    )
    record = json.loads(capsys.readouterr().out)
    assert record["pipeline"] == "text-classification" and set(record["files"]) == {
        "README.md", "config.json", "model.safetensors", "onnx/model_int8_dynamic.onnx", "tokenizer.json",
        "tokenizer_config.json",
    }  # fmt: skip
    graph = onnx.load(out / "onnx" / "model_int8_dynamic.onnx").graph
    assert [each.name for each in graph.input] == ["input_ids", "attention_mask", "token_type_ids"]
    whole, small = record["onnx"]["files"]
    assert whole["score"] == pytest.approx(saved.record["measures"]["dev"]["f1"])
    assert small["score"] is not None and record["onnx"]["examples"] == 24
    card = (out / "README.md").read_text()
    assert "type: examples" in card and "name: f1 on dev" in card
    assert "Fine-tuned on pairs." in card and "--columns one,other" in card and str(tmp_path.parent) not in card


def test_other_examples_are_no_score_beside_its_own(saved: Saved, tmp_path: Path) -> None:
    from student_train.evaluate.export.source import read_source
    from student_train.evaluate.export.task_score import read_examples
    from student_train.evaluate.schemas import SavedSchema
    from teacher_cache.errors import TaskError

    schema, source = SavedSchema.model_validate(saved.record), read_source(str(saved.folder))
    write_pairs(tmp_path / "dev.tsv", 24, 2)
    moved = schema.model_copy(update={"sources": {"dev": str(tmp_path / "dev.tsv")}})
    with pytest.raises(TaskError, match="holds other examples than the model was measured on"):
        read_examples(source, moved, None)
    assert len(read_examples(source, moved, str(tmp_path / "dev.tsv"))) == 24


@pytest.mark.parametrize("there", [True, False])
def test_a_card_does_not_say_where_examples_were(there: bool, saved: Saved, tmp_path: Path) -> None:
    student, place = tmp_path / "student", tmp_path / "secret place"
    shutil.copytree(saved.folder, student)
    place.mkdir()
    if there:
        write_pairs(place / "dev.tsv", 24, 2)
    (student / "finetuned.json").write_text(json.dumps({**saved.record, "sources": {"dev": str(place / "dev.tsv")}}))
    out = tmp_path / "out"
    assert main(["export", str(student), "--out", str(out), "--int8", "dynamic", "--seconds", "0.1"]) == 0
    card = (out / "README.md").read_text()
    why = "'dev.tsv' holds other examples than the model was measured on" if there else "there is no file 'dev.tsv'"
    assert f"the task was not measured again ({why}); --dev-file names" in card
    assert not any(name in card for name in (str(tmp_path), "secret place", Path.cwd().name + "'"))


@pytest.mark.parametrize("place", ["taken", "student/inside"])
def test_places_that_are_refused(
    place: str, saved: Saved, tmp_path: Path, tiny_teacher_copy: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    student = tiny_teacher_copy("bert", num_hidden_layers=1)
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "file").touch()
    out = {"taken": tmp_path / "taken", "student/inside": student / "inside"}[place]
    flags = [*OWN, *saved.files, *TRAINED, "--save", str(out)]
    assert main(["finetune", "--student", str(student), "--task", "pairs", *flags]) == 1
    assert f"--save {str(out)!r}" in capsys.readouterr().err
