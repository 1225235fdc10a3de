"""The sections of a run's report, one function each: records in, HTML out.

A section whose record is missing says so and names the command that makes it. Nothing is measured here but the
relations of a sentence, where a cache is given.
"""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from typing import Any

from student_train.evaluate.fidelity.records import format_value
from student_train.evaluate.finetune.records import score_cells
from student_train.evaluate.latency.generation_records import name_place
from student_train.evaluate.lm_eval.records import COLUMNS as HARNESS_COLUMNS
from student_train.evaluate.lm_eval.records import result_lines
from student_train.evaluate.onnx.records import onnx_caption, onnx_columns
from student_train.evaluate.origins import SavedModel
from student_train.evaluate.perplexity.records import COLUMNS as PERPLEXITY_COLUMNS
from student_train.evaluate.perplexity.records import text_cells
from student_train.evaluate.report.html import LACKING, Html, heading, missing, paragraph, picture, table
from student_train.evaluate.report.plots import plot_fidelity_layers, plot_relation_maps, plot_training_curves, thin_out
from student_train.evaluate.run_records import LatencyRecord, RunRecords, TaskScores
from teacher_cache.errors import StudentError, TargetsError, TeacherError


def training(metrics: Sequence[Mapping[str, Any]]) -> list[Html]:
    """Curves, and the validations as a table."""
    steps = [record for record in metrics if "loss" in record]
    validations = [record for record in metrics if "valid_loss" in record]
    parts: list[Html] = []
    if steps:
        curves = "Loss, learning rate, tokens per second and share of waiting over the steps"
        parts.append(picture(plot_training_curves(metrics), curves))
        skipped = steps[-1].get("skipped_rows")
        if skipped:
            parts.append(paragraph(f"{skipped} rows of damaged blocks were left out.", "note"))
    else:
        parts.append(
            missing("There is no metrics.jsonl with steps of a training: kdtrain writes it.", "kdtrain --help")
        )
    if validations:
        names = list(dict.fromkeys(name for record in validations for name in record if name != "step"))
        lines = [
            [f"{record['step']:,}", *(_value(record.get(name)) for name in names)]
            for record in thin_out(validations, 20)
        ]
        parts += [heading("On held-out rows"), table(["step", *(_label(name) for name in names)], lines, words=0)]
    return parts


def fidelity(records: RunRecords) -> list[Html]:
    """Bars per pair of layers, and every measure."""
    report = records.fidelity
    if report is None:
        reason = _reason(records, "fidelity.json", "How close the student comes to its teacher was not measured.")
        command = ["kdeval", "fidelity", "--student", records.path, "--cache", *_stores(records)]
        return [missing(reason, shlex.join(command))]
    rows = report.rows if report.rows is not None else report.last_row - report.first_row + 1
    kind = "held-out rows" if report.held_out else "rows, not known to be held out,"
    parts = [paragraph(f"On {rows:,} {kind} of {report.cache}, {report.tokens:,} tokens. Layers: student → teacher.")]
    if report.hidden or report.relations:
        parts.append(picture(plot_fidelity_layers(report), "Hidden NMSE and relation KL per pair of layers"))
    lines = [[measure.label, measure.place, format_value(measure)] for measure in report.lines().values()]
    parts.append(table(["measure", "where", "value"], lines, words=2))
    return [*parts, *(paragraph(note, "note") for note in report.notes)]


def relations(records: RunRecords, caches: Sequence[str]) -> list[Html]:
    """Maps of the teacher and of the student on a sentence."""
    from student_train.evaluate.fidelity.heat_maps import relation_maps

    wanted = ["kdeval", "report", records.path, "--cache"]
    if not caches:
        return [
            missing(
                "The teacher's relations are in its cache, which was not given.",
                shlex.join([*wanted, *_stores(records)]),
            )
        ]
    try:
        maps = relation_maps(records.folder, caches)
    except (TargetsError, StudentError, TeacherError) as error:
        return [missing(str(error))]
    kind = "held-out row" if maps.held_out else "row"
    heads = f"{maps.heads}"
    heads += "" if maps.key_value_heads is None else f" (of keys and values: {maps.key_value_heads})"
    reach = "go from each token to those before it" if maps.causal else "reach over the whole row"
    return [
        paragraph(
            f"How much each token (row) relates to each other (column) in queries, keys and values: student layer "
            f"{maps.student_layer} and teacher layer {maps.teacher_layer}, mean over {heads} relation heads, "
            f"{kind} {maps.row:,} in the {maps.view} view. Relations {reach}, of which a sentence is "
            "shown; the KL is of the whole row. The maps of a column share their colours, which follow a square root."
        ),
        picture(plot_relation_maps(maps), f"Relations of teacher and student in: {' '.join(maps.tokens)}"),
    ]


def tasks(records: RunRecords) -> list[Html]:
    """One table per task: sets of examples by seed. First the task that the model itself was fine-tuned for."""
    command = shlex.join(["kdeval", "finetune", "--student", records.path, "--task", "sst2"])
    parts = [] if records.saved is None else _saved(records.saved)
    parts += [part for scores in records.tasks.values() for part in _task(scores)]
    old = [name for name in records.stale if name.startswith("finetune-")]
    if old or not parts:
        reason = _reason(records, ", ".join(old) or "?", "The student was fine-tuned on no task.")
        parts.append(missing(reason, command))
    return parts


def _saved(found: SavedModel) -> list[Html]:
    lines = [
        [name, f"{found.examples[name]:,}" if name in found.examples else LACKING, f"{100 * score:.2f}"]
        for name, score in found.scores.items()
    ]
    return [
        heading(f"{found.task}, of these very weights"),
        table([f"{found.metric} × 100", "examples", "score"], lines),
        paragraph(f"Fine-tuned with seed {found.seed}, learning rate {found.learning_rate:g}.", "note"),
        *(paragraph(note, "note") for note in found.notes),
    ]


def _task(found: TaskScores) -> list[Html]:
    record = found.record
    by_test = record.get("by_test") or {}
    lines = [[name, *score_cells(entry["scores"])] for name, entry in by_test.items()]
    lines.append(["mean of the sets" if by_test else "score", *score_cells(list(found.scores.values()))])
    columns = [f"{found.metric} × 100", *(f"seed {seed}" for seed in found.scores), "mean ± sd"]
    sizes = ", ".join(f"{count:,} {name}" for name, count in (record.get("examples") or {}).items())
    rates = ", ".join(f"{rate:g}" for rate in record.get("learning_rates") or ())
    how = ". ".join(
        part for part in (sizes and f"Examples: {sizes}", rates and f"Learning rate by seed: {rates}") if part
    )
    notes = [*([f"{how}."] if how else []), *found.notes]
    return [heading(found.task), table(columns, lines), *(paragraph(note, "note") for note in notes)]


def perplexity(records: RunRecords) -> list[Html]:
    """Perplexity and bits per byte, beside the teacher's."""
    report = records.perplexity
    if report is None:
        reason = _reason(records, "perplexity.json", "How well the student predicts text was not measured.")
        command = ["kdeval", "perplexity", "--student", records.path, "--text", "FILE", "--teacher"]
        return [missing(reason, shlex.join([*command, _teacher_name(records)]))]
    windows = f"windows of {report.seq_len} tokens, {report.stride} further each, in {report.dtype}"
    size = f"{report.documents:,} documents, {report.student_score.bytes:,} bytes"
    return [
        paragraph(f"On {', '.join(report.text)}: {size}; {windows}."),
        table(PERPLEXITY_COLUMNS, [[role, *text_cells(score)] for role, score in report.lines()]),
        *(paragraph(note, "note") for note in report.notes),
    ]


def lm_eval(records: RunRecords) -> list[Html]:
    """Every metric of every task of the harness."""
    report = records.lm_eval
    if report is None:
        reason = _reason(records, "lm-eval.json", "The student was measured on no task of the harness.")
        command = ["kdeval", "lm-eval", "--student", records.path, "--tasks", "TASK", "--include-path", "FOLDER"]
        return [missing(reason, shlex.join(command))]
    lines = [line for result in report.results for line in result_lines(result)]
    return [
        table(HARNESS_COLUMNS, lines, words=2),
        paragraph(f"Harness {report.harness}, in {report.dtype}; ↑: higher is better.", "note"),
        *(paragraph(note, "note") for note in report.notes),
    ]


def _stores(records: RunRecords) -> list[str]:
    return records.origin_settings.get("cache") or ["CACHE"]


def _teacher_name(records: RunRecords) -> str:
    return records.origin.get("cache", {}).get("teacher", {}).get("name") or "TEACHER"


def latency(records: RunRecords) -> list[Html]:
    """Every measurement, beside the teacher's."""
    if records.latency is None:
        reason = _reason(records, "latency.json", "How fast the student is was not measured.")
        command = ["kdeval", "latency", "--student", records.path, "--teacher"]
        return [missing(reason, shlex.join([*command, _teacher_name(records)]))]
    columns = ["backend", "where", "numbers", "batch", "tokens", "median ms", "p90", "p99", "teacher ms", "speed-up"]
    lines, answers = _timings(records.latency), _answers(records.latency)
    parts = [table(columns, lines, words=3)] if lines or not answers else []
    if answers:
        parts.append(table(_ANSWER_COLUMNS, answers, words=3))
    record = records.latency.record
    sizes = [f"student {records.latency.parameters / 1e6:.2f}M parameters"]
    if records.latency.teacher_parameters is not None:
        sizes.append(f"teacher {records.latency.teacher_parameters / 1e6:.2f}M")
    hardware = record.get("hardware")
    place = f" Measured on {', '.join(map(str, hardware.values()))}." if isinstance(hardware, Mapping) else ""
    error = record.get("onnx_max_error")
    difference = f" ONNX Runtime differs from PyTorch by at most {error:.1e}." if isinstance(error, float) else ""
    return [*parts, paragraph(f"{', '.join(sizes)}.{place}{difference}", "note")]


def onnx(records: RunRecords) -> list[Html]:
    """Every ONNX file that was exported, beside the model itself."""
    if records.onnx is None:
        reason = _reason(records, "onnx.json", "No ONNX files of the student were made.")
        command = ["kdeval", "export", records.path, "--out", "FOLDER", "--onnx", "--int8", "both"]
        return [missing(reason, shlex.join([*command, "--cache", *_stores(records)]))]
    columns = onnx_columns(records.onnx)
    return [
        table([*columns], [*map(list, zip(*columns.values(), strict=True))]),
        paragraph(onnx_caption(records.onnx), "note"),
        *(paragraph(note, "note") for note in records.onnx.notes),
    ]


def _timings(latency: LatencyRecord) -> list[list[str]]:
    lines = []
    for (setup, timing), entry in zip(latency.timings.items(), latency.record["measurements"], strict=True):
        teacher = timing.teacher_median_ms
        place = name_place(setup.device, setup.threads)
        lines.append(
            [
                *(setup.backend, place, setup.dtype, f"{setup.batch_size}", f"{setup.seq_len}"),
                *(
                    _milliseconds(value)
                    for value in (timing.median_ms, entry.get("p90_ms"), entry.get("p99_ms"), teacher)
                ),
                LACKING if teacher is None else f"{teacher / timing.median_ms:.2f}×",
            ]
        )
    return lines


_ANSWER_COLUMNS = (
    *("backend", "where", "numbers", "batch", "prompt", "new tokens"),
    *("first token, ms", "p90", "teacher", "speed-up", "tokens a second", "teacher", "speed-up", "runs"),
)


def _answers(latency: LatencyRecord) -> list[list[str]]:
    """Generation, a line for each size."""
    return [
        [
            *(setup.backend, setup.place, setup.dtype),
            *(f"{count}" for count in (setup.batch_size, setup.prompt_tokens, setup.new_tokens)),
            *map(_milliseconds, (timing.first_token_ms, timing.first_token_p90_ms, timing.teacher_first_token_ms)),
            _times(timing.first_token_speedup),
            *(_value(rate) for rate in (timing.tokens_per_second, timing.teacher_tokens_per_second)),
            _times(timing.speedup),
            f"{timing.runs}",
        ]
        for setup, timing in latency.generation.items()
    ]


def _times(ratio: float | None) -> str:
    return LACKING if ratio is None else f"{ratio:.2f}×"


def _reason(records: RunRecords, name: str, otherwise: str) -> str:
    """Why a record is missing: it is of other weights, or there is none."""
    if any(each in records.stale for each in name.split(", ")):
        return f"{name} is of other weights than those that lie there now: measure again."
    return otherwise


def _value(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, int | float) else LACKING


def _milliseconds(value: Any) -> str:
    return f"{value:.2f}" if isinstance(value, int | float) else LACKING


def _label(name: str) -> str:
    return name.removeprefix("valid_").replace("_", " ")
