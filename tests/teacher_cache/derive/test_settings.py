"""What `kdcache derive` may be asked for, and what means nothing."""

from __future__ import annotations

from typing import Any

import pytest

from teacher_cache.derive.settings import DeriveSettings
from teacher_cache.errors import SettingsError


@pytest.mark.parametrize(
    "flags, message",
    [
        ({"row_range": "8"}, "--row-range '8' cannot be read"),
        ({"row_range": "a:b"}, "--row-range 'a:b' cannot be read"),
        ({"row_range": "0:8", "max_rows": 8}, "--row-range 0:8 and --max-rows 8 both"),
        ({"max_rows": 0}, "--max-rows 0 is too small"),
        ({"k": 0}, "--k 0 is too small"),
        ({"precision": "coarse"}, "--precision 'coarse' is unknown"),
        ({"targets": "smell"}, "names 'smell'"),
    ],
)
def test_settings_that_mean_nothing_are_refused(flags: dict[str, Any], message: str) -> None:
    with pytest.raises(SettingsError, match=message):
        DeriveSettings(src="in.zarr", dst="out.zarr", **flags)


@pytest.mark.parametrize(
    "flags, rows",
    [
        ({}, (0, None)),
        ({"max_rows": 7}, (0, 7)),
        ({"row_range": "3:9"}, (3, 9)),
        ({"row_range": "3:"}, (3, None)),
        ({"row_range": ":9"}, (0, 9)),
        ({"row_range": ":"}, (0, None)),
    ],
)
def test_rows_are_counted_from_0_and_the_last_is_left_out(flags: dict[str, Any], rows: tuple[int, int | None]) -> None:
    assert DeriveSettings(src="in.zarr", dst="out.zarr", **flags).rows_asked() == rows


@pytest.mark.parametrize("text", ["-3:9", "3:-9", "1.5:9", "3:9:2", " 3:9", "³:9", "0x3:9"])
def test_ranges_are_plain_numbers(text: str) -> None:
    with pytest.raises(SettingsError, match="cannot be read: give A:B, such as 0:1000"):
        DeriveSettings(src="in.zarr", dst="out.zarr", row_range=text)


def test_targets_keep_the_order_in_which_they_are_named() -> None:
    settings = DeriveSettings(src="in.zarr", dst="out.zarr", targets=" attention, logits")
    assert settings.target_names() == ("attention", "logits")
    assert DeriveSettings(src="in.zarr", dst="out.zarr").target_names() is None


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
