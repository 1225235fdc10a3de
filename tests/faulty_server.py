"""A server that stands before one of object storage and fails in the ways that servers do, when told to."""

from __future__ import annotations

import http.client
import os
import socket
import struct
import threading
import time
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


class FaultyServer:
    """Hands requests on to an S3 server, or fails in the ways that servers do. One connection per request."""

    outage_seconds = float(os.environ.get("KDCACHE_OUTAGE_SECONDS", "3"))

    def __init__(self, target: str) -> None:
        self.target = target
        self.failed = 0
        """Requests that were answered with an error."""
        self.requests: list[str] = []
        self.cut_answers = 0
        """How many of the next answers with a body are cut off in its middle."""
        self.lost_answers = 0
        """How many of the next writes are done, but their answers lost."""
        self.ignores_conditions = False
        """Whether If-Match and If-None-Match are left out."""
        self.writing = threading.Lock()
        self._mutex = threading.Lock()
        self._errors_until = 0.0
        self._planned: Callable[[], None] | None = None
        self._requests_left = 0
        self._server = self._listen(0)
        self.port = self._server.server_address[1]
        self.endpoint = f"http://127.0.0.1:{self.port}"

    def outage(self, kind: str, seconds: float, after: int = 0) -> None:
        """Answer 500 and 503 ("errors") or refuse connections ("refused") for some time, from a later request on."""
        start = {"errors": self._begin_errors, "refused": self._refuse}[kind]
        if after == 0:
            start(seconds)
        else:
            with self._mutex:
                self._planned, self._requests_left = (lambda: start(seconds)), after

    def takes_one_more(self) -> bool:
        """Whether the next request is to be answered."""
        with self._mutex:
            self._requests_left -= 1
            planned = self._planned if self._requests_left < 0 else None
            if planned is not None:
                self._planned = None
        if planned is not None:
            planned()
        return time.monotonic() >= self._errors_until

    def claim(self, fault: str) -> bool:
        """Whether this request is to suffer one of the counted faults."""
        with self._mutex:
            left: int = getattr(self, fault)
            setattr(self, fault, max(0, left - 1))
        return left > 0

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()

    def _begin_errors(self, seconds: float) -> None:
        self._errors_until = time.monotonic() + seconds

    def _refuse(self, seconds: float) -> None:
        self.close()

        def listen_again() -> None:
            self._server = self._listen(self.port)

        timer = threading.Timer(seconds, listen_again)
        timer.daemon = True
        timer.start()

    def _listen(self, port: int) -> ThreadingHTTPServer:
        server = Listening(("127.0.0.1", port), type("Handler", (Forward,), {"faulty": self}))
        threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
        return server


class Listening(ThreadingHTTPServer):
    """As many connections may wait as real servers let wait."""

    request_queue_size = 128


class Forward(BaseHTTPRequestHandler):
    """One request of `FaultyServer`."""

    faulty: FaultyServer

    def handle_any(self) -> None:
        body = self.rfile.read(int(self.headers.get("content-length") or 0))
        faulty = self.faulty
        faulty.requests.append(f"{self.command} {self.path}")
        if not faulty.takes_one_more():
            faulty.failed += 1
            self._answer(500 if faulty.failed % 2 else 503, {"content-length": "0"}, b"")
            return
        headers = {name: value for name, value in self.headers.items() if name.lower() != "connection"}
        if faulty.ignores_conditions:
            headers = {name: value for name, value in headers.items() if not name.lower().startswith("if-")}
        connection = http.client.HTTPConnection(faulty.target)
        try:
            # the server behind checks a condition and writes in two steps; real ones do it in one
            with faulty.writing:
                connection.request(self.command, self.path, body, headers)
                answer = connection.getresponse()
                content = answer.read()
        finally:
            connection.close()
        if self.command == "PUT" and faulty.claim("lost_answers"):
            self._hang_up()
            return
        given = {
            name: value for name, value in answer.getheaders() if name.lower() not in ("connection", "server", "date")
        }
        cut = len(content) > 1 and answer.status < 300 and faulty.claim("cut_answers")
        self._answer(answer.status, given, content[: len(content) // 2] if cut else content)
        if cut:
            self._hang_up()

    do_GET = do_PUT = do_POST = do_DELETE = do_HEAD = handle_any

    def _answer(self, status: int, headers: dict[str, str], content: bytes) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(content)

    def _hang_up(self) -> None:
        self.wfile.flush()
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.connection.close()

    def log_message(self, *arguments: object) -> None:
        pass
