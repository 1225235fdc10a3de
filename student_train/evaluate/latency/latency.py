"""How long one forward pass of a student takes, and how much faster than its teacher's that is: `kdeval latency`.

What is timed is one call of the encoder, from token ids that already lie on the device to hidden states there, as in a
program that waits for each answer; on a GPU until the device is idle again. Student and teacher take turns run by run
after a warm-up, so that whatever else the machine does hits both, and the speed-up is the ratio of their medians.
Inputs are random ids without padding: time does not depend on which ids, and padding is time wasted in any model.

Costs about `seconds` per device (see schedule.py), and loading and exporting before that: seconds for a base model.
Throughput under parallel requests, tokenizers, heads and other precisions of ONNX Runtime are not measured.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np

from student_train.evaluate.causal import is_causal, model_folder
from student_train.evaluate.latency.benches import Bench, BenchPlan, list_benches
from student_train.evaluate.latency.generation import measure_generation
from student_train.evaluate.latency.models import TimedModel, load_timed
from student_train.evaluate.latency.records import LatencyReport, Measurement
from student_train.evaluate.latency.schedule import Schedule, Size, plan_sizes
from student_train.evaluate.latency.settings import BACKENDS, LatencySettings
from student_train.evaluate.latency.turns import Show, name_hardware, take_turns, threads_restored, time_pair
from student_train.evaluate.onnx.graph import OnnxSource, export_onnx
from student_train.evaluate.onnx.packages import INSTALL, missing_packages
from teacher_cache.errors import SettingsError, StudentError
from teacher_cache.wording import format_duration

DEFAULT_LENGTHS = (32, 128, 512)


def measure_latency(settings: LatencySettings, *, devices: Sequence[str], show: Show) -> LatencyReport:
    """Time the student, and the teacher if one is given, on each device (`cpu`, `cuda`).

    Of a causal student it is the generation of tokens that is timed (generation.py).

    Raises:
        StudentError: a model cannot be loaded or exported, or cannot read the lengths asked for.
        SettingsError: ONNX Runtime was asked for and is not installed, or something that this kind of model has not.
    """
    if is_causal(model_folder(settings.student, "student")):
        return measure_generation(settings, devices=devices, show=show)
    if settings.new_tokens is not None:
        raise SettingsError(
            f"--new-tokens {settings.new_tokens!r}: student {settings.student!r} is no causal language model and "
            "generates nothing; leave --new-tokens out, and one forward pass is timed"
        )
    notes: list[str] = []
    backends = _choose_backends(settings, devices, notes)
    show("loading the models")
    models = [load_timed(settings.student, "student")]
    if settings.teacher is not None:
        models.append(load_timed(settings.teacher, "teacher"))
    lengths = _choose_lengths(settings, models, notes)
    sizes = [Size.of(batch_size, length) for batch_size in settings.chosen_batch_sizes() for length in lengths]
    measurements: list[Measurement] = []
    with tempfile.TemporaryDirectory(prefix="kdeval-") as scratch, threads_restored():
        exported: Mapping[Path, float] = {}
        if "onnxruntime" in backends:
            exported = _export(models, settings, Path(scratch), notes, show)
        # the GPU last: models are moved there for good
        for device in sorted(devices):
            benches = list_benches(device, models, list(exported), backends, settings)
            measurements += _measure(device, benches, sizes, settings, notes, show)
    return LatencyReport(
        student=settings.student,
        teacher=settings.teacher,
        student_size=models[0].size,
        teacher_size=models[1].size if len(models) > 1 else None,
        measurements=tuple(measurements),
        onnx_max_error=next(iter(exported.values()), None),
        hardware=name_hardware(devices),
        fingerprints={model.role: model.fingerprint for model in models},
        notes=tuple(notes),
    )


def _choose_backends(settings: LatencySettings, devices: Sequence[str], notes: list[str]) -> tuple[str, ...]:
    chosen = settings.chosen_backends() or (BACKENDS if "cpu" in devices else ("pytorch",))
    missing = missing_packages()
    if "onnxruntime" not in chosen or not missing:
        return chosen
    if settings.needs_onnx:
        raise SettingsError(
            f"ONNX Runtime is asked for, and {', '.join(missing)} not installed: the student cannot be exported or run "
            f"by it; install with {INSTALL}, or give --backends pytorch"
        )
    notes.append(f"ONNX Runtime is not measured: {', '.join(missing)} not installed; install with {INSTALL}")
    return ("pytorch",)


def _choose_lengths(settings: LatencySettings, models: Sequence[TimedModel], notes: list[str]) -> Sequence[int]:
    limits = [(model.positions, model) for model in models if model.positions is not None]
    limit, shortest = min(limits, key=lambda pair: pair[0], default=(None, None))
    asked = settings.chosen_lengths()
    lengths = DEFAULT_LENGTHS if asked is None else asked
    if limit is None or shortest is None or max(lengths) <= limit:
        return lengths
    if asked is not None:
        raise StudentError(
            f"--lengths {settings.lengths!r}: {shortest.role} {shortest.name!r} reads at most {limit} positions, so "
            f"there is no pass of {max(lengths)} tokens to time; give lengths up to {limit}"
        )
    notes.append(f"lengths end at {limit} tokens: {shortest.role} {shortest.name!r} reads no more positions")
    return sorted({min(length, limit) for length in lengths})


def _export(
    models: Sequence[TimedModel], settings: LatencySettings, scratch: Path, notes: list[str], show: Show
) -> Mapping[Path, float]:
    """The models as ONNX files with their errors; nothing where a family cannot be exported and nobody asked for it."""
    exported: dict[Path, float] = {}
    try:
        for model in models:
            show(f"exporting the {model.role} to ONNX")
            kept = settings.onnx_out if model.role == "student" else None
            file = Path(kept).expanduser() if kept is not None else scratch / f"{model.role}.onnx"
            exported[file] = export_onnx(_source(model), file)
    except StudentError as error:
        if settings.needs_onnx:
            raise
        notes.append(f"ONNX Runtime is not measured: {error}")
        return {}
    return exported


def _source(model: TimedModel) -> OnnxSource:
    return OnnxSource(
        called=f"{model.role} {model.name!r}",
        model=model.encoder,
        instead="ONNX Runtime has nothing to run; give --backends pytorch",
    )


def _measure(
    device: str,
    benches: Sequence[BenchPlan],
    sizes: Sequence[Size],
    settings: LatencySettings,
    notes: list[str],
    show: Show,
) -> Iterator[Measurement]:
    if not benches:
        return
    show(f"trying out the sizes on the {device}")
    plan = _plan(benches, sizes, settings.seconds)
    if plan.left_out:
        notes.append(
            f"left out on the {device} to stay within --seconds {settings.seconds:g}: "
            f"{', '.join(map(str, plan.left_out))}; about {format_duration(sum(plan.left_out.values()))} more"
        )
    for each in benches:
        bench = each.set_up()
        for size, seconds in plan.seconds.items():
            show(f"measuring {bench.backend} on the {device}, threads: {bench.threads}, {size}")
            times = take_turns(bench.passes(size), settings.runs, seconds[bench.threads])
            yield _summarise(bench, size, times)


def _plan(benches: Sequence[BenchPlan], sizes: Sequence[Size], seconds: float) -> Schedule:
    trial = max(benches, key=lambda bench: bench.threads).set_up()
    threads = [bench.threads for bench in benches]
    return plan_sizes(sizes, threads, seconds=seconds, time_pair=lambda size: time_pair(trial.passes(size)))


def _summarise(bench: Bench, size: Size, times: Sequence[Sequence[float]]) -> Measurement:
    student_ms, *teacher_ms = (1000 * np.asarray(each) for each in times)
    median, p90, p99 = (round(float(value), 4) for value in np.percentile(student_ms, (50, 90, 99)))
    return Measurement(
        backend=bench.backend,
        device=bench.device,
        dtype=bench.dtype,
        threads=bench.threads,
        batch_size=size.batch_size,
        seq_len=size.seq_len,
        median_ms=median,
        p90_ms=p90,
        p99_ms=p99,
        runs=len(student_ms),
        teacher_median_ms=round(float(np.median(teacher_ms[0])), 4) if teacher_ms else None,
    )
