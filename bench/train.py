"""`python -m bench train`: seconds of a training iteration (arXiv 2506.08009, Figure 6) of
Wan2.1-1.3B at 480×832, random weights and latents, by the implementation of self-attention.

A clip of 21 latent frames in chunks of 3, batch 1: float32 weights, bfloat16 arithmetic, AdamW.
TF: teacher forcing, [clean ‖ noisy], and DF: diffusion forcing, of the flow-matching loss, every
block recomputed in the backward pass. SF-n: self forcing that exits at step n, with DMD by a real
and a fake score of the generator's size; its critic: the same rollout and the flow-matching loss of
the fake score. An iteration is `Run.update` of the trainer, its phases are the trainer's own.

Contestants share weights, optimisers and all that is not self-attention. Each is compared first:
loss or video, the norm of the gradient and the gradients of two layers. Not measured on a GPU yet.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from bench import timing
from bench.figures import COLOURS, GREY, legend, new
from bench.harness import Job
from bench.inputs import random_model
from bench.tables import Result, Table, left_out, of_entries, share, timed, value
from sfmodel.blocks import SelfAttention
from sfmodel.config import PRESETS, Preset
from sfmodel.cost import clip_chunks, training_flops
from sfmodel.machine import describe
from sfmodel.ranks import Ranks
from sfmodel.train.batch import Batch
from sfmodel.train.config import TrainConfig
from sfmodel.train.data import Clips
from sfmodel.train.loop import Run
from sfmodel.train.models import Models
from sfmodel.train.objectives import Distillation

IN_FULL = {"TF": "teacher forcing", "DF": "diffusion forcing"}
GENERATORS = ("TF", "SF-4", "DF", "SF-1", "SF-2", "SF-3")  # the most telling first
ROWS = (*GENERATORS, *(f"{name} critic" for name in ("SF-4", "SF-1", "SF-2", "SF-3")))
# The first one is what the others are compared with.
IMPLS: tuple[str, ...] = ("sdpa", "triton", "gluon")
TINY_IMPLS: tuple[str, ...] = ("reference", "sdpa")
ROUNDS = 3
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
QKV = "blocks.{}.self_attn.qkv.weight"


class OneClip:
    """A source of training data that gives one clip of random latents and embeddings, always."""

    has_latents = True

    def __init__(self, preset: Preset, frames: int) -> None:
        size = frames, preset.dit.channels, preset.height, preset.width
        text = torch.randn(1, preset.dit.text_len, preset.dit.text_dim)
        self.clips = Clips(torch.randn(1, *size), text, [""])
        self.skipped: dict[str, str] = {}

    def draw(self, *_: Any, **__: Any) -> Clips:
        return self.clips


def new_run(recipe: str, preset: str, device: torch.device, bf16: bool) -> Run:
    """The trainer of random weights, whose optimisers have their moments."""
    torch.manual_seed(0)
    sizes = PRESETS[preset]
    frames = sum(clip_chunks(sizes))
    config = TrainConfig(
        recipe, preset, frames=(frames,), chunks=(sizes.chunk,), windows=(frames,), batch=1,
        ema=0.0, bf16=bf16, recompute=True,
    )  # fmt: skip
    models = Models(random_model(sizes.dit, device))
    if config.objective.needs_critic:
        real, critic = (random_model(sizes.dit, device) for _ in range(2))
        real = real.to(torch.bfloat16 if bf16 else torch.float32).requires_grad_(False)
        models = Models(models.generator, real, critic)
    run = Run(
        config, Ranks(0, 1, device), source=OneClip(sizes, frames), models=models,
        negative=torch.zeros(1, 1, sizes.dit.text_dim),
    )  # fmt: skip
    for learner in run.learners.values():
        for parameter in learner.parameters:
            parameter.grad = torch.zeros_like(parameter)
        learner.step(0.0)  # makes room for the moments, which no iteration then pays for
        learner.zero_grad()
    return run


def attend_by(run: Run, impl: str) -> None:
    """Chooses the implementation of self-attention in all models."""
    for model in filter(None, run.models):
        for module in model.modules():
            if isinstance(module, SelfAttention):
                module.attention_impl = impl


def batch_of(run: Run, row: str) -> Batch:
    batch = Batch.draw(run.context, 0, row)
    return batch if row in IN_FULL else dataclasses.replace(batch, exit_step=exit_step_of(row))


def iteration(run: Run, row: str) -> timing.Timed:
    """One update: in all, and each phase."""
    learner = learner_of(row)
    ms = timing.clocked(lambda: run.update(learner, batch_of(run, row)), run.ranks.device)
    run.learners[learner].zero_grad()
    return ms


def results(run: Run, row: str) -> dict[str, Tensor]:
    """Tensors that two contestants are to agree in: the loss or the video, and gradients. That of a
    rollout is of a loss drawn at random, since scores of random weights magnify every error.
    Leaves no gradient behind."""
    found: dict[str, Tensor] = {}
    objective, batch = run.objective, batch_of(run, row).load(range(1))
    learner, model = run.learners[learner_of(row)], getattr(run.models, learner_of(row))
    with run.autocast():
        if not isinstance(objective, Distillation):
            found["loss"] = objective.generator_loss(batch)
            found["loss"].backward()
        else:
            found["video"], backward = objective.generate(batch)
            if model is run.models.generator:
                backward(batch.clean_BFCHW)
            else:
                found["loss"] = objective.critic_loss(batch, batch.clean_BFCHW)
                found["loss"].backward()
    grads = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    found["norm of the gradient"] = torch.nn.utils.get_total_norm([*grads.values()])
    for i in (0, len(model.blocks) - 1):
        found[f"gradient of {QKV.format(i)}"] = grads[QKV.format(i)]
    learner.zero_grad()
    return {name: tensor.detach() for name, tensor in found.items()}


def learner_of(row: str) -> str:
    return "critic" if row.endswith("critic") else "generator"


def exit_step_of(row: str) -> int:
    """The index of the few step at which "SF-n" or "SF-n critic" exits."""
    return int(row[len("SF-")]) - 1


def check(got: dict[str, Tensor], want: dict[str, Tensor], half: bool) -> None:
    """Raises AssertionError unless loss and gradients agree to rounding. half: in bfloat16."""
    for name, theirs in want.items():
        error = float((got[name] - theirs).norm() / theirs.norm())
        allowed = (1e-2 if name == "loss" else 5e-2) if half else 1e-4
        assert error <= allowed, f"{name} is off by {error:.1e}, allowed {allowed:.0e}"  # NaN too


def run(job: Job) -> Result:
    result = job.begin("train", torch.float32 if job.tiny else torch.bfloat16)
    preset = "toy" if job.tiny else "wan-1.3b"
    impls = TINY_IMPLS if job.tiny else IMPLS
    current: Run | None = None  # of one recipe at a time

    def measured(name: str, impls: Sequence[str]) -> Result:
        nonlocal current
        recipe = name.lower() if name in IN_FULL else "sf+dmd"
        if current is None or current.config.recipe != recipe:
            job.tick(f"{recipe}: random weights")
            current = None
            timing.free(job.device)
            current = new_run(recipe, preset, job.device, bf16=not job.tiny)
        row = {"case": name, "flops": flops(PRESETS[preset], name), "contestants": {}}
        measure(current, row, job, result, impls)
        return row

    for name in ROWS:
        job.add(result, name, functools.partial(measured, name, impls))
    for name in () if job.tiny else IN_FULL:  # again, with what compiles for minutes
        job.add(result, name, functools.partial(measured, name, (*impls, "flex")), "flex")
    return job.end(result)


def flops(preset: Preset, row: str) -> float:
    if row in IN_FULL:
        return training_flops(preset)[IN_FULL[row]]
    found = training_flops(preset, exit_step=exit_step_of(row))
    return found[f"self forcing, {learner_of(row)}"]


def measure(run: Run, row: Result, job: Job, result: Result, impls: Sequence[str]) -> None:
    """Checks all contestants of a row, then times those that are right, in turn: once at least, and
    again while there is time. Each round but the last, which ends the row, is saved."""
    name, entries = row["case"], row["contestants"]
    times: dict[str, list[timing.Timed]] = {impl: [] for impl in impls}
    rounds, row["rounds"] = min(job.rounds, ROUNDS), 0

    def free() -> None:
        for learner in run.learners.values():
            learner.zero_grad()
        timing.free(job.device)

    def found_by(impl: str) -> dict[str, Tensor]:
        job.tick(f"{name}: is {impl} right?")
        try:
            attend_by(run, impl)
            return results(run, name)
        finally:
            free()

    def agrees(impl: str) -> None:
        check(want if impl == impls[0] else found_by(impl), want, half=not job.tiny)

    def once(impl: str) -> None:
        job.tick(f"{name}: round {row['rounds']} of {rounds}, {impl}")
        try:
            attend_by(run, impl)
            with timing.peak_memory(job.device) as peak:
                times[impl].append(iteration(run, name))
        except Exception as error:
            entries[impl] = {"failed": timing.reason(error)}
            free()
            raise
        whole = timing.summary([whole for whole, _ in times[impl]])
        whole.peak_mib = peak[0]
        each_ms = {p: [phases[p] for _, phases in times[impl]] for p in times[impl][0][1]}
        phases = {p: timing.middle_and_tail(ms) for p, ms in each_ms.items()}
        tflops = row["flops"] / whole.p50 / 1e9
        entries[impl] = timing.entry(whole, flops=row["flops"], tflops=tflops, phases=phases)

    def goes_on(i: int) -> bool:
        if i:
            others = [other for other in result["rows"] if other["case"] != name]
            job.save(result | {"rows": [*others, row]})
        more = i == 0 or job.left > 0
        row["rounds"] += more
        return more

    want = found_by(impls[0])
    right = timing.right({impl: functools.partial(agrees, impl) for impl in impls}, entries)
    timing.in_turn({impl: functools.partial(once, impl) for impl in right}, rounds, goes_on)


def tables(result: Result) -> list[Table]:
    def phases(_: Result, e: Result) -> str:
        return ", ".join(f"{name} {one['ms'] / 1e3:.3g}" for name, one in e["phases"].items())

    columns = {
        "s": value("ms", "{:.3g}".format, 1e-3),
        "p99": value("p99_ms", "{:.3g}".format, 1e-3),
        "of which": phases,
        "peak GiB": value("peak_mib", "{:.1f}".format, 1 / 1024),
        "TFLOP/s": value("tflops", "{:.3g}".format),
        "% of product": share("tflops", result["ceilings"]["matmul_tflops"]),
    }
    title = "training iteration by the implementation of self-attention: "
    title += f"{result['sizes']}, batch 1, {describe(result['machine'])}"
    notes = ["s: of a whole update, what lies between its phases included",
             "peak GiB: beside weights and AdamW's averages; TFLOP/s: of what the pattern needs, "
             "what is recomputed included", *left_out(result)]  # fmt: skip
    return [of_entries(title, result["rows"], columns, notes), _beside_published(result["rows"])]


def _beside_published(rows: Sequence[Result]) -> Table:
    """Seconds and their ratio to SF-1's, published and of the fastest here."""
    fastest = {
        row["case"]: min((e["ms"] / 1e3, impl) for impl, e in timed(row).items())
        for row in filter(timed, rows)
    }
    lines = []
    for name, published in PAPER.items():
        cells = [name]
        for seconds, first, which in zip(published, PAPER["SF-1"], ("", " critic"), strict=True):
            cells += [f"{seconds}", f"{seconds / first:.2f}"]
            if found := fastest.get(name + which):
                ours, impl = found
                base, _ = fastest.get(f"SF-1{which}", (None, ""))
                cells += [f"{ours:.3g} ({impl})", f"{ours / base:.2f}" if base else ""]
            else:
                cells += ["not run" if name + which in ROWS else "no critic here", ""]
        lines.append(cells)
    heads = ["published", "/ SF-1's", "fastest here", "/ SF-1's"]
    columns = ["", *(f"{which}: {head}" for which in ("generator", "critic") for head in heads)]
    why = ["published: 64 H100, a batch of 64, DMD with a real score of 14B in all rows; here one "
           "device, one clip, a real score of the generator's size, and in DF and TF the flow loss "
           "alone: at most ratios between SF rows compare"]  # fmt: skip
    return Table("seconds of an iteration beside Figure 6", columns, lines, why)


def figures(result: Result) -> Iterator[tuple[str, Any]]:
    """Stacked bars of the phases, in Figure 6's order, the critics after the generators."""
    order = [*PAPER, *(f"{name} critic" for name in PAPER)]
    rows = sorted(filter(timed, result["rows"]), key=lambda row: order.index(row["case"]))
    if not rows:
        return
    parts = "from below: forward (in SF: rollout, scores), backward, optimiser; dashed: the floor"
    title = f"{result['sizes']}, batch 1, {describe(result['machine'])}\n{parts}"
    figure, (ax,) = new(title, 4 + 0.4 * sum(len(timed(row)) for row in rows), 4.6)
    at, ticks = 0.0, {}
    present = {impl: COLOURS[impl] for impl in COLOURS if any(impl in timed(row) for row in rows)}
    for row in rows:
        start, entries = at, timed(row)
        for impl in (name for name in present if name in entries):
            bottom = 0.0
            for name, one in entries[impl]["phases"].items():
                seconds, look = one["ms"] / 1e3, {"color": COLOURS[impl], "alpha": SHADES[name]}
                bars = ax.bar(at, seconds, 0.85, bottom, **look)
                bottom += seconds
            ax.bar_label(bars, [f"{entries[impl]['ms'] / 1e3:.3g}"], fontsize=7)
            at += 1
        floor = timing.floor_ms(row["flops"], 0, result["ceilings"]) / 1e3
        ax.hlines(floor, start - 0.5, at - 0.5, color=GREY, linestyle="--", linewidth=0.8)
        ticks[(start + at - 1) / 2] = row["case"].replace(" ", "\n")
        at += 0.8
    ax.set_xticks([*ticks], [*ticks.values()])
    ax.margins(y=0.15)
    ax.set_ylabel("seconds of an iteration")
    legend(figure, present)
    yield "train", figure
