"""What a model's directory holds about it: the records of its training and of every measurement, read and checked.

In: a directory that `kdtrain` wrote, or any Hugging Face model in which `kdeval` left records. Out: a `RunRecords`. No
record is required: what is missing is None or empty, and callers say so. A record of other weights than those that lie
there now says nothing about them: it counts as missing and is named in `stale`. Cost: the weight files are hashed once,
about a second per gigabyte; no model is loaded.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol, TypeVar

import torch
from transformers import AutoModel

from student_train.evaluate.causal import is_causal
from student_train.evaluate.fidelity.records import FidelityReport
from student_train.evaluate.latency.generation_records import (
    GenerationSetup,
    GenerationTiming,
    generation_from_json,
    name_place,
)
from student_train.evaluate.lm_eval.records import LmEvalReport
from student_train.evaluate.load import weight_files, weights_fingerprint
from student_train.evaluate.onnx.records import OnnxReport
from student_train.evaluate.origins import SavedModel, read_provenance, read_saved
from student_train.evaluate.perplexity.records import PerplexityReport
from student_train.evaluate.schemas import (
    EvaluationSchema,
    FinetuneSchema,
    LatencySchema,
    check_record,
    foreign,
    read_object,
)
from student_train.run_files import PROVENANCE
from student_train.students.pretrained import load_config
from teacher_cache.errors import StudentError
from teacher_cache.models.families import pooler_option

_WEIGHTS_KEYS = ("student", "weights")
_FINETUNE = "finetune-"
_SINGLE = ("fidelity", "perplexity", "lm-eval", "latency", "onnx")
"""Evaluations of which a folder holds one record, by the name of its file."""


@dataclass(frozen=True, kw_only=True)
class TaskScores:
    """A finetune-TASK.json: one score per fine-tuning seed, what is to be known of them, and the whole record."""

    task: str
    metric: str
    scores: Mapping[int, float]
    record: Mapping[str, Any]
    notes: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True, order=True)
class TimingSetup:
    """What was timed where."""

    backend: str
    device: str
    dtype: str
    threads: int
    batch_size: int
    seq_len: int

    def __str__(self) -> str:
        place = name_place(self.device, self.threads)
        return f"{self.backend} on {place}, {self.dtype}, batch {self.batch_size} of {self.seq_len} tokens"


@dataclass(frozen=True, kw_only=True)
class Timing:
    """Median milliseconds of the model, and of its teacher where that was timed beside it."""

    median_ms: float
    teacher_median_ms: float | None


@dataclass(frozen=True, kw_only=True)
class LatencyRecord:
    """A latency.json. `teacher_weights` is the fingerprint of the teacher's weight files, if there was one."""

    parameters: int
    teacher_parameters: int | None
    teacher_weights: str | None
    timings: Mapping[TimingSetup, Timing]
    record: Mapping[str, Any]
    generation: Mapping[GenerationSetup, GenerationTiming] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class ModelShape:
    """What config.json says of the encoder. `parameters` are those without heads and pooler, as latency counts them."""

    family: str
    layers: int
    width: int
    heads: int
    feed_forward: int | None
    parameters: int

    def __str__(self) -> str:
        """`3x192:6:768`, as --student takes it."""
        tail = "" if self.feed_forward is None else f":{self.feed_forward}"
        return f"{self.layers}x{self.width}:{self.heads}{tail}"


@dataclass(frozen=True, kw_only=True)
class RunRecords:
    """One directory. `path` is how the user called it; `stale` names records of other weights, which do not count.

    `commands` are those that trained and measured it, as they were typed. `causal` says that it predicts next tokens,
    `saved` what it was fine-tuned for, where `kdeval finetune --save` made it.
    """

    path: str
    folder: Path
    weights: str | None
    shape: ModelShape | None
    provenance: Mapping[str, Any]
    fidelity: FidelityReport | None
    tasks: Mapping[str, TaskScores]
    latency: LatencyRecord | None
    stale: tuple[str, ...] = ()
    commands: tuple[str, ...] = ()
    perplexity: PerplexityReport | None = None
    lm_eval: LmEvalReport | None = None
    onnx: OnnxReport | None = None
    causal: bool = False
    saved: SavedModel | None = None

    @property
    def origin(self) -> Mapping[str, Any]:
        """The provenance of the model, or of the student that was fine-tuned; empty where kdtrain trained neither."""
        return self.provenance or ({} if self.saved is None else self.saved.base)

    @property
    def origin_settings(self) -> Mapping[str, Any]:
        """The flags of `kdtrain` that made the model, or the student that was fine-tuned."""
        settings: Mapping[str, Any] = self.origin.get("settings", {})
        return settings

    @property
    def settings(self) -> Mapping[str, Any]:
        """The flags of `kdtrain`, if it made this model."""
        settings: Mapping[str, Any] = self.provenance.get("settings", {})
        return settings


def read_run(path: str) -> RunRecords:
    """Read every record in the directory `path`.

    Raises:
        StudentError: there is no such directory or nothing to read in it, or a record is unreadable or of something
            else; the message names the file and the entry.
    """
    folder = Path(path).expanduser()
    if not folder.is_dir():
        raise StudentError(
            f"there is no run directory {path!r}: nothing can be read; give directories that kdtrain wrote (its --out) "
            "or models that kdeval measured"
        )
    weights = weights_fingerprint(folder) if weight_files(folder) else None
    found: dict[str, Mapping[str, Any]] = {}
    stale = []
    single = (folder / f"{name}.json" for name in _SINGLE)
    for file in (*single, *sorted(folder.glob(f"{_FINETUNE}*.json"))):
        if file.exists():
            found[file.name] = _read_evaluation(file)
            if weights is not None and _weights_of(found[file.name]) not in (None, weights):
                stale.append(file.name)
                del found[file.name]
    tasks = _read_tasks(folder, {name: record for name, record in found.items() if name.startswith(_FINETUNE)})
    provenance, saved = read_provenance(folder / PROVENANCE), read_saved(folder)
    commands = [each.get("command") for each in (provenance, *found.values())]
    with_config = (folder / "config.json").exists()
    perplexity = _read_report(PerplexityReport, folder / "perplexity.json", found)
    lm_eval = _read_report(LmEvalReport, folder / "lm-eval.json", found)
    run = RunRecords(
        path=path,
        folder=folder,
        weights=weights,
        shape=_read_shape(folder) if with_config else None,
        provenance=provenance,
        fidelity=_read_report(FidelityReport, folder / "fidelity.json", found),
        tasks=tasks,
        latency=_read_latency(folder / "latency.json", found.get("latency.json")),
        stale=tuple(stale),
        commands=(*(saved.commands if saved else ()), *(each for each in commands if isinstance(each, str))),
        perplexity=perplexity,
        lm_eval=lm_eval,
        onnx=_read_report(OnnxReport, folder / "onnx.json", found),
        causal=is_causal(folder) if with_config else perplexity is not None or lm_eval is not None,
        saved=saved,
    )
    if not found and not stale and run.shape is None and not run.provenance and saved is None:
        raise StudentError(
            f"{path!r} holds neither a model nor a record of one: nothing can be read; give a directory that kdtrain "
            "wrote (its --out) or a model that kdeval measured"
        )
    return run


def _weights_of(record: Mapping[str, Any]) -> str | None:
    prints: Mapping[str, str] = record.get("fingerprints", {})
    return next((prints[key] for key in _WEIGHTS_KEYS if key in prints), None)


def _read_evaluation(path: Path) -> dict[str, Any]:
    record = read_object(path)
    expected = path.stem if path.stem in _SINGLE else path.stem.partition("-")[0]
    found = check_record(EvaluationSchema, path, record).evaluation
    if found != expected:
        raise foreign(path, f"'evaluation' is {found!r} instead of {expected!r}")
    return record


class _Report(Protocol):
    """What its own JSON makes again."""

    @classmethod
    def from_json(cls: type[ReportT], record: Mapping[str, Any]) -> ReportT: ...


ReportT = TypeVar("ReportT", bound=_Report)


def _read_report(kind: type[ReportT], path: Path, found: Mapping[str, Mapping[str, Any]]) -> ReportT | None:
    if path.name not in found:
        return None
    try:
        return kind.from_json(found[path.name])
    except ValueError as error:
        raise foreign(path, str(error)) from error


def _read_tasks(folder: Path, records: Mapping[str, Mapping[str, Any]]) -> dict[str, TaskScores]:
    found, files = dict[str, TaskScores](), dict[str, str]()
    for name, record in records.items():
        fields = check_record(FinetuneSchema, folder / name, record)
        if (other := files.setdefault(fields.task, name)) != name:
            raise foreign(folder / name, f"'task' is {fields.task!r}, which {other!r} is already about")
        scores = dict(zip(fields.seeds, fields.scores, strict=True))
        found[fields.task] = TaskScores(
            task=fields.task, metric=fields.metric, scores=scores, record=record, notes=tuple(fields.notes)
        )
    return found


def _read_latency(path: Path, record: Mapping[str, Any] | None) -> LatencyRecord | None:
    if record is None:
        return None
    fields = check_record(LatencySchema, path, record)
    timings = {}
    for entry in fields.measurements:
        setup = TimingSetup(**entry.model_dump(include=set(TimingSetup.__dataclass_fields__)))
        if setup in timings:
            raise foreign(path, f"'measurements' has {setup} twice")
        timings[setup] = Timing(median_ms=entry.median_ms, teacher_median_ms=entry.teacher_median_ms)
    generation = {}
    for setup_of_answers, timing in map(generation_from_json, record.get("generation") or []):
        if setup_of_answers in generation:
            raise foreign(path, f"'generation' has {setup_of_answers} twice")
        generation[setup_of_answers] = timing
    return LatencyRecord(
        parameters=fields.parameters,
        teacher_parameters=fields.teacher_parameters,
        teacher_weights=fields.fingerprints.get("teacher"),
        timings=timings,
        record=record,
        generation=generation,
    )


def _read_shape(folder: Path) -> ModelShape:
    config = load_config(folder)
    with torch.device("meta"):
        encoder = AutoModel.from_config(config, **pooler_option(config))
    return ModelShape(
        family=config.model_type,
        layers=config.num_hidden_layers,
        width=config.hidden_size,
        heads=config.num_attention_heads,
        feed_forward=getattr(config, "intermediate_size", getattr(config, "hidden_dim", None)),
        parameters=sum(parameter.numel() for parameter in encoder.parameters()),
    )
