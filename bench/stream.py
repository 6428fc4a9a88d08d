"""`python -m bench stream`: frames a second and the time to the first frame, phase by phase, as the
paper's Table 1 (arXiv 2506.08009).

Chunks of Wan2.1-1.3B at 480×832 with random weights in bfloat16, 3 latent frames at a time
(chunk-wise) and 1 (frame-wise), four steps, decoded by Wan2.1's VAE, the text encoded by
transformers' UMT5 where it is installed: not measured on a GPU yet. At toy sizes the toy model,
with its own video decoder and text encoder. Contestants differ in the implementation of attention,
and in who launches a chunk's kernels: Python, or a CUDA graph for each phase. They share one set of
weights, and the latents of each are compared with the reference's before it is timed; then they
take turns, chunk by chunk. `bench/phases.py` says what the phases are.

Times: "whole" is wall-clock time from an idle device to an idle device. The phases of the same
chunk are CUDA events between them, without waiting, so that a launch which comes too late counts
where the device waited for it; on a CPU the wall clock. A clip is the text and all chunks up to 21
latent frames; the steady state is a full window; the first frame is the text and the first chunk
without its cache update. "Without decode" and the like are the whole minus that phase's median (in
a clip: its sum), "with the tiny VAE" TAEHV's decoding of the same chunks in the place of Wan2.1's,
timed apart, "denoising alone" the steps and nothing else.
"""

from __future__ import annotations

import functools
import math
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from bench import harness, peers, phases, timing
from bench.harness import Job, Result, Table
from bench.phases import DECODE, REFERENCE, STEP, Setting, Stream, Timed, clocked
from sfmodel import cost
from sfmodel.config import Preset
from sfmodel.cost import CLIP, PIXEL_FRAMES
from sfmodel.machine import said, said_state

CASES = {"chunk-wise": 3, "frame-wise": 1}  # latent frames of a chunk
PARITY_CHUNKS = 2
FIRST_FRAMES = 5  # measured times to the first frame
FEWEST = 3  # chunks with a full window
SHARE = 0.65  # of the time left that a case may take
PREPARING = 0.5  # of a case's time, after which no further contestant is built
COMPILING = 300.0  # seconds that torch.compile may take for all sizes of a chunk
# What is not begun with less left; toy sizes need nothing.
CASE_SECONDS, NEEDED = 20.0, {"bidirectional": 10.0, "diffusers": 60.0}

COLOURS = {phases.NOISE: "#999999", DECODE: "#5b9e62", phases.COPY: "#8d6cab",
           phases.UPDATE: "#e08a3c"}  # fmt: skip
BLUES = ("#1f4e79", "#3b6ea5", "#6d9bc9", "#a3c4e3")


def pixel_frames(latent_frames: int) -> int:
    return 1 + PIXEL_FRAMES * (latent_frames - 1)


@torch.no_grad()
def run_case(job: Job, setting: Setting, name: str, seconds: float) -> Result:
    """A row. A contestant that has had its part of the seconds leaves the clip to the others and
    times a few chunks of a full window alone."""
    preset = replace(setting.preset, chunk=CASES[name])
    began = time.monotonic()
    first = preset.first or preset.chunk
    chunks = 1 + -(-(max(CLIP, preset.window) - first) // preset.chunk)
    latent_frames = first + (chunks - 1) * preset.chunk
    known = phases.contestants(job.device)
    streams: dict[str, Stream] = {}
    entries: dict[str, Any] = {}
    want: Tensor | None = None
    tolerance = 1e-3 if setting.model.dtype == torch.float32 else 5e-2
    # The reference first: what it computes, the others must.
    for contestant in sorted(known, key=lambda c: c is not REFERENCE):
        left = seconds - (time.monotonic() - began)
        if left < (COMPILING if contestant.compiled else (1 - PREPARING) * seconds):
            entries[contestant.name] = timing.entry("no time left")
            continue
        job.tick(f"{name}: is {contestant.name} right?")
        try:
            with timing.peak_memory(job.device) as peak:
                stream = Stream(setting, preset, contestant)
                clocked(stream.prompt, job.device)
                got = stream.first_latents(PARITY_CHUNKS)
        except Exception as error:
            if contestant is REFERENCE:
                raise
            entries[contestant.name] = timing.entry(timing.reason(error))
            continue
        want = got if want is None else want
        difference = float((got - want).norm() / want.norm())
        if not difference < tolerance:
            why = f"latents differ by {difference:.1e}, {tolerance:.0e} allowed"
            entries[contestant.name] = timing.entry(f"{timing.WRONG}: {why}")
            continue
        streams[contestant.name], stream.peak_mib = stream, peak[0]

    def in_turn(take: Callable[[str, Stream], Any]) -> None:
        for contestant in known:
            if contestant.name in streams:
                try:
                    take(contestant.name, streams[contestant.name])
                except Exception as error:  # the others go on
                    entries[contestant.name] = timing.entry(timing.reason(error))
                    del streams[contestant.name]

    share = (seconds - (time.monotonic() - began)) / max(len(streams), 1)
    firsts: dict[str, list[Timed]] = {name: [] for name in streams}
    timed: dict[str, list[Timed]] = {name: [] for name in streams}

    def spent(name: str) -> float:
        return sum(t.whole for t in firsts[name] + timed[name]) / 1e3

    job.tick(f"{name}: first frames")
    for _ in range(min(FIRST_FRAMES, job.rounds)):
        in_turn(lambda n, s: firsts[n].append(s.first_frame()) if spent(n) < share else None)
    for i in range(chunks + job.rounds):
        if i in (0, chunks):
            job.tick(f"{name}: {'full window' if i else 'clip'}")
        in_turn(lambda n, s: timed[n].append(s.chunk()) if spent(n) < share else None)

    def finish(n: str, stream: Stream) -> None:
        firsts[n] = firsts[n] or [stream.first_frame()]
        clip, steady = timed[n][:chunks], timed[n][chunks:]
        if len(clip) < chunks:
            clip = []
            stream.notes["no time for a clip"] = None
            stream.fill()
        steady = steady + [stream.chunk() for _ in range(FEWEST - len(steady))]
        entries[n] = entry(stream, firsts[n], clip, latent_frames, steady)

    in_turn(finish)
    return {
        "case": name,
        "chunk": preset.chunk,
        "window": preset.window,
        "steps": len(preset.steps),
        "frames": pixel_frames(latent_frames),
        "notes": [*setting.notes],
        "weights_mib": sum(p.nbytes for p in setting.model.parameters()) / 2**20,
        "contestants": {c.name: entries[c.name] for c in known},
    }


def entry(
    stream: Stream,
    firsts: Sequence[Timed],
    clip: Sequence[Timed],
    latent_frames: int,
    steady: Sequence[Timed],
) -> dict[str, Any]:
    """What the row says of a contestant; `phases` are the prompt's at the first frame and a
    chunk's at a full window."""
    summary = timing.summary([t.whole for t in steady])
    summary.peak_mib, summary.note = stream.peak_mib, "; ".join(stream.notes)
    have = [*stream.prompt, *steady[0].phases]
    first, full = phases.medians(firsts), phases.medians(steady)
    each = {
        name: {"ms": statistics.median(values), "p99_ms": timing.quantile(values, 0.99)}
        for timed, names in ((firsts, stream.prompt), (steady, full))
        for name in names
        if (values := [t.phases[name] for t in timed])
    }
    window = PIXEL_FRAMES * stream.preset.chunk
    fps = {"full window": per_second(window, phases.without_each(summary.p50, full, have))}
    first_ms = statistics.median(t.whole for t in firsts)
    more: dict[str, Any] = {}
    if clip:
        text_ms = sum(first[name] for name in stream.prompt)
        sums = {name: sum(t.phases[name] for t in clip) for name in full}
        sums |= {name: first[name] for name in stream.prompt}
        whole = text_ms + sum(t.whole for t in clip)
        frames = pixel_frames(latent_frames)
        fps["clip"] = per_second(frames, phases.without_each(whole, sums, have))
        more = {"clip_ms": [t.whole for t in clip], "clip_frames": frames}
    return timing.entry(
        summary,
        phases=each,
        phases_sum_ms=sum(ms for name, ms in full.items() if name != phases.TINY_DECODE),
        steady_ms=[t.whole for t in steady],
        first_frame_ms=first_ms,
        first_frame_phases=first,
        fps=fps,
        latency_ms=phases.without_each(first_ms, first, have),
        **more,
    )


def predicted(preset: Preset, ceilings: Mapping[str, float], device: torch.device) -> Result:
    """What arithmetic says of the transformer's passes at this machine's ceilings, in 16 bits."""
    rates = ceilings["matmul_tflops"], ceilings["copy_gbps"] / 1e3
    cores = 1
    if device.type == "cuda":
        cores = torch.cuda.get_device_properties(device).multi_processor_count
    here = cost.Gpu("here", cores, *rates, memory_gib=math.inf, link_gbps=0)
    return {
        "fps": cost.fps(preset, here, [preset.window], "bf16", "none"),
        "first_frame_ms": cost.latency_ms(preset, here, "bf16", "none")["first_frame"],
    }


def per_second(frames: int, ms: Mapping[str, float]) -> dict[str, float]:
    return {name: 1e3 * frames / value for name, value in ms.items()}


def best(row: Result) -> tuple[str, dict[str, Any]] | None:
    """The contestant with the most frames a second, over a clip if any was timed."""
    timed = harness.timed(row)
    timed = {n: e for n, e in timed.items() if "clip" in e["fps"]} or timed
    return max(timed.items(), key=lambda item: speed(item[1]), default=None)


def speed(entry: Mapping[str, Any], which: str = "all") -> float:
    """Frames a second over a clip, or in the steady state where none was timed; 0 of what was not
    timed at all."""
    return float(entry["fps"].get("clip", entry["fps"]["full window"]).get(which, 0.0))


@torch.no_grad()
def bidirectional(setting: Setting) -> dict[str, Any]:
    """Wan2.1 as its makers run it: 50 steps with guidance are 100 passes over all latent frames at
    once, two of which are timed."""
    preset, dit = setting.preset, setting.model
    device = dit.device
    shape = (1, CLIP, dit.config.channels, preset.height, preset.width)
    x_BFCHW, t = torch.randn(shape, device=device), torch.tensor(500.0, device=device)
    outs, times = [], []
    for attention in ("sdpa", "auto", "auto", "auto"):
        twin = phases.shared(dit, "auto", attention)
        run = {"pass": lambda m=twin: outs.append(m(x_BFCHW, t, setting.text_BTE))}
        times.append(clocked(run, device).whole)  # type: ignore[arg-type]
    difference = float((outs[1] - outs[0]).norm() / outs[0].norm())
    if not difference < (1e-3 if dit.dtype == torch.float32 else 5e-2):
        return {"said": f"{timing.WRONG}: attention differs from SDPA's by {difference:.1e}"}
    seconds = 100 * statistics.mean(times[2:]) / 1e3
    return {
        "fps": pixel_frames(CLIP) / seconds,
        "latency_s": seconds,
        "said": "2 of 100 passes timed, text encoder and VAE left out",
    }


def baselines(job: Job, result: Result, setting: Setting | None) -> Iterator[dict[str, Any]]:
    """The lines of the paper's table, with what was measured here beside it."""
    rows = {row["case"]: row for row in result["rows"]}
    for name, fps, latency_s, how, note in peers.BASELINES:
        line: dict[str, Any] = {"name": name, "paper_fps": fps, "paper_latency_s": latency_s}
        found = best(rows[how]) if how in rows else None
        if how in CASES and found:
            over = "a clip" if "clip" in found[1]["fps"] else "a full window"
            line |= {"fps": speed(found[1]), "latency_s": found[1]["first_frame_ms"] / 1e3}
            tiny = speed(found[1], "with the tiny VAE")
            words = [f"{found[0]}, {over}, decoding included"]
            words += [f"{tiny:.3g} FPS with the tiny VAE"] * (tiny > 0)
            line["said"] = "; ".join(filter(None, (*words, note)))
        elif not how:
            line["said"] = "published, not run"
        elif how in CASES or not job.wants(f"baselines: {name}"):
            line["said"] = "not run"
        elif job.left < (0 if job.tiny else NEEDED[how]):
            result["no_time_for"].append(f"baselines: {name}")
            line["said"] = "no time left"
        else:
            job.tick(name)
            line |= measured(job, setting, name, how)
        yield line


def measured(job: Job, setting: Setting | None, name: str, how: str) -> dict[str, Any]:
    if how == "diffusers":
        return peers.measure(name.removesuffix(", diffusers"), job.device, job.tiny)
    if setting is None:
        return {"said": "not run: there is no model"}
    try:
        return bidirectional(setting)
    except Exception as error:
        return {"said": f"not run: {timing.reason(error)}"}


def run(job: Job) -> Result:
    result = job.begin("stream", torch.float32 if job.tiny else torch.bfloat16)
    result["baselines"] = []
    setting, why = None, ""
    wanted = [name for name in CASES if job.wants(name)]
    if wanted or job.wants("baselines: Wan2.1-1.3B"):
        job.tick("the model")
        try:
            setting = phases.toy() if job.tiny else phases.full_size(job.device)
        except Exception as error:
            why = timing.reason(error)
    for name in wanted:
        if job.left < (0 if job.tiny else CASE_SECONDS):
            result["no_time_for"].append(name)
            continue
        row: Result = {"case": name, "failed": why}
        if setting is not None:
            try:
                row = run_case(job, setting, name, SHARE * job.left)
                preset = replace(setting.preset, chunk=CASES[name])
                row["predicted"] = predicted(preset, result["ceilings"], job.device)
            except Exception as error:
                row["failed"] = timing.reason(error)
            timing.free(job.device)
        result["rows"].append(row)
        job.save(result)
    for line in baselines(job, result, setting):
        result["baselines"].append(line)
        job.save(result)
    return job.end(result)


def tables(result: Result) -> list[Table]:
    sizes = "" if result["sizes"] != "toy" else "; toy sizes, which do not compare with the paper's"
    lines = [
        (
            line["name"],
            f"{line['paper_fps']:g}",
            f"{line['fps']:.3g}" if "fps" in line else "",
            f"{line['paper_latency_s']:g}",
            f"{line['latency_s']:.3g}" if "fps" in line else "",
            line["said"],
        )
        for line in result["baselines"]
    ]
    notes = [said(result["machine"])]
    if "after" in result:
        notes.append(said_state(result["before"], result["after"]))
    columns = ("", "paper FPS", "FPS", "paper s", "s", "how")
    title = f"frames a second and seconds to the first frame, the paper's on one H100{sizes}"
    out = [Table(title, columns, lines, notes)]
    for row in result["rows"]:
        if "failed" in row:
            out.append(Table(row["case"], ("", ""), [("failed", row["failed"])]))
            continue
        out += [breakdown(row), with_and_without(row)]
        if "predicted" in row:
            out.append(beside_prediction(row))
    return out


def cells(row: Result, line: str, cell: Callable[[dict[str, Any]], str]) -> list[str]:
    entries = row["contestants"].values()
    return [line, *("–" if "failed" in entry else cell(entry) for entry in entries)]


def p50_p99(name: str, entry: Result) -> str:
    """Of a phase, or of the whole chunk if empty."""
    timed = entry["phases"][name] if name else entry
    return f"{timed['ms']:.2f} / {timed['p99_ms']:.2f}"


def breakdown(row: Result) -> Table:
    entries = row["contestants"]
    timed = [entry for entry in entries.values() if "failed" not in entry]
    lines = []
    for name in (phases.ENCODING, phases.PROMPT_KV, *phases.chunk_phases(row["steps"])):
        if any(name in entry["phases"] for entry in timed):
            lines.append(cells(row, name, functools.partial(p50_p99, name)))
        else:
            lines.append([f"{name}: {phases.ABSENT.get(name, 'none')}", *("–" for _ in entries)])
    if any(phases.TINY_DECODE in entry["phases"] for entry in timed):
        beside = functools.partial(p50_p99, phases.TINY_DECODE)
        lines.append(cells(row, f"beside it: {phases.TINY_DECODE}", beside))
    lines += [
        cells(row, "sum of a chunk's phases", lambda e: f"{e['phases_sum_ms']:.2f}"),
        cells(row, "whole chunk", functools.partial(p50_p99, "")),
        cells(row, "spread", lambda e: f"{100 * e['spread']:.0f}%"),
        cells(row, "chunks timed", lambda e: f"{len(e['steady_ms'])}"),
        cells(row, "MiB beside the weights",
              lambda e: f"{e['peak_mib']:.0f}" if "peak_mib" in e else "–"),
    ]  # fmt: skip
    notes = [f"{n}: {e['failed']}" for n, e in entries.items() if "failed" in e]
    notes += [f"{n}: {e['note']}" for n, e in entries.items() if "note" in e]
    notes += [*row.get("notes", ()), f"the weights: {row['weights_mib']:.0f} MiB, shared"]
    window = f"a full window of {row['window']} latent frames"
    title = f"{row['case']}: ms of a chunk's phases at {window}, p50 / p99"
    return Table(title, ("phase", *entries), lines, notes)


def figure(of: Callable[[Result], Mapping[str, float]], name: str, entry: Result) -> str:
    figures = of(entry)
    return f"{figures[name]:.4g}" if name in figures else "–"


def with_and_without(row: Result) -> Table:
    """Every figure with and without each part."""
    kinds: dict[str, Callable[[dict[str, Any]], Mapping[str, float]]] = {
        "FPS, full window": lambda e: e["fps"]["full window"],
        f"FPS, clip of {row['frames']}": lambda e: e["fps"].get("clip", {}),
        "ms to the first frame": lambda e: e["latency_ms"],
    }
    timed = [entry for entry in row["contestants"].values() if "failed" not in entry]
    lines = []
    for kind, of in kinds.items():
        for name in timed[0]["latency_ms"] if timed else ():
            lines.append(cells(row, f"{kind}, {name}", functools.partial(figure, of, name)))
    lacking = [why for n, why in phases.ABSENT.items() if not any(n in e["phases"] for e in timed)]
    title = f"{row['case']}: with and without each"
    return Table(title, ("", *row["contestants"]), lines, lacking)


def beside_prediction(row: Result) -> Table:
    def passes_fps(entry: Result) -> str:
        ms = sum(entry["phases"][name]["ms"] for name in entry["phases"]
                 if name.startswith(STEP) or name == phases.UPDATE)  # fmt: skip
        return f"{1e3 * PIXEL_FRAMES * row['chunk'] / ms:.4g}"

    fps, first = row["predicted"]["fps"], row["predicted"]["first_frame_ms"]
    measured = (
        cells(row, "FPS, full window, steps and cache update", passes_fps),
        cells(row, "ms to the first frame, steps alone",
              lambda e: f"{e['latency_ms']['denoising alone']:.4g}"),
    )  # fmt: skip
    lines = [
        [name, f"{of['floor']:.4g}", f"{of['whole_waves']:.4g}", *rest]
        for of, (name, *rest) in zip((fps, first), measured, strict=True)
    ]
    columns = ("", "predicted floor", "in whole waves", *row["contestants"])
    title = f"{row['case']}: predicted from this machine's ceilings, and measured"
    return Table(title, columns, lines)


def figures(result: Result) -> Iterator[tuple[str, Any]]:
    rows = {row["case"]: row for row in result["rows"] if best(row)}
    if rows:
        yield "timeline", timeline(result, list(rows.values()))
    if any("fps" in line for line in result["baselines"]):
        yield "stream", bars(result)


def timeline(result: Result, rows: Sequence[Result]) -> Any:
    """A chunk at a full window, phase after phase, for each contestant."""
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch

    timed = [
        [(n, e) for n, e in row["contestants"].items() if "failed" not in e][::-1] for row in rows
    ]
    heights = [len(entries) + 1 for entries in timed]
    figure = Figure(figsize=(11, 1.4 + 0.55 * sum(heights)), layout="constrained")
    axes = figure.subplots(len(rows), 1, squeeze=False, height_ratios=heights)[:, 0]
    shown: dict[str, str] = {}
    for axis, row, entries in zip(axes, rows, timed, strict=True):
        longest = max(entry["phases_sum_ms"] for _, entry in entries)
        for y, (_, entry) in enumerate(entries):
            left = 0.0
            for name in phases.chunk_phases(row["steps"]):
                if name not in entry["phases"]:
                    continue
                ms, step = entry["phases"][name]["ms"], name.removeprefix(STEP)
                shown[name] = COLOURS.get(name) or BLUES[(int(step) - 1) % len(BLUES)]
                axis.barh(y, ms, left=left, color=shown[name], edgecolor="white", linewidth=0.5)
                if ms > 0.008 * longest * max(len(name), 7):  # wide enough for the text
                    axis.text(left + ms / 2, y, f"{name}\n{ms:.3g} ms", ha="center", va="center",
                              fontsize=7, color="black" if step in "34" else "white")  # fmt: skip
                left += ms
            axis.text(left + 0.005 * longest, y, f"{left:.4g} ms", va="center", fontsize=8)
        axis.set_yticks(range(len(entries)), [name for name, _ in entries])
        axis.set_xlim(0, 1.1 * longest)
        frames = f"{row['chunk']} latent frame{'s' if row['chunk'] > 1 else ''}"
        axis.set_title(f"{row['case']}: chunks of {frames}", fontsize=9)
    axes[-1].set_xlabel("ms of a chunk at a full window, median of each phase")
    handles = [Patch(color=colour, label=name) for name, colour in shown.items()]
    figure.legend(handles=handles, loc="outside lower center", ncols=len(handles), fontsize=8)
    figure.suptitle(f"{said(result['machine'])}; sizes: {result['sizes']}", fontsize=8)
    return figure


def bars(result: Result) -> Any:
    from matplotlib.figure import Figure

    # The paper's stand beside those of its sizes alone.
    toy = result["sizes"] == "toy"
    lines = [line for line in result["baselines"][::-1] if "fps" in line or not toy]
    figure = Figure(figsize=(10, 1.5 + 0.45 * len(lines)), layout="constrained")
    axis = figure.subplots()
    series = [(f"here, sizes: {result['sizes']}", "fps", "#3b6ea5", 0.0 if toy else -0.2)]
    if not toy:
        series.insert(0, ("paper, one H100 at 480×832", "paper_fps", "#bbbbbb", 0.2))
    for label, key, colour, offset in series:
        at = [y + offset for y, line in enumerate(lines) if key in line]
        lengths = [line[key] for line in lines if key in line]
        placed = axis.barh(at, lengths, 0.38, label=label, color=colour)
        axis.bar_label(placed, fmt="%.3g", fontsize=8, padding=2)
    axis.set_xscale("log")
    axis.set_xlim(0.1, 3 * max(line.get(key, 0) for line in lines for _, key, _, _ in series))
    axis.set_yticks(range(len(lines)), [line["name"] for line in lines])
    axis.set_xlabel("frames a second (clip)")
    figure.legend(loc="outside lower center", ncols=2, fontsize=8)
    figure.suptitle(said(result["machine"]), fontsize=8)
    return figure


def main(arguments: Sequence[str] | None = None) -> int:
    return harness.command("stream", sys.modules[__name__], arguments, __doc__)


if __name__ == "__main__":
    sys.exit(main())
