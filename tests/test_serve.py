"""Live streams over a WebSocket: frames, what steers them, limits, and clients that come and go."""

from __future__ import annotations

import base64
import io
import json
import time
import urllib.request
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from sfmodel.footage import to_pixels
from sfmodel.pictures import covering_image
from sfmodel.serve.server import Limits
from tests.clips import read_video
from tests.live_server import (
    BLUE,
    EVERY,
    RED,
    SIZE,
    TOY,
    Live,
    alone,
    counted,
    first_frames,
    get,
    serving,
    toy,
    until,
)
from tests.live_server import live as live


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
