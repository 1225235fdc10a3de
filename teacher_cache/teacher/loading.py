"""Which models can teach: reading a configuration, and refusing by name what lacks weights, a head or a tokenizer.

Transformers fills a missing head with random numbers and warns at most; targets made from those would train nothing.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from teacher_cache.contract.manifest import ModelKind
from teacher_cache.errors import TeacherError
from teacher_cache.hub import why_unreadable
from teacher_cache.models.families import kind_of, read_config, with_head
from teacher_cache.models.tokenizers import largest_needed_id, read_tokenizer
from teacher_cache.teacher.gguf import (
    cannot_unpack,
    files_in,
    forget_packing,
    is_gguf,
    locate,
    refuse_unread_scaling,
    unpacking,
)


def load_teacher_config(name: str, revision: str | None) -> PreTrainedConfig:
    """The configuration of a teacher by hub id, folder or GGUF file.

    Raises:
        TeacherError: there is none, or it cannot be read.
    """
    source, options = locate(name)
    try:
        return read_config(source, revision=revision, **options)
    except Exception as error:
        # the file is anybody's: a field of a wrong type is stumbled over wherever it is first used
        raise cannot_load(name, error) from error


def load_tokenizer(name: str, config: PreTrainedConfig, revision: str | None) -> Any:
    """The tokenizer of a teacher by hub id, folder or GGUF file.

    Raises:
        TeacherError: it cannot be read, by this version or without a package that is not there.
    """
    source, options = locate(name)
    try:
        return read_tokenizer(source, config, revision=revision, **options)
    except Exception as error:
        # the tokenizers library raises nothing more special
        raise TeacherError(
            f"the tokenizer of teacher {name!r} cannot be read ({type(error).__name__}: {why_unreadable(error)}): text "
            "cannot become token ids without it; where a newer version wrote it, install that version of tokenizers "
            "and transformers; where a package is missing, install it; else give a folder with a tokenizer.json that "
            "`AutoTokenizer.from_pretrained` reads"
        ) from error


def load_model(name: str, config: PreTrainedConfig, revision: str | None) -> tuple[PreTrainedModel, Iterable[str]]:
    """The model with its head, in the arithmetic of its checkpoint, and the weights that this lacks.

    Raises:
        TeacherError: it cannot be read.
    """
    if is_gguf(name):
        refuse_unread_scaling(name, config, revision)
    try:
        model, missing = read_weights(name, config, revision, dtype="auto", **unpacking(name))
    except Exception as error:
        # as with its configuration: what is wrong with a file shows in many ways
        raise cannot_load(name, error) from error
    if is_gguf(name):
        forget_packing(model)
    return model, missing


def read_weights(
    name: str, config: PreTrainedConfig, revision: str | None, **options: Any
) -> tuple[PreTrainedModel, Iterable[str]]:
    """What Transformers makes of a checkpoint, with these options of `from_pretrained`, and the weights that it lacks.

    Raises whatever Transformers does.
    """
    source, located = locate(name)
    model, info = with_head(config).from_pretrained(
        source,
        config=config,
        revision=revision,
        output_loading_info=True,
        trust_remote_code=False,
        **located,
        **options,
    )
    return model, info["missing_keys"]


def cannot_load(name: str, error: Exception) -> TeacherError:
    """What to tell of a teacher that Transformers or the hub could not give."""
    if is_gguf(name):
        return cannot_unpack(name, error)
    if inside := files_in(name):
        return TeacherError(
            f"teacher {name!r} is a folder of GGUF files and no Hugging Face model: which of them is to teach is not "
            f"said; give one, such as --teacher {inside[0]}"
        )
    kind = "it is there, but not a readable model" if name and Path(name).exists() else "no hub id and no folder"
    return TeacherError(
        f"teacher {name!r} cannot be loaded ({kind}): {why_unreadable(error)}\nThere is nothing to distil from without "
        "it; check the spelling and the network, or give the folder of a downloaded model (config.json, "
        "model.safetensors, tokenizer)"
    )


def teacher_kind(name: str, config: PreTrainedConfig) -> ModelKind:
    """Which kind of model a teacher is.

    Raises:
        TeacherError: neither a masked nor a causal LM.
    """
    try:
        return kind_of(config)
    except ValueError as error:
        raise TeacherError(
            f"teacher {name!r} is of family {config.model_type!r}, {error}: only masked LMs (BERT, RoBERTa, XLM-R, "
            "DistilBERT, ELECTRA, ModernBERT, ...) and causal LMs (Llama, Qwen, Mistral, Gemma, GPT-2, ...) can be "
            "distilled here; use one of those"
        ) from None


def check_loaded(name: str, model: PreTrainedModel, missing: Iterable[str]) -> bool:
    """Whether the checkpoint brought its head; refuses one that lacks part of the base model."""
    prefix = f"{model.base_model_prefix}."
    encoder_keys = {f"{prefix}{key}" for key in model.base_model.state_dict()}
    missing_in_encoder = sorted(set(missing) & encoder_keys)
    if missing_in_encoder:
        raise TeacherError(
            f"the checkpoint of teacher {name!r} lacks {len(missing_in_encoder)} weights of the base model (first: "
            f"{missing_in_encoder[0]!r}): they would be random numbers; give a complete checkpoint of this architecture"
        )
    return not set(missing)


def check_tokenizer(name: str, tokenizer: Any, config: PreTrainedConfig, kind: ModelKind) -> None:
    """Check that every needed token of the tokenizer has a row of the embeddings, and that rows can be padded.

    Rows of a causal teacher need no padding token: nothing before it looks at what follows the last token.

    Raises:
        TeacherError: one has none, or they cannot.
    """
    ids = set(tokenizer.get_vocab().values())
    if ids <= set(tokenizer.all_special_ids):
        raise TeacherError(
            f"teacher {name!r} comes without a usable tokenizer (it knows {len(ids)} special tokens and no others): "
            "every word would be read as unknown; add the tokenizer's files (tokenizer.json, tokenizer_config.json) "
            "to it"
        )
    largest = largest_needed_id(tokenizer, causal=kind == "causal-lm")
    if largest >= config.vocab_size:
        raise TeacherError(
            f"the tokenizer of teacher {name!r} has ids up to {largest}, its embeddings end at "
            f"{config.vocab_size - 1}: "
            "some tokens could not be read; the folder mixes files of different models"
        )
    if kind == "masked-lm" and tokenizer.pad_token_id is None:
        raise TeacherError(
            f"the tokenizer of teacher {name!r} has no padding token: short rows could not be filled; set pad_token in "
            "its tokenizer_config.json"
        )


def hash_weights(model: nn.Module) -> str:
    """SHA-256 over the names, types, shapes and bytes of all weights, whatever files they came in."""
    digest = hashlib.sha256()
    for key, tensor in sorted(model.state_dict().items()):
        digest.update(f"{key} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        if tensor.numel():
            digest.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()
