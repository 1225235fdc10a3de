"""Encoders to time: how large they are, what they are fed, which are refused."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from student_train.evaluate.latency.models import load_timed
from teacher_cache.errors import StudentError


def test_sizes_and_inputs(tiny_teacher) -> None:
    folder = tiny_teacher("roberta")
    model = load_timed(str(folder), "student")
    width, feed_forward = 32, 64
    embeddings = (200 + 66 + model.encoder.config.type_vocab_size) * width
    block = 4 * (width + 1) * width + (width + 1) * feed_forward + (feed_forward + 1) * width + 4 * width
    assert model.size.embedding_parameters == embeddings
    assert model.size.parameters == embeddings + 2 * width + 4 * block  # no pooler, no head
    assert model.size.bytes == (folder / "model.safetensors").stat().st_size
    assert model.positions == 64
    ids = model.random_ids(8, 64)
    assert torch.equal(ids, model.random_ids(8, 64))
    assert not torch.isin(ids, torch.tensor([0, 1, 2])).any()
    assert len(ids.unique()) > 150 and ids.max() < 200


def test_models_that_cannot_be_timed(tmp_path: Path, tiny_teacher) -> None:
    with pytest.raises(StudentError, match=r"does not run on token ids and a mask alone .*language"):
        load_timed(str(tiny_teacher("xmod")), "student")
    with pytest.raises(StudentError, match="no student directory"):
        load_timed(str(tmp_path / "nowhere"), "student")
    with pytest.raises(StudentError, match="cannot be had from the hub"):
        load_timed("nobody/nothing", "teacher")
    (tmp_path / "config.json").write_text('{"model_type": "t5"}')
    with pytest.raises(StudentError, match="no encoder"):
        load_timed(str(tmp_path), "teacher")
