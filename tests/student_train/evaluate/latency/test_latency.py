"""Latency: what is timed in a given time, turn by turn, and exports that compute what PyTorch computes."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from transformers import AutoModel

from student_train.evaluate.latency import latency
from student_train.evaluate.latency.latency import take_turns
from student_train.evaluate.latency.models import load_timed
from student_train.evaluate.latency.onnx_export import check_export, export_onnx, open_session, run_session
from student_train.evaluate.latency.schedule import LEAST_RUNS, Size, plan_sizes
from teacher_cache.errors import StudentError

SIZES = [Size.of(batch_size, length) for batch_size in (1, 10) for length in (10, 100)]


def test_what_fits_is_planned_and_what_does_not_is_named() -> None:
    timed = []

    def time_pair(size: Size) -> float:
        timed.append(size.tokens)
        return size.tokens / 100

    # four pairs of 0.1 s with two threads, and with one that takes twice as long: 1.2 s; the next sizes 12 s each
    plan = plan_sizes(SIZES, [1, 2], seconds=26, time_pair=time_pair)
    assert [size.tokens for size in plan.seconds] == [10, 100, 100]
    spare = (26 - 1.2 - 2 * 12) / 6
    assert plan.seconds[Size.of(1, 10)] == pytest.approx({1: 0.8 + spare, 2: 0.4 + spare})
    assert plan.seconds[Size.of(10, 10)] == pytest.approx({1: 8 + spare, 2: 4 + spare})
    assert plan.left_out == pytest.approx({Size.of(10, 100): 120})
    assert timed == [10]


def test_small_sizes_are_timed_and_the_smallest_always_measured() -> None:
    overhead = plan_sizes(SIZES, [1], seconds=1000, time_pair=lambda size: 1.0)
    assert not overhead.left_out  # in proportion to tokens, the largest would need 400 s
    assert sum(each[1] for each in overhead.seconds.values()) == pytest.approx(1000)
    assert list(plan_sizes(SIZES, [1], seconds=1, time_pair=lambda size: 5.0).seconds) == [SIZES[0]]


def test_models_take_turns() -> None:
    calls = []
    student, teacher = take_turns([lambda: calls.append("s"), lambda: calls.append("t")], runs=7, seconds=60)
    assert len(student) == len(teacher) == 7
    assert calls == ["s", "t"] * (len(calls) // 2)
    assert len(calls) > 2 * 7  # the warm-up is not among the times


def test_runs_end_with_the_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """By a clock that moves with the passes alone; a tenth of the time is for warming up."""
    now = 0.0

    def run() -> None:
        nonlocal now
        now += 0.5

    monkeypatch.setattr(latency, "time", SimpleNamespace(perf_counter=lambda: now))
    [slow] = take_turns([run], runs=1000, seconds=10)
    assert slow == [0.5] * 17
    assert take_turns([run], runs=1000, seconds=0.001) == [[0.5] * LEAST_RUNS]


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
