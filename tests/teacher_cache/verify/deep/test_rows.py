"""A masked row is the plain one with other ids where it says so; every position that is not is counted."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from teacher_cache.contract.batch import Places, TargetBatch
from teacher_cache.teacher.outputs import TeacherOutputs
from teacher_cache.verify.deep.rows import DeepRow, InputComparison

PLAIN = [2, 10, 11, 12, 13, 3, 0, 0]
"""Six real positions, two of padding."""
NOTHING = TeacherOutputs(hidden={}, attention={}, final_BTD=torch.zeros(1, 8, 4))


def row(seen: list[int], positions: list[int], original: list[int], count: int) -> DeepRow:
    targets = TargetBatch(
        input_ids_BT=torch.tensor([seen]),
        length_B=torch.tensor([6]),
        row_id_B=torch.tensor([0]),
        places=Places(
            positions_BM=torch.tensor([positions]),
            label_ids_BM=torch.tensor([original]),
            count_B=torch.tensor([count]),
        ),
    )
    return DeepRow(targets=targets, masked_view=0, plain_ids_BT=torch.tensor([PLAIN]), live=NOTHING, alone=NOTHING)


RIGHT = row([2, 4, 11, 12, 99, 3, 0, 0], [1, 4, 0], [10, 13, 0], 2)


def masked(**changes: list[int]) -> DeepRow:
    assert RIGHT.targets.places is not None
    tensors = {name: torch.tensor([values]) for name, values in changes.items()}
    return replace(RIGHT, targets=replace(RIGHT.targets, places=replace(RIGHT.targets.places, **tensors)))


def seen(ids: list[int]) -> DeepRow:
    return replace(RIGHT, targets=replace(RIGHT.targets, input_ids_BT=torch.tensor([ids])))


@pytest.mark.parametrize(
    "given, wrong",
    [
        (RIGHT, 0),
        # an id that was drawn may be the one that stood there
        (row([2, 10, 11, 12, 13, 3, 0, 0], [1, 4, 0], [10, 13, 0], 2), 0),
        (row(PLAIN, [0, 0, 0], [0, 0, 0], 0), 0),
        (seen([2, 4, 11, 7, 99, 3, 0, 0]), 1),
        (seen([2, 4, 11, 12, 99, 3, 0, 5]), 1),
        (masked(label_ids_BM=[10, 12, 0]), 1),
        # at another position, the changed one is unaccounted for and the original does not fit
        (masked(positions_BM=[1, 3, 0]), 2),
        # the same position twice: one is too many, and position 4 is unaccounted for, and one original does not fit
        (masked(positions_BM=[1, 1, 0]), 3),
        # at padding or outside of the row
        (masked(positions_BM=[1, 6, 0]), 2),
        (masked(positions_BM=[1, 80, 0]), 2),
        (masked(positions_BM=[1, -1, 0]), 2),
    ],
)
def test_each_position_that_does_not_fit_is_counted(given: DeepRow, wrong: int) -> None:
    comparison = InputComparison()
    comparison.add(RIGHT)
    comparison.add(given)
    (check,) = comparison.results()
    assert (check.target, check.stored, check.declared) == ("masked inputs", wrong, 0)
    assert check.problem == (f"{wrong} positions do not fit the row" if wrong else "")


def test_places_behind_the_count_mean_nothing() -> None:
    comparison = InputComparison()
    comparison.add(masked(positions_BM=[1, 4, 999], label_ids_BM=[10, 13, 77]))
    assert not comparison.results()[0].problem


def test_wrong_positions_add_up_over_rows() -> None:
    comparison = InputComparison()
    for _ in range(3):
        comparison.add(seen([2, 4, 11, 7, 99, 3, 0, 0]))
    assert comparison.results()[0].stored == 3
