"""`python -m bench kernels`: every op beside what else computes it, at the shapes of Wan2.1, in one
run: norms, RoPE and the sampler as a share of what a copy reaches, attention of what a matrix
product does.

Every implementation is compared with float64 first; one that is wrong is reported and not timed.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch

from bench import harness, timing
from bench.harness import EAGER, OURS, Job, Result, Table
from bench.ops import attention, memory_bound
from bench.ops.measure import best, run_case
from sfkernels.cases import AttentionCase, Case
from sfkernels.testing import interpreted
from sfmodel.machine import describe

CPU_ROUNDS = 5


def rows(tiny: bool) -> list[tuple[Case, bool]]:
    """The cases, and whether something that compiles for each takes part."""
    small = memory_bound.TINY if interpreted() else memory_bound.SMALL
    return [
        *memory_bound.rows(small if tiny else memory_bound.FULL),
        *attention.rows(attention.TINY if tiny else attention.FULL),
    ]


def run(job: Job) -> Result:
    """Compiling takes most of the time: first all cases without, then with what is left of it again
    with those implementations that compile for each case."""
    result = job.begin("kernels", torch.float32 if job.tiny else torch.bfloat16)
    if not job.cuda:  # an interpreter's times say nothing
        job.rounds = 1 if interpreted() else min(job.rounds, CPU_ROUNDS)
    copies: dict[int, float] = {}
    every = rows(job.tiny)
    for case, _ in every:
        job.add(result, case.label, functools.partial(row, case, job, result, copies, False))
    again = [case for case, compiled in every if compiled and job.cuda]
    for case in sorted(again, key=_is_not_a_pattern):
        name = "flex" if isinstance(case, AttentionCase) else "compile"
        job.add(result, case.label, functools.partial(row, case, job, result, copies, True), name)
    return job.end(result)


def row(case: Case, job: Job, result: Result, copies: dict[int, float], compiled: bool) -> Result:
    """copies: GB/s by bytes, as far as they are known."""
    out = run_case(case, job.device, result["ceilings"], job.rounds, compiled)
    if not isinstance(case, AttentionCase):
        if case.nbytes not in copies:
            copies[case.nbytes] = timing.copy_bandwidth(job.device, case.nbytes, job.rounds)
        out["copy_gbps"] = copies[case.nbytes]
    return out


def _is_not_a_pattern(case: Case) -> tuple[bool, bool]:
    """Of cases to compile for, those patterns that FlexAttention is made for come first, and their
    backward pass before all."""
    return not isinstance(case, AttentionCase) or case.layout is None, not case.backward


def is_attention(row: dict[str, Any]) -> bool:
    """Its time is that of its products; that of all others, of their bytes."""
    return str(row["case"]).startswith("attention")


def tables(result: Result) -> list[Table]:
    ceilings = result["ceilings"]
    here = describe(result["machine"])
    copy, product = ceilings["copy_gbps"], ceilings.get("matmul_tflops")
    unit, scale = product_unit(ceilings)
    rate = f"{scale * product:.3g} {unit}" if product else "not measured"
    notes = {f"* {e['note']}" for row in result["rows"] for e in harness.timed(row).values()
             if "note" in e}  # fmt: skip
    ours = {row["case"]: best(row.get("contestants", {}))["best_ours"] for row in result["rows"]}

    def cells(row: Result, name: str, e: Result) -> list[str]:
        if is_attention(row):
            shares = [number(scale * e["tflops"]), percent(e["tflops"], product)]
            shares.append(f"{e['peak_mib']:.0f}" if "peak_mib" in e else "")
        else:
            shares = [number(e["gbps"]), percent(e["gbps"], copy)]
            shares.append(percent(e["gbps"], row["copy_gbps"]))
        first = ours[row["case"]]
        return [
            name + (" *" if "note" in e else ""),
            microseconds(e["ms"]),
            microseconds(e["p99_ms"]),
            microseconds(e["launched_ms"]) if "launched_ms" in e else "",
            *shares,
            f"{e['ms'] / row['contestants'][first]['ms']:.2f}" if first else "",
        ]

    common = ("case", "", "µs", "p99", "with launch")
    last = "time / ours" if any(name in OURS for name in ours.values()) else "time / eager"
    found = []
    for attention_too, title, columns in (
        (False, f"bytes decide; a large copy: {copy:.0f} GB/s",
         (*common, "GB/s", "% of large copy", "% of same-size copy", last)),
        (True, f"arithmetic decides; a matrix product: {rate}",
         (*common, unit, "% of product", "MiB", last)),
    ):  # fmt: skip
        rows = [row for row in result["rows"] if is_attention(row) == attention_too]
        if rows:
            lines = harness.body({"rows": rows}, columns, cells)
            found.append(Table(f"{title} ({here})", columns, lines))
    if found:
        found[-1] = found[-1]._replace(notes=[*sorted(notes), *harness.left_out(result)])
    return found


def product_unit(ceilings: dict[str, Any]) -> tuple[str, float]:
    """What matrix products are counted in on this machine, and how many make a TFLOP/s."""
    return ("GFLOP/s", 1e3) if ceilings.get("matmul_tflops", 1.0) < 1 else ("TFLOP/s", 1.0)


def percent(of: float, ceiling: float | None) -> str:
    return f"{100 * of / ceiling:.0f}" if ceiling else ""


def number(value: float) -> str:
    """Three digits, and all before the point."""
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"


def microseconds(ms: float) -> str:
    return f"{1e3 * ms:.1f}" if ms < 1 else f"{1e3 * ms:.0f}"


COLOURS = {
    EAGER: "#cccccc",
    "compile": "#e08a3c",
    "native": "#8aa86b",
    "liger": "#c96a6a",
    "quack": "#a99bc7",
    "sdpa": "#8aa86b",
    "sdpa cudnn": "#4f7a3a",
    "sdpa flash": "#8aa86b",
    "sdpa efficient": "#c3d6a8",
    "sdpa math": "#dddddd",
    "sdpa varlen": "#a99bc7",
    "flash-attn": "#c96a6a",
    "flex": "#e08a3c",
    "gluon": "#1f3f66",
    "triton": "#3b6ea5",
    "cpp": "#3b6ea5",
}
LABEL = {"facecolor": "white", "edgecolor": "none", "pad": 0.5}  # legible over a line


def figures(result: Result) -> Iterator[tuple[str, Any]]:
    unit, scale = product_unit(result["ceilings"])
    bars: dict[bool, list[tuple[str, list[tuple[str, float, str]]]]] = {True: [], False: []}
    for row in result["rows"]:
        memory = not is_attention(row)
        timed = harness.timed(row)
        group = []
        for name in (n for n in COLOURS if n in timed):
            e = timed[name]
            value = 100 * e["gbps"] / row["copy_gbps"] if memory else scale * e["tflops"]
            text = f"{microseconds(e['ms'])} µs"
            group.append((name, value, text if memory else f"{number(value)}  ({text})"))
        if group:
            bars[memory].append((row["case"], group))
    if bars[True]:
        label = "% of the bandwidth of a copy of as many bytes"
        yield "kernels", grouped_bars(bars[True], 100, label, describe(result["machine"]))
    if bars[False]:
        product = scale * result["ceilings"]["matmul_tflops"]
        label = f"{unit} (dashed: a matrix product)"
        yield "attention", grouped_bars(bars[False], product, label, describe(result["machine"]))
    if "matmul_tflops" in result["ceilings"] and any(bars.values()):
        yield "roofline", _roofline(result)


def grouped_bars(
    groups: list[tuple[str, list[tuple[str, float, str]]]],
    ceiling: float,
    label: str,
    title: str,
    colours: Mapping[str, str] = COLOURS,
) -> Any:
    """Groups of bars in two columns, beside a ceiling: (case, [(name, length, text), …])."""
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch

    lines = [len(bars) + 1 for _, bars in groups]
    first = sum(sum(lines[:i]) < sum(lines) / 2 for i in range(len(groups)))
    columns = [column for column in (groups[:first], groups[first:]) if column]
    tallest = max(sum(len(bars) + 1 for _, bars in column) for column in columns)
    figure = Figure(figsize=(7 * len(columns), 1.4 + 0.135 * tallest), layout="constrained")
    largest = max(value for _, bars in groups for _, value, _ in bars)
    for ax, column in zip(figure.subplots(1, len(columns), squeeze=False)[0], columns, strict=True):
        at, ticks = 0, []
        for case, bars in column:
            ticks.append(
                (at + (len(bars) - 1) / 2, case.removeprefix("attention, ").replace(", ", "\n", 1))
            )
            for name, value, text in bars:
                bar = ax.barh(at, value, 0.9, color=colours[name])
                ax.bar_label(bar, [text], fontsize=6, padding=2, bbox=LABEL)
                at += 1
            at += 1
        ax.axvline(ceiling, color="#888888", linewidth=0.8, linestyle="--", zorder=0)
        ax.set_yticks([y for y, _ in ticks], [case for _, case in ticks], fontsize=7)
        ax.tick_params(axis="x", labelsize=7)
        ax.set_xlabel(label, fontsize=8)
        ax.set_xlim(0, 1.25 * max(ceiling, largest))
        ax.set_ylim(tallest - 0.5, -1)
    present = {name for _, bars in groups for name, _, _ in bars}
    patches = [Patch(color=c, label=n) for n, c in colours.items() if n in present]
    figure.legend(handles=patches, loc="outside lower center", ncols=len(patches), fontsize=8)
    figure.suptitle(title, fontsize=8)
    return figure


def _roofline(result: Result) -> Any:
    """FLOP/s of the best of ours and of the best peer over FLOPs per byte, under the ceilings."""
    from matplotlib.figure import Figure

    ceilings = result["ceilings"]
    product, copy = 1e3 * ceilings["matmul_tflops"], ceilings["copy_gbps"]  # GFLOP/s, GB/s
    figure = Figure(figsize=(9, 5), layout="constrained")
    ax = figure.subplots()
    points = [row for row in result["rows"] if row.get("flops") and row.get("best_ours")]
    if not points:
        return figure
    intensities = [row["flops"] / row["bytes"] for row in points]
    low, high = min(intensities) / 3, max(*intensities, product / copy) * 3
    xs = [low, product / copy, high]
    ax.plot(xs, [min(product, x * copy) for x in xs], color="#888888", linewidth=1)
    ours = "ours" if any(row["best_ours"] in OURS for row in points) else "eager PyTorch"
    shown = (("best_ours", ours, "#3b6ea5", "o"), ("best_peer", "best peer", "#e08a3c", "x"))
    for key, name, colour, marker in shown:
        there = [(x, row) for x, row in zip(intensities, points, strict=True) if row[key]]
        rates = [row["flops"] / row["contestants"][row[key]]["ms"] / 1e6 for _, row in there]
        ax.scatter([x for x, _ in there], rates, 24, c=colour, marker=marker, label=name)
    ax.set_xscale("log")
    ax.set_yscale("log")
    ax.set_xlabel("FLOP per byte read or written", fontsize=8)
    ax.set_ylabel("GFLOP/s", fontsize=8)
    ax.legend(fontsize=8)
    title = f"a copy {copy:.0f} GB/s, a matrix product {product / 1e3:.3g} TFLOP/s"
    ax.set_title(f"{describe(result['machine'])}; {title}", fontsize=8)
    return figure


def main(arguments: Sequence[str] | None = None) -> int:
    timing.keep_memory()
    return harness.command("kernels", sys.modules[__name__], arguments, __doc__)
