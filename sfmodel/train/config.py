"""Settings of a training run: one dataclass, saved with the run, and the recipes to choose from."""

from __future__ import annotations

import functools
import itertools
import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

from sfkernels import BlockLayout
from sfkernels.dispatch import IMPLS
from sfmodel.config import PRESETS, Preset, check_seed
from sfmodel.dit import DiT
from sfmodel.files import check_writable
from sfmodel.ranks import PATIENCE
from sfmodel.schedule import FlowSchedule
from sfmodel.train.objectives import Objective
from sfmodel.train.objectives.consistency import Consistency
from sfmodel.train.objectives.dmd import DMD
from sfmodel.train.objectives.flow import FlowMatching
from sfmodel.train.objectives.gan import GAN
from sfmodel.train.objectives.ode import ODERegression
from sfmodel.train.objectives.sid import SiD
from sfmodel.weights import checkpoint

# The least and the most that settings may be.
_RANGES: dict[tuple[float, float], tuple[str, ...]] = {
    (1, math.inf): (
        "frames", "chunks", "windows", "steps", "batch", "log_every", "save_every", "pairs",
        "teacher_steps", "critic_steps", "gradient_frames",
    ),
    (0, math.inf): (
        "sink", "micro_batch", "warmup", "ema_start", "critic_warmup", "shard", "sample_every",
        "weight_decay", "lr", "lr_critic", "clip", "min_sigma", "context_noise", "gan_penalty",
    ),
    (0, 1024): ("threads",),
    (0, 1): ("drop_text", "drop_word", "decay_fraction", "darken", "ema", "betas"),
    (-1e9, 1e9): ("guidance_scale", "gan_sigma"),
}  # fmt: skip

# Settings that runs of version 0.1.0 have saved under other names.
_RENAMED = {"fall": "decay_fraction", "fade": "darken"}

RECIPES: dict[str, Objective] = {
    "bidirectional": FlowMatching("whole"),
    "tf": FlowMatching("clean"),
    "df": FlowMatching("noisy"),
    "ode": ODERegression("either"),
    "consistency": Consistency("clean"),  # Causal Forcing++ (arXiv 2605.15141)
    "tf+dmd": DMD("clean"),
    "tf+sid": SiD("clean"),
    "tf+gan": GAN("clean"),
    "df+dmd": DMD("noisy"),  # CausVid (arXiv 2412.07772)
    "df+sid": SiD("noisy"),
    "df+gan": GAN("noisy"),
    "sf+dmd": DMD("own"),
    "sf+sid": SiD("own"),
    "sf+gan": GAN("own"),
}


@dataclass(frozen=True)
class TrainConfig:
    """Settings of one run. Every step draws one of `frames`, of `chunks` and of `windows`, the same
    for all ranks, so that one model streams at any of them."""

    recipe: str = "tf"  # what is learned, and what a chunk sees meanwhile: see RECIPES
    preset: str = "toy"  # sizes of the generator
    output: Path = Path("out/train")  # folder of the run
    data: Path | None = None  # clips or prompts; None is the toy world
    init: Path | None = None  # weights that the generator starts from; None draws them
    teacher: Path | None = None  # weights of the real score, which also makes ODE trajectories
    teacher_preset: str | None = None  # sizes of the real score, where other than the generator's
    critic: Path | None = None  # weights that the critic starts from; None takes the teacher's

    # clips
    frames: tuple[int, ...] = (21,)  # latent frames of a clip
    chunks: tuple[int, ...] = (3,)  # latent frames generated at a time
    windows: tuple[int, ...] = (21,)  # latent frames that a chunk sees, its own included
    sink: int = 0  # first latent frames that are always seen
    denoising_steps: tuple[int, ...] | None = None  # of a chunk, falling; None: the preset's
    hide_first: bool = False  # the last chunk does not see the first (paper, section 3.4)
    drop_text: float = 0.1  # share of clips of the toy world without a prompt
    drop_word: float = 0.15  # share of a prompt's words left out in the toy world

    # optimisation
    steps: int = 120  # updates of the generator
    batch: int = 64  # clips an update, over all ranks; shorter ones of `frames` come in proportion
    micro_batch: int = 0  # clips at a time on one rank; 0 is all of them at once
    optimizer: Literal["adamw", "muon"] = "adamw"  # muon: for the matrices of the blocks
    lr: float = 2e-6  # peak learning rate of the generator
    warmup: int = 0  # updates of linear warm-up
    decay_fraction: float = 0.0  # share of all updates, at the end: the rate falls linearly to 2%
    betas: tuple[float, float] = (0.0, 0.999)  # of AdamW
    weight_decay: float = 0.01  # of matrices
    clip: float = 10.0  # largest norm of the gradient
    ema: float = 0.99  # decay of the averaged weights, which are what generates; 0: no average
    ema_start: int = 40  # updates before the average begins

    # flow matching
    min_sigma: float | None = None  # counts x0's error as 1/max(σ, this)²; None: Wan's bell
    context_noise: float = 0.0  # TF: largest noise on the clean context, in the latents' units
    darken: float = 0.0  # TF: largest share of the light that is missing where the model looks

    # ODE regression and consistency distillation
    pairs: int = 3072  # trajectories of the teacher
    teacher_steps: int = 20  # Euler steps of a trajectory, which consistency has two points of
    causal_teacher: bool = False  # consistency: the teacher sees clean chunks, as one of tf does

    # distillation
    critic_steps: int = 5  # updates of the critic before each one of the generator
    critic_warmup: int = 0  # further ones before the first
    lr_critic: float = 4e-7
    negative: Path | None = None  # a prompt, which guidance leads away from; None: no words
    guidance_scale: float = 4.0  # of the real score: unprompted + this · (prompted − unprompted)
    gradient_frames: int | None = None  # SF: only the last latent frames take a gradient; None: all
    renoise_context: bool = True  # SF: clean context is noised at the schedule's smallest σ
    gan_penalty: float = 30.0  # λ of R1 and R2
    gan_sigma: float = 0.05  # size of the perturbation that they are measured by

    # execution
    bf16: bool = False  # matrix products in bfloat16, weights and their averages in float32
    recompute: bool = False  # activations again in the backward pass, instead of keeping them
    compile: bool = False  # torch.compile of the models that see whole clips
    impl: str = "auto"  # of the sfkernels ops
    attention_impl: str = "auto"  # of the attention ops
    shard: int = 0  # ranks that share one copy of the weights; 0 is all of them
    threads: int = 0  # CPU threads; 0 is PyTorch's choice
    patience: float = PATIENCE  # seconds that a rank waits for another one
    seed: int = 0  # of weights, data and noise

    # output
    log_every: int = 1  # updates
    save_every: int = 20  # updates
    sample_every: int = 0  # updates between contact sheets of generated videos; 0: at the end only

    def __post_init__(self) -> None:
        if self.recipe not in RECIPES:
            raise ValueError(f"recipe={self.recipe!r}: must be one of {', '.join(RECIPES)}")
        for name in ("preset", "teacher_preset"):
            value = getattr(self, name)
            if value not in PRESETS and not (value is None and name == "teacher_preset"):
                raise ValueError(f"{name}={value!r}: must be one of {', '.join(PRESETS)}")
        for (low, high), names in _RANGES.items():
            for name in names:
                value = getattr(self, name)
                for each in value if isinstance(value, tuple) else (value,):
                    if each is not None and not low <= each <= high:
                        limit = f" and at most {high}" if high < math.inf else ""
                        raise ValueError(f"{name}={value}: must be at least {low}{limit}")
        for name in ("frames", "chunks", "windows"):
            if not getattr(self, name):
                raise ValueError(f"{name}: must be at least one number")
        for name in ("impl", "attention_impl"):
            if getattr(self, name) not in IMPLS:
                known = ", ".join(IMPLS)
                raise ValueError(f"{name}={getattr(self, name)!r}: must be one of {known}")
        if self.denoising_steps is not None:
            try:
                FlowSchedule().warp(self.denoising_steps)
            except ValueError as error:
                raise ValueError(f"denoising_{error}") from None
        check_seed(self.seed, videos=1024)  # more than samples show
        if not 0 < self.patience < 10**8:
            raise ValueError(f"patience={self.patience}: must be seconds, more than 0")
        if self.objective.needs_trajectories and len(self.frames) > 1:
            raise ValueError(f"frames={self.frames}: the teacher's trajectories have one length")
        if self.objective.context == "whole" and self.hide_first:
            raise ValueError("hide_first: a bidirectional model has no first chunk")
        for frames, chunk, window in itertools.product(self.frames, self.chunks, self.windows):
            self.layout(frames, chunk, window)

    def check_files(self) -> None:
        """Raises ValueError or OSError for weights that are missing or not of these models, and for
        a folder that cannot be written. Reads no weights and leaves nothing."""
        objective, size = self.objective, self.teacher_preset or self.preset
        if objective.needs_teacher and self.teacher is None:
            raise ValueError(f"recipe={self.recipe!r} learns from a teacher: give its weights")
        mine = self.teacher is not None and size == self.preset
        if objective.needs_critic and self.critic is None and not mine:
            raise ValueError(
                f"recipe={self.recipe!r}: a critic of {self.preset!r} cannot start from "
                f"teacher={self.teacher} of {size!r}: give critic"
            )
        check_writable(self.output / "config.json")
        own, real = self.model.dit, PRESETS[size].dit
        critic = self.critic or self.teacher if objective.needs_critic else None
        teacher = self.teacher if objective.needs_teacher else None
        for sizes, weights in ((own, self.init), (real, teacher), (own, critic)):
            if weights is not None:
                checkpoint.check(functools.partial(DiT, sizes), weights)

    @property
    def objective(self) -> Objective:
        return RECIPES[self.recipe]

    @property
    def model(self) -> Preset:
        """The generator's sizes, and how it streams once it is trained: in these steps, in the last
        of `chunks` and the largest of `windows`."""
        preset = PRESETS[self.preset]
        return replace(
            preset, steps=self.denoising_steps or preset.steps, chunk=self.chunks[-1],
            window=max(self.windows), sink=self.sink,
        )  # fmt: skip

    @property
    def weights(self) -> Path:
        """The file of the run's averaged weights."""
        return self.output / "model.safetensors"

    def layout(
        self, frames: int, chunk: int, window: int, teacher_forcing: bool = False
    ) -> BlockLayout:
        """Block mask of a clip. Raises ValueError for sizes that do not fit together."""
        tokens = math.prod(self.model.grid)
        if self.objective.context == "whole":
            return BlockLayout((frames,), tokens)
        return BlockLayout.causal(
            frames,
            chunk,
            tokens,
            first=self.model.first,
            window=window,
            sink=self.sink,
            teacher_forcing=teacher_forcing,
            hide_first=self.hide_first and frames > (self.model.first or chunk),
        )

    def clips(self, frames: int) -> int:
        """Number of clips of so many latent frames in one update."""
        return self.batch * max(self.frames) // frames

    def plain(self) -> dict[str, Any]:
        """The settings as JSON has them."""
        return json.loads(json.dumps(asdict(self), default=str))

    def differing(self, saved: Mapping[str, Any]) -> dict[str, Any]:
        """The settings of a saved run that decide otherwise what is computed."""
        mine, saved = self.plain(), {_RENAMED.get(name, name): saved[name] for name in saved}
        if "guidance" in saved:  # of 0.1.0: x0 + guidance · (x0 − x0 of the unprompted)
            saved["guidance_scale"] = saved["guidance"] + 1
        free = {"output", "steps", "threads", "shard", "micro_batch", "patience"}
        free |= {"log_every", "save_every", "sample_every"}
        return {
            name: saved.get(name)
            for name in mine
            if name not in free and saved.get(name) != mine[name]
        }
