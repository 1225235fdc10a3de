"""Seconds and prices."""

from __future__ import annotations

import pytest

from teacher_cache.errors import SettingsError
from teacher_cache.prices import check_price, price_of


def test_prices() -> None:
    assert price_of(5400, 2.0) == 3.0 and price_of(1800, 2.0, 8) == 8.0 and price_of(5400, None) is None
    for price in (-1.0, float("nan"), float("inf")):
        with pytest.raises(SettingsError, match="is no price"):
            check_price(price)
