"""The models of which one forward pass is timed: found, loaded in float32 without heads, and sized.

They are encoders, and decoders that were fine-tuned for a task: these answer with one pass, too.

In: a folder, or for the teacher a name on the hub, of which only configuration and weights are fetched. Out: the model
on the CPU in evaluation mode. Tokenizers are not needed: inputs are random ids.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import MODEL_FOR_MASKED_LM_MAPPING, PreTrainedConfig, PreTrainedModel

from student_train.evaluate.causal import model_folder
from student_train.evaluate.latency.records import ModelSize
from student_train.evaluate.load import weight_files, weights_fingerprint
from student_train.evaluate.random_ids import random_ids
from student_train.students.pretrained import causal, has_task_head, load_config, load_model
from teacher_cache.errors import StudentError
from teacher_cache.models.families import position_limit


@dataclass(frozen=True, kw_only=True)
class TimedModel:
    """A model to time. `name` is how the user called it, `role` is student or teacher."""

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
    """The encoder in the folder `name`, or the decoder of a fine-tuned model; a teacher may be a name on the hub.

    Raises:
        StudentError: there is no such folder or name, the model is neither, or it cannot be loaded whole and run.
    """
    folder = model_folder(name, role)
    config = load_config(folder)
    if not (_is_encoder(config) or (causal(config) and has_task_head(config))):
        raise StudentError(
            f"{role} {name!r} is of family {config.model_type!r}, which is no encoder with a masked language model: "
            "one forward pass is not what its users wait for; choose a family such as BERT, RoBERTa, XLM-R, "
            "DistilBERT, ELECTRA or ModernBERT, or a decoder that was fine-tuned for a task"
        )
    encoder = load_model(folder, with_mlm_head=False).model
    nn.Module.requires_grad_(encoder, False)
    nn.Module.eval(encoder)
    model = TimedModel(role=role, name=name, folder=folder, encoder=encoder)
    _try_out(model)
    return model


def _is_encoder(config: PreTrainedConfig) -> bool:
    return type(config) in MODEL_FOR_MASKED_LM_MAPPING and not getattr(config, "is_encoder_decoder", False)


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
