"""Rows of different lengths, for any tiny model."""

from __future__ import annotations

import pytest
import torch


@pytest.fixture
def ragged() -> tuple[torch.Tensor, torch.Tensor]:
    ids_BT = torch.randint(10, 150, (3, 20), generator=torch.Generator().manual_seed(0))
    return ids_BT, (torch.arange(20)[None] < torch.tensor([20, 7, 13])[:, None]).long()
