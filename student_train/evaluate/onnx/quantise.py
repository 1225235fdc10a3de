"""int8 files from the float32 file of a model, by ONNX Runtime's own quantiser.

Both kinds keep the weights of matrix products as int8 with a scale for each output channel, and the table of word
embeddings as int8. They differ in what is multiplied with the weights: `dynamic` scales each activation by its own
largest value, found while it runs; `static` by values found beforehand on `calibration` rows, which saves that work and
is wrong by what the rows did not show. Products of two activations (attention), softmax, norms and GELU stay in
float32: quantising them is what ruins encoders.

Costs seconds, and for `static` the memory of a few rows' activations: the range of each is all that is kept of them.
"""

from __future__ import annotations

import contextlib
import logging
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from numpy.typing import NDArray

from teacher_cache.errors import StudentError, first_line

Feed = Mapping[str, NDArray[Any]]
"""`input_ids` and `attention_mask`, int64 [B, T]."""
_OPERATIONS = ("MatMul", "Gemm", "Gather")


def quantise_dynamic(file: Path, out: Path) -> None:
    """Write the int8 file `out` of the float32 file `file`, scales of activations being found while it runs.

    Raises:
        StudentError: the quantiser cannot.
    """
    from onnxruntime.quantization import QuantType, quantize_dynamic

    with _prepared(file, "dynamic") as (prepared, between):
        quantize_dynamic(
            prepared, out, op_types_to_quantize=list(_OPERATIONS), per_channel=True, weight_type=QuantType.QInt8,
            nodes_to_exclude=between, use_external_data_format=is_large(file),
        )  # fmt: skip


def quantise_static(file: Path, out: Path, calibration: Sequence[Feed]) -> None:
    """Write the int8 file `out` of the float32 file `file`, with scales of activations from `calibration`.

    Raises:
        StudentError: the quantiser cannot.
    """
    from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static

    class Rows(CalibrationDataReader):  # type: ignore[misc]
        def __init__(self) -> None:
            self.left = iter(calibration)

        def get_next(self) -> Any:
            return next(self.left, None)

    with _prepared(file, "static") as (prepared, between):
        quantize_static(
            prepared, out, Rows(), quant_format=QuantFormat.QDQ, op_types_to_quantize=list(_OPERATIONS),
            per_channel=True, activation_type=QuantType.QUInt8, weight_type=QuantType.QInt8, nodes_to_exclude=between,
            use_external_data_format=is_large(file),
        )  # fmt: skip


def is_large(file: Path) -> bool:
    """Whether its weights lie beside it, as those do that do not fit into one file."""
    return any(file.parent.glob(f"{file.name}.*"))


@contextlib.contextmanager
def _prepared(file: Path, kind: str) -> Iterator[tuple[Path, list[str]]]:
    """The file with its shapes worked out and its graph simplified, and the products in it of two activations."""
    import onnx
    from onnxruntime.quantization.shape_inference import quant_pre_process

    level = logging.root.manager.disable
    logging.disable(logging.WARNING)  # advice of the quantiser on what has been done
    try:
        with tempfile.TemporaryDirectory(prefix="kdeval-") as scratch, contextlib.redirect_stdout(None):
            prepared = Path(scratch) / "prepared.onnx"
            large = is_large(file)
            # shapes of symbols would need a third inference, which fails on newer operators
            quant_pre_process(str(file), str(prepared), skip_symbolic_shape=True, save_as_external_data=large)
            model = onnx.load(prepared)
            graph = model.graph
            # of weights that the quantiser turns round: it would find that they are others by then
            del graph.value_info[:]
            onnx.save(model, prepared, save_as_external_data=large)
            weights = {each.name for each in graph.initializer}
            between = [
                node.name
                for node in graph.node
                if node.op_type in ("MatMul", "Gemm") and not weights.intersection(node.input)
            ]
            yield prepared, between
    except Exception as error:
        # the quantiser lays no errors down
        raise StudentError(
            f"{file.name!r} cannot be quantised to int8, {kind} ({type(error).__name__}: {first_line(error)}): there "
            "would be no such file; leave --int8 out, or give the other kind"
        ) from error
    finally:
        logging.disable(level)
