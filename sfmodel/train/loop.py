"""The training loop: data, optimiser, average of the weights, log, checkpoints, exact resume.

Everything random in step n comes from a generator seeded by (seed, n), so that a run that is
stopped and resumed is bit for bit the run that was not.
"""

from __future__ import annotations

import itertools
import json
import math
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor, nn

from sfkernels import BlockLayout
from sfmodel import checkpoint
from sfmodel.config import PRESETS
from sfmodel.dit import DiT
from sfmodel.files import atomic
from sfmodel.schedule import FlowSchedule
from sfmodel.text import ToyTextEncoder
from sfmodel.toy_vae import ToyVAE
from sfmodel.train.objectives import teacher_forcing_loss


@dataclass(frozen=True)
class TrainConfig:
    """One teacher-forcing run on the toy world. Every step draws one of `frames`, of `chunks` and
    of `windows`: one model streams at any of them, and short clips, which are many to a step, teach
    the first frames, which have nothing but the prompt to follow."""

    preset: str = "toy"  # sizes of the model
    output: Path = Path("out/train-toy")  # folder of the run
    steps: int = 800  # optimiser steps
    batch: int = 512  # latent frames a step
    frames: tuple[int, ...] = (1, 4, 16)  # latent frames of a clip
    chunks: tuple[int, ...] = (1, 3)  # latent frames generated at a time
    windows: tuple[int, ...] = (6, 9, 15)  # latent frames that a chunk sees, its own included
    lr: float = 2e-3  # peak learning rate
    warmup: int = 50  # steps of linear warm-up; the last 60% of all steps fall linearly to 2%
    ema: float = 0.998  # decay of the averaged weights, which are what generates
    clip: float = 1.0  # largest norm of the gradient
    weight_decay: float = 0.01  # of the blocks' matrices
    context_noise: float = 0.4  # largest noise on the clean context, in the latents' units
    fade: float = 0.5  # largest share of the light that is missing where the model looks
    drop_text: float = 0.1  # share of clips trained without a prompt
    drop_word: float = 0.15  # share of a prompt's words left out
    bf16: bool = False  # matrix products in bfloat16
    seed: int = 0  # of weights, data and noise
    threads: int = 0  # CPU threads; 0 is PyTorch's choice
    log_every: int = 20  # steps
    save_every: int = 200  # steps

    def __post_init__(self) -> None:
        if self.preset != "toy":
            raise ValueError(f"preset={self.preset!r}: teacher forcing here trains 'toy'")
        for name in ("steps", "batch", "log_every", "save_every"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)}: must be at least 1")
        if self.batch < max(self.frames):
            raise ValueError(f"batch={self.batch}: must hold a clip of {max(self.frames)} frames")
        first = PRESETS[self.preset].first
        for frames, chunk, window in itertools.product(self.frames, self.chunks, self.windows):
            BlockLayout.causal(frames, chunk, 1, first=first, window=window)


class Run:
    """A run's model, optimiser and folder."""

    def __init__(self, config: TrainConfig, device: torch.device | str | None = None) -> None:
        self.config = config
        self.preset = PRESETS[config.preset]
        self.device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        torch.manual_seed(config.seed)
        self.model = DiT(self.preset.dit).to(self.device)
        self.average = DiT(self.preset.dit).to(self.device).requires_grad_(False)
        self.average.load_state_dict(self.model.state_dict())
        self.optimizers = _optimizers(self.model, config)
        self.schedule = FlowSchedule(self.preset.shift)
        self.codec, self.text = ToyVAE().to(self.device), ToyTextEncoder()
        black = torch.full((1, 1, 3, 8, 8), -1.0, device=self.device)
        self.dark, _ = self.codec.encode_chunk(black)
        self.step = 0
        self.records: list[dict[str, float]] = []

    def train_step(self) -> float:
        """One optimiser step; returns the loss. Raises FloatingPointError if it is not finite."""
        config = self.config
        generator = torch.Generator().manual_seed(config.seed * 1_000_003 + self.step)

        def draw(*shape: int) -> Tensor:
            return torch.rand(shape, generator=generator)

        def choose(options: tuple[int, ...]) -> int:
            return options[int(draw(1) * len(options))]

        frames, chunk, window = map(choose, (config.frames, config.chunks, config.windows))
        clips = config.batch // frames
        clean, _, sentences = self.codec.sample_latents(
            clips, frames, generator, drop=config.drop_word, empty=config.drop_text
        )
        text = self.text(sentences, self.device)
        layout = BlockLayout.causal(
            frames,
            chunk,
            math.prod(self.preset.grid),
            first=self.preset.first,
            window=window,
            teacher_forcing=True,
        )
        sizes = torch.tensor(layout.chunks)
        sigma = self.schedule.shifted(draw(clips, len(sizes)).clamp(min=1e-3))
        sigma = sigma.repeat_interleave(sizes, 1).to(self.device)
        noise, smear = (
            torch.randn(clean.shape, generator=generator).to(self.device) for _ in range(2)
        )
        level = config.context_noise * draw(clips, 1, 1, 1, 1).to(self.device)
        # The x0 of a few large steps is a mean, which is darker than any sample. A model that has
        # seen such pictures, in its context and under the noise, brings the light back.
        faded_now, faded_past = (
            clean + config.fade * draw(clips, 1, 1, 1, 1).to(self.device) * (self.dark - clean)
            for _ in range(2)
        )
        with torch.autocast(self.device.type, torch.bfloat16, enabled=config.bf16):
            loss = teacher_forcing_loss(
                self.model,
                clean,
                faded_past + level * smear,
                noise,
                sigma,
                text,
                layout,
                seen_BFCHW=faded_now,
            )
        if not torch.isfinite(loss):
            raise FloatingPointError(f"loss is {loss.item()} at step {self.step}")
        for optimizer in self.optimizers:
            optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), config.clip)
        rate = config.lr * _rate(self.step, config)
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = rate
            optimizer.step()
        self.step += 1
        decay = min(config.ema, (1 + self.step) / (10 + self.step))
        with torch.no_grad():
            for average, value in zip(
                self.average.parameters(), self.model.parameters(), strict=True
            ):
                average.lerp_(value, 1 - decay)
        return loss.item()

    def save(self) -> None:
        """Writes everything a resumed run needs, atomically, and the averaged weights."""
        folder = self.config.output
        state = {
            "step": self.step,
            "config": _plain(self.config),
            "model": self.model.state_dict(),
            "average": self.average.state_dict(),
            "optimizers": [o.state_dict() for o in self.optimizers],
            "records": self.records,
        }
        with atomic(folder / "run.pt") as temporary:
            torch.save(state, temporary)
        checkpoint.save(self.average, folder / "model.safetensors", self.preset.dit, step=self.step)
        with atomic(folder / "log.jsonl") as temporary:
            temporary.write_text("".join(json.dumps(r) + "\n" for r in self.records))

    def resume(self) -> None:
        """Continues from the run's folder. Raises ValueError where there is no whole checkpoint or
        it belongs to a run of other settings."""
        path = self.config.output / "run.pt"
        if not path.is_file():
            raise ValueError(f"{self.config.output}: holds no run to resume")
        try:
            state = torch.load(path, map_location=self.device, weights_only=True)
        except Exception as error:
            raise ValueError(f"{path}: not a whole checkpoint ({type(error).__name__})") from None
        mine = _plain(self.config)
        free = {"steps", "output", "threads", "log_every", "save_every"}
        other = [k for k in mine if k not in free and state["config"].get(k) != mine[k]]
        if other:
            was = ", ".join(f"{k}={state['config'].get(k)!r}" for k in other)
            raise ValueError(f"{path}: is of a run with {was}: resume with the same settings")
        self.model.load_state_dict(state["model"])
        self.average.load_state_dict(state["average"])
        for optimizer, saved in zip(self.optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
        self.step, self.records = state["step"], state["records"]


def train(config: TrainConfig, *, resume: bool = False) -> Path:
    """Runs to `config.steps` with progress, and returns the path of the averaged weights. Ctrl-C
    ends the step and saves first. Raises ValueError where the folder holds another run and
    `resume` is not set."""
    if config.threads:
        torch.set_num_threads(config.threads)
    if not resume and (config.output / "run.pt").exists():
        raise ValueError(f"{config.output}: holds a run already: resume it or name another folder")
    config.output.mkdir(parents=True, exist_ok=True)
    run = Run(config)
    if resume:
        run.resume()
    console = Console()
    columns = (TextColumn("training"), BarColumn(), TextColumn("{task.completed}/{task.total}"))
    more = (TextColumn("loss {task.fields[loss]:.4f}"), TimeRemainingColumn())
    progress = Progress(*columns, *more, console=console, disable=not console.is_terminal)
    with progress, _held_interrupts() as interrupts:
        task = progress.add_task("", total=config.steps, completed=run.step, loss=math.nan)
        began, losses = time.perf_counter(), []
        while run.step < config.steps:
            losses.append(run.train_step())
            if run.step % config.log_every == 0 or run.step == config.steps:
                seconds = (time.perf_counter() - began) / len(losses)
                loss = sum(losses) / len(losses)
                record = {"step": run.step, "loss": loss, "seconds_per_step": seconds}
                run.records.append(record)
                if console.is_terminal:
                    progress.update(task, completed=run.step, loss=loss)
                else:
                    left = (config.steps - run.step) * seconds / 60
                    print(
                        f"step {run.step}/{config.steps}  loss {loss:.4f}  "
                        f"{seconds:.2f} s/step  {left:.0f} min left",
                        flush=True,
                    )
                began, losses = time.perf_counter(), []
            if run.step % config.save_every == 0:
                run.save()
            if interrupts:
                run.save()
                console.print(f"stopped at step {run.step}; saved in {config.output}")
                raise KeyboardInterrupt
    run.save()
    plot_loss(run.records, config.output / "loss.png")
    return config.output / "model.safetensors"


@contextmanager
def _held_interrupts() -> Iterator[list[int]]:
    """Ctrl-C in the body is only noted, so that it never falls between two halves of a step and
    what is then saved is whole. A second one stops at once, with the last checkpoint as it is."""
    noted: list[int] = []

    def note(number: int, _: object) -> None:
        if noted:
            raise KeyboardInterrupt
        noted.append(number)

    before = signal.signal(signal.SIGINT, note)
    try:
        yield noted
    finally:
        signal.signal(signal.SIGINT, before)


def plot_loss(records: list[dict[str, float]], path: Path) -> None:
    """The loss curve of a run as a PNG."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, ax = pyplot.subplots(figsize=(6, 3.5), layout="constrained")
    ax.plot([r["step"] for r in records], [r["loss"] for r in records], linewidth=1.2)
    ax.set_yscale("log")
    ax.set_xlabel("step")
    ax.set_ylabel("loss")
    ax.set_title("teacher forcing: flow-matching loss")
    ax.grid(alpha=0.3, which="both")
    with atomic(path) as temporary:
        figure.savefig(temporary, format="png", dpi=120)
    pyplot.close(figure)


def _optimizers(model: DiT, config: TrainConfig) -> list[torch.optim.Optimizer]:
    """Muon for the matrices of the blocks, AdamW for everything else."""
    matrices = [p for p in model.blocks.parameters() if p.dim() == 2]
    chosen = {id(p) for p in matrices}
    others = [p for p in model.parameters() if id(p) not in chosen]
    return [
        torch.optim.Muon(
            matrices,
            lr=config.lr,
            weight_decay=config.weight_decay,
            adjust_lr_fn="match_rms_adamw",
        ),
        torch.optim.AdamW(others, lr=config.lr, betas=(0.9, 0.95), weight_decay=0.0),
    ]


def _rate(step: int, config: TrainConfig) -> float:
    """Share of the peak learning rate at a step."""
    fall = min(1.0, (config.steps - step) / (0.6 * config.steps))
    return min(1.0, (step + 1) / config.warmup) * (0.02 + 0.98 * fall)


def _plain(config: TrainConfig) -> dict[str, Any]:
    return json.loads(json.dumps(asdict(config), default=str))
