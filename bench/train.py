"""`python -m bench train`: seconds of a training iteration (arXiv 2506.08009, Figure 6) of
Wan2.1-1.3B at 480×832, random weights and latents, by the implementation of masked self-attention.

Forward pass, flow-matching loss, backward pass and AdamW step on a clip of 21 latent frames in
chunks of 3, batch 1: float32 weights, bfloat16 arithmetic, every block recomputed in the backward
pass. Contestants share weights, optimiser and all that is not self-attention. Each is compared
first: the loss, the norm of the gradient and the gradients of two layers.

TF: teacher forcing, [clean ‖ noisy]. DF: diffusion forcing. SF-n: self forcing, n steps.
"""

from __future__ import annotations

import contextlib
import math
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any
from unittest import mock

import torch
from torch import Tensor

import sfkernels as sf
from bench import attention, part, timing
from bench.machine import said
from bench.model import clip_chunks, training_flops
from sfmodel.config import PRESETS, Preset
from sfmodel.dit import DiT, SelfAttention
from sfmodel.schedule import FlowSchedule
from sfmodel.train.objectives import diffusion_forcing_loss, teacher_forcing_loss

ROWS = {"TF": "teacher forcing", "DF": "diffusion forcing"}
# The first one is what the others are compared with. FlexAttention comes last: it compiles.
IMPLS, TINY_IMPLS = ("sdpa", "triton", "gluon", "flex"), ("reference", "sdpa")
COMPILING = 60.0  # seconds that FlexAttention may take for a pattern: not begun with less
ROUNDS, TINY_ROUNDS = 3, 8
PHASES = ("forward", "backward", "optimiser")
QKV = "blocks.{}.self_attn.qkv.weight"
COLOURS = {
    "reference": "#cccccc",
    "sdpa": "#8aa86b",
    "flex": "#e08a3c",
    "gluon": "#1f3f66",
    "triton": "#3b6ea5",
}
# Published seconds of an iteration on 64 H100: generator, critic.
PAPER = {
    "DF": (14.17, 5.07),
    "TF": (18.29, 5.88),
    "SF-1": (12.19, 4.72),
    "SF-2": (12.98, 5.50),
    "SF-3": (13.72, 6.22),
    "SF-4": (14.55, 7.01),
}


class Training:
    """A model, its optimiser and one batch of a clip."""

    def __init__(self, preset: Preset, device: torch.device, dtype: torch.dtype) -> None:
        torch.manual_seed(0)
        self.device, self.dtype = device, dtype
        with device:
            self.model = DiT(preset.dit, recompute=True)
        # Else it is zero, and so are the gradients of all that comes before.
        torch.nn.init.normal_(self.model.head.head.weight, std=preset.dit.dim**-0.5)
        self.optimizer = torch.optim.AdamW(
            self.model.parameters(), lr=2e-6, betas=(0.0, 0.999), weight_decay=0.01, fused=True
        )
        for parameter in self.model.parameters():
            parameter.grad = torch.zeros_like(parameter)
        self.optimizer.step()  # makes room for the averages, which no iteration then pays for
        self.optimizer.zero_grad()
        chunks, tokens = clip_chunks(preset), math.prod(preset.grid)
        self.layouts = {
            name: sf.BlockLayout(chunks, tokens, teacher_forcing=name == "TF") for name in ROWS
        }
        size = 1, sum(chunks), preset.dit.channels, preset.height, preset.width
        self.clean, self.noise = torch.randn(2, *size, device=device)
        self.text = torch.randn(1, preset.dit.text_len, preset.dit.text_dim, device=device)
        sigma = FlowSchedule(preset.shift).shifted(torch.rand(1, len(chunks)))
        self.sigma = sigma.repeat_interleave(torch.tensor(chunks), 1).to(device)

    def loss(self, layout: sf.BlockLayout) -> Tensor:
        shared = self.noise, self.sigma, self.text, layout
        half = self.dtype != torch.float32
        with torch.autocast(self.device.type, self.dtype, enabled=half):
            if layout.teacher_forcing:
                return teacher_forcing_loss(self.model, self.clean, self.clean, *shared)
            return diffusion_forcing_loss(self.model, self.clean, *shared)

    def results(self, layout: sf.BlockLayout) -> dict[str, Tensor]:
        """What two contestants are to agree in. Leaves no gradient behind."""
        loss = self.loss(layout)
        loss.backward()
        grads = {name: p.grad for name, p in self.model.named_parameters() if p.grad is not None}
        norm = torch.nn.utils.get_total_norm([*grads.values()])
        self.optimizer.zero_grad()
        last = len(self.model.blocks) - 1
        weights = {f"gradient of {n}": grads[n] for n in (QKV.format(0), QKV.format(last))}
        return {"loss": loss.detach(), "norm of the gradient": norm, **weights}

    def iteration(self, layout: sf.BlockLayout) -> dict[str, float]:
        """Milliseconds of each of PHASES."""
        losses: list[Tensor] = []
        runs: tuple[Callable[[], Any], ...] = (
            lambda: losses.append(self.loss(layout)),
            lambda: losses.pop().backward(),
            self.optimizer.step,
        )
        times = {}
        for name, run in zip(PHASES, runs, strict=True):
            with timing.phase(name, self.device):
                timing.wait(self.device)
                began = time.perf_counter()
                run()
                timing.wait(self.device)
                times[name] = 1e3 * (time.perf_counter() - began)
        self.optimizer.zero_grad()
        return times


@contextlib.contextmanager
def attending(model: DiT, impl: str, flex: Callable[..., Tensor] | None) -> Iterator[None]:
    """Self-attention by `impl`, or by `flex` of q, k and v if given, as the public trainer has it:
    until the backward pass is done, which recomputes the blocks."""
    for module in model.modules():
        if isinstance(module, SelfAttention):
            module.attention_impl = impl
    if flex is None:
        yield
        return
    with mock.patch.object(sf, "block_causal_attention", lambda q, k, v, *_, **__: flex(q, k, v)):
        yield


def check(got: dict[str, Tensor], want: dict[str, Tensor], half: bool) -> None:
    """Raises AssertionError unless loss and gradients agree to rounding. half: in bfloat16."""
    for name, theirs in want.items():
        error = float((got[name] - theirs).norm() / theirs.norm())
        allowed = (1e-2 if name == "loss" else 5e-2) if half else 1e-4
        assert error <= allowed, f"{name} is off by {error:.1e}, allowed {allowed:.0e}"  # NaN too


def run(job: part.Job) -> part.Result:
    dtype = torch.float32 if job.tiny else torch.bfloat16
    result = job.begin("train", dtype)
    preset = PRESETS["toy" if job.tiny else "wan-1.3b"]
    job.tick("random weights")
    training, flops = Training(preset, job.device, dtype), training_flops(preset)
    for name, said_in_full in ROWS.items():
        if not job.wants(name):
            continue
        if job.left <= 0:
            result["no_time_for"].append(name)
            continue
        row: dict[str, Any] = {"case": name, "flops": flops[said_in_full], "contestants": {}}
        result["rows"].append(row)
        try:
            measure(training, row, job, result)
        except Exception as error:  # nothing to compare with; the other row still runs
            row["failed"] = timing.reason(error)
        job.save(result)
    return job.end(result)


def measure(training: Training, row: dict[str, Any], job: part.Job, result: part.Result) -> None:
    """Checks all contestants of a row, then times those that are right, in turn."""
    name, entries, layout = row["case"], row["contestants"], training.layouts[row["case"]]
    want: dict[str, Tensor] = {}
    right: dict[str, Callable[..., Tensor] | None] = {}
    for impl in TINY_IMPLS if job.tiny else IMPLS:
        if impl == "flex" and job.left < COMPILING:
            result["no_time_for"].append(f"{name} with FlexAttention")
            continue
        job.tick(f"{name}: is {impl} right?")
        try:
            flex = attention.flex_attention(layout, job.device) if impl == "flex" else None
            with attending(training.model, impl, flex):
                got = training.results(layout)
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
    rounds = min(job.rounds, TINY_ROUNDS if job.tiny else ROUNDS)
    for i in range(rounds):
        if i and job.left <= 0:
            break
        for impl, flex in [*right.items()]:
            job.tick(f"{name}: round {i + 1} of {rounds}, {impl}")
            try:
                around = timing.phase(impl, job.device), attending(training.model, impl, flex)
                with around[0], around[1], timing.peak_memory(job.device) as peak:
                    times[impl].append(training.iteration(layout))
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
                phases={p: _phase([each[p] for each in times[impl]]) for p in PHASES},
            )
        row["rounds"] = i + 1
        job.save(result)


def _phase(milliseconds: Sequence[float]) -> dict[str, float]:
    timed = timing.summary(milliseconds)
    return {"ms": timed.p50, "p99_ms": timed.p99}


def _free(training: Training) -> None:
    training.optimizer.zero_grad()
    if training.device.type == "cuda":
        torch.cuda.empty_cache()


def _timed(row: dict[str, Any]) -> dict[str, dict[str, Any]]:
    return {impl: e for impl, e in row.get("contestants", {}).items() if "ms" in e}


def tables(result: part.Result) -> list[part.Table]:
    ceiling, cells, fastest = result["ceilings"]["matmul_tflops"], [], {}
    for row in result["rows"]:
        if "failed" in row:
            cells.append([row["case"], f"failed: {row['failed']}", *[""] * 8])
        for impl, e in row["contestants"].items():
            if "failed" in e:
                cells.append([row["case"], impl, e["failed"], *[""] * 7])
                continue
            seconds = [e["ms"], e["p99_ms"], *(e["phases"][p]["ms"] for p in PHASES)]
            peak = f"{e['peak_mib'] / 1024:.1f}" if "peak_mib" in e else ""
            cells.append([row["case"], impl, *(f"{ms / 1e3:.3g}" for ms in seconds), peak,
                          f"{e['tflops']:.3g}", f"{100 * e['tflops'] / ceiling:.0f}"])  # fmt: skip
        if timed := _timed(row):
            fastest[row["case"]] = min(timed.items(), key=lambda item: item[1]["ms"])
    columns = ["", "self-attention", "s", "p99", *PHASES, "peak GiB", "TFLOP/s", "% of product"]
    title = f"training iteration: {result['sizes']}, batch 1, {said(result['machine'])}"
    notes = ["peak GiB: beside weights and AdamW's averages; TFLOP/s: of what the pattern needs, "
             "forward pass, recomputed forward pass, backward pass"]  # fmt: skip

    def ratio(seconds: float, of: float | None) -> str:
        return f"{seconds / of:.2f}" if of else ""

    beside, later = [], "comes with the trainer"
    own = {name: e["ms"] / 1e3 for name, (_, e) in fastest.items()}
    for name, (generator, critic) in PAPER.items():
        ours = [later, ""] if name not in ROWS else ["not run", ""]
        if name in own:
            ours = [f"{own[name]:.3g} ({fastest[name][0]})", ratio(own[name], own.get("DF"))]
        beside.append([name, f"{generator}", ratio(generator, PAPER["DF"][0]), *ours, f"{critic}",
                       later])  # fmt: skip
    columns_beside = ["", "generator: published", "/ DF", "fastest here", "/ DF",
                      "critic: published", "here"]  # fmt: skip
    why = ["published: 64 H100, a batch of 64 and a DMD loss with a teacher of 14B, where here it "
           "is one device, one clip and the flow loss alone: at most ratios compare"]  # fmt: skip
    return [
        part.Table(title, columns, cells, notes),
        part.Table("seconds of an iteration beside Figure 6", columns_beside, beside, why),
    ]


def figures(result: part.Result) -> Iterator[tuple[str, Any]]:
    from matplotlib.figure import Figure

    rows = [row for row in result["rows"] if _timed(row)]
    if not rows:
        return
    figure = Figure(figsize=(9, 4.4), layout="constrained")
    ax = figure.subplots()
    at, ticks, named = 0.0, [], set()
    for row in rows:
        start = at
        for impl in COLOURS:
            if impl not in _timed(row):
                continue
            e, bottom = row["contestants"][impl], 0.0
            for phase, alpha in zip(PHASES, (0.55, 1.0, 0.3), strict=True):
                seconds = e["phases"][phase]["ms"] / 1e3
                label = impl if phase == "backward" and impl not in named else None
                look: dict[str, Any] = {"color": COLOURS[impl], "alpha": alpha, "label": label}
                bars = ax.bar(at, seconds, 0.85, bottom, **look)
                bottom += seconds
            ax.bar_label(bars, [f"{e['ms'] / 1e3:.3g} s\n{e['tflops']:.3g} TFLOP/s"], fontsize=7)
            named.add(impl)
            at += 1
        floor = timing.floor_ms(row["flops"], 0, result["ceilings"]) / 1e3
        ax.hlines(floor, start - 0.5, at - 0.5, color="#888888", linestyle="--", linewidth=0.8)
        ticks.append(((start + at - 1) / 2, ROWS[row["case"]]))
        at += 0.8
    ax.set_xticks(*zip(*ticks, strict=True))
    ax.margins(y=0.15)
    ax.set_ylabel("seconds of an iteration")
    figure.legend(loc="outside lower center", ncols=len(COLOURS), fontsize=8)
    parts = "from below: forward, backward, optimiser; dashed: at the rate of a matrix product"
    title = f"{result['sizes']}, batch 1, {said(result['machine'])}\n{parts}"
    figure.suptitle(title, fontsize=8)
    yield "train", figure


def main(arguments: Sequence[str] | None = None) -> int:
    return part.command("train", sys.modules[__name__], arguments, __doc__)
