"""The student that is exported: its folder, the whole model in it, and what its users do with such a one.

Every kind that `kdtrain` and `kdeval finetune --save` write has a class of Transformers that loads it whole, a pipeline
that runs it, and an output. Models with other heads are refused.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn
from transformers import PreTrainedModel

from student_train.evaluate.load import weight_files
from student_train.evaluate.onnx.graph import Output
from student_train.students.pretrained import causal, check_family, load_config
from teacher_cache.errors import StudentError, first_line
from teacher_cache.models.families import encoder_of, pooler_option, position_limit, quiet_transformers
from teacher_cache.models.tokenizers import read_tokenizer


@dataclass(frozen=True, kw_only=True)
class Kind:
    """What a model is for: its class in Transformers, its pipeline, what it gives."""

    pipeline: str
    auto_class: str
    output: Output


_ENCODER = Kind(pipeline="feature-extraction", auto_class="AutoModel", output="last_hidden_state")
_CAUSAL = Kind(pipeline="text-generation", auto_class="AutoModelForCausalLM", output="logits")
_BY_HEAD = {
    "ForMaskedLM": Kind(pipeline="fill-mask", auto_class="AutoModelForMaskedLM", output="logits"),
    "ForSequenceClassification": Kind(
        pipeline="text-classification", auto_class="AutoModelForSequenceClassification", output="logits"
    ),
    "ForTokenClassification": Kind(
        pipeline="token-classification", auto_class="AutoModelForTokenClassification", output="logits"
    ),
}
CLASSIFIERS = ("text-classification", "token-classification")
"""Pipelines of fine-tuned models."""


@dataclass(frozen=True, kw_only=True)
class Source:
    """A student to export. `model` is whole, in float32 on the CPU in evaluation mode."""

    folder: Path
    model: PreTrainedModel
    kind: Kind

    @property
    def positions(self) -> int | None:
        """How many tokens it can read, None if nothing limits it."""
        return position_limit(self.model)

    @property
    def causal(self) -> bool:
        """Whether it predicts next tokens."""
        return causal(self.model.config)

    @property
    def fine_tuned(self) -> bool:
        """Whether it has the head of a task."""
        return self.kind.pipeline in CLASSIFIERS

    @property
    def numbers_texts(self) -> bool:
        """Whether it is told which tokens are those of the second text of a pair, and its tokenizer says so.

        Raises:
            StudentError: the tokenizer cannot be read.
        """
        types = getattr(self.model.config, "type_vocab_size", None) or 0
        return types >= 2 and "token_type_ids" in self.read_tokenizer().model_input_names

    def read_tokenizer(self) -> Any:
        """The tokenizer in its folder.

        Raises:
            StudentError: there is none that can be read.
        """
        try:
            with quiet_transformers():
                tokenizer = read_tokenizer(self.folder, self.model.config, local_files_only=True)
        except Exception as error:
            # the tokenizers library raises nothing more special
            raise self._no_tokenizer(f"it cannot be read ({type(error).__name__}: {first_line(error)})") from error
        if len(tokenizer.get_vocab()) <= len(tokenizer.all_special_tokens):
            raise self._no_tokenizer("it knows no words, as where its files are missing")
        return tokenizer

    def _no_tokenizer(self, why: str) -> StudentError:
        return StudentError(
            f"the tokenizer in {str(self.folder)!r} cannot be used: {why}; an export without it reads no text; copy "
            "the tokenizer files of the model that the student comes from (tokenizer.json, tokenizer_config.json) there"
        )

    def without_head(self) -> PreTrainedModel:
        """Its base model."""
        return encoder_of(self.model)


def read_source(name: str) -> Source:
    """The student in the folder `name`.

    Raises:
        StudentError: there is no such folder, no model in it, weights are missing, or it has a head of another kind.
    """
    folder = Path(name).expanduser()
    if not folder.is_dir():
        raise StudentError(
            f"there is no student directory {name!r}: nothing can be exported; give the directory that kdtrain wrote "
            "(its --out) or any Hugging Face model directory"
        )
    if not weight_files(folder):
        raise StudentError(
            f"student {name!r} has no weights (model.safetensors): a folder without them is no model; give the "
            "directory of a training that has ended, or restore the file"
        )
    check_family(folder)
    kind = _kind_of(folder)
    return Source(folder=folder, model=load_whole(folder, kind), kind=kind)


def load_whole(folder: Path, kind: Kind, dtype: Any = torch.float32) -> PreTrainedModel:
    """The model in a folder, every weight of which comes from there.

    Raises:
        StudentError: it cannot be loaded, or weights are missing.
    """
    config = load_config(folder)
    options = pooler_option(config) if kind is _ENCODER else {}
    try:
        with quiet_transformers():
            model, report = getattr(transformers, kind.auto_class).from_pretrained(
                folder, config=config, dtype=dtype, local_files_only=True, trust_remote_code=False,
                output_loading_info=True, **options,
            )  # fmt: skip
    except Exception as error:
        # the files are anybody's: what is wrong with them shows in many ways
        raise StudentError(
            f"student {str(folder)!r} cannot be loaded as {kind.auto_class} ({first_line(error)}): what cannot be "
            "loaded here cannot be used elsewhere; restore its files, or export it from where it was trained"
        ) from error
    missing = sorted(report["missing_keys"])
    if missing:
        raise StudentError(
            f"student {str(folder)!r} lacks {len(missing)} weights that its config.json promises, {missing[0]!r} among "
            "them: whoever loads it would get random numbers in their place; give the folder of a complete model, or "
            "mend 'architectures' in its config.json"
        )
    loaded: PreTrainedModel = model
    nn.Module.requires_grad_(loaded, False)
    return nn.Module.eval(loaded)


def _kind_of(folder: Path) -> Kind:
    config = load_config(folder)
    name = (config.architectures or [""])[0]
    found = next((kind for ending, kind in _BY_HEAD.items() if name.endswith(ending)), None)
    if found is not None:
        return found
    if causal(config):
        return _CAUSAL
    if "For" in name:
        raise StudentError(
            f"student {str(folder)!r} is a {name}: there is no pipeline here for a head of this kind, and its card "
            "would promise another; give a masked or causal language model, an encoder, or what kdeval finetune --save "
            "wrote"
        )
    return _ENCODER
