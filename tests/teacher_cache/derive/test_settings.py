"""What `kdcache derive` refuses before a store is opened."""

from __future__ import annotations

from typing import Any

import pytest

from teacher_cache.derive.settings import DeriveSettings
from teacher_cache.errors import SettingsError


@pytest.mark.parametrize(
    "wrong, message",
    [
        ({"layers": "lsat:2"}, "--layers 'lsat:2' cannot be read at 'lsat:2': did you mean last"),
        ({"layers": "-1"}, "--layers '-1' names layer -1"),
        ({"attention_layer": 0}, "--attention-layer 0 is too small"),
        ({"targets": "logit"}, "--targets 'logit' names 'logit'.*did you mean logits"),
        ({"precision": "int3"}, "--precision 'int3' is unknown"),
        ({"k": 0}, "--k 0 is too small"),
        ({"max_rows": 0}, "--max-rows 0 is too small"),
        ({"row_range": "8"}, "--row-range '8' cannot be read"),
        ({"row_range": "a:b"}, "--row-range 'a:b' cannot be read"),
        ({"row_range": "8:8"}, "--row-range '8:8' holds no row"),
        ({"row_range": ":0"}, "--row-range ':0' holds no row"),
        ({"row_range": "0:8", "max_rows": 8}, "--row-range 0:8 and --max-rows 8 both say"),
    ],
)
def test_values_that_cannot_be_are_refused_by_flag(wrong: dict[str, Any], message: str) -> None:
    with pytest.raises(SettingsError, match=message):
        DeriveSettings(src="in.zarr", dst="out.zarr", **wrong)
