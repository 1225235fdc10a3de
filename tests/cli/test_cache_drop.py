"""`kdcache drop` as a user meets it."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest

from cli import kdcache


@pytest.fixture(scope="module")
def arguments(tiny_teacher: Callable[..., Path], tiny_corpus: Path) -> list[str]:
    return ["--teacher", str(tiny_teacher("bert")), "--corpus", str(tiny_corpus), "--seq-len", "16", "--max-rows", "40"]


def test_what_is_given_up_is_said_and_verified(
    arguments: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    store = str(tmp_path / "cache.zarr")
    assert kdcache.main(["build", *arguments, "--out", store]) == 0
    capsys.readouterr()
    assert kdcache.main(["drop", store, "--targets", "logits", "--dry-run"]) == 0
    told = capsys.readouterr().out
    assert re.fullmatch(
        rf"{store}: would give up logits of the first build and free \d+\.\d kB in \d+ objects; left would be "
        r"hidden 2, .*attention 3. Nothing was changed\n",
        told,
    )
    assert kdcache.main(["drop", store, "--targets", "hidden"]) == 1
    error = capsys.readouterr().err
    assert (
        error.startswith(f"kdcache: '{store}': hidden 2 (") and "is read with it" in error and "Traceback" not in error
    )
    assert kdcache.main(["drop", store, "--targets", "logits", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["given_up"] == {"the first build": ["logits"]} and "logits" not in found["left"]
    assert found["freed_bytes"] > 1000 and found["freed_objects"] > 10
    assert kdcache.main(["verify", store]) == 0
    assert kdcache.main(["info", store]) == 0
    assert "logits" not in capsys.readouterr().out


@pytest.mark.parametrize(
    "flags, code, told",
    [
        ([], 1, "give --targets or --extension"),
        (["--targets", "logits", "--extension", "1"], 1, "leave one out"),
        (["--targets", "lojits"], 1, "did you mean logits"),
        (["--extension", "x"], 2, "--extension"),
        (["--targets", "logits"], 1, "no store at"),
    ],
)
def test_what_cannot_be(
    flags: list[str], code: int, told: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    try:
        found = kdcache.main(["drop", str(tmp_path / "nothing.zarr"), *flags])
    except SystemExit as leaving:
        found = int(leaving.code or 0)
    assert found == code and told in capsys.readouterr().err
    assert not (tmp_path / "nothing.zarr").exists()
