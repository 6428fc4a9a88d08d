"""Training objectives as pure functions of models and a batch.

Teacher and diffusion forcing learn from clips. DMD and SiD learn from what the generator makes:
each is a scalar whose gradient with respect to the generated video is what `Rollout.backward`
takes. Their scores are bidirectional: a real one that is frozen, a fake one that `critic_loss`
keeps up with the generator. The GAN's loss is such a scalar too, of logits that
`discriminator_loss` keeps up.

Shapes: B batch, F latent frames, C channels, H×W latents, T text rows, E text dim.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from sfkernels import BlockLayout, dmd_gradient
from sfmodel.dit import DiT
from sfmodel.schedule import TRAIN_STEPS, FlowSchedule, add_noise

# x0 by the real and by the fake score of generated videos, as `scores` gives them.
Score = Callable[[Tensor], tuple[Tensor, Tensor]]
# A discriminator's logit [B] of noisy videos, as `discriminator.logits` gives it.
Logits = Callable[[Tensor], Tensor]

LOWEST, HIGHEST = 20, 980  # timesteps at which generated videos are scored


def teacher_forcing_loss(
    model: DiT,
    clean_BFCHW: Tensor,
    context_BFCHW: Tensor,
    noise_BFCHW: Tensor,
    sigma_BF: Tensor,
    text_BTE: Tensor,
    layout: BlockLayout,
    weight_BF: Tensor | None = None,
    seen_BFCHW: Tensor | None = None,
) -> Tensor:
    """Flow matching of every chunk given the clean ones before it (arXiv 2506.08009, section 3.1):
    mean of w·‖flow − (ε − x0)‖², a scalar.

    context: what the clean half of the sequence holds: the clean latents, or lightly noised ones,
    which makes a model less sure of its past. sigma: noise level of each frame, equal within a
    chunk. weight: w of each frame, 1 if None: `FlowSchedule.weight` is Wan2.1's; min(1, σ/σ_min)²
    counts the error of x0 as 1/max(σ, σ_min)², so that the finest levels, where the flow of a given
    x0 error is unbounded, do not drown the others. seen: the latents that are noised, where they
    are not the clean ones: what a sampler's own x0 looks like. The flow to learn leads from the
    noisy latents to the clean ones all the same.
    """
    x = add_noise(clean_BFCHW if seen_BFCHW is None else seen_BFCHW, noise_BFCHW, sigma_BF)
    t = sigma_BF * TRAIN_STEPS
    flow = model(x, t, text_BTE, layout=layout, clean_BFCHW=context_BFCHW)
    return _flow_error(flow, x, clean_BFCHW, sigma_BF, weight_BF)


def diffusion_forcing_loss(
    model: DiT,
    clean_BFCHW: Tensor,
    noise_BFCHW: Tensor,
    sigma_BF: Tensor,
    text_BTE: Tensor,
    layout: BlockLayout,
    weight_BF: Tensor | None = None,
) -> Tensor:
    """Flow matching where every chunk has a noise level of its own and sees the ones before it as
    noisy as they are (arXiv 2506.08009, section 3.1); arguments of
    `teacher_forcing_loss`. One chunk is a bidirectional model."""
    x = add_noise(clean_BFCHW, noise_BFCHW, sigma_BF)
    flow = model(x, sigma_BF * TRAIN_STEPS, text_BTE, layout=layout)
    return _flow_error(flow, x, clean_BFCHW, sigma_BF, weight_BF)


def _flow_error(
    flow: Tensor, x: Tensor, clean_BFCHW: Tensor, sigma_BF: Tensor, weight_BF: Tensor | None
) -> Tensor:
    """Mean of w·‖flow − (x − x0)/σ‖²."""
    error = (flow - (x - clean_BFCHW) / sigma_BF[:, :, None, None, None]).square()
    return (error if weight_BF is None else weight_BF[:, :, None, None, None] * error).mean()


def score_timesteps(s_B: Tensor, schedule: FlowSchedule) -> Tensor:
    """Where scores are compared: timesteps [B] from uniform s in [0, 1), shifted towards noise as
    the schedule is and kept off both ends, as the public Self Forcing has it."""
    return (schedule.shifted(s_B) * TRAIN_STEPS).clamp(LOWEST, HIGHEST)


def ode_regression_loss(
    model: DiT,
    x_BFCHW: Tensor,
    t_BF: Tensor,
    clean_BFCHW: Tensor,
    text_BTE: Tensor,
    layout: BlockLayout,
    schedule: FlowSchedule,
    context_BFCHW: Tensor | None = None,
) -> Tensor:
    """Initialisation of a few-step causal model (CausVid, arXiv 2412.07772): the mean
    squared error of x0. x: points of the teacher's deterministic trajectories that end in `clean`,
    each chunk's at its own few-step timestep t. context: what the clean half of a layout with
    teacher forcing holds."""
    flow = model(x_BFCHW, t_BF, text_BTE, layout=layout, clean_BFCHW=context_BFCHW)
    return F.mse_loss(_x0(x_BFCHW, flow, schedule.sigma(t_BF)), clean_BFCHW.float())


def critic_loss(
    fake: DiT,
    x_BFCHW: Tensor,
    noise_BFCHW: Tensor,
    t_B: Tensor,
    text_BTE: Tensor,
    schedule: FlowSchedule,
    weight_B: Tensor | None = None,
) -> Tensor:
    """Flow matching of generated videos x: the fake score of DMD and SiD, mean of
    w·‖flow − (ε − x)‖²; weight as in `teacher_forcing_loss`."""
    x_t = add_noise(x_BFCHW, noise_BFCHW, schedule.sigma(t_B))
    error = (fake(x_t, t_B, text_BTE) - (noise_BFCHW - x_BFCHW)).square()
    return (error if weight_B is None else weight_B[:, None, None, None, None] * error).mean()


def dmd_loss(x_BFCHW: Tensor, score: Score) -> Tensor:
    """Distribution matching (DMD2, arXiv 2405.14867): ½·mean(x − stopgrad(x − g))² in float64,
    whose gradient with respect to the generated videos x is g / x.numel(), where g is
    `sfkernels.dmd_gradient` of what the real and the fake score make of x after noising."""
    with torch.no_grad():
        target = x_BFCHW.double() - dmd_gradient(x_BFCHW, *score(x_BFCHW)).double()
    return 0.5 * F.mse_loss(x_BFCHW.double(), target)


def sid_loss(x_BFCHW: Tensor, score: Score, alpha: float = 1.0) -> Tensor:
    """Score identity distillation (SiD, arXiv 2404.04057): mean of (real − fake)·((real − x) −
    α·(real − fake)) / mean|x − real|, the scores' x0 of x after noising, with the gradient through
    both of them but not through the mean."""
    real_x0, fake_x0 = score(x_BFCHW)
    apart = real_x0 - fake_x0
    error = apart * ((real_x0 - x_BFCHW) - alpha * apart)
    with torch.no_grad():
        size = (x_BFCHW - real_x0).abs().mean((1, 2, 3, 4), keepdim=True)
    return (error / size).nan_to_num().mean()


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
    guidance: float = 3.0,
) -> tuple[Tensor, Tensor]:
    """x0 by the real score, and by the fake one, of generated videos x noised to t; with all but x
    given, a `Score`. guidance: the real score is x0 + guidance·(x0 − x0 of the unprompted)."""
    sigma = schedule.sigma(t_B)
    x_t = add_noise(x_BFCHW, noise_BFCHW, sigma)
    flow = real(x_t, t_B, text_BTE)
    if guidance:
        flow = flow + guidance * (flow - real(x_t, t_B, unprompted_BTE))
    return _x0(x_t, flow, sigma), _x0(x_t, fake(x_t, t_B, text_BTE), sigma)


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
) -> Tensor:
    """Mean of softplus(−(D(fake_t) − D(real_t))) of generated and real videos under the same noise
    at the same t (arXiv 2506.08009, section 3.3). The real logits take no gradient."""
    sigma = schedule.sigma(t_B)
    with torch.no_grad():
        real_B = logits(add_noise(real_BFCHW, noise_BFCHW, sigma))
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
    """Mean of softplus(−(D(real_t) − D(fake_t))) + r1·R1 + r2·R2: `gan_generator_loss` with the
    roles exchanged, and the `finite_difference_penalty` at real_t and at fake_t (arXiv 2506.08009,
    section 3.3 and appendix). fake_step, real_step: ε of the two penalties, as noise. The generated
    videos take no gradient."""
    sigma = schedule.sigma(t_B)
    fake_t, real_t = (add_noise(x, noise_BFCHW, sigma) for x in (fake_BFCHW.detach(), real_BFCHW))
    fake_B, real_B = logits(fake_t), logits(real_t)
    loss = relativistic_loss(real_B, fake_B)
    for weight, x_t, logit_B, step in (
        (r1, real_t, real_B, real_step_BFCHW),
        (r2, fake_t, fake_B, fake_step_BFCHW),
    ):
        perturbed_B = logits(x_t + penalty_sigma * step)
        loss = loss + weight * finite_difference_penalty(logit_B, perturbed_B, penalty_sigma)
    return loss


def _x0(x_BFCHW: Tensor, flow_BFCHW: Tensor, sigma: Tensor) -> Tensor:
    """sigma: [B] or [B, F]."""
    return x_BFCHW - sigma.reshape(sigma.shape + (1,) * (5 - sigma.dim())) * flow_BFCHW
