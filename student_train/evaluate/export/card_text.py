"""The sections of a model card, one function each: what is known, as Markdown. Each is empty where nothing is known."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

from student_train.evaluate.export.commands import is_path, last_part, portable, without_places
from student_train.evaluate.export.facts import Facts, notes_of
from student_train.evaluate.fidelity.records import format_value
from student_train.evaluate.finetune.records import score_cells
from student_train.evaluate.lm_eval.records import LACKING
from student_train.evaluate.making import commands_behind
from student_train.evaluate.markdown import code_lines, markdown_table, plain
from student_train.evaluate.onnx.records import onnx_caption, onnx_columns
from student_train.evaluate.perplexity.records import COLUMNS as PERPLEXITY_COLUMNS
from student_train.evaluate.perplexity.records import text_cells
from teacher_cache.outside import visible

_MOST_TEXTS = 20


def introduction(facts: Facts) -> str:
    """What it is, in a sentence or two."""
    config, shape = facts.source.model.config, facts.run.shape
    what = "encoder"
    if facts.source.causal:
        what = "decoder" if facts.source.fine_tuned else "causal language model"
    if facts.embeds:
        what = "sentence encoder"
    size = "" if shape is None else f" of {shape.layers} layers, {shape.width} wide"
    text = f"A {config.model_type} {what}{size}"
    if facts.teacher is not None:
        called = plain(facts.base_model or last_part(facts.teacher))
        text += f", distilled from {called} with kdcache: the teacher ran once, and what was kept of it taught this"
    tuned = "" if facts.saved is None else f" Fine-tuned on {plain(facts.saved.task)}."
    return f"{text}.{tuned}"


def usage(facts: Facts) -> str:
    """Lines of Python that run it."""
    where = facts.settings.push_to_hub or facts.settings.called
    if facts.embeds:
        lines = [
            "from sentence_transformers import SentenceTransformer",
            "",
            f"model = SentenceTransformer({where!r})",
            'print(model.similarity(model.encode("A dog barks."), model.encode("There is a dog.")))',
        ]
        return f"## Use\n\n{code_lines(lines, 'python')}"
    pipeline = facts.source.kind.pipeline
    lines = ["from transformers import pipeline", "", f"model = pipeline({pipeline!r}, model={where!r})"]
    if pipeline == "fill-mask":
        lines += ['print(model(f"The dog {model.tokenizer.mask_token} at the cat."))']
    else:
        lines += ['print(model("The dog"))']
    return f"## Use\n\n{code_lines(lines, 'python')}{_onnx_usage(facts)}"


def _onnx_usage(facts: Facts) -> str:
    files = [] if facts.onnx is None else [each.file for each in facts.onnx.files if each.file is not None]
    if facts.onnx is None or not files:
        return ""
    said = ", ".join(f"`{name}`" for name in files)
    pass_alone = " One pass over the whole text: keys and values are not kept." if facts.source.causal else ""
    return (
        f"\n\nFor ONNX Runtime: {said}. In: `input_ids` and `attention_mask`, int64 [batch, sequence]"
        f"{' (and `token_type_ids`)' if _has_types(facts) else ''}; out: `{facts.onnx.output}`.{pass_alone}"
    )


def _has_types(facts: Facts) -> bool:
    logits = facts.onnx is not None and facts.onnx.output == "logits"
    return logits and facts.source.fine_tuned and facts.source.numbers_texts


def properties(facts: Facts) -> str:
    """Sizes, and how much it reads."""
    shape, reads = facts.run.shape, facts.source.positions
    lines: list[tuple[str, str]] = []
    if shape is not None:
        feed_forward = "" if shape.feed_forward is None else f", feed-forward width {shape.feed_forward}"
        lines.append(("shape", f"{shape.layers} layers, width {shape.width}, {shape.heads} heads{feed_forward}"))
        lines.append(("parameters", f"{shape.parameters:,} without heads"))
    lines.append(("vocabulary", f"{facts.source.model.config.vocab_size:,}"))
    lines.append(("reads at most", "any length" if reads is None else f"{reads:,} tokens"))
    if facts.longest_sentence is not None:
        lines.append(("embeds at most", f"{facts.longest_sentence:,} tokens of a text, as its teacher does"))
    if facts.cache.seq_len is not None:
        lines.append(("was trained on rows of", f"{facts.cache.seq_len:,} tokens"))
    if facts.teacher is not None:
        lines.append(("teacher", facts.base_model or last_part(facts.teacher)))
    if facts.cache.teacher.weights_sha256:
        lines.append(("teacher's weights, SHA-256", facts.cache.teacher.weights_sha256))
    return f"## The model\n\n{markdown_table(('', ''), lines, words=2)}"


def measures(facts: Facts) -> str:
    """All that was measured, each with its conditions."""
    parts = [*_fidelity(facts), *_similarity(facts), *_tasks(facts), *_perplexity(facts), *_speed(facts), *_onnx(facts)]
    return "\n\n".join(["## Measured", *parts]) if parts else ""


def _fidelity(facts: Facts) -> Iterator[str]:
    report = facts.run.fidelity
    if report is None:
        return
    kind = "held-out rows" if report.held_out else "rows, not known to be held out,"
    yield f"**Distance to the teacher**, on {kind} of text, {report.tokens:,} tokens (layers: student → teacher):"
    lines = [(each.label, each.place, format_value(each)) for each in report.lines().values()]
    yield markdown_table(("measure", "where", "value"), lines, words=2)
    yield from _told(report.notes)


def _similarity(facts: Facts) -> Iterator[str]:
    found = facts.similarity
    if found is None:
        return
    kind = "held-out sentences" if found.held_out else "sentences, not known to be held out"
    beside = "" if found.cosine is None else f"mean cosine of the two embeddings of a sentence {found.cosine:.3f}, "
    yield (
        f"**Embeddings beside the teacher's**, of {found.sentences} {kind}: {beside}correlation of the cosines "
        f"of all pairs {found.correlation:.3f}, mean difference of these cosines {found.error:.3f}."
    )


def _tasks(facts: Facts) -> Iterator[str]:
    lines = [
        (task.task, task.metric, f"{len(task.scores)}", score_cells(list(task.scores.values()))[-1])
        for task in facts.run.tasks.values()
    ]
    if lines:
        yield "**Fine-tuned on tasks** (x 100, mean ± standard deviation over seeds; the models are not these weights):"
        yield markdown_table(("task", "metric", "seeds", "score"), lines, words=2)
        for task in facts.run.tasks.values():
            yield from _told(f"{task.task}: {note}" for note in task.notes)
    saved = facts.saved
    if saved is not None:
        yield f"**On its task**, {plain(saved.task)} ({plain(saved.metric)} x 100, of these very weights):"
        own = [
            (name, f"{saved.examples.get(name, 0):,}", f"{100 * found[saved.metric]:.2f}")
            for name, found in saved.measures.items()
            if saved.metric in found
        ]
        yield markdown_table(("examples", "number", "score"), own, words=1)
        yield from _told(saved.notes)


def _perplexity(facts: Facts) -> Iterator[str]:
    report = facts.run.perplexity
    if report is not None:
        texts = ", ".join(last_part(text) for text in report.text)
        # which text the models had seen before, nobody recorded
        yield f"**Text** ({plain(texts)}, {report.documents:,} documents):"
        yield markdown_table(
            PERPLEXITY_COLUMNS, [(role, *text_cells(score)) for role, score in report.lines()], words=1
        )
        yield from _told(report.notes)
    harness = facts.run.lm_eval
    if harness is not None:
        lines = [
            (
                result.task,
                result.main,
                f"{result.metrics[result.main].value:.4f}",
                _or_lacking(result.metrics[result.main].stderr, ".4f"),
                _or_lacking(result.shots, ","),
                _or_lacking(result.examples, ","),
            )
            for result in harness.named
        ]
        limited = "" if harness.limit is None else f", on the first {harness.limit:,} questions of each task alone"
        yield f"**lm-evaluation-harness**{limited}:"
        yield markdown_table(("task", "metric", "value", "± stderr", "shots", "questions"), lines, words=2)
        yield from _told(harness.notes)


def _or_lacking(value: float | None, form: str) -> str:
    return LACKING if value is None else f"{value:{form}}"


def _speed(facts: Facts) -> Iterator[str]:
    latency = facts.run.latency
    if latency is None:
        return
    hardware = ", ".join(map(str, (latency.record.get("hardware") or {}).values()))
    lines = [
        (
            str(setup),
            f"{timing.median_ms:.3g}",
            "–" if timing.teacher_median_ms is None else f"{timing.teacher_median_ms / timing.median_ms:.2f}×",
        )
        for setup, timing in latency.timings.items()
    ]
    if lines:
        yield f"**Time of a forward pass** ({plain(hardware)}):"
        yield markdown_table(("of what, where", "median ms", "teacher's over it"), lines, words=1)
    answers = [
        (
            str(setup),
            f"{timing.first_token_ms:.3g}",
            f"{timing.tokens_per_second:.4g}",
            "–" if timing.speedup is None else f"{timing.speedup:.2f}×",
        )
        for setup, timing in latency.generation.items()
    ]
    if answers:
        yield f"**Time of an answer** ({plain(hardware)}):"
        columns = ("of what, where", "ms to the first token", "tokens/s after it", "times the teacher's")
        yield markdown_table(columns, answers, words=1)
    yield from _told(notes_of(latency.record))


def _onnx(facts: Facts) -> Iterator[str]:
    report = facts.onnx
    if report is None:
        return
    yield "**ONNX Runtime beside PyTorch**:"
    columns = onnx_columns(report)
    yield markdown_table(tuple(columns), list(zip(*columns.values(), strict=True)), words=1)
    yield plain(onnx_caption(report))
    yield from _told(report.notes)


def training_data(facts: Facts) -> str:
    """Which text, by name and fingerprint."""
    cache = facts.cache
    if not cache.identity_sha256:
        return ""
    lines: list[tuple[str, str]] = []
    if cache.corpus is not None:
        names = [last_part(spec) if is_path(spec) else spec for spec in cache.corpus.specs]
        more = [f"and {len(names) - _MOST_TEXTS} more"] if len(names) > _MOST_TEXTS else []
        lines.append(("text", ", ".join([*names[:_MOST_TEXTS], *more])))
        lines.append(("documents, tokens", f"{cache.corpus.documents:,}, {cache.corpus.tokens:,}"))
        lines.append(("fingerprint of its token ids", cache.corpus.fingerprint))
    lines.append(("rows", f"{cache.rows:,}"))
    lines.append(("fingerprint of the store", cache.identity_sha256))
    return f"## Training data\n\n{markdown_table(('', ''), lines, words=2)}"


def made_by(facts: Facts) -> str:
    """The commands that make it again, and with which versions."""
    stores = [each.command for each in facts.cache.stores] or [facts.cache.command]
    behind = commands_behind(stores, facts.provenance, facts.source.folder)
    saved = [] if facts.saved is None or facts.saved.command is None else [facts.saved.command]
    commands = [found for each in (*behind, *saved, *facts.run.commands) if (found := portable(each))]
    if not commands:
        return ""
    parts = ["## How it was made", code_lines(dict.fromkeys(commands), "sh")]
    software = facts.provenance.get("software") or {}
    versions = ", ".join(f"{name} {version}" for name, version in software.items())
    if versions:
        parts.append(f"Trained with {plain(visible(versions))}.")
    return "\n\n".join(parts)


def remarks(notes: Sequence[str]) -> str:
    """What else a reader has to know."""
    return "## Notes\n\n" + "\n".join(f"- {note}" for note in _told(notes)) if notes else ""


def _told(notes: Iterable[str]) -> Iterator[str]:
    """Notes of records for readers elsewhere, who have none of the places that they name."""
    return (plain(without_places(note)) for note in notes)
