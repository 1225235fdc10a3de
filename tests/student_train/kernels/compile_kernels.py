"""Compile the Triton kernels for a GPU that need not be there, and print a JSON line about each one's machine code.

    python compile_kernels.py 90 bfloat16,float32 16 12     # compute capability 9.0, student's types, head widths
    python compile_kernels.py 90 bfloat16 16 12 causal segments    # with a mask

`stack` is what did not fit into registers, in bytes per thread; `exponentials` are those per pair of positions in each
loop of more than a few.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from student_train.kernels.fused import choose_tiling, tile_width
from student_train.kernels.triton_relation import relation_backward, relation_forward

TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
TYPES = {"float32": "fp32", "bfloat16": "bf16", "float16": "fp16"}


def main() -> None:
    capability, names, teacher_width, student_width, *masks = sys.argv[1:]
    for name in names.split(","):
        describe(int(capability), name, int(teacher_width), int(student_width), masks)


def describe(capability: int, name: str, teacher_width: int, student_width: int, masks: list[str]) -> None:
    tiling = choose_tiling(max(teacher_width, student_width), getattr(torch, name))
    constants = {
        "TEACHER_WIDTH": teacher_width,
        "STUDENT_WIDTH": student_width,
        "TEACHER_TILE": tile_width(teacher_width),
        "STUDENT_TILE": tile_width(student_width),
        "ROWS": tiling.rows,
        "COLUMNS": tiling.columns,
        "CAUSAL": "causal" in masks,
        "RANGES": "segments" in masks,
    }
    for kernel in (relation_forward, relation_backward):
        compiled = triton.compile(
            source(kernel, TYPES[name], constants),
            target=GPUTarget("cuda", capability, 32),
            options={"num_warps": tiling.warps, "num_stages": tiling.stages},
        )
        pairs = tiling.rows * tiling.columns / (32 * tiling.warps)
        code = {"kernel": kernel.__name__, "type": name, "shared": compiled.metadata.shared} | inspect(compiled, pairs)
        print(json.dumps(code))


def source(kernel: Any, student: str, constants: dict[str, int | bool]) -> ASTSource:
    """What a launch with contiguous tensors would compile."""
    vectors = dict.fromkeys(("teacher", "student", "gradient"), f"*{student}")
    types = vectors | {"lengths": "*i64", "begins": "*i32", "ends": "*i32"} | dict.fromkeys(constants, "constexpr")
    types |= dict.fromkeys(("teacher_scale", "student_scale", "factor"), "fp32")
    signature, attributes = {}, {}
    for index, argument in enumerate(kernel.arg_names):
        whole = argument in ("heads", "positions") or "stride" in argument
        signature[argument] = types.get(argument, "i32" if whole else "*fp32")
        if signature[argument].startswith("*"):
            attributes[(index,)] = [["tt.divisibility", 16]]
    indices = {(kernel.arg_names.index(constant),): value for constant, value in constants.items()}
    return ASTSource(kernel, signature, constexprs=indices, attrs=attributes)


def inspect(compiled: Any, pairs: float) -> dict[str, Any]:
    """Registers, stack and loops; `pairs` is the share of a thread."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as cubin:
        cubin.write(compiled.asm["cubin"])
        cubin.flush()
        usage = run("cuobjdump", "--dump-resource-usage", cubin.name)
        lines = run("nvdisasm", cubin.name).splitlines()
    registers, stack = map(int, re.search(r"REG:(\d+) STACK:(\d+)", usage).groups())
    starts = {match[1]: number for number, line in enumerate(lines) if (match := re.match(r"\s*\.(L_x_\d+):", line))}
    exponentials = []
    for number, line in enumerate(lines):
        jump = re.search(r"BRA[^`]*`\(\.(L_x_\d+)\)", line)
        if jump and starts.get(jump[1], number) < number:
            counted = sum("MUFU.EX2" in inside for inside in lines[starts[jump[1]] : number])
            exponentials += [round(counted / pairs, 2)] if counted >= pairs else []
    return {"registers": registers, "stack": stack, "exponentials": exponentials}


def run(tool: str, *arguments: str) -> str:
    return subprocess.run([TOOLS / tool, *arguments], check=True, capture_output=True, text=True).stdout


if __name__ == "__main__":
    main()
