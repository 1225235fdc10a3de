"""What onnx.json must be before anything is made of it."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from student_train.evaluate.schemas import Divergence, Error, Fingerprints, Positive, Score, Share, Speed
from teacher_cache.fields import Count, OpenFields, Text


class OnnxTimingSchema(OpenFields):
    """`onnx.records.OnnxTiming`."""

    batch_size: Positive
    seq_len: Positive
    threads: Positive
    median_ms: Speed
    p90_ms: Speed
    runs: Positive


class OnnxFileSchema(OpenFields):
    """`onnx.records.OnnxFile`."""

    file: Text | None
    arithmetic: Text
    bytes: Count
    max_error: Error | None
    cosine: Annotated[float, Field(ge=-1.001, le=1.001)] | None
    agreement: Share | None
    hidden_nmse: Error | None
    output_kl: Divergence | None
    score: Score | None
    timings: list[OnnxTimingSchema]


class OnnxSchema(OpenFields):
    """onnx.json, as `onnx.records.OnnxReport` writes it."""

    student: Text
    output: Text
    files: Annotated[list[OnnxFileSchema], Field(min_length=1)]
    rows: Count
    held_out: bool
    calibration_rows: Count
    metric: Text | None
    examples: Count
    hardware: Text
    fingerprints: Fingerprints = Field(default_factory=dict)
    notes: list[Text] = Field(default_factory=list)
