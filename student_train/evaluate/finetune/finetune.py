"""Fine-tune a student on a task with several seeds, and measure it there.

In: a Hugging Face encoder directory, settings, examples from local files or the hub. Out: a `FinetuneReport`. Every
seed draws a fresh head, the order of the examples and dropout; with several learning rates each seed is trained with
each, and the one that is best on the dev set counts, ties going to the one named first. Cost: one training per seed and
learning rate, unless an earlier run has kept its result. Of the trained models the best is kept where `--save` asks for
it, and trained again where its result is from an earlier run.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from student_train.evaluate.finetune.data import TaskData, read_data
from student_train.evaluate.finetune.hf_trainer import RECIPE, train_and_predict
from student_train.evaluate.finetune.inputs import Inputs, encode
from student_train.evaluate.finetune.metrics import measure, require_libraries
from student_train.evaluate.finetune.model import check_student, load_for_task, load_tokenizer
from student_train.evaluate.finetune.predictions import name_tags
from student_train.evaluate.finetune.records import FinetuneReport, ResultCache, SeedResult, identify
from student_train.evaluate.finetune.save import BestModel, save_model
from student_train.evaluate.finetune.settings import FinetuneSettings
from student_train.evaluate.load import weights_fingerprint
from student_train.evaluate.new_folder import check_new_folder
from student_train.students.vocabulary.kept_ids import KeptIds, read_kept_ids
from teacher_cache.errors import SettingsError

CACHE_FOLDER = ".finetune-cache"
RESULT = ("measures", "cut", "constant")
"""What is kept of a run."""
Show = Callable[[str, int, int], None]


def measure_finetune(settings: FinetuneSettings, *, device: str, show: Show) -> FinetuneReport:
    """Fine-tune and measure the student that the settings name.

    Args:
        settings: what to do.
        device: `cpu` or `cuda`.
        show: called after each step with what is being trained, the step and how many there are.

    Raises:
        SettingsError: a library is missing, the precision cannot be had on the device, or the model cannot be saved.
        StudentError: the student cannot be loaded, or its outputs are not finite.
        TaskError: the examples cannot be read, or are none of the task.
    """
    require_libraries()
    if settings.precision == "bfloat16" and device == "cpu":
        raise SettingsError("--precision 'bfloat16' needs a GPU, and this runs on the CPU: leave it out")
    task, folder = settings.chosen_task(), Path(settings.student).expanduser()
    if (out := settings.saved_to()) is not None:
        check_new_folder("--save", out, folder)
    positions = check_student(folder, task)
    student = _Student(
        folder=folder,
        tokenizer=load_tokenizer(folder, task),
        max_length=min(settings.max_length, positions or settings.max_length),
        kept_ids=None if out is None else read_kept_ids(folder),
    )
    runs = _Runs(settings=settings, student=student, data=read_data(settings), device=device, show=show)
    results = [runs.best(seed) for seed in range(settings.seeds)]
    if out is not None:
        runs.save(out, max(results, key=runs.score))
    return FinetuneReport(
        student=str(folder),
        task=task.name,
        metric=task.metric,
        seeds=tuple(results),
        tests=tuple(name for name in runs.data.measured if name != "dev"),
        examples={name: len(examples) for name, examples in runs.data.all().items()},
        settings={**runs.recipe, "train_rows": settings.train_rows, "learning_rates": list(settings.learning_rates())},
        fingerprint=identify(runs.identity),
        sources=runs.data.sources(),
        fingerprints=runs.fingerprints,
        notes=tuple(_notes(runs, results)),
    )


@dataclass(frozen=True, kw_only=True)
class _Student:
    folder: Path
    tokenizer: PreTrainedTokenizerBase
    max_length: int
    kept_ids: KeptIds | None

    def fingerprints(self) -> dict[str, str]:
        """Of all in the directory that decides a result: of the tokenizer what it does, not how its files are named."""
        backend = getattr(self.tokenizer, "backend_tokenizer", None)
        does = sorted(self.tokenizer.get_vocab().items()) if backend is None else backend.to_str()
        return {
            "weights": weights_fingerprint(self.folder),
            "config": hashlib.sha256((self.folder / "config.json").read_bytes()).hexdigest(),
            "tokenizer": identify({"does": does, "inputs": self.tokenizer.model_input_names}),
        }


@dataclass(frozen=True, kw_only=True)
class _Runs:
    """The runs of one student on one task. Nothing is tokenised or loaded where their results are kept from before."""

    settings: FinetuneSettings
    student: _Student
    data: TaskData
    device: str
    show: Show
    kept: BestModel = field(default_factory=BestModel)

    @cached_property
    def recipe(self) -> dict[str, Any]:
        return {
            **RECIPE,
            "epochs": self.settings.epochs,
            "batch_size": self.settings.batch_size,
            "max_length": self.student.max_length,
            "precision": self.settings.precision,
            "device": self.device,
            **({} if self.data.scheme is None else {"tag_scheme": self.data.scheme}),
        }

    @cached_property
    def fingerprints(self) -> dict[str, str]:
        examples = {name: each.sha256() for name, each in self.data.all().items()}
        return {**self.student.fingerprints(), **examples}

    @cached_property
    def identity(self) -> dict[str, Any]:
        task = self.data.task
        # as JSON gives it back
        columns = [list(each) for each in (*task.inputs, task.label)]
        meant = {"definition": [task.kind, task.metric, columns, list(task.labels)]} if task.own else {}
        return {"task": task.name, **meant, "settings": self.recipe, "fingerprints": self.fingerprints}

    @cached_property
    def cache(self) -> ResultCache:
        folder = self.settings.cache_dir
        return ResultCache(
            self.student.folder / CACHE_FOLDER if folder is None else Path(folder).expanduser(), names=RESULT
        )

    @cached_property
    def inputs(self) -> dict[str, Inputs]:
        labels, length = self.data.labels(), self.student.max_length
        return {
            name: encode(self.student.tokenizer, examples, self.data.task, tags=labels, max_length=length)
            for name, examples in self.data.all().items()
        }

    def best(self, seed: int) -> SeedResult:
        """The seed at its best learning rate."""
        return max((self._one(seed, rate) for rate in self.settings.learning_rates()), key=self.score)

    def score(self, result: SeedResult) -> float:
        """What decides which result is better."""
        return result.measures["dev"][self.data.task.metric]

    def save(self, out: Path, result: SeedResult) -> None:
        """Keep the model of a result, which is trained again if it is not at hand."""
        of = result.seed, result.learning_rate
        if self.kept.of != of:
            self.kept.model, self.kept.score = None, float("-inf")
            self._train(*of)
        assert self.kept.model is not None
        facts = {
            "examples": {name: len(examples) for name, examples in self.data.all().items()},
            "sources": self.data.sources(),
            "settings": {**self.recipe, "language": self.settings.language},
            "fingerprints": self.fingerprints,
            "notes": [*_notes(self, [result]), *self._chosen()],
        }
        save_model(
            out,
            self.kept.model,
            self.student.tokenizer,
            student=self.student.folder,
            task=self.data.task,
            result=result,
            kept_ids=self.student.kept_ids,
            facts=facts,
        )

    def _chosen(self) -> list[str]:
        """What the choice of the model that is kept makes of its scores."""
        if self.settings.seeds == 1:
            return []
        return [f"it is the best on dev of {self.settings.seeds} seeds: its score there is a little high"]

    def _one(self, seed: int, learning_rate: float) -> SeedResult:
        key = {**self.identity, "seed": seed, "learning_rate": learning_rate}
        kept = self.cache.find(key)
        result = kept or self._train(seed, learning_rate)
        if kept is None:
            self.cache.keep(key, result)
        return SeedResult(seed=seed, learning_rate=learning_rate, **result)

    def _train(self, seed: int, learning_rate: float) -> dict[str, Any]:
        task, labels = self.data.task, self.data.labels()
        what = f"{task.name}, seed {seed}, lr {learning_rate:g}"
        model = load_for_task(self.student.folder, task, labels, seed, pad_id=self.student.tokenizer.pad_token_id)
        predictions = train_and_predict(
            model,
            self.student.tokenizer,
            self.inputs["train"],
            {name: self.inputs[name] for name in self.data.measured},
            task,
            self.settings,
            learning_rate=learning_rate,
            seed=seed,
            device=self.device,
            advance=lambda step, steps: self.show(what, step, steps),
        )
        found = {name: name_tags(each, labels) if task.kind == "tokens" else each for name, each in predictions.items()}
        scheme = self.data.scheme or "IOB"
        measures = {
            name: measure(task, found[name], examples.labels, scheme) for name, examples in self.data.measured.items()
        }
        if self.settings.save is not None:
            self.kept.offer(model, (seed, learning_rate), measures["dev"][task.metric])
        return {
            "measures": measures,
            "cut": {name: inputs.cut for name, inputs in self.inputs.items()},
            "constant": [name for name, each in found.items() if _is_constant(each)],
        }


def _is_constant(predictions: Sequence[Any]) -> bool:
    """Whether all examples, or all words of them, got one and the same prediction."""
    if isinstance(predictions[0], list):
        predictions = [tag for tags in predictions for tag in tags]
    return len(predictions) > 1 and len(set(predictions)) == 1


def _notes(runs: _Runs, results: Sequence[SeedResult]) -> list[str]:
    """What a reader of the figures should know."""
    data, limit, found = runs.data, runs.student.max_length, []
    if limit < runs.settings.max_length:
        found.append(f"the student reads at most {limit} positions: longer examples were cut there")
    cut: Mapping[str, int] = results[0].cut
    found += [
        f"{cut[name]:,} of the {len(examples):,} examples of {name} are longer than {limit} tokens and were cut"
        for name, examples in data.all().items()
        if cut[name]
    ]
    stuck = [str(result.seed) for result in results if result.constant]
    if stuck:
        found.append(
            f"of seed {', '.join(stuck)}, all examples got the same prediction: nothing was learned, and the score "
            "says nothing about the student; try more --epochs, or other values of --lr"
        )
    if len(runs.settings.learning_rates()) > 1 and len(data.measured) == 1:
        found.append("the learning rate was chosen on the examples that are reported: the score is a little high")
    if data.unlearnable():
        found.append(f"entities that training has no example of count as missed: {', '.join(data.unlearnable())}")
    return found
