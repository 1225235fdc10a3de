"""What a measurement of perplexity found, as plain records that turn into JSON and back, and as a table for people.

`kdeval perplexity` writes a `PerplexityReport` into the student's directory as perplexity.json. Nothing is measured.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

from student_train.evaluate.schemas import PerplexitySchema
from teacher_cache.fields import check_fields
from teacher_cache.outside import visible

if TYPE_CHECKING:
    from rich.table import Table


@dataclass(frozen=True, kw_only=True)
class TextScore:
    """One model on the text. `tokens` are those predicted, `bytes` the UTF-8 bytes of the text that they spell.

    `start` is the token that stood before each document, None where the tokenizer has none.
    """

    nats: float
    tokens: int
    bytes: int
    start: str | None

    @property
    def loss(self) -> float:
        """Nats a token."""
        return self.nats / self.tokens

    @property
    def perplexity(self) -> float:
        """E to the nats a token; infinite where that is no number that a computer has."""
        return math.exp(self.loss) if self.loss < 700 else math.inf

    @property
    def bits_per_byte(self) -> float:
        """Nats of all tokens / ln 2 / bytes: what tokenizers of any kind are compared by."""
        return self.nats / math.log(2) / self.bytes

    def to_json(self) -> dict[str, Any]:
        """The JSON object, with what follows from the sums; a perplexity beyond all numbers is null."""
        perplexity = self.perplexity if math.isfinite(self.perplexity) else None
        return {
            **asdict(self),
            "nats_per_token": self.loss,
            "perplexity": perplexity,
            "bits_per_byte": self.bits_per_byte,
        }


@dataclass(frozen=True, kw_only=True)
class PerplexityReport:
    """A student on text, beside its teacher if there is one.

    `fingerprints` are SHA-256 of the `student`'s and the `teacher`'s weight files, of the `text` that was read, and of
    the `vocabulary` and `teacher_vocabulary` of their tokenizers.
    """

    student: str
    teacher: str | None
    text: tuple[str, ...]
    documents: int
    seq_len: int
    stride: int
    dtype: str
    device: str
    student_score: TextScore
    teacher_score: TextScore | None
    fingerprints: Mapping[str, str] = field(default_factory=dict)
    notes: tuple[str, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """The JSON object."""
        return {
            "student": self.student,
            "teacher": self.teacher,
            "text": list(self.text),
            "documents": self.documents,
            "seq_len": self.seq_len,
            "stride": self.stride,
            "dtype": self.dtype,
            "device": self.device,
            "scores": {
                "student": self.student_score.to_json(),
                "teacher": None if self.teacher_score is None else self.teacher_score.to_json(),
            },
            "fingerprints": dict(self.fingerprints),
            "notes": list(self.notes),
        }

    @classmethod
    def from_json(cls, record: Mapping[str, Any]) -> PerplexityReport:
        """From what `to_json` gave.

        Raises:
            ValueError: it is none; the message names the field.
        """
        fields = check_fields(PerplexitySchema, record).model_dump()
        scores = fields.pop("scores")
        texts: dict[str, Any] = {"text": tuple(fields["text"]), "notes": tuple(fields["notes"])}
        return cls(
            **{**fields, **texts},
            student_score=TextScore(**scores["student"]),
            teacher_score=None if scores["teacher"] is None else TextScore(**scores["teacher"]),
        )

    def lines(self) -> list[tuple[str, TextScore]]:
        """The models by name of their role."""
        beside = [] if self.teacher_score is None else [("teacher", self.teacher_score)]
        return [("student", self.student_score), *beside]


COLUMNS = ("", "perplexity", "bits a byte", "nats a token", "tokens", "bytes a token")


def text_cells(score: TextScore) -> list[str]:
    """The numbers of a line of the table."""
    return [
        format_perplexity(score.perplexity),
        f"{score.bits_per_byte:.4f}",
        f"{score.loss:.4f}",
        f"{score.tokens:,}",
        f"{score.bytes / score.tokens:.2f}",
    ]


def format_perplexity(value: float) -> str:
    """Four digits: `23.41`, `1.234e+06`."""
    return f"{value:.2f}" if value < 1000 else f"{value:.4g}"


def perplexity_table(name: str, report: PerplexityReport) -> Table:
    """A line for the student, and for the teacher if it was measured."""
    from rich.markup import escape
    from rich.table import Table

    table = Table(
        title=f"Text under {escape(visible(name))}",
        caption=f"{report.documents:,} documents, {report.student_score.bytes:,} bytes; windows of {report.seq_len} "
        f"tokens, {report.stride} further each",
        title_justify="left",
        caption_justify="left",
    )
    for place, column in enumerate(COLUMNS):
        table.add_column(column, justify="right" if place else "left")
    for role, score in report.lines():
        table.add_row(role, *text_cells(score))
    return table
