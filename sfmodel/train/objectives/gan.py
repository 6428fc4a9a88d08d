"""A relativistic GAN with R1 and R2 (arXiv 2506.08009, section 3.3): the critic is the backbone of
a discriminator, which compares generated videos with real ones at the same noise level.

Shapes: B samples, F latent frames, C channels, H×W latents.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from sfmodel.schedule import FlowSchedule, add_noise
from sfmodel.train import discriminator
from sfmodel.train.batch import MicroBatch
from sfmodel.train.objectives import Distillation

# A discriminator's logit [B] of noisy videos, as `discriminator.logits` gives it.
Logits = Callable[[Tensor], Tensor]


class GAN(Distillation):
    """Generated videos against real ones."""

    needs_discriminator = True

    def generator_loss(self, batch: MicroBatch, video_BFCHW: Tensor) -> Tensor:
        judged = self.judged(batch, video_BFCHW)
        return gan_generator_loss(*judged, real_noise_BFCHW=batch.noise("real noise"))

    def critic_loss(self, batch: MicroBatch, video_BFCHW: Tensor) -> Tensor:
        config, steps = batch.context.config, batch.noise("perturbation", 2).unbind(1)
        return discriminator_loss(
            *self.judged(batch, video_BFCHW), *steps, r1=config.gan_penalty, r2=config.gan_penalty,
            penalty_sigma=config.gan_sigma,
        )  # fmt: skip

    def judged(
        self, batch: MicroBatch, video_BFCHW: Tensor
    ) -> tuple[Logits, Tensor, Tensor, Tensor, Tensor, FlowSchedule]:
        """The arguments that both losses begin with."""
        t_B, (_, _, critic, head) = self.timesteps(batch), batch.context.models
        assert critic is not None and head is not None

        def logit(x_t_BFCHW: Tensor) -> Tensor:
            return discriminator.logits(critic, head, x_t_BFCHW, t_B, batch.text_BTE)

        noise = batch.noise("score noise")
        return logit, video_BFCHW, batch.clean_BFCHW, noise, t_B, batch.context.schedule


def relativistic_loss(winner_B: Tensor, loser_B: Tensor) -> Tensor:
    """Mean of softplus(−(winner − loser)) of pairs of logits (R3GAN, arXiv 2501.05441): of the
    discriminator with the real video as the winner, of the generator with the generated one."""
    return F.softplus(loser_B - winner_B).mean()


def finite_difference_penalty(logit_B: Tensor, perturbed_B: Tensor, sigma: float) -> Tensor:
    """Mean of ((perturbed − logit)/σ)², where the perturbed logit is that of x + σ·ε: in
    expectation over ε, up to O(σ²), the squared norm of the logit's gradient at x. It is R1 on real
    and R2 on generated videos, without a second derivative (arXiv 2501.08316), divided by σ² as
    the public Self Forcing has it."""
    return ((perturbed_B - logit_B) / sigma).square().mean()


def gan_generator_loss(
    logits: Logits,
    fake_BFCHW: Tensor,
    real_BFCHW: Tensor,
    noise_BFCHW: Tensor,
    t_B: Tensor,
    schedule: FlowSchedule,
    real_noise_BFCHW: Tensor,
) -> Tensor:
    """Mean of softplus(−(D(fake_t) − D(real_t))) of generated and real videos at the same t
    (arXiv 2506.08009, section 3.3), each under noise of its own (public Self Forcing). The real
    logits take no gradient."""
    sigma = schedule.sigma(t_B)
    with torch.no_grad():
        real_B = logits(add_noise(real_BFCHW, real_noise_BFCHW, sigma))
    return relativistic_loss(logits(add_noise(fake_BFCHW, noise_BFCHW, sigma)), real_B)


def discriminator_loss(
    logits: Logits,
    fake_BFCHW: Tensor,
    real_BFCHW: Tensor,
    noise_BFCHW: Tensor,
    t_B: Tensor,
    schedule: FlowSchedule,
    fake_step_BFCHW: Tensor,
    real_step_BFCHW: Tensor,
    *,
    r1: float = 30.0,
    r2: float = 30.0,
    penalty_sigma: float = 0.05,
) -> Tensor:
    """Mean of softplus(−(D(real_t) − D(fake_t))) + ½·(r1·R1 + r2·R2): `gan_generator_loss` with the
    roles exchanged, under the same noise, and the `finite_difference_penalty` at real_t and at
    fake_t (arXiv 2506.08009, section 3.3 and appendix; halved as in the public Self Forcing).
    fake_step, real_step: ε of the two penalties, as noise. The generated videos take no
    gradient."""
    sigma = schedule.sigma(t_B)
    fake_t, real_t = (add_noise(x, noise_BFCHW, sigma) for x in (fake_BFCHW.detach(), real_BFCHW))
    fake_B, real_B = logits(fake_t), logits(real_t)
    loss = relativistic_loss(real_B, fake_B)
    for weight, x_t, logit_B, step in (
        (r1, real_t, real_B, real_step_BFCHW),
        (r2, fake_t, fake_B, fake_step_BFCHW),
    ):
        perturbed_B = logits(x_t + penalty_sigma * step)
        loss = loss + weight / 2 * finite_difference_penalty(logit_B, perturbed_B, penalty_sigma)
    return loss
