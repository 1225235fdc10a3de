"""Asks the server of warm Python processes for one, and waits for it. As a script: one that is as good as `python`.

    python client.py ADDRESS [-c CODE | -m MODULE | FILE] ARGUMENTS

A light process that has the streams, the folder and the variables of its fork, hands signals on to it and ends as it
has ended. If it is killed, so is the fork. Standard library only, and little of it: this starts in a few milliseconds.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import sys
from collections.abc import Mapping, Sequence
from contextlib import suppress

HEAD_BYTES = 8
"""What an order begins with: its length in bytes."""
HANDED_ON = (signal.SIGTERM, signal.SIGINT)


class Forked:
    """A fork of the server that runs Python with these arguments; it is killed when this object is gone."""

    def __init__(self, address: str, arguments: Sequence[str], *, folder: str, environment: Mapping[str, str]) -> None:
        order = {"arguments": list(arguments), "folder": folder, "environment": dict(environment)}
        content = json.dumps(order).encode()
        self._connection = socket.socket(socket.AF_UNIX)
        self._connection.connect(address)
        socket.send_fds(self._connection, [len(content).to_bytes(HEAD_BYTES, "big")], [0, 1, 2])
        self._connection.sendall(content)
        self._answers = self._connection.makefile("r")
        self.pid = int(self._answers.readline())
        self.returncode: int | None = None

    def send_signal(self, number: int) -> None:
        with suppress(ProcessLookupError):
            os.kill(self.pid, number)

    def kill(self) -> None:
        if self.returncode is None:
            self.send_signal(signal.SIGKILL)

    def poll(self) -> int | None:
        """The exit code, negative after a signal; None as long as it runs."""
        self._connection.setblocking(False)
        try:
            ended = self._connection.recv(1, socket.MSG_PEEK)
        except BlockingIOError:
            return self.returncode
        finally:
            self._connection.setblocking(True)
        return self.wait() if ended else self.returncode

    def wait(self) -> int:
        """The exit code, negative after a signal."""
        if self.returncode is None:
            self.returncode = int(self._answers.readline())
        return self.returncode


def end_like_a_fork(address: str, arguments: Sequence[str]) -> None:
    """Run and wait for it; does not return."""
    signal.pthread_sigmask(signal.SIG_BLOCK, HANDED_ON)  # until there is somebody to hand them on to
    forked = Forked(address, arguments, folder=os.getcwd(), environment=os.environ)  # noqa: PTH109
    for number in HANDED_ON:
        signal.signal(number, lambda number, _: forked.send_signal(number))
    signal.pthread_sigmask(signal.SIG_UNBLOCK, HANDED_ON)
    code = forked.wait()
    if code < 0:
        with suppress(OSError):  # SIGKILL does what it does
            signal.signal(-code, signal.SIG_DFL)
        os.kill(os.getpid(), -code)
    os._exit(code)


if __name__ == "__main__":
    end_like_a_fork(sys.argv[1], sys.argv[2:])
