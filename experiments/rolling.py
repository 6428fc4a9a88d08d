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
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from bench import timing
from bench.figures import BLUE, GREY, LIGHT, ORANGE, new
from bench.harness import Job
from bench.inputs import random_model
from bench.tables import Result, Table, left_out, of_entries, percent, timed, value
from sfkernels import BlockLayout
from sfmodel import ranges
from sfmodel.config import PRESETS, Preset
from sfmodel.cost import pass_flops, rolling_flops
from sfmodel.dit import DiT
from sfmodel.machine import describe
from sfmodel.schedule import FlowSchedule, few_step
from sfmodel.stream import Stream

Noises = Callable[[int], Tensor]

# Latent frames. The first one is followed along a video of VIDEO windows.
WINDOWS, TINY_WINDOWS = (21, 9, 42), (21, 6, 12, 42, 84)
VIDEO = 3
FULL_CHUNKS, TINY_CHUNKS = 3, 6  # timed at the other windows
RING, AT_ONCE = "ring cache", "all frames at once"
# Published: how the cost of a chunk grows with the steps T and the window L (section 3.4).
PAPER_GROWTH = {"recompute window": "T·L²", "recompute cache": "L² + T·L", "ring cache": "T·L"}
COLOURS = {"recompute window": "#c96a6a", "recompute cache": ORANGE, "ring cache": BLUE}


class Ways:
    """The three ways on one model. Each gives x0 [B, F, C, h, w] of the chunk after the clean
    latents `past`, at most a window's. noise: of a step, the initial one at 0."""

    def __init__(self, model: DiT, preset: Preset, text: Tensor, batch: int) -> None:
        self.model, self.text, self.chunk = model, text, preset.chunk
        self.context, self.tokens = preset.window - preset.chunk, math.prod(preset.grid)
        self.t = FlowSchedule(preset.shift).warp(preset.steps).to(model.device)
        self.recomputed, self.ring = (
            Stream(model, None, text, preset, batch=batch) for _ in range(2)
        )

    def recompute_window(self, past: Tensor, noise: Noises) -> Tensor:
        past, x = past[:, -self.context :], noise(0)
        frames = past.shape[1] + self.chunk
        layout = BlockLayout.causal(frames, self.chunk, self.tokens)
        is_new = torch.arange(frames, device=x.device) >= past.shape[1]
        for i, t in enumerate(self.t):
            t_BF = torch.where(is_new, t, 0.0)[None]
            whole = self.model(torch.cat([past, x], 1), t_BF, self.text, layout=layout)
            flow = whole[:, -self.chunk :].contiguous()
            x = few_step(flow, x, i, self.ring.sigmas, noise, self.model.impl)[1]
        return x

    def recompute_cache(self, past: Tensor, noise: Noises) -> Tensor:
        self.recomputed.restart()
        self.recomputed.prefill(past[:, -self.context :])
        self.recomputed.noise = noise
        return self.recomputed.denoise().clone()

    def ring_cache(self, _: Tensor, noise: Noises) -> Tensor:
        self.ring.noise = noise
        return self.ring.denoise().clone()


def _seconds(device: torch.device, run: Callable[[], Tensor]) -> tuple[Tensor, float]:
    """The result of a function, and how long the device took for it."""
    timing.wait(device)
    began = time.perf_counter()
    out = run()
    timing.wait(device)
    return out, time.perf_counter() - began


def _flops(preset: Preset) -> dict[str, int]:
    """Floating-point operations of a chunk past the window, by way."""
    tokens, steps = math.prod(preset.grid), len(preset.steps)
    return rolling_flops(preset.dit, tokens, preset.window, preset.chunk, steps)


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
    tick: Callable[[str], None] = lambda text: None,
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
    preset = replace(preset, dit=model.config, first=None, sink=0)
    made = Ways(model, preset, text, batch)
    ways = {name: getattr(made, name.replace(" ", "_")) for name in PAPER_GROWTH}
    times: dict[str, list[float]] = {name: [] for name in ways}
    generator = torch.Generator(device).manual_seed(0)
    draw = functools.partial(torch.randn, generator=generator, device=device)
    shape = (batch, preset.chunk, model.config.channels, preset.height, preset.width)

    def next_chunk(past: Tensor) -> dict[str, Tensor]:
        draws, outs = draw(len(preset.steps), *shape), {}
        for name, way in ways.items():
            with ranges.phase(name):
                call = functools.partial(way, past, draws.__getitem__)
                outs[name], seconds = _seconds(device, call)
            times[name].append(seconds)
        return outs

    tick("warming up")
    past = torch.zeros(batch, 0, *shape[2:], device=device)
    for _ in range(2):  # compiles for odd and even numbers of frames
        past = torch.cat([past, next_chunk(past)[RING]], 1)
    for each in times.values():
        each.clear()
    made.ring.restart()
    last = preset.window // preset.chunk - 1  # the chunk that completes the first window
    first = last if filled else 0
    past = draw(batch, first * preset.chunk, *shape[2:])
    made.ring.prefill(past)
    worst, tolerance = 0.0, 1e-3 if model.dtype == torch.float32 else 5e-2
    for i in range(first, last + chunks):
        if i > last and time.monotonic() - began > seconds:
            break
        tick(f"batch {batch}, window {preset.window}, chunk {i + 1} of {last + chunks}")
        outs = next_chunk(past)
        for name, out in outs.items() if i <= last else ():
            error = float((out - outs[RING]).norm() / outs[RING].norm())
            if not error < tolerance:
                raise AssertionError(
                    f"{name} is {error:.1e} from the ring in chunk {i}, where they must agree: "
                    "nothing is timed"
                )
            worst = max(worst, error)
        past = torch.cat([past, outs[RING]], 1)[:, -preset.window :]
    flops = _flops(preset)
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
                "times_the_ring": median[name] / median[RING],
                "times_the_ring_in_theory": flops[name] / flops[RING],
            }
            for name in times
        },
    }


def run(job: Job) -> Result:
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
        sized = replace(preset, window=window)
        row = functools.partial(_row, model, sized, text, job, follow=window == windows[0])
        job.add(result, f"window of {window}", row, needs=rate * sum(_flops(sized).values()))
        result["exponents"] = exponents(result["rows"])
        if entries := [e for row in result["rows"][-1:] for e in timed(row).values()]:
            rate = sum(e["ms"] for e in entries) / 1e3 / sum(e["flops"] for e in entries)
    if job.wants(AT_ONCE):
        _at_once(model, replace(preset, window=windows[0]), text, job, result)
    return job.end(result)


def _row(model: DiT, preset: Preset, text: Tensor, job: Job, follow: bool) -> Result:
    """The three ways at a window; follow: from the video's first chunk, else with a full window."""
    if follow:  # to the end of VIDEO windows; the other ones need half of the time
        chunks, seconds = (VIDEO - 1) * preset.window // preset.chunk + 1, job.left / 2
    else:
        chunks, seconds = TINY_CHUNKS if job.tiny else FULL_CHUNKS, job.left
    row: Result = {"window": preset.window, "chunk": preset.chunk}
    try:
        found = compare(model, preset, text, chunks=chunks, filled=not follow, seconds=seconds,
                        tick=job.tick)  # fmt: skip
    except AssertionError as error:
        return row | {"contestants": {way: timing.failed(error) for way in PAPER_GROWTH}}
    ways = found["ways"]
    row |= {
        "relative_difference": found["relative_difference_in_first_window"],
        "timed_chunks": len(ways[RING]["all_seconds"]),
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


@torch.no_grad()
def _at_once(model: DiT, preset: Preset, text: Tensor, job: Job, result: Result) -> None:
    """Adds a row of whole videos, of one window, two, …, whose frames all see each other, at as
    many steps as a chunk takes: one pass is timed, and counted once a step."""
    t, steps, rate = torch.tensor(500.0, device=job.device), len(preset.steps), 0.0
    flops = {}
    for frames in range(preset.chunk, VIDEO * preset.window + 1, preset.chunk):
        tokens = frames * math.prod(preset.grid)
        flops[frames] = steps * pass_flops(preset.dit, tokens, tokens**2)
    row: Result = {"case": AT_ONCE, "window": preset.window, "chunk": preset.chunk}
    row |= {"flops_by_chunk": [*flops.values()], "contestants": {}}
    result["rows"].append(row)
    rounds = 6 if job.tiny else 2  # the first one warms up
    for frames in range(preset.window, VIDEO * preset.window + 1, preset.window):
        name = f"{frames} frames"
        if job.left < rounds * rate * flops[frames] / steps:
            result["no_time_for"].append(f"{AT_ONCE}: {name}")
            continue
        job.tick(f"{AT_ONCE}: {name}")
        size = frames, preset.dit.channels, preset.height, preset.width
        try:
            call = functools.partial(model, torch.randn(1, *size, device=job.device), t, text)
            times = [1e3 * steps * _seconds(job.device, call)[1] for _ in range(rounds)][1:]
            entry = timing.entry(timing.summary(times), flops=flops[frames], frames=frames)
            rate = entry["ms"] / 1e3 / flops[frames]
        except Exception as error:
            entry = timing.failed(error)
        row["contestants"][name] = entry
        job.save(result)


def _points(rows: Sequence[Result], way: str) -> list[tuple[int, Result]]:
    """(window, entry) of all windows at which a way was timed, from the smallest."""
    points = [(row["window"], timed(row)[way]) for row in rows if way in timed(row)]
    return sorted(points, key=lambda point: point[0])


def exponents(rows: Sequence[Result]) -> dict[str, dict[str, float]]:
    """The power of the window that each way's time per chunk, and its floating-point operations,
    grow with: the least-squares slope between their logarithms. Empty of fewer than two windows."""
    found = {}
    for way in PAPER_GROWTH:
        points = _points(rows, way)
        x = [math.log(window) for window, _ in points]
        if len(x) > 1:
            found[way] = {
                name: statistics.linear_regression(x, [math.log(e[key]) for _, e in points]).slope
                for name, key in (("measured", "ms"), ("theory", "flops"))
            }
    return found


def tables(result: Result) -> list[Table]:
    ceiling = result["ceilings"]["matmul_tflops"]

    def rate(e: Result) -> float:
        return float(e["flops"] / e["ms"] / 1e9)

    columns = {
        "ms a chunk": value("ms", "{:.1f}".format),
        "p99": value("p99_ms", "{:.1f}".format),
        "FPS": lambda row, e: f"{4e3 * e.get('frames', row['chunk']) / e['ms']:.3g}",
        "TFLOP/s": lambda _, e: f"{rate(e):.3g}",
        "% of product": lambda _, e: percent(rate(e), ceiling),
        "time / ring's": value("times_the_ring", "{:.2f}".format),
        "in theory": value("theory", "{:.2f}".format),
    }
    notes = [
        f"{AT_ONCE}: the whole video, at as many steps as a chunk takes (Wan2.1 itself takes 50)",
        "published, ten seconds of video on one H100: 16.1 FPS with a rolling cache, 4.6 with a "
        "recomputed one, 3.5 times",
    ]
    for row in result["rows"]:
        if row.get("timed_chunks", 0) < row.get("planned_chunks", 0):
            notes.append(
                f"{row['case']}: cut after {row['timed_chunks']} of {row['planned_chunks']} chunks"
            )
    title = f"past the window: {result['sizes']}, {describe(result['machine'])}"
    found = [of_entries(title, result["rows"], columns, [*notes, *left_out(result)])]
    if along := [*_along(result["rows"])]:
        heads = ["", *(f"{i} window{'s' * (i > 1)}" for i in range(1, VIDEO + 1))]
        found.append(Table("seconds for a video as long as", heads, along))
    if result["exponents"]:
        rows = [[way, f"{e['measured']:.2f}", f"{e['theory']:.2f}", PAPER_GROWTH[way]]
                for way, e in result["exponents"].items()]  # fmt: skip
        notes = ["published: attention alone, T steps and window L; linear layers grow less"]
        if result["sizes"] == "toy":
            notes.append("at toy size the number of launches decides, not arithmetic: flatter")
        title = "a chunk's time grows with the window to the power"
        found.append(Table(title, ["", "measured", "arithmetic", "published"], rows, notes))
    return found


def _along(rows: Sequence[Result]) -> Iterator[list[str]]:
    """Seconds for one window of video, two, …, by the ways that were followed."""
    for row in rows:
        reached = {
            way: {row["chunk"] * i: s for i, s in enumerate(seconds, 1)}
            for way, seconds in row.get("cumulative", {}).items()
        }
        if row["case"] == AT_ONCE:
            reached[AT_ONCE] = {e["frames"]: e["ms"] / 1e3 for e in timed(row).values()}
        for way, seconds_at in reached.items():
            ends = [seconds_at.get(i * row["window"]) for i in range(1, VIDEO + 1)]
            yield [way, *("not run" if end is None else f"{end:.3g}" for end in ends)]


def ways_table(found: Result) -> Table:
    """The result of `compare` as a table."""
    streams = "one stream" if found["batch"] == 1 else f"{found['batch']} streams at once"
    title = f"{streams}, window {found['window']}, chunk {found['chunk']}, {found['steps']} steps"
    heads = "past the window", "ms a chunk", "FPS", "time / ring's", "arithmetic / ring's"
    rows = [
        [name, f"{1e3 * way['seconds_per_chunk']:.1f}",
         f"{4 * found['chunk'] * found['batch'] / way['seconds_per_chunk']:.0f}",
         f"{way['times_the_ring']:.2f}", f"{way['times_the_ring_in_theory']:.2f}"]
        for name, way in found["ways"].items()
    ]  # fmt: skip
    return Table(title, heads, rows)


def figures(result: Result) -> Iterator[tuple[str, Any]]:
    rows = [row for row in result["rows"] if timed(row)]
    windows = [row for row in rows if row["case"] != AT_ONCE]
    if windows:
        title = f"{result['sizes']}, {describe(result['machine'])}"
        figure, (left, right) = new(title, 12, 4.6, columns=2)
        _draw_along(left, rows)
        _draw_growth(right, windows, result)
        yield "extrapolate", figure


def _draw_along(ax: Any, rows: Sequence[Result]) -> None:
    """Seconds of each chunk along a video."""
    for row in rows:
        for way, seconds in row.get("by_chunk", {}).items():
            at = [row["chunk"] * (i + 1) for i in range(len(seconds))]
            ax.plot(at, seconds, "o-", markersize=3, color=COLOURS[way], label=way)
            ax.axvline(row["window"], color=LIGHT, linewidth=0.8, zorder=0)
        if row["case"] == AT_ONCE:
            e, *_ = entries = [*timed(row).values()]
            at, seconds = [e["frames"] for e in entries], [e["ms"] / 1e3 for e in entries]
            ax.plot(at, seconds, "s", markersize=5, label=AT_ONCE, color=GREY)
            curve = [e["ms"] / 1e3 * flops / e["flops"] for flops in row["flops_by_chunk"]]
            at = [row["chunk"] * (i + 1) for i in range(len(curve))]
            label = f"the same by arithmetic, from {e['frames']} frames"
            ax.plot(at, curve, "--", linewidth=1, label=label, color=GREY)
    where = "latent frames of the video, the new chunk included (line: the window)"
    ax.set(xlabel=where, ylabel="seconds until the next chunk")
    ax.set_ylim(bottom=0)
    if ax.has_data():  # else no video was followed
        ax.legend(fontsize=7)


def _draw_growth(ax: Any, rows: Sequence[Result], result: Result) -> None:
    """Milliseconds of a chunk over the window, beside the floors of its arithmetic."""
    for way in PAPER_GROWTH:
        points = _points(rows, way)
        at, power = [window for window, _ in points], result["exponents"].get(way)
        measured = f"{way}: power {power['measured']:.2f}" if power else way
        theory = f"its arithmetic: {power['theory']:.2f}" if power else "its arithmetic"
        floors = [timing.floor_ms(e["flops"], 0, result["ceilings"]) for _, e in points]
        ax.plot(at, [e["ms"] for _, e in points], "o-", color=COLOURS[way], label=measured)
        ax.plot(at, floors, "--", linewidth=1, color=COLOURS[way], label=theory)
    ax.set_xscale("log", base=2)
    ax.set_xticks([row["window"] for row in rows], [str(row["window"]) for row in rows])
    ylabel = "ms for a chunk (dashed: at the rate of a matrix product)"
    ax.set(yscale="log", xlabel="window, latent frames", ylabel=ylabel)
    ax.legend(fontsize=7)
