"""A student's encoder with a fresh head for one task, and its tokenizer, from any Hugging Face directory.

The encoder's weights must all be there; the head is drawn anew from the seed, also where the directory holds one of an
earlier fine-tuning. Parts beside the encoder that a family's own classes share (BERT's pooler, ModernBERT's prediction
head) are loaded as Transformers loads them: from the directory, if it has them.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import (
    MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING,
    MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING,
    AutoModel,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    set_seed,
)

from student_train.evaluate.finetune.tasks import Task
from student_train.students.pretrained import causal, check_family, has_task_head, load_config
from teacher_cache.errors import StudentError
from teacher_cache.models.families import encoder_of, position_limit, quiet_transformers, read_config
from teacher_cache.models.tokenizers import largest_needed_id, read_tokenizer

_HEADS = {
    "classification": (AutoModelForSequenceClassification, MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING),
    "regression": (AutoModelForSequenceClassification, MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING),
    "tokens": (AutoModelForTokenClassification, MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING),
}
_PROBLEMS = {"classification": "single_label_classification", "regression": "regression"}


def check_student(folder: Path, task: Task) -> int | None:
    """Refuse a directory that cannot be fine-tuned on the task, before anything is read; how many positions it reads.

    Raises:
        StudentError: there is no complete encoder, or its family has no class for the task.
    """
    if not folder.is_dir():
        raise StudentError(
            f"there is no student directory {str(folder)!r}: nothing can be fine-tuned; give --student the directory "
            "that kdtrain wrote (its --out) or any Hugging Face encoder directory"
        )
    check_family(folder)
    config = load_config(folder)
    if type(config) not in _HEADS[task.kind][1]:
        raise StudentError(
            f"student {str(folder)!r} is of family {config.model_type!r}, for which Transformers has no class for "
            f"{'token' if task.kind == 'tokens' else 'sequence'} classification: task {task.name!r} cannot be measured "
            "on it; choose another task, or a student of another family"
        )
    with torch.device("meta"):  # its shape is enough
        return position_limit(AutoModel.from_config(config))


def load_tokenizer(folder: Path, task: Task) -> PreTrainedTokenizerBase:
    """The tokenizer in a student's directory.

    Raises:
        StudentError: there is none, it names ids that the model does not have, or it cannot do what the task needs.
    """
    try:
        with quiet_transformers():
            tokenizer: PreTrainedTokenizerBase = read_tokenizer(folder, load_config(folder), local_files_only=True)
    except Exception as error:
        # the tokenizers library raises nothing more special
        raise _no_tokenizer(folder, f"it cannot be read ({type(error).__name__}: {error})") from error
    if len(tokenizer.get_vocab()) <= len(tokenizer.all_special_tokens):
        # Transformers makes up an empty tokenizer where the files are missing: every word would be unknown
        raise _no_tokenizer(folder, "it knows no words, as where its files are missing")
    if tokenizer.pad_token_id is None and causal(load_config(folder)):
        # decoders are trained without padding; what stands behind the last token is not seen by it
        tokenizer.pad_token = tokenizer.eos_token
    if tokenizer.pad_token_id is None:
        raise _no_tokenizer(folder, "it has no padding token, so that examples cannot be joined to batches")
    if task.kind == "tokens" and not tokenizer.is_fast:
        raise _no_tokenizer(folder, "it is written in Python and does not say which token belongs to which word")
    config = load_config(folder)
    entries, largest = config.vocab_size, largest_needed_id(tokenizer, causal=causal(config))
    if largest >= entries:
        raise _no_tokenizer(folder, f"its ids go up to {largest}, the model has {entries} vocabulary entries")
    return tokenizer


def _no_tokenizer(folder: Path, why: str) -> StudentError:
    return StudentError(
        f"the tokenizer in {str(folder)!r} cannot be used: {why}; copy the tokenizer files of the model that the "
        "student comes from (tokenizer.json, tokenizer_config.json, ...) into the directory"
    )


def load_for_task(
    folder: Path, task: Task, labels: Sequence[str], seed: int, *, pad_id: int | None = None
) -> PreTrainedModel:
    """The encoder in float32 with a head for `labels` (one output for a regression), drawn from the seed.

    Seeds every random generator: of Python, NumPy and PyTorch. The head of a decoder reads the last token that is not
    `pad_id`; its configuration may name no id or another than its tokenizer pads with.

    Raises:
        StudentError: the model cannot be loaded whole.
    """
    names = list(labels) or ["score"]
    loader: Any = _HEADS[task.kind][0]
    set_seed(seed)
    try:
        with quiet_transformers():
            config = read_config(
                folder,
                local_files_only=True,
                num_labels=len(names),
                id2label=dict(enumerate(names)),
                label2id={name: number for number, name in enumerate(names)},
                problem_type=_PROBLEMS.get(task.kind),
            )
            model: PreTrainedModel
            model, report = loader.from_pretrained(
                folder,
                config=config,
                dtype=torch.float32,
                local_files_only=True,
                trust_remote_code=False,
                ignore_mismatched_sizes=True,
                output_loading_info=True,
            )
            if has_task_head(config):
                _copy_head(loader.from_config(config), model)
    except Exception as error:
        # the files are anybody's: what is wrong with them shows in many ways
        raise StudentError(
            f"{str(folder)!r} cannot be loaded with a head for task {task.name!r} ({error}): there is no model to "
            "fine-tune; give a folder with config.json and model.safetensors"
        ) from error
    _check_complete(folder, model, {*report["missing_keys"], *(name for name, *_ in report["mismatched_keys"])})
    if pad_id is not None and causal(model.config):
        model.config.pad_token_id = pad_id
    return model


def _copy_head(source: PreTrainedModel, target: PreTrainedModel) -> None:
    """Everything outside the encoder."""
    fresh, prefix = source.state_dict(), f"{target.base_model_prefix}."
    head = {name: value for name, value in fresh.items() if not name.startswith(prefix)}
    target.load_state_dict(head, strict=False)


def _check_complete(folder: Path, model: PreTrainedModel, missing: set[str]) -> None:
    prefix = f"{model.base_model_prefix}." if encoder_of(model) is not model else ""
    encoder = sorted(name for name in missing if name.startswith(prefix) and "pooler." not in name)
    if encoder:
        raise StudentError(
            f"{str(folder)!r} lacks {len(encoder)} weights of its encoder, {encoder[0]!r} among them: random numbers "
            "would stand in their place; give the folder of a complete model"
        )
