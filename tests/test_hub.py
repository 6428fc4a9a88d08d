"""Weights by their names on the hub: the real client, against a small server of its protocol."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from sfmodel import assets
from sfmodel.cli.doctor import NEEDED
from sfmodel.hub import local, weights_among
from sfmodel.pretrained import TOY_WEIGHTS
from tests.torchrun import ROOT

pytest.importorskip("huggingface_hub")
COMMIT = "1234567890123456789012345678901234567890"


class Hub(ThreadingHTTPServer):
    """Repositories as folders below `root`: owner/name. A gated one has a file named GATED; where
    `cut` is set, an answer ends after so many bytes, once."""

    def __init__(self, root: Path) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.root, self.cut, self.asked = root, 0, list[str]()

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


class _Handler(BaseHTTPRequestHandler):
    server: Hub

    def log_message(self, format: str, *args: Any) -> None:
        pass

    def do_HEAD(self) -> None:
        self._answer()

    def do_GET(self) -> None:
        self._answer()

    def _answer(self) -> None:
        self.server.asked.append(f"{self.command} {self.path}")
        path = self.path.split("?")[0]
        if path.startswith("/api/models/"):
            owner, name, *rest = path.removeprefix("/api/models/").split("/")
            folder = self.server.root / owner / name
            if not folder.is_dir():
                return self._refuse(404, "RepoNotFound")
            if (folder / "GATED").exists():
                return self._refuse(403, "GatedRepo")
            if rest[:1] == ["revision"] and rest[1:2] not in (["main"], [COMMIT]):
                return self._refuse(404, "RevisionNotFound")
            files = sorted(each for each in folder.rglob("*") if each.is_file())
            if rest[:1] == ["tree"]:
                listed = [
                    {"type": "file", "path": str(f.relative_to(folder)), "size": f.stat().st_size,
                     "oid": _digest(f)} for f in files
                ]  # fmt: skip
                return self._send(json.dumps(listed).encode(), {"Content-Type": "application/json"})
            siblings = [{"rfilename": str(f.relative_to(folder))} for f in files]
            said = {"id": f"{owner}/{name}", "sha": COMMIT, "siblings": siblings}
            return self._send(json.dumps(said).encode(), {"Content-Type": "application/json"})
        owner, name, resolve, revision, *parts = path.strip("/").split("/")
        folder = self.server.root / owner / name
        file = folder.joinpath(*parts)
        if resolve != "resolve" or not folder.is_dir():
            return self._refuse(404, "RepoNotFound")
        if (folder / "GATED").exists():
            return self._refuse(403, "GatedRepo")
        if revision not in ("main", COMMIT):
            return self._refuse(404, "RevisionNotFound")
        if not file.is_file():
            return self._refuse(404, "EntryNotFound")
        self._send(file.read_bytes(), {"ETag": f'"{_digest(file)}"', "X-Repo-Commit": COMMIT})

    def _send(self, content: bytes, headers: dict[str, str]) -> None:
        begin = 0
        if asked := self.headers.get("Range"):
            begin = int(asked.removeprefix("bytes=").split("-")[0])
            end = f"{len(content) - 1}/{len(content)}"
            headers |= {"Content-Range": f"bytes {begin}-{end}"}
        self.send_response(206 if begin or self.headers.get("Range") else 200)
        for key, value in headers.items():
            self.send_header(key, value)
        self.send_header("Content-Length", str(len(content) - begin))
        self.send_header("Accept-Ranges", "bytes")
        self.end_headers()
        if self.command == "GET":
            part = content[begin:]
            if self.server.cut and len(part) > self.server.cut:
                part, self.server.cut = part[: self.server.cut], 0
                self.close_connection = True
            self.wfile.write(part)

    def _refuse(self, code: int, why: str) -> None:
        self.send_response(code)
        self.send_header("X-Error-Code", why)
        self.send_header("X-Error-Message", why)
        self.send_header("Content-Length", "0")
        self.end_headers()


def _digest(file: Path) -> str:
    return hashlib.sha1(file.read_bytes()).hexdigest()


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[Hub]:
    root = tmp_path / "hub"
    for repo, files in {
        "me/toy": ["toy.safetensors"],
        "me/many": ["a.safetensors", "b/c.safetensors", "README.md"],
        "me/none": ["README.md"],
        "me/gated": ["GATED", "toy.safetensors"],
    }.items():
        for name in files:
            (root / repo / name).parent.mkdir(parents=True, exist_ok=True)
            (root / repo / name).write_bytes(TOY_WEIGHTS.read_bytes())
    server = Hub(root)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


def run(
    hub: Hub, folder: Path, *words: str, **environment: str
) -> subprocess.CompletedProcess[str]:
    given = {"HF_ENDPOINT": hub.address, "HF_HUB_CACHE": str(folder / "cache"), "HF_TOKEN": ""}
    given |= {"PYTHONPATH": str(ROOT), "HF_HUB_DISABLE_XET": "1", "NO_PROXY": "*"} | environment
    return subprocess.run([sys.executable, *words], cwd=folder, env=os.environ | given,
                          capture_output=True, text=True, timeout=100)  # fmt: skip


def generate(
    hub: Hub, folder: Path, checkpoint: str, **environment: str
) -> subprocess.CompletedProcess[str]:
    words = ["-m", "sfmodel", "generate", "--frames", "1", "--checkpoint", checkpoint]
    return run(hub, folder, *words, **environment)


def refused(hub: Hub, folder: Path, name: str, **environment: str) -> str:
    """The sentence of the ValueError for a name."""
    code = "import sys; from sfmodel.hub import local; local(sys.argv[1])"
    done = run(hub, folder, "-c", code, name, **environment)
    assert done.returncode == 1
    return done.stderr.splitlines()[-1].removeprefix("ValueError: ")


@pytest.mark.parametrize(
    "name",
    ["hf:me/toy", "hf:me/toy@main", "hf:me/toy/toy.safetensors", "hf:me/many/b/c.safetensors"],
)
def test_fetched_once(hub: Hub, tmp_path: Path, name: str) -> None:
    """And, without the hub, taken from the cache."""
    done = generate(hub, tmp_path, name)
    assert done.returncode == 0, done.stderr
    assert "1 frames in" in done.stdout
    fetched = [each for each in hub.asked if each.startswith("GET") and "/resolve/" in each]
    assert len(fetched) == 1
    again = generate(hub, tmp_path, name, HF_HUB_OFFLINE="1")
    assert again.returncode == 0 and "1 frames in" in again.stdout, again.stderr
    assert [each for each in hub.asked if "GET" in each and "/resolve/" in each] == fetched


def test_a_download_that_was_cut_goes_on(hub: Hub, tmp_path: Path) -> None:
    hub.cut = TOY_WEIGHTS.stat().st_size // 2
    for _ in range(2):  # whether the client asks again itself or not
        done = generate(hub, tmp_path, "hf:me/toy")
        if done.returncode == 0:
            break
    assert done.returncode == 0 and "1 frames in" in done.stdout, done.stderr


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("hf:me/many", "hf:me/many: name one of its checkpoints: a.safetensors, b/c.safetensors"),
        ("hf:me/none", "hf:me/none: holds no weights"),
        ("hf:me/gated", "hf:me/gated: may not be read: ask for access there, and set HF_TOKEN"),
        (
            "hf:me/missing",
            "hf:me/missing: there is no such repository, or HF_TOKEN may not read it",
        ),
        ("hf:me/toy@other", "hf:me/toy@other: there is no such revision"),
        ("hf:me/toy/no.pt", "hf:me/toy/no.pt: there is no such file in the repository"),
        ("hf:toy", "hf:toy: must be hf:owner/name, hf:owner/name@revision or …/file"),
    ],
)
def test_what_is_not_there(hub: Hub, tmp_path: Path, name: str, said: str) -> None:
    assert refused(hub, tmp_path, name) == said


def test_no_hub(hub: Hub, tmp_path: Path) -> None:
    done = generate(hub, tmp_path, "hf:me/toy", HF_ENDPOINT="http://127.0.0.1:9")
    last = done.stderr.splitlines()[-1]  # after what the client says of its attempts
    assert done.returncode == 2 and last.startswith("sfmodel: hf:me/toy: is not in the cache")
    assert "not in the cache" in refused(hub, tmp_path, "hf:me/toy", HF_HUB_OFFLINE="1")


def test_doctor_downloads_what_is_missing(hub: Hub, tmp_path: Path) -> None:
    """What streaming needs, to where it is looked for; what is there already is left."""
    public = assets.PUBLIC["wan-1.3b"]
    for name in NEEDED:
        for file in public[name].files:
            path = hub.root / public[name].where / file
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(TOY_WEIGHTS.read_bytes())
    done = run(hub, tmp_path, "-m", "sfmodel", "doctor", "--models", "here", "--download")
    assert done.returncode == 0, done.stderr
    for line in ("few-step generator: gdhe17/Self-Forcing, into here",
                 "tokenizer: Wan-AI/Wan2.1-T2V-1.3B, into here/Wan2.1-T2V-1.3B"):  # fmt: skip
        assert line in done.stdout
    here = tmp_path / "here"
    assert (here / "checkpoints" / "self_forcing_dmd.pt").stat().st_size
    assert (here / "Wan2.1-T2V-1.3B" / "google" / "umt5-xxl" / "tokenizer.json").exists()
    hub.asked.clear()
    again = run(hub, tmp_path, "-m", "sfmodel", "doctor", "--models", "here", "--download")
    fetched = [each for each in hub.asked if "GET" in each and "/resolve/" in each]
    assert again.returncode == 0 and not fetched
    shutil.rmtree(hub.root / "gdhe17")
    shutil.rmtree(here / "checkpoints")
    done = run(hub, tmp_path, "-m", "sfmodel", "doctor", "--models", "here", "--download")
    assert done.returncode == 2 and "there is no such repository" in done.stderr.splitlines()[-1]


@pytest.mark.parametrize(
    ("files", "wanted"),
    [
        (["a.txt", "m.pt"], ["m.pt"]),
        (["a.pt", "b.pth"], []),
        (["transformer/config.json", "transformer/diffusion_pytorch_model.safetensors", "vae/x.pt"],
         ["transformer/config.json", "transformer/diffusion_pytorch_model.safetensors"]),
        (["config.json", "diffusion_pytorch_model-1.safetensors", "Wan2.1_VAE.pth",
          "diffusion_pytorch_model.safetensors.index.json"],
         ["config.json", "diffusion_pytorch_model-1.safetensors",
          "diffusion_pytorch_model.safetensors.index.json"]),
        (["adapter_config.json", "adapter_model.safetensors", "optimizer.pt"],
         ["adapter_config.json", "adapter_model.safetensors"]),
    ],
)  # fmt: skip
def test_what_a_repository_stands_for(files: list[str], wanted: list[str]) -> None:
    assert weights_among(files) == wanted
    assert local("a/b.pt") == Path("a/b.pt")
