"""`python -m bench train`: seconds of a training iteration (arXiv 2506.08009, Figure 6) of
Wan2.1-1.3B at 480×832, random weights and latents, by the implementation of self-attention.

A clip of 21 latent frames in chunks of 3, batch 1: float32 weights, bfloat16 arithmetic, AdamW.
TF: teacher forcing, [clean ‖ noisy], and DF: diffusion forcing, of the flow-matching loss, every
block recomputed in the backward pass. SF-n: self forcing that exits at step n, with DMD by a real
and a fake score of the generator's size; its critic: the same rollout and the flow-matching loss of
the fake score.

Contestants share weights, optimisers and all that is not self-attention. Each is compared first:
loss or video, the norm of the gradient and the gradients of two layers. Not measured on a GPU yet.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from bench import harness, timing
from bench.harness import EAGER
from bench.iterations import Training, attending, check, exit_step_of
from bench.ops import kernels
from bench.ops.flex import COMPILE_SECONDS, flex_attention
from sfmodel.config import PRESETS, Preset
from sfmodel.cost import training_flops
from sfmodel.machine import said

IN_FULL = {"TF": "teacher forcing", "DF": "diffusion forcing"}
GENERATORS = ("TF", "SF-4", "DF", "SF-1", "SF-2", "SF-3")  # the most telling first
ROWS = (*GENERATORS, *(f"{name} critic" for name in ("SF-4", "SF-1", "SF-2", "SF-3")))
# The first one is what the others are compared with. FlexAttention comes last: it compiles.
IMPLS, TINY_IMPLS = ("sdpa", "triton", "gluon", "flex"), ("reference", "sdpa")
ROUNDS = 3
COLOURS = {"reference": kernels.COLOURS[EAGER]}
COLOURS |= {name: kernels.COLOURS[name] for name in ("sdpa", "flex", "gluon", "triton")}
SHADES = {"forward": 0.55, "rollout": 0.4, "score": 0.7, "backward": 1.0, "optimiser": 0.25}
# Published seconds of an iteration on 64 H100: generator, critic.
PAPER = {
    "DF": (14.17, 5.07),
    "TF": (18.29, 5.88),
    "SF-1": (12.19, 4.72),
    "SF-2": (12.98, 5.50),
    "SF-3": (13.72, 6.22),
    "SF-4": (14.55, 7.01),
}


def run(job: harness.Job) -> harness.Result:
    dtype = torch.float32 if job.tiny else torch.bfloat16
    result = job.begin("train", dtype)
    preset = PRESETS["toy" if job.tiny else "wan-1.3b"]
    job.tick("random weights")
    training = Training(preset, job.device, dtype)
    chosen = [name for name in ROWS if job.wants(name)]
    for i, name in enumerate(chosen):
        if job.left <= 0:
            result["no_time_for"].append(name)
            continue
        row: dict[str, Any] = {"case": name, "flops": flops(preset, name), "contestants": {}}
        result["rows"].append(row)
        try:
            measure(training, row, job, result, job.left / (len(chosen) - i))
        except Exception as error:  # nothing to compare with; the other row still runs
            row["failed"] = timing.reason(error)
        job.save(result)
    return job.end(result)


def flops(preset: Preset, row: str) -> float:
    if row in IN_FULL:
        return training_flops(preset)[IN_FULL[row]]
    which = "critic" if row.endswith("critic") else "generator"
    return training_flops(preset, exit_step=exit_step_of(row))[f"self forcing, {which}"]


def measure(
    training: Training,
    row: dict[str, Any],
    job: harness.Job,
    result: harness.Result,
    seconds: float,
) -> None:
    """Checks all contestants of a row, then times those that are right, in turn: once at least, and
    again while the row has taken less than its share of `seconds`."""
    until = job.left - seconds
    name, entries = row["case"], row["contestants"]
    layout = training.layouts.get(name)
    training.prepare(name)
    want: dict[str, Tensor] = {}
    right: dict[str, Callable[..., Tensor] | None] = {}
    for impl in TINY_IMPLS if job.tiny else IMPLS:
        if impl == "flex" and layout is None:  # masked patterns are what it is for
            continue
        if impl == "flex" and job.left < COMPILE_SECONDS:
            result["no_time_for"].append(f"{name} with FlexAttention")
            continue
        job.tick(f"{name}: is {impl} right?")
        try:
            flex = flex_attention(layout, job.device) if impl == "flex" else None
            with attending(training, impl, flex):
                got = training.results(name)
            want = want or got
            check(got, want, half=not job.tiny)
            right[impl] = flex
        except Exception as error:
            if not want:
                raise
            wrong = f"{timing.WRONG}: " * isinstance(error, AssertionError)
            entries[impl] = {"failed": wrong + timing.reason(error)}
        _free(training)

    times: dict[str, list[dict[str, float]]] = {impl: [] for impl in right}
    rounds = min(job.rounds, ROUNDS)
    for i in range(rounds):
        if i and job.left <= until:
            break
        for impl, flex in [*right.items()]:
            job.tick(f"{name}: round {i + 1} of {rounds}, {impl}")
            try:
                around = timing.phase(impl, job.device), attending(training, impl, flex)
                with around[0], around[1], timing.peak_memory(job.device) as peak:
                    times[impl].append(training.iteration(name))
            except Exception as error:
                entries[impl] = {"failed": timing.reason(error)}
                del right[impl]
                _free(training)
                continue
            timed = timing.summary([sum(each.values()) for each in times[impl]])
            timed.peak_mib = peak[0]
            entries[impl] = timing.entry(
                timed,
                flops=row["flops"],
                tflops=row["flops"] / timed.p50 / 1e9,
                phases={p: _phase([each[p] for each in times[impl]]) for p in times[impl][0]},
            )
        row["rounds"] = i + 1
        job.save(result)


def _phase(milliseconds: Sequence[float]) -> dict[str, float]:
    timed = timing.summary(milliseconds)
    return {"ms": timed.p50, "p99_ms": timed.p99}


def _free(training: Training) -> None:
    training.free()
    timing.free(training.device)


def _as_published(row: dict[str, Any]) -> tuple[bool, int]:
    """In the order of Figure 6, the critics after the generators."""
    name = row["case"].split()[0]
    return row["case"] != name, [*PAPER].index(name)


def tables(result: harness.Result) -> list[harness.Table]:
    ceiling, cells, fastest = result["ceilings"]["matmul_tflops"], [], {}
    for row in result["rows"]:
        if "failed" in row:
            cells.append([row["case"], f"failed: {row['failed']}", *[""] * 6])
        for impl, e in row["contestants"].items():
            if "failed" in e:
                cells.append([row["case"], impl, e["failed"], *[""] * 5])
                continue
            split = ", ".join(f"{p} {x['ms'] / 1e3:.3g}" for p, x in e["phases"].items())
            peak = f"{e['peak_mib'] / 1024:.1f}" if "peak_mib" in e else ""
            seconds = (f"{e[key] / 1e3:.3g}" for key in ("ms", "p99_ms"))
            cells.append([row["case"], impl, *seconds, split, peak, f"{e['tflops']:.3g}",
                          f"{100 * e['tflops'] / ceiling:.0f}"])  # fmt: skip
        if timed := harness.timed(row):
            fastest[row["case"]] = min(timed.items(), key=lambda item: item[1]["ms"])
    columns = ["", "self-attention", "s", "p99", "of which", "peak GiB", "TFLOP/s", "% of product"]
    title = f"training iteration: {result['sizes']}, batch 1, {said(result['machine'])}"
    notes = ["peak GiB: beside weights and AdamW's averages; TFLOP/s: of what the pattern needs, "
             "what is recomputed included"]  # fmt: skip

    def ratio(seconds: float, of: float | None) -> str:
        return f"{seconds / of:.2f}" if of else ""

    beside = []
    own = {name: e["ms"] / 1e3 for name, (_, e) in fastest.items()}
    for name, (generator, critic) in PAPER.items():
        cells_of = [name]
        for row, published, first in (
            (name, generator, "SF-1"), (f"{name} critic", critic, "SF-1 critic"),
        ):  # fmt: skip
            ours = ["not run" if row in ROWS else "no critic here", ""]
            if row in own:
                ours = [f"{own[row]:.3g} ({fastest[row][0]})", ratio(own[row], own.get(first))]
            of = PAPER[first.split()[0]][row.endswith("critic")]
            cells_of += [f"{published}", ratio(published, of), *ours]
        beside.append(cells_of)
    columns_beside = ["", "generator: published", "/ SF-1's", "fastest here", "/ SF-1's",
                      "critic: published", "/ SF-1's", "fastest here", "/ SF-1's"]  # fmt: skip
    why = ["published: 64 H100, a batch of 64, DMD with a real score of 14B in all rows; here one "
           "device, one clip, a real score of the generator's size, and in DF and TF the flow loss "
           "alone: at most ratios between SF rows compare"]  # fmt: skip
    return [
        harness.Table(title, columns, cells, notes),
        harness.Table("seconds of an iteration beside Figure 6", columns_beside, beside, why),
    ]


def figures(result: harness.Result) -> Iterator[tuple[str, Any]]:
    from matplotlib.figure import Figure

    rows = sorted((row for row in result["rows"] if harness.timed(row)), key=_as_published)
    if not rows:
        return
    bars_in_all = sum(len(harness.timed(row)) for row in rows)
    figure = Figure(figsize=(4 + 0.4 * bars_in_all, 4.6), layout="constrained")
    ax = figure.subplots()
    at, ticks, named = 0.0, [], set()
    for row in rows:
        start = at
        for impl in COLOURS:
            if impl not in harness.timed(row):
                continue
            e, bottom = row["contestants"][impl], 0.0
            for phase, timed in e["phases"].items():
                seconds, alpha = timed["ms"] / 1e3, SHADES[phase]
                label = impl if phase == "backward" and impl not in named else None
                look: dict[str, Any] = {"color": COLOURS[impl], "alpha": alpha, "label": label}
                bars = ax.bar(at, seconds, 0.85, bottom, **look)
                bottom += seconds
            ax.bar_label(bars, [f"{e['ms'] / 1e3:.3g}"], fontsize=7)
            named.add(impl)
            at += 1
        floor = timing.floor_ms(row["flops"], 0, result["ceilings"]) / 1e3
        ax.hlines(floor, start - 0.5, at - 0.5, color="#888888", linestyle="--", linewidth=0.8)
        ticks.append(((start + at - 1) / 2, row["case"].replace(" ", "\n")))
        at += 0.8
    ax.set_xticks(*zip(*ticks, strict=True))
    ax.margins(y=0.15)
    ax.set_ylabel("seconds of an iteration")
    figure.legend(loc="outside lower center", ncols=len(COLOURS), fontsize=8)
    parts = "from below: forward (in SF: rollout, scores), backward, optimiser; dashed: the floor"
    title = f"{result['sizes']}, batch 1, {said(result['machine'])}\n{parts}"
    figure.suptitle(title, fontsize=8)
    yield "train", figure


def main(arguments: Sequence[str] | None = None) -> int:
    return harness.command("train", sys.modules[__name__], arguments, __doc__)
