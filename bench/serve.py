"""`python -m bench serve`: frames a second of several streams: one after the other, in one batch,
and served to clients.

Each stream has a prompt, a seed and a state of its own, a full window, and its frames are decoded.
"One at a time" makes the next chunk of each by itself, "batched" all at once, as `sfmodel serve`
does, each as if it were alone, bit for bit, which is checked first; "batched, inexact" has linear
layers see all streams at once, too. They take turns. "Served" is `sfmodel serve` at work: as many
clients, in a process of their own, take every frame as JPEG as fast as they can.

On a CPU the toy, on a GPU Wan2.1-1.3B at 480×832 with random weights: not measured on one yet.
"""

from __future__ import annotations

import functools
import json
import math
import multiprocessing
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bench import timing
from bench.figures import BLUE, GREY, ORANGE, new
from bench.harness import Job
from bench.inputs import StreamInputs, full_size, toy
from bench.tables import Result, Table, left_out, of_entries, timed, value
from sfmodel.batching import StreamBatch
from sfmodel.cost import PIXEL_FRAMES
from sfmodel.extras import check_installed
from sfmodel.machine import describe
from sfmodel.stream import Stream

COUNTS, FULL_COUNTS = (1, 4, 16), (1, 4)  # streams
ALONE, BATCHED, INEXACT, SERVED = "one at a time", "batched", "batched, inexact", "served"
COLOURS = {ALONE: GREY, BATCHED: BLUE, INEXACT: "#8fb3d9", SERVED: ORANGE}
ROUNDS = 12
SECONDS = 20.0  # that the rounds of a case may take
WATCHED = 5.0  # seconds for which clients are counted
CHECKED = 3  # chunks whose frames are compared


def run(job: Job) -> Result:
    inputs = toy() if job.tiny else full_size(job.device)
    result = job.begin("serve", inputs.model.dtype)
    result["window"], result["chunk"] = inputs.preset.window, inputs.preset.chunk
    for count in COUNTS if job.tiny else FULL_COUNTS:
        label = _label(count)
        job.add(result, label, functools.partial(measure, job, inputs, count))
    return job.end(result)


def _label(count: int) -> str:
    return f"{count} stream{'s' * (count > 1)}"


def measure(job: Job, inputs: StreamInputs, count: int) -> Result:
    """A row: of so many streams."""
    preset, frames = inputs.preset, PIXEL_FRAMES * inputs.preset.chunk
    job.tick(f"{_label(count)}: a full window")

    def streams(make: Any) -> list[Stream]:
        text_BTE = inputs.text_BTE[:1]
        return [make(inputs.codec, text_BTE, preset, seed=seed) for seed in range(count)]

    def each() -> list[Tensor]:
        return [next(stream.frames()) for stream in alone]

    alone = streams(functools.partial(Stream, inputs.model))
    batches = {BATCHED: StreamBatch(inputs.model), INEXACT: StreamBatch(inputs.model, exact=False)}
    for batch in batches.values():
        streams(batch.open)
    entries: dict[str, Any] = {}
    filling = math.ceil(preset.window / preset.chunk) + 1
    for chunk in range(max(CHECKED, filling)):
        want = each()
        for name, batch in batches.items():
            got = [*batch.step().values()]
            same = all(torch.equal(a, b) for a, b in zip(got, want, strict=True))
            if name == BATCHED and not same and chunk < CHECKED:
                entries[name] = {"failed": f"{timing.WRONG}: not the frames of single runs"}
    calls: dict[str, Any] = {ALONE: each, **{name: batch.step for name, batch in batches.items()}}
    calls = {name: functools.partial(_clocked, job, call)
             for name, call in calls.items() if name not in entries}  # fmt: skip
    job.tick(_label(count))
    until = time.monotonic() + min(SECONDS, job.left)
    times, failures = timing.in_turn(
        calls, ROUNDS, lambda i: i < timing.FEWEST or time.monotonic() < until
    )
    more = {"frames": frames * count}
    entries |= {name: timing.entry(timing.summary(each), **more) for name, each in times.items()}
    entries |= {name: timing.failed(error) for name, error in failures.items()}
    for batch in batches.values():
        batch.streams.clear()
    job.tick(f"{_label(count)}, served")
    try:
        check_installed("bench serve", "uvicorn", "serve")
        fps = served(inputs, count)
        entries[SERVED] = {"ms": 1e3 * frames * count / fps, **more}
    except Exception as error:  # not installed
        entries[SERVED] = timing.failed(error)
    return {"streams": count, "contestants": entries}


def _clocked(job: Job, call: Any) -> float:
    return timing.clocked(call, job.device).whole


class _Given:
    """A text encoder that gives every prompt the same embedding."""

    identity = "given"

    def __init__(self, text_BTE: Tensor) -> None:
        self.text_TE = text_BTE[0].cpu()
        self.text_len, self.text_dim = text_BTE.shape[1:]

    def __call__(self, sentences: Any, device: Any = "cpu") -> Tensor:
        return self.text_TE.expand(len(sentences), -1, -1).to(device)

    def rows(self, sentences: Any, device: Any = "cpu") -> Iterator[Tensor]:
        for _ in sentences:
            yield self.text_TE


def served(inputs: StreamInputs, count: int) -> float:
    """Frames a second that so many clients are sent, all together."""
    from sfmodel.serve.app import listening, uvicorn_server
    from sfmodel.serve.server import Limits, Server

    codec: Any = inputs.codec
    with tempfile.TemporaryDirectory() as folder, listening("127.0.0.1", 0) as socket:
        server = Server(
            [inputs.model], [codec], _Given(inputs.text_BTE), "bench", inputs.preset, Path(folder),
            Limits(sessions=count),
        )  # fmt: skip
        running = uvicorn_server(server)
        serving = threading.Thread(target=running.run, args=([socket],))
        serving.start()
        spawn = multiprocessing.get_context("spawn")
        stop = spawn.Event()
        port = socket.getsockname()[1]
        clients = spawn.Process(target=watch, args=(f"ws://127.0.0.1:{port}/stream", count, stop))
        clients.start()
        try:
            waited = time.monotonic()
            filled = inputs.preset.chunk * PIXEL_FRAMES * 2
            while len(server.sessions) < count or min(s.made for s in server.sessions) < filled:
                if time.monotonic() - waited > 300 or not clients.is_alive():
                    raise RuntimeError("the clients got no frames")
                time.sleep(0.05)
            sessions, began = server.sessions, time.monotonic()
            before = sum(session.made for session in sessions)
            time.sleep(WATCHED)
            made = sum(session.made for session in sessions) - before
            return made / (time.monotonic() - began)
        finally:
            stop.set()
            clients.join()
            running.should_exit = True
            serving.join()


def watch(url: str, count: int, stop: Any) -> None:
    """Clients, each in a thread, that take frames until they are told to stop."""
    from websockets.exceptions import ConnectionClosed
    from websockets.sync.client import connect

    def one(seed: int) -> None:
        with connect(url, max_size=None, close_timeout=1) as socket:
            prompt = {"type": "start", "prompt": "", "seed": seed, "live": False}
            socket.send(json.dumps(prompt))
            try:
                while not stop.is_set():
                    socket.recv()
            except ConnectionClosed:
                return

    threads = [threading.Thread(target=one, args=(seed,)) for seed in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


def _fps(entry: Result) -> float:
    return float(1e3 * entry["frames"] / entry["ms"])


def tables(result: Result) -> list[Table]:
    def ratio(row: Result, entry: Result) -> str:
        alone = timed(row).get(ALONE)
        return f"{_fps(entry) / _fps(alone):.2f}" if alone else ""

    columns = {
        "FPS, all together": lambda _, e: f"{_fps(e):.0f}",
        "FPS of each": lambda row, e: f"{_fps(e) / row['streams']:.1f}",
        "ms a chunk": value("ms", "{:.1f}".format),
        "p99": value("p99_ms", "{:.1f}".format),
        "/ one at a time": ratio,
    }
    title = f"streams side by side: {result['sizes']}, {describe(result['machine'])}"
    return [of_entries(title, result["rows"], columns, left_out(result))]


def figures(result: Result) -> Iterator[tuple[str, Any]]:
    rows = [row for row in result["rows"] if timed(row)]
    if not rows:
        return
    figure, (ax,) = new(f"{result['sizes']}, {describe(result['machine'])}", 6, 3.6)
    for name, colour in COLOURS.items():
        points = [(row["streams"], _fps(timed(row)[name])) for row in rows if name in timed(row)]
        ax.plot(*zip(*points, strict=True), "o-", color=colour, label=name)
    ax.set_xscale("log", base=2)
    ax.set_xticks([row["streams"] for row in rows], [str(row["streams"]) for row in rows])
    ax.set(xlabel="streams", ylabel="frames a second, all together")
    ax.set_ylim(bottom=0)
    ax.legend(fontsize=7)
    yield "serve", figure
