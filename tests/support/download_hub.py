"""A small server that speaks as much of the hub's API as downloads need."""

import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path


class Hub(ThreadingHTTPServer):
    """A hub that has one repository, ``lab/tiny``, from which files are downloaded.

    Attributes:
        files: of the repository, by path.
        fetched: what was downloaded.
    """

    commit = "c0ffee" * 6 + "beef"

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), HubRequest)
        self.files: dict[str, bytes] = {}
        self.fetched: set[str] = set()

    def environment(self, home: Path) -> dict[str, str]:
        """For a process that takes this for the hub, with an empty cache in ``home``."""
        address = {"HF_ENDPOINT": f"http://127.0.0.1:{self.server_port}", "HF_HUB_OFFLINE": "0"}
        return address | {"HF_HUB_DISABLE_XET": "1", "HF_HOME": str(home)}


class HubRequest(BaseHTTPRequestHandler):
    server: Hub

    def log_message(self, *arguments: object) -> None:
        """Silence the server's log."""

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        path = self.path.partition("?")[0]
        resolve = f"/lab/tiny/resolve/{self.server.commit}/"
        if path.startswith("/api/models/lab/tiny/tree/"):
            self.answer(json.dumps([self.described(name) for name in self.server.files]).encode())
        elif path.startswith("/api/models/lab/tiny"):
            siblings = [{"rfilename": name} for name in self.server.files]
            self.answer(json.dumps({"id": "lab/tiny", "sha": self.server.commit, "siblings": siblings}).encode())
        elif (name := path.removeprefix(resolve).replace("main/", "")) in self.server.files and "/resolve/" in path:
            if self.command == "GET":
                self.server.fetched.add(name)
            content = self.server.files[name]
            etag = hashlib.sha256(content).hexdigest()
            self.answer(content, ETag=f'"{etag}"', X_Repo_Commit=self.server.commit)
        else:
            self.answer(b"{}", 404, X_Error_Code="EntryNotFound" if "/resolve/" in path else "RepoNotFound")

    def described(self, name: str) -> dict[str, object]:
        return {"type": "file", "path": name, "size": len(self.server.files[name]), "oid": "0"}

    def answer(self, content: bytes, status: int = 200, **headers: str) -> None:
        self.send_response(status)
        self.send_header("Content-Length", str(len(content)))
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(content)


@contextmanager
def download_hub() -> Iterator[Hub]:
    """A hub for the time of a ``with`` block."""
    with Hub() as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server
        server.shutdown()
