"""``vllm-mla convert --push-to-hub`` with a small server that implements the hub's API."""

import base64
import hashlib
import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import ModelCard
from support.commands import vllm_mla, without_progress
from support.models import RandomModel

USER, ORGANISATION, READ_ONLY = "ada", "lab", "museum"
TOKEN = "hf_right"


class Hub(ThreadingHTTPServer):
    """A hub with one user.

    Attributes:
        repositories: for each name, the arguments of its creation; ``files`` holds the bytes of the last commit.
        uploads: large files by their SHA-256.
        requests: every request, as ``METHOD path``.
    """

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), HubRequest)
        self.repositories: dict[str, dict[str, Any]] = {f"{USER}/taken": {}}
        self.uploads: dict[str, bytes] = {}
        self.requests: list[str] = []

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    def environment(self, **changes: str) -> dict[str, str]:
        """Environment of a process that uses this server as the hub."""
        # Xet is a binary protocol with a server of its own. Without it, large files go through Git LFS.
        variables = {"HF_ENDPOINT": self.address, "HF_TOKEN": TOKEN, "HF_HUB_DISABLE_XET": "1", "HF_HUB_OFFLINE": "0"}
        return variables | changes


class HubRequest(BaseHTTPRequestHandler):
    server: Hub

    def log_message(self, *arguments: object) -> None:
        """Silence the server's log."""

    def body(self) -> bytes:
        return self.rfile.read(int(self.headers.get("Content-Length", 0)))

    def answer(self, content: object, status: int = 200, **headers: str) -> None:
        self.server.requests.append(f"{self.command} {self.path}")
        payload = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(payload)))
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        self.wfile.write(payload)

    def do_GET(self) -> None:
        if self.headers.get("Authorization") != f"Bearer {TOKEN}":
            self.answer({"error": "Invalid credentials"}, 401)
        elif self.path == "/api/whoami-v2":
            self.answer({"name": USER, "orgs": [{"name": ORGANISATION}, {"name": READ_ONLY}]})
        elif (name := self.path.removeprefix("/api/models/")) in self.server.repositories:
            self.answer({"id": name})
        else:
            self.answer({"error": "Repository not found"}, 404, X_Error_Code="RepoNotFound")

    def do_PUT(self) -> None:
        content = self.body()
        self.server.uploads[hashlib.sha256(content).hexdigest()] = content
        self.answer({})

    def do_POST(self) -> None:
        body = self.body()
        if self.path.endswith("/commit/main"):
            self.commit([json.loads(line) for line in body.splitlines()])
            return
        asked = json.loads(body)
        if self.path == "/api/repos/create":
            self.create(asked)
        elif self.path.endswith("/preupload/main"):
            modes = {True: "lfs", False: "regular"}
            self.answer(
                {
                    "files": [
                        {
                            "path": file["path"],
                            "uploadMode": modes[file["path"].endswith(".safetensors")],
                            "shouldIgnore": False,
                            "oid": None,
                        }
                        for file in asked["files"]
                    ]
                }
            )
        elif self.path.endswith(".git/info/lfs/objects/batch"):
            actions = {"upload": {"href": f"{self.server.address}/lfs"}}
            self.answer({"objects": [{**each, "actions": actions} for each in asked["objects"]]})
        else:
            self.answer({})  # /api/validate-yaml

    def create(self, asked: dict[str, Any]) -> None:
        name = f"{asked.get('organization', USER)}/{asked['name']}"
        if name.startswith(READ_ONLY):
            self.answer({"error": "You have read-only access"}, 403)
            return
        self.server.repositories[name] = asked
        self.answer({"url": f"{self.server.address}/{name}", "name": name})

    def commit(self, lines: list[dict[str, Any]]) -> None:
        files = {}
        for line in lines:
            value = line["value"]
            if line["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                files[value["path"]] = self.server.uploads[value["oid"]]
        name = self.path.removeprefix("/api/models/").removesuffix("/commit/main")
        self.server.repositories[name]["files"] = files
        self.answer({"commitUrl": f"{self.server.address}/{name}/commit/1", "commitOid": "1", "success": True})


@pytest.fixture
def hub() -> Iterator[Hub]:
    with Hub() as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server
        server.shutdown()


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return RandomModel().save(tmp_path_factory.mktemp("source") / "model")


@pytest.mark.parametrize("options", [(), ("--public",)], ids=["private", "public"])
def test_everything_is_uploaded(hub: Hub, options: tuple[str, ...], source: Path, tmp_path: Path) -> None:
    """The repository equals the folder to the byte, and its card says how to serve the model from the hub."""
    repo, out = f"{ORGANISATION}/tiny-mla", tmp_path / "out"
    result = vllm_mla(
        "convert", source, out, "--method", "exact", "--push-to-hub", repo, *options, environment=hub.environment()
    )
    assert result.returncode == 0, result.stderr
    assert f"Uploaded to {hub.address}/{repo}" in result.stdout
    created = hub.repositories[repo]
    assert created["visibility"] == ("public" if options else "private")
    assert created["files"] == {path.name: path.read_bytes() for path in out.iterdir()}
    assert f"vllm serve {repo}\n" in ModelCard(created["files"]["README.md"].decode()).text
    assert vllm_mla("verify", out).returncode == 0


REFUSED = {
    "no-owner": ("tiny-mla", {}, "must be ORG/NAME"),
    "bad-name": ("lab/a--b", {}, "cannot be a name on the hub"),
    "no-member": ("elsewhere/tiny-mla", {}, "this login is of ada, who can write to: ada, lab, museum"),
    "taken": ("ada/taken", {}, "exists on the hub already"),
    "no-login": ("ada/tiny-mla", {"HF_TOKEN": ""}, "run hf auth login"),
    "wrong-token": ("ada/tiny-mla", {"HF_TOKEN": "hf_wrong"}, "Invalid user token"),
    "offline": ("ada/tiny-mla", {"HF_HUB_OFFLINE": "1"}, "HF_HUB_OFFLINE switches off"),
    "no-hub": ("ada/tiny-mla", {"HF_ENDPOINT": "http://127.0.0.1:9"}, "cannot reach the hub"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused_before_the_work(hub: Hub, case: str, source: Path, tmp_path: Path) -> None:
    repo, changes, reason = REFUSED[case]
    environment = hub.environment(HF_HOME=str(tmp_path / "home"), **changes)
    result = vllm_mla("convert", source, tmp_path / "out", "--push-to-hub", repo, environment=environment)
    assert result.returncode == 2, result.stderr
    (line,) = without_progress(result.stderr).strip().splitlines()
    assert reason in line
    assert not (tmp_path / "out").exists()
    assert not any(call.startswith(("POST", "PUT")) for call in hub.requests)


def test_no_right_to_write(hub: Hub, source: Path, tmp_path: Path) -> None:
    """If the upload fails, the conversion stays, and the error says how to upload it later."""
    out = tmp_path / "out"
    arguments = ("convert", source, out, "--method", "exact", "--push-to-hub", f"{READ_ONLY}/tiny-mla")
    result = vllm_mla(*arguments, environment=hub.environment())
    assert result.returncode == 2 and "Traceback" not in result.stderr
    assert "may not write there" in result.stderr and f"hf upload {READ_ONLY}/tiny-mla {out}" in result.stderr
    assert vllm_mla("verify", out).returncode == 0


def test_public_alone(source: Path, tmp_path: Path) -> None:
    result = vllm_mla("convert", source, tmp_path / "out", "--public")
    assert result.returncode == 2 and "--public is about --push-to-hub" in result.stderr
