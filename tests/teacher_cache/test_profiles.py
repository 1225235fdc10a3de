"""Profiles of devices: files that anybody may have written."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from teacher_cache.errors import SettingsError
from teacher_cache.profiles import read_profile

WHOLE: dict[str, Any] = {
    "format": "kdcache-profile", "name": "some GPU", "device": "cuda", "dtype": "bfloat16",
    "forward_flops_per_second": 2e14, "training_flops_per_second": 100000000000000, "measured": {"layers": 6},
}  # fmt: skip


def test_a_profile(tmp_path: Path) -> None:
    path = tmp_path / "gpu.json"
    path.write_text(json.dumps(WHOLE))
    found = read_profile(str(path))
    assert (found.forward_flops_per_second, found.training_flops_per_second) == (2e14, 1e14)
    assert found.assumed == f"on some GPU in bfloat16, by the rates in {path}"


@pytest.mark.parametrize(
    "content, told",
    [
        ("", "Expecting value"),
        ("[]", "an object"),
        ("[" * 100_000, "nested too deeply"),
        (" " * 2**20 + "{}", "bytes"),
        (json.dumps({**WHOLE, "format": "another"}), "format"),
        (json.dumps({**WHOLE, "device": "tpu"}), "device"),
        (json.dumps({**WHOLE, "forward_flops_per_second": 0}), "above 0"),
        (json.dumps({**WHOLE, "forward_flops_per_second": True}), "forward_flops_per_second"),
        (json.dumps({**WHOLE, "forward_flops_per_second": "1e14"}), "a number"),
        (json.dumps({**WHOLE, "training_flops_per_second": 1e300}), "at most"),
        (json.dumps(WHOLE).replace("2e+14", "NaN").replace("200000000000000.0", "NaN"), "NaN"),
        (json.dumps({key: value for key, value in WHOLE.items() if key != "dtype"}), "'dtype' is missing"),
    ],
)
def test_what_is_none(tmp_path: Path, content: str, told: str) -> None:
    path = tmp_path / "gpu.json"
    path.write_text(content)
    with pytest.raises(SettingsError, match=r"--profile .*is no profile of a device") as refusal:
        read_profile(str(path))
    assert told in str(refusal.value) and len(str(refusal.value)) < 600


def test_what_is_not_there(tmp_path: Path) -> None:
    for path in (tmp_path / "nothing.json", tmp_path):
        with pytest.raises(SettingsError, match=r"device_profile.py --out FILE"):
            read_profile(str(path))
