"""int8 files: what becomes int8 and what does not, and that they stay near the model."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from transformers import AutoModel

from student_train.evaluate.onnx.graph import OnnxSource, export_onnx
from student_train.evaluate.onnx.quantise import quantise_dynamic, quantise_static
from student_train.evaluate.onnx.session import open_session, run_session
from teacher_cache.errors import StudentError


@pytest.fixture(scope="module")
def source(tiny_teacher) -> OnnxSource:
    model = AutoModel.from_pretrained(tiny_teacher("bert", num_hidden_layers=1), add_pooling_layer=False).eval()
    return OnnxSource(called="student", model=model, instead="")


@pytest.fixture(scope="module")
def float_file(source: OnnxSource, tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("onnx") / "model.onnx"
    export_onnx(source, file)
    return file


@pytest.mark.parametrize("kind", ["dynamic", "static"])
def test_weights_are_int8_and_attention_is_not(kind: str, source: OnnxSource, float_file: Path, tmp_path: Path) -> None:
    out = tmp_path / "int8.onnx"
    if kind == "dynamic":
        quantise_dynamic(float_file, out)
    else:
        quantise_static(float_file, out, [source.feed(source.padded(4, length)) for length in (9, 16)])
    graph = onnx.load(out).graph
    stored = Counter(each.data_type for each in graph.initializer if np.prod(each.dims, initial=1) >= 32 * 32)
    # queries, keys, values, output, two of the feed-forward network, and the table of words
    assert stored[onnx.TensorProto.INT8] + stored[onnx.TensorProto.UINT8] >= 7
    assert onnx.TensorProto.FLOAT not in stored or stored[onnx.TensorProto.FLOAT] <= 1  # positions
    operations = Counter(node.op_type for node in graph.node)
    assert operations["MatMul"] == (2 if kind == "dynamic" else 8) and operations["Softmax"] == 1
    inputs = source.padded(5, 23)
    with torch.inference_mode():
        expected = source.module()(*inputs)[inputs[1] == 1]
    found = torch.from_numpy(run_session(open_session(out, 1), source.feed(inputs)))[inputs[1] == 1]
    assert torch.cosine_similarity(found, expected, dim=1).mean() > 0.97
    assert not torch.allclose(found, expected, atol=1e-5)


def test_what_is_no_model_is_a_message(tmp_path: Path) -> None:
    (tmp_path / "model.onnx").write_bytes(b"no model")
    with pytest.raises(StudentError, match=r"'model.onnx' cannot be quantised to int8, dynamic .*leave --int8 out"):
        quantise_dynamic(tmp_path / "model.onnx", tmp_path / "out.onnx")
