"""A server of live streams of the toy, in a thread of the test's process, and clients of it."""

from __future__ import annotations

import base64
import contextlib
import functools
import json
import os
import socket
import struct
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from torch import Tensor
from websockets.sync.client import ClientConnection, connect

from sfmodel.config import PRESETS, Preset
from sfmodel.pretrained import load_toy
from sfmodel.serve.app import listening, uvicorn_server
from sfmodel.serve.messages import HEADER
from sfmodel.serve.server import Limits, Server
from sfmodel.stream import Stream

TOY = PRESETS["toy"]
RED, BLUE = "a large red ball moves up", "a large blue ball moves down"
EVERY: dict[str, Any] = {"live": False, "format": "rgb"}  # frame, as it is
SIZE = 8 * TOY.height, 8 * TOY.width
toy = functools.cache(load_toy)


def until(true: Callable[[], Any], seconds: float = 10.0) -> bool:
    """Waits for something to be true; returns whether it is."""
    end = time.monotonic() + seconds
    while not true():
        if time.monotonic() > end:
            return False
        time.sleep(0.005)
    return True


class Live(NamedTuple):
    server: Server
    address: str  # host and port
    running: Any = None  # uvicorn's server

    def client(self, **options: Any) -> Client:
        return Client(f"ws://{self.address}/stream", **options)


@contextlib.contextmanager
def serving(
    folder: Path,
    limits: Limits | None = None,
    token: str | None = None,
    origins: Sequence[str] = (),
    engines: int = 1,
    preset: Preset = TOY,
    port: int = 0,
    **options: Any,
) -> Iterator[Live]:
    model, codec, text = toy()
    before = {*threading.enumerate()}
    server = Server(
        [model] * engines, [codec] * engines, text, "toy", preset, folder / "clips", limits,
        ["a red ball"], **options,
    )  # fmt: skip
    listens = listening("127.0.0.1", port)
    running = uvicorn_server(server, token, origins)
    thread = threading.Thread(target=running.run, args=([listens],))
    thread.start()
    try:
        assert until(lambda: running.started)
        yield Live(server, f"127.0.0.1:{listens.getsockname()[1]}", running)
        assert until(lambda: running.should_exit or not server.connected), (
            "a connection is left behind"
        )
    finally:
        running.should_exit = True
        thread.join(20)
        listens.close()
    assert not thread.is_alive()
    assert not server.sessions and not any(each.running for each in server.engines)
    assert not any(each.batch.streams for each in server.engines)
    left = [each.name for each in threading.enumerate() if each not in before]
    assert not [name for name in left if not name.startswith("AnyIO")], left


@pytest.fixture
def live(tmp_path: Path) -> Iterator[Live]:
    with serving(tmp_path) as found:
        yield found


class Client:
    """A client that keeps what comes. events: messages but `stats`; frames: of the last session,
    pictures [H, W, 3] or JPEG files by their numbers; prompts: of each frame."""

    def __init__(self, url: str, **options: Any) -> None:
        self.open = contextlib.ExitStack()
        self.socket: ClientConnection = self.open.enter_context(
            connect(url, max_size=None, close_timeout=0.2, **options)
        )
        self.events: list[dict[str, Any]] = []
        self.frames: dict[int, Any] = {}
        self.prompts: dict[int, int] = {}
        self.stats: dict[str, Any] = {}
        self.raw = False
        self.hello = self.event("hello")

    def __enter__(self) -> Client:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        self.open.close()

    def send(self, kind: str, **facts: Any) -> None:
        self.socket.send(json.dumps({"type": kind, **facts}))

    def start(self, prompt: str = "a large red ball moves up", **options: Any) -> dict[str, Any]:
        self.frames, self.prompts = {}, {}
        self.raw = options.get("format") == "rgb"
        self.send("start", prompt=prompt, **options)
        return self.event("started")

    def take(self, seconds: float = 10.0) -> dict[str, Any] | None:
        """The next thing, which is returned if it is a message. Raises TimeoutError."""
        item = self.socket.recv(timeout=seconds)
        if isinstance(item, str):
            message: dict[str, Any] = json.loads(item)
            if message["type"] == "stats":
                self.stats = message
            else:
                self.events.append(message)
            return message
        number, prompt = HEADER.unpack_from(item)
        data: Any = item[HEADER.size :]
        if self.raw:
            data = torch.from_numpy(np.frombuffer(data, np.uint8).reshape(*SIZE, 3).copy())
        assert number not in self.frames
        self.frames[number], self.prompts[number] = data, prompt
        return None

    def event(self, kind: str, seconds: float = 10.0) -> dict[str, Any]:
        """The next message of a type; of another one if that is an error."""
        end = time.monotonic() + seconds
        while True:
            message = self.take(end - time.monotonic())
            if message is not None and message["type"] == kind:
                return message
            assert message is None or message["type"] != "error" or kind == "error", message

    def until_frame(self, number: int, seconds: float = 20.0) -> None:
        end = time.monotonic() + seconds
        while number not in self.frames:
            self.take(end - time.monotonic())


def alone(prompt: str, seed: int = 0, preset: Preset = TOY, **options: Any) -> Stream:
    """A stream by itself, of what a session shows."""
    model, codec, text = toy()
    return Stream(model, codec, text([prompt]), preset, seed=seed, **options)


def get(live: Live, path: str) -> str:
    with urllib.request.urlopen(f"http://{live.address}{path}", timeout=10) as answer:
        text: str = answer.read().decode()
    return text


def counted(live: Live, name: str) -> float:
    """A metric as `/metrics` gives it."""
    lines = get(live, "/metrics").splitlines()
    return sum(
        float(line.split()[-1]) for line in lines if line.startswith((f"{name} ", f"{name}{{"))
    )


def first_frames(stream: Any, count: int) -> Tensor:
    return torch.cat([*stream.frames(count)], 1)[0]


def raw_client(live: Live, **options: Any) -> socket.socket:
    """A client that has started a stream, of which it has taken nothing."""
    found = socket.socket()
    found.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    host, port = live.address.split(":")
    found.connect((host, int(port)))
    key = base64.b64encode(os.urandom(16)).decode()
    found.sendall(
        f"GET /stream HTTP/1.1\r\nHost: {live.address}\r\nUpgrade: websocket\r\nConnection: Upgrade"
        f"\r\nSec-WebSocket-Key: {key}\r\nSec-WebSocket-Version: 13\r\n\r\n".encode()
    )
    answer = b""
    while not answer.endswith(b"\r\n\r\n"):
        answer += found.recv(1)
    found.sendall(framed(json.dumps({"type": "start", "prompt": RED, **options}).encode()))
    assert until(lambda: live.server.sessions)
    return found


def framed(data: bytes, opcode: int = 1, final: bool = True) -> bytes:
    """A frame of the WebSocket protocol, masked by zeros."""
    size = len(data)
    head = bytes(
        [0x80 * final | opcode, 0x80 | (size if size < 126 else 126 if size < 65536 else 127)]
    )
    more = b"" if size < 126 else struct.pack("!H" if size < 65536 else "!Q", size)
    return head + more + bytes(4) + data
