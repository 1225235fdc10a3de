"""`make gpu` from beginning to end: on the CPU at toy size, and on a GPU, where there is one, the proofs at full size.

What the command checks is what a GPU has to be tested for: kernels against float64, stores built on both devices, ten
steps of every method on both and in bfloat16, resuming, waits of the host, memory over blocks. So these parts are the
tests of a GPU, and the same code is known to work from the CPU.
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.warm.share import Warm

BENCHMARKS = Path(__file__).resolve().parents[1] / "benchmarks"
PROOFS = ("kernels", "stores", "steps", "resume", "waits", "memory")
SPEEDS = ("relation", "distribution", "build,train mha,train hs,train od", "train causal od")
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device")
Run = Callable[..., tuple[int, list[dict[str, Any]], str]]


@pytest.fixture(scope="module")
def gpu() -> Iterator[Any]:
    sys.path.insert(0, str(BENCHMARKS))
    import gpu

    yield gpu
    sys.path.remove(str(BENCHMARKS))


@pytest.fixture
def run(gpu: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Run:
    """`run(*flags, **options)`: exit code, what the JSON line says of each part, and the rest of what was said."""

    def run(*flags: str, **options: Any) -> tuple[int, list[dict[str, Any]], str]:
        code = gpu.main(["--scratch", str(tmp_path), *flags], **options)
        said = capsys.readouterr()
        return code, json.loads(said.out.splitlines()[-1])["parts"], said.err

    return run


@pytest.mark.timeout(600)
@pytest.mark.parametrize("parts", [*PROOFS, *SPEEDS])
@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=needs_gpu)])
def test_every_part_runs_and_nothing_is_wrong(run: Run, device: str, parts: str) -> None:
    sizes = ["--small", "--here"] if device == "cpu" else ["--small"] if parts in SPEEDS else []
    code, found, said = run("--device", device, "--parts", parts, *sizes)
    assert [(part["part"], part["error"]) for part in found] == [(name, None) for name in parts.split(",")]
    for line in (line for part in found for line in part["lines"]):
        assert line["value"] is None or math.isfinite(line["value"]), line
        assert line["most"] is None or line["value"] <= line["most"], line
        assert line["what"].split()[0] in said
    assert code == 0 and all(part["lines"] for part in found)


def test_every_part_is_tested(gpu: Any) -> None:
    assert [name for parts in (*PROOFS, *SPEEDS) for name in parts.split(",")] == list(gpu.PARTS)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_without_a_gpu_nothing_is_run(gpu: Any, capsys: pytest.CaptureFixture[str]) -> None:
    assert gpu.main([]) == 1
    said = capsys.readouterr()
    assert said.out == "" and said.err.count("\n") == 1
    assert "PyTorch sees no CUDA device here: nothing was run" in said.err and "--device cpu --small" in said.err


def test_what_fails_is_named_and_the_rest_runs(run: Run, warm: Warm) -> None:
    code, (failed, right), said = run(
        "--device", "cpu", "--small", "--parts", "train mha,kernels", python=warm.python
    )  # fmt: skip
    assert code == 1
    assert failed["lines"] == [] and "there is no store to train from" in failed["error"]
    assert right["error"] is None and len(right["lines"]) == 4
    assert "FAILED" in said and "there is no store" in said


def test_a_part_that_takes_too_long_is_stopped(run: Run, gpu: Any, warm: Warm, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu, "AT_LEAST", 0.0)
    monkeypatch.setitem(gpu.PARTS, "memory", (gpu.PARTS["memory"][0], 0.01))
    code, (stopped,), _ = run("--device", "cpu", "--small", "--parts", "memory", python=warm.python)
    assert code == 1 and stopped["error"].startswith("stopped after 0 s, its limit")
    code, (missed,), _ = run("--device", "cpu", "--small", "--parts", "kernels", "--minutes", "-1", python=warm.python)
    assert code == 1 and missed["error"].startswith("not begun: the time of all parts together is over")


@pytest.mark.parametrize("value", [2.0, math.nan, None])
def test_a_figure_beyond_what_it_may_be_is_wrong(
    run: Run, gpu: Any, monkeypatch: pytest.MonkeyPatch, value: Any
) -> None:
    def part(place: Any, tell: Any) -> None:
        tell(gpu.Line("a difference", value, "of it", 1.0))

    monkeypatch.setitem(gpu.PARTS, "kernels", (part, 1))
    code, (found,), said = run("--device", "cpu", "--small", "--here", "--parts", "kernels")
    assert code == 1 and found["error"] is None and not found["right"]
    assert "WRONG" in said


def test_differences_are_found(gpu: Any, tmp_path: Path) -> None:
    from gpu_checks import host_waits, relative, store_differences, worst_step
    from gpu_parts import Place

    place = Place(device="cpu", small=True, folder=tmp_path, python=())
    both = (place.toy_build(tmp_path / name, False, "cpu", precision=name) for name in ("float16", "int4"))
    found = {difference.what: difference for difference in store_differences(*both, most=1e-3)}
    assert [what for what, difference in found.items() if difference.holds] == ["token ids"]
    assert len(found) == 6
    assert worst_step([1.0, 2.2], [1.0, 2.0]) == pytest.approx(0.1)
    values = torch.arange(4.0)
    assert relative(values * 1.5, values) == pytest.approx(0.5)
    for run in (lambda: values[1].item(), lambda: values[values > 1], lambda: values.nonzero()):
        (wait,) = host_waits(run, "cpu")
        assert "test_gpu.py" in wait
    assert host_waits(lambda: torch.where(values > 1, values, 0).sum(), "cpu") == []
