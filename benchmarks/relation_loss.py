"""Time and extra peak memory of the relation loss with its gradient: materialised, compiled, chunked, Triton kernel.

    python benchmarks/relation_loss.py                                        # two CPU cores: a minute or two
    python benchmarks/relation_loss.py --device cuda                          # one GPU: 32 x 64 heads x 512, d = 16/12
    python benchmarks/relation_loss.py --device cuda --lengths 128,256,512,1024,2048,4096,8192

One step is the forward and backward pass of one relation, from the vectors to the gradient of the student's. The types
are those that training has: a float32 teacher, as the store decodes it, and a student in bfloat16 on a GPU, in float32
on a CPU. Variants:

- `materialised`: as MiniLMv2 is mostly written: the matrices of both sides, their softmax, and PyTorch's KL divergence;
- `compiled`: the same under torch.compile (GPU only);
- `chunked` and `triton`: the two backends of `student_train.kernels.relation_kl` that training uses;
- `chunked_causal` and `triton_causal`: the same with a causal mask, as decoders are trained with;
- `limit_6` and `limit_4` (GPU only): six or four exponentials for every pair of positions, in registers, and nothing
  else. No kernel that computes as many exponentials per pair can take less time. `limit_computed` is the time of four
  per pair by the number of multiprocessors, 16 exponentials a cycle in each, and the highest clock.

At every length the number of tokens is that of the first shape, so that memory in O(T) shows as a constant. Rounds go
through all variants in turn, so that a machine that is busy with something else slows all of them; medians count.
On a GPU a round times many calls one after another between two events, so that the device is never idle and what the
host takes to launch a kernel does not count. Extra memory is the highest resident size in a process of its own, or on a
GPU the most memory allocated, beyond what there was before the first step. `gradient_error` is |g - g64| / |g64|, g64
being the gradient of the plain formula in float64 on the same rounded vectors.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from record import print_record
from rich.console import Console
from rich.table import Table
from torch import Tensor

from student_train.kernels import relation_kl

DEFAULTS = {"cpu": (4, 64, 512), "cuda": (32, 64, 512)}
DTYPES = ("float32", "bfloat16", "float16")
BUSY_SECONDS = 0.05
"""How long a GPU is kept busy for one time."""
EXPONENTIALS_A_CYCLE = 16
"""Of a multiprocessor of compute capability 7.0 to 9.0 (CUDA programming guide, throughput of native instructions)."""
MOST_FOR_TRUTH = 1 << 30
"""Bytes of one float64 matrix of all pairs, above which no gradient error is computed."""

Loss = Callable[[Tensor, Tensor], Tensor]


def main() -> None:
    options = parse_options()
    if options.alone is not None:
        print(json.dumps(extra_bytes(options, options.alone, options.positions)))
        return
    results = [measure(options, positions) for positions in options.lengths]
    for result in results:
        Console(stderr=True).print(make_table(options, result))
    print_record(
        "relation_loss", **{key: value for key, value in vars(options).items() if key != "alone"}, results=results
    )


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu", choices=DEFAULTS)
    parser.add_argument("--dtype", choices=DTYPES, help="of the student (default: bfloat16 on a GPU, else float32)")
    parser.add_argument("--teacher-dtype", default="float32", choices=DTYPES)
    parser.add_argument("--variants", help="some of them, comma-separated (default: all)")
    parser.add_argument("--batch", type=int)
    parser.add_argument("--heads", type=int)
    parser.add_argument("--positions", type=int)
    parser.add_argument("--teacher-width", type=int, default=16)
    parser.add_argument("--student-width", type=int, default=12)
    parser.add_argument("--lengths", help="positions, comma-separated, all with as many tokens (default: --positions)")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--here", action="store_true", help="no process for each memory: what it has had before counts")
    parser.add_argument("--alone", help="measure the memory of this variant here and print it")
    options = parser.parse_args()
    batch, heads, positions = DEFAULTS[options.device]
    options.dtype = options.dtype or ("bfloat16" if options.device == "cuda" else "float32")
    options.batch, options.heads = options.batch or batch, options.heads or heads
    options.positions = options.positions or positions
    options.lengths = [int(each) for each in options.lengths.split(",")] if options.lengths else [options.positions]
    options.variants = options.variants.split(",") if options.variants else None
    options.tokens = options.batch * positions if options.alone is None else options.batch * options.positions
    return options


def variants(options: argparse.Namespace) -> dict[str, Loss]:
    losses: dict[str, Loss] = {"materialised": materialised}
    if options.device == "cuda":
        # for each shape by itself, however many there are: beyond a limit it would not be compiled any more
        torch._dynamo.config.recompile_limit = 64
        losses["compiled"] = torch.compile(materialised, dynamic=False)
    losses["chunked"] = lambda teacher, student: relation_kl(teacher, student, backend="chunked")
    losses["chunked_causal"] = lambda teacher, student: relation_kl(teacher, student, causal=True, backend="chunked")
    if options.device == "cuda":
        losses["triton"] = lambda teacher, student: relation_kl(teacher, student, backend="triton")
        losses["triton_causal"] = lambda teacher, student: relation_kl(teacher, student, causal=True, backend="triton")
    return {name: loss for name, loss in losses.items() if options.variants is None or name in options.variants}


def materialised_causal(teacher_BATd: Tensor, student_BATd: Tensor) -> Tensor:
    return relation_kl(teacher_BATd, student_BATd, causal=True, backend="reference")


def materialised(teacher_BATd: Tensor, student_BATd: Tensor) -> Tensor:
    teacher_BATT, student_BATT = (
        (vectors @ vectors.transpose(-1, -2)).to(torch.promote_types(vectors.dtype, torch.float32))
        / math.sqrt(vectors.shape[-1])
        for vectors in (teacher_BATd, student_BATd)
    )
    kl = torch.nn.functional.kl_div(student_BATT.log_softmax(-1), teacher_BATT.softmax(-1), reduction="sum")
    return kl / math.prod(student_BATT.shape[:3])


def make_vectors(options: argparse.Namespace, positions: int) -> tuple[Tensor, Tensor]:
    batch = max(1, options.tokens // positions)
    generator = torch.Generator().manual_seed(0)
    teacher, student = (
        torch.randn(batch, positions, options.heads, width, generator=generator)
        .to(options.device, getattr(torch, dtype))
        .transpose(1, 2)
        for width, dtype in ((options.teacher_width, options.teacher_dtype), (options.student_width, options.dtype))
    )
    return teacher, student.requires_grad_()


def measure(options: argparse.Namespace, positions: int) -> dict[str, Any]:
    teacher, student = make_vectors(options, positions)
    losses = variants(options)
    limits = exponentials(student, positions) if options.device == "cuda" else {}
    found: dict[str, dict[str, Any]] = {}
    for name in losses:
        found[name] = {"extra_bytes": memory_of(options, name, positions)}
        if found[name]["extra_bytes"] is None:
            print(f"{name} at {positions} positions: not enough memory", file=sys.stderr)
    able = {name: loss for name, loss in losses.items() if found[name]["extra_bytes"] is not None}
    errors = gradient_errors(able, teacher, student)
    seconds: dict[str, list[float]] = {name: [] for name in (*able, *limits)}
    for _ in range(options.rounds):
        for name, loss in able.items():
            seconds[name].append(timed(lambda loss=loss: step(loss, teacher, student), options.device))
        for name, run in limits.items():
            seconds[name].append(timed(run, options.device))
    for name, times in seconds.items():
        found.setdefault(name, {})["seconds"] = statistics.median(times)
        found[name]["gradient_error"] = errors.get(name)
    if options.device == "cuda":
        found["limit_computed"] = {"seconds": exponential_limit(student)}
    return {"positions": positions, "batch": len(student), "variants": found}


def step(loss: Loss, teacher: Tensor, student: Tensor) -> Tensor:
    student.grad = None
    loss(teacher, student).backward()
    assert student.grad is not None
    return student.grad


def timed(run: Callable[[], object], device: str) -> float:
    """Seconds of one call; on a GPU of one among many that follow one another."""
    if device == "cuda":
        run()
        once = seconds_of_calls(run, 1)
        return seconds_of_calls(run, min(500, max(3, math.ceil(BUSY_SECONDS / max(once, 1e-6)))))
    started = time.perf_counter()
    run()
    return time.perf_counter() - started


def seconds_of_calls(run: Callable[[], object], calls: int) -> float:
    """Seconds of each of so many calls, by the clock of the device."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    start.record()
    for _ in range(calls):
        run()
    end.record()
    torch.cuda.synchronize()
    return start.elapsed_time(end) / 1000 / calls


def exponential_limit(student_BATd: Tensor) -> float:
    """Seconds of four exponentials for every pair, by the device's data sheet."""
    batch, heads, positions, _ = student_BATd.shape
    multiprocessors, hertz = multiprocessors_and_clock(student_BATd.device.index or 0)
    return 4 * batch * heads * positions**2 / (multiprocessors * EXPONENTIALS_A_CYCLE * hertz)


def multiprocessors_and_clock(device: int) -> tuple[int, float]:
    """Their number and the highest clock in Hz, as the driver tells them."""
    from triton.runtime import driver

    told = driver.active.utils.get_device_properties(device)
    return told["multiprocessor_count"], 1000.0 * told["sm_clock_rate"]


def memory_of(options: argparse.Namespace, name: str, positions: int) -> int | None:
    """Extra peak memory of one step in bytes, None where there is not enough."""
    if options.device == "cuda" or options.here:
        try:
            return extra_bytes(options, name, positions)
        except torch.OutOfMemoryError:
            return None
    batch = max(1, options.tokens // positions)
    command = [sys.executable, __file__, "--alone", name, "--batch", str(batch), "--heads", str(options.heads)]
    command += ["--positions", str(positions), "--dtype", options.dtype, "--teacher-dtype", options.teacher_dtype]
    command += ["--teacher-width", str(options.teacher_width), "--student-width", str(options.student_width)]
    done = subprocess.run(command, check=False, stdout=subprocess.PIPE, text=True)
    return int(json.loads(done.stdout)) if done.returncode == 0 else None


def extra_bytes(options: argparse.Namespace, name: str, positions: int) -> int:
    teacher, student = make_vectors(options, positions)
    loss = variants(options)[name]
    # what is loaded or compiled at the first call is not the loss's
    small = [vectors[:1, :1, :16].detach().clone() for vectors in (teacher, student)]
    step(loss, small[0], small[1].requires_grad_())
    if options.device == "cuda":
        step(loss, teacher, student)
        student.grad = None
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        step(loss, teacher, student)
        return torch.cuda.max_memory_allocated() - before
    before = highest_resident()
    step(loss, teacher, student)
    return highest_resident() - before


def highest_resident() -> int:
    """Bytes. Not by getrusage, which counts the process that started this one too."""
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith("VmHWM"))


def gradient_errors(losses: dict[str, Loss], teacher: Tensor, student: Tensor) -> dict[str, float]:
    batch, heads, positions, _ = student.shape
    if 8 * batch * heads * positions**2 > MOST_FOR_TRUTH:
        batch = max(1, MOST_FOR_TRUTH // (8 * heads * positions**2))
    if 8 * batch * heads * positions**2 > 4 * MOST_FOR_TRUTH:
        return {}
    few = teacher[:batch], student[:batch].detach()
    expected_of = {
        formula: step(formula, few[0].double(), few[1].double().requires_grad_())
        for formula in (materialised, materialised_causal)
    }
    found = {}
    for name, loss in losses.items():
        expected = expected_of[materialised_causal if name.endswith("_causal") else materialised]
        gradient = step(loss, few[0], few[1].clone().requires_grad_()).double()
        found[name] = float((gradient - expected).norm() / expected.norm())
    return found


def exponentials(student: Tensor, positions: int) -> dict[str, Callable[[], object]]:
    """So many exponentials for every pair, in a Triton kernel that reads and writes next to nothing."""
    import triton
    import triton.language as tl

    @triton.jit
    def only_exponentials(out, repeats, BLOCK: tl.constexpr):
        values = tl.arange(0, BLOCK).to(tl.float32) * -1e-3 + tl.program_id(0) * -1e-6
        for _ in range(repeats):
            values = tl.exp2(values) - 1.0
        tl.store(out + tl.program_id(0), tl.sum(values))

    block, programs = 4096, 16384
    out = torch.empty(programs, device=student.device)
    pairs = student.shape[0] * student.shape[1] * positions**2

    def run(count: int) -> Callable[[], object]:
        repeats = max(1, round(count * pairs / (block * programs)))
        return lambda: only_exponentials[(programs,)](out, repeats, BLOCK=block, num_warps=8)

    return {"limit_6": run(6), "limit_4": run(4)}


def make_table(options: argparse.Namespace, result: dict[str, Any]) -> Table:
    found, tokens = result["variants"], result["batch"] * result["positions"]
    plain = found.get("materialised", {})
    title = (
        f"{result['batch']} rows x {options.heads} heads x {result['positions']} positions, "
        f"d = {options.teacher_width}/{options.student_width}, {options.teacher_dtype}/{options.dtype}"
    )
    columns = ("variant", "ms", "speed", "extra peak MiB", "bytes/token", "memory", "gradient error")
    table = Table(*columns, title=title)
    for name, figures in found.items():
        extra, seconds, error = (figures.get(key) for key in ("extra_bytes", "seconds", "gradient_error"))
        table.add_row(
            name,
            "-" if seconds is None else f"{1000 * seconds:,.2f}",
            "-" if seconds is None or plain.get("seconds") is None else f"{plain['seconds'] / seconds:.2f}x",
            "-" if extra is None else f"{extra / 2**20:,.1f}",
            "-" if extra is None else f"{extra / tokens:,.0f}",
            "-" if not extra or not plain.get("extra_bytes") else f"1/{plain['extra_bytes'] / extra:,.1f}",
            "-" if error is None else f"{error:.1e}",
        )
    return table


if __name__ == "__main__":
    main()
