"""Distribution matching distillation (DMD2, arXiv 2405.14867): a frozen real score and a fake one
that learns what the generator makes; both see whole clips.

Shapes: B samples, F latent frames, C channels, H×W latents, T text rows, E text dim.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from sfkernels import dmd_gradient, sampler_step
from sfmodel.dit import DiT
from sfmodel.schedule import FlowSchedule, add_noise
from sfmodel.train.batch import MicroBatch
from sfmodel.train.objectives import Context, Distillation

# x0 by the real and by the fake score of generated videos, as `scores` gives them.
Score = Callable[[Tensor], tuple[Tensor, Tensor]]


class DMD(Distillation):
    """Distribution matching by the difference of two scores."""

    needs_teacher = True

    def __init__(self, context: Context) -> None:
        super().__init__(context)
        self.needs_clips = context != "own"

    def generator_loss(self, batch: MicroBatch, video_BFCHW: Tensor) -> Tensor:
        return dmd_loss(video_BFCHW, self.score(batch), batch.batch.masked)

    def critic_loss(self, batch: MicroBatch, video_BFCHW: Tensor) -> Tensor:
        context, t_B = batch.context, self.timesteps(batch)
        assert context.models.critic is not None
        # Wan2.1's weight is of flow matching on clips; the critic's flow counts alike at all t.
        weight_B = None if context.config.min_sigma is None else batch.flow_weight(t_B)
        shared = batch.noise("score noise"), t_B, batch.text_BTE, context.schedule, weight_B
        return critic_loss(context.models.critic, video_BFCHW, *shared, context.score_schedule)

    def score(self, batch: MicroBatch) -> Score:
        """The scores of a micro-batch's videos."""
        context = batch.context
        assert context.models.real is not None and context.models.critic is not None
        return functools.partial(
            scores,
            noise_BFCHW=batch.noise("score noise"),
            t_B=self.timesteps(batch),
            text_BTE=batch.text_BTE,
            unprompted_BTE=context.negative_1TE,
            real=context.models.real,
            fake=context.models.critic,
            schedule=context.schedule,
            score_schedule=context.score_schedule,
            guidance=context.config.guidance_scale,
            fake_guidance=context.config.fake_guidance_scale,
        )


def dmd_loss(x_BFCHW: Tensor, score: Score, masked: int = 0) -> Tensor:
    """Distribution matching (DMD2, arXiv 2405.14867): ½·mean(x − stopgrad(x − g))² in float64,
    whose gradient with respect to the generated videos x is g / x.numel(), where g is
    `sfkernels.dmd_gradient` of what the real and the fake score make of x after noising. masked:
    first frames that the mean leaves out."""
    with torch.no_grad():
        target = x_BFCHW.double() - dmd_gradient(x_BFCHW, *score(x_BFCHW)).double()
    return 0.5 * F.mse_loss(x_BFCHW[:, masked:].double(), target[:, masked:])


def critic_loss(
    fake: DiT,
    x_BFCHW: Tensor,
    noise_BFCHW: Tensor,
    t_B: Tensor,
    text_BTE: Tensor,
    schedule: FlowSchedule,
    weight_B: Tensor | None = None,
    score_schedule: FlowSchedule | None = None,
) -> Tensor:
    """Flow matching of generated videos x: the fake score of DMD and SiD, mean of
    w·‖flow − (ε − x)‖²; weight as in `teacher_forcing_loss`. score_schedule: as in `scores`, whose
    x0 stands for a flow of (x_t − x0)/σ."""
    sigma, score_sigma = schedule.sigma(t_B), (score_schedule or schedule).sigma(t_B)
    x_t = add_noise(x_BFCHW, noise_BFCHW, sigma)
    flow = fake(x_t, t_B, text_BTE) * (score_sigma / sigma)[:, None, None, None, None]
    error = (flow - (noise_BFCHW - x_BFCHW)).square()
    return (error if weight_B is None else weight_B[:, None, None, None, None] * error).mean()


def scores(
    x_BFCHW: Tensor,
    *,
    noise_BFCHW: Tensor,
    t_B: Tensor,
    text_BTE: Tensor,
    unprompted_BTE: Tensor,
    real: DiT,
    fake: DiT,
    schedule: FlowSchedule,
    score_schedule: FlowSchedule | None = None,
    guidance: float = 4.0,
    fake_guidance: float = 1.0,
) -> tuple[Tensor, Tensor]:
    """x0 by the real score, and by the fake one, of generated videos x noised to t; with all but x
    given, a `Score`. score_schedule: the table that x0 = x_t − σ·flow has its σ from; None: that of
    schedule, by which x is noised. guidance, fake_guidance: of the one and the other, as in
    `sfkernels.sampler_step`; 1 for none."""
    x_t = add_noise(x_BFCHW, noise_BFCHW, schedule.sigma(t_B))
    sigma = (score_schedule or schedule).sigma(t_B)

    def x0(score: DiT, scale: float) -> Tensor:
        unprompted = None if scale == 1 else score(x_t, t_B, unprompted_BTE)
        options: Any = {"uncond_flow": unprompted, "guidance": scale}
        return sampler_step(x_t, score(x_t, t_B, text_BTE), sigma, **options)[0]

    return x0(real, guidance), x0(fake, fake_guidance)
