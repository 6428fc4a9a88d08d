"""What one update computes: the recipes of `config.RECIPES`, on one part of a global batch.

Everything random in an update follows from its seed and, sample by sample, from the sample's place
in the global batch: any split into ranks and micro-batches learns the same.

Shapes: B clips of the part, F latent frames, K chunks, C channels, H×W latents, S steps.
"""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from sfkernels import BlockLayout
from sfmodel.dit import DiT
from sfmodel.schedule import TRAIN_STEPS, FlowSchedule, add_noise
from sfmodel.train import objectives
from sfmodel.train.config import TrainConfig
from sfmodel.train.data import Source
from sfmodel.train.discriminator import Discriminator, logits
from sfmodel.train.rollout import Rollout
from sfmodel.train.trajectories import Trajectories


class Models(NamedTuple):
    """All that take part. real: frozen. discriminator: reads the critic's features."""

    generator: DiT
    real: DiT | None = None
    critic: DiT | None = None
    discriminator: Discriminator | None = None


class Setting(NamedTuple):
    """What does not change between updates. negative: the prompt that guidance leads away from."""

    config: TrainConfig
    models: Models
    source: Source
    trajectories: Trajectories
    negative_1TE: Tensor
    dark_CHW: Tensor | None  # latents of the toy world without light
    device: torch.device


class Draw(NamedTuple):
    """Random numbers of the samples `rows` of a global batch, by name."""

    seed: int
    rows: range
    device: torch.device

    def normal(self, name: str, *shape: int) -> Tensor:
        return self._each(torch.randn, name, shape)

    def uniform(self, name: str, *shape: int) -> Tensor:
        """In [0, 1)."""
        return self._each(torch.rand, name, shape)

    def _each(self, draw: Callable[..., Tensor], name: str, shape: Sequence[int]) -> Tensor:
        """Drawn on the CPU, so that they are the same on any device."""
        generator = torch.Generator()
        rows = []
        for row in self.rows:
            generator.manual_seed(seed_of(self.seed, name, row))
            rows.append(draw(shape, generator=generator))
        return torch.stack(rows).to(self.device)


def seed_of(*what: object) -> int:
    """One seed for everything that these say."""
    return int.from_bytes(hashlib.blake2b(repr(what).encode(), digest_size=7).digest(), "big")


class Update:
    """One update's global batch, of which a `Part` is a piece. name: "generator" or one of the
    critic's; what all ranks share (sizes, the exit step) follows from (config.seed, step, name)."""

    def __init__(self, setting: Setting, step: int, name: str) -> None:
        config = setting.config
        self.setting, self.step = setting, step
        self.seed = seed_of(config.seed, step, name)
        self.preset = config.model
        self.schedule = FlowSchedule(self.preset.shift)
        generator = torch.Generator().manual_seed(seed_of(self.seed, "shared"))

        def choose(options: Sequence[int]) -> int:
            return options[int(torch.randint(len(options), (), generator=generator))]

        self.frames, self.chunk, self.window = map(
            choose, (config.frames, config.chunks, config.windows)
        )
        self.exit_step = choose(range(len(self.preset.steps)))
        self.clips = config.clips(self.frames)


class Part:
    """A micro-batch of an update: its clips, prompts and noise."""

    def __init__(self, update: Update, rows: range) -> None:
        setting, preset = update.setting, update.preset
        self.update, self.setting = update, setting
        self.config, self.models = setting.config, setting.models
        self.schedule, self.draw = update.schedule, Draw(update.seed, rows, setting.device)
        self.shape = len(rows), update.frames, preset.dit.channels, preset.height, preset.width
        self.points = self.real = None
        if self.config.kind.objective == "ode":
            chosen = self.draw.uniform("trajectory") * setting.trajectories.count
            points, text = setting.trajectories.draw(chosen.long().tolist())
            self.points = points.to(setting.device)
        else:
            clips, text, _ = setting.source.draw(
                seed_of(update.seed, "data"),
                update.clips,
                update.frames,
                slice(rows.start, rows.stop),
                latents=self.config.kind.needs_clips,
            )
            self.real = None if clips is None else clips.to(setting.device)
        self.text = text.to(setting.device)

    def learn(self, share: float) -> float:
        """Adds to the generator's gradients `share` of those of this part's loss; returns it."""
        objective = self.config.kind.objective
        if objective in ("flow", "ode"):
            loss = self._flow() if objective == "flow" else self._ode()
            (share * loss).backward()
            return loss.item()
        video, backward = self._generated()
        video = video.detach().requires_grad_()
        loss = self._judged(video)
        backward(torch.autograd.grad(share * loss, video)[0].to(video.dtype))
        return loss.item()

    def learn_critic(self, share: float) -> float:
        """The same of the critic, on what the generator makes now."""
        with torch.no_grad():
            video = self._generated()[0]
        critic = self.models.critic
        assert critic is not None
        t_B, config = self._score_t(), self.config
        noise = self.draw.normal("score noise", *self.shape[1:])
        if config.kind.objective == "gan":
            loss = objectives.discriminator_loss(
                self._logits(t_B), video, self._real(), noise, t_B, self.schedule,
                *self.draw.normal("perturbation", 2, *self.shape[1:]).unbind(1),
                r1=config.gan_penalty, r2=config.gan_penalty, penalty_sigma=config.gan_sigma,
            )  # fmt: skip
        else:
            # Wan2.1's weight is of flow matching on clips; the critic's flow counts alike at all t.
            weight_B = None if config.min_sigma is None else self._weight(t_B)
            loss = objectives.critic_loss(
                critic, video, noise, t_B, self.text, self.schedule, weight_B
            )
        (share * loss).backward()
        return loss.item()

    def _flow(self) -> Tensor:
        config, clean = self.config, self._real()
        layout = self._layout()
        s_BK = self.draw.uniform("level", len(layout.chunks)).clamp(min=1 / TRAIN_STEPS)
        sigma_BF = self._by_frame(self.schedule.shifted(s_BK), layout)
        weight_BF = self._weight(sigma_BF * TRAIN_STEPS)
        noise = self.draw.normal("noise", *self.shape[1:])
        shared = noise, sigma_BF, self.text, layout, weight_BF
        model = self.models.generator
        if config.kind.context != "clean":
            return objectives.diffusion_forcing_loss(model, clean, *shared)
        # The x0 of a few large steps is a mean, which is darker than any sample. A model that has
        # seen such pictures, in its context and under the noise, brings the light back.
        context = seen = clean
        if config.fade:
            assert self.setting.dark_CHW is not None
            missing = self.setting.dark_CHW - clean
            share = config.fade * self.draw.uniform("fade", 2, 1, 1, 1, 1)
            seen, context = clean + share[:, 0] * missing, clean + share[:, 1] * missing
        if config.context_noise:
            level = config.context_noise * self.draw.uniform("context level", 1, 1, 1, 1)
            context = context + level * self.draw.normal("context noise", *self.shape[1:])
        return objectives.teacher_forcing_loss(model, clean, context, *shared, seen_BFCHW=seen)

    def _ode(self) -> Tensor:
        """Each chunk at one of the few steps, or already clean."""
        assert self.points is not None
        clean, steps = self.points[:, -1], self.update.preset.steps
        layout, model = self._layout(), self.models.generator
        if layout.teacher_forcing:
            t_BF, x = self._few_step(layout, self.points)
            return objectives.ode_regression_loss(
                model, x, t_BF, clean, self.text, layout, self.schedule, clean
            )
        t_BF, x = self._few_step(layout, self.points, len(steps) + 1)
        return objectives.ode_regression_loss(
            model, x, t_BF, clean, self.text, layout, self.schedule
        )

    def _few_step(
        self, layout: BlockLayout, points_BSFCHW: Tensor, levels: int | None = None
    ) -> tuple[Tensor, Tensor]:
        """t [B, F] of one of the few steps for each chunk, and the points there."""
        steps = self.update.preset.steps
        t_S = torch.cat([self.schedule.warp(steps), torch.zeros(1)]).to(points_BSFCHW.device)
        k_BK = (self.draw.uniform("step", len(layout.chunks)) * (levels or len(steps))).long()
        k_BF = self._by_frame(k_BK, layout)
        at = k_BF[:, None, :, None, None, None].expand(-1, 1, *points_BSFCHW.shape[2:])
        return t_S[k_BF], points_BSFCHW.gather(1, at)[:, 0]

    def _generated(self) -> tuple[Tensor, Callable[[Tensor], None]]:
        """Videos of the generator, and what takes the gradient of a loss back through it."""
        steps, layout, model = self.update.preset.steps, self._layout(), self.models.generator
        noise = self.draw.normal("noise", *self.shape[1:])
        if self.config.kind.context == "own":
            renoise = self.draw.normal("renoise", len(steps) - 1, *self.shape[1:]).transpose(1, 2)
            context = None
            if self.config.renoise_context:
                context = self.draw.normal("context noise", *self.shape[1:])
            rollout = Rollout(
                model, layout, self.schedule, steps, self.update.exit_step, noise,
                renoise, self.text, context_noise_BFCHW=context,
                gradient_frames=self.config.gradient_frames,
            )  # fmt: skip
            return rollout.video, rollout.backward
        clean = self._real()
        t_S = self.schedule.warp(steps).to(noise)
        points = [add_noise(clean, noise, self.schedule.sigma(t)) for t in t_S]
        t_BF, x = self._few_step(layout, torch.stack(points, 1))
        sigma_BF = self.schedule.sigma(t_BF)
        context = clean if layout.teacher_forcing else None
        flow = model(x, t_BF, self.text, layout=layout, clean_BFCHW=context)
        x0 = x - sigma_BF[:, :, None, None, None] * flow
        return x0, x0.backward

    def _judged(self, video: Tensor) -> Tensor:
        config, noise = self.config, self.draw.normal("score noise", *self.shape[1:])
        if config.kind.objective == "gan":
            t_B = self._score_t()
            return objectives.gan_generator_loss(
                self._logits(t_B), video, self._real(), noise, t_B, self.schedule
            )
        assert self.models.real is not None and self.models.critic is not None
        score = functools.partial(
            objectives.scores,
            noise_BFCHW=noise,
            t_B=self._score_t(),
            text_BTE=self.text,
            unprompted_BTE=self.setting.negative_1TE,
            real=self.models.real,
            fake=self.models.critic,
            schedule=self.schedule,
            guidance=config.guidance,
        )
        if config.kind.objective == "sid":
            return objectives.sid_loss(video, score)
        return objectives.dmd_loss(video, score)

    def _logits(self, t_B: Tensor) -> objectives.Logits:
        critic, head = self.models.critic, self.models.discriminator
        assert critic is not None and head is not None
        return lambda x_BFCHW: logits(critic, head, x_BFCHW, t_B, self.text)

    def _score_t(self) -> Tensor:
        return objectives.score_timesteps(self.draw.uniform("score level"), self.schedule)

    def _weight(self, t: Tensor) -> Tensor:
        """Of the squared error of the flow at t."""
        if self.config.min_sigma is None:
            return self.schedule.weight(t)
        return (self.schedule.sigma(t) / self.config.min_sigma).clamp(max=1).square()

    def _layout(self) -> BlockLayout:
        update, context = self.update, self.config.kind.context
        clean = context == "clean" or (context == "either" and update.step % 2 == 1)
        return self.config.layout(update.frames, update.chunk, update.window, clean)

    def _by_frame(self, value_BK: Tensor, layout: BlockLayout) -> Tensor:
        sizes = torch.tensor(layout.chunks, device=value_BK.device)
        return value_BK.repeat_interleave(sizes, 1)

    def _real(self) -> Tensor:
        assert self.real is not None
        return self.real
