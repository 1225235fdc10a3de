"""What a GPU does with this code, by one command: is it right, and how fast is it?

    make gpu                                              # one GPU, at most nine minutes
    python benchmarks/gpu.py --parts kernels,steps        # some parts
    python benchmarks/gpu.py --device cpu --small         # on the CPU at toy size: shows that the command itself works

Nothing is downloaded, and teachers and text are random (`gpu_inputs.py`). In their order:

- `kernels`: the relation loss and its gradient against the formula in float64, by type, mask and widths of heads;
- `stores`: a float32 teacher's stores built on the CPU and on the GPU, decoded and compared;
- `steps`: ten steps of every method on both, in float32, and in bfloat16 on the GPU;
- `resume`: a training that goes on from a checkpoint against one that ran through;
- `waits`: how often the host waits for the GPU in the passes of a step;
- `memory`: whether the memory of a build, or of the training loader, grows from block to block;
- `relation`: one relation of 64 heads, d = 16/12, float32 teacher and bfloat16 student, at 128 to 8,192 positions:
  time, memory, ratios to the formula as it is mostly written and under torch.compile, and the share of the time that
  four exponentials for each pair take by the number of multiprocessors and the clock;
- `distribution`: the loss over 250,002 ids;
- `build`: a build from a random 24x1024 teacher at 512 positions against the bare teacher;
- `train mha`, `train hs`, `train od`, `train causal od`: a training step streamed from that store, with its targets on
  the device already, with the teacher in the loop, and of the student alone (6x768; a decoder of 12x1024).

Each part runs in a process of its own with a time limit of its own. One that fails, or takes too long, is reported by
name with its error and what it had found; the others run. The table goes to standard error, a JSON line to standard
output. Exit code 1: a part failed, or the GPU computes something else than the CPU.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from gpu_checks import environment_of
from gpu_parts import PARTS, Line, Place, print_lines
from record import print_record
from rich.console import Console
from rich.table import Table

MINUTES = 8.8
"""With the start of this process nine at most."""
AT_LEAST = 5.0
"""Seconds that must be left for a part to begin."""
LAST_WORDS = 1500
"""Characters that are kept of what a part said before it failed."""


def main(arguments: Sequence[str] | None = None, python: Sequence[str] = (sys.executable,)) -> int:
    """`python` starts a process that runs Python."""
    options = parse_options(arguments)
    if options.device == "cuda" and not torch.cuda.is_available():
        print(
            "gpu.py measures on a GPU, and PyTorch sees no CUDA device here: nothing was run. `make gpu-wheels` makes "
            "what a machine with one needs; --device cpu --small shows on this one that the command works",
            file=sys.stderr,
        )
        return 1
    with tempfile.TemporaryDirectory(dir=options.scratch) as scratch:
        started = () if options.here else python
        place = Place(device=options.device, small=options.small, folder=Path(options.work or scratch), python=started)
        if options.part is not None:
            print_lines(options.part, place)
            return 0
        ends = time.monotonic() + 60 * options.minutes
        found = [run_here(name, place) if options.here else run_apart(name, place, ends) for name in options.parts]
    Console(stderr=True, width=120).print(make_table(found))
    print_record("gpu", device=options.device, small=options.small, driver=describe_driver(), parts=found)
    return 0 if all(part["error"] is None and part["right"] for part in found) else 1


def parse_options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--small", action="store_true", help="toy sizes, whose speeds mean nothing")
    parser.add_argument("--parts", help=f"some of: {', '.join(PARTS)} (default: all)")
    parser.add_argument("--minutes", type=float, default=MINUTES, help="when these are over no part goes on")
    parser.add_argument("--scratch", help="folder for stores (default: the system's temporary folder)")
    parser.add_argument("--here", action="store_true", help="all in this process: no time limits, and a crash ends all")
    parser.add_argument("--part", choices=PARTS, help="run this part here and print its lines")
    parser.add_argument("--work", help="with --part: the folder that parts share")
    options = parser.parse_args(arguments)
    options.parts = list(PARTS) if options.parts is None else options.parts.split(",")
    if unknown := set(options.parts) - set(PARTS):
        parser.error(f"--parts: there is no {', '.join(sorted(unknown))}, only {', '.join(PARTS)}")
    return options


def run_here(name: str, place: Place) -> dict[str, Any]:
    lines: list[Line] = []
    started, error = time.monotonic(), None
    try:
        PARTS[name][0](place, lines.append)
    except (Exception, SystemExit) as failure:  # noqa: BLE001 - the other parts are to run
        error = f"{type(failure).__name__}: {failure}"
    return result_of(name, lines, error, time.monotonic() - started)


def run_apart(name: str, place: Place, ends: float) -> dict[str, Any]:
    """The lines of a part that runs in a process of its own, and what went wrong, if anything."""
    limit, started = min(PARTS[name][1], ends - time.monotonic()), time.monotonic()
    if limit < AT_LEAST:
        return result_of(name, [], "not begun: the time of all parts together is over", 0.0)
    print(f"{name} ...", file=sys.stderr, flush=True)
    command = [*place.python, str(Path(__file__).resolve()), "--part", name, "--device", place.device]
    command += ["--work", str(place.folder), *(["--small"] if place.small else [])]
    out, said = (place.folder / f"{name}.{end}" for end in ("lines", "said"))
    with out.open("w") as stdout, said.open("w") as stderr:
        process = subprocess.Popen(
            command, stdout=stdout, stderr=stderr, env=environment_of(place.device), start_new_session=True
        )
        try:
            code = process.wait(limit)
            error = None if code == 0 else f"ended with {code}: {last_words(said)}"
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)  # the group that it began: its own trainings are in it
            process.wait()
            error = f"stopped after {limit:.0f} s, its limit; it last said: {last_words(said)}"
    return result_of(name, read_lines(out), error, time.monotonic() - started)


def result_of(name: str, lines: list[Line], error: str | None, seconds: float) -> dict[str, Any]:
    return {
        "part": name,
        "seconds": round(seconds, 1),
        "error": error,
        "right": all(line.holds for line in lines),
        "lines": [vars(line) for line in lines],
    }


def read_lines(path: Path) -> list[Line]:
    """What is no line of a part was printed by something below it."""
    found = []
    for text in path.read_text(encoding="utf-8").splitlines():
        try:
            found.append(Line(**json.loads(text)))
        except (ValueError, TypeError):
            continue
    return found


def last_words(path: Path) -> str:
    return path.read_text(encoding="utf-8", errors="replace").strip()[-LAST_WORDS:]


def make_table(found: Sequence[dict[str, Any]]) -> Table:
    table = Table("part", "what", "figure", "unit", "at most", title=describe_versions())
    table.columns[2].justify = table.columns[4].justify = "right"
    for part in found:
        name = f"{part['part']} ({part['seconds']:.0f} s)"
        for values in part["lines"]:
            line = Line(**values)
            figure = (
                "not known"
                if line.value is None
                else f"{line.value:,.4g}"
                if line.value < 1e4
                else f"{line.value:,.0f}"
            )
            most = "" if line.most is None else f"{line.most:g}" if line.holds else f"{line.most:g}: WRONG"
            table.add_row(name, line.what, figure, line.unit, most)
            name = ""
        if part["error"] is not None:
            table.add_row(name, "[red]FAILED[/red]", "", "", "")
            table.add_row("", part["error"].replace("[", r"\["), "", "", "")
        table.add_section()
    return table


def describe_driver() -> dict[str, Any]:
    """Of the GPU and what drives it."""
    if not torch.cuda.is_available():
        return {}
    import triton
    from relation_loss import multiprocessors_and_clock

    multiprocessors, hertz = multiprocessors_and_clock(0)
    return {
        "name": torch.cuda.get_device_name(0),
        "capability": list(torch.cuda.get_device_capability(0)),
        "memory_gib": round(torch.cuda.get_device_properties(0).total_memory / 2**30, 1),
        "multiprocessors": multiprocessors,
        "clock_mhz": round(hertz / 1e6),
        "cuda": torch.version.cuda,
        "triton": triton.__version__,
    }


def describe_versions() -> str:
    driver = describe_driver()
    names = {"torch": torch.__version__, **{name: driver[name] for name in ("cuda", "triton") if name in driver}}
    device = f"{driver['name']}, {driver['multiprocessors']} x {driver['clock_mhz']} MHz" if driver else "CPU"
    return f"{device}; " + ", ".join(f"{name} {version}" for name, version in names.items())


if __name__ == "__main__":
    raise SystemExit(main())
