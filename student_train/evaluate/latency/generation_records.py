"""How fast a causal LM answers, as plain records that turn into JSON and back, and as tables for people.

They are part of a `LatencyReport`. Nothing is measured here.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from dataclasses import fields as dataclass_fields
from itertools import groupby
from typing import TYPE_CHECKING, Any

from student_train.evaluate.schemas import GenerationSchema
from teacher_cache.fields import check_fields

if TYPE_CHECKING:
    from rich.table import Table


@dataclass(frozen=True, kw_only=True, order=True)
class GenerationSetup:
    """What was generated where: `batch_size` answers of `new_tokens` at once, each after `prompt_tokens`."""

    backend: str
    device: str
    dtype: str
    threads: int
    batch_size: int
    prompt_tokens: int
    new_tokens: int

    @property
    def place(self) -> str:
        """`GPU`, or `CPU (2 threads)`."""
        return name_place(self.device, self.threads)

    def __str__(self) -> str:
        return (
            f"{self.backend} on {self.place}, {self.dtype}, batch {self.batch_size}, {self.new_tokens} tokens after a "
            f"prompt of {self.prompt_tokens}"
        )


@dataclass(frozen=True, kw_only=True)
class GenerationTiming:
    """Medians over `runs`, of the teacher too where that was timed in turns.

    Milliseconds until all prompts have their first token, and tokens a second after it, all answers together.
    """

    first_token_ms: float
    first_token_p90_ms: float
    tokens_per_second: float
    runs: int
    teacher_first_token_ms: float | None = None
    teacher_tokens_per_second: float | None = None

    @property
    def first_token_speedup(self) -> float | None:
        """The teacher's time to the first token over the student's."""
        return None if self.teacher_first_token_ms is None else self.teacher_first_token_ms / self.first_token_ms

    @property
    def speedup(self) -> float | None:
        """The student's tokens a second over the teacher's."""
        teacher = self.teacher_tokens_per_second
        return None if teacher is None else self.tokens_per_second / teacher


Generation = tuple[GenerationSetup, GenerationTiming]


def generation_json(setup: GenerationSetup, timing: GenerationTiming) -> dict[str, Any]:
    """The JSON object, speed-ups included."""
    speedups = {"first_token_speedup": timing.first_token_speedup, "speedup": timing.speedup}
    return {**asdict(setup), **asdict(timing), **speedups}


def generation_from_json(record: object) -> Generation:
    """From what `generation_json` gave.

    Raises:
        ValueError: it is none; the message names the field.
    """
    fields = check_fields(GenerationSchema, record).model_dump()
    setup = {each.name: fields.pop(each.name) for each in dataclass_fields(GenerationSetup)}
    return GenerationSetup(**setup), GenerationTiming(**fields)


def name_place(device: str, threads: int) -> str:
    """`GPU`, or `CPU (2 threads)`."""
    return "GPU" if device == "cuda" else f"CPU ({threads} thread{'s' if threads > 1 else ''})"


_FIRST, _RATE, _BESIDE = "first ms", "tokens/s", ("teacher", "speed-up")


def generation_tables(measured: Sequence[Generation]) -> list[Table]:
    """One table per device and number of threads; the teacher's columns are there if it was measured."""
    groups = groupby(measured, key=lambda each: f"{each[0].backend}, {each[0].place}, {each[0].dtype}")
    return [_table(title, list(group)) for title, group in groups]


def _table(place: str, group: Sequence[Generation]) -> Table:
    from rich.table import Table

    title = f"{place}, {group[0][0].new_tokens} tokens after each prompt"
    table = Table(title=title, title_justify="left", pad_edge=False)
    beside = _BESIDE if group[0][1].speedup is not None else ()
    for column in ("batch", "prompt", _FIRST, *beside, _RATE, *beside):
        bold = column in (_FIRST, _RATE, "speed-up")
        table.add_column(column, justify="right", no_wrap=True, style="bold" if bold else None)
    for setup, timing in group:
        first, rate = (
            [_number(own), *([] if teacher is None else [_number(teacher), f"{speedup:.2f}x"])]
            for own, teacher, speedup in (
                (timing.first_token_ms, timing.teacher_first_token_ms, timing.first_token_speedup),
                (timing.tokens_per_second, timing.teacher_tokens_per_second, timing.speedup),
            )
        )
        table.add_row(f"{setup.batch_size}", f"{setup.prompt_tokens}", *first, *rate)
    return table


def _number(value: float) -> str:
    return f"{value:.2f}" if value < 10 else f"{value:.1f}" if value < 1000 else f"{value:,.0f}"
