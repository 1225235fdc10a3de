"""What the lines of `metrics.jsonl` and the record in `provenance.json` must be before anything is made of them.

They lie in a folder that anyone may have edited, or are of another version: what is not known is left alone.
"""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import Field

from teacher_cache.fields import Count, OpenFields, Text

_Number = Annotated[float, Field(ge=-1e100, le=1e100)]
"""Far beyond any loss; what can be drawn and summed up."""
_Amount = Annotated[float, Field(ge=0, le=1e100)]


class MetricsSchema(OpenFields, extra="allow"):
    """A line of `metrics.jsonl`: numbers, null where there was none. Any but the step may be missing."""

    __pydantic_extra__: dict[str, _Number | None] = Field(init=False)
    step: Count
    loss: _Number = 0.0
    valid_loss: _Number = 0.0
    lr: _Amount = 0.0
    tokens: Count = 0
    seconds: _Amount = 0.0
    wait: _Amount = 0.0
    memory: Count = 0


class StepSchema(MetricsSchema):
    """A line of a training step, complete."""

    lr: _Amount
    tokens: Count
    seconds: _Amount
    wait: _Amount


class ValidationSchema(MetricsSchema):
    """A line of a validation, complete."""

    valid_loss: _Number


class TeacherSchema(OpenFields):
    """What provenance says of the teacher."""

    name: Text | None = None
    revision: Text | None = None
    weights_sha256: Text | None = None


class StoreSchema(OpenFields):
    """What provenance says of one store of several."""

    command: Text | None = None


class CorpusSchema(OpenFields):
    """What provenance says of the text."""

    specs: list[Text] = Field(default_factory=list)
    fingerprint: Text = ""
    documents: Count = 0
    tokens: Count = 0


class CacheSchema(OpenFields):
    """What provenance says of the cache, and `stores` where it is made of several.

    The first versions did not say its text, row length and command.
    """

    path: Text | None = None
    identity_sha256: Text | None = None
    rows: Count = 0
    seq_len: Count | None = None
    corpus: CorpusSchema | None = None
    command: Text | None = None
    teacher: TeacherSchema = TeacherSchema()
    stores: list[StoreSchema] = Field(default_factory=list)


class HeldOutSchema(OpenFields):
    """What provenance says of the rows that were not trained on."""

    first: Count = 0
    count: Count = 0


class StudentSchema(OpenFields):
    """What provenance says of the student."""

    description: Text | None = None


class ProvenanceSchema(OpenFields):
    """`provenance.json` of a student that `kdtrain` wrote; what `settings` must be is known where they are read."""

    cache: CacheSchema
    settings: dict[str, Any]
    held_out_rows: HeldOutSchema = HeldOutSchema()
    student: StudentSchema = StudentSchema()
    objective: dict[str, Any] = Field(default_factory=dict)
    software: dict[str, Text] = Field(default_factory=dict)
    deepspeed: dict[str, Any] = Field(default_factory=dict)
    steps: Count | None = None
    git_revision: Text | None = None
    created: Text | None = None
    command: Text | None = None
