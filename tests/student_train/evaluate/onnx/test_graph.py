"""Exports that compute what PyTorch computes, with axes that have names, and are refused where they do not."""

from __future__ import annotations

from pathlib import Path

import onnx
import pytest
import torch
from transformers import AutoModel, AutoModelForCausalLM

from student_train.evaluate.onnx.graph import OnnxSource, check_export, export_onnx
from student_train.evaluate.onnx.packages import missing_packages
from student_train.evaluate.onnx.session import open_session, run_session
from teacher_cache.errors import StudentError
from tests.student_train.evaluate.causal_models import make_causal


def axes_of(file: Path) -> dict[str, list[str | int]]:
    graph = onnx.load(file, load_external_data=False).graph
    return {
        each.name: [axis.dim_param or axis.dim_value for axis in each.type.tensor_type.shape.dim]
        for each in [*graph.input, *graph.output]
    }


def test_an_export_computes_what_pytorch_computes(tiny_teacher, tmp_path: Path) -> None:
    """Rotary positions; a layer with global and one with local attention."""
    folder = tiny_teacher("modernbert", num_hidden_layers=2)
    model = AutoModel.from_pretrained(folder).eval()
    source, file = OnnxSource(called="student 'it'", model=model, instead="do without"), tmp_path / "model.onnx"
    error = export_onnx(source, file)
    assert 0 < error < 1e-4
    assert axes_of(file) == {
        "input_ids": ["batch", "sequence"],
        "attention_mask": ["batch", "sequence"],
        "last_hidden_state": ["batch", "sequence", 32],
    }
    # a shape that neither the export nor its check saw
    ids = torch.randint(5, 200, (5, 27))
    mask = (torch.arange(27) < torch.tensor([27, 1, 9, 26, 14])[:, None]).long()
    ids[mask == 0] = model.config.pad_token_id
    found = run_session(open_session(file, 1), {"input_ids": ids.numpy(), "attention_mask": mask.numpy()})
    reference = AutoModel.from_pretrained(folder).double().eval()
    with torch.inference_mode():
        expected = reference(input_ids=ids, attention_mask=mask).last_hidden_state
    torch.testing.assert_close(torch.from_numpy(found)[mask == 1].double(), expected[mask == 1], atol=1e-4, rtol=1e-4)
    with torch.no_grad():
        model.get_input_embeddings().weight[:, 3] += 1
    with pytest.raises(StudentError, match="student 'it' computes something else in ONNX Runtime .* do without"):
        check_export(source, file)


def test_a_decoder_reads_a_row_in_one_pass(tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(make_causal(tmp_path / "it", "llama")).eval()
    file = tmp_path / "model.onnx"
    assert export_onnx(OnnxSource(called="student", model=model, instead="", output="logits"), file) < 1e-4
    assert axes_of(file)["logits"] == ["batch", "sequence", model.config.vocab_size]


def test_a_file_is_replaced_once_it_is_whole_and_checked(tiny_teacher, tmp_path: Path) -> None:
    """Of a model that computes something else each time nothing is written; what was there stays."""
    model = AutoModel.from_pretrained(tiny_teacher("bert", num_hidden_layers=1)).eval()
    source, file = OnnxSource(called="student 'it'", model=model, instead="do without"), tmp_path / "model.onnx"
    file.write_bytes(b"another")
    dropped = model.register_forward_hook(lambda _model, _inputs, outputs: (torch.rand_like(outputs[0]),))
    with pytest.raises(StudentError, match="computes something else in ONNX Runtime"):
        export_onnx(source, file)
    assert file.read_bytes() == b"another" and [each.name for each in tmp_path.iterdir()] == ["model.onnx"]
    dropped.remove()
    export_onnx(source, file)
    assert axes_of(file)["input_ids"] == ["batch", "sequence"]
    assert [each.name for each in tmp_path.iterdir()] == ["model.onnx"]


def test_weights_beside_the_file(tiny_teacher, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("student_train.evaluate.onnx.graph._LARGEST_SINGLE_FILE", 0)
    model = AutoModel.from_pretrained(tiny_teacher("bert", num_hidden_layers=1)).eval()
    source, file = OnnxSource(called="student 'it'", model=model, instead=""), tmp_path / "model.onnx"
    export_onnx(source, file)
    assert {each.name for each in tmp_path.iterdir()} == {"model.onnx", "model.onnx.data"}
    assert check_export(source, file) < 1e-4


def test_packages_that_are_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    assert missing_packages() == []
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None if name == "onnxscript" else name)
    assert missing_packages() == ["onnxscript"]


def test_examples_have_padding_and_fit_the_model(tiny_teacher) -> None:
    model = AutoModel.from_pretrained(tiny_teacher("roberta", num_hidden_layers=1))
    ids, mask = OnnxSource(called="student", model=model, instead="").padded(3, 128)
    # no longer than it reads, and all rows but the first half empty
    assert ids.shape == mask.shape == (3, 64) and mask.sum(1).tolist() == [64, 32, 32]
    assert (ids[mask == 0] == model.config.pad_token_id).all() and (ids[mask == 1] > 2).all()
