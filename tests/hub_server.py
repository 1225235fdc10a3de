"""What stands in for the Hugging Face hub: its interface for making repositories and uploading folders, on loopback."""

from __future__ import annotations

import base64
import hashlib
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote, urlsplit

TOKEN = "a-token-of-the-tests"


class HubServer:
    """Repositories by name, each with its files; `refuse` answers every request for a repository with that status."""

    def __init__(self) -> None:
        self.repositories: dict[str, dict[str, bytes]] = {}
        self.private: dict[str, bool] = {}
        self.uploaded: dict[str, bytes] = {}
        self.tokens: set[str | None] = set()
        self.refuse: int | None = None
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Request,), {"hub": self}))
        self.endpoint = f"http://127.0.0.1:{self._server.server_port}"
        threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True).start()

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()


class _Request(BaseHTTPRequestHandler):
    hub: HubServer

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("content-length") or 0))
        path = unquote(urlsplit(self.path).path)
        self.hub.tokens.add(self.headers.get("authorization"))
        if path == "/api/validate-yaml":
            self._answer({"errors": [], "warnings": []})
        elif self.hub.refuse is not None:
            self._answer({"error": "You may not write here"}, self.hub.refuse)
        elif path == "/api/repos/create":
            self._create(json.loads(body))
        elif path.endswith("/preupload/main"):
            self._answer({"files": [self._mode(file) for file in json.loads(body)["files"]]})
        elif path.endswith(".git/info/lfs/objects/batch"):
            self._answer({"transfer": "basic", "objects": [self._place(each) for each in json.loads(body)["objects"]]})
        elif path.endswith("/commit/main"):
            self._commit(path.split("/api/models/")[1].removesuffix("/commit/main"), body)
        else:
            self._answer({"error": f"no such place {path}"}, 404)

    def do_PUT(self) -> None:
        content = self.rfile.read(int(self.headers.get("content-length") or 0))
        digest = self.path.rpartition("/")[2]
        assert hashlib.sha256(content).hexdigest() == digest
        self.hub.uploaded[digest] = content
        self._answer({})

    def do_GET(self) -> None:
        name = urlsplit(self.path).path.removeprefix("/api/models/").partition("/revision/")[0]
        if self.hub.refuse is not None or name not in self.hub.repositories:
            self._answer({"error": "Repository not found"}, self.hub.refuse or 404)
        else:
            self._answer({"id": name, "sha": "0" * 40})

    def _create(self, asked: dict[str, Any]) -> None:
        owner = asked.get("organization") or "me"
        name = f"{owner}/{asked['name']}"
        if name in self.hub.repositories:
            self._answer({"error": "You already created this repo"}, 409)
            return
        self.hub.repositories[name] = {}
        self.hub.private[name] = asked.get("private") is True or asked.get("visibility") == "private"
        self._answer({"url": f"{self.hub.endpoint}/{name}", "id": "1", "name": name})

    def _mode(self, file: dict[str, Any]) -> dict[str, Any]:
        large = file["path"].endswith((".safetensors", ".onnx"))
        return {"path": file["path"], "uploadMode": "lfs" if large else "regular", "shouldIgnore": False}

    def _place(self, wanted: dict[str, Any]) -> dict[str, Any]:
        return {**wanted, "actions": {"upload": {"href": f"{self.hub.endpoint}/upload/{wanted['oid']}", "header": {}}}}

    def _commit(self, name: str, body: bytes) -> None:
        for line in map(json.loads, body.splitlines()):
            value = line["value"]
            if line["key"] == "file":
                self.hub.repositories[name][value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                self.hub.repositories[name][value["path"]] = self.hub.uploaded[value["oid"]]
        self._answer({"commitUrl": f"{self.hub.endpoint}/{name}/commit/{'1' * 40}", "commitOid": "1" * 40})

    def _answer(self, content: dict[str, Any], status: int = 200) -> None:
        data = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("content-type", "application/json")
        self.send_header("content-length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *arguments: object) -> None:
        pass
