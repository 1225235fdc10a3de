"""Time and extra peak memory of the output-distribution loss with its gradient: all logits at once, or a few at a time.

    python benchmarks/distribution_loss.py                      # 250,002 ids, 64 rows x 77 masked positions, width 384

One step is the forward and backward pass of the loss of the teacher's K most probable ids and the tail, from the input
of the head's last linear map to the gradients of that input, of the map's weight and of its bias:

- `materialised`: the formula in plain PyTorch on the logits of all positions, in the form that takes least time and
  memory (the student's tail as 1 - sum q, which is exact to 1e-7 only);
- `projected`: what training does;
- `recomputed`: what training does where a head cannot be split, by gradient checkpointing.

Each runs in a process of its own. Extra memory is the highest resident size, or on a GPU the most memory allocated,
beyond what there was before the first step. On a CPU the materialised loss of the default size takes 15 GB: where the
memory is not there, nothing is run, and fewer --positions make it smaller.
"""

from __future__ import annotations

import argparse
import json
import resource
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

from student_train.losses.distributions import TopkTargets
from student_train.losses.vocabulary import LOGITS_AT_A_TIME, LogitsTerm, projected_losses, recomputed_losses

_TIMES_ALL_LOGITS = 4
"""Tensors of all logits that the materialised loss may hold at once, some room included."""


def main() -> None:
    options = parse_options()
    if options.one is not None:
        print(json.dumps(measure(options)))
        return
    check_memory(options)
    found = {name: run_alone(name) for name in LOSSES}
    plain = found["materialised"]
    table = Table("loss", "seconds", "extra peak MiB", "speed", "memory")
    for name, result in found.items():
        result["speed"] = plain["seconds"] / result["seconds"]
        result["memory"] = result["extra_bytes"] / plain["extra_bytes"]
        cells = f"{result['seconds']:.3g}", f"{result['extra_bytes'] / 2**20:,.0f}"
        table.add_row(name, *cells, f"{result['speed']:.2f}x", f"1/{1 / result['memory']:.1f}")
    Console(stderr=True).print(table)
    print_record("distribution_loss", **{k: v for k, v in vars(options).items() if k != "one"}, losses=found)


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--vocabulary", type=int, default=250_002)
    parser.add_argument("--positions", type=int, default=4_928)
    parser.add_argument("--width", type=int, default=384)
    parser.add_argument("--k", type=int, default=64)
    parser.add_argument("--steps", type=int, default=2, help="timed steps, after one that is not; the fastest counts")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"))
    parser.add_argument("--logits-at-a-time", type=int, default=LOGITS_AT_A_TIME)
    parser.add_argument("--one", choices=LOSSES, help="measure this one here and print it as JSON")
    return parser.parse_args()


def check_memory(options: argparse.Namespace) -> None:
    if options.device != "cpu":
        return
    needed = _TIMES_ALL_LOGITS * 4 * options.vocabulary * options.positions
    lines = Path("/proc/meminfo").read_text(encoding="utf-8").splitlines()
    available = next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable"))
    if available < needed:
        sys.exit(f"needs {needed / 2**30:.1f} GiB of memory and {available / 2**30:.1f} are free: lower --positions")


def run_alone(name: str) -> dict[str, Any]:
    command = [sys.executable, *sys.argv, "--one", name]
    print(name, file=sys.stderr, flush=True)
    result: dict[str, Any] = json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout)
    return result


def measure(options: argparse.Namespace) -> dict[str, Any]:
    torch.manual_seed(0)
    device = torch.device(options.device)
    shapes = (options.positions, options.width), (options.vocabulary, options.width), (options.vocabulary,)
    dtype = getattr(torch, options.dtype)
    inputs = [torch.empty(shape, device=device, dtype=dtype).normal_(std=0.1).requires_grad_() for shape in shapes]
    targets = make_targets(options, device)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    before = peak_bytes(device)

    def step() -> Tensor:
        for each in inputs:
            each.grad = None
        loss = LOSSES[options.one](*inputs, targets, options.logits_at_a_time)
        loss.backward()
        return loss.detach()

    total = step().item()
    seconds = [timed(step, 4 if device.type == "cuda" else 1) for _ in range(options.steps)]
    return {"seconds": min(seconds), "extra_bytes": peak_bytes(device) - before, "loss": total}


def timed(step: Callable[[], Tensor], steps: int) -> float:
    """Seconds of a step among so many that follow one another."""
    started = time.perf_counter()
    for _ in range(steps):
        loss = step()
    loss.item()  # waits for the device
    return (time.perf_counter() - started) / steps


def make_targets(options: argparse.Namespace, device: torch.device) -> TopkTargets:
    """A distribution that falls like 1 / rank, with a fifth of its mass outside the kept ids."""
    positions, k = options.positions, options.k
    first_P1 = torch.randint(options.vocabulary - k, (positions, 1))
    probs_K = 1 / torch.arange(1, k + 1)
    probs_K *= 0.8 / probs_K.sum()
    return TopkTargets(
        (first_P1 + torch.arange(k)).int().to(device),
        probs_K.log().repeat(positions, 1).to(device),
        torch.full((positions,), 0.2).log().to(device),
        torch.ones(positions, dtype=torch.bool, device=device),
    )


def materialised(hidden_PD: Tensor, weight_VD: Tensor, bias_V: Tensor, targets: TopkTargets, _: int) -> Tensor:
    log_q_PV = torch.nn.functional.linear(hidden_PD, weight_VD, bias_V).log_softmax(1, dtype=torch.float32)
    log_q_PK = log_q_PV.gather(1, targets.ids_PK.long())
    log_q_rest_P = torch.log1p(-log_q_PK.exp().sum(1).clamp(max=1 - 1e-7))
    kept = targets.log_probs_PK.exp() * (targets.log_probs_PK - log_q_PK)
    rest = targets.log_tail_P.exp() * (targets.log_tail_P - log_q_rest_P)
    return kept.sum() + rest.sum()


def projected(
    hidden_PD: Tensor, weight_VD: Tensor, bias_V: Tensor, targets: TopkTargets, logits_at_a_time: int
) -> Tensor:
    terms = [LogitsTerm(targets, 1.0, 1.0)]
    return projected_losses(hidden_PD, weight_VD, bias_V, terms, logits_at_a_time=logits_at_a_time)[0]


def recomputed(
    hidden_PD: Tensor, weight_VD: Tensor, bias_V: Tensor, targets: TopkTargets, logits_at_a_time: int
) -> Tensor:
    def head(hidden_PD: Tensor) -> Tensor:
        return torch.nn.functional.linear(hidden_PD, weight_VD, bias_V)

    terms = [LogitsTerm(targets, 1.0, 1.0)]
    return recomputed_losses(head, hidden_PD, terms, vocab_size=len(weight_VD), logits_at_a_time=logits_at_a_time)[0]


LOSSES: dict[str, Callable[[Tensor, Tensor, Tensor, TopkTargets, int], Tensor]] = {
    "materialised": materialised,
    "projected": projected,
    "recomputed": recomputed,
}


def peak_bytes(device: torch.device) -> int:
    """The most memory that this process has had so far."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


if __name__ == "__main__":
    main()
