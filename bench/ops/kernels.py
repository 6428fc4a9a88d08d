"""`python -m bench kernels`: every op beside what else computes it, at the shapes of Wan2.1, in one
run: norms, RoPE and the sampler as a share of what a copy reaches, attention, linear layers and
convolutions of what a matrix product does.

Every implementation is compared with float64 first; one that is wrong is reported and not timed.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any

import torch

from bench import tables as show
from bench import timing
from bench.figures import BLUE, GREY, ORANGE, new, race
from bench.harness import OURS, Job
from bench.ops import attention, memory_bound
from bench.ops.measure import best, run_case
from bench.tables import Result, Table, timed
from sfkernels import launch
from sfkernels.cases import AttentionCase, Case
from sfkernels.dispatch import CONVOLUTION
from sfkernels.testing import interpreted
from sfmodel.machine import describe

CPU_ROUNDS = 5
BANDWIDTH = "% of the bandwidth of a copy of as many bytes"


def rows(tiny: bool) -> list[tuple[Case, bool]]:
    """The cases, and whether something that compiles for each takes part."""
    small = memory_bound.TINY if interpreted() else memory_bound.SMALL
    return [
        *memory_bound.rows(small if tiny else memory_bound.FULL),
        *attention.rows(attention.TINY if tiny else attention.FULL),
        *memory_bound.convolutions(tiny),
    ]


def run(job: Job) -> Result:
    """Compiling takes most of the time: first all cases without, then with what is left of it again
    with those implementations that compile for each case."""
    result = job.begin("kernels", torch.float32 if job.tiny else torch.bfloat16)
    if not job.cuda:  # an interpreter's times say nothing
        timing.keep_memory()
        job.rounds = 1 if interpreted() else min(job.rounds, CPU_ROUNDS)
    copies: dict[int, float] = {}
    every = rows(job.tiny)
    for case, _ in every:
        job.add(result, case.label, functools.partial(row, case, job, result, copies, False))
    again = [case for case, compiled in every if compiled and job.cuda]
    # First the patterns that FlexAttention is made for, and of them the backward pass.
    again.sort(key=lambda case: (getattr(case, "layout", None) is None, not case.backward))
    for case in again:
        name = "flex" if isinstance(case, AttentionCase) else "compile"
        job.add(result, case.label, functools.partial(row, case, job, result, copies, True), name)
    return job.end(result)


def row(case: Case, job: Job, result: Result, copies: dict[int, float], compiled: bool) -> Result:
    """copies: GB/s by bytes, as far as they are known."""
    out = run_case(case, job.device, result["ceilings"], job.rounds, compiled)
    if isinstance(case, AttentionCase):
        if launch.is_hopper(job.device):
            out["ceiling_tflops"] = attention.ceiling(case, launch.multiprocessors(job.device))
    else:
        if case.nbytes not in copies:
            copies[case.nbytes] = timing.copy_bandwidth(job.device, case.nbytes, job.rounds)
        out["copy_gbps"] = copies[case.nbytes]
    return out


def by_limit(result: Result) -> tuple[list[Result], list[Result]]:
    """The rows whose bytes take the time, and those whose products do."""
    found: tuple[list[Result], list[Result]] = [], []
    for row in result["rows"]:
        products = row["case"].startswith(("attention", "linear", *CONVOLUTION))
        found[products].append(row)
    return found


def tables(result: Result) -> list[Table]:
    ceilings = result["ceilings"]
    here = describe(result["machine"])
    product = ceilings.get("matmul_tflops")
    unit, scale = show.product_unit(ceilings)
    ours = {row["case"]: best(row.get("contestants", {}))["best_ours"] for row in result["rows"]}

    def over_ours(row: Result, e: Result) -> str:
        first = ours[row["case"]]
        return f"{e['ms'] / row['contestants'][first]['ms']:.2f}" if first else ""

    def ceiling(row: Result, _: Result) -> str:
        most = row.get("ceiling_tflops")
        return show.number(scale * most) if most else ""

    common = {
        "µs": show.value("ms", show.microseconds),
        "p99": show.value("p99_ms", show.microseconds),
        "with launch": show.value("launched_ms", show.microseconds),
    }
    of_bytes = {
        "GB/s": show.value("gbps"),
        "% of large copy": show.share("gbps", ceilings["copy_gbps"]),
        "% of same-size copy": lambda row, e: show.percent(e["gbps"], row["copy_gbps"]),
    }
    of_products = {
        unit: show.value("tflops", scale=scale),
        "% of product": show.share("tflops", product),
        "ceiling of gluon": ceiling,
        "MiB": show.PEAK_MIB,
    }
    last = "time / ours" if any(name in OURS for name in ours.values()) else "time / eager"
    rate = f"{show.number(scale * product)} {unit}" if product else "not measured"
    found = []
    by_bytes, by_products = by_limit(result)
    for rows, title, columns in (
        (by_bytes, f"bytes decide; a large copy: {ceilings['copy_gbps']:.0f} GB/s", of_bytes),
        (by_products, f"arithmetic decides; a matrix product: {rate}", of_products),
    ):
        if rows:
            columns = common | columns | {last: over_ours}
            found.append(show.of_entries(f"{title} ({here})", rows, columns))
    if found:
        found[-1] = found[-1]._replace(notes=[*found[-1].notes, *show.left_out(result)])
    return found


def bandwidth(row: Result, e: Result) -> tuple[float, str]:
    """A bar: % of the bandwidth of a copy of as many bytes."""
    return 100 * e["gbps"] / row["copy_gbps"], f"{show.microseconds(e['ms'])} µs"


def figures(result: Result) -> Iterator[tuple[str, Any]]:
    unit, scale = show.product_unit(result["ceilings"])

    def rate(_: Result, e: Result) -> tuple[float, str]:
        reached = scale * e["tflops"]
        return reached, f"{show.number(reached)}  ({show.microseconds(e['ms'])} µs)"

    by_bytes, by_products = by_limit(result)
    yield from race("kernels", result, by_bytes, bandwidth, 100, BANDWIDTH)
    product = scale * result["ceilings"].get("matmul_tflops", 0.0)
    label = f"{unit} (dashed: a matrix product)"
    yield from race("products", result, by_products, rate, product, label)
    if product and any(map(timed, result["rows"])):
        yield "roofline", _roofline(result)


def _roofline(result: Result) -> Any:
    """FLOP/s of the best of ours and of the best peer over FLOPs per byte, under the ceilings."""
    ceilings = result["ceilings"]
    product, copy = 1e3 * ceilings["matmul_tflops"], ceilings["copy_gbps"]  # GFLOP/s, GB/s
    title = f"a copy {copy:.0f} GB/s, a matrix product {product / 1e3:.3g} TFLOP/s"
    figure, (ax,) = new(f"{describe(result['machine'])}; {title}", 9, 5)
    points = [row for row in result["rows"] if row.get("flops") and row.get("best_ours")]
    if not points:
        return figure
    intensities = [row["flops"] / row["bytes"] for row in points]
    low, high = min(intensities) / 3, max(*intensities, product / copy) * 3
    xs = [low, product / copy, high]
    ax.plot(xs, [min(product, x * copy) for x in xs], color=GREY, linewidth=1)
    ours = "ours" if any(row["best_ours"] in OURS for row in points) else "eager PyTorch"
    shown = (("best_ours", ours, BLUE, "o"), ("best_peer", "best peer", ORANGE, "x"))
    for key, name, colour, marker in shown:
        there = [(x, row) for x, row in zip(intensities, points, strict=True) if row[key]]
        rates = [row["flops"] / row["contestants"][row[key]]["ms"] / 1e6 for _, row in there]
        ax.scatter([x for x, _ in there], rates, 24, c=colour, marker=marker, label=name)
    ax.set(xscale="log", yscale="log", xlabel="FLOP per byte read or written", ylabel="GFLOP/s")
    ax.legend(fontsize=8)
    return figure
