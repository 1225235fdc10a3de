"""What a card claims of records: caveats stand beside the figures, and nothing is said that no record knows."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import ModelCard

from cli.kdeval import main
from student_train.evaluate.export.card_text import measures
from student_train.evaluate.export.embedding import Similarity
from student_train.evaluate.export.facts import Facts
from student_train.evaluate.export.settings import ExportSettings
from student_train.evaluate.export.source import read_source
from student_train.evaluate.fidelity.records import DistributionFidelity, FidelityReport
from student_train.evaluate.lm_eval.records import Metric, TaskResult
from student_train.evaluate.run_records import read_run
from student_train.run_schemas import CacheSchema
from tests.student_train.evaluate.causal_models import make_causal
from tests.student_train.evaluate.left_records import finetuned, harnessed, read_text, write


@pytest.fixture
def student(tiny_teacher_copy: Any) -> Path:
    return tiny_teacher_copy("bert", num_hidden_layers=1)


@pytest.fixture
def decoder(tmp_path: Path) -> Path:
    return make_causal(tmp_path / "decoder", "llama")


def card_of(student: Path) -> ModelCard:
    out = student.parent / "published"
    assert main(["export", str(student), "--out", str(out)]) == 0
    return ModelCard.load(out / "README.md")


def test_caveats_stand_beside_the_figures(decoder: Path) -> None:
    whole = Metric(value=0.9, stderr=None, higher_is_better=True)
    group = TaskResult(
        task="mmlu", metrics={"acc": whole}, group=None, version=None, shots=None, examples=None, config_sha256=None
    )
    one = TaskResult(
        task="arc", metrics={"acc": Metric(value=1.0, stderr=0.1, higher_is_better=True)}, group=None, version="1",
        shots=0, examples=2, config_sha256="c",
    )  # fmt: skip
    harnessed(decoder, {}, results=(group, one), limit=2, notes=("such scores are for trying out",))
    read_text(decoder, 1.2, notes=("31% of the tokens are unknown: its bits a byte are too low",))
    finetuned(decoder, "rte", [0.5], notes=["of seed 0, all examples got the same prediction"])
    card = card_of(decoder)
    text = card.content
    for said in (
        "31% of the tokens are unknown", "such scores are for trying out", "rte: of seed 0, all examples got",
        "on the first 2 questions of each task alone", "| mmlu | acc | 0.9000 | – | – | – |",
        "| arc | acc | 1.0000 | 0.1000 | 0 | 2 |", "**Text** (text.txt, 3 documents)",
    ):  # fmt: skip
        assert said in text
    assert "has not seen" not in text and "perplexity" in {each.metric_type for each in card.data.eval_results}
    assert not {"mmlu", "arc"} & {each.dataset_type for each in card.data.eval_results}


def test_scores_of_whole_tasks_are_results(decoder: Path) -> None:
    harnessed(decoder, {"arc": 0.5})
    assert [(each.dataset_type, each.metric_value) for each in card_of(decoder).data.eval_results] == [("arc", 0.5)]


def test_a_number_beyond_all_numbers_is_no_result(decoder: Path) -> None:
    read_text(decoder, 600.0)
    assert {each.metric_type for each in card_of(decoder).data.eval_results} == {"bits_per_byte"}


def test_notes_name_no_place(student: Path) -> None:
    place = student.parent / "my stores"
    notes = (
        f"the student was trained from a store with other contents ({str(place / 'c.zarr')!r}): the last 9 rows",
        f"lengths end at 64 tokens: student {str(student)!r} reads no more",
        f"it lies in {student}/x",
    )
    report = FidelityReport(
        student=str(student), cache="c", first_row=0, last_row=9, held_out=False, tokens=9, notes=notes,
        distribution=DistributionFidelity(kl=0.5, top1_agreement=0.5, positions=9, temperature=1.0),
    )  # fmt: skip
    write(student / "fidelity.json", {"evaluation": "fidelity", **report.to_json()})
    text = card_of(student).content
    assert "other contents ('c.zarr'): the last 9 rows" in text and "it lies in x" in text
    assert str(student.parent) not in text and "my stores" not in text


@pytest.mark.parametrize(
    "task, changes, claimed",
    [
        ("sst2", {}, ("text-classification", "examples", None)),
        ("sst2", {"sources": {"train": "a.tsv", "dev": "/me/dev.tsv"}}, ("text-classification", "examples", None)),
        (
            "sst2",
            {"sources": {"train": "a.tsv", "dev": "nyu-mll/glue:sst2:validation"}},
            ("text-classification", "nyu-mll/glue", "validation"),
        ),
        (
            "xnli",
            {"sources": {"train": "a", "dev": "b", "de": "facebook/xnli:de:test", "en": "facebook/xnli:en:test"}},
            ("text-classification", "facebook/xnli", None),
        ),
        ("places", {"settings": {"tag_scheme": "IOB2"}}, ("token-classification", "examples", None)),
    ],
)
def test_a_dataset_is_claimed_where_it_was_read(
    task: str, changes: dict[str, Any], claimed: tuple[str, str, str | None], student: Path
) -> None:
    finetuned(student, task, [0.5, 0.75], **changes)
    (result,) = card_of(student).data.eval_results
    assert (result.task_type, result.dataset_type, result.dataset_split) == claimed
    assert (result.dataset_name, result.metric_value) == (task, 0.625)


def test_how_it_was_made(student: Path) -> None:
    """Of all stores, from what they were derived of, to the trimming."""
    derived = "kdcache derive a.zarr b.zarr; a.zarr was made 2026-01-01 by: /bin/kdcache build --out /me/a.zarr"
    stores = [{"command": derived}, {"command": "kdcache build --out c.zarr"}]
    cache = {"path": "p", "identity_sha256": "0" * 64, "rows": 9, "command": derived, "stores": stores}
    write(student / "provenance.json", {"settings": {}, "cache": cache, "command": "kdtrain --cache b.zarr c.zarr"})
    write(student / "trim.json", {"evaluation": "trim", "command": "kdeval trim --text /me/de.txt"})
    shown = (
        "kdcache build --out a.zarr\nkdcache derive a.zarr b.zarr\nkdcache build --out c.zarr\n"
        "kdtrain --cache b.zarr c.zarr\nkdeval trim --text de.txt\n"
    )
    assert shown in card_of(student).content


def test_sentences_that_are_not_known_to_be_held_out(student: Path) -> None:
    found = Similarity(sentences=9, cosine=None, correlation=0.5, error=0.1)
    facts = Facts(
        settings=ExportSettings(out="x"), source=read_source(str(student)), run=read_run(str(student)), provenance={},
        cache=CacheSchema(), similarity=found,
    )  # fmt: skip
    assert "of 9 sentences, not known to be held out" in measures(facts)
