"""An encoder as an ONNX file, checked number by number against PyTorch, and run by ONNX Runtime on the CPU.

In: `input_ids` and `attention_mask`, int64 [B, T] with B and T free. Out: `last_hidden_state`, float32 [B, T, D]. Heads
are not exported. Exporting takes seconds to a minute and twice the memory of the weights; weights that do not fit into
one ONNX file (2 GB) go into FILE.data beside it. Nothing is quantised or rewritten for speed beyond what ONNX Runtime
does by itself when it loads the file. Needs the packages of the extra `onnx`.
"""

from __future__ import annotations

import contextlib
import importlib.util
import io
import logging
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from student_train.evaluate.latency.models import TimedModel
from teacher_cache.errors import StudentError, first_line

if TYPE_CHECKING:
    from onnxruntime import InferenceSession

PACKAGES = ("onnx", "onnxruntime", "onnxscript")
INSTALL = "pip install 'kdcache[onnx]'"

# float32 arithmetic in another order gives errors near 1e-6 of the largest output; a wrong graph gives errors near it
_TOLERANCE = 1e-3
_LARGEST_SINGLE_FILE = 1_800_000_000
_EXAMPLE_SHAPE = (2, 17)
_CHECKED_SHAPES = ((1, 8), (2, 33), (3, 64), (1, 128))


def missing_packages() -> list[str]:
    """Those of `PACKAGES` that are not installed."""
    return [name for name in PACKAGES if importlib.util.find_spec(name) is None]


class _Encoder(nn.Module):
    """The encoder with exactly the inputs and the output that the file gets."""

    def __init__(self, encoder: PreTrainedModel) -> None:
        super().__init__()
        self.encoder = encoder

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        hidden_BTD: Tensor = self.encoder(input_ids=input_ids, attention_mask=attention_mask)[0]
        return hidden_BTD


def export_onnx(model: TimedModel, file: Path) -> float:
    """Write the encoder of `model`, in float32 on the CPU, to `file`.

    Returns:
        The largest absolute difference between its outputs in ONNX Runtime and in PyTorch at real positions, on random
        ids with padding in several shapes.

    Raises:
        StudentError: the family cannot be exported, the file cannot be written, or its outputs are not PyTorch's.
    """
    ids, mask = _padded(model, *_EXAMPLE_SHAPE)
    free = {0: torch.export.Dim.DYNAMIC, 1: torch.export.Dim.DYNAMIC}
    try:
        with _quiet():
            torch.onnx.export(
                _Encoder(model.encoder).eval(),
                (ids, mask),
                file,
                dynamo=True,
                verbose=False,
                input_names=["input_ids", "attention_mask"],
                output_names=["last_hidden_state"],
                dynamic_shapes=(free, free),
                external_data=model.encoder.get_memory_footprint() > _LARGEST_SINGLE_FILE,
            )
    except OSError as error:
        raise StudentError(
            f"the export of {model.role} {model.name!r} cannot be written to {str(file)!r} ({error.strerror}): ONNX "
            "Runtime has nothing to run; give another --onnx-out, or --backends pytorch"
        ) from error
    except Exception as error:
        # the exporter hands on whatever tracing the model raised
        reason = first_line(error.__cause__ or error)
        raise StudentError(
            f"{model.role} {model.name!r} of family {model.encoder.config.model_type!r} cannot be exported to ONNX "
            f"({reason}): ONNX Runtime has nothing to run; give --backends pytorch"
        ) from error
    return check_export(model, file)


def open_session(file: Path, threads: int) -> InferenceSession:
    """ONNX Runtime on `file` with so many CPU threads."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.log_severity_level = 3  # errors; its warnings are about nodes that it leaves as they are
    # threads that wait by spinning after a run would take the cores from the other model, whose turn it is
    options.add_session_config_entry("session.force_spinning_stop", "1")
    return onnxruntime.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])


def run_session(session: InferenceSession, feed: dict[str, Any]) -> Any:
    """`last_hidden_state` as a NumPy array; `feed` holds both inputs as NumPy arrays."""
    return session.run(["last_hidden_state"], feed)[0]


def check_export(model: TimedModel, file: Path) -> float:
    """The largest error of `file`, as `export_onnx` returns it.

    Raises:
        StudentError: it is too large for one and the same function in another order of arithmetic.
    """
    session = open_session(file, torch.get_num_threads())
    encoder = _Encoder(model.encoder)
    worst = 0.0
    for shape in _CHECKED_SHAPES:
        ids, mask = _padded(model, *shape)
        with torch.inference_mode():
            expected = encoder(ids, mask)[mask == 1]
        found = torch.from_numpy(run_session(session, {"input_ids": ids.numpy(), "attention_mask": mask.numpy()}))
        error = float((found[mask == 1] - expected).abs().max())
        # "not below" rather than "above": NaN compares false
        if not error <= _TOLERANCE * max(1.0, float(expected.abs().max())):
            raise StudentError(
                f"{model.role} {model.name!r} computes something else in ONNX Runtime than in PyTorch: outputs for "
                f"input of shape {list(ids.shape)} differ by up to {error:.3g}, so its time would mean nothing; give "
                "--backends pytorch"
            )
        worst = max(worst, error)
    return worst


def _padded(model: TimedModel, batch_size: int, seq_len: int) -> tuple[Tensor, Tensor]:
    """Random ids, every row but the first half empty; no longer than the model reads."""
    seq_len = min(seq_len, model.positions or seq_len)
    ids_BT = model.random_ids(batch_size, seq_len)
    mask_BT = torch.ones_like(ids_BT)
    mask_BT[1:, seq_len // 2 :] = 0
    padding = getattr(model.encoder.config, "pad_token_id", None)
    return ids_BT.masked_fill(mask_BT == 0, 0 if padding is None else padding), mask_BT


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
