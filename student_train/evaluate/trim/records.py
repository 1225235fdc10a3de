"""What trimming a student did to it, as a plain record that turns into JSON, and as a table for people.

`kdeval trim` leaves it in the directory that it writes as trim.json. Nothing is measured here.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.table import Table


@dataclass(frozen=True, kw_only=True)
class ModelSize:
    """`embedding` are the parameters of the table of input ids, `bytes` those of weights and tokenizer on disk."""

    ids: int
    parameters: int
    embedding: int
    bytes: int


@dataclass(frozen=True, kw_only=True)
class TrimReport:
    """`used` ids of the text were asked for, of `tokens`; `pieces` says what differs about the text's pieces."""

    student: str
    out: str
    text: tuple[str, ...]
    coverage: float
    tokens: int
    used: int
    before: ModelSize
    after: ModelSize
    pieces: Mapping[str, int]
    notes: tuple[str, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """The JSON object."""
        return asdict(self)


def trim_table(name: str, report: TrimReport) -> Table:
    """Sizes before and after."""
    from rich.table import Table

    table = Table(title=f"{name}, trimmed")
    for column in ("", "before", "after", "share"):
        table.add_column(column, justify="left" if not column else "right")
    rows = {
        "ids": (report.before.ids, report.after.ids),
        "parameters": (report.before.parameters, report.after.parameters),
        "of these, embeddings of ids": (report.before.embedding, report.after.embedding),
        "bytes of weights and tokenizer": (report.before.bytes, report.after.bytes),
    }
    for what, (before, after) in rows.items():
        table.add_row(what, f"{before:,}", f"{after:,}", f"{after / max(1, before):.1%}")
    return table
