"""One server of warm Python processes for all workers of a test run, started by the one that needs it first."""

from __future__ import annotations

import fcntl
import os
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from tests.warm.client import HEAD_BYTES, Forked

REPOSITORY = Path(__file__).resolve().parents[2]


@dataclass(frozen=True)
class Warm:
    """Python processes at the cost of a fork, see `server.py`."""

    address: str

    @property
    def python(self) -> list[str]:
        """What stands in a command where `sys.executable` would, see `client.py`."""
        # no site-packages, whose start-up files take longer than all the rest
        return [sys.executable, "-I", "-S", str(Path(__file__).with_name("client.py")), self.address]

    def torchrun(self, count: int) -> list[str]:
        """What stands in a command where `torchrun --nproc-per-node COUNT` would, in front of the script."""
        launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={count}", "--no-python"]
        return [*self.python, *launcher, *self.python]

    def start(self, arguments: Sequence[str], environment: Mapping[str, str] | None = None) -> Forked:
        """One without a process in between, for tests that must know its number; it prints where this one does."""
        return Forked(self.address, arguments, folder=str(REPOSITORY), environment=environment or os.environ)


@contextmanager
def shared_server(folder: Path, *, alone: bool) -> Iterator[Warm]:
    """Hold the server whose address is noted in `folder`, started if there is none. `alone`: wait for its end."""
    with (folder / "warm.txt").open("a+") as note:
        fcntl.flock(note, fcntl.LOCK_EX)
        note.seek(0)
        address, process = note.read(), None
        holder = _hold(address)
        if holder is None:
            address = str(Path(tempfile.mkdtemp(prefix="warm-")) / "server")
            process, holder = _start(address)
            note.truncate(0)
            note.write(address)
    with holder:
        yield Warm(address)
    if process is not None and alone:
        process.wait()


def _hold(address: str) -> socket.socket | None:
    if not address:
        return None
    holder = socket.socket(socket.AF_UNIX)
    try:
        holder.connect(address)
        holder.sendall(bytes(HEAD_BYTES))
        if holder.recv(5):
            return holder
    except OSError:
        pass  # it has ended, or is about to
    holder.close()
    return None


def _start(address: str) -> tuple[subprocess.Popen[bytes], socket.socket]:
    ours, theirs = socket.socketpair()
    environment = {
        **os.environ,
        "PYTHONPATH": str(REPOSITORY),
        # what is read when it imports
        "DS_ACCELERATOR": "cpu",
        "HF_DATASETS_CACHE": str(Path(address).with_name("datasets")),
        "TOKENIZERS_PARALLELISM": "false",
        "TRANSFORMERS_VERBOSITY": "error",
    }
    command = [sys.executable, str(Path(__file__).with_name("server.py")), address, str(theirs.fileno())]
    process = subprocess.Popen(
        command, env=environment, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, pass_fds=[theirs.fileno()],
        start_new_session=True,
    )  # fmt: skip
    theirs.close()
    assert ours.recv(5), "the server of warm processes did not start"
    return process, ours
