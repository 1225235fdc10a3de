"""The encoders whose latency is measured: found, loaded in float32 without heads, and sized.

In: a folder, or for the teacher a name on the hub, of which only configuration and weights are fetched. Out: the model
on the CPU in evaluation mode. Tokenizers are not needed: inputs are random ids.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import MODEL_FOR_MASKED_LM_MAPPING, PreTrainedModel

from student_train.evaluate.causal import model_folder
from student_train.evaluate.latency.records import ModelSize
from student_train.evaluate.load import weight_files, weights_fingerprint
from student_train.evaluate.random_ids import random_ids
from student_train.students.pretrained import load_config, load_model
from teacher_cache.errors import StudentError
from teacher_cache.models.families import position_limit


@dataclass(frozen=True, kw_only=True)
class TimedModel:
    """An encoder to time. `name` is how the user called it, `role` is student or teacher."""

    role: str
    name: str
    folder: Path
    encoder: PreTrainedModel

    @property
    def positions(self) -> int | None:
        """How many tokens it can read, None if nothing limits it."""
        return position_limit(self.encoder)

    @property
    def size(self) -> ModelSize:
        """Its parameters, and the bytes of its weight files."""
        return size_of(self.encoder, self.folder)

    @property
    def fingerprint(self) -> str:
        """SHA-256 of its weight files."""
        return weights_fingerprint(self.folder)

    def random_ids(self, batch_size: int, seq_len: int) -> Tensor:
        """[batch_size, seq_len] ids of its vocabulary, special ones left out; the same ones every time."""
        return random_ids(self.encoder.config, batch_size, seq_len)


def size_of(model: PreTrainedModel, folder: Path) -> ModelSize:
    """Parameters of a base model, and the bytes of the weight files that it came from."""
    tables = [module for module in model.modules() if isinstance(module, nn.Embedding)]
    embedding = {id(parameter): parameter.numel() for table in tables for parameter in table.parameters()}
    return ModelSize(
        parameters=sum(parameter.numel() for parameter in model.parameters()),
        embedding_parameters=sum(embedding.values()),
        bytes=sum(file.stat().st_size for file in weight_files(folder)),
    )


def load_timed(name: str, role: str) -> TimedModel:
    """The encoder in the folder `name`; a teacher may also be a name on the hub.

    Raises:
        StudentError: there is no such folder or name, the model is no encoder, or it cannot be loaded whole and run.
    """
    folder = model_folder(name, role)
    config = load_config(folder)
    if type(config) not in MODEL_FOR_MASKED_LM_MAPPING or getattr(config, "is_encoder_decoder", False):
        raise StudentError(
            f"{role} {name!r} is of family {config.model_type!r}, which is no encoder with a masked language model: "
            "one forward pass is not what its users wait for; choose a family such as BERT, RoBERTa, XLM-R, "
            "DistilBERT, ELECTRA or ModernBERT"
        )
    encoder = load_model(folder, with_mlm_head=False).model
    nn.Module.requires_grad_(encoder, False)
    nn.Module.eval(encoder)
    model = TimedModel(role=role, name=name, folder=folder, encoder=encoder)
    _try_out(model)
    return model


def _try_out(model: TimedModel) -> None:
    ids_BT = model.random_ids(1, min(8, model.positions or 8))
    try:
        with torch.inference_mode():
            model.encoder(input_ids=ids_BT, attention_mask=torch.ones_like(ids_BT))
    except Exception as error:
        # a family's own checks: X-MOD asks for a language
        raise StudentError(
            f"{model.role} {model.name!r} of family {model.encoder.config.model_type!r} does not run on token ids and "
            f"a mask alone ({type(error).__name__}: {error}): there is no forward pass to time; choose another model"
        ) from error
