"""Fine-tuning of tiny students on tasks that can be learned: what is measured, what is kept, what is refused."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from student_train.evaluate.finetune.finetune import measure_finetune
from student_train.evaluate.finetune.records import FinetuneReport
from student_train.evaluate.finetune.settings import FinetuneSettings
from teacher_cache.errors import StudentError, TaskError

WORDS = "bada bafe bagi baha dabo deda defe degi".split()


Finetune = Callable[..., tuple[FinetuneReport, int]]


def sentences(count: int, seed: int, *, mixed: bool) -> list[list[str]]:
    """Words that start with b or with d: one of both throughout a sentence, or mixed."""
    draw = random.Random(seed)
    kinds = [WORDS[:4], WORDS[4:]]
    return [draw.choices(WORDS if mixed else draw.choice(kinds), k=draw.randint(2, 9)) for _ in range(count)]


def write_task(folder: Path, task: str) -> dict[str, str]:
    """Files of a task that can be learned: what words start with decides the label, or for ner that of each word."""
    files = {}
    for seed, (name, count) in enumerate((("train", 96), ("dev", 40))):
        lines = []
        for words in sentences(count, seed, mixed=task == "ner"):
            if task == "ner":
                lines += [f"{word}\t{'B-PER' if word[0] == 'd' else 'O'}" for word in words] + [""]
            elif task == "stsb":
                lines.append(f"{words[0]}\t{' '.join(words[1:])}\t{5.0 * (words[0][0] == 'd')}")
            else:
                lines.append(f"{' '.join(words)}\t{int(words[0][0] == 'd')}")
        header = {"ner": [], "stsb": ["sentence1\tsentence2\tscore"], "sst2": ["sentence\tlabel"]}[task]
        path = folder / f"{task}-{name}{'.txt' if task == 'ner' else '.tsv'}"
        path.write_text("\n".join([*header, *lines]) + "\n")
        files[f"{name}_file"] = str(path)
    return files


@pytest.fixture
def finetune(tmp_path: Path, tiny_teacher: Any) -> Finetune:
    """Fine-tune the tiny BERT; the report, and how many updates were made."""

    encoder = str(tiny_teacher("bert", initializer_range=0.02))

    def run(task: str, **options: Any) -> tuple[FinetuneReport, int]:
        given = {"student": encoder, "cache_dir": str(tmp_path / "kept"), "seeds": 1, "lr": "1e-3"}
        settings = FinetuneSettings(
            task=task,  # type: ignore[arg-type]
            **{**write_task(tmp_path, task), **given, "max_length": 32, "batch_size": 8, "epochs": 4, **options},
        )
        steps: list[int] = []

        def show(what: str, step: int, total: int) -> None:
            steps.append(step)
            print("noise")

        report = measure_finetune(settings, device="cpu", show=show)
        return report, len(steps)

    return run


@pytest.mark.parametrize("task", ["sst2", "stsb", "ner"])
def test_a_task_that_can_be_learned(task: str, finetune: Finetune) -> None:
    report, steps = finetune(task)
    assert steps == 48
    # two values in the labels and many in the predictions: no rank correlation is above 0.866
    assert report.scores[0] > (0.8 if task == "stsb" else 0.95)
    assert report.scores == [report.seeds[0].measures["dev"][report.metric]]
    assert report.examples == {"train": 96, "dev": 40}
    assert report.notes == ()


def test_what_is_printed_while_training_is_no_result(finetune: Finetune, capsys: pytest.CaptureFixture[str]) -> None:
    finetune("sst2", epochs=0.1)
    output = capsys.readouterr()
    assert output.out == "" and "noise" in output.err


def test_results_are_kept_by_content(finetune: Finetune, tiny_teacher: Any, tmp_path: Path) -> None:
    first, steps = finetune("sst2", epochs=0.5)
    assert steps == 6
    again, steps = finetune("sst2", epochs=0.5)
    assert (again, steps) == (first, 0)
    # what an interrupted run has finished is not done again, and each seed is its own
    two, steps = finetune("sst2", epochs=0.5, seeds=2)
    assert steps == 6 and two.scores[0] == first.scores[0] and two.fingerprint == first.fingerprint
    # a result comes out the same where it is not kept
    fresh, steps = finetune("sst2", epochs=0.5, seeds=2, cache_dir=str(tmp_path / "other"))
    assert steps == 12 and fresh == two
    # other weights, other settings, other examples, a damaged file: all are trained
    assert finetune("sst2", epochs=0.5, student=str(tiny_teacher("bert", seed=1)))[1] == 6
    assert finetune("sst2", epochs=0.5, batch_size=32)[1] == 2
    assert finetune("sst2", epochs=0.5, train_rows=48)[1] == 3
    for file in (tmp_path / "kept").glob("*.json"):
        file.write_text(file.read_text()[:-20])
    assert finetune("sst2", epochs=0.5) == (first, 6)


def test_the_best_learning_rate_on_dev_counts(finetune: Finetune, tmp_path: Path) -> None:
    tests = (f"one={tmp_path / 'sst2-dev.tsv'}", f"two={tmp_path / 'sst2-train.tsv'}")
    report, _ = finetune("sst2", lr="1e-9,1e-3", seeds=2, test_files=tests)
    assert [result.learning_rate for result in report.seeds] == [1e-3, 1e-3]
    record = report.to_json()
    assert record["by_test"].keys() == {"one", "two"}
    assert record["by_test"]["one"]["scores"] == report.scores_on("dev")
    means = [sum(pair) / 2 for pair in zip(*(each["scores"] for each in record["by_test"].values()), strict=True)]
    assert record["scores"] == pytest.approx(means)
    deviation = abs(record["scores"][0] - record["scores"][1]) / 2**0.5
    assert record["sd"] == pytest.approx(deviation)
    assert report.notes == ()
    assert "chosen on the examples that are reported" in " ".join(finetune("sst2", lr="1e-9,1e-3", epochs=0.1)[0].notes)


def test_words_that_were_cut_count_as_missed(finetune: Finetune) -> None:
    whole, _ = finetune("ner")
    assert whole.settings["tag_scheme"] == "IOB"
    cut, _ = finetune("ner", max_length=8)
    assert cut.seeds[0].measures["dev"]["recall"] < whole.seeds[0].measures["dev"]["recall"] - 0.03
    assert any("of dev are longer than 8 tokens" in note for note in cut.notes)
    # the same where nothing had to be trained
    assert finetune("ner", max_length=8)[0].notes == cut.notes


def test_a_run_that_learned_nothing_is_told_apart(finetune: Finetune) -> None:
    """Its score is the share of the larger class, which looks like one that a student has earned."""
    report, _ = finetune("sst2", lr="1", epochs=1)
    assert report.seeds[0].constant == ["dev"]
    assert "of seed 0, all examples got the same prediction" in report.notes[0]
    assert finetune("sst2", lr="1", epochs=1)[0].notes == report.notes


def test_directories_that_cannot_be_finetuned(finetune: Finetune, tiny_teacher_copy: Any, tmp_path: Path) -> None:
    folder = tiny_teacher_copy("bert")
    weights = load_file(folder / "model.safetensors")

    def refused(said: str) -> None:
        with pytest.raises(StudentError, match=said) as caught:
            finetune("sst2", epochs=1, student=str(folder))
        assert str(folder) in str(caught.value) or "--lr" in str(caught.value)

    name = "bert.encoder.layer.1.output.dense.weight"
    save_file({key: value for key, value in weights.items() if key != name}, folder / "model.safetensors")
    refused(f"lacks 1 weights of its encoder, '{name}'")
    save_file({**weights, name: torch.full_like(weights[name], torch.nan)}, folder / "model.safetensors")
    refused("NaN or infinite")
    save_file(weights, folder / "model.safetensors")
    vocabulary = json.loads((folder / "tokenizer.json").read_text())
    vocabulary["model"]["vocab"]["beyond"] = 200
    (folder / "tokenizer.json").write_text(json.dumps(vocabulary))
    refused("ids go up to 200, the model has 200 vocabulary entries")
    for file in folder.glob("*token*"):
        file.unlink()
    refused("tokenizer in .* cannot be used")
    (folder / "model.safetensors").unlink()
    with pytest.raises(StudentError, match="no student directory"):
        finetune("sst2", student=str(tmp_path / "nowhere"))


def test_tags_of_another_kind(finetune: Finetune, tmp_path: Path) -> None:
    other = tmp_path / "other.txt"
    other.write_text("dabo\tB-person\nbada\tO\n")
    with pytest.raises(TaskError, match=r"other.txt' \(person\) have other names .* \(PER\)"):
        finetune("ner", dev_file=str(other))
    other.write_text("dabo\tB-PER\nbada\tB-LOC\n")
    report, _ = finetune("ner", epochs=1, dev_file=str(other))
    assert report.notes == ("entities that training has no example of count as missed: LOC",)
