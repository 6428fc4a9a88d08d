"""`python -m bench train`: seconds of a training iteration (arXiv 2506.08009, Figure 6) of
Wan2.1-1.3B at 480×832, random weights and latents, by the implementation of self-attention.

All rows learn by DMD from a real and a fake score of the generator's size. DF and TF: a chunk
stands at one of the few steps and sees real ones, as noisy as they are or clean (diffusion, teacher
forcing). SF-n: self forcing that exits at step n. A critic's row generates in the same way, without
gradient, and learns the flow of what came out. An iteration is `Run.update` of the trainer, its
phases are the trainer's own. A clip of 21 latent frames in chunks of 3, batch 1: float32 weights,
bfloat16 arithmetic, AdamW; passes over whole clips recompute every block in the backward pass.

Contestants share weights, optimisers and all that is not self-attention. Each is compared first:
video or loss, the norm of the gradient and the gradients of two layers. Beside them stand the
paper's seconds and those of `sfmodel.training_cost`. Not measured on a GPU yet.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from bench import timing
from bench.figures import BLUE, COLOURS, GREY, legend, new
from bench.harness import Job
from bench.inputs import random_model
from bench.tables import Result, Table, left_out, of_entries, share, timed, value
from sfmodel.blocks import SelfAttention
from sfmodel.config import PRESETS, Preset
from sfmodel.cost import GPUS, clip_chunks
from sfmodel.machine import describe
from sfmodel.ranks import Ranks
from sfmodel.train.batch import Batch
from sfmodel.train.config import TrainConfig
from sfmodel.train.data import Clips
from sfmodel.train.loop import Run
from sfmodel.train.models import Models
from sfmodel.train.objectives import Distillation
from sfmodel.training_cost import Update, figure6, floor_seconds, to_first, training_flops

UPDATES = figure6(4)
GENERATORS = [f"{name} + DMD" for name in ("SF-1", "TF", "DF", "SF-4", "SF-2", "SF-3")]
ROWS = (*GENERATORS, *(f"{name} critic" for name in GENERATORS))  # the most telling first
# The first one is what the others are compared with.
IMPLS: tuple[str, ...] = ("sdpa", "triton", "gluon")
TINY_IMPLS: tuple[str, ...] = ("reference", "sdpa")
FLEX = "flex"  # as the paper has it, where there is a mask; compiles for minutes
ROUNDS = 3
SHADES = {"forward": 0.55, "rollout": 0.4, "score": 0.7, "backward": 1.0, "optimiser": 0.25}
# Published seconds of an iteration on 64 H100: generator, critic.
PAPER = {
    "DF + DMD": (14.17, 5.07),
    "TF + DMD": (18.29, 5.88),
    "SF-1 + DMD": (12.19, 4.72),
    "SF-2 + DMD": (12.98, 5.50),
    "SF-3 + DMD": (13.72, 6.22),
    "SF-4 + DMD": (14.55, 7.01),
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
    """Chooses the implementation of self-attention: in all models, but of FlexAttention in the
    generator alone, as scores have no mask."""
    for model in filter(None, run.models):
        masked = model is run.models.generator
        for module in model.modules():
            if isinstance(module, SelfAttention):
                module.attention_impl = impl if masked or impl != FLEX else IMPLS[0]


def batch_of(run: Run, update: Update) -> Batch:
    return dataclasses.replace(
        Batch.draw(run.context, 0, update.learner), exit_step=update.exit_step
    )


def iteration(run: Run, update: Update) -> timing.Timed:
    """One update: in all, and each phase."""
    learner = update.learner
    ms = timing.clocked(lambda: run.update(learner, batch_of(run, update)), run.ranks.device)
    run.learners[learner].zero_grad()
    return ms


def results(run: Run, update: Update) -> dict[str, Tensor]:
    """Tensors that two contestants are to agree in: the video or the critic's loss, and gradients.
    Of a generator those of a loss drawn at random, since scores of random weights magnify every
    error. Leaves no gradient behind."""
    found: dict[str, Tensor] = {}
    objective, batch = run.objective, batch_of(run, update).load(range(1))
    learner, model = run.learners[update.learner], getattr(run.models, update.learner)
    assert isinstance(objective, Distillation)
    with run.autocast():
        with torch.set_grad_enabled(update.learner == "generator"):
            found["video"], backward = objective.generate(batch)
        if update.learner == "generator":
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


def check(got: dict[str, Tensor], want: dict[str, Tensor], half: bool) -> None:
    """Raises AssertionError unless loss and gradients agree to rounding. half: in bfloat16."""
    for name, theirs in want.items():
        error = float((got[name] - theirs).norm() / theirs.norm())
        allowed = (1e-2 if name == "loss" else 5e-2) if half else 1e-4
        assert error <= allowed, f"{name} is off by {error:.1e}, allowed {allowed:.0e}"  # NaN too


def run(job: Job) -> Result:
    result = job.begin("train", torch.float32 if job.tiny else torch.bfloat16)
    name_of, sizes = preset_of(result)
    impls = TINY_IMPLS if job.tiny else IMPLS
    current: Run | None = None  # of one recipe at a time

    def measured(name: str, impls: Sequence[str]) -> Result:
        nonlocal current
        recipe = UPDATES[name].recipe
        if current is None or current.config.recipe != recipe:
            job.tick(f"{recipe}: random weights")
            current = None
            timing.free(job.device)
            current = new_run(recipe, name_of, job.device, bf16=not job.tiny)
        flops = training_flops(sizes, UPDATES[name])
        row = {"case": name, "flops": flops, "contestants": {}}
        measure(current, row, job, result, impls)
        return row

    for name in ROWS:
        job.add(result, name, functools.partial(measured, name, impls))
    masked = [name for name in ROWS if not UPDATES[name].recipe.startswith("sf")]
    for name in () if job.tiny else masked:  # again, with what compiles for minutes
        job.add(result, name, functools.partial(measured, name, (*impls, FLEX)), FLEX)
    return job.end(result)


def preset_of(result: Result) -> tuple[str, Preset]:
    """The preset that a result is of, by its name."""
    name = "toy" if result["sizes"] == "toy" else "wan-1.3b"
    return name, PRESETS[name]


def measure(run: Run, row: Result, job: Job, result: Result, impls: Sequence[str]) -> None:
    """Checks all contestants of a row, then times those that are right, in turn: once at least, and
    again while there is time. Each round but the last, which ends the row, is saved."""
    name, entries = row["case"], row["contestants"]
    update = UPDATES[name]
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
            return results(run, update)
        finally:
            free()

    def agrees(impl: str) -> None:
        check(want if impl == impls[0] else found_by(impl), want, half=not job.tiny)

    def once(impl: str) -> None:
        job.tick(f"{name}: round {row['rounds']} of {rounds}, {impl}")
        try:
            attend_by(run, impl)
            with timing.peak_memory(job.device) as peak:
                times[impl].append(iteration(run, update))
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
    whole = of_entries(title, result["rows"], columns, notes)
    return [whole, *(_beside_published(result, which) for which in ("generator", "critic"))]


def bars(result: Result) -> dict[str, dict[str, float]]:
    """Seconds of every row of Figure 6, by who says so: the paper, which has a batch of 64 and a
    real score of 14B; arithmetic, for that and for what is timed here, at the attainable rates of
    matrix products; and the fastest contestant, where there is one."""
    wan, (_, here), rate = PRESETS["wan-1.3b"], preset_of(result), result["ceilings"]
    large, h100 = PRESETS["wan-14b"].dit, GPUS["h100"]
    return {
        "published": {
            name + of: seconds
            for name, both in PAPER.items()
            for seconds, of in zip(both, ("", " critic"), strict=True)
        },
        "predicted of it": {
            name: floor_seconds(training_flops(wan, update, large), h100)
            for name, update in UPDATES.items()
        },
        "predicted here": {
            name: training_flops(here, update) / rate["matmul_tflops"] / 1e12
            for name, update in UPDATES.items()
        },
        "measured here": {
            row["case"]: min(e["ms"] for e in timed(row).values()) / 1e3
            for row in result["rows"]
            if timed(row) and row["case"] in UPDATES
        },
    }


def _beside_published(result: Result, learner: str) -> Table:
    """Seconds of one learner's updates and their ratio to SF-1's."""
    found = bars(result)
    lines = []
    for name in (name for name, update in UPDATES.items() if update.learner == learner):
        cells = [name]
        for seconds in found.values():
            ratio = to_first(seconds).get(name)
            cells.append(_said(seconds[name]) if name in seconds else "not run")
            cells.append(f"{ratio:.2f}" if ratio else "")
        lines.append(cells)
    why = ["published: 64 H100, a clip each, real score of 14B; predicted of it: what matrix "
           "products and attention take at an H100's attainable rate, which is an H200's; "
           f"predicted here: the same of {result['sizes']} with a real score of the generator's "
           "size at this device's measured rate; measured here: of the fastest"]  # fmt: skip
    columns = ["", *(head for by in found for head in (f"{by}, s", "to SF-1's"))]
    return Table(f"Figure 6: an update of the {learner}", columns, lines, why)


def figures(result: Result) -> Iterator[tuple[str, Any]]:
    """The phases by implementation, and Figure 6; nothing where nothing was timed."""
    rows = [row for row in result["rows"] if timed(row) and row["case"] in UPDATES]
    if rows:
        yield "train", _phases(result, sorted(rows, key=lambda row: [*UPDATES].index(row["case"])))
        yield "figure6", _figure6(result)


def _phases(result: Result, rows: Sequence[Result]) -> Any:
    """Stacked bars in Figure 6's order."""
    parts = "from below: rollout, scores or forward, backward, optimiser; dashed: the floor"
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
        ticks[(start + at - 1) / 2] = row["case"].replace(" + DMD", "").replace(" ", "\n")
        at += 0.8
    ax.set_xticks([*ticks], [*ticks.values()])
    ax.margins(y=0.15)
    ax.set_ylabel("seconds of an iteration")
    legend(figure, present)
    return figure


def _figure6(result: Result) -> Any:
    """Ratios to SF-1's seconds, generator and critic beside each other: solid what was measured,
    pale what arithmetic says of it."""
    found = bars(result)
    looks = dict(zip(found, (GREY, f"{GREY}70", f"{BLUE}70", BLUE), strict=True))
    title = "an iteration with DMD (Figure 6). Published: 64 H100, real score of 14B. Here: "
    title += f"{result['sizes']}, real score of the generator's size, {describe(result['machine'])}"
    figure, axes = new(title, 13, 4.2, columns=2, sharey=True)
    for ax, learner in zip(axes, ("generator", "critic"), strict=True):
        names = [name for name, update in UPDATES.items() if update.learner == learner]
        for i, (by, seconds) in enumerate(found.items()):
            ratios = {n: r for n, r in to_first(seconds).items() if n in names}
            places = [names.index(name) + 0.21 * (i - 1.5) for name in ratios]
            drawn = ax.bar(places, [*ratios.values()], 0.2, color=looks[by])
            ax.bar_label(drawn, [f"{ratio:.2f}" for ratio in ratios.values()], fontsize=6)
        (first,) = (name for name in names if name.startswith("SF-1"))
        of_first = ", ".join(_said(s[first]) for s in found.values() if first in s)
        ax.set_title(f"{learner}; seconds of SF-1: {of_first}", fontsize=8)
        ax.set_xticks(range(len(names)), [name.split()[0] for name in names])
    axes[0].set_ylabel("seconds / SF-1's")
    legend(figure, looks)
    return figure


def _said(seconds: float) -> str:
    return f"{seconds:.2f}" if seconds >= 1 else f"{seconds:.3g}"
