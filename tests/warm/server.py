"""A process that has imported what is slow, and forks a Python process whenever it is asked for one (`client.py`).

    python server.py ADDRESS NUMBER_OF_A_SOCKET

It lives as long as somebody holds it: the socket that it is started with, or a connection that gives no order. What it
has started is killed when it ends. Forks have the threads that OMP_NUM_THREADS says, and what they print goes where the
asking process prints.
"""

from __future__ import annotations

import atexit
import ctypes
import gc
import importlib
import json
import os
import runpy
import selectors
import shutil
import signal
import socket
import sys
import threading
import traceback
import types
from contextlib import suppress
from pathlib import Path
from typing import Any, NoReturn

HEAD_BYTES = 8
PR_SET_PDEATHSIG = 1
Order = dict[str, Any]


SLOW = (
    "cli.options",
    "datasets",
    "deepspeed.module_inject",
    "student_train.train.train",
    "teacher_cache.build.build",
    "torch._dynamo",
    "torch._inductor.compile_fx",
    "torch.distributed.launcher.api",
    "torch.utils.cpp_extension",
    "torch.utils.tensorboard",
    "transformers.models.bert.modeling_bert",
    "transformers.models.llama.modeling_llama",
)
"""What builds and trainings import, and what that imports when they run."""


def import_what_is_slow() -> None:
    for name in SLOW:
        importlib.import_module(name)
    # forks that collect garbage would copy all of this
    gc.collect()
    gc.freeze()


class Server:
    """Gives each connection with an order a fork: tells its process number, and its exit code when it has ended."""

    def __init__(self, address: str, holder: socket.socket) -> None:
        self.listener = socket.socket(socket.AF_UNIX)
        self.listener.bind(address)
        self.listener.listen()
        self.waking, waker = os.pipe()
        os.set_blocking(waker, False)
        signal.set_wakeup_fd(waker, warn_on_full_buffer=False)
        signal.signal(signal.SIGCHLD, lambda *_: None)
        self.holders = {holder}
        self.running: dict[int, socket.socket] = {}
        self.selector = selectors.DefaultSelector()
        for source in (self.listener, self.waking, holder):
            self.selector.register(source, selectors.EVENT_READ)

    def serve(self) -> Order | None:
        """None in the server, when nobody holds it any more. Returns in the forks, too: what each has to do."""
        while self.holders:
            for key, _ in self.selector.select():
                if key.fileobj is self.listener:
                    order = self.accept()
                    if order is not None:
                        return order
                elif key.fileobj == self.waking:
                    os.read(self.waking, 4096)
                    self.tell_who_ended()
                else:
                    self.lose(key.fileobj)
        for process in self.running:
            os.kill(process, signal.SIGKILL)
        return None

    def accept(self) -> Order | None:
        connection, _ = self.listener.accept()
        head, descriptors, *_ = socket.recv_fds(connection, HEAD_BYTES, 3)
        if not head:  # it is gone already
            connection.close()
            return None
        with connection.makefile("rb") as stream:
            content = stream.read(int.from_bytes(head, "big"))
        if not content:
            self.holders.add(connection)
            with suppress(OSError):  # who is gone is lost next
                connection.sendall(b"held\n")
        elif process := os.fork():
            self.running[process] = connection
            with suppress(OSError):
                connection.sendall(f"{process}\n".encode())
        else:
            self.forget()
            ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)  # should the server be killed
            for target, descriptor in enumerate(descriptors):
                os.dup2(descriptor, target)
                os.close(descriptor)
            connection.close()
            return json.loads(content)
        for descriptor in descriptors:
            os.close(descriptor)
        self.selector.register(connection, selectors.EVENT_READ)
        return None

    def tell_who_ended(self) -> None:
        with suppress(ChildProcessError):
            while (found := os.waitpid(-1, os.WNOHANG))[0]:
                with suppress(OSError):  # nobody may be left to tell
                    self.running.pop(found[0]).sendall(f"{os.waitstatus_to_exitcode(found[1])}\n".encode())

    def lose(self, connection: Any) -> None:
        """The other side is gone: it needs its process no more, or holds the server no more."""
        self.selector.unregister(connection)
        connection.close()
        self.holders.discard(connection)
        for process, asking in self.running.items():
            if asking is connection:
                os.kill(process, signal.SIGKILL)

    def forget(self) -> None:
        """In a fork: nothing of the server is left."""
        signal.set_wakeup_fd(-1)
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        self.selector.close()
        os.close(self.waking)
        for connection in (self.listener, *self.running.values(), *self.holders):
            connection.close()


def run(order: Order) -> NoReturn:
    """Be a Python process with these arguments, to its end."""
    code = 1
    try:
        os.chdir(order["folder"])
        os.environ.clear()
        os.environ.update(order["environment"])
        sys.modules["numpy"].random.seed()  # as every process has its own
        if threads := os.environ.get("OMP_NUM_THREADS"):
            import torch

            torch.set_num_threads(int(threads))
        run_python(order["arguments"])
        code = 0
    except SystemExit as leaving:
        if isinstance(leaving.code, str):
            print(leaving.code, file=sys.stderr)
        else:
            code = leaving.code or 0
    except BaseException:  # noqa: BLE001 - as Python does
        traceback.print_exc()
    finally:
        threading._shutdown()
        atexit._run_exitfuncs()
        for stream in (sys.stdout, sys.stderr):
            stream.flush()
        os._exit(code)


def run_python(arguments: list[str]) -> None:
    """Raises what the program raises."""
    path = [folder for folder in os.environ.get("PYTHONPATH", "").split(os.pathsep) if folder]
    sys.path[0] = ""
    sys.path[1:1] = [folder for folder in path if folder not in sys.path]
    first, *rest = arguments
    if first == "-c":
        main = sys.modules["__main__"] = types.ModuleType("__main__")
        sys.argv = ["-c", *rest[1:]]
        exec(compile(rest[0], "<string>", "exec"), main.__dict__)
    elif first == "-m":
        sys.argv = rest
        runpy.run_module(rest[0], run_name="__main__", alter_sys=True)
    else:
        sys.argv, sys.path[0] = arguments, os.path.dirname(first)  # noqa: PTH120
        runpy.run_path(first, run_name="__main__")


if __name__ == "__main__":
    holder = socket.socket(fileno=int(sys.argv[2]))
    import_what_is_slow()
    server = Server(sys.argv[1], holder)
    holder.sendall(b"held\n")
    order = server.serve()
    if order is not None:
        run(order)
    shutil.rmtree(Path(sys.argv[1]).parent)
