"""The verdict on a run in words: what it keeps of its teacher, what that costs, and what nobody has measured.

In: the records of a run. Out: sentences under short labels, each with its figures; whoever reads no further knows what
the records tell, and what they do not. Nothing is said that no record says: the untrained student is the validation
before the first step, the teacher what was measured beside the student. Nothing is measured here.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from student_train.evaluate.run_records import RunRecords
from teacher_cache.wording import format_duration

_ALIKE = 1.02
"""Losses whose ratio is below this are taken as the same."""
Said = tuple[str, str]
"""A label and a sentence or two."""


def verdict(records: RunRecords, metrics: Sequence[Mapping[str, Any]]) -> list[Said]:
    """What is to be said in front of everything else, by label, in reading order."""
    said = [
        ("Training", _training(metrics)),
        ("What it keeps", " ".join(_likeness(records))),
        ("Quality", " ".join(_quality(records))),
        ("What it costs", " ".join(_cost(records))),
    ]
    lacking = _unknown(records, metrics)
    unknown = f"Nobody has measured {_listed(lacking)}." if lacking else ""
    return [(label, text) for label, text in (*said, ("Not known", unknown)) if text]


def speedups(records: RunRecords) -> list[float]:
    """How many times as fast as its teacher, for every size that was timed beside it: passes, or tokens generated."""
    if records.latency is None:
        return []
    passes = [
        timing.teacher_median_ms / timing.median_ms
        for timing in records.latency.timings.values()
        if timing.teacher_median_ms is not None
    ]
    answers = [timing.speedup for timing in records.latency.generation.values() if timing.speedup is not None]
    return [*passes, *answers]


def _training(metrics: Sequence[Mapping[str, Any]]) -> str:
    """What was learnt, beside the untrained student: the validation before the first step."""
    validations = [record for record in metrics if "valid_loss" in record]
    steps = [record for record in metrics if "loss" in record]
    if not validations:
        return ""
    first, best = validations[0], min(validations, key=lambda record: record["valid_loss"])
    if not steps:
        return f"This is the untrained student: its loss on rows held out from training is {first['valid_loss']:.4g}."
    seconds = format_duration(sum(record["seconds"] for record in steps))
    count, tokens = steps[-1]["step"], steps[-1]["tokens"]
    effort = f"{count:,} {'step' if count == 1 else 'steps'} on {tokens:,} tokens ({seconds})"
    if first["step"] > 0:
        return f"After {effort} its loss on held-out rows is {best['valid_loss']:.4g} at best."
    before, after = first["valid_loss"], best["valid_loss"]
    if not before > 0 or not after > 0 or before / after < _ALIKE:
        return (
            f"It has learnt nothing to speak of: after {effort} its loss on held-out rows is {after:.4g} at best, and "
            f"that of the untrained student is {before:.4g}."
        )
    where = "" if best["step"] >= count else f", reached at step {best['step']:,} and not after it"
    names = [name for name in best if name not in ("step", "valid_loss", "valid_skipped_rows") and name in first]
    parts = ", ".join(f"{name.removeprefix('valid_')} from {first[name]:.4g} to {best[name]:.4g}" for name in names)
    return (
        f"Its loss on held-out rows fell from {before:.4g}, that of the untrained student, to {after:.4g}, "
        f"{before / after:.2g} times smaller{where}{f' ({parts})' if len(names) > 1 else ''}. It took {effort}."
    )


def _likeness(records: RunRecords) -> Iterator[str]:
    """How close it comes to the teacher."""
    report = records.fidelity
    if report is None:
        return
    rows = "rows that it was not trained on" if report.held_out else "rows that may be among those it was trained on"
    if (found := report.distribution) is not None:
        yield (
            f"On {rows} it names the teacher's most probable token at {found.top1_agreement:.0%} of "
            f"{found.positions:,} places, and its distribution is {found.kl:.3g} nats from the teacher's."
        )
    if (error := report.hidden_mean) is not None:
        kept = f"{1 - error:.0%}" if error < 1 else "nothing"
        yield f"Its layers hold {kept} of the variance of the teacher's hidden states, as far as a linear map finds it."
    if (mean := report.relation_mean) is not None:
        pairs = "" if len(report.relations) == 1 else f", mean over {len(report.relations)} pairs of layers"
        what = f"queries, keys and values together{pairs}"
        yield f"Its attention relations are {mean:.3g} nats from the teacher's ({what})."


def _quality(records: RunRecords) -> Iterator[str]:
    """What it does with text and tasks, and the teacher where that was measured beside it."""
    if (report := records.perplexity) is not None:
        own = report.student_score.bits_per_byte
        if report.teacher_score is None:
            yield f"It takes {own:.3f} bits to predict a byte of text; what the teacher takes was not measured."
        else:
            theirs = report.teacher_score.bits_per_byte
            more = own / theirs - 1
            yield (
                f"It takes {own:.3f} bits to predict a byte of text, the teacher {theirs:.3f}: "
                f"{abs(more):.1%} {'more' if more >= 0 else 'less'}."
            )
    if (saved := records.saved) is not None and saved.score is not None:
        figures = [f"{100 * score:.1f} on {name}" for name, score in saved.scores.items()]
        yield f"These very weights, fine-tuned on {saved.task}, score {_listed(figures)} ({saved.metric} × 100)."
    scores = [
        f"{100 * sum(found.scores.values()) / len(found.scores):.1f} on {task} ({found.metric} × 100)"
        for task, found in records.tasks.items()
    ]
    if records.lm_eval is not None:
        scores += [
            f"{result.metrics[result.main].value:.3g} on {result.task} ({result.main})"
            for result in records.lm_eval.named
        ]
    if scores:
        yield f"It scores {_listed(scores)}; what the teacher scores stands in the teacher's own records."


def _cost(records: RunRecords) -> Iterator[str]:
    """Size and speed beside the teacher's."""
    latency, shape = records.latency, records.shape
    if latency is not None and latency.teacher_parameters:
        own, theirs = latency.parameters, latency.teacher_parameters
        yield f"It has {own / theirs:.0%} of its teacher's parameters, {own / 1e6:.2f}M of {theirs / 1e6:.2f}M."
    elif shape is not None:
        yield f"It has {shape.parameters / 1e6:.2f}M parameters."
    if found := speedups(records):
        least, most = min(found), max(found)
        range_ = f"{least:.1f}" if f"{least:.1f}" == f"{most:.1f}" else f"{least:.1f} to {most:.1f}"
        yield f"It runs {range_} times as fast as its teacher, depending on the input and the machine."


def _unknown(records: RunRecords, metrics: Sequence[Mapping[str, Any]]) -> list[str]:
    lacking = []
    if records.provenance and not any("valid_loss" in record for record in metrics):
        lacking.append("how far it is from the untrained student")
    if records.fidelity is None:
        lacking.append("how close it comes to its teacher")
    if records.causal and records.perplexity is None:
        lacking.append("how well it predicts text")
    if not records.tasks and records.lm_eval is None and records.saved is None:
        lacking.append("how it does on a task")
    if records.latency is None:
        lacking.append("how fast it is")
    elif not speedups(records):
        lacking.append("how much faster than its teacher it is")
    return lacking


def _listed(parts: Sequence[str]) -> str:
    """`a, b and c`."""
    return " and ".join(part for part in (", ".join(parts[:-1]), parts[-1]) if part)
