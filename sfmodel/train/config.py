"""Settings of a training run: one dataclass, saved with the run, and the recipes to choose from."""

from __future__ import annotations

import functools
import itertools
import json
import math
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any, Literal

from sfkernels import BlockLayout
from sfkernels.dispatch import IMPLS
from sfmodel.config import PRESETS, Preset, check_seed
from sfmodel.dit import DiT
from sfmodel.extras import check_installed
from sfmodel.files import check_writable
from sfmodel.ranks import PATIENCE
from sfmodel.schedule import FlowSchedule
from sfmodel.train.lora import Adapter
from sfmodel.train.objectives import Objective
from sfmodel.train.objectives.consistency import Consistency
from sfmodel.train.objectives.dmd import DMD
from sfmodel.train.objectives.flow import FlowMatching
from sfmodel.train.objectives.gan import GAN
from sfmodel.train.objectives.ode import ODERegression
from sfmodel.train.objectives.sid import SiD
from sfmodel.weights import checkpoint
from sfmodel.weights.names import LORA_TARGETS

# The least and the most that settings may be.
_RANGES: dict[tuple[float, float], tuple[str, ...]] = {
    (1, math.inf): (
        "frames", "chunks", "windows", "steps", "batch", "log_every", "save_every", "pairs",
        "teacher_steps", "critic_steps", "gradient_frames", "first", "rollouts",
    ),
    (0, math.inf): (
        "sink", "micro_batch", "warmup", "ema_start", "critic_warmup", "shard", "sample_every",
        "weight_decay", "lr", "lr_critic", "clip", "clip_critic", "min_sigma", "context_noise",
        "gan_penalty", "discriminator_lr_multiplier", "discriminator_warmup",
    ),
    (0, 1024): ("threads",),
    (0, 65536): ("lora_rank",),
    (0, 1): ("drop_text", "drop_word", "decay_fraction", "darken", "ema", "betas", "betas_critic"),
    (0, 999): ("min_score_timestep",),
    (0.01, 100): ("score_shift", "teacher_shift"),
    (-1e9, 1e9): ("guidance_scale", "fake_guidance_scale", "sid_alpha", "gan_sigma"),
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
    "df+ode": ODERegression("noisy"),
    "sf+dmd": DMD("own"),
    "sf+sid": SiD("own"),
    "sf+gan": GAN("own"),
}


@dataclass(frozen=True)
class TrainConfig:
    """Settings of one run. Every step draws one of `frames`, of `chunks` and of `windows`, the same
    for all ranks, so that one model streams at any of them."""

    recipe: str = "tf"  # bidirectional, ode, consistency, or what a chunk sees, tf, df, sf (+dmd …)
    preset: str = "toy"  # sizes of the generator
    output: Path = Path("out/train")  # folder of the run
    data: Path | None = None  # clips or prompts; None is the toy world
    init: Path | None = None  # weights that the generator starts from; None draws them
    teacher: Path | None = None  # weights of the real score, which also makes ODE trajectories
    teacher_preset: str | None = None  # sizes of the real score, where other than the generator's
    critic: Path | None = None  # weights that the critic starts from; None takes the teacher's

    # LoRA
    lora_rank: int = 0  # of the generator's changes, which learn in place of its weights; 0: none
    lora_alpha: float | None = None  # changes are scaled by this / rank; None: the rank
    lora_targets: tuple[str, ...] = LORA_TARGETS  # layers of a block, by the ends of public names
    lora_critic: bool = False  # the critic learns changes of the same rank, too

    # clips
    frames: tuple[int, ...] = (21,)  # latent frames of a clip
    chunks: tuple[int, ...] = (3,)  # latent frames generated at a time
    first: int | None = None  # of the first chunk, 1 if it is a still; None: the preset's
    windows: tuple[int, ...] = (21,)  # latent frames that a chunk sees, its own included
    sink: int = 0  # first latent frames that are always seen
    denoising_steps: tuple[int, ...] | None = None  # of a chunk, falling; None: the preset's
    hide_first: bool = False  # the last chunk does not see the first (paper, section 3.4)
    image: bool = False  # the first latent frame is a clip's own, clean, and takes no loss
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
    ema_start: int = 40  # updates after which the average begins, as a copy of the weights

    # flow matching
    min_sigma: float | None = None  # counts x0's error as 1/max(σ, this)²; None: Wan's bell
    context_noise: float = 0.0  # TF: largest noise on the clean context, in the latents' units
    darken: float = 0.0  # TF: largest share of the light that is missing where the model looks

    # ODE regression and consistency distillation
    pairs: int = 3072  # trajectories of the teacher
    teacher_steps: int = 20  # Euler steps of a trajectory, which consistency has two points of
    teacher_shift: float | None = None  # of their noise levels; None: the preset's
    causal_teacher: bool = False  # consistency: the teacher sees clean chunks, as one of tf does

    # distillation
    critic_steps: int = 5  # updates of the critic before each one of the generator
    critic_warmup: int = 0  # further ones before the first
    lr_critic: float = 4e-7  # of the critic, which neither warmup nor decay_fraction changes
    betas_critic: tuple[float, float] | None = None  # of the critic's AdamW; None: betas
    clip_critic: float | None = None  # largest norm of the critic's gradient; None: clip
    negative: str | None = None  # prompt, or file of one, guidance leads away from; None: no words
    guidance_scale: float = 4.0  # of the real score: unprompted + this · (prompted − unprompted)
    fake_guidance_scale: float = 1.0  # of the critic as a score, likewise; 1: no guidance
    min_score_timestep: int = 0  # of 1000, before the shift: scores compare from this noise level
    ts_schedule: bool = False  # SF: from the noise level of the step that follows the exit step
    ts_schedule_max: bool = False  # SF: up to the noise level of the exit step
    score_shift: float | None = None  # of the table that scores' σ are from; None: the preset's
    sid_alpha: float = 1.0  # α of SiD
    rollouts: tuple[int, ...] = ()  # SF: latent frames generated, of which `frames` are judged
    judged: Literal["last", "random"] = "last"  # SF: the last, or those from a random chunk on
    models: Path | None = None  # folder with the video VAE that rollouts longer than a clip need
    positions: Literal["absolute", "relative"] = "absolute"  # SF: the sink moves with the window
    same_step_across_blocks: bool = True  # SF: all chunks exit at one step, or each at its own
    last_step_only: bool = False  # SF: no exits before the last step
    gradient_frames: int | None = None  # SF: only the last latent frames take a gradient; None: all
    renoise_context: bool = True  # SF: clean context is noised at the schedule's smallest σ
    gan_penalty: float = 30.0  # λ of R1 and R2, whose mean counts
    gan_sigma: float = 0.05  # size of the perturbation that they are measured by
    discriminator_lr_multiplier: float = 1.0  # of its head's learning rate, relative to lr_critic
    discriminator_warmup: int = 0  # first updates of the critic, in which the head alone learns

    # execution
    bf16: bool = False  # matrix products in bfloat16, weights and their averages in float32
    recompute: bool = False  # activations again in the backward pass, instead of keeping them
    compile: bool = False  # torch.compile of the models that see whole clips
    impl: str = "auto"  # of the sfkernels ops
    attention_impl: str = "auto"  # of the attention ops
    shard: int = 0  # ranks that share one copy of the weights; 0, or more than there are: all
    threads: int = 0  # CPU threads; 0 is PyTorch's choice
    deterministic: bool = True  # the same bits in every run on a GPU too, where PyTorch can
    patience: float = PATIENCE  # seconds that a rank waits for another one
    seed: int = 0  # of weights, data and noise

    # output
    log_every: int = 1  # updates
    save_every: int = 20  # updates
    sample_every: int = 0  # updates between samples of generated videos; 0: at the end only
    tracker: Literal["wandb", "tensorboard"] | None = None  # gets the log and the samples, too

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
                    if each is not None and not (low <= each <= high and each < math.inf):
                        limit = f" and at most {high}" if high < math.inf else ", and finite"
                        raise ValueError(f"{name}={value}: must be at least {low}{limit}")
        for name in ("frames", "chunks", "windows"):
            if not getattr(self, name):
                raise ValueError(f"{name}: must be at least one number")
        for name in ("impl", "attention_impl"):
            if getattr(self, name) not in IMPLS:
                known = ", ".join(IMPLS)
                raise ValueError(f"{name}={getattr(self, name)!r}: must be one of {known}")
        if self.lora_alpha is not None and not 0 < self.lora_alpha < math.inf:
            raise ValueError(f"lora_alpha={self.lora_alpha}: must be more than 0")
        elif self.lora_alpha is not None and not self.lora_rank:
            raise ValueError(f"lora_alpha={self.lora_alpha}: goes with a lora_rank")
        for name in ("ema", "betas", "betas_critic"):
            value = getattr(self, name)
            if 1 in (value if isinstance(value, tuple) else (value,)):
                raise ValueError(f"{name}={value}: must be less than 1")
        if self.objective.needs_discriminator and self.gan_sigma == 0:
            raise ValueError("gan_sigma=0: penalties are measured by a perturbation: must not be 0")
        if self.darken and self.preset != "toy":
            raise ValueError(f"darken={self.darken}: only the toy world has a light")
        if self.lora is not None:
            self.lora.layers()
        elif self.lora_critic:
            raise ValueError("lora_critic: goes with a lora_rank")
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
        if self.discriminator_warmup and not self.objective.needs_discriminator:
            raise ValueError(
                f"discriminator_warmup={self.discriminator_warmup}: recipe={self.recipe!r} has no "
                "discriminator: must be 0"
            )
        last = self.model.steps[-1]
        if self.ts_schedule_max and not self.ts_schedule and self.min_score_timestep >= last:
            raise ValueError(
                f"min_score_timestep={self.min_score_timestep}: must be less than {last}, where "
                "ts_schedule_max ends after the last step"
            )
        if self.objective.context == "whole" and self.hide_first:
            raise ValueError("hide_first: a bidirectional model has no first chunk")
        if self.rollouts and self.objective.context != "own":
            raise ValueError(f"rollouts={self.rollouts}: recipe={self.recipe!r} rolls nothing out")
        elif self.judged == "random" and not self.rollouts:
            raise ValueError("judged='random': is of rollouts longer than a clip: give rollouts")
        if self.image and self.objective.context == "whole":
            raise ValueError("image: a bidirectional model has no first chunk")
        if self.image and isinstance(self.objective, Consistency):
            raise ValueError("image: recipe='consistency' has a teacher that makes whole clips")
        for frames, chunk, window in itertools.product(self.frames, self.chunks, self.windows):
            self._check_sizes(self.layout(frames, chunk, window), chunk)

    def _check_sizes(self, clip: BlockLayout, chunk: int) -> None:
        """Raises ValueError where the clips of an update are too short for what it does."""
        frames, (first, *others) = clip.frames, clip.chunks
        for rollout in self.rollouts:
            if rollout < frames or (rollout - frames) % chunk:
                raise ValueError(
                    f"rollouts={self.rollouts}: each must be the {frames} latent frames of a clip "
                    f"and a multiple of the chunk size {chunk} more"
                )
        if self.image and first != 1:
            raise ValueError(
                f"image: is a first chunk of 1 latent frame, not of {first}: set first=1"
            )
        if not others and (self.image or max(self.rollouts, default=0) > frames):
            raise ValueError(
                f"frames={self.frames}: must be more than the {first} of the first chunk, which "
                "takes no loss with image or longer rollouts"
            )
        least = clip.chunks[-1]
        if self.objective.context == "own" and (self.gradient_frames or least) < least:
            raise ValueError(
                f"gradient_frames={self.gradient_frames}: must be at least the {least} latent "
                "frames of a chunk"
            )

    def check_files(self) -> None:
        """Raises the first of `refusals`."""
        for refusal in self.refusals():
            raise refusal

    def refusals(self, to_come: Collection[Path] = ()) -> Iterator[ValueError | OSError]:
        """Errors for weights that are missing or not of these models, for a folder that cannot be
        written and a tracker that is not installed. to_come: weights that are made before it
        starts. Reads no weights and leaves nothing."""
        objective, size = self.objective, self.teacher_preset or self.preset
        if objective.needs_teacher and self.teacher is None:
            yield ValueError(f"recipe={self.recipe!r} learns from a teacher: give its weights")
        mine = self.teacher is not None and size == self.preset
        if objective.needs_critic and self.critic is None and not mine:
            yield ValueError(
                f"recipe={self.recipe!r}: a critic of {self.preset!r} cannot start from "
                f"teacher={self.teacher} of {size!r}: give critic"
            )
        if self.lora is not None and self.init is None:
            yield ValueError(f"lora_rank={self.lora_rank}: a LoRA changes weights: give init")
        checks: list[Callable[[], None]] = [
            functools.partial(check_writable, self.output / "config.json")
        ]
        if self.tracker is not None:
            named = f"tracker={self.tracker!r}", self.tracker, "trackers"
            checks.append(functools.partial(check_installed, *named))
        own, real = self.model.dit, PRESETS[size].dit
        critic = self.critic or self.teacher if objective.needs_critic else None
        teacher = self.teacher if objective.needs_teacher else None
        for sizes, weights in ((own, self.init), (real, teacher), (own, critic)):
            if weights is not None and weights not in to_come:
                build = functools.partial(DiT, sizes)
                checks.append(functools.partial(checkpoint.check, build, weights))
        for check in checks:
            try:
                check()
            except (ValueError, OSError) as error:
                yield error

    @property
    def guided(self) -> bool:
        """Whether something is led away from the negative prompt."""
        scales = self.guidance_scale, self.fake_guidance_scale
        return self.objective.needs_teacher and scales != (1, 1)

    @property
    def longer(self) -> bool:
        """Whether some rollouts are longer than a clip."""
        return max(self.rollouts, default=0) > min(self.frames)

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
            first=preset.first if self.first is None else self.first, window=max(self.windows),
            sink=self.sink, positions=self.positions,
        )  # fmt: skip

    @property
    def needs_clips(self) -> bool:
        return self.objective.needs_clips or (self.image and self.objective.context == "own")

    @property
    def lora(self) -> Adapter | None:
        """Settings of the LoRA that learns in place of weights; None where there is none."""
        alpha = self.lora_alpha or self.lora_rank
        return Adapter(self.lora_rank, alpha, self.lora_targets) if self.lora_rank else None

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

    def critic_updates(self, step: int) -> int:
        """Number of the critic's updates before that of the generator in a step."""
        if not self.objective.needs_critic:
            return 0
        first = self.discriminator_warmup + self.critic_warmup
        return self.critic_steps + (0 if step else first)

    def split(self, clips: int, ranks: int) -> tuple[int, int]:
        """Number of clips of one rank in an update of so many, and in one of its micro-batches.
        Raises ValueError where they do not divide."""
        local, left = divmod(clips, ranks)
        micro = min(self.micro_batch or local, local)
        if left or not local or local % micro:
            by_micro = f" and micro_batch={micro}" if self.micro_batch else ""
            raise ValueError(
                f"an update of {clips} clips: must divide into {ranks} ranks{by_micro}"
            )
        return local, micro

    def check_ranks(self, ranks: int) -> None:
        """Raises ValueError for settings that do not go with so many ranks."""
        if self.optimizer == "muon" and ranks > 1:
            raise ValueError("optimizer='muon' runs on one rank: use 'adamw' on several")
        for frames in self.frames:
            self.split(self.clips(frames), ranks)

    def plain(self) -> dict[str, Any]:
        """The settings as JSON has them."""
        return _as_json(asdict(self))

    def differing(self, saved: Mapping[str, Any]) -> dict[str, Any]:
        """The settings of a saved run that decide otherwise what is computed. What its version did
        not have yet was as by default here."""
        mine, before = self.plain(), _as_json({each.name: each.default for each in fields(self)})
        saved = before | {_RENAMED.get(name, name): saved[name] for name in saved}
        if "guidance" in saved:  # of 0.1.0: x0 + guidance · (x0 − x0 of the unprompted)
            saved["guidance_scale"] = saved["guidance"] + 1
        free = {"output", "models", "steps", "threads", "shard", "micro_batch", "patience"}
        free |= {"log_every", "save_every", "sample_every", "tracker", "deterministic"}
        free |= set() if self.sink else {"positions"}
        return {
            name: saved.get(name)
            for name in mine
            if name not in free and saved.get(name) != mine[name]
        }

    def changed(self, saved: Mapping[str, Any]) -> list[str]:
        """Ways in which the version of a saved run computed otherwise under the same settings."""
        if "ts_schedule" in saved:  # which came with what is otherwise
            return []
        changes = {
            "its average began with smaller decays": self.ema > 0,
            "its scores had other noise levels": self.objective.needs_critic,
            "its discriminator had other penalties": self.objective.needs_discriminator,
            "its loss counted chunks that are clean": self.objective.needs_trajectories,
        }
        return [change for change, is_so in changes.items() if is_so]


def _as_json(settings: Mapping[str, Any]) -> dict[str, Any]:
    return json.loads(json.dumps(settings, default=str))
