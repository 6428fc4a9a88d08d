"""Training objectives as pure functions of models and a batch.

Teacher and diffusion forcing learn from clips. DMD and SiD learn from what the generator makes:
each is a scalar whose gradient with respect to the generated video is what `Rollout.backward`
takes. Their scores are bidirectional: a real one that is frozen, a fake one that `critic_loss`
keeps up with the generator.

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

LOWEST, HIGHEST = 20, 980  # timesteps at which generated videos are scored


def teacher_forcing_loss(
    model: DiT,
    clean_BFCHW: Tensor,
    context_BFCHW: Tensor,
    noise_BFCHW: Tensor,
    sigma_BF: Tensor,
    text_BTE: Tensor,
    layout: BlockLayout,
    min_sigma: float = 0.3,
    seen_BFCHW: Tensor | None = None,
) -> Tensor:
    """Flow matching of every chunk given the clean ones before it (arXiv 2506.08009, section 3.1):
    mean of w(σ)·‖flow − (ε − x0)‖², a scalar.

    context: what the clean half of the sequence holds: the clean latents, or lightly noised ones,
    which makes a model less sure of its past. sigma: noise level of each frame, equal within a
    chunk. w = min(1, σ/min_sigma)²: the error of x0 counts as 1/max(σ, min_sigma)², so that the
    finest levels, where the flow of a given x0 error is unbounded, do not drown the others. seen:
    the latents that are noised, where they are not the clean ones: what a sampler's own x0 looks
    like. The flow to learn leads from the noisy latents to the clean ones all the same.
    """
    x = add_noise(clean_BFCHW if seen_BFCHW is None else seen_BFCHW, noise_BFCHW, sigma_BF)
    t = sigma_BF * TRAIN_STEPS
    flow = model(x, t, text_BTE, layout=layout, clean_BFCHW=context_BFCHW)
    return _flow_error(flow, x, clean_BFCHW, sigma_BF, min_sigma)


def diffusion_forcing_loss(
    model: DiT,
    clean_BFCHW: Tensor,
    noise_BFCHW: Tensor,
    sigma_BF: Tensor,
    text_BTE: Tensor,
    layout: BlockLayout,
    min_sigma: float = 0.3,
) -> Tensor:
    """Flow matching where every chunk has a noise level of its own and sees the ones before it as
    noisy as they are (arXiv 2506.08009, section 3.1); arguments and weight of
    `teacher_forcing_loss`."""
    x = add_noise(clean_BFCHW, noise_BFCHW, sigma_BF)
    flow = model(x, sigma_BF * TRAIN_STEPS, text_BTE, layout=layout)
    return _flow_error(flow, x, clean_BFCHW, sigma_BF, min_sigma)


def _flow_error(
    flow: Tensor, x: Tensor, clean_BFCHW: Tensor, sigma_BF: Tensor, min_sigma: float
) -> Tensor:
    """Mean of w(σ)·‖flow − (x − x0)/σ‖²."""
    level = sigma_BF[:, :, None, None, None]
    weight = (level / min_sigma).clamp(max=1)
    return (weight * (flow - (x - clean_BFCHW) / level)).square().mean()


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
) -> Tensor:
    """Initialisation of a few-step causal model (CausVid, arXiv 2412.07772): the mean
    squared error of x0. x: points of the teacher's deterministic trajectories that end in `clean`,
    each chunk's at its own few-step timestep t."""
    flow = model(x_BFCHW, t_BF, text_BTE, layout=layout)
    return F.mse_loss(_x0(x_BFCHW, flow, schedule.sigma(t_BF)), clean_BFCHW.float())


def critic_loss(
    fake: DiT,
    x_BFCHW: Tensor,
    noise_BFCHW: Tensor,
    t_B: Tensor,
    text_BTE: Tensor,
    schedule: FlowSchedule,
) -> Tensor:
    """Flow matching of generated videos x: the fake score of DMD and SiD, learned by the
    flow ε − x."""
    x_t = add_noise(x_BFCHW, noise_BFCHW, schedule.sigma(t_B))
    return F.mse_loss(fake(x_t, t_B, text_BTE), noise_BFCHW - x_BFCHW)


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


def _x0(x_BFCHW: Tensor, flow_BFCHW: Tensor, sigma: Tensor) -> Tensor:
    """sigma: [B] or [B, F]."""
    return x_BFCHW - sigma.reshape(sigma.shape + (1,) * (5 - sigma.dim())) * flow_BFCHW
