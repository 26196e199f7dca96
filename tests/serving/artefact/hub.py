"""A stand-in of a hub's HTTP interface: what `huggingface_hub` asks for when it makes a repository and commits a folder.

Files above a size go by the LFS protocol: a batch request answers where to put them, and the commit names them by their hash.
"""

from __future__ import annotations

import base64
import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote

LARGE = 10_000  # bytes from which a file goes by LFS


@dataclass
class Hub:
    """What the hub has: `branches`, revision -> path -> content; `asked`, every request."""

    url: str = ""
    private: bool | None = None
    repositories: set[str] = field(default_factory=set)
    branches: dict[str, dict[str, bytes]] = field(default_factory=dict)
    messages: list[str] = field(default_factory=list)
    asked: list[str] = field(default_factory=list)
    blobs: dict[str, bytes] = field(default_factory=dict)
    token: str = "hf_right"
    refuse: dict[str, int] = field(default_factory=dict)  # a part of a path -> the status that is answered


class _Handler(BaseHTTPRequestHandler):
    hub: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: Any) -> None:
        pass

    def do_POST(self) -> None:
        self._answer(self._post)

    def do_PUT(self) -> None:
        self._answer(self._put)

    def do_GET(self) -> None:
        self._answer(lambda path, body: (404, {"error": "no such file"}))

    def do_HEAD(self) -> None:
        self._answer(lambda path, body: (404, {}))

    def _answer(self, act: Any) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        path = unquote(self.path)
        self.hub.asked.append(f"{self.command} {path}")
        refused = next((status for part, status in self.hub.refuse.items() if part in path), None)
        if refused is not None:
            status, value = refused, {"error": "refused by the test"}
        elif "/blobs/" not in path and self.headers.get("Authorization") != f"Bearer {self.hub.token}":
            status, value = 401, {"error": "Invalid username or password."}
        else:
            status, value = act(path, body)
        raw = json.dumps(value).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(raw)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(raw)

    def _post(self, path: str, body: bytes) -> tuple[int, dict[str, Any]]:
        hub = self.hub
        if path.endswith("/commit/main") or "/commit/" in path:
            return self._commit(path.rpartition("/commit/")[2], body)
        asked = json.loads(body)
        if path == "/api/repos/create":
            name = f"{asked['organization']}/{asked['name']}"
            if name in hub.repositories:
                return 409, {"error": "You already created this model repo", "url": f"{hub.url}/{name}"}
            hub.repositories.add(name)
            hub.branches["main"] = {}
            hub.private = asked.get("visibility") == "private" or asked.get("private", False)
            return 200, {"url": f"{hub.url}/{name}"}
        if "/branch/" in path:
            hub.branches.setdefault(path.rpartition("/branch/")[2], {})
            return 200, {}
        if path.endswith("/api/validate-yaml"):
            return 200, {"errors": [], "warnings": []}
        if "/preupload/" in path:
            files = [
                {
                    "path": one["path"],
                    "uploadMode": "lfs" if one["size"] >= LARGE else "regular",
                    "shouldIgnore": False,
                    "oid": None,
                }
                for one in asked["files"]
            ]
            return 200, {"files": files}
        if path.endswith("/info/lfs/objects/batch"):
            objects = [
                {
                    "oid": one["oid"],
                    "size": one["size"],
                    "actions": {"upload": {"href": f"{hub.url}/blobs/{one['oid']}", "header": {}}},
                }
                for one in asked["objects"]
            ]
            return 200, {"transfer": "basic", "objects": objects}
        return 404, {"error": f"the stand-in does not know {path}"}

    def _put(self, path: str, body: bytes) -> tuple[int, dict[str, Any]]:
        digest = path.rpartition("/")[2]
        if hashlib.sha256(body).hexdigest() != digest:
            return 400, {"error": "another hash"}
        self.hub.blobs[digest] = body
        return 200, {}

    def _commit(self, branch: str, body: bytes) -> tuple[int, dict[str, Any]]:
        hub = self.hub
        if branch not in hub.branches:
            return 404, {"error": f"Invalid rev id: {branch}"}
        files = dict(hub.branches[branch])
        for line in body.decode().splitlines():
            entry = json.loads(line)
            value = entry["value"]
            if entry["key"] == "header":
                hub.messages.append(value["summary"])
            elif entry["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif entry["key"] == "lfsFile":
                files[value["path"]] = hub.blobs[value["oid"]]
        hub.branches[branch] = files
        name = next(iter(hub.repositories))
        return 200, {"commitUrl": f"{hub.url}/{name}/commit/{'0' * 40}", "commitOid": "0" * 40}


@contextmanager
def local_hub() -> Iterator[Hub]:
    """A hub on this machine, in a thread of its own, until the block ends."""
    hub = Hub()
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": hub}))
    hub.url = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
