"""What the records that `kdeval` leaves must be before anything is made of them, and how such a file is read.

A record lies in a folder that anyone may have edited, or comes from another version. Every field that a table, a plot
or a test of significance reads is checked here first; entries that others added are left alone. Bounds are far beyond
anything that was ever measured: they keep sums, ratios and drawings finite.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal, Self, TypeVar

from pydantic import Field, model_validator

from teacher_cache.errors import StudentError
from teacher_cache.fields import Count, Layer, OpenFields, StrictFields, Text, check_fields
from teacher_cache.outside import parse_record

SchemaT = TypeVar("SchemaT", bound=StrictFields)

Positive = Annotated[int, Field(ge=1, le=2**48)]
Finite = Annotated[float, Field(ge=-1e300, le=1e300)]
Divergence = Annotated[float, Field(ge=-1, le=1e15)]
"""In nats; rounding may leave a little less than nothing."""
Error = Annotated[float, Field(ge=0, le=1e15)]
Share = Annotated[float, Field(ge=0, le=1)]
Score = Annotated[float, Field(ge=-1, le=1)]
"""Of a task: a share, or a correlation."""
Speed = Annotated[float, Field(ge=1e-9, le=1e15)]
"""Milliseconds, or tokens a second."""
Fingerprints = dict[Text, Text]


class EvaluationSchema(OpenFields):
    """What every record says."""

    evaluation: Text
    command: Text | None = None
    fingerprints: Fingerprints = Field(default_factory=dict)


class RelationSchema(OpenFields):
    """`fidelity.records.RelationFidelity`."""

    student_layer: Layer
    teacher_layer: Layer
    heads: Annotated[int, Field(ge=1, le=2**16)]
    view: Text
    query: Divergence
    key: Divergence
    value: Divergence
    key_value_heads: Annotated[int, Field(ge=1, le=2**16)] | None = None
    mask: Literal["causal"] | None = None


class HiddenSchema(OpenFields):
    """`fidelity.records.HiddenFidelity`."""

    student_layer: Layer
    teacher_layer: Layer
    view: Text
    nmse: Error
    ridge: Error


class DistributionSchema(OpenFields):
    """`fidelity.records.DistributionFidelity`."""

    kl: Divergence
    top1_agreement: Share
    positions: Count
    temperature: Annotated[float, Field(gt=0, le=1e6)]
    kind: Literal["exact", "topk", "sample"] | None = None
    entries: Count | None = None
    kept_ids: Count | None = None


class FidelitySchema(OpenFields):
    """`fidelity.records.FidelityReport`."""

    student: Text
    cache: Text
    first_row: Count
    last_row: Count
    held_out: bool
    tokens: Count
    rows: Count | None = None
    relations: list[RelationSchema]
    hidden: list[HiddenSchema]
    distribution: DistributionSchema | None = None
    notes: list[Text] = Field(default_factory=list)
    fingerprints: Fingerprints = Field(default_factory=dict)

    @model_validator(mode="after")
    def _check_rows(self) -> Self:
        if self.last_row < self.first_row:
            raise ValueError(f"'first_row' {self.first_row} is beyond 'last_row' {self.last_row}")
        return self


class TestScoresSchema(OpenFields):
    """One set of examples of a fine-tuning."""

    scores: list[Score]


class FinetuneSchema(EvaluationSchema):
    """finetune-TASK.json, as `finetune.records.FinetuneReport` writes it: a score for each seed, in order."""

    seeds: Annotated[list[Count], Field(min_length=1)]
    scores: list[Score]
    by_test: dict[Text, TestScoresSchema] | None = None
    examples: dict[Text, Count] | None = None
    learning_rates: list[Annotated[float, Field(gt=0, le=1e6)]] | None = None
    task: Text
    metric: Text
    settings: dict[Text, Any] = Field(default_factory=dict)
    notes: list[Text] = Field(default_factory=list)

    @model_validator(mode="after")
    def _check_seeds(self) -> Self:
        if len(self.scores) != len(self.seeds) or len(set(self.seeds)) < len(self.seeds):
            raise ValueError(f"'scores' has {len(self.scores)} entries for the 'seeds' {self.seeds}")
        for name, entry in (self.by_test or {}).items():
            if len(entry.scores) != len(self.seeds):
                raise ValueError(
                    f"the scores of {name!r} in 'by_test' are {len(entry.scores)} for {len(self.seeds)} seeds"
                )
        return self


class SavedSchema(OpenFields):
    """finetuned.json of the model that `kdeval finetune --save` keeps."""

    task: Text
    kind: Literal["classification", "regression", "tokens"]
    metric: Text
    columns: Annotated[list[list[Text]], Field(min_length=1, max_length=2)]
    label_column: Annotated[list[Text], Field(min_length=1)]
    labels: list[Text]
    own: bool
    seed: Count
    learning_rate: Annotated[float, Field(gt=0, le=1e6)]
    measures: dict[Text, dict[Text, Score]]
    examples: dict[Text, Count]
    sources: dict[Text, Text]
    settings: dict[Text, Any]
    fingerprints: Fingerprints
    command: Text | None = None
    notes: list[Text] = Field(default_factory=list)


class ResultSchema(OpenFields):
    """What is kept of one seed of a fine-tuning, of `finetune.records.SeedResult`."""

    measures: dict[Text, dict[Text, Score]] = Field(default_factory=dict)
    cut: dict[Text, Count] = Field(default_factory=dict)
    constant: list[Text] = Field(default_factory=list)


class KeptSchema(OpenFields):
    """A kept result, and everything that decides it."""

    key: dict[Text, Any]
    result: ResultSchema


class MeasurementSchema(OpenFields):
    """`latency.records.Measurement`."""

    backend: Text
    device: Text
    dtype: Text
    threads: Positive
    batch_size: Positive
    seq_len: Positive
    median_ms: Speed
    p90_ms: Speed | None = None
    p99_ms: Speed | None = None
    teacher_median_ms: Speed | None = None


class GenerationSchema(OpenFields):
    """`latency.generation_records.Generation`."""

    backend: Text
    device: Text
    dtype: Text
    threads: Positive
    batch_size: Positive
    prompt_tokens: Positive
    new_tokens: Positive
    first_token_ms: Speed
    first_token_p90_ms: Speed
    tokens_per_second: Speed
    runs: Positive
    teacher_first_token_ms: Speed | None = None
    teacher_tokens_per_second: Speed | None = None


class LatencySchema(EvaluationSchema):
    """latency.json, as `latency.records.LatencyReport` writes it."""

    measurements: list[MeasurementSchema]
    parameters: Count
    teacher_parameters: Count | None = None
    generation: list[GenerationSchema] | None = None
    hardware: dict[Text, Any] | None = None
    onnx_max_error: Error | None = None


class TextScoreSchema(OpenFields):
    """`perplexity.records.TextScore`."""

    nats: Error
    tokens: Positive
    bytes: Positive
    start: Text | None


class ScoresSchema(OpenFields):
    """The models that read a text."""

    student: TextScoreSchema
    teacher: TextScoreSchema | None


class PerplexitySchema(OpenFields):
    """`perplexity.records.PerplexityReport`."""

    scores: ScoresSchema
    student: Text
    teacher: Text | None
    text: list[Text]
    documents: Positive
    seq_len: Positive
    stride: Positive
    dtype: Text
    device: Text
    fingerprints: Fingerprints = Field(default_factory=dict)
    notes: list[Text] = Field(default_factory=list)


class MetricSchema(OpenFields):
    """`lm_eval.records.Metric`."""

    value: Finite
    stderr: Finite | None
    higher_is_better: bool | None


class TaskResultSchema(OpenFields):
    """`lm_eval.records.TaskResult`."""

    task: Text
    metrics: Annotated[dict[Text, MetricSchema], Field(min_length=1)]
    group: Text | None
    version: Text | None
    shots: Count | None
    examples: Count | None
    config_sha256: Text | None


class LmEvalSchema(OpenFields):
    """`lm_eval.records.LmEvalReport`."""

    student: Text
    results: list[TaskResultSchema]
    limit: Count | None
    dtype: Text
    device: Text
    harness: Text
    fingerprints: Fingerprints = Field(default_factory=dict)
    notes: list[Text] = Field(default_factory=list)

    @model_validator(mode="after")
    def _check_tasks(self) -> Self:
        named = [result.task for result in self.results if result.group is None]
        twice = sorted(task for task in set(named) if named.count(task) > 1)
        if twice:
            raise ValueError(f"the task {twice[0]!r} is in 'results' twice")
        return self


def read_object(path: Path) -> dict[str, Any]:
    """The JSON object in a file.

    Raises:
        StudentError: it cannot be read, or is no object.
    """
    try:
        record = parse_record(path.read_bytes())
    except (OSError, ValueError) as error:
        raise StudentError(
            f"{str(path)!r} cannot be read as JSON ({error}): what it says is lost; restore the file, or delete it and "
            "measure again"
        ) from error
    if not isinstance(record, dict):
        raise foreign(path, f"it holds {record!r:.60} where an object is expected")
    return record


def check_record(schema: type[SchemaT], path: Path, record: object) -> SchemaT:
    """The fields of the record that lies at `path`.

    Raises:
        StudentError: one is not what it must be.
    """
    try:
        return check_fields(schema, record)
    except ValueError as error:
        raise foreign(path, str(error)) from error


def foreign(path: Path, reason: str) -> StudentError:
    """The error of a file that holds something else than it should."""
    return StudentError(
        f"{str(path)!r} is no record of ours that can be read: {reason}; restore the file, or delete it and measure "
        "again"
    )
