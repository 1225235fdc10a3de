"""One fine-tuning run through the Hugging Face Trainer: a model with a fresh head, examples in, predictions out.

AdamW, linear warm-up and decay, no checkpoints, no reports to tracking services. The model after the last step makes
the predictions. One GPU is used even where there are more: the number of examples per update must not depend on the
machine.
"""

from __future__ import annotations

import os
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, redirect_stdout
from typing import Any

import numpy as np
from transformers import (
    DataCollatorForTokenClassification,
    DataCollatorWithPadding,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PrinterCallback,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)

from student_train.evaluate.finetune.inputs import Inputs
from student_train.evaluate.finetune.predictions import decide
from student_train.evaluate.finetune.settings import FinetuneSettings
from student_train.evaluate.finetune.tasks import Task
from teacher_cache.errors import StudentError
from teacher_cache.models.families import quiet_transformers

RECIPE = {"recipe": 1, "warmup": 0.1, "weight_decay": 0.01}
"""What is the same for all runs. The number of the recipe goes up when the same settings come to train differently, so
that results kept from before are not taken for new ones."""
Advance = Callable[[int, int], None]


class _Progress(TrainerCallback):
    def __init__(self, advance: Advance) -> None:
        self.advance = advance

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.advance(state.global_step, state.max_steps)


def train_and_predict(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    train: Inputs,
    measured: Mapping[str, Inputs],
    task: Task,
    settings: FinetuneSettings,
    *,
    learning_rate: float,
    seed: int,
    device: str,
    advance: Advance,
) -> dict[str, list[Any]]:
    """Train `model` in place, then predict every set of `measured`: class numbers, scores, or class numbers by word.

    Raises:
        StudentError: its outputs are not finite numbers.
    """
    collator = DataCollatorForTokenClassification if task.kind == "tokens" else DataCollatorWithPadding
    with tempfile.TemporaryDirectory() as scratch, quiet_transformers(), _clean_standard_output(device):
        trainer = Trainer(
            model=model,
            args=_arguments(scratch, settings, learning_rate, seed, device),
            data_collator=collator(tokenizer),
            train_dataset=_readable(train, model),
            callbacks=[_Progress(advance)],
        )
        trainer.remove_callback(PrinterCallback)
        trainer.train()
        outputs = {name: trainer.predict(_readable(each, model)).predictions for name, each in measured.items()}
    return {name: _decide(output, measured[name], task, learning_rate) for name, output in outputs.items()}


@contextmanager
def _clean_standard_output(device: str) -> Iterator[None]:
    """Standard output is for results: what libraries print goes to standard error."""
    # Accelerate imports DeepSpeed wherever it is installed, which warns about having to choose a device
    os.environ.setdefault("DS_ACCELERATOR", device)
    with redirect_stdout(sys.stderr):
        yield


def _arguments(
    scratch: str, settings: FinetuneSettings, learning_rate: float, seed: int, device: str
) -> TrainingArguments:
    arguments = TrainingArguments(
        output_dir=scratch,
        num_train_epochs=settings.epochs,
        per_device_train_batch_size=settings.batch_size,
        per_device_eval_batch_size=settings.batch_size,
        learning_rate=learning_rate,
        lr_scheduler_type="linear",
        warmup_steps=RECIPE["warmup"],
        weight_decay=RECIPE["weight_decay"],
        bf16=settings.precision == "bfloat16",
        seed=seed,
        use_cpu=device == "cpu",
        dataloader_pin_memory=device != "cpu",
        save_strategy="no",
        eval_strategy="no",
        logging_strategy="no",
        report_to="none",
        disable_tqdm=True,
    )
    if arguments.n_gpu > 1:
        arguments._n_gpu = 1
    return arguments


def _readable(inputs: Inputs, model: PreTrainedModel) -> Any:
    """The features without segment numbers that the model has no embedding for."""
    if getattr(model.config, "type_vocab_size", 0) >= 2:
        return list(inputs.features)
    return [{name: value for name, value in each.items() if name != "token_type_ids"} for each in inputs.features]


def _decide(output: Any, inputs: Inputs, task: Task, learning_rate: float) -> list[Any]:
    values = np.asarray(output[0] if isinstance(output, tuple) else output, np.float32)
    # batches are padded to one length with -100, which is a finite number too
    if not np.isfinite(values).all():
        raise StudentError(
            f"after fine-tuning with --lr {learning_rate!r} the model's outputs are NaN or infinite, so there is "
            "nothing to measure: its weights were not finite, or training diverged; give a lower --lr, or check the "
            "student with kdeval fidelity"
        )
    return decide(values, inputs, task)
