"""What an evaluation found, as plain records that turn into JSON and back.

`kdeval fidelity` writes a `FidelityReport` into the student's directory; tables, plots and comparisons of students read
it back from there.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from student_train.evaluate.schemas import FidelitySchema
from teacher_cache.fields import check_fields
from teacher_cache.outside import visible

if TYPE_CHECKING:
    from rich.table import Table

from dataclasses import asdict, dataclass, field
from typing import Any, Self


@dataclass(frozen=True, kw_only=True)
class RelationFidelity:
    """KL(teacher || student) of the query, key and value relations, mean over heads and real positions, in nats.

    `key_value_heads` are those of keys and values where queries have others; `mask` is `causal` where positions were
    related to those before them alone. Neither is written where it says nothing.
    """

    student_layer: int
    teacher_layer: int
    heads: int
    view: str
    query: float
    key: float
    value: float
    key_value_heads: int | None = None
    mask: str | None = None

    @property
    def total(self) -> float:
        """The sum of the three, which is what attention transfer minimises at equal weights."""
        return self.query + self.key + self.value

    @property
    def how(self) -> str:
        """In how many heads, and under which mask, in words."""
        heads = f"{self.heads}" if self.key_value_heads is None else f"{self.heads} and {self.key_value_heads}"
        return f"{heads} heads" if self.mask is None else f"{heads} heads, {self.mask}"

    def to_json(self) -> dict[str, Any]:
        """All entries that say something, and the sum."""
        said = {name: value for name, value in asdict(self).items() if value is not None}
        return {**said, "total": self.total}


@dataclass(frozen=True, kw_only=True)
class HiddenFidelity:
    """Error of predicting a teacher's hidden state linearly from the student's, as a share of its variance."""

    student_layer: int
    teacher_layer: int
    view: str
    nmse: float
    ridge: float


@dataclass(frozen=True, kw_only=True)
class DistributionFidelity:
    """KL(teacher || student) at masked positions in nats, and how often both name the same most probable token.

    `kind` is what stands for the teacher's distribution: `exact` all of it, `topk` and `sample` the `entries` ids that
    the cache keeps of it. `kept_ids`: over so many ids, where the student has not all of its teacher's. Records of
    earlier versions say none of this.
    """

    kl: float
    top1_agreement: float
    positions: int
    temperature: float
    kind: str | None = None
    entries: int | None = None
    kept_ids: int | None = None

    @property
    def to_what(self) -> str | None:
        """What the divergence is to, in words; None where the record does not say."""
        if self.kind is None:
            return None
        kept = {
            "topk": f"the {self.entries} most probable ids and the rest",
            "sample": f"{self.entries} drawn ids",
        }
        over = "" if self.kept_ids is None else f", over the {self.kept_ids} ids of the student"
        return f"{kept.get(self.kind, 'all ids')}{over}, temperature {self.temperature:g}"


@dataclass(frozen=True, kw_only=True)
class FidelityReport:
    """Every measure that the cache and the student allow, on rows `first_row`..`last_row` (inclusive) of the cache.

    Of a cache of several stores, only the last rows of each are measured: `rows` in all. `held_out` says whether these
    rows are known to have been kept out of the student's training. `fingerprints` identify what was compared: contents
    of the cache, its text, the weights of teacher and student.
    """

    student: str
    cache: str
    first_row: int
    last_row: int
    held_out: bool
    tokens: int
    rows: int | None = None
    relations: tuple[RelationFidelity, ...] = ()
    hidden: tuple[HiddenFidelity, ...] = ()
    distribution: DistributionFidelity | None = None
    notes: tuple[str, ...] = ()
    fingerprints: Mapping[str, str] = field(default_factory=dict)

    @property
    def hidden_mean(self) -> float | None:
        """Mean of the hidden-state errors over the layer pairs."""
        return sum(pair.nmse for pair in self.hidden) / len(self.hidden) if self.hidden else None

    @property
    def relation_mean(self) -> float | None:
        """Mean over the layer pairs of the relations' sums."""
        return sum(pair.total for pair in self.relations) / len(self.relations) if self.relations else None

    def to_json(self) -> dict[str, Any]:
        """A JSON object that `from_json` reads back, with the sums and means spelled out for other readers."""
        record = asdict(self)
        record["relations"] = [relation.to_json() for relation in self.relations]
        record["hidden"] = list(record["hidden"])
        record["notes"] = list(self.notes)
        record["hidden_mean"] = self.hidden_mean
        return record

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Self:
        """Read what `to_json` wrote; entries that other programs or later versions added are ignored.

        Raises:
            ValueError: it is none; the message names the field.
        """
        fields = check_fields(FidelitySchema, data).model_dump()
        distribution = fields["distribution"]
        lists: dict[str, Any] = {
            "relations": tuple(RelationFidelity(**entry) for entry in fields["relations"]),
            "hidden": tuple(HiddenFidelity(**entry) for entry in fields["hidden"]),
            "notes": tuple(fields["notes"]),
        }
        return cls(
            **{**fields, **lists, "distribution": DistributionFidelity(**distribution) if distribution else None}
        )

    def lines(self) -> dict[str, Measure]:
        """The measures one by one under stable keys, in reading order, for tables and plots."""
        found: dict[str, Measure] = {}
        for relation in self.relations:
            place = f"{relation.student_layer} → {relation.teacher_layer}, {relation.how}"
            measured = "/".join(
                str(said) for said in (relation.heads, relation.key_value_heads, relation.mask) if said is not None
            )
            for name in ("query", "key", "value", "total"):
                label = "relation KL, sum" if name == "total" else f"relation KL, {name}"
                key = f"relation.{relation.student_layer}.{relation.teacher_layer}.{measured}.{name}"
                found[key] = Measure(label=label, place=place, value=getattr(relation, name))
        for pair in self.hidden:
            key = f"hidden.{pair.student_layer}.{pair.teacher_layer}"
            place = f"{pair.student_layer} → {pair.teacher_layer}"
            found[key] = Measure(label="hidden NMSE", place=place, value=pair.nmse)
        if self.hidden_mean is not None and len(self.hidden) > 1:
            found["hidden.mean"] = Measure(label="hidden NMSE, mean", place="all pairs", value=self.hidden_mean)
        if self.distribution is not None:
            place = f"{self.distribution.positions:,} positions"
            found["distribution.kl"] = Measure(label="output KL", place=place, value=self.distribution.kl)
            found["distribution.top1"] = Measure(
                label="top-1 agreement", place=place, value=self.distribution.top1_agreement, higher_is_better=True
            )
        return found


@dataclass(frozen=True, kw_only=True)
class Measure:
    """One number of a report, in words a reader knows."""

    label: str
    place: str
    value: float
    higher_is_better: bool = False


def fidelity_table(reports: Mapping[str, FidelityReport]) -> Table:
    """One line per measure and one column per report; with two, how much better the second is than the first."""
    from rich.markup import escape
    from rich.table import Table

    columns = {name: report.lines() for name, report in reports.items()}
    table = Table(
        title="Fidelity to the teacher",
        caption=_caption(next(iter(reports.values()))),
        title_justify="left",
        caption_justify="left",
    )
    table.add_column("measure")
    table.add_column("where", style="dim")
    for name in columns:
        table.add_column(escape(visible(name)), justify="right")
    if len(columns) == 2:
        table.add_column("better by", justify="right")
    for key, measure in _union(columns).items():
        values = [column.get(key) for column in columns.values()]
        cells = [format_value(value) for value in values]
        if len(values) == 2:
            cells.append(_gain(*values))
        table.add_row(measure.label, measure.place, *cells)
    return table


def _union(columns: Mapping[str, Mapping[str, Measure]]) -> dict[str, Measure]:
    return {key: measure for column in columns.values() for key, measure in column.items()}


def _caption(report: FidelityReport) -> str:
    kind = "held-out rows" if report.held_out else "rows"
    whole = report.last_row - report.first_row + 1
    rows = whole if report.rows is None else report.rows
    where = f"{kind} {report.first_row:,} to {report.last_row:,}" if rows == whole else f"{rows:,} {kind}"
    place = f"{where} of {report.cache}, {report.tokens:,} tokens"
    exception = ", top-1 agreement aside" if report.distribution else ""
    return f"{place}; layers: student → teacher; lower is better{exception}"


def format_value(measure: Measure | None) -> str:
    """Four significant digits, shares as percentages, an en dash for what was not measured."""
    if measure is None:
        return "–"
    return f"{measure.value:.1%}" if measure.higher_is_better else f"{measure.value:.4g}"


def _gain(before: Measure | None, after: Measure | None) -> str:
    """`3.2×` for errors, `+12.0 points` for shares."""
    if before is None or after is None:
        return "–"
    if after.higher_is_better:
        return f"{100 * (after.value - before.value):+.1f} points"
    return f"{before.value / after.value:.2f}×" if after.value > 0 else "–"
