"""A causal language model that is measured, student or teacher: found, loaded whole, with its tokenizer if need be.

In: a folder, or for a teacher a name on the hub, of which configuration, weights and tokenizer are fetched. Out: the
model in float32 on the CPU in evaluation mode. A masked language model is refused with what measures it instead.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import snapshot_download
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from student_train.evaluate.load import WEIGHTS, weight_files, weights_fingerprint
from student_train.students.pretrained import causal, check_family, has_task_head, load_config, load_model
from teacher_cache.errors import StudentError, first_line
from teacher_cache.hub import HUB_ERRORS
from teacher_cache.models.families import position_limit, quiet_transformers
from teacher_cache.models.tokenizers import read_tokenizer

_TOKENIZERS = (
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.*",
    "merges.txt",
    "*.model",
    "*.jinja",
)


@dataclass(frozen=True, kw_only=True)
class CausalModel:
    """A causal LM with its head. `name` is how the user called it, `role` is student or teacher."""

    role: str
    name: str
    folder: Path
    model: PreTrainedModel

    @property
    def config(self) -> PreTrainedConfig:
        """Of the model."""
        return self.model.config

    @property
    def positions(self) -> int | None:
        """How many tokens it can read, None if nothing limits it."""
        return position_limit(self.model)

    @property
    def fingerprint(self) -> str:
        """SHA-256 of its weight files."""
        return weights_fingerprint(self.folder)

    def tokenizer(self) -> Any:
        """The tokenizer in its folder.

        Raises:
            StudentError: there is none that can be read.
        """
        try:
            with quiet_transformers():
                return read_tokenizer(self.folder, self.config, local_files_only=True)
        except Exception as error:
            # the tokenizers library raises nothing more special
            raise StudentError(
                f"the tokenizer of {self.role} {self.name!r} cannot be read ({type(error).__name__}: "
                f"{first_line(error)}): without it no text can be given to the model; put the tokenizer that it was "
                "trained with into its folder"
            ) from error


def model_folder(name: str, role: str, *, tokenizer: bool = False) -> Path:
    """The folder `name`; for a teacher also that of a model on the hub, with its tokenizer if that is asked for.

    Raises:
        StudentError: there is no such folder or name, or it has no weights.
    """
    folder = Path(name).expanduser()
    return folder if folder.is_dir() else _fetch(name, role, _TOKENIZERS if tokenizer else ())


def is_causal(folder: Path) -> bool:
    """Whether the model in `folder` predicts next tokens. What was fine-tuned for a task does not, whatever its family.

    Raises:
        StudentError: there is no configuration that can be read.
    """
    config = load_config(folder)
    return causal(config) and not has_task_head(config)


def load_causal(name: str, role: str, *, instead: str, tokenizer: bool = False) -> CausalModel:
    """The causal LM in the folder `name`; a teacher may also be a name on the hub.

    Args:
        instead: what to do with a model of another kind, for the error.
        tokenizer: whether the tokenizer is fetched too.

    Raises:
        StudentError: there is no such folder or name, the model is no causal LM, or it cannot be loaded whole.
    """
    folder = model_folder(name, role, tokenizer=tokenizer)
    kind, config = check_family(folder), load_config(folder)
    if kind != "causal-lm":
        raise StudentError(
            f"{role} {name!r} of family {config.model_type!r} is a masked language model, which has no probability of "
            f"a next token: {instead}"
        )
    if has_task_head(config):
        # where embeddings are tied, the head over the vocabulary would be made of them without a word
        raise StudentError(
            f"{role} {name!r} is a {(config.architectures or [''])[0]}, fine-tuned for a task, and predicts no next "
            f"tokens any more: {instead}"
        )
    loaded = load_model(folder, with_mlm_head=True)
    if loaded.missing:
        raise StudentError(
            f"{role} {name!r} lacks {len(loaded.missing)} weights of its head, {min(loaded.missing)!r} among them: "
            "random numbers would stand in their place; give the folder of a complete causal language model"
        )
    model = loaded.model
    nn.Module.requires_grad_(model, False)
    nn.Module.eval(model)
    return CausalModel(role=role, name=name, folder=folder, model=model)


def _fetch(name: str, role: str, further: tuple[str, ...]) -> Path:
    if role != "teacher":
        raise StudentError(
            f"there is no student directory {name!r}: nothing can be measured; give --student the directory that "
            "kdtrain wrote (its --out) or any Hugging Face model directory"
        )
    try:
        for pattern in WEIGHTS:
            wanted = ["config.json", pattern, f"{pattern}.index.json", *further]
            folder = Path(snapshot_download(name, allow_patterns=wanted, ignore_patterns="*/*"))
            if weight_files(folder):
                return folder
    except HUB_ERRORS as error:
        raise StudentError(
            f"teacher {name!r} is no folder and cannot be had from the hub ({first_line(error)}): there is nothing to "
            "compare with; check the name, or leave --teacher out"
        ) from error
    raise StudentError(f"teacher {name!r} has no weights that PyTorch reads on the hub: give another name or a folder")
