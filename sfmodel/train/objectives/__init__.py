"""Training objectives, one a file: its losses as pure functions of tensors, and a class that says
what it needs and computes them on a micro-batch. `config.RECIPES` lists them.

Shapes: B samples, F latent frames, C channels, H×W latents, S few steps.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from sfmodel.ranges import phase
from sfmodel.schedule import TRAIN_STEPS, FlowSchedule, add_noise, x0_of
from sfmodel.train.batch import Batch, MicroBatch
from sfmodel.train.rollout import Rollout, as_still

Context = Literal["whole", "clean", "noisy", "either", "own"]
LOWEST, HIGHEST = 20, 980  # timesteps at which generated videos are scored


class Objective:
    """Base of all objectives.

    context: what a chunk sees of the others: the whole noisy clip, both ways ("whole"), real clean
    ones before it (teacher forcing, "clean"), real ones as noisy as they are (diffusion forcing,
    "noisy"), one of these two by turns ("either"), or what the model itself generated (self
    forcing, "own"). The flags say what must be there beside the generator."""

    needs_clips = True  # prompts alone are not enough
    needs_teacher = False  # a frozen model
    needs_trajectories = False  # of the teacher, in place of clips
    needs_critic = False  # a model that learns beside the generator
    needs_discriminator = False  # a head on the critic's features, which learns with it
    wan_settings: ClassVar[Mapping[str, Any]] = {}  # where they are not those of DMD

    def __init__(self, context: Context) -> None:
        self.context = context

    def teacher_forcing(self, step: int) -> bool:
        """Tells whether chunks see clean ones in update `step`."""
        return self.context == "clean" or (self.context == "either" and step % 2 == 1)

    generator_loss: Callable[..., Tensor]  # of a micro-batch; in distillation also of a video
    critic_loss: Callable[..., Tensor]  # of a micro-batch and a video, where there is a critic

    def learn(self, batch: MicroBatch, share: float) -> float:
        """Adds to the generator's gradients `share` of those of its loss; returns the loss."""
        with phase("forward"):
            loss = self.generator_loss(batch)
        with phase("backward"):
            (share * loss).backward()
        return loss.item()

    def learn_critic(self, batch: MicroBatch, share: float) -> float:
        """Adds to the critic's gradients `share` of those of its loss; returns the loss."""
        raise NotImplementedError


class Distillation(Objective):
    """Base of objectives of generated videos, which a critic judges that learns from them."""

    needs_critic = True

    def learn(self, batch: MicroBatch, share: float) -> float:
        with phase("rollout"):
            video, backward = self.generate(batch)
        video = video.detach().requires_grad_()
        with phase("score"):
            loss = self.generator_loss(batch, video)
            (upstream,) = torch.autograd.grad(share * loss, video)
        with phase("backward"):
            backward(upstream.to(video.dtype))
        return loss.item()

    def learn_critic(self, batch: MicroBatch, share: float) -> float:
        with phase("rollout"), torch.no_grad():
            video = self.generate(batch, gradient=False)[0]  # the rollout itself goes
        with phase("forward"):
            loss = self.critic_loss(batch, video)
        with phase("backward"):
            (share * loss).backward()
        return loss.item()

    def generate(
        self, batch: MicroBatch, gradient: bool = True
    ) -> tuple[Tensor, Callable[[Tensor], None]]:
        """Videos [B, F, C, H, W] of the generator, and what takes the gradient of a loss with
        respect to them back through it: on its own context a rollout, on real ones one pass in
        which each chunk stands at one of the few steps. gradient: whether that is to come."""
        if self.context == "own":
            return self._rolled_out(batch, gradient)
        context, layout, given = batch.context, batch.batch.layout, batch.batch.masked
        config, schedule, clean = context.config, context.schedule, batch.clean_BFCHW
        noise = batch.noise("noise")
        sigmas = schedule.sigma(schedule.warp(config.model.steps).to(noise))
        points = [*(add_noise(clean, noise, sigma) for sigma in sigmas), clean]
        t_BF, x = batch.at_few_steps(torch.stack(points, 1))
        past = clean if layout.teacher_forcing else None
        model = context.models.generator
        flow = model(x, t_BF, batch.text_BTE, layout=layout, clean_BFCHW=past)
        x0 = x0_of(x, flow, schedule.sigma(t_BF))
        x0 = torch.cat([clean[:, :given], x0[:, given:]], 1)
        return x0, x0.backward

    def _rolled_out(
        self, batch: MicroBatch, gradient: bool
    ) -> tuple[Tensor, Callable[[Tensor], None]]:
        """As `generate`, the last frames of rollouts. Where they are longer than a clip, the first
        of these stands for all before it: as the still that a clip begins with, decoded and encoded
        again, and without a loss in its chunk, as the public Self Forcing has it."""
        context, update = batch.context, batch.batch
        config, codec, frames = context.config, context.codec, update.frames
        longer, learned = update.rollout > frames, frames - update.masked
        if config.gradient_frames is not None:
            learned = min(learned, config.gradient_frames)
        shown = frames
        if longer:
            assert codec is not None
            shown = min(update.rollout, frames + codec.past_frames)
        rollout = Rollout(
            context.models.generator, update.rollout_layout, context.schedule, config.model.steps,
            update.exit_steps, batch.chunk_noise, batch.text_BTE,
            renoise_context=config.renoise_context, positions=config.positions,
            still_BFCHW=batch.clean_BFCHW[:, :1] if config.image else None,
            frames=shown, gradient_frames=learned if gradient else 0,
        )  # fmt: skip
        video = rollout.generate()
        if codec is not None and longer:
            still = as_still(codec, video[:, : 1 - frames])
            video = torch.cat([still, video[:, 1 - frames :]], 1)
        return video, rollout.backward

    def timesteps(self, batch: MicroBatch) -> Tensor:
        """Timesteps [B] at which a micro-batch's videos are scored."""
        s_B, schedule = batch.draw.uniform("score level"), batch.context.schedule
        return score_timesteps(s_B, schedule, *self.score_range(batch.batch))

    def score_range(self, batch: Batch) -> tuple[int, int]:
        """The least of the schedule's indices that a batch's videos are scored at, and the end of
        them. Under `ts_schedule` and `ts_schedule_max` they are those that the exit step denoises:
        from its own noise level down to the next step's. Videos without one exit step have all."""
        config = batch.context.config
        least, end = config.min_score_timestep, TRAIN_STEPS
        if self.context == "own" and batch.exit_step is not None:
            own, following = (*config.model.steps, 0)[batch.exit_step :][:2]
            least = following if config.ts_schedule else least
            end = own if config.ts_schedule_max else end
        return least, end


def score_timesteps(
    s_B: Tensor, schedule: FlowSchedule, least: int = 0, end: int = TRAIN_STEPS
) -> Tensor:
    """Timesteps [B] to compare scores at, from uniform s in [0, 1): one of the schedule's, of index
    least ≤ k < end in 0..1000 before the shift, kept off both ends (public Self Forcing)."""
    k_B = least + (s_B * (end - least)).floor()
    return (schedule.shifted(k_B / TRAIN_STEPS) * TRAIN_STEPS).clamp(LOWEST, HIGHEST)
