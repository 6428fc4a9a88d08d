"""Live streams over a WebSocket: frames, what steers them, limits, and clients that come and go."""

from __future__ import annotations

import base64
import gc
import io
import json
import os
import random
import socket
import struct
import threading
import time
import urllib.request
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor
from websockets.exceptions import ConnectionClosed

from sfmodel.footage import to_pixels
from sfmodel.pictures import covering_image
from sfmodel.serve import app, connection, session
from sfmodel.serve.server import Limits
from tests.clips import read_video
from tests.live_server import SIZE, TOY, Live, alone, serving, toy, until

RED, BLUE = "a large red ball moves up", "a large blue ball moves down"
EVERY: dict[str, Any] = {"live": False, "format": "rgb"}


@pytest.fixture
def live(tmp_path: Path) -> Any:
    with serving(tmp_path) as found:
        yield found


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


def test_every_frame_is_that_of_a_single_run(live: Live) -> None:
    want = first_frames(alone(RED, 5), 61)
    with live.client() as client:
        assert client.hello["preset"] == "toy" and client.hello["width"] == 64
        started = client.start(RED, seed=5, **EVERY)
        assert (started["seed"], started["made"], started["window"]) == (5, 0, 9)
        client.until_frame(60)
        for number in range(61):
            assert torch.equal(client.frames[number], want[number]), number
        assert {*client.prompts.values()} == {0}
        assert client.hello["places"] == 64 and counted(live, "sfmodel_sessions") == 1


def test_a_new_prompt_from_the_next_chunk_on(live: Live) -> None:
    with live.client() as client:
        client.start(RED, **EVERY)
        client.until_frame(12)
        client.send("prompt", text=BLUE)
        assert client.event("coming") | {} == {"type": "coming", "number": 1, "text": BLUE}
        begins = client.event("prompt")["frame"]
        client.until_frame(begins + 24)
        client.send("stop")
        client.event("stopped")
    assert [n for n, prompt in client.prompts.items() if prompt] == [
        n for n in client.frames if n >= begins
    ]
    stream, made, number = alone(RED), [], 0
    while number <= begins + 24:
        if number == begins:
            stream.set_prompt(toy()[2]([BLUE]))
        made.append(next(stream.frames())[0])
        number += len(made[-1])
    for number, want in enumerate(torch.cat(made)[: begins + 25]):
        assert torch.equal(client.frames[number], want), number
    assert client.frames[begins + 12].float().mean((0, 1)).argmax() == 2  # blue


def test_a_new_seed_begins_the_video_anew(live: Live) -> None:
    with live.client() as client:
        client.start(RED, **EVERY)
        client.until_frame(12)
        client.send("seed", seed=7)
        first = client.event("seed")["frame"]
        client.until_frame(first + 12)
    want = first_frames(alone(RED, 7), 13)
    assert all(torch.equal(client.frames[first + i], want[i]) for i in range(13))


def test_a_new_seed_right_after_a_new_prompt(live: Live) -> None:
    with live.client() as client:
        client.start(RED, **EVERY)
        client.until_frame(12)
        client.send("pause")
        client.event("paused")
        for text in ("a small ball", BLUE):
            client.send("prompt", text=text)
        client.send("seed", seed=3)
        first = client.event("seed")["frame"]
        client.send("resume")
        event = client.event("prompt")  # the one before was never seen
        assert (event["number"], event["frame"]) == (2, first)
        client.until_frame(first + 12)
        client.send("pause")
        client.event("paused")
        for _ in range(40):
            client.send("prompt", text=RED)
            client.event("coming")
        stream = live.server.sessions[0].stream
        assert stream is not None and len(stream.prompts) == 1
    want = first_frames(alone(BLUE, 3), 13)
    assert all(torch.equal(client.frames[first + i], want[i]) for i in range(13))
    assert client.prompts[first] == 2


def test_low_latency_sends_pieces_of_a_chunk(tmp_path: Path) -> None:
    """A new prompt begins with a chunk all the same."""
    with serving(tmp_path, low_latency=True) as live, live.client() as client:
        client.start(RED, **EVERY)
        client.until_frame(14)
        client.send("prompt", text=BLUE)
        begins = client.event("prompt")["frame"]
        assert begins % 12 == 1
        client.until_frame(begins + 12)
    assert [n for n, prompt in client.prompts.items() if prompt] == [
        n for n in client.frames if n >= begins
    ]
    want = first_frames(alone(RED, low_latency=True), begins)
    assert all(torch.equal(client.frames[i], want[i]) for i in range(begins))


def test_pause_stops_frames_and_the_engine(live: Live) -> None:
    want = first_frames(alone(RED), 61)
    with live.client() as client:
        client.start(RED, **EVERY)
        client.until_frame(24)
        client.send("pause")
        made = client.event("paused")["frame"]
        with pytest.raises(TimeoutError):
            while True:
                message = client.take(0.4)
                assert message is None or message["type"] == "stats"
        steps = counted(live, "sfmodel_step_seconds_count")
        assert max(client.frames) == made - 1
        assert json.loads(get(live, "/sessions"))["running"][0]["state"] == "paused"
        time.sleep(0.3)
        assert counted(live, "sfmodel_step_seconds_count") == steps
        client.send("resume")
        assert client.event("resumed")["frame"] == made
        client.until_frame(60)
    assert all(torch.equal(client.frames[i], want[i]) for i in range(61))


def test_one_connection_shows_streams_one_after_the_other(live: Live) -> None:
    with live.client() as client:
        names = []
        for prompt in (RED, BLUE):
            names.append(client.start(prompt, **EVERY)["session"])
            client.until_frame(12)
            client.send("stop")
            assert client.event("stopped")["reason"] == "asked"
            want = first_frames(alone(prompt), 13)
            assert all(torch.equal(client.frames[i], want[i]) for i in range(13))
        assert names[0] != names[1] and not live.server.sessions


def test_a_picture_to_start_from(live: Live, tmp_path: Path) -> None:
    file = tmp_path / "ball.png"
    picture = Image.new("RGB", (200, 100))
    picture.paste((40, 70, 200), (70, 20, 130, 80))
    picture.save(file)
    codec = toy()[1]
    pixels = to_pixels([covering_image(file, *SIZE)])[None]
    with torch.no_grad():
        latents = codec.encode_chunk(pixels)[0]
    stream = alone(BLUE, 1)
    stream.give(latents)
    want = first_frames(stream, 13)
    with live.client() as client:
        data = base64.b64encode(file.read_bytes()).decode()
        client.start(BLUE, seed=1, image=data, **EVERY)
        client.until_frame(12)
        client.send("seed", seed=1)  # which begins with the picture again
        again = client.event("seed")["frame"]
        client.until_frame(again + 12)
    for i in range(13):
        assert torch.equal(client.frames[i], want[i])
        assert torch.equal(client.frames[again + i], want[i])
    shown, given = want[0].float(), pixels[0, 0].movedim(0, -1).add(1).mul(127.5)
    assert (shown - given).abs().mean() < 25


def test_live_frames_are_pictures_at_the_videos_rate(live: Live) -> None:
    with live.client() as client:
        client.start(RED)
        began = time.monotonic()
        client.until_frame(48)
        seconds = time.monotonic() - began
        with Image.open(io.BytesIO(client.frames[48])) as picture:
            assert (picture.format, picture.size) == ("JPEG", SIZE)
            got = torch.from_numpy(np.asarray(picture).copy())
        want = first_frames(alone(RED), 49)[48]
        assert (got.int() - want.int()).abs().float().mean() < 3
    # The video has played for 37 frames, at least, when the last chunk is asked for.
    assert seconds > 37 / TOY.fps - 1 and client.stats["dropped"] == 0


def test_a_saved_clip_is_what_was_made(live: Live, tmp_path: Path) -> None:
    with live.client() as client:
        client.start(RED)
        client.until_frame(24)
        client.send("save")
        clip = client.event("saved")
        for name in ("url", "sheet"):
            with urllib.request.urlopen(f"http://{live.address}{clip[name]}") as answer:
                (tmp_path / f"got{clip[name][-4:]}").write_bytes(answer.read())
        assert json.loads(get(live, "/clips"))[0]["url"] == clip["url"]
    frames, fps = read_video(tmp_path / "got.mp4")
    assert fps == TOY.fps and len(frames) == clip["frames"] >= 25
    with Image.open(tmp_path / "got.png") as sheet:
        assert sheet.width > 500
    assert [each.suffix for each in sorted((tmp_path / "clips").iterdir())] == [".mp4", ".png"]


def test_places_are_taken_and_given_back(tmp_path: Path) -> None:
    with serving(tmp_path, Limits(sessions=2)) as live:
        one, two, three = (live.client() for _ in range(3))
        one.start(**EVERY)
        two.start(**EVERY)
        three.send("start", prompt=RED)
        said = three.event("error")
        assert said["about"] == "start"
        assert said["message"] == "all 2 places are taken: try again later"
        assert counted(live, "sfmodel_refused_total") == 1
        one.close()
        assert until(lambda: len(live.server.sessions) == 1, 1)
        three.start()
        two.close()
        three.close()


def test_devices_share_the_sessions(tmp_path: Path) -> None:
    with serving(tmp_path, Limits(sessions=2), engines=2) as live:
        clients = [live.client() for _ in range(4)]
        for i, client in enumerate(clients):
            client.start(RED, seed=i, **EVERY)
        assert [len(engine.taken) for engine in live.server.engines] == [2, 2]
        for i, client in enumerate(clients):
            client.until_frame(24)
            want = first_frames(alone(RED, i), 25)
            assert all(torch.equal(client.frames[n], want[n]) for n in range(25))
            client.close()


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


def test_a_client_that_vanishes_frees_its_place(live: Live) -> None:
    """Its connection is reset, as that of a process that is killed."""
    client = raw_client(live)
    client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    client.close()
    began = time.monotonic()
    assert until(lambda: not live.server.sessions and not live.server.connected, 5)
    assert time.monotonic() - began < 1
    assert until(lambda: not live.server.engines[0].running, 1)


def test_a_client_that_never_reads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It loses frames of its own, then its stream waits, then it is gone; others notice nothing."""
    monkeypatch.setattr(app, "UNSENT", 2**14)
    monkeypatch.setattr(session, "STALLED", 0.5)
    monkeypatch.setattr(connection, "GONE", 4.0)
    with serving(tmp_path) as live, live.client() as other:
        deaf = raw_client(live, format="rgb")
        (held,) = live.server.sessions
        other.start(RED, **EVERY)
        assert until(lambda: held.outbox.frames == 2 * held.chunk or held.outbox.stalled)
        assert until(lambda: held.outbox.stalled)
        made = held.made
        other.until_frame(max(other.frames, default=0) + 48)
        assert held.made - made <= 2 * held.chunk and held.outbox.frames <= 2 * held.chunk
        assert held.recorded_bytes <= session.RECORDED
        assert until(lambda: held.ended, 8) and len(live.server.sessions) == 1
        deaf.close()
        want = first_frames(alone(RED), 49)
        assert all(torch.equal(other.frames[i], want[i]) for i in range(49))


def test_a_slow_reader_of_every_frame_loses_none(live: Live) -> None:
    with live.client() as client:
        client.start(RED, **EVERY)
        for number in range(0, 61, 20):
            client.until_frame(number)
            time.sleep(0.3)
        held = live.server.sessions[0]
        assert held.outbox.dropped == 0 and held.outbox.frames <= 2 * held.chunk
        client.until_frame(72)
        assert [*client.frames] == [*range(len(client.frames))]


def test_idle_clients_and_long_streams_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connection, "TICK", 0.2)
    with serving(tmp_path, Limits(idle=1.0, seconds=0.5)) as live, live.client() as client:
        client.start(RED)
        assert client.event("stopped")["reason"] == "its 0.5 seconds are over"
        assert not live.server.sessions
        assert client.event("stopped")["reason"] == "idle for 1 seconds"
        with pytest.raises(ConnectionClosed, match="idle"):
            client.take()


def test_a_stream_that_fails_ends_alone(live: Live) -> None:
    with live.client() as good, live.client() as bad:
        good.start(RED, **EVERY)
        name = bad.start(BLUE, **EVERY)["session"]
        bad.until_frame(24)
        engine = live.server.engines[0]
        (held,) = (each for each in live.server.sessions if each.id == name)
        engine.call(lambda: held.stream and held.stream.cache.k.fill_(torch.nan))
        assert "NaN or infinity" in bad.event("stopped")["reason"]
        assert until(lambda: len(live.server.sessions) == 1, 1)
        good.until_frame(60)
        want = first_frames(alone(RED), 61)
        assert all(torch.equal(good.frames[i], want[i]) for i in range(61))
        bad.start(RED, **EVERY)
        bad.until_frame(12)
        assert counted(live, "sfmodel_sessions_failed_total") == 1


def test_a_batch_that_breaks_is_told(live: Live, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = live.server.engines[0]

    def broken(*_: Any) -> Any:
        raise RuntimeError("the device is lost")

    with live.client() as client:
        client.start(**EVERY)
        with monkeypatch.context() as patch:
            patch.setattr(engine.batch, "step", broken)
            assert client.event("stopped")["reason"] == "the stream failed: the device is lost"
        client.start(**EVERY)
        client.until_frame(12)


def test_health_without_an_engine(live: Live) -> None:
    assert json.loads(get(live, "/healthz")) == {"status": "ok"}
    live.server.engines[0].stop()
    with pytest.raises(urllib.error.HTTPError, match="503"):
        get(live, "/healthz")
    with live.client() as client:
        client.send("start", prompt=RED)
        assert client.event("error")["message"] == "the server ends"


def test_an_error_that_nobody_expects_is_told(live: Live, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: Any, **__: Any) -> Any:
        raise RuntimeError("CUDA out of memory\nand more")

    engine = live.server.engines[0]
    with live.client() as client:
        with monkeypatch.context() as patch:
            patch.setattr(engine.batch, "open", broken)
            client.send("start", prompt=RED)
            said = client.event("error")
            assert (said["about"], said["message"]) == ("start", "CUDA out of memory")
        assert not live.server.sessions
        client.start(RED)
        client.until_frame(12)
        with monkeypatch.context() as patch:
            patch.setattr(session, "to_jpeg", broken)
            assert "CUDA out of memory" in client.event("stopped")["reason"]
        assert not live.server.sessions
        with monkeypatch.context() as patch:
            patch.setattr(live.server.clips, "save", broken)
            client.send("save")  # of the stream that was there last
            assert client.event("error")["about"] == "save"
        client.send("save")
        assert client.event("saved")["frames"] >= 13


def test_who_leaves_while_something_takes_long_frees_the_place(
    live: Live, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(live.server.clips, "save", lambda *_: time.sleep(3))
    monkeypatch.setattr(connection, "covering_upload", lambda *_: time.sleep(3))
    for message in ("save", "picture"):
        with live.client() as client:
            if message == "save":
                client.start(RED)
                client.until_frame(0)
                client.send("save")
            else:
                client.send("start", prompt=RED, image="eA==")
            assert until(lambda: live.server.sessions)
            time.sleep(0.2)
        assert until(lambda: not live.server.sessions and not live.server.connected, 1)


def test_a_live_stream_runs_no_faster_than_it_plays(live: Live) -> None:
    with live.client() as client:
        client.start(RED)
        client.until_frame(12)
        began, first = time.monotonic(), live.server.sessions[0].made
        while time.monotonic() - began < 1.5:
            for kind, facts in (
                ("pause", {}),
                ("resume", {}),
                ("resume", {}),
                ("seed", {"seed": 1}),
            ):
                client.send(kind, **facts)
            client.event("seed")
        made = live.server.sessions[0].made - first
    # What plays, a chunk ahead of it, and chunks of one frame, which a new seed begins with.
    assert made <= TOY.fps * (time.monotonic() - began) + 2 * 12 + 4


class Soak:
    """Clients that come, steer and leave at random."""

    def __init__(self, live: Live, seconds: float, seed: int) -> None:
        self.live, self.end, self.seed = live, time.monotonic() + seconds, seed
        self.compared = 0
        self.errors: list[BaseException] = []

    def run(self, number: int) -> None:
        draw = random.Random(self.seed + number)
        try:
            while time.monotonic() < self.end:
                self.visit(draw)
        except BaseException as error:
            self.errors.append(error)

    def visit(self, draw: random.Random) -> None:
        """One client, which leaves politely or not."""
        seed, every = draw.randrange(100), draw.random() < 0.5
        with self.live.client() as client:
            if draw.random() < 0.1:
                return
            client.start(RED, seed=seed, live=not every, format="rgb" if every else "jpeg")
            if every:
                client.until_frame(draw.randrange(13, 40), 60)
                checked = min(13, len(client.frames))
                want = self.wanted(seed)
                assert all(torch.equal(client.frames[i], want[i]) for i in range(checked))
                self.compared += 1
            for _ in range(draw.randrange(4)):
                kind = draw.choice(["prompt", "seed", "pause", "resume", "save", "nonsense"])
                facts: dict[str, dict[str, Any]] = {"prompt": {"text": BLUE}, "seed": {"seed": 3}}
                client.send(kind, **facts.get(kind, {}))
                end = time.monotonic() + 0.5 * draw.random()
                while (left := end - time.monotonic()) > 0:
                    try:
                        client.take(left)
                    except TimeoutError:
                        break
            if draw.random() < 0.5:
                client.send("stop")
            if draw.random() < 0.3:
                client.socket.socket.shutdown(socket.SHUT_RDWR)

    _lock, _wanted = threading.Lock(), {}  # type: ignore[var-annotated]

    def wanted(self, seed: int) -> Tensor:
        with self._lock:
            if seed not in self._wanted:
                self._wanted[seed] = first_frames(alone(RED, seed), 13)
            found: Tensor = self._wanted[seed]
        return found


def resident() -> int:
    """Bytes of memory that this process has."""
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def test_clients_that_come_and_go(tmp_path: Path) -> None:
    """Of twenty at a time, none leaves a place, a task, a thread or memory behind, and each sees
    its own video. SERVE_SECONDS=120 is how long that was tried, once."""
    seconds = float(os.environ.get("SERVE_SECONDS", "10"))
    seed = random.randrange(10**6)
    print(f"seed {seed}")
    with serving(tmp_path, Limits(sessions=12)) as live:
        for part in range(2):  # the first fills what is kept for good
            soak = Soak(live, seconds * (0.3, 0.7)[part], seed + 100 * part)
            threads = [threading.Thread(target=soak.run, args=(i,)) for i in range(20)]
            for each in threads:
                each.start()
            for each in threads:
                each.join(seconds + 60)
            refused = [e for e in soak.errors if "places are taken" in str(e)]
            others = [e for e in soak.errors if e not in refused]
            assert not others, others[:3]
            assert until(lambda: not live.server.connected and not live.server.sessions, 5)
            assert until(lambda: not live.server.engines[0].batch.streams, 5)
            live.server.clips.saved.clear()
            gc.collect()
            if not part:
                before, names = resident(), {each.name for each in threading.enumerate()}
        grown = (resident() - before) / 2**20
        frames, started = (
            counted(live, f"sfmodel_{x}_total") for x in ("frames", "sessions_started")
        )
        print(f"{started:.0f} sessions, {soak.compared} compared, {frames:.0f} frames, "
              f"{grown:.0f} MiB more")  # fmt: skip
        assert soak.compared > 5 and grown < 150
        new = {each.name for each in threading.enumerate()} - names
        assert not [name for name in new if not name.startswith("AnyIO")]
