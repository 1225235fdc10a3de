"""Checkpoints for another number of processes: when they are converted, and what is put right afterwards.

That two processes go on from the checkpoint of one, and one from that of two, is in test_ranks.py.
"""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from student_train.engine.ranks import Ranks
from student_train.engine.universal import needs_universal, own_groups, universal_form
from teacher_cache.errors import TrainingError


@pytest.mark.parametrize(
    "stage, written_by, read_by, needed",
    [(1, 2, 1, True), (2, 1, 2, True), (3, 4, 2, True), (1, 2, 2, False), (0, 2, 1, False), (None, 2, 1, False)],
)
def test_only_parts_that_cannot_be_read_as_they_are_need_it(
    stage: int | None, written_by: int, read_by: int, needed: bool
) -> None:
    config = {"zero_optimization": {} if stage is None else {"stage": stage}}
    assert needs_universal(config, written_by, Ranks(count=read_by)) == needed


def test_groups_keep_their_decay_and_parameters_their_count_of_steps() -> None:
    """What DeepSpeed does on reading: the decay of the first group for all, and one tensor of steps for all."""
    first, second = (torch.nn.Parameter(torch.zeros(2)) for _ in range(2))
    groups = [{"params": [first], "weight_decay": 0.01}, {"params": [second], "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups)
    with own_groups(SimpleNamespace(optimizer=optimizer)):
        shared = torch.tensor(8.0)
        for group in optimizer.param_groups:
            group["weight_decay"] = 0.01
        for parameter in (first, second):
            optimizer.state[parameter] = {
                "step": shared,
                "exp_avg": torch.zeros(2),
                "exp_avg_sq": torch.zeros(2),
            }
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.01, 0.0]
    for parameter in (first, second):
        parameter.grad = torch.ones(2)
    optimizer.step()
    assert [float(optimizer.state[parameter]["step"]) for parameter in (first, second)] == [9.0, 9.0]


def test_what_cannot_be_converted_is_a_message_and_leaves_nothing(tmp_path: Path) -> None:
    checkpoint = tmp_path / "step-00000004"
    checkpoint.mkdir()
    (checkpoint / "weights.pt").write_bytes(b"no checkpoint of DeepSpeed")
    with (
        pytest.raises(TrainingError, match="written by another number of processes, and DeepSpeed cannot convert it"),
        universal_form(checkpoint, Ranks()),
    ):
        pytest.fail("there is nothing to read")
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000004"]
