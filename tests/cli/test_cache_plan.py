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
    assert plan["seconds"] > 0 and plan["tokens"] == group["tokens"] == 80 * 16
    assert plan["total_objects"] == plan["other_objects"] + group["objects"] and plan["memory_bytes"] > 50_000_000
    assert (plan["price"], plan["profile"], plan["flops"]) == (None, None, None)


def test_a_price_by_the_rates_of_another_device(
    arguments: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    profile, out = tmp_path / "gpu.json", str(tmp_path / "cache.zarr")
    rates = {"forward_flops_per_second": 1e6, "training_flops_per_second": 1e6}
    profile.write_text(
        json.dumps({"format": "kdcache-profile", "name": "a GPU", "device": "cuda", "dtype": "bfloat16", **rates})
    )
    flags = ["plan", *arguments, "--out", out, "--profile", str(profile), "--price-per-hour", "36"]
    assert kdcache.main([*flags, "--json"]) == 0
    plan = json.loads(capsys.readouterr().out)
    # 4 layers of 32 x 32 and 32 x 64, a multiplication and an addition each, two views of each row; and what codes it
    layers = 2 * 4 * (4 * 32 * 32 + 2 * 32 * 64)
    assert plan["flops"] > 2 * 80 * 16 * layers
    assert plan["flops"] < 8 * 2 * 80 * 16 * layers
    assert plan["profile_seconds"] == plan["flops"] / 1e6 and plan["price"] == pytest.approx(
        plan["profile_seconds"] / 100
    )
    assert kdcache.main(flags) == 0
    told = capsys.readouterr().out
    assert re.search(
        r"there +about .* on a GPU in bfloat16, by the rates in .*packing and writing are taken to keep up", told
    )
    assert re.search(r"price +about [\d,.]+ at 36 an hour, for one worker", told)
    assert re.search(
        r"objects +\d+: as many requests to write them to a bucket; on a file system as many files, in", told
    )
    assert kdcache.main([*flags[:-2], "--price-per-hour=-1"]) == 1
    assert "is no price" in capsys.readouterr().err


def test_what_a_build_refuses_a_plan_refuses(
    arguments: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert kdcache.main(["plan", *arguments, "--layers", "2,77", "--out", str(tmp_path / "cache.zarr")]) == 1
    assert "layer 77" in capsys.readouterr().err
