"""Who holds a lock that outlives its holder: a process, named so that others can tell whether it is certainly gone.

A process id means something on one machine alone, until its next start, and inside one container. So a holder notes
all three, and only who shares them judges by the id.
"""

from __future__ import annotations

import os
import socket
import uuid
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any


def this_process() -> dict[str, Any]:
    """This process as the holder of a lock; `token` tells this holding from any other."""
    return {
        "host": socket.gethostname(),
        "pid": os.getpid(),
        "processes": process_space(),
        "since": datetime.now(UTC).isoformat(timespec="seconds"),
        "token": uuid.uuid4().hex,
    }


def describe_holder(holder: Mapping[str, Any]) -> str:
    """What a message calls it."""
    return f"process {holder.get('pid', '?')} on {holder.get('host', '?')} (since {holder.get('since', '?')})"


def process_space() -> str | None:
    """What tells whether a process id means a process of ours: this start of this machine, this container."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot} {Path('/proc/self/ns/pid').readlink()}"
    except OSError:
        return None


def is_gone(holder: Mapping[str, Any]) -> bool:
    """Whether the holder was a process of this machine that is gone. False where that is not certain."""
    space, pid = process_space(), holder.get("pid")
    if space is None or holder.get("processes") != space or type(pid) is not int or pid < 1:
        return False
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return True
    except (OSError, OverflowError):
        return False
    return False
