"""`kdcache build` told to stop while it loads: whatever code runs at that moment, it stops, and prints no traceback.

One process imports what is slow, and each build is a fork of it, so that many moments can be tried. KDCACHE_FAULTS says
how many.
"""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Callable
from pathlib import Path

from tests.warm.share import Warm

MOMENTS = int(os.environ.get("KDCACHE_FAULTS", "4"))
STOPPER = """
import contextlib, json, os, signal, sys, time
import torch, transformers, datasets
from cli import kdcache

def start(flags, place):
    ready, told = os.pipe()
    process = os.fork()
    if process:
        os.close(told)
        os.read(ready, 1)
        return process
    code = 1
    try:
        output = os.open(place + ".txt", os.O_WRONLY | os.O_CREAT)
        os.dup2(output, 1)
        os.dup2(output, 2)
        with contextlib.suppress(KeyboardInterrupt):
            os.write(told, b"1")
            code = 130
            code = kdcache.main(["build", *flags, "--out", place])
    except SystemExit as leaving:
        code = leaving.code
    finally:
        with contextlib.suppress(BaseException):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(code)

torch.set_num_threads(1)
count, folder, flags = int(sys.argv[1]), sys.argv[2], sys.argv[3:]
began = time.monotonic()
assert os.waitpid(start(flags, folder + "/whole"), 0)[1] == 0, open(folder + "/whole.txt").read()
seconds = time.monotonic() - began
for number in range(count):
    place, wanted = f"{folder}/{number}", (signal.SIGTERM, signal.SIGINT)[number % 2]
    process = start(flags, place)
    time.sleep(seconds * (number + 0.5) / count)
    os.kill(process, wanted)
    code = os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])
    print(json.dumps([wanted, code, open(place + ".txt").read()]), flush=True)
"""


def test_a_signal_at_any_moment_of_loading_ends_a_build_without_a_traceback(
    tiny_teacher: Callable[..., Path], tiny_corpus: Path, warm: Warm, tmp_path: Path
) -> None:
    flags = ["--teacher", str(tiny_teacher()), "--corpus", str(tiny_corpus), "--seq-len", "24", "--max-rows", "16",
             "--k", "8", "--device", "cpu"]  # fmt: skip
    command = [*warm.python, "-c", STOPPER, str(MOMENTS), str(tmp_path), *flags]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    ended = [json.loads(line) for line in result.stdout.splitlines()]
    assert len(ended) == MOMENTS
    for place, (number, code, output) in enumerate(ended):
        what = f"moment {place}: signal {number}, exit {code}, {output}"
        assert "Traceback" not in output and "Exception ignored" not in output, what
        if code == 0:  # it was through already
            assert (tmp_path / str(place) / "seal.json").exists(), what
        elif number == 2:
            assert code == 130 and "interrupted" in output, what
        else:
            # before the command has begun the system ends the process
            assert code in (143, -15) and (code == -15 or "kdcache build: stopped" in output), what
    assert sum(code != 0 for _, code, _ in ended) >= MOMENTS / 2
