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
from sfmodel.train.batch import MicroBatch
from sfmodel.train.rollout import Rollout

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
            video = self.generate(batch)[0]  # and nothing of what its gradient would need
        with phase("forward"):
            loss = self.critic_loss(batch, video)
        with phase("backward"):
            (share * loss).backward()
        return loss.item()

    def generate(self, batch: MicroBatch) -> tuple[Tensor, Callable[[Tensor], None]]:
        """Videos [B, F, C, H, W] of the generator, and what takes the gradient of a loss with
        respect to them back through it: on its own context a rollout, on real ones one pass in
        which each chunk stands at one of the few steps."""
        context, layout = batch.context, batch.batch.layout
        model, config, schedule = context.models.generator, context.config, context.schedule
        noise, steps = batch.noise("noise"), config.model.steps
        if self.context == "own":
            renoise = batch.noise("renoise", len(steps) - 1).transpose(1, 2)
            rollout = Rollout(
                model, layout, schedule, steps, batch.batch.exit_step, noise, renoise,
                batch.text_BTE, gradient_frames=config.gradient_frames, context_noise_BFCHW=(
                    batch.noise("context noise") if config.renoise_context else None),
            )  # fmt: skip
            return rollout.generate(), rollout.backward
        clean = batch.clean_BFCHW
        sigmas = schedule.sigma(schedule.warp(steps).to(noise))
        points = [add_noise(clean, noise, sigma) for sigma in sigmas]
        t_BF, x = batch.at_few_steps(torch.stack(points, 1))
        past = clean if layout.teacher_forcing else None
        flow = model(x, t_BF, batch.text_BTE, layout=layout, clean_BFCHW=past)
        x0 = x0_of(x, flow, schedule.sigma(t_BF))
        return x0, x0.backward

    def timesteps(self, batch: MicroBatch) -> Tensor:
        """Timesteps [B] at which a micro-batch's videos are scored."""
        return score_timesteps(batch.draw.uniform("score level"), batch.context.schedule)


def score_timesteps(s_B: Tensor, schedule: FlowSchedule) -> Tensor:
    """Timesteps [B] to compare scores at, from uniform s in [0, 1): shifted towards noise as
    the schedule is and kept off both ends, as the public Self Forcing has it."""
    return (schedule.shifted(s_B) * TRAIN_STEPS).clamp(LOWEST, HIGHEST)
