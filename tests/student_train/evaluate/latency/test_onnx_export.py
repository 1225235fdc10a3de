"""Exports that compute what PyTorch computes, and are refused where they do not."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoModel

from student_train.evaluate.latency import onnx_export
from student_train.evaluate.latency.models import load_timed
from student_train.evaluate.latency.onnx_export import (
    check_export,
    export_onnx,
    missing_packages,
    open_session,
    run_session,
)
from teacher_cache.errors import StudentError


def test_an_export_computes_what_pytorch_computes(tiny_teacher, tmp_path: Path) -> None:
    """Rotary positions; a layer with global and one with local attention."""
    model = load_timed(str(tiny_teacher("modernbert", num_hidden_layers=2)), "student")
    file = tmp_path / "model.onnx"
    error = export_onnx(model, file)
    assert 0 < error < 1e-4
    # a shape that neither the export nor its check saw
    ids = torch.randint(5, 200, (5, 27))
    mask = (torch.arange(27) < torch.tensor([27, 1, 9, 26, 14])[:, None]).long()
    ids[mask == 0] = model.encoder.config.pad_token_id
    found = run_session(open_session(file, 1), {"input_ids": ids.numpy(), "attention_mask": mask.numpy()})
    reference = AutoModel.from_pretrained(model.folder).double().eval()
    with torch.inference_mode():
        expected = reference(input_ids=ids, attention_mask=mask).last_hidden_state
    torch.testing.assert_close(torch.from_numpy(found)[mask == 1].double(), expected[mask == 1], atol=1e-4, rtol=1e-4)
    with torch.no_grad():
        model.encoder.get_input_embeddings().weight[:, 3] += 1
    with pytest.raises(StudentError, match="something else in ONNX Runtime than in PyTorch"):
        check_export(model, file)


def test_packages_that_are_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    assert missing_packages() == []
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None if name == "onnxscript" else name)
    assert missing_packages() == ["onnxscript"]


def test_examples_have_padding_and_fit_the_model(tiny_teacher) -> None:
    model = load_timed(str(tiny_teacher("roberta", num_hidden_layers=1)), "student")
    ids, mask = onnx_export._padded(model, 3, 128)
    # no longer than it reads, and all rows but the first half empty
    assert ids.shape == mask.shape == (3, 64) and mask.sum(1).tolist() == [64, 32, 32]
    assert (ids[mask == 0] == model.encoder.config.pad_token_id).all() and (ids[mask == 1] > 2).all()
