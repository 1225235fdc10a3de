"""`kdcache plan` as a user meets it."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest

from cli import kdcache

pytestmark = pytest.mark.usefixtures("time_to_try")


@pytest.fixture(scope="module")
def arguments(tiny_teacher: Callable[..., Path], tiny_corpus: Path) -> list[str]:
    return ["--teacher", str(tiny_teacher("bert")), "--corpus", str(tiny_corpus), "--seq-len", "16", "--max-rows", "80"]


def test_plan_build_plan(arguments: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flags = [*arguments, "--out", str(tmp_path / "cache.zarr")]
    assert kdcache.main(["plan", *flags]) == 0
    printed = capsys.readouterr()
    assert "a new store" in printed.out
    assert re.search(r"hidden 2 +\d+\.\d\d +\d+\.\d kB  plain view, nmse:0.01", printed.out)
    assert re.search(r"attention 3 +shared", printed.out)
    assert "it fits" in printed.out and re.search(r"based on +64 rows", printed.out)
    assert "trying 64 rows" in printed.err
    assert not (tmp_path / "cache.zarr").exists()
    assert kdcache.main(["build", *flags]) == 0
    printed = capsys.readouterr()
    assert re.search(r"to write: \d+\.\d kB for 80 rows \(\d+\.\d bytes/token\); .* free; about \d+ s", printed.err)
    assert kdcache.main(["plan", *flags]) == 0
    assert "complete already" in capsys.readouterr().out


def test_for_machines(arguments: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The flags of a build, from a file too."""
    (tmp_path / "build.yaml").write_text("precision: float16\nforce: true\n", encoding="utf-8")
    out = str(tmp_path / "cache.zarr")
    assert kdcache.main(["plan", *arguments, "--out", out, "--config", str(tmp_path / "build.yaml"), "--json"]) == 0
    plan = json.loads(capsys.readouterr().out)
    assert (plan["state"], plan["fits"], plan["manifest"]["rows"]) == ("new", True, 80)
    (group,) = plan["groups"]
    assert group["targets"]["hidden 2"] == "plain view, float16"
    assert group["bytes_per_token"]["hidden/2/codes"] * group["tokens"] == group["bytes_per_array"]["hidden/2/codes"]
    assert plan["total_bytes"] == plan["other_bytes"] + group["total_bytes"]
    assert plan["seconds"] > 0


def test_what_a_build_refuses_a_plan_refuses(
    arguments: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert kdcache.main(["plan", *arguments, "--layers", "2,77", "--out", str(tmp_path / "cache.zarr")]) == 1
    assert "layer 77" in capsys.readouterr().err
