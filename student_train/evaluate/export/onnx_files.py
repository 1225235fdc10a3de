"""The ONNX files of an export: written, made int8, measured beside the model in PyTorch.

Out: files in `onnx/` of the export's folder, and an `OnnxReport`. The float32 file is always made, since the others
come from it, and kept where it was asked for.
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Literal

from safetensors import safe_open

from student_train.data.split import count_rows
from student_train.evaluate.export.cache_rows import calibration_rows
from student_train.evaluate.export.measure import (
    Fidelity,
    measure_fidelity_of,
    measured_plan,
    time_files,
    with_fidelity,
)
from student_train.evaluate.export.settings import ExportSettings
from student_train.evaluate.export.source import Source
from student_train.evaluate.fidelity.fidelity import plan_for
from student_train.evaluate.latency.turns import Show, name_hardware
from student_train.evaluate.load import LoadedStudent, check_fit, load_student, weight_files, weights_fingerprint
from student_train.evaluate.onnx.graph import OnnxSource, check_export, export_onnx
from student_train.evaluate.onnx.packages import INSTALL, missing_packages
from student_train.evaluate.onnx.quantise import quantise_dynamic, quantise_static
from student_train.evaluate.onnx.records import OnnxFile, OnnxReport
from student_train.evaluate.schemas import SavedSchema
from teacher_cache.errors import SettingsError, TaskError
from teacher_cache.read.pool import CacheSource
from teacher_cache.wording import format_bytes

FOLDER = "onnx"
FLOAT = "model.onnx"


def check_packages(settings: ExportSettings) -> None:
    """Refuse ONNX files where what writes them is not installed.

    Raises:
        SettingsError: a package is missing.
    """
    missing = missing_packages() if settings.with_onnx else []
    if missing:
        flag = "--onnx" if settings.onnx else f"--int8 {settings.int8}"
        raise SettingsError(
            f"{flag} needs {', '.join(missing)}, not installed here: no ONNX file could be written; install with "
            f"{INSTALL}, or leave {flag} out"
        )


def onnx_source(source: Source, settings: ExportSettings) -> OnnxSource:
    """What is exported of a student: the whole, or its base model.

    Raises:
        SettingsError: logits are asked for of a model without a head.
    """
    logits = source.kind.output == "logits" and settings.onnx_output != "hidden"
    if settings.onnx_output == "logits" and not logits:
        raise SettingsError(
            f"--onnx-output 'logits': student {str(source.folder)!r} has no head that could give any; leave it out"
        )
    return OnnxSource(
        called=f"student {str(source.folder)!r}",
        model=source.model if logits else source.without_head(),
        instead="export it without --onnx and --int8",
        output="logits" if logits else "last_hidden_state",
        # of other models nobody gives pairs
        segments=logits and source.fine_tuned and source.numbers_texts,
    )


def write_onnx_files(
    source: Source,
    settings: ExportSettings,
    folder: Path,
    *,
    reader: CacheSource | None,
    saved: SavedSchema | None,
    show: Show,
) -> OnnxReport:
    """Write the files into `folder` and measure them.

    Raises:
        StudentError: the family cannot be exported, or a file computes something else.
        SettingsError: there are no rows to find static scales on.
        StoreError, TaskError: what is measured on cannot be read.
    """
    exported = onnx_source(source, settings)
    (folder / FOLDER).mkdir()
    with tempfile.TemporaryDirectory(prefix="kdeval-") as scratch:
        show("exporting to ONNX")
        first = (folder / FOLDER if settings.onnx else Path(scratch)) / FLOAT
        error = export_onnx(exported, first)
        held_out = _HeldOut.of(source, reader, exported, settings)
        made = {FLOAT: first} if settings.onnx else {}
        entries = [_entry(FLOAT, "float32", first, error)] if settings.onnx else []
        calibrated = 0
        for kind in settings.int8_kinds:
            show(f"quantising to int8, {kind}")
            file = folder / FOLDER / f"model_int8_{kind}.onnx"
            calibrated = max(calibrated, _quantise(kind, first, file, exported, held_out, settings))
            made[file.name] = file
            entries.append(_entry(file.name, f"int8 {kind}", file, check_export(exported, file, alike=False)))
    size, notes = _size_in_float32(source, folder)
    report = OnnxReport(
        student=settings.student,
        output=exported.output,
        files=(OnnxFile(file=None, arithmetic="float32", bytes=size), *entries),
        notes=notes,
        calibration_rows=calibrated,
        hardware=name_hardware(("cpu",))["cpu"],
        fingerprints={"student": weights_fingerprint(source.folder)},
    )
    if source.kind.pipeline != "text-classification" or exported.output != "logits":
        # of the one answer that a text gets, the task says what it is worth
        report = _with_fidelity(report, made, exported, held_out, show)
    report = _with_scores(report, made, exported, source, saved, settings, show)
    return _with_times(report, made, exported, settings, show)


def _size_in_float32(source: Source, folder: Path) -> tuple[int, tuple[str, ...]]:
    """Bytes of the weights as the model in PyTorch is measured, and a note where their files in `folder` differ."""
    files = weight_files(folder)
    written = sum(file.stat().st_size for file in files)
    dtypes = sorted({dtype for file in files for dtype in _floats_in(file)})
    if dtypes == ["F32"]:
        return written, ()
    size = sum(parameter.numel() * parameter.element_size() for parameter in source.model.parameters())
    note = (
        f"the files of the weights are in {' and '.join(map(_in_words, dtypes))}, {format_bytes(written)}; in PyTorch "
        "the model was measured in float32, and its size is that"
    )
    return size, (note,)


def _floats_in(file: Path) -> set[str]:
    """Types of floating-point numbers in a file, as safetensors calls them; buffers may be of others."""
    with safe_open(file, "pt") as opened:
        found = {opened.get_slice(name).get_dtype() for name in opened.keys()}  # noqa: SIM118
    return {dtype for dtype in found if "F" in dtype}


def _in_words(dtype: str) -> str:
    return {"BF16": "bfloat16", "F16": "float16", "F32": "float32"}.get(dtype, dtype)


def _entry(name: str, arithmetic: str, file: Path, error: float) -> OnnxFile:
    size = sum(each.stat().st_size for each in file.parent.glob(f"{file.name}*"))
    return OnnxFile(file=f"{FOLDER}/{name}", arithmetic=arithmetic, bytes=size, max_error=error)


class _HeldOut:
    """A store, and which of its rows are held out from the student's training; nothing where none was given."""

    def __init__(self, reader: CacheSource, student: LoadedStudent, exported: OnnxSource, rows: int) -> None:
        self.reader, self.student = reader, student
        self.all = plan_for(reader, student).rows
        plan = plan_for(reader, student, rows=rows)
        vocabulary = exported.output == "logits" and student.head is not None
        self.plan = measured_plan(plan, student.config.num_hidden_layers, exported.output, vocabulary=vocabulary)

    @classmethod
    def of(
        cls, source: Source, reader: CacheSource | None, exported: OnnxSource, settings: ExportSettings
    ) -> _HeldOut | None:
        if reader is None:
            return None
        student = load_student(source.folder)
        check_fit(student, reader.manifest, reader.teacher_folder())
        return cls(reader, student, exported, settings.rows)


def _quantise(
    kind: Literal["dynamic", "static"],
    first: Path,
    file: Path,
    exported: OnnxSource,
    held_out: _HeldOut | None,
    settings: ExportSettings,
) -> int:
    """Write an int8 file; how many rows its scales come from."""
    if kind == "dynamic":
        quantise_dynamic(first, file)
        return 0
    assert held_out is not None, "--int8 static needs --cache"
    rows = calibration_rows(
        held_out.reader,
        held_out.all,
        settings.calibration_rows,
        lambda ids_BT, mask_BT: exported.feed(exported.given(ids_BT, mask_BT)),
        held_out.student.reads,
    )
    quantise_static(first, file, rows.feeds)
    return rows.rows


def _with_fidelity(
    report: OnnxReport, made: Mapping[str, Path], exported: OnnxSource, held_out: _HeldOut | None, show: Show
) -> OnnxReport:
    if held_out is None:
        note = "fidelity was not measured, for want of a store: give --cache"
        return replace(report, notes=(*report.notes, note))
    show("measuring on held-out rows")
    plan, reader = held_out.plan, held_out.reader
    found = measure_fidelity_of(made, exported, held_out.student, reader, plan)
    return replace(
        report,
        files=tuple(with_fidelity(each, _of(found, each)) for each in report.files),
        rows=count_rows(plan.rows),
        held_out=plan.held_out,
        fingerprints={**report.fingerprints, "cache": reader.identity_sha256},
    )


def _of(found: Mapping[str, Fidelity], file: OnnxFile) -> Fidelity:
    return found["" if file.file is None else Path(file.file).name]


def _with_scores(
    report: OnnxReport,
    made: Mapping[str, Path],
    exported: OnnxSource,
    source: Source,
    saved: SavedSchema | None,
    settings: ExportSettings,
    show: Show,
) -> OnnxReport:
    if saved is None or exported.output != "logits":
        if settings.dev_file is not None:
            raise SettingsError(
                f"--dev-file {settings.dev_file!r} is for the ONNX logits of what kdeval finetune --save wrote, which "
                f"{settings.student!r} is not: leave it out"
            )
        return report
    from student_train.evaluate.export.task_score import read_examples, score_files

    try:
        examples = read_examples(source, saved, settings.dev_file)
    except TaskError as error:
        if settings.dev_file is not None:
            raise
        # its first words say what happened; the rest is advice, with places of this machine in it
        what = str(error).partition(": ")[0]
        note = f"the task was not measured again ({what}); --dev-file names examples to measure on"
        return replace(report, notes=(*report.notes, note))
    show(f"measuring {saved.task}")
    scores = score_files(examples, exported, made)
    return replace(
        report,
        files=tuple(
            replace(each, score=scores["" if each.file is None else Path(each.file).name]) for each in report.files
        ),
        metric=saved.metric,
        examples=len(examples),
    )


def _with_times(
    report: OnnxReport, made: Mapping[str, Path], exported: OnnxSource, settings: ExportSettings, show: Show
) -> OnnxReport:
    show("timing")
    reads = exported.reads
    found = time_files(
        list(made.values()),
        exported,
        batch_sizes=sorted({1, settings.batch_size}),
        length=settings.length if reads is None else min(settings.length, reads),
        threads=settings.threads,
        seconds=settings.seconds,
    )
    return replace(
        report,
        files=tuple(replace(each, timings=tuple(own)) for each, own in zip(report.files, found, strict=True)),
    )
