"""Runs builds and imports in processes of their own at the cost of a fork: all is loaded, and nothing is started.

A script, started warm: orders are lines of JSON on standard input, answers on standard output. `start` forks a build
and answers its process number; `wait` answers how that process ended. Torch has one thread in all of them, so that they
give the same bits as each other. A build prints how many file operations it made, or what stopped it, to the file it is
told.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from typing import Any

import torch

from teacher_cache.build.build import build_cache
from teacher_cache.build.settings import BuildSettings
from teacher_cache.errors import DistillationError
from teacher_cache.importing.importing import import_store
from teacher_cache.importing.settings import ImportSettings

REFUSED = 9


def serve() -> None:
    torch.set_num_threads(1)
    answer = os.fdopen(os.dup(1), "w")
    print(os.getpid(), file=answer, flush=True)  # what follows is quick
    for line in sys.stdin:
        order = json.loads(line)
        print(start(order) if order["do"] == "start" else wait(order["process"]), file=answer, flush=True)


def start(order: dict[str, Any]) -> int:
    process = os.fork()
    if process:
        return process
    code = 1
    try:
        output = os.open(order["output"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        os.dup2(output, 1)
        os.dup2(output, 2)
        code = build(order)
    finally:
        sys.stdout.flush()
        os._exit(code)


def wait(process: int) -> int:
    return os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])


def read_settings(fields: dict[str, Any]) -> BuildSettings | ImportSettings:
    """Of a build, or of an import, which has sources."""
    if "source" in fields:
        return ImportSettings(**{**fields, "source": tuple(fields["source"])})
    return BuildSettings(**{**fields, "corpus": tuple(fields["corpus"])})


def build(order: dict[str, Any]) -> int:
    settings, seen = read_settings(order["settings"]), 0

    def count(event: str, arguments: tuple[Any, ...]) -> None:
        nonlocal seen
        if event in ("open", "os.rename", "os.mkdir", "os.remove") and any(settings.out in str(a) for a in arguments):
            seen += 1
            if seen == order["kill_before"]:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(count)
    try:
        import_store(settings) if isinstance(settings, ImportSettings) else build_cache(settings)
    except DistillationError as error:
        print(error)
        return REFUSED
    print(seen)
    return 0


if __name__ == "__main__":
    serve()
