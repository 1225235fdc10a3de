"""Models in Hugging Face folders, loaded quietly and with a clear account of what the folder lacked.

Transformers gives parameters that a folder lacks random values and carries on; whoever loads a model here learns which
those were. Nothing is ever fetched over a network.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoModel,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from student_train.students.vocabulary.kept_ids import KeptIds
from teacher_cache.contract.manifest import ModelKind
from teacher_cache.errors import StudentError, TeacherError
from teacher_cache.hub import why_unreadable
from teacher_cache.models.families import (
    encoder_of,
    kind_of,
    pooler_option,
    quiet_transformers,
    read_config,
    with_head,
)
from teacher_cache.models.placing import Placement, place_model
from teacher_cache.models.tokenizers import read_tokenizer

_WEIGHTS = (".safetensors", ".bin")
_TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "vocab.txt")


@dataclass(frozen=True, kw_only=True)
class LoadedModel:
    """A model in float32, and names of parameters that its folder lacked or that found no place in it."""

    model: PreTrainedModel
    missing: frozenset[str]
    unexpected: frozenset[str]

    @property
    def has_trained_head(self) -> bool:
        """Whether there is a language-modelling head around the base model and its weights came from the folder."""
        return encoder_of(self.model) is not self.model and not self.missing


def has_weights(folder: Path) -> bool:
    """Whether there are weights in a model folder; none are in that of a teacher whose targets were imported."""
    return any(path.suffix in _WEIGHTS for path in folder.iterdir())


def load_config(folder: Path) -> PreTrainedConfig:
    """The configuration in a model folder.

    Raises:
        StudentError: there is none that can be read.
    """
    try:
        return read_config(folder, local_files_only=True)
    except Exception as error:
        # the file is anybody's: a field of a wrong type is stumbled over wherever it is first used
        raise _unreadable(folder, error) from error


def load_model(folder: Path, *, with_mlm_head: bool, placement: Placement | None = None) -> LoadedModel:
    """The model in `folder` as a masked or causal LM or as base model, without a pooler where the family allows.

    It lies on the CPU, or is spread over devices as `placement` says.

    Raises:
        StudentError: it cannot be loaded, or weights of its base model are missing.
        TeacherError: it cannot be spread.
    """
    if placement is not None:
        placement.refuse_unplaceable(str(folder))
    config = load_config(folder)
    loader, options = (_class_with_head(folder, config), {}) if with_mlm_head else (AutoModel, pooler_option(config))
    read = partial(
        loader.from_pretrained,
        folder,
        config=config,
        dtype=torch.float32,
        local_files_only=True,
        trust_remote_code=False,
        output_loading_info=True,
        **options,
    )
    try:
        with quiet_transformers():
            model, report = read() if placement is None else place_model(str(folder), read, placement)
    except TeacherError:
        raise
    except Exception as error:
        # as with the configuration: what is wrong with a file shows in many ways
        raise _unreadable(folder, error) from error
    missing = frozenset(name for name in report["missing_keys"] if "pooler." not in name)
    encoder = {name for name in missing if not with_mlm_head or name.startswith(model.base_model_prefix + ".")}
    if encoder:
        raise StudentError(
            f"{str(folder)!r} lacks {len(encoder)} weights of its base model, {min(encoder)!r} among them: random "
            "numbers would stand in their place; give the folder of a complete model"
        )
    return LoadedModel(model=model, missing=missing, unexpected=frozenset(report["unexpected_keys"]))


def check_family(folder: Path) -> ModelKind:
    """Refuse a model that is neither a masked nor a causal LM; which of them it is.

    Raises:
        StudentError: it is not, or its configuration cannot be read.
    """
    config = load_config(folder)
    try:
        return kind_of(config)
    except ValueError as error:
        raise StudentError(
            f"model {str(folder)!r} is of family {config.model_type!r}, {error}: no other kind than masked and causal "
            "LMs can be trained or measured here; choose a family such as BERT, RoBERTa, XLM-R, ModernBERT, Llama, "
            "Qwen, Gemma or GPT-2"
        ) from None


def _class_with_head(folder: Path, config: PreTrainedConfig) -> Any:
    check_family(folder)
    return with_head(config)


def causal(config: PreTrainedConfig) -> bool:
    """Whether the model predicts next tokens."""
    try:
        return kind_of(config) == "causal-lm"
    except ValueError:
        return False


def has_task_head(config: PreTrainedConfig) -> bool:
    """Whether the model ends in a head of a task, as fine-tuned ones do, and in none over the vocabulary."""
    return any(name.endswith(("Classification", "Choice", "Answering")) for name in config.architectures or ())


def head_name(config: PreTrainedConfig) -> str:
    """What the head over the vocabulary is called, of a model of this configuration."""
    return "language-modelling head" if causal(config) else "masked-LM head"


def vocabulary_difference(folder: Path, teacher_folder: Path, kept: KeptIds | None = None) -> str | None:
    """In what the token ids of the model in `folder` mean something else than the teacher's, or None.

    Causal models have their vocabularies padded, each to a size of its own, beyond the tokens that there are: of those
    the tokens are compared, and both sizes have to hold all of them. A folder with weights alone says nothing about the
    meaning of its ids: then their number has to do. Of a student that has `kept` ids alone, these are compared.

    Raises:
        StudentError: a configuration or a tokenizer cannot be read.
    """
    config, teacher_config = load_config(folder), load_config(teacher_folder)
    entries, teacher_entries = (getattr(each, "vocab_size", None) for each in (config, teacher_config))
    if kept is not None:
        if entries != len(kept) or teacher_entries != kept.teacher_entries:
            return (
                f"{entries} vocabulary entries, its record {len(kept)} of {kept.teacher_entries}, the teacher "
                f"{teacher_entries}"
            )
        teacher_entries = entries
    has_tokens = any((folder / name).exists() for name in _TOKENIZER_FILES)
    padded = has_tokens and causal(config) and causal(teacher_config)
    if entries != teacher_entries and not padded:
        return f"{entries} vocabulary entries, the teacher {teacher_entries}"
    if not has_tokens:
        return None
    ours, theirs = _load_vocabulary(folder), _load_vocabulary(teacher_folder)
    if kept is not None:
        theirs = {token: own for token, old in theirs.items() if (own := kept.own(old)) is not None}
    differing = {token for token, _ in ours.items() ^ theirs.items()}
    if differing:
        return f"other ids for {len(differing)} tokens such as {min(differing)!r}"
    last = max(ours.values(), default=-1)
    if entries != teacher_entries and last >= min(config.vocab_size, teacher_config.vocab_size):
        return f"{entries} vocabulary entries, the teacher {teacher_entries}, for ids up to {last}"
    return None


def load_teacher_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    """The tokenizer in the teacher's folder inside a cache.

    Raises:
        StudentError: it cannot be read.
    """
    try:
        with quiet_transformers():
            tokenizer: PreTrainedTokenizerBase = read_tokenizer(folder, local_files_only=True)
    except Exception as error:
        # the tokenizers library raises nothing more special
        raise StudentError(
            f"the tokenizer of the cache's teacher cannot be read ({type(error).__name__}: {why_unreadable(error)}): "
            "token ids are no words without it, and a student would be exported without one; where a newer version "
            "wrote it, install that version of tokenizers and transformers, else get the store from whoever built it, "
            "or build it again"
        ) from error
    return tokenizer


def _load_vocabulary(folder: Path) -> Mapping[str, int]:
    try:
        with quiet_transformers():
            tokenizer = read_tokenizer(folder, load_config(folder), local_files_only=True)
        vocabulary: Mapping[str, int] = tokenizer.get_vocab()
    except Exception as error:
        # the tokenizers library raises nothing more special
        raise StudentError(
            f"the tokenizer in {str(folder)!r} cannot be read ({type(error).__name__}: {error}): whether its token ids "
            "mean what the teacher's mean cannot be told; restore its files, or delete all of them to go by the number "
            "of ids alone"
        ) from error
    return vocabulary


def _unreadable(folder: Path, error: Exception) -> StudentError:
    return StudentError(
        f"{str(folder)!r} is no Hugging Face model folder that can be read ({why_unreadable(error)}): there is no "
        "model to take; give a folder with config.json and model.safetensors"
    )


def place_for(model: PreTrainedModel, device: torch.device) -> torch.device:
    """Where to run a teacher beside a student that is made: `device`, or the CPU where its weights have no room there.

    Nothing else of a training needs the teacher's weights, which may be larger than the GPU that the student is for.
    """
    if device.type != "cuda":
        return device
    weights = sum(weight.numel() * weight.element_size() for weight in model.parameters())
    free, _ = torch.cuda.mem_get_info(device)
    return device if 2 * weights < free else torch.device("cpu")
