"""The model card of an export: README.md with the metadata that the hub reads, and text for people.

In: `Facts`. Out: a card of `huggingface_hub`, which checks its own form. Every figure is one of a record of these very
weights; what was not measured is not said.
"""

from __future__ import annotations

from pathlib import Path

from huggingface_hub import ModelCard

from student_train.evaluate.export.card_data import card_data
from student_train.evaluate.export.card_text import (
    introduction,
    made_by,
    measures,
    properties,
    remarks,
    training_data,
    usage,
)
from student_train.evaluate.export.facts import Facts
from student_train.evaluate.markdown import plain

NAME = "README.md"


def make_card(facts: Facts) -> ModelCard:
    """The card."""
    sections = (
        introduction(facts),
        usage(facts),
        properties(facts),
        measures(facts),
        training_data(facts),
        made_by(facts),
        remarks(facts.notes),
    )
    text = "\n\n".join([f"# {plain(facts.settings.called)}", *filter(None, sections)])
    return ModelCard(f"---\n{card_data(facts).to_yaml()}\n---\n\n{text}\n", ignore_metadata_errors=False)


def write_card(card: ModelCard, folder: Path) -> None:
    """README.md in the folder."""
    card.save(folder / NAME)
