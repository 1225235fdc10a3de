"""A model as an ONNX file, checked number by number against PyTorch.

In: `input_ids` and `attention_mask`, int64 [B, T], whose axes are named `batch` and `sequence` and free, and where
pairs of texts are sorted also `token_type_ids`. Out, by what the model is: `last_hidden_state` [B, T, D] of an encoder
without a head, or `logits`: [B, T, V] of a language-modelling head, [B, T, C] of one that tags tokens, [B, C] of one
that sorts texts. A causal model reads its row in one pass; keys and values are not kept.

Exporting takes seconds to a minute and twice the memory of the weights; weights that do not fit into one ONNX file
(2 GB) go into FILE.data beside it. Nothing is rewritten for speed beyond what ONNX Runtime does by itself when it loads
the file. Needs the packages of the extra `onnx`.
"""

from __future__ import annotations

import contextlib
import io
import logging
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal

import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from transformers import PreTrainedModel

from student_train.evaluate.onnx.session import open_session, run_session
from student_train.evaluate.random_ids import random_ids
from student_train.students.pretrained import causal
from teacher_cache.disk import flush_to_disk
from teacher_cache.errors import StudentError, first_line
from teacher_cache.models.families import position_limit

Output = Literal["last_hidden_state", "logits"]
AXES = {0: "batch", 1: "sequence"}
"""Of both inputs, and of what has a value for each token."""

# float32 arithmetic in another order gives errors near 1e-6 of the largest output; a wrong graph gives errors near it
_TOLERANCE = 1e-3
_LARGEST_ERROR = 1e15
_LARGEST_SINGLE_FILE = 1_800_000_000
_EXAMPLE_SHAPE = (2, 17)
CHECKED_SHAPES = ((1, 8), (2, 33), (3, 64), (1, 128))
"""Rows and tokens, as far as the model reads them."""


@dataclass(frozen=True, kw_only=True)
class OnnxSource:
    """A model in float32 on the CPU, and what its file is to give.

    `called` is how messages name it (`student 'x'`), `instead` what the reader of a message can do without the file.
    `segments`: whether it is told which tokens are those of the second text of a pair.
    """

    called: str
    model: PreTrainedModel
    instead: str
    output: Output = "last_hidden_state"
    segments: bool = False

    @property
    def reads(self) -> int | None:
        """How many tokens the model can read, None if nothing limits it."""
        return position_limit(self.model)

    @property
    def inputs(self) -> tuple[str, ...]:
        """Names of what the file reads."""
        return ("input_ids", "attention_mask", *(("token_type_ids",) if self.segments else ()))

    def given(self, ids_BT: Tensor, mask_BT: Tensor) -> tuple[Tensor, ...]:
        """All that the file reads of single texts."""
        return (ids_BT, mask_BT, *((torch.zeros_like(ids_BT),) if self.segments else ()))

    def padded(self, batch_size: int, seq_len: int) -> tuple[Tensor, ...]:
        """Random ids, their mask, every row but the first half empty, and pairs; no longer than the model reads."""
        config = self.model.config
        seq_len = min(seq_len, self.reads or seq_len)
        ids_BT = random_ids(config, batch_size, seq_len)
        mask_BT = torch.ones_like(ids_BT)
        mask_BT[1:, seq_len // 2 :] = 0
        padding = getattr(config, "pad_token_id", None)
        found = self.given(ids_BT.masked_fill(mask_BT == 0, 0 if padding is None else padding), mask_BT)
        for types_BT in found[2:]:
            types_BT[:, seq_len // 4 :] = 1
        return found

    def feed(self, inputs: Sequence[Tensor]) -> dict[str, NDArray[Any]]:
        """Inputs for a session."""
        return {name: each.numpy() for name, each in zip(self.inputs, inputs, strict=True)}

    def module(self) -> nn.Module:
        """The model with exactly the inputs and the output that the file gets."""
        return (_PairInputs if self.segments else _Inputs)(self.model).eval()


class _Inputs(nn.Module):
    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__()
        self.model = model
        self.options = {"use_cache": False} if causal(model.config) else {}

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        output: Tensor = self.model(input_ids=input_ids, attention_mask=attention_mask, **self.options)[0]
        return output


class _PairInputs(_Inputs):
    def forward(self, input_ids: Tensor, attention_mask: Tensor, token_type_ids: Tensor) -> Tensor:  # type: ignore[override]
        given = {"input_ids": input_ids, "attention_mask": attention_mask, "token_type_ids": token_type_ids}
        output: Tensor = self.model(**given, **self.options)[0]
        return output


def export_onnx(source: OnnxSource, file: Path) -> float:
    """Write the model to `file`, checked and whole: until then, what is there stays.

    Returns:
        The largest absolute difference between its outputs in ONNX Runtime and in PyTorch at real positions, on random
        ids with padding in several shapes.

    Raises:
        StudentError: the family cannot be exported, the file cannot be written, or its outputs are not PyTorch's.
    """
    try:
        # under its own name, by which it knows the weights beside it
        with TemporaryDirectory(prefix=f".{file.name}.", dir=file.parent) as folder:
            unfinished = Path(folder) / file.name
            _write(source, unfinished)
            error = check_export(source, unfinished)
            # the file last: it counts once its weights are there
            for made in sorted(Path(folder).iterdir(), key=lambda made: made == unfinished):
                flush_to_disk(made)
                made.replace(file.with_name(made.name))
    except OSError as refusal:
        raise StudentError(
            f"the ONNX export of {source.called} cannot be written to {str(file)!r} ({refusal.strerror}): "
            f"{source.instead}, or give a place that can be written to"
        ) from refusal
    return error


def _write(source: OnnxSource, file: Path) -> None:
    try:
        with _quiet():
            torch.onnx.export(
                source.module(),
                source.padded(*_EXAMPLE_SHAPE),
                file,
                dynamo=True,
                verbose=False,
                input_names=list(source.inputs),
                output_names=[source.output],
                dynamic_shapes=(AXES,) * len(source.inputs),
                external_data=source.model.get_memory_footprint() > _LARGEST_SINGLE_FILE,
            )
        _forget_where_it_was_made(file)
    except OSError:
        raise
    except Exception as error:
        # the exporter hands on whatever tracing the model raised
        reason = first_line(error.__cause__ or error)
        raise StudentError(
            f"{source.called} of family {source.model.config.model_type!r} cannot be exported to ONNX ({reason}): "
            f"{source.instead}"
        ) from error


def _forget_where_it_was_made(file: Path) -> None:
    """Drop what the exporter notes of every node: lines of code, with their paths on this machine."""
    import onnx

    # weights beside the file stay there
    model = onnx.load(file, load_external_data=False)
    graph = model.graph
    parts = [graph.node, graph.input, graph.output, graph.value_info, graph.initializer, model.functions]
    parts += [function.node for function in model.functions]
    for each in (model, graph, *(one for part in parts for one in part)):
        each.ClearField("metadata_props")
        each.ClearField("doc_string")
    onnx.save(model, file)


def check_export(source: OnnxSource, file: Path, *, alike: bool = True) -> float:
    """The largest error of `file`, as `export_onnx` returns it. `alike`: it has to be the model, not a coarser one.

    Raises:
        StudentError: it is too large for one and the same function in another order of arithmetic, or no number.
    """
    session, module = open_session(file, torch.get_num_threads()), source.module()
    worst = 0.0
    for shape in CHECKED_SHAPES:
        inputs = source.padded(*shape)
        mask = inputs[1]
        with torch.inference_mode():
            expected = at_tokens(module(*inputs), mask)
        found = run_session(session, source.feed(inputs))
        error = float((at_tokens(torch.from_numpy(found), mask) - expected).abs().max())
        # "not below" rather than "above": NaN compares false
        if not error <= (_TOLERANCE * max(1.0, float(expected.abs().max())) if alike else _LARGEST_ERROR):
            raise StudentError(
                f"{source.called} computes something else in ONNX Runtime than in PyTorch: outputs for input of shape "
                f"{list(mask.shape)} differ by up to {error:.3g}, so the file would be another model: {source.instead}"
            )
        worst = max(worst, error)
    return worst


def at_tokens(output: Tensor, mask_BT: Tensor) -> Tensor:
    """What an output says of real tokens [N, ...]; all of it where it is of whole rows."""
    return output[mask_BT == 1] if output.ndim == 3 else output


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """No graphs and no remarks on packages that are not needed: an error says what matters."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with (
            warnings.catch_warnings(),
            contextlib.redirect_stdout(io.StringIO()),
            contextlib.redirect_stderr(io.StringIO()),
        ):
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)
