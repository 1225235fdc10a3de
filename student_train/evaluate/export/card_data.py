"""The metadata of a model card, through the hub's own classes: what its search and its tables read."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any

from huggingface_hub import EvalResult, ModelCardData

from student_train.evaluate.export.commands import hub_dataset, last_part
from student_train.evaluate.export.facts import Facts
from student_train.evaluate.fidelity.records import Measure
from student_train.evaluate.run_records import TaskScores
from teacher_cache.outside import visible

_METRICS = {"accuracy": "accuracy", "f1": "f1", "macro-f1": "f1", "matthews": "matthews_correlation",
            "spearman": "spearmanr", "pearson": "pearsonr"}  # fmt: skip
"""Our names of metrics, and the hub's."""


def card_data(facts: Facts) -> ModelCardData:
    """The metadata; every figure is one of a record of these weights."""
    settings, results = facts.settings, list(_results(facts))
    languages = list(settings.languages)
    optional: dict[str, Any] = {
        "language": languages if len(languages) > 1 else next(iter(languages), None),
        "license": settings.license,
        "base_model": facts.base_model,
        "datasets": _datasets(facts) or None,
        "metrics": list(dict.fromkeys(each.metric_type for each in results)) or None,
        "eval_results": results or None,
    }
    return ModelCardData(
        model_name=visible(settings.called),
        library_name=facts.library,
        pipeline_tag=facts.pipeline,
        tags=_tags(facts),
        **{name: value for name, value in optional.items() if value is not None},
    )


def _tags(facts: Facts) -> list[str]:
    tags = ["kdcache", "knowledge-distillation"]
    tags += ["sentence-transformers"] if facts.embeds else []
    if facts.onnx is not None:
        files = [each for each in facts.onnx.files if each.file is not None]
        tags += ["onnx"] if files else []
        tags += ["int8"] if facts.onnx.int8 is not None else []
    return tags


def _datasets(facts: Facts) -> list[str]:
    """Texts that surely came from the hub, without configuration and split."""
    corpus = facts.cache.corpus
    names = [] if corpus is None else [name for spec in corpus.specs if (name := hub_dataset(spec)) is not None]
    return list(dict.fromkeys(map(visible, names)))


def _results(facts: Facts) -> Iterator[EvalResult]:
    yield from _fidelity(facts)
    for task in facts.run.tasks.values():
        yield _fine_tuned(task)
    if facts.saved is not None:
        saved = facts.saved
        for name, measures in saved.measures.items():
            if saved.metric in measures:
                yield EvalResult(
                    task_type=facts.pipeline, **_examples(saved.task, {name: saved.sources.get(name)}),
                    metric_type=_METRICS.get(saved.metric, saved.metric), metric_value=measures[saved.metric],
                    metric_name=f"{saved.metric} on {visible(name)}",
                )  # fmt: skip
    if facts.run.perplexity is not None:
        score = facts.run.perplexity.student_score
        texts = ", ".join(visible(last_part(text)) for text in facts.run.perplexity.text)
        for kind, value in (("perplexity", score.perplexity), ("bits_per_byte", score.bits_per_byte)):
            if math.isfinite(value):
                yield EvalResult(
                    task_type="text-generation", dataset_type="text", dataset_name=texts, metric_type=kind,
                    metric_value=value,
                )  # fmt: skip
    yield from _harness(facts)
    yield from _speed(facts)


def _fidelity(facts: Facts) -> Iterator[EvalResult]:
    report = facts.run.fidelity
    if report is None:
        return
    kinds = {"relation": "kl_divergence", "hidden": "normalized_mse", "distribution.kl": "kl_divergence"}
    kinds["distribution.top1"] = "top1_agreement"
    where = "held-out rows of the training text" if report.held_out else "rows of text"
    for key, measure in report.lines().items():
        kind = next(kind for start, kind in kinds.items() if key.startswith(start))
        yield EvalResult(
            task_type=facts.pipeline, dataset_type="text", dataset_name=where, metric_type=kind,
            metric_value=measure.value, metric_name=_fidelity_name(measure),
        )  # fmt: skip


def _fidelity_name(measure: Measure) -> str:
    return f"{measure.label} to the teacher ({measure.place})"


def _fine_tuned(task: TaskScores) -> EvalResult:
    scores, sources = list(task.scores.values()), task.record.get("sources")
    known = sources if isinstance(sources, dict) else {}
    # of several sets, it is the tests that are reported
    measured = {name: source for name, source in known.items() if name != "train" and (name != "dev" or len(known) < 3)}
    return EvalResult(
        task_type=_task_type(task),
        **_examples(task.task, measured),
        metric_type=_METRICS.get(task.metric, task.metric),
        metric_value=sum(scores) / len(scores),
        metric_name=f"{task.metric} after fine-tuning, mean of {len(scores)} seeds",
    )


def _task_type(task: TaskScores) -> str:
    """The hub's name of the task; to it, texts that get a number are classified, too."""
    settings = task.record.get("settings")
    if isinstance(settings, dict) and "tag_scheme" in settings:
        return "token-classification"
    return "sentence-similarity" if task.task == "stsb" else "text-classification"


def _examples(task: str, sources: Mapping[str, object]) -> dict[str, Any]:
    """What a result says of its examples, sources by name of the set: the task's dataset where all are of that."""
    from student_train.evaluate.finetune.tasks import TASKS

    dataset = TASKS[task].dev.partition(":")[0] if task in TASKS else None
    parts = [str(source).split(":") for source in sources.values()]
    if not parts or any(len(each) != 3 or each[0] != dataset for each in parts):
        return {"dataset_type": "examples", "dataset_name": visible(task)}
    ((_, config, split), *others) = parts
    one = {} if others else {"dataset_config": visible(config), "dataset_split": visible(split)}
    return {"dataset_type": parts[0][0], "dataset_name": visible(task), **one}


def _harness(facts: Facts) -> Iterator[EvalResult]:
    report = facts.run.lm_eval
    # of a part of the questions, a score is none of the task: the text of the card says what it is
    for result in () if report is None or report.limit is not None else report.named:
        yield EvalResult(
            task_type="text-generation",
            dataset_type=visible(result.task),
            dataset_name=visible(result.task),
            metric_type=visible(result.main.partition(",")[0]),
            metric_value=result.metrics[result.main].value,
            metric_name=f"lm-evaluation-harness, {visible(result.main)}",
        )


def _speed(facts: Facts) -> Iterator[EvalResult]:
    latency = facts.run.latency
    for setup, timing in {} if latency is None else latency.timings.items():
        yield EvalResult(
            task_type=facts.pipeline, dataset_type="random-ids", dataset_name="random token ids", metric_type="latency",
            metric_value=timing.median_ms, metric_name=f"median milliseconds, {setup}",
        )  # fmt: skip
    for answer, speed in {} if latency is None else latency.generation.items():
        yield EvalResult(
            task_type=facts.pipeline, dataset_type="random-ids", dataset_name="random token ids",
            metric_type="tokens_per_second", metric_value=speed.tokens_per_second, metric_name=str(answer),
        )  # fmt: skip
    if facts.onnx is None:
        return
    for file in facts.onnx.files:
        for each in file.timings:
            yield EvalResult(
                task_type=facts.pipeline, dataset_type="random-ids", dataset_name="random token ids",
                metric_type="latency", metric_value=each.median_ms,
                metric_name=f"median milliseconds, {file.name}, {each.batch_size} x {each.seq_len} tokens, "
                f"{each.threads} CPU threads",
            )  # fmt: skip
