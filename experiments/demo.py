"""A streamed video of the toy world, what it cost, and what the two alternatives to a ring cost."""

from __future__ import annotations

import functools
import os
import statistics
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from bench import figures, harness, tables
from bench.tables import Table
from experiments import rolling
from sfmodel.config import PRESETS
from sfmodel.dit import DiT
from sfmodel.machine import describe, machine
from sfmodel.pretrained import TOY_WEIGHTS, load_toy
from sfmodel.stream import Stream
from sfmodel.terminal import plain_console
from sfmodel.video import ContactSheet, VideoWriter

PAPER_WINDOW = 21  # latent frames, as Wan2.1's 81 pixel frames
LONG = 1201  # pixel frames of the stream whose cost per chunk is followed


def demo(
    prompt: str = "a large red ball moves up slowly",
    frames: int = 121,
    seed: int = 0,
    output: Path = Path("out/demo"),
) -> None:
    """Stream a video, then compare a ring cache with the two ways of doing without one.

    Args:
        prompt: What to show; the toy model knows balls (see `sfmodel generate --help`).
        frames: Pixel frames of the video.
        seed: The same seed gives the same video.
        output: Folder for the video, its contact sheet, the figure and the JSON.
    """
    if frames < 1:
        raise ValueError(f"frames={frames}: must be at least 1")
    console = plain_console(110)
    model, codec, text = load_toy()
    here = machine(model.device)
    console.print(
        f"streaming {prompt!r}: weights {TOY_WEIGHTS.name}, teacher-forced, "
        f"the first frame self-forced; {describe(here)}"
    )
    embedding = text([prompt], model.device)
    result: dict[str, Any] = {"machine": here, "prompt": prompt, "seed": seed, "frames": frames}
    result["stream"] = run_stream(model, codec, embedding, prompt, frames, seed, output)

    preset = replace(PRESETS["toy"], window=PAPER_WINDOW)
    with console.status("") as status:
        result["rolling"] = [
            rolling.compare(model, preset, embedding, batch=batch, tick=status.update)
            for batch in (1, 64)  # one stream waits for launches, many for arithmetic
        ]
    report(result, console)
    figures.save(figure(result), output / "demo.png")
    harness.write(output / "demo.json", result)
    console.print(f"video, contact sheet, figure and figures as JSON: {output}/")


def run_stream(
    model: DiT, codec: Any, text: torch.Tensor, prompt: str, frames: int, seed: int, output: Path
) -> dict[str, Any]:
    """Streams the video into a file, and on past it to see whether a late frame costs more."""
    preset = PRESETS["toy"]
    new_stream = functools.partial(Stream, model, codec, text, preset, seed=seed)
    sheet, clock = ContactSheet(), []
    next(new_stream().video())  # the first call warms PyTorch up
    with VideoWriter(output / "video.mp4", preset.fps) as writer:
        began = time.perf_counter()
        for pixels in new_stream().video(frames):
            clock.append(time.perf_counter() - began)
            writer.write(pixels[0])
            sheet.add(pixels[0])
    sheet.save(output / "video.png", title=prompt)

    follow: list[dict[str, float]] = []
    done, last = 0, time.perf_counter()
    for pixels in new_stream().video(LONG):
        now = time.perf_counter()
        done += pixels.shape[1]
        follow.append({"frame": done, "seconds": now - last, "rss_mib": resident_mib()})
        last = now
    early, late = early_and_late(new_stream().video(), new_stream().video())
    cache = model.new_cache(1, preset.window, preset.grid, preset.sink)
    return {
        "fps": frames / clock[-1],
        "first_frame_seconds": clock[0],
        "cache_mib": cache.nbytes / 2**20,
        "window": preset.window,
        "chunk": preset.chunk,
        "steps": len(preset.steps),
        "seconds_per_chunk_at_frame_100": early,
        "seconds_per_chunk_at_frame_1000": late,
        "rss_mib_at_frame_100": next(c["rss_mib"] for c in follow if c["frame"] >= 100),
        "rss_mib_at_frame_1000": next(c["rss_mib"] for c in follow if c["frame"] >= 1000),
        "chunks": follow,
    }


def early_and_late(*streams: Iterator[torch.Tensor]) -> list[float]:
    """Median seconds of a chunk around frames 100 and 1000 of two streams, chunk by chunk in turn,
    so that both meet the same moods of the machine."""
    done = 0
    while done < 900:
        done += next(streams[1]).shape[1]
    next(streams[0])  # its first chunk is shorter
    seconds: list[list[float]] = [[], []]
    for _ in range(16):  # frames 1 to 193 and 900 to 1092
        for chunks, times in zip(streams, seconds, strict=True):
            began = time.perf_counter()
            next(chunks)
            times.append(time.perf_counter() - began)
    return [*map(statistics.median, seconds)]


def resident_mib() -> float:
    """Memory this process holds now."""
    with open("/proc/self/statm") as statm:
        return int(statm.read().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20


def report(result: dict[str, Any], console: Console) -> None:
    s = result["stream"]
    rows = [
        ["frames a second, decoding included", f"{s['fps']:.0f}"],
        ["first frame after", f"{1e3 * s['first_frame_seconds']:.0f} ms"],
        [f"KV cache, {s['window']} latent frames", f"{s['cache_mib']:.2f} MiB"],
        *(
            [f"a chunk of 12 frames, around frame {n}",
             f"{1e3 * s[f'seconds_per_chunk_at_frame_{n}']:.1f} ms, "
             f"{s[f'rss_mib_at_frame_{n}']:.0f} MiB in the process"]
            for n in (100, 1000)
        ),
    ]  # fmt: skip
    title = describe(result["machine"])
    tables.show(Table(title, ("one stream of the toy world", ""), rows), console)
    for found in result["rolling"]:
        tables.show(rolling.ways_table(found), console)
    difference = max(r["relative_difference_in_first_window"] for r in result["rolling"])
    console.print(f"within the first window the three agree to {difference:.0e}")


def figure(result: dict[str, Any]) -> Any:
    """Left: cost of a chunk along a long stream. Right: the three ways against theory."""
    made, (left, right) = figures.new(describe(result["machine"]), 11, 4, columns=2)
    chunks = result["stream"]["chunks"][:-1]  # the last one may be cut short
    at, cost = [c["frame"] for c in chunks], [1e3 * c["seconds"] for c in chunks]
    middle = [statistics.median(cost[max(0, i - 4) : i + 5]) for i in range(len(cost))]
    left.plot(at, cost, linewidth=0.8, color=figures.LIGHT, label="each chunk")
    left.plot(at, middle, color=figures.BLUE, label="median of 9 chunks")
    left.set_ylim(0, 2 * 1e3 * result["stream"]["seconds_per_chunk_at_frame_1000"])
    left.set(xlabel="pixel frame", ylabel="ms for a chunk of 12 frames")
    title = "one stream through the ring: a late frame costs what an early one does"
    left.set_title(title, fontsize=9)
    one, many = result["rolling"]
    for i, (label, key, found, colour) in enumerate((
        ("theory (arithmetic)", "times_the_ring_in_theory", many, figures.LIGHT),
        (f"measured, {many['batch']} streams", "times_the_ring", many, figures.BLUE),
        ("measured, 1 stream", "times_the_ring", one, figures.ORANGE),
    )):  # fmt: skip
        values = [way[key] for way in found["ways"].values()]
        places = [x + (i - 1) * 0.27 for x in range(len(values))]
        bars = right.bar(places, values, 0.25, label=label, color=colour)
        right.bar_label(bars, fmt="%.1f", fontsize=8)
    right.set_xticks(range(len(one["ways"])), [*one["ways"]])
    right.set_ylabel("time of a chunk / ring cache's")
    right.set_title(f"past a window of {PAPER_WINDOW} latent frames", fontsize=9)
    for axis in (left, right):
        axis.legend(fontsize=8)
    return made
