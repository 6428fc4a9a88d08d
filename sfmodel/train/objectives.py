"""Training objectives as pure functions of a model and a batch.

Shapes: B batch, F latent frames, C channels, H×W latents, T text rows, E text dim.
"""

from __future__ import annotations

from torch import Tensor

from sfkernels import BlockLayout
from sfmodel.dit import DiT
from sfmodel.schedule import TRAIN_STEPS, add_noise


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
