"""What a server of live streams refuses, in a sentence, and outlives."""

from __future__ import annotations

import base64
import contextlib
import http.client
import io
import json
import re
import signal
import socket
import struct
import subprocess
import sys
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor
from websockets.exceptions import ConnectionClosed, InvalidStatus

from sfmodel import pictures
from sfmodel.extras import EXTRAS
from sfmodel.serve import server
from sfmodel.serve.clips import Clips
from sfmodel.serve.messages import LARGEST, PICTURE, Prompt, Start, parse
from sfmodel.serve.session import RECORDED
from sfmodel.serve.text import TextThread
from tests.live_server import (
    RED,
    SIZE,
    TOY,
    Client,
    Live,
    framed,
    get,
    raw_client,
    serving,
    toy,
    until,
)
from tests.test_cli import refused

TOKEN = "a-token-of-the-test"


@pytest.fixture(scope="module")
def live(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Live]:
    with serving(tmp_path_factory.mktemp("live")) as found:
        yield found


def picture(mode: str, **options: Any) -> str:
    file = io.BytesIO()
    Image.new("RGB", (40, 30), "blue").save(file, mode, **options)
    return base64.b64encode(file.getvalue()).decode()


def declared(width: int, height: int) -> str:
    """A PNG that says to be so large, and holds nothing."""

    def part(name: bytes, data: bytes) -> bytes:
        return (
            struct.pack("!I", len(data)) + name + data + struct.pack("!I", zlib.crc32(name + data))
        )

    head = struct.pack("!IIBBBBB", width, height, 8, 2, 0, 0, 0)
    data = b"\x89PNG\r\n\x1a\n" + part(b"IHDR", head) + part(b"IDAT", zlib.compress(b"\0" * 100))
    return base64.b64encode(data + part(b"IEND", b"")).decode()


def start(**facts: Any) -> dict[str, Any]:
    return {"type": "start", "prompt": RED, **facts}


# A message, and what is answered.
HOSTILE: list[tuple[Any, str]] = [
    ("", "is no JSON"),
    ("{", "is no JSON"),
    ('{"type": "start", "prompt": "a red ball"} {}', "is no JSON"),
    ("[" * 200_000, "is no JSON"),
    ('{"type": "seed", "seed": NaN}', "is no JSON"),
    ('{"type": "seed", "seed": ' + "9" * 5000 + "}", "is no JSON"),
    ("null", "must be a JSON object"),
    ("[]", "must be a JSON object"),
    ("42", "must be a JSON object"),
    ('"start"', "must be a JSON object"),
    ({}, "type=None: must be one of start, prompt"),
    ({"type": None}, "type=None: must be one of"),
    ({"type": ["start"]}, "must be one of"),
    ({"type": "__init__"}, "type='__init__': must be one of"),
    ({"type": "x" * 10**6}, r"type='x{39}…: must be one of"),
    ({"type": "start"}, "start: has no prompt"),
    (start(prompt=7), "start: prompt=7: must be text"),
    (start(prompt={"a": [1]}), "must be text"),
    (start(prompt="a" * 5000), "prompt has 5,000 characters: must have at most 4,096"),
    (start(prompt="\ud800"), r"prompt='\\ud800': must be Unicode text"),
    (start(prompt="a\0ball"), "must be Unicode text"),
    (start(prompt="<script>alert(1)</script>"), "does not know 'script'"),
    (start(prompt="ball " * 17), "17 words, of which the toy model reads at most 16"),
    (start(path="/etc/passwd"), "start: 'path' is not known: it takes prompt, seed"),
    (
        start(seed=2**63),
        "seed=9223372036854775808: must be a whole number from -9223",
    ),
    (start(seed="1"), "seed='1': must be a whole number"),
    (start(seed=True), "seed=True: must be a whole number"),
    (start(seed=1.5), "seed=1.5: must be a whole number"),
    (start(live="yes"), "live='yes': must be true or false"),
    (start(format="png"), "format='png': must be jpeg or rgb"),
    (start(format=["rgb"]), "must be jpeg or rgb"),
    (start(quality=0), "quality=0: must be a whole number from 10 to 95"),
    (start(image="../../etc/passwd"), "image: must be a file in base64"),
    (start(image="file:///etc/passwd"), "image: must be a file in base64"),
    (start(image=7), "image: must be a file in base64"),
    (start(image=""), "image has 0 bytes: must have 1 to 8,388,608"),
    (start(image=base64.b64encode(bytes(PICTURE + 1)).decode()), "image has 8,388,609 bytes"),
    (start(image=base64.b64encode(b"no picture at all").decode()), "image: damaged, or no picture"),
    (start(image=picture("PNG")[:80]), "image: damaged"),
    (start(image=picture("GIF")), "image: damaged, or no picture"),
    (start(image=picture("PPM")), "image: damaged, or no picture"),
    (start(image=declared(200_000, 200_000)), "image: "),
    (start(image=declared(8190, 8190)), "image: damaged"),
    ({"type": "pause"}, "pause: no stream runs: start one first"),
    ({"type": "resume"}, "resume: no stream runs"),
    ({"type": "prompt", "text": RED}, "prompt: no stream runs"),
    ({"type": "seed", "seed": 1}, "seed: no stream runs"),
    ({"type": "save"}, "save: no stream has run"),
    ({"type": "stop"}, "stop: no stream runs"),
    ({"type": "stop", "all": True}, "stop: 'all' is not known: it takes nothing more"),
    (b"\x00\x01binary", "the message is binary: must be JSON text"),
    (bytes(10**6), "the message is binary"),
]


@pytest.mark.parametrize("known", range(len(HOSTILE)))
def test_a_hostile_message_is_answered_in_a_sentence(live: Live, known: int) -> None:
    message, said = HOSTILE[known]
    with live.client() as client:
        is_raw = isinstance(message, (str, bytes))
        client.socket.send(message if is_raw else json.dumps(message))
        event = client.event("error")
        answer = event["message"]
        known_type = isinstance(message, dict) and message.get("type") in ("start", "save", "seed")
        assert event["about"] == (message["type"] if known_type else event["about"])
        assert re.search(said, answer) and "\n" not in answer and len(answer) < 300, answer
        client.start(RED)  # as if nothing had been
        client.until_frame(0)
    assert until(lambda: not live.server.sessions)


def test_out_of_order_while_a_stream_runs(live: Live) -> None:
    with live.client() as client:
        client.start(RED)
        for message, said in [
            (start(), "start: a stream runs already: stop it first"),
            (
                {"type": "prompt", "text": RED, "over": 0},
                "over=0: must be a whole number from 1 to",
            ),
            ({"type": "prompt", "text": RED, "over": 65}, "over=65: must be"),
            ({"type": "prompt", "text": "a cat"}, "does not know 'cat'"),
            ({"type": "prompt", "text": RED, "keep_cache": 1}, "keep_cache=1: must be true or"),
        ]:
            client.send(**{"kind": message.pop("type"), **message})
            assert said in client.event("error")["message"]
        client.until_frame(24)
    with live.client() as client:
        client.start(RED, format="rgb")
        client.send("save")
        assert "save: goes with format jpeg" in client.event("error")["message"]


@pytest.mark.parametrize(
    ("data", "code"),
    [
        (framed(b"\xff\xfe"), 1007),  # no UTF-8
        (framed(b"x", opcode=3), 1002),  # reserved
        (b"\x81\x01x", 1002),  # not masked
        (framed(b"x" * 200, opcode=9), 1002),  # a ping of too many bytes
        (framed(b"x", opcode=0), 1002),  # the rest of nothing
        (framed(bytes(LARGEST + 1)), 1009),
    ],
)
def test_what_is_no_websocket_message_ends_the_connection(
    live: Live, data: bytes, code: int
) -> None:
    with raw_client(live) as client:
        try:
            client.sendall(data)
            client.settimeout(10)
            while client.recv(2**16):
                pass
        except ConnectionError:
            pass
    assert until(lambda: not live.server.connected and not live.server.sessions)
    if code != 1009:
        with live.client() as other:
            other.start(RED)


def test_a_flood_of_messages_ends_the_connection(live: Live) -> None:
    with live.client() as client:
        with contextlib.suppress(ConnectionClosed):
            for _ in range(500):
                client.socket.send('{"type": "pause"}')
        assert until(lambda: not live.server.connected)


def test_large_messages_do_not_pile_up(live: Live) -> None:
    large = json.dumps({"type": "nonsense", "a": "x" * (LARGEST // 2)})
    with live.client() as client, pytest.raises(ConnectionClosed, match="too many messages"):
        client.send("start", prompt=RED, image=picture("PNG"))  # takes a while to answer
        for _ in range(4):
            client.socket.send(large)
        client.event("never")
    assert until(lambda: not live.server.connected)


def answer(live: Live, path: str, **headers: str) -> tuple[int, str]:
    host, port = live.address.split(":")
    asked = http.client.HTTPConnection(host, int(port), timeout=10)
    asked.request("GET", path, headers=headers)
    got = asked.getresponse()
    text = got.read().decode()
    asked.close()
    return got.status, text


@pytest.mark.parametrize(
    "path",
    [
        "/clips/../../etc/passwd", "/clips/..%2f..%2fetc%2fpasswd", "/clips/%2e%2e%2f", "/clips/",
        "/clips/x.mp4", "/clips/\x2f\x2fetc", "/../page.css", "/page/index.html", "//etc/passwd",
        "/clips/" + "x" * 5000, "/clips/a%00.mp4",
    ],
)  # fmt: skip
def test_no_path_of_a_clients_is_opened(live: Live, path: str) -> None:
    status, text = answer(live, path)
    assert status in (404, 307) and "root:" not in text


def test_pages_of_others_are_refused(live: Live) -> None:
    for headers, status in [
        ({"Host": "evil.example"}, 421),
        ({"Host": "127.0.0.1.evil.example:80"}, 421),
        ({"Host": ""}, 421),
        ({"Host": "[::1"}, 421),
        ({"Host": "localhost:1"}, 200),
        ({"Host": "[::1]:80"}, 200),
        ({"Origin": "http://evil.example"}, 403),
        ({"Origin": "null"}, 403),
        ({"Origin": "http://127.0.0.1:1"}, 403),
        ({"Origin": f"http://{live.address}"}, 200),
    ]:
        assert answer(live, "/sessions", **headers)[0] == status, headers
    for origin in ("http://evil.example", "null"):
        with pytest.raises(InvalidStatus, match="403"):
            live.client(origin=origin)
    live.client(origin=f"http://{live.address}").close()
    status, _ = answer(live, "/")
    assert status == 200


def test_the_pages_headers(live: Live) -> None:
    host, port = live.address.split(":")
    asked = http.client.HTTPConnection(host, int(port))
    asked.request("GET", "/")
    got = asked.getresponse()
    assert "default-src 'self'" in got.headers["content-security-policy"]
    assert got.headers["x-content-type-options"] == "nosniff" and "server" not in got.headers
    page = got.read().decode()
    asked.close()
    assert "http" not in re.sub(r"http-equiv", "", page)  # nothing from elsewhere


def test_a_token(tmp_path: Path) -> None:
    with serving(tmp_path, token=TOKEN, origins=["https://friend.example"]) as live:
        bearer = {"Authorization": f"Bearer {TOKEN}"}
        assert answer(live, "/healthz")[0] == 200
        for path in ("/", "/metrics", "/sessions", "/clips", "/page.js", "/clips/x.mp4"):
            assert answer(live, path)[0] == 401
        for wrong in ("Bearer", "Bearer x", f"Basic {TOKEN}", TOKEN, "Bearer é"):
            assert answer(live, "/sessions", Authorization=wrong)[0] == 401
        assert answer(live, "/sessions?token=x")[0] == 401
        assert answer(live, "/sessions", Cookie='sfmodel-token-1="')[0] == 401
        assert answer(live, "/sessions", **bearer)[0] == 200
        # A name that it does not know may be its own, which only whoever has the token asks for.
        assert answer(live, "/sessions", Host="my.example", **bearer)[0] == 200
        assert answer(live, "/sessions", Origin="http://evil.example", **bearer)[0] == 403
        assert answer(live, "/sessions", Origin="https://friend.example", **bearer)[0] == 200
        for headers in ({}, {"Authorization": "Bearer x"}):
            with pytest.raises(InvalidStatus, match="403"):
                live.client(additional_headers=headers)
        with live.client(additional_headers=bearer) as client:
            client.start(RED)
        host, port = live.address.split(":")
        asked = http.client.HTTPConnection(host, int(port))
        asked.request("GET", f"/?token={TOKEN}")
        got = asked.getresponse()
        asked.close()
        assert (got.status, got.headers["location"]) == (303, "/")
        cookie = got.headers["set-cookie"]
        assert "HttpOnly" in cookie and "SameSite=lax" in cookie
        with live.client(additional_headers={"Cookie": cookie.partition(";")[0]}) as client:
            client.start(RED)


def test_too_many_clients(tmp_path: Path) -> None:
    with serving(tmp_path, server.Limits(connections=2)) as live:
        with live.client(), live.client(), pytest.raises((InvalidStatus, ConnectionClosed)):
            live.client()
        live.client().close()


def test_a_message_is_read() -> None:
    assert parse('{"type": "start", "prompt": " a ball "}') == Start("a ball")
    said = parse('{"type": "prompt", "text": "é", "over": 4, "keep_cache": true}')
    assert said == Prompt("é", 4, True)
    image = parse(json.dumps(start(image=base64.b64encode(b"x").decode(), quality=None)))
    assert isinstance(image, Start) and image.image == b"x"
    assert len(json.dumps(start(image="A" * (4 * PICTURE // 3), prompt="é" * 4096))) < LARGEST


def test_pictures_of_anyone(monkeypatch: pytest.MonkeyPatch) -> None:
    """In a process of its own, which is ended where it takes too much."""
    data = base64.b64decode(picture("WEBP"))
    image = pictures.covering_upload(data, *SIZE)
    assert image.shape == (64, 64, 3) and image.mean((0, 1)).argmax() == 2
    with monkeypatch.context() as patch:
        patch.setattr(sys, "executable", "/bin/false")
        with pytest.raises(ValueError, match="takes too much memory or time"):
            pictures.covering_upload(data, *SIZE)
    monkeypatch.setattr(pictures, "SECONDS", 0.001)
    with pytest.raises(ValueError, match="takes too long"):
        pictures.covering_upload(data, *SIZE)


def test_clips_end_at_a_limit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clips, frame = Clips(tmp_path, 16), base64.b64decode(picture("JPEG"))
    with pytest.raises(ValueError, match="no frame to save yet"):
        clips.save([], "x")
    clip = clips.save([frame] * 5, "x")
    assert clips.find(clip.video.name) == clip.video and clips.find(clip.sheet.name) == clip.sheet
    for name in ("", ".", "..", clip.video.stem, f"{clip.video.stem}.txt", f"../{clip.video.name}"):
        assert clips.find(name) is None
    monkeypatch.setattr("sfmodel.serve.clips.LARGEST", 10)
    with pytest.raises(ValueError, match=r"saved clips take .* GiB: no more are taken"):
        clips.save([frame] * 5, "x")


def test_prompts_are_encoded_by_one_encoder_that_stays() -> None:
    loads: list[str] = []

    class Encoder:
        text_dim = text_len = 4
        identity = "test"

        def __call__(self, sentences: Any, device: Any = "cpu") -> Tensor:
            raise AssertionError

        def rows(self, sentences: Any, device: Any = "cpu") -> Iterator[Tensor]:
            loads.append("loaded")
            for sentence in sentences:
                if sentence == "bad":
                    raise ValueError("no prompt")
                yield torch.full((1, 4), float(len(sentence)))

    thread = TextThread(Encoder(), torch.device("cpu"))
    futures = [thread.encode(text) for text in ("a", "bb", "bad", "ccc")]
    assert [float(futures[i].result(5)[0, 0]) for i in (0, 1, 3)] == [1, 2, 3]
    with pytest.raises(ValueError, match="no prompt"):
        futures[2].result(5)
    assert loads == ["loaded"] * 2
    thread.stop()


def test_places_are_those_that_memory_has(monkeypatch: pytest.MonkeyPatch) -> None:
    model, codec, _ = toy()

    _, held = server.warmed_up(model, codec, TOY)
    slots = TOY.window * 4
    cache = 2 * TOY.dit.layers * (slots + TOY.dit.text_len) * TOY.dit.dim * 4
    assert cache < held < 4 * cache
    monkeypatch.setattr(server, "_available", lambda: 10 * (RECORDED + held))
    assert server.room(torch.device("cpu"), held) == 8
    monkeypatch.setattr(server, "_available", lambda: held)
    with pytest.raises(MemoryError, match="make the window or the picture smaller"):
        server.room(torch.device("cpu"), held)


Run = Callable[..., "subprocess.Popen[str]"]


@pytest.fixture
def command(tmp_path: Path) -> Iterator[Run]:
    begun: list[subprocess.Popen[str]] = []

    def run(*words: str) -> subprocess.Popen[str]:
        begun.append(
            subprocess.Popen(
                [sys.executable, "-m", "sfmodel", "serve", "--port", "0", *words], cwd=tmp_path,
                stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
            )
        )  # fmt: skip
        return begun[-1]

    yield run
    for each in begun:
        each.kill()
        each.communicate()


@pytest.mark.parametrize("stop", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_the_command(command: Run, stop: signal.Signals) -> None:
    process = command("--window", "6", "--sink", "1")
    assert process.stdout is not None
    address = process.stdout.readline().strip()
    assert re.fullmatch(r"http://127\.0\.0\.1:\d+/", address)
    said = r"toy on cpu: 64 streams at once, about \d+ in real time; Ctrl-C ends it\n"
    assert re.fullmatch(said, process.stdout.readline())
    with Client(f"ws{address[4:]}stream") as client:
        assert client.hello["window"] == 6 and len(client.hello["examples"]) == 4
        client.start(RED)
        client.until_frame(12)
        process.send_signal(stop)
        out, said = process.communicate(timeout=20)
    said = re.sub(r"warming up: [\d.]+ s\n", "", said)  # where it takes more than a second
    assert (process.returncode, out, said) == (130, "", "")


def test_the_command_on_other_addresses_wants_a_token(command: Run) -> None:
    process = command("--host", "0.0.0.0", "--token", TOKEN, "--sessions", "1")
    assert process.stdout is not None
    address = process.stdout.readline().strip()
    name = re.escape(socket.gethostname())
    found = re.fullmatch(rf"http://{name}:(\d+)/\?token={TOKEN}", address)
    assert found is not None
    assert process.stdout.readline().startswith("toy on cpu: 1 stream at once")
    live = Live(None, f"127.0.0.1:{found[1]}")  # type: ignore[arg-type]
    assert answer(live, "/")[0] == 401
    assert answer(live, "/", Authorization=f"Bearer {TOKEN}")[0] == 200


def test_bad_options_are_one_sentence(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)

    def said(*words: object) -> str:
        return refused(monkeypatch, capsys, "serve", *words)

    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        assert f"cannot listen on 127.0.0.1, port {port}: Address already" in said("--port", port)
    assert "cannot listen on 192.0.2.1, port 80" in said("--host", "192.0.2.1", "--port", 80)
    assert "port=70000: must be 0 to 65535" in said("--port", 70000)
    assert "token: must have 16 letters or more" in said("--token", "short")
    assert "sessions=0: must be more than 0" in said("--sessions", 0)
    assert "idle=-1.0: must be more than 0" in said("--idle", -1)
    assert "devices='moon': is no device" in said("--devices", "moon")
    assert "devices='cuda:7': is no device" in said("--devices", "cuda:7")
    assert "origins='evil': must be as https://example.org" in said("--origins", "evil")
    assert "demo: is the toy world" in said("--demo", "--preset", "wan-1.3b")
    assert "window=2 is smaller than a chunk of 3" in said("--window", 2)
    assert "must be one of toy" in said("--preset", "huge")
    (tmp_path / "file").write_text("")
    assert "cannot write" in said("--clips", tmp_path / "file")
    monkeypatch.setitem(EXTRAS, "serve", ("starlette", "no_such_library"))
    needs = said()
    assert needs == (
        "sfmodel serve: needs no_such_library, not installed: pip install 'sfkernels[serve]'"
    )


def test_metrics_are_prometheus_text(live: Live) -> None:
    text = get(live, "/metrics")
    for name in ("connections", "sessions", "places", "frames_total", "step_seconds_bucket"):
        assert f"\nsfmodel_{name}" in text
