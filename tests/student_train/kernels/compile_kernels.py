"""Compile the Triton kernels for a GPU that need not be there, and print a JSON line about each one's machine code.

    python compile_kernels.py 90 float32 bfloat16 24/24,64/64     # compute capability, types of both models, widths
    python compile_kernels.py 90 float32 bfloat16 24/24 causal segments     # with a mask

Counted is what `nvdisasm`, which comes with Triton, shows of the code that `ptxas` made: in each innermost loop that
takes exponentials, instructions of one thread per pair of positions that it computes, as [fewest, most] on any path
through the loop, and the exponentials among them. The fewest are those of tiles without a mask in gentle matrices, the
most those of masked tiles in steep ones. A pair of the symmetric backward pass is an unordered one. `stack` is what did
not fit into registers, in bytes per thread; `spilled` is how many instructions of these loops move it.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from student_train.kernels.fused import SYMMETRIC_FROM, Tiling, choose_plan, read_at_once, tile_width
from student_train.kernels.triton_gradient import relation_backward
from student_train.kernels.triton_relation import relation_forward

TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
TYPES = {"float32": "fp32", "bfloat16": "bf16", "float16": "fp16"}


def main() -> None:
    capability, teacher, student, widths, *masks = sys.argv[1:]
    for pair in widths.split(","):
        teacher_width, student_width = map(int, pair.split("/"))
        for symmetric in (False, True):
            matrices = SYMMETRIC_FROM if symmetric else 1
            plan = choose_plan(matrices, teacher_width, student_width, getattr(torch, student))
            kernels = [("symmetric" if symmetric else "rows", relation_backward, plan.backward)]
            if not symmetric:
                kernels.insert(0, ("forward", relation_forward, plan.forward))
            for name, kernel, tiling in kernels:
                constants = constants_of(teacher_width, student_width, teacher, student, tiling)
                constants |= {"SYMMETRIC": symmetric, "CAUSAL": "causal" in masks, "RANGES": "segments" in masks}
                compiled = compile_for(int(capability), kernel, teacher, student, constants, tiling)
                found = {"kernel": name, "widths": pair, "shared": compiled.metadata.shared}
                print(json.dumps(found | inspect(compiled, tiling)), flush=True)


def constants_of(
    teacher_width: int, student_width: int, teacher: str, student: str, tiling: Tiling
) -> dict[str, int | bool]:
    """What a launch has for vectors of adjacent heads."""
    return {
        "TEACHER_WIDTH": teacher_width,
        "STUDENT_WIDTH": student_width,
        "TEACHER_TILE": tile_width(teacher_width),
        "STUDENT_TILE": tile_width(student_width),
        "TEACHER_ALIGNED": read_at_once(getattr(torch, teacher), teacher_width),
        "STUDENT_ALIGNED": read_at_once(getattr(torch, student), student_width),
        "ROWS": tiling.rows,
        "COLUMNS": tiling.columns,
    }


def compile_for(
    capability: int, kernel: Any, teacher: str, student: str, constants: dict[str, int | bool], tiling: Tiling
) -> Any:
    options = {"num_warps": tiling.warps, "num_stages": tiling.stages}
    if tiling.registers:
        options["maxnreg"] = tiling.registers
    constants = {name: value for name, value in constants.items() if name in kernel.arg_names}
    return triton.compile(
        source(kernel, TYPES[teacher], TYPES[student], constants),
        target=GPUTarget("cuda", capability, 32),
        options=options,
    )


def source(kernel: Any, teacher: str, student: str, constants: dict[str, int | bool]) -> ASTSource:
    """What a launch would compile: pointers are multiples of 16, strides need not be."""
    types = {"teacher": f"*{teacher}", "lengths": "*i64", "begins": "*i32", "ends": "*i32", "are_gentle": "*i1"}
    types |= dict.fromkeys(("student", "gradient"), f"*{student}") | dict.fromkeys(constants, "constexpr")
    types |= dict.fromkeys(("teacher_scale", "student_scale", "factor"), "fp32")
    signature, attributes = {}, {}
    for index, argument in enumerate(kernel.arg_names):
        whole = argument in ("heads", "positions") or "stride" in argument
        signature[argument] = types.get(argument, "i32" if whole else "*fp32")
        if signature[argument].startswith("*"):
            attributes[(index,)] = [["tt.divisibility", 16]]
    indices = {(kernel.arg_names.index(constant),): value for constant, value in constants.items()}
    return ASTSource(kernel, signature, constexprs=indices, attrs=attributes)


def inspect(compiled: Any, tiling: Tiling) -> dict[str, Any]:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as cubin:
        cubin.write(compiled.asm["cubin"])
        cubin.flush()
        usage = run("cuobjdump", "--dump-resource-usage", cubin.name)
        code = run("nvdisasm", cubin.name)
    registers, stack = map(int, re.search(r"REG:(\d+) STACK:(\d+)", usage).groups())
    loops = [loop for loop in innermost_loops(code) if any("MUFU.EX2" in line for line in loop.instructions)]
    # the share of a thread
    pairs = tiling.rows * tiling.columns / (32 * tiling.warps)
    return {
        "registers": registers,
        "stack": stack,
        "spilled": sum(bool(re.search(r"\b(LDL|STL)\b", line)) for loop in loops for line in loop.instructions),
        "reads": sorted({found[0] for loop in loops for line in loop.instructions if (found := READ.search(line))}),
        "instructions": [[round(count / pairs, 2) for count in loop.paths(lambda _: True)] for loop in loops],
        "exponentials": [
            [round(count / pairs, 2) for count in loop.paths(lambda line: "MUFU.EX2" in line)] for loop in loops
        ],
    }


READ = re.compile(r"\b(LDG|LDGSTS)\.\S+")
JUMP = re.compile(r"\bBRA\b[^`]*`\(\.(L_x_\d+)\)")
LABEL = re.compile(r"\s*\.(L_x_\d+):")
INSTRUCTION = re.compile(r"\s*/\*[0-9a-f]{4,}\*/\s+(.*?);")


class Loop:
    """A loop without another one inside: its instructions, and where its jumps forward go to."""

    def __init__(self, instructions: list[str], targets: dict[int, int]) -> None:
        self.instructions, self.targets = instructions, targets

    def paths(self, counts: Callable[[str], bool]) -> tuple[int, int]:
        """How many instructions are counted on the paths from the first to the jump back: fewest and most."""
        reached = {0: (int(counts(self.instructions[0])),) * 2}
        last = len(self.instructions) - 1
        for place in range(last):
            if place not in reached:
                continue
            line, following = self.instructions[place], [place + 1]
            if place in self.targets:
                conditional = line.startswith("@") or bool(re.search(r"\bBRA\S* !?U?P\d", line))
                following = [self.targets[place]] + ([place + 1] if conditional else [])
            for target in following:
                one = int(counts(self.instructions[target]))
                low, high = (count + one for count in reached[place])
                before = reached.get(target, (low, high))
                reached[target] = min(low, before[0]), max(high, before[1])
        return reached[last]


def innermost_loops(code: str) -> list[Loop]:
    lines: list[str] = []
    labels: dict[str, int] = {}
    for line in code.splitlines():
        if label := LABEL.match(line):
            labels[label[1]] = len(lines)
        elif instruction := INSTRUCTION.match(line):
            lines.append(instruction[1])
    jumps = {place: labels[found[1]] for place, line in enumerate(lines) if (found := JUMP.search(line))}
    spans = [(start, end) for end, start in jumps.items() if start < end]
    inner = [one for one in spans if not any(one != (a, b) and one[0] <= a and b <= one[1] for a, b in spans)]
    return [
        Loop(lines[a : b + 1], {place - a: to - a for place, to in jumps.items() if a <= place < b and place < to <= b})
        for a, b in inner
    ]


def run(tool: str, *arguments: str) -> str:
    return subprocess.run([TOOLS / tool, *arguments], check=True, capture_output=True, text=True).stdout


if __name__ == "__main__":
    main()
