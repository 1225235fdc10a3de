"""What the reader of a comparison has to know besides its numbers: what is missing, and what is not alike.

In: the rows. Out: sentences. A missing record is named with the command that makes it; settings in which measurements
differ are named because their results then differ for another reason than the models.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

from student_train.evaluate.compare.int8 import int8_output, int8_rows, int8_timing
from student_train.evaluate.compare.rows import Row, other_differences, vocabulary_in_words
from student_train.evaluate.latency.generation_records import GenerationSetup
from student_train.evaluate.run_records import RunRecords, TimingSetup
from teacher_cache.wording import some

_OF_THE_STUDENT = ("student", "weights", "config", "tokenizer")
_SHOWN = 40
"""So many letters of a value of a recipe."""


def comparison_notes(
    rows: Sequence[Row],
    tasks: Mapping[str, str],
    setup: TimingSetup | GenerationSetup | None,
    *,
    timed: Sequence[str],
    read: Sequence[str] = (),
) -> Iterator[str]:
    """The notes.

    `timed` names the rows that have a latency, their own, as somebody's teacher, or of their shape; `read` those that
    have a perplexity.
    """
    runs = [run for row in rows for run in row.runs]
    yield from _missing(rows, tasks, setup, timed)
    yield from _missing_of_causal(rows, read)
    yield from _fine_tuned(runs)
    yield from _caveats(runs)
    yield from _training(rows)
    for what, answer in _LIKENESSES.items():
        yield from _unlike(what, runs, answer)
    for task in tasks:
        recipes = {run.path: _recipe(run, task) for run in runs if task in run.tasks}
        for name in dict.fromkeys(name for recipe in recipes.values() for name in recipe):
            yield from _unlike_values(
                f"{task} was fine-tuned with different {name}",
                {path: recipe.get(name, "–") for path, recipe in recipes.items()},
                longest=_SHOWN,
            )


def _missing(
    rows: Sequence[Row],
    tasks: Mapping[str, str],
    setup: TimingSetup | GenerationSetup | None,
    timed: Sequence[str],
) -> Iterator[str]:
    runs = [run for row in rows for run in row.runs]
    stale = {name for run in runs for name in run.stale}
    for name in sorted(stale):
        owners = [run.path for run in runs if name in run.stale]
        yield f"{name} of {some(owners)} is of other weights than those that lie there now and was left out"
    unknown = [run.path for run in runs if not run.provenance and run.saved is None]
    if unknown:
        yield f"no provenance.json in {some(unknown)}: not trained by kdtrain, so method, mapping and init are unknown"
    without = [run.path for run in runs if run.fidelity is None and run.provenance]
    if without:
        yield f"no fidelity of {some(without)}: run `kdeval fidelity --student RUN --cache CACHE`"
    if not tasks and not all(run.causal or run.saved is not None for run in runs):
        yield "no scores of any run: run `kdeval finetune --student RUN --task TASK`"
    for task in tasks:
        without = [run.path for run in runs if task not in run.tasks and run.saved is None]
        if without:
            yield f"no {task} of {some(without)}: run `kdeval finetune --student RUN --task {task}`"
    without = [run.path for row in rows for run in row.runs if row.name not in timed]
    if without:
        what = "" if setup is None else f" ({setup})"
        yield f"no latency{what} of {some(without)}: run `kdeval latency --student RUN --teacher TEACHER`"


def _missing_of_causal(rows: Sequence[Row], read: Sequence[str]) -> Iterator[str]:
    without = [run.path for row in rows for run in row.runs if run.causal and row.name not in read]
    if without:
        yield f"no perplexity of {some(without)}: run `kdeval perplexity --student RUN --text FILE`"
    runs = [run for row in rows for run in row.runs]
    names = dict.fromkeys(result.task for run in runs if run.lm_eval is not None for result in run.lm_eval.named)
    for name in names:
        without = [run.path for run in runs if run.causal and name not in _lm_eval_tasks(run)]
        if without:
            yield f"no {name} of {some(without)}: run `kdeval lm-eval --student RUN --tasks {','.join(names)}`"


def _fine_tuned(runs: Sequence[RunRecords]) -> Iterator[str]:
    for run in runs:
        if run.saved is not None:
            yield f"{run.path} was itself fine-tuned on {run.saved}, which is no mean over seeds"


def _caveats(runs: Sequence[RunRecords]) -> Iterator[str]:
    """What records say of their own figures, once for all that say the same."""
    owners: dict[tuple[str, str], list[str]] = defaultdict(list)
    for run in runs:
        for said in _notes_of(run):
            owners[said].append(run.path)
    for (what, note), names in owners.items():
        yield f"{what} of {some(names)}: {note}"


def _notes_of(run: RunRecords) -> Iterator[tuple[str, str]]:
    """What each is about, and the note."""
    reports = {
        "fidelity": run.fidelity,
        "perplexity": run.perplexity,
        "lm-evaluation-harness": run.lm_eval,
        "ONNX files": run.onnx,
        "fine-tuning": run.saved,
        **run.tasks,
    }
    for what, report in reports.items():
        if report is not None:
            yield from ((what, note) for note in report.notes)


def _lm_eval_tasks(run: RunRecords) -> list[str]:
    return [] if run.lm_eval is None else [result.task for result in run.lm_eval.named]


def _training(rows: Sequence[Row]) -> Iterator[str]:
    for flag, values in other_differences(rows).items():
        yield f"trainings differ in {flag}: {'; '.join(values)}"
    seen: dict[str, str] = {}
    for row in rows:
        for run in row.runs:
            if run.weights is None:
                continue
            other = seen.setdefault(run.weights, run.path)
            if other != run.path:
                yield f"{run.path} has the same weights as {other}: it is the same model twice"
    caches = defaultdict(list)
    for row in rows:
        for run in row.runs:
            if run.provenance:
                caches[str(run.provenance["cache"].get("identity_sha256"))[:12]].append(run.path)
    if len(caches) > 1:
        yield "trainings read different caches: " + "; ".join(f"{some(names)} {key}" for key, names in caches.items())


def _unlike(what: str, runs: Iterable[RunRecords], answer: Callable[[RunRecords], str | None]) -> Iterator[str]:
    """A note where runs answer differently; those without an answer do not count."""
    values = {run.path: answer(run) for run in runs}
    yield from _unlike_values(what, {path: value for path, value in values.items() if value is not None})


def _unlike_values(what: str, values: Mapping[str, str], longest: int | None = None) -> Iterator[str]:
    """Values are compared whole; so many letters of each are shown, or all where the first do not tell them apart."""
    owners: dict[str, list[str]] = defaultdict(list)
    for path, value in values.items():
        owners[value].append(path)
    if len({value[:longest] for value in owners}) < len(owners):
        longest = None
    if len(owners) > 1:
        yield f"{what}: " + "; ".join(f"{some(names)}: {value[:longest]}" for value, names in owners.items())


def _measured_rows(run: RunRecords) -> str | None:
    report = run.fidelity
    if report is None:
        return None
    cache = report.fingerprints.get("cache", report.cache)[:12]
    return f"{report.first_row} to {report.last_row} of {cache}"


def _hidden_layers(run: RunRecords) -> str | None:
    hidden = run.fidelity.hidden if run.fidelity is not None else ()
    return ", ".join(str(pair.teacher_layer) for pair in hidden) or None


def _relations(run: RunRecords) -> str | None:
    relations = run.fidelity.relations if run.fidelity is not None else ()
    return ", ".join(f"layer {pair.teacher_layer} in {pair.how}" for pair in relations) or None


def _output_kl(run: RunRecords) -> str | None:
    distribution = run.fidelity.distribution if run.fidelity is not None else None
    return None if distribution is None else distribution.to_what


def _hardware(run: RunRecords) -> str | None:
    hardware = run.latency.record.get("hardware") if run.latency is not None else None
    return ", ".join(map(str, hardware.values())) if isinstance(hardware, Mapping) else None


def _timed_teacher(run: RunRecords) -> str | None:
    weights = run.latency.teacher_weights if run.latency is not None else None
    return None if weights is None else f"weights {weights[:12]}"


def _text(run: RunRecords) -> str | None:
    return None if run.perplexity is None else f"{run.perplexity.fingerprints.get('text', '–')[:12]}"


def _windows(run: RunRecords) -> str | None:
    found = run.perplexity
    return None if found is None else f"{found.seq_len} tokens, {found.stride} further each, {found.dtype}"


def _vocabulary(run: RunRecords) -> str | None:
    return None if run.perplexity is None else run.perplexity.fingerprints.get("vocabulary", "–")[:12]


def _questions(run: RunRecords) -> str | None:
    """What the harness asked: the tasks as it understood their files, the examples before each, how many questions."""
    if run.lm_eval is None:
        return None
    asked = [
        f"{result.task} {(result.config_sha256 or '–')[:12]}, {result.shots} shots, {result.examples} questions"
        for result in run.lm_eval.results
        if result.examples is not None
    ]
    return "; ".join(asked) or None


def _harness(run: RunRecords) -> str | None:
    return None if run.lm_eval is None else f"{run.lm_eval.harness} in {run.lm_eval.dtype}"


def _ids(run: RunRecords) -> str | None:
    return vocabulary_in_words(run) if run.provenance else None


_LIKENESSES: Mapping[str, Callable[[RunRecords], str | None]] = {
    "students have different ids of their teacher's": _ids,
    "fidelity was measured on different rows": _measured_rows,
    "relation KL is of different teacher layers or heads": _relations,
    "hidden NMSE is a mean over different teacher layers": _hidden_layers,
    "output KL is to different parts of the teacher's distribution": _output_kl,
    "latency was measured on different hardware": _hardware,
    "speed-ups are over different teachers": _timed_teacher,
    "perplexity was measured on different text": _text,
    "perplexity was measured in different windows": _windows,
    "perplexities are of different tokenizers, bits per byte compare where no note says otherwise": _vocabulary,
    "lm-evaluation-harness asked different questions": _questions,
    "lm-evaluation-harness is of different versions or ran in different numbers": _harness,
    "int8 files give different outputs": int8_output,
    "int8 files were timed in different ways": int8_timing,
    "int8 files were compared with their models on different rows": int8_rows,
}


def _recipe(run: RunRecords, task: str) -> dict[str, str]:
    """How a task was trained and on what, by name."""
    record = run.tasks[task].record
    parts = {"": record.get("settings"), " examples": record.get("examples"), " data": record.get("fingerprints")}
    return {
        f"{name}{kind}": json.dumps(value).strip('"')
        for kind, part in parts.items()
        if isinstance(part, Mapping)
        for name, value in part.items()
        if kind != " data" or name not in _OF_THE_STUDENT
    }
