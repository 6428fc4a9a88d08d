"""Tables and figures of `python -m bench stream`."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

from bench.figures import BLUE, LIGHT, legend, new
from bench.peers import ANCHORS
from bench.public import PUBLIC
from bench.tables import PEAK_MIB, Result, Table, left_out, timed, value
from sfmodel.cost import PIXEL_FRAMES
from sfmodel.frames import COPY, DECODE
from sfmodel.machine import describe, describe_state
from sfmodel.stream import MERGED, NOISE, PROMPT, STEP, UPDATE

ENCODING, TINY_DECODE = "text encoding", "decode, tiny VAE"
ABSENT = {ENCODING: "no text encoder here"}
COLOURS = {NOISE: "#999999", DECODE: "#5b9e62", COPY: "#8d6cab", UPDATE: "#e08a3c"}
COLOURS[MERGED] = "#c9663a"
BLUES = ("#1f4e79", "#3b6ea5", "#6d9bc9", "#a3c4e3")


def chunk_phases(steps: int) -> list[str]:
    """In order. The first step has the cache update with it, or that came before."""
    return [UPDATE, NOISE, MERGED, *(f"{STEP}{i + 1}" for i in range(steps)), DECODE, COPY]


def tables(result: Result) -> list[Table]:
    toy = "; toy sizes, which do not compare with the paper's" if result["sizes"] == "toy" else ""
    title = f"frames a second and seconds to the first frame, the paper's on one H100{toy}"
    figures = {
        "paper FPS": "paper_fps",
        "FPS": "fps",
        "paper s": "paper_latency_s",
        "s": "latency_s",
    }
    lines = [
        [
            line["name"],
            *(value(key, "{:.3g}".format)(line, line) for key in figures.values()),
            line["said"],
        ]
        for line in result["baselines"]
    ]
    state = describe_state(result.get("before", {}), result.get("after", {}))
    notes = [*filter(None, [describe(result["machine"]), state]), *left_out(result)]
    out = [Table(title, ("", *figures, "how"), lines, notes), anchors(result)]
    for row in result["rows"]:
        if "failed" in row:
            out.append(Table(row["case"], ("", ""), [("failed", row["failed"])]))
        else:
            out += [breakdown(row), with_and_without(row)]
        if "predicted" in row:
            out.append(beside_prediction(row))
    return out


def anchors(result: Result) -> Table:
    """Figures that others have published for this model, and the like of them here."""
    rows = {row["case"]: ours(row) for row in result["rows"]}
    lines = []
    for name, fps, what, like in ANCHORS:
        found = [e["fps"]["clip"].get(like, 0.0) for e in rows.get("chunk-wise", {}).values()]
        lines.append([name, f"{fps}", what, f"{max(found):.3g}" if any(found) else "–"])
    title = "published for Wan2.1-1.3B in few steps at 480×832 on one H100, and its like here"
    return Table(title, ("", "FPS", "what it includes", "FPS here, clip"), lines)


def ours(row: Result) -> dict[str, Result]:
    """The entries that have a time, but for other people's models."""
    return {name: e for name, e in timed(row).items() if not name.startswith(PUBLIC)}


def line(row: Result, label: str, cell: Callable[[Result], str]) -> list[str]:
    """A line of a table with a column for each implementation."""
    entries = row["contestants"].values()
    return [label, *("–" if "failed" in entry else cell(entry) for entry in entries)]


def p50_p99(entry: Result) -> str:
    return f"{entry['ms']:.2f} / {entry['p99_ms']:.2f}"


def breakdown(row: Result) -> Table:
    entries = row["contestants"]
    have = {name for entry in timed(row).values() for name in entry["phases"]}
    lines = []
    for name in (ENCODING, PROMPT, *chunk_phases(row["steps"]), TINY_DECODE):
        if name in have:
            label = f"beside it: {name}" if name == TINY_DECODE else name
            lines.append(line(row, label, lambda e, name=name: (  # type: ignore[misc]
                p50_p99(e["phases"][name]) if name in e["phases"] else "–")))  # fmt: skip
        elif name in ABSENT:
            lines.append([f"{name}: {ABSENT[name]}", *("–" for _ in entries)])
    lines += [
        line(row, "sum of a chunk's phases", lambda e: f"{e['phases_sum_ms']:.2f}"),
        line(row, "whole chunk", p50_p99),
        line(row, "spread", lambda e: f"{100 * e['spread']:.0f}%"),
        line(row, "chunks timed", lambda e: f"{len(e['steady_ms'])}"),
        line(row, "MiB beside the weights", lambda e: PEAK_MIB(row, e) or "–"),
    ]
    notes = [f"{n}: {e[key]}" for key in ("failed", "note") for n, e in entries.items() if key in e]
    notes += [*row.get("notes", ()), f"the weights: {row['weights_mib']:.0f} MiB, shared"]
    window = f"a full window of {row['window']} latent frames"
    title = f"{row['case']}: ms of a chunk's phases at {window}, p50 / p99"
    return Table(title, ("phase", *entries), lines, notes)


def with_and_without(row: Result) -> Table:
    """Every figure with and without each part."""
    columns = []
    for entry in row["contestants"].values():
        fps = entry.get("fps", {"full window": {}, "clip": {}})
        kinds = {"FPS, full window": fps["full window"],
                 f"FPS, clip of {row['frames']}": fps["clip"],
                 "ms to the first frame": entry.get("latency_ms", {}),
                 "ms to a new prompt's first frame": entry.get("reaction_ms", {})}  # fmt: skip
        columns.append({f"{k}, {n}": f"{v:.4g}" for k, of in kinds.items() for n, v in of.items()})
    labels = dict.fromkeys(label for column in columns for label in column)
    lines = [[label, *(column.get(label, "–") for column in columns)] for label in labels]
    have = {name for entry in timed(row).values() for name in entry["phases"]}
    lacking = [why for name, why in ABSENT.items() if name not in have]
    title = f"{row['case']}: with and without each"
    return Table(title, ("", *row["contestants"]), lines, lacking)


def beside_prediction(row: Result) -> Table:
    """A line for each variant: the passes alone, predicted and measured, and all that is there."""

    def passes_fps(entry: Result) -> float:
        ms = sum(entry["phases"][name]["ms"] for name in entry["phases"]
                 if name.startswith(STEP) or name == UPDATE)  # fmt: skip
        return 1e3 * PIXEL_FRAMES * row["chunk"] / ms

    lines = []
    for name, entry in timed(row).items():
        bounds, fps = row["predicted"]["fps"].get(name, {}), entry["fps"]["full window"]
        cells = [bounds.get("floor"), bounds.get("whole_waves"), passes_fps(entry)]
        cells += [fps.get(which) for which in ("all", "overlapped")]
        lines.append([name, *(f"{cell:.4g}" if cell else "–" for cell in cells)])
    first = row["predicted"]["first_frame_ms"]
    alone = [f"{e['latency_ms']['denoising alone']:.4g} {n}" for n, e in timed(row).items()]
    notes = [f"ms to the first frame, steps alone: predicted {first['floor']:.4g}, in whole waves "
             f"{first['whole_waves']:.4g}; measured {', '.join(alone)}"]  # fmt: skip
    columns = ("FPS at a full window", "passes alone, floor", "in whole waves", "measured",
               "all, measured", "overlapped")  # fmt: skip
    title = f"{row['case']}: predicted from this machine's ceilings, and measured"
    return Table(title, columns, lines, notes)


def figures(result: Result) -> Iterator[tuple[str, Any]]:
    rows = {row["case"]: row for row in result["rows"] if timed(row)}
    if rows:
        yield "timeline", timeline(result, list(rows.values()))
    if any("fps" in line for line in result["baselines"]):
        yield "stream", bars(result)


def timeline(result: Result, rows: Sequence[Result]) -> Any:
    """A chunk at a full window, phase after phase, for each contestant."""
    heights = [len(timed(row)) + 1 for row in rows]
    figure, axes = new(
        f"{describe(result['machine'])}; sizes: {result['sizes']}", 11, 1.4 + 0.55 * sum(heights),
        rows=len(rows), height_ratios=heights,
    )  # fmt: skip
    shown: dict[str, str] = {}
    for axis, row in zip(axes, rows, strict=True):
        entries = [*timed(row).items()][::-1]
        longest = max(entry["phases_sum_ms"] for _, entry in entries)
        for y, (_, entry) in enumerate(entries):
            left = 0.0
            for name in (n for n in chunk_phases(row["steps"]) if n in entry["phases"]):
                ms, step = entry["phases"][name]["ms"], name.removeprefix(STEP)
                shown[name] = COLOURS.get(name) or BLUES[(int(step) - 1) % len(BLUES)]
                axis.barh(y, ms, left=left, color=shown[name], edgecolor="white", linewidth=0.5)
                label = name.replace(" and ", "\nand ")
                if ms > 0.008 * longest * max(7, *map(len, label.split("\n"))):  # it fits
                    axis.text(left + ms / 2, y, f"{label}\n{ms:.3g} ms", ha="center", va="center",
                              fontsize=7, color="black" if step in "34" else "white")  # fmt: skip
                left += ms
            axis.text(left + 0.005 * longest, y, f"{left:.4g} ms", va="center", fontsize=8)
        axis.set_yticks(range(len(entries)), [name for name, _ in entries])
        axis.set_xlim(0, 1.1 * longest)
        frames = f"{row['chunk']} latent frame{'s' if row['chunk'] > 1 else ''}"
        axis.set_title(f"{row['case']}: chunks of {frames}", fontsize=9)
    axes[-1].set_xlabel("ms of a chunk at a full window, median of each phase")
    legend(figure, shown)
    return figure


def bars(result: Result) -> Any:
    """Frames a second here; the paper's stand beside those of its sizes alone."""
    toy = result["sizes"] == "toy"
    lines = [line for line in result["baselines"][::-1] if "fps" in line or not toy]
    figure, (axis,) = new(describe(result["machine"]), 10, 1.5 + 0.45 * len(lines))
    series = {"fps": (f"here, sizes: {result['sizes']}", BLUE, 0.0 if toy else -0.2)}
    if not toy:
        series = {"paper_fps": ("paper, one H100 at 480×832", LIGHT, 0.2)} | series
    for key, (_, colour, offset) in series.items():
        at = {y + offset: line[key] for y, line in enumerate(lines) if key in line}
        placed = axis.barh([*at], [*at.values()], 0.38, color=colour)
        axis.bar_label(placed, fmt="%.3g", fontsize=8, padding=2)
    axis.set_xscale("log")
    axis.set_xlim(0.1, 3 * max(line.get(key, 0) for line in lines for key in series))
    axis.set_yticks(range(len(lines)), [line["name"] for line in lines])
    axis.set_xlabel("frames a second (clip)")
    legend(figure, {label: colour for label, colour, _ in series.values()})
    return figure
