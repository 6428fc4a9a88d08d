"""`python -m bench extrapolate`: three ways to go on past the window (arXiv 2506.08009, Figure 3),
at several window lengths, with random weights and without decoding.

recompute window: no cache; every denoising step runs all frames of the window.
recompute cache:  the window's clean frames are run again for each chunk, then the chunk denoised.
ring cache:       what has been computed stays; a chunk costs its steps and one clean pass.

While the first window fills, all three compute the same video; that is checked before anything is
timed. Past it the two that recompute forget what the ring still carries from older frames. Beside
them a model without a past, for which a longer video means all of its frames at once. Its full size
is not measured on a GPU yet.
"""

from __future__ import annotations

import functools
import itertools
import math
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any, Protocol

import torch
from torch import Tensor

from bench import harness, timing
from bench.inputs import random_model
from sfkernels import BlockLayout
from sfmodel import ranges
from sfmodel.config import PRESETS, Preset
from sfmodel.cost import pass_flops, rolling_flops
from sfmodel.dit import DiT
from sfmodel.machine import describe
from sfmodel.schedule import FlowSchedule
from sfmodel.stream import Stream, few_step

Noises = Callable[[int], Tensor]

# Latent frames. The first one is followed along a video of VIDEO windows.
WINDOWS, TINY_WINDOWS = (21, 9, 42), (21, 6, 12, 42, 84)
VIDEO = 3
FULL_CHUNKS, TINY_CHUNKS = 3, 6  # timed at the other windows
AT_ONCE = "all frames at once"
# Published: frames a second of a ten-second video on one H100, and how the cost of a chunk grows
# with the steps T and the window L (section 3.4).
PAPER_FPS = {"recompute cache": 4.6, "ring cache": 16.1}
PAPER_GROWTH = {"recompute window": "T·L²", "recompute cache": "L² + T·L", "ring cache": "T·L"}
COLOURS = {
    "recompute window": "#c96a6a",
    "recompute cache": "#e08a3c",
    "ring cache": "#3b6ea5",
    AT_ONCE: "#888888",
}


class Way(Protocol):
    name: str

    def next_chunk(self, past: Tensor, noise: Noises) -> Tensor:
        """x0 [B, F, C, h, w] of the chunk after the clean latents `past`, at most a window's.
        noise: of a step, the initial one at 0."""
        ...


class RecomputeWindow:
    name = "recompute window"

    def __init__(self, model: DiT, preset: Preset, text: Tensor) -> None:
        self.model, self.text, self.context = model, text, preset.window - preset.chunk
        self.chunk, self.tokens = preset.chunk, preset.grid[0] * preset.grid[1]
        schedule = FlowSchedule(preset.shift)
        self.t = schedule.warp(preset.steps).to(model.device)
        self.sigmas = schedule.sigma(self.t)

    def next_chunk(self, past: Tensor, noise: Noises) -> Tensor:
        past, x = past[:, -self.context :], noise(0)
        frames = past.shape[1] + self.chunk
        layout = BlockLayout.causal(frames, self.chunk, self.tokens)
        is_new = torch.arange(frames, device=x.device) >= past.shape[1]
        for i, t in enumerate(self.t):
            t_BF = torch.where(is_new, t, 0.0)[None]
            whole = self.model(torch.cat([past, x], 1), t_BF, self.text, layout=layout)
            flow = whole[:, -self.chunk :].contiguous()
            x = few_step(flow, x, i, self.sigmas, noise, self.model.impl)[1]
        return x


class RecomputeCache:
    name = "recompute cache"

    def __init__(self, stream: Stream) -> None:
        self.stream, self.context = stream, stream.preset.window - stream.preset.chunk

    def next_chunk(self, past: Tensor, noise: Noises) -> Tensor:
        self.stream.restart()
        self.stream.prefill(past[:, -self.context :])
        self.stream.noise = noise
        return self.stream.denoise().clone()


class RingCache:
    name = "ring cache"

    def __init__(self, stream: Stream) -> None:
        self.stream = stream

    def next_chunk(self, past: Tensor, noise: Noises) -> Tensor:
        self.stream.noise = noise
        x0 = self.stream.denoise()
        self.stream.update()
        return x0.clone()


@torch.no_grad()
def compare(
    model: DiT,
    preset: Preset,
    text: Tensor,
    *,
    batch: int = 1,
    chunks: int = 12,
    filled: bool = False,
    seconds: float = math.inf,
    tick: Callable[[str], None] = harness.nothing,
) -> dict[str, Any]:
    """Times the three ways on the same past, chunk by chunk in turn.

    chunks: timed chunks with a full window, the first of which completes it and is still compared;
    after `seconds` no further one is begun. filled: the frames before that one are random latents,
    where they are generated and compared else. tick: called with what goes on. Returns seconds per
    chunk of each way, its floating-point operations, and both as ratios to the ring's; the sizes;
    and the largest relative difference within the first window. Raises AssertionError if that is
    not rounding, in which case there is nothing to time, and ValueError unless the window is a
    whole number of chunks."""
    if preset.window % preset.chunk or preset.window == preset.chunk:
        raise ValueError(f"window={preset.window}: must be two or more chunks of {preset.chunk}")
    device, began = model.device, time.monotonic()
    preset = replace(preset, first=None, sink=0)
    recomputed, rolling = (Stream(model, None, text, preset, batch=batch) for _ in range(2))
    ring = RingCache(rolling)
    ways: list[Way] = [RecomputeWindow(model, preset, text), RecomputeCache(recomputed), ring]
    generator = torch.Generator(device).manual_seed(0)
    draw = functools.partial(torch.randn, generator=generator, device=device)
    shape = (batch, preset.chunk, model.config.channels, preset.height, preset.width)
    times: dict[str, list[float]] = {way.name: [] for way in ways}

    def next_chunk(past: Tensor) -> list[Tensor]:
        draws, outs = draw(len(preset.steps), *shape), []
        for way in ways:
            with ranges.phase(way.name):
                timing.wait(device)
                start = time.perf_counter()
                outs.append(way.next_chunk(past, draws.__getitem__))
                timing.wait(device)
                times[way.name].append(time.perf_counter() - start)
        return outs

    tick("warming up")
    past = torch.zeros(batch, 0, *shape[2:], device=device)
    for _ in range(2):  # compiles for odd and even numbers of frames
        past = torch.cat([past, next_chunk(past)[-1]], 1)
    for name in times:
        times[name].clear()
    rolling.restart()
    last = preset.window // preset.chunk - 1  # the chunk that completes the first window
    first = last if filled else 0
    past = draw(batch, first * preset.chunk, *shape[2:])
    rolling.prefill(past)
    worst = 0.0
    for i in range(first, last + chunks):
        if i > last and time.monotonic() - began > seconds:
            break
        tick(f"window {preset.window}, chunk {i + 1} of {last + chunks}")
        outs = next_chunk(past)
        for way, out in zip(ways, outs if i <= last else (), strict=False):
            error = float((out - outs[-1]).norm() / outs[-1].norm())
            if not error < (1e-3 if model.dtype == torch.float32 else 5e-2):
                raise AssertionError(
                    f"{way.name} is {error:.1e} from the ring in chunk {i}, where they must agree: "
                    "nothing is timed"
                )
            worst = max(worst, error)
        past = torch.cat([past, outs[-1]], 1)[:, -preset.window :]
    flops = rolling_flops(
        model.config,
        math.prod(preset.grid),
        preset.window,
        preset.chunk,
        len(preset.steps),
    )
    full = {name: each[last - first :] for name, each in times.items()}
    median = {name: statistics.median(each) for name, each in full.items()}
    return {
        "batch": batch,
        "window": preset.window,
        "chunk": preset.chunk,
        "steps": len(preset.steps),
        "relative_difference_in_first_window": worst,
        "ways": {
            name: {
                "seconds_per_chunk": median[name],
                "all_seconds": full[name],
                "by_chunk": times[name],
                "flops_per_chunk": batch * flops[name],
                "times_the_ring": median[name] / median[ring.name],
                "times_the_ring_in_theory": flops[name] / flops[ring.name],
            }
            for name in times
        },
    }


def run(job: harness.Job) -> harness.Result:
    dtype = torch.float32 if job.tiny else torch.bfloat16
    result = job.begin("extrapolate", dtype) | {"exponents": {}}
    preset = PRESETS["toy" if job.tiny else "wan-1.3b"]
    job.tick("random weights")
    torch.manual_seed(0)
    model = random_model(preset.dit, job.device).to(dtype).eval()
    text = torch.zeros(1, 1, preset.dit.text_dim, device=job.device)
    windows = TINY_WINDOWS if job.tiny else WINDOWS
    rate = 0.0  # seconds per floating-point operation, as measured at the window before
    for window in windows:
        row: dict[str, Any] = {"case": f"window of {window}", "window": window}
        size = math.prod(preset.grid), window, preset.chunk, len(preset.steps)
        flops = sum(rolling_flops(preset.dit, *size).values())
        if not job.wants(row["case"]):
            continue
        if job.left < flops * rate:
            result["no_time_for"].append(row["case"])
            continue
        try:
            row |= _row(model, replace(preset, window=window), text, job, window == windows[0])
            rate = sum(e["ms"] for e in row["contestants"].values()) / 1e3 / flops
        except AssertionError as error:
            wrong = {"failed": f"{timing.WRONG}: {error}"}
            row["contestants"] = {way: wrong for way in PAPER_GROWTH}
        except Exception as error:  # out of memory; the other windows still run
            row["failed"] = timing.reason(error)
        result["rows"].append(row)
        result["exponents"] = exponents(result["rows"])
        job.save(result)
        if job.cuda:
            timing.free(job.device)
    if job.wants(AT_ONCE):
        _at_once(model, replace(preset, window=windows[0]), text, job, result)
    return job.end(result)


def _row(
    model: DiT, preset: Preset, text: Tensor, job: harness.Job, follow: bool
) -> dict[str, Any]:
    """The three ways at a window; follow: chunk by chunk from the video's first, else only with a
    full window."""
    if follow:  # to the end of VIDEO windows; the other ones need half of the time
        chunks, seconds = (VIDEO - 1) * preset.window // preset.chunk + 1, job.left / 2
    else:
        chunks, seconds = TINY_CHUNKS if job.tiny else FULL_CHUNKS, job.left
    options: dict[str, Any] = {"filled": not follow, "seconds": seconds, "tick": job.tick}
    found = compare(model, preset, text, chunks=chunks, **options)
    ways = found["ways"]
    row: dict[str, Any] = {
        "chunk": preset.chunk,
        "relative_difference": found["relative_difference_in_first_window"],
        "timed_chunks": len(ways["ring cache"]["all_seconds"]),
        "planned_chunks": chunks,
        "contestants": {
            name: timing.entry(
                timing.summary([1e3 * seconds for seconds in way["all_seconds"]]),
                flops=way["flops_per_chunk"],
                times_the_ring=way["times_the_ring"],
                theory=way["times_the_ring_in_theory"],
            )
            for name, way in ways.items()
        },
    }
    if follow:
        row["by_chunk"] = {name: way["by_chunk"] for name, way in ways.items()}
        row["cumulative"] = {n: [*itertools.accumulate(s)] for n, s in row["by_chunk"].items()}
    return row


def at_once_flops(preset: Preset, frames: int) -> int:
    """Of a video whose frames all see each other, at as many steps as a chunk takes."""
    tokens = frames * math.prod(preset.grid)
    return len(preset.steps) * pass_flops(preset.dit, tokens, tokens**2)


@torch.no_grad()
def _at_once(
    model: DiT, preset: Preset, text: Tensor, job: harness.Job, result: harness.Result
) -> None:
    """A row of whole videos, of one window, two, …: one pass is timed, and counted once a step."""
    chunks = range(preset.chunk, VIDEO * preset.window + 1, preset.chunk)
    row: dict[str, Any] = {"case": AT_ONCE, "window": preset.window, "chunk": preset.chunk}
    row |= {"flops_by_chunk": [at_once_flops(preset, f) for f in chunks], "contestants": {}}
    result["rows"].append(row)
    t, steps, rate = torch.tensor(500.0, device=job.device), len(preset.steps), 0.0
    for frames in range(preset.window, VIDEO * preset.window + 1, preset.window):
        name, flops = f"{frames} frames", at_once_flops(preset, frames)
        rounds = 6 if job.tiny else 2  # the first one warms up
        if job.left < rounds * rate * flops / steps:
            result["no_time_for"].append(f"{AT_ONCE}: {name}")
            continue
        job.tick(f"{AT_ONCE}: {name}")
        size = frames, preset.dit.channels, preset.height, preset.width
        times = []
        try:
            x = torch.randn(1, *size, device=job.device)
            for _ in range(rounds):
                timing.wait(job.device)
                began = time.perf_counter()
                model(x, t, text)
                timing.wait(job.device)
                times.append(1e3 * steps * (time.perf_counter() - began))
            rate = times[-1] / 1e3 / flops
            entry = timing.entry(timing.summary(times[1:]), flops=flops, frames=frames)
        except Exception as error:
            entry = {"failed": timing.reason(error)}
        row["contestants"][name] = entry
        job.save(result)


def exponents(rows: Sequence[dict[str, Any]]) -> dict[str, dict[str, float]]:
    """For each way the power of the window that its time per chunk, and its floating-point
    operations, grow with: the least-squares slope between their logarithms. Empty unless two
    windows were timed."""
    found = {}
    for way in PAPER_GROWTH:
        timed = [
            (row["window"], harness.timed(row)[way]) for row in rows if way in harness.timed(row)
        ]
        if len(timed) < 2:
            continue
        x = [math.log(window) for window, _ in timed]
        found[way] = {
            name: statistics.linear_regression(x, [math.log(e[key]) for _, e in timed]).slope
            for name, key in (("measured", "ms"), ("theory", "flops"))
        }
    return found


def tables(result: harness.Result) -> list[harness.Table]:
    toy, ceiling = result["sizes"] == "toy", result["ceilings"]["matmul_tflops"]
    cells, along = [], []
    notes = [
        f"{AT_ONCE}: the whole video, at as many steps as a chunk takes (Wan2.1 itself takes 50)",
        "published, ten seconds of video on one H100: {} FPS with a rolling cache, {} with a "
        "recomputed one, 3.5 times".format(PAPER_FPS["ring cache"], PAPER_FPS["recompute cache"]),
    ]
    for row in result["rows"]:
        each, lengths = row["window"], range(1, VIDEO + 1)
        if "failed" in row:
            cells.append([row["case"], f"failed: {row['failed']}", *[""] * 7])
        for name, e in row.get("contestants", {}).items():
            if "failed" in e:
                cells.append([row["case"], name, e["failed"], *[""] * 6])
                continue
            ratios = [f"{e[k]:.2f}" if k in e else "" for k in ("times_the_ring", "theory")]
            rate, fps = e["flops"] / e["ms"] / 1e9, 4e3 * e.get("frames", row["chunk"]) / e["ms"]
            cells.append([row["case"], name, f"{e['ms']:.1f}", f"{e['p99_ms']:.1f}", f"{fps:.3g}",
                          f"{rate:.3g}", f"{100 * rate / ceiling:.0f}", *ratios])  # fmt: skip
        if row.get("timed_chunks", 0) < row.get("planned_chunks", 0):
            notes.append(
                f"{row['case']}: cut after {row['timed_chunks']} of {row['planned_chunks']} chunks"
            )
        for way, seconds in row.get("cumulative", {}).items():
            reached = dict(enumerate(seconds, 1))
            ends = [reached.get(i * each // row["chunk"]) for i in lengths]
            along.append([way, *("not run" if s is None else f"{s:.3g}" for s in ends)])
        if row["case"] == AT_ONCE:
            reached = {e["frames"]: e["ms"] / 1e3 for e in harness.timed(row).values()}
            ends = [reached.get(i * each) for i in lengths]
            along.append([AT_ONCE, *("not run" if s is None else f"{s:.3g}" for s in ends)])
    columns = ["", "way", "ms a chunk", "p99", "FPS", "TFLOP/s", "% of product", "time / ring's",
               "in theory"]  # fmt: skip
    title = f"past the window: {result['sizes']}, {describe(result['machine'])}"
    found = [harness.Table(title, columns, cells, notes)]
    if along:
        columns = ["", *(f"{i} window{'s' * (i > 1)}" for i in range(1, VIDEO + 1))]
        found.append(harness.Table("seconds for a video as long as", columns, along))
    if result["exponents"]:
        rows = [[way, f"{e['measured']:.2f}", f"{e['theory']:.2f}", PAPER_GROWTH[way]]
                for way, e in result["exponents"].items()]  # fmt: skip
        notes = ["published: attention alone, T steps and window L; linear layers grow less"]
        if toy:
            notes.append("at toy size the number of launches decides, not arithmetic: flatter")
        title = "a chunk's time grows with the window to the power"
        found.append(harness.Table(title, ["", "measured", "arithmetic", "published"], rows, notes))
    return found


def figures(result: harness.Result) -> Iterator[tuple[str, Any]]:
    from matplotlib.figure import Figure

    rows = [row for row in result["rows"] if harness.timed(row)]
    windows = [row for row in rows if row["case"] != AT_ONCE]
    if not windows:
        return
    figure = Figure(figsize=(12, 4.6), layout="constrained")
    left, right = figure.subplots(1, 2)
    for row in rows:
        for way, seconds in row.get("by_chunk", {}).items():
            at = [row["chunk"] * (i + 1) for i in range(len(seconds))]
            left.plot(at, seconds, "o-", markersize=3, color=COLOURS[way], label=way)
            left.axvline(row["window"], color="#bbbbbb", linewidth=0.8, zorder=0)
        if row["case"] == AT_ONCE:
            e, *_ = timed = [*harness.timed(row).values()]
            grey: dict[str, Any] = {"color": COLOURS[AT_ONCE]}
            at, seconds = [e["frames"] for e in timed], [e["ms"] / 1e3 for e in timed]
            left.plot(at, seconds, "s", markersize=5, label=AT_ONCE, **grey)
            curve = [e["ms"] / 1e3 * flops / e["flops"] for flops in row["flops_by_chunk"]]
            at = [row["chunk"] * (i + 1) for i in range(len(curve))]
            label = f"the same by arithmetic, from {e['frames']} frames"
            left.plot(at, curve, "--", linewidth=1, label=label, **grey)
    left.set_ylim(bottom=0)
    left.set_xlabel("latent frames of the video, the new chunk included (line: the window)")
    left.set_ylabel("seconds until the next chunk")
    if left.has_data():  # else no video was followed
        left.legend(fontsize=7)
    for way in PAPER_GROWTH:
        timed = [harness.timed(row)[way] | row for row in windows if way in harness.timed(row)]
        timed.sort(key=lambda e: e["window"])
        at, power = [e["window"] for e in timed], result["exponents"].get(way)
        measured = f"{way}: power {power['measured']:.2f}" if power else way
        theory = f"its arithmetic: {power['theory']:.2f}" if power else "its arithmetic"
        floors = [timing.floor_ms(e["flops"], 0, result["ceilings"]) for e in timed]
        right.plot(at, [e["ms"] for e in timed], "o-", color=COLOURS[way], label=measured)
        right.plot(at, floors, "--", linewidth=1, color=COLOURS[way], label=theory)
    right.set_xscale("log", base=2)
    right.set_yscale("log")
    right.set_xticks([row["window"] for row in windows], [str(row["window"]) for row in windows])
    right.set_xlabel("window, latent frames")
    right.set_ylabel("ms for a chunk (dashed: at the rate of a matrix product)")
    right.legend(fontsize=7)
    figure.suptitle(f"{result['sizes']}, {describe(result['machine'])}", fontsize=8)
    yield "extrapolate", figure


def main(arguments: Sequence[str] | None = None) -> int:
    return harness.command("extrapolate", sys.modules[__name__], arguments, __doc__)
