"""A proxy that lets nobody through, on loopback: every way to the hub ends in a message."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

# in a process of its own: the libraries look at these variables when they are imported
ASK = """
from student_train.evaluate.latency.models import load_timed
from student_train.evaluate.finetune.examples import read_source
from student_train.evaluate.finetune.tasks import TASKS
from teacher_cache.corpus.documents import read_documents
from teacher_cache.errors import DistillationError
from teacher_cache.teacher.teacher import Teacher
for ask in (
    lambda: read_source(TASKS["sst2"].train, TASKS["sst2"]),
    lambda: load_timed("nobody/nothing", "teacher"),
    lambda: next(read_documents(["nobody/nothing"])),
    lambda: Teacher.load("nobody/nothing"),
):
    try:
        ask()
    except DistillationError as error:
        print(type(error).__name__, str(error).replace("\\n", " "))
"""


class RefusingProxy(BaseHTTPRequestHandler):
    def do_CONNECT(self) -> None:
        self.send_error(403, "not from here")

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def proxy() -> Iterator[str]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), RefusingProxy)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


def test_a_proxy_that_refuses_is_a_message(proxy: str, tmp_path: Path) -> None:
    ours = {name: value for name, value in os.environ.items() if "proxy" not in name.lower()}
    ours |= {"HF_HUB_OFFLINE": "0", "HTTPS_PROXY": proxy, "HF_HOME": str(tmp_path)}
    asked = subprocess.run([sys.executable, "-c", ASK], env=ours, capture_output=True, text=True, check=False)
    assert asked.returncode == 0, asked.stderr
    lines = asked.stdout.splitlines()
    assert [line.partition(" ")[0] for line in lines] == ["TaskError", "StudentError", "CorpusError", "TeacherError"]
    assert all("not from here" in line for line in lines[:3])
    assert all("check the name" in line or "check the spelling" in line for line in lines)
