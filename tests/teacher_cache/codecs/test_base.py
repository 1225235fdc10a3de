"""What no codec can hold is refused before it is coded."""

from __future__ import annotations

import pytest
import torch

from teacher_cache.codecs.base import refuse_infinite
from teacher_cache.errors import TeacherError


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_one_value_that_is_not_finite_is_enough(value: float, dtype: torch.dtype) -> None:
    values_ND = torch.zeros(7, 5, dtype=dtype)
    values_ND[6, 4] = value
    with pytest.raises(TeacherError, match="infinite or undefined values.*--dtype float32"):
        refuse_infinite(values_ND)


def test_the_largest_and_no_numbers_pass() -> None:
    for dtype in (torch.float16, torch.bfloat16, torch.float32):
        refuse_infinite(torch.tensor([torch.finfo(dtype).max, torch.finfo(dtype).min], dtype=dtype))
        refuse_infinite(torch.empty(0, 5, dtype=dtype))
