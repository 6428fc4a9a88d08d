"""Tables and figures of `python -m bench stream`."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from bench import harness
from bench.harness import Result, Table
from sfmodel.cost import PIXEL_FRAMES
from sfmodel.machine import describe, describe_state
from sfmodel.stream import COPY, DECODE, NOISE, PROMPT, STEP, UPDATE

ENCODING, TINY_DECODE = "text encoding", "decode, tiny VAE"
ABSENT = {ENCODING: "no text encoder here"}
COLOURS = {NOISE: "#999999", DECODE: "#5b9e62", COPY: "#8d6cab", UPDATE: "#e08a3c"}
BLUES = ("#1f4e79", "#3b6ea5", "#6d9bc9", "#a3c4e3")


def chunk_phases(steps: int) -> list[str]:
    """In order."""
    return [NOISE, *(f"{STEP}{i + 1}" for i in range(steps)), DECODE, COPY, UPDATE]


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
    notes = [describe(result["machine"])]
    if "after" in result:
        notes.append(describe_state(result["before"], result["after"]))
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
    for name in (ENCODING, PROMPT, *chunk_phases(row["steps"])):
        if any(name in entry["phases"] for entry in timed):
            lines.append(cells(row, name, functools.partial(p50_p99, name)))
        else:
            lines.append([f"{name}: {ABSENT.get(name, 'none')}", *("–" for _ in entries)])
    if any(TINY_DECODE in entry["phases"] for entry in timed):
        beside = functools.partial(p50_p99, TINY_DECODE)
        lines.append(cells(row, f"beside it: {TINY_DECODE}", beside))
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
        f"FPS, clip of {row['frames']}": lambda e: e["fps"]["clip"],
        "ms to the first frame": lambda e: e["latency_ms"],
    }
    timed = [entry for entry in row["contestants"].values() if "failed" not in entry]
    lines = []
    for kind, of in kinds.items():
        for name in timed[0]["latency_ms"] if timed else ():
            lines.append(cells(row, f"{kind}, {name}", functools.partial(figure, of, name)))
    lacking = [why for n, why in ABSENT.items() if not any(n in e["phases"] for e in timed)]
    title = f"{row['case']}: with and without each"
    return Table(title, ("", *row["contestants"]), lines, lacking)


def beside_prediction(row: Result) -> Table:
    def passes_fps(entry: Result) -> str:
        ms = sum(entry["phases"][name]["ms"] for name in entry["phases"]
                 if name.startswith(STEP) or name == UPDATE)  # fmt: skip
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
    rows = {row["case"]: row for row in result["rows"] if harness.timed(row)}
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
            for name in chunk_phases(row["steps"]):
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
    figure.suptitle(f"{describe(result['machine'])}; sizes: {result['sizes']}", fontsize=8)
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
    figure.suptitle(describe(result["machine"]), fontsize=8)
    return figure
