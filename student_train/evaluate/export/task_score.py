"""How well a fine-tuned model's ONNX files do on the examples that the model was measured on.

What was measured is in finetuned.json, and so is where the examples came from. Other examples than those would give a
score of another set, so their hash is compared, unless the user names a file.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from student_train.evaluate.export.source import Source
from student_train.evaluate.finetune.examples import read_source, to_examples
from student_train.evaluate.finetune.inputs import Inputs, encode
from student_train.evaluate.finetune.metrics import measure, require_libraries
from student_train.evaluate.finetune.model import load_tokenizer
from student_train.evaluate.finetune.predictions import decide, name_tags
from student_train.evaluate.finetune.tasks import TASKS, Task
from student_train.evaluate.onnx.graph import OnnxSource
from student_train.evaluate.onnx.session import open_session, run_session
from student_train.evaluate.schemas import SavedSchema
from teacher_cache.errors import TaskError
from teacher_cache.models.families import quiet_transformers

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_BATCH = 16
_PADDING = -100.0


@dataclass(frozen=True, kw_only=True)
class TaskExamples:
    """Examples as the model reads them."""

    task: Task
    inputs: Inputs
    labels: Sequence[Any]
    tags: Sequence[str]
    scheme: str
    tokenizer: PreTrainedTokenizerBase

    def __len__(self) -> int:
        return len(self.labels)


def saved_task(saved: SavedSchema) -> Task:
    """The task that a model was fine-tuned on."""
    if not saved.own and saved.task in TASKS:
        return TASKS[saved.task]
    return Task(
        name=saved.task,
        kind=saved.kind,
        inputs=tuple(map(tuple, saved.columns)),
        label=tuple(saved.label_column),
        labels=tuple(saved.labels),
        metric=saved.metric,
        own=True,
    )


def read_examples(source: Source, saved: SavedSchema, file: str | None) -> TaskExamples:
    """The examples of a file, or those that the model was measured on.

    Raises:
        TaskError: they cannot be read, or are others by now.
        StudentError: the tokenizer cannot be read.
        SettingsError: the packages that measure are not installed.
    """
    require_libraries()
    task, origin = saved_task(saved), file or saved.sources.get("dev", "")
    language = saved.settings.get("language", "en")
    examples = to_examples(read_source(origin, task), task, language)
    if file is None and examples.sha256() != saved.fingerprints.get("dev"):
        raise TaskError(
            f"{origin!r} holds other examples than the model was measured on: a score on them would not be beside its "
            "own; give --dev-file those that are to be measured on"
        )
    tokenizer = load_tokenizer(source.folder, task)
    names = {int(number): name for number, name in (source.model.config.id2label or {}).items()}
    tags = [names[number] for number in sorted(names)]
    if task.kind == "tokens" and (unknown := {tag for each in examples.labels for tag in each} - set(tags)):
        raise TaskError(f"{origin!r} has tags that the model does not know ({', '.join(sorted(unknown))}): give others")
    length = int(saved.settings.get("max_length", 128))
    return TaskExamples(
        task=task,
        inputs=encode(tokenizer, examples, task, tags=tags, max_length=length),
        labels=examples.labels,
        tags=tags,
        scheme=saved.settings.get("tag_scheme", "IOB"),
        tokenizer=tokenizer,
    )


def score_files(examples: TaskExamples, source: OnnxSource, files: Mapping[str, Path]) -> dict[str, float]:
    """The task's metric of the model in PyTorch (under '') and of each file, by its name."""
    module, threads = source.module(), torch.get_num_threads()
    scores = {"": _score(examples, source, lambda inputs: _run(module, inputs))}
    for name, file in files.items():
        session = open_session(file, threads)
        scores[name] = _score(examples, source, lambda inputs, it=session: run_session(it, source.feed(inputs)))
    return scores


@torch.inference_mode()
def _run(module: nn.Module, inputs: Sequence[torch.Tensor]) -> NDArray[Any]:
    outputs: NDArray[Any] = module(*inputs).numpy()
    return outputs


def _score(examples: TaskExamples, source: OnnxSource, run: Any) -> float:
    found, features = [], examples.inputs.features
    for first in range(0, len(features), _BATCH):
        batch = [{name: each[name] for name in source.inputs if name in each} for each in features[first:][:_BATCH]]
        with quiet_transformers():
            padded = examples.tokenizer.pad(batch, return_tensors="pt")
        found.append(run([padded[name].long() for name in source.inputs]))
    outputs = found[0] if len(found) == 1 else _joined(found)
    predictions = decide(outputs, examples.inputs, examples.task)
    if examples.task.kind == "tokens":
        predictions = name_tags(predictions, examples.tags)
    return measure(examples.task, predictions, examples.labels, examples.scheme)[examples.task.metric]


def _joined(batches: Sequence[NDArray[Any]]) -> NDArray[Any]:
    """All rows, those of tokens padded to the longest."""
    if batches[0].ndim == 2:
        return np.concatenate(batches)
    longest = max(each.shape[1] for each in batches)
    return np.concatenate(
        [np.pad(each, ((0, 0), (0, longest - each.shape[1]), (0, 0)), constant_values=_PADDING) for each in batches]
    )
