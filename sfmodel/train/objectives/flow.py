"""Flow matching of clips: teacher forcing, diffusion forcing and bidirectional models.

Shapes: B samples, F latent frames, C channels, H×W latents, T text rows, E text dim.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from torch import Tensor

from sfkernels import BlockLayout
from sfmodel.dit import DiT
from sfmodel.schedule import TRAIN_STEPS, add_noise
from sfmodel.train.batch import MicroBatch
from sfmodel.train.objectives import Objective


class FlowMatching(Objective):
    """Flow matching at one noise level a chunk."""

    # Not published: those of fine-tuning.
    wan_settings: ClassVar[Mapping[str, Any]] = {
        "steps": 3000, "lr": 1e-5, "warmup": 100, "betas": (0.9, 0.999),
    }  # fmt: skip

    def generator_loss(self, batch: MicroBatch) -> Tensor:
        context, clean, layout = batch.context, batch.clean_BFCHW, batch.batch.layout
        model, config = context.models.generator, context.config
        s_BK = batch.draw.uniform("level", len(layout.chunks)).clamp(min=1 / TRAIN_STEPS)
        sigma_BF, masked = batch.by_frame(context.schedule.shifted(s_BK)), batch.batch.masked
        sigma_BF[:, :masked] = 0
        weight_BF = batch.flow_weight(sigma_BF * TRAIN_STEPS)
        shared = batch.noise("noise"), sigma_BF, batch.text_BTE, layout, weight_BF
        if not layout.teacher_forcing:
            return diffusion_forcing_loss(model, clean, *shared, masked=masked)
        # The x0 of a few large steps is a mean, which is darker than any sample. A model that has
        # seen such pictures, in its context and under the noise, brings the light back.
        past = seen = clean
        if config.darken:
            assert context.dark_CHW is not None
            missing = context.dark_CHW - clean
            share = config.darken * batch.draw.uniform("fade", 2, 1, 1, 1, 1)
            seen, past = clean + share[:, 0] * missing, clean + share[:, 1] * missing
        if config.context_noise:
            level = config.context_noise * batch.draw.uniform("context level", 1, 1, 1, 1)
            past = past + level * batch.noise("context noise")
        return teacher_forcing_loss(model, clean, past, *shared, seen_BFCHW=seen, masked=masked)


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
    masked: int = 0,
) -> Tensor:
    """Flow matching of every chunk given the clean ones before it (arXiv 2506.08009, section 3.1):
    mean of w·‖flow − (ε − x0)‖², a scalar.

    context: what the clean half of the sequence holds: the clean latents, or lightly noised ones,
    which makes a model less sure of its past. sigma: noise level of each frame, equal within a
    chunk. weight: w of each frame, 1 if None: `FlowSchedule.weight` is Wan2.1's; min(1, σ/σ_min)²
    counts the error of x0 as 1/max(σ, σ_min)², so that the finest levels, where the flow of a given
    x0 error is unbounded, do not drown the others. seen: the latents that are noised, where they
    are not the clean ones: what a sampler's own x0 looks like. The flow to learn leads from the
    noisy latents to the clean ones all the same. masked: first frames that the mean leaves out,
    whose sigma may be 0.
    """
    x = add_noise(clean_BFCHW if seen_BFCHW is None else seen_BFCHW, noise_BFCHW, sigma_BF)
    t = sigma_BF * TRAIN_STEPS
    flow = model(x, t, text_BTE, layout=layout, clean_BFCHW=context_BFCHW)
    return _flow_error(flow, x, clean_BFCHW, sigma_BF, weight_BF, masked)


def diffusion_forcing_loss(
    model: DiT,
    clean_BFCHW: Tensor,
    noise_BFCHW: Tensor,
    sigma_BF: Tensor,
    text_BTE: Tensor,
    layout: BlockLayout,
    weight_BF: Tensor | None = None,
    masked: int = 0,
) -> Tensor:
    """Flow matching where every chunk has a noise level of its own and sees the ones before it as
    noisy as they are (arXiv 2506.08009, section 3.1); arguments of
    `teacher_forcing_loss`. One chunk is a bidirectional model."""
    x = add_noise(clean_BFCHW, noise_BFCHW, sigma_BF)
    flow = model(x, sigma_BF * TRAIN_STEPS, text_BTE, layout=layout)
    return _flow_error(flow, x, clean_BFCHW, sigma_BF, weight_BF, masked)


def _flow_error(
    flow: Tensor, x: Tensor, clean_BFCHW: Tensor, sigma_BF: Tensor, weight_BF: Tensor | None,
    masked: int,
) -> Tensor:  # fmt: skip
    """Mean of w·‖flow − (x − x0)/σ‖² of all frames but the first `masked` ones."""
    want = (x - clean_BFCHW)[:, masked:] / sigma_BF[:, masked:, None, None, None]
    error = (flow[:, masked:] - want).square()
    return (error if weight_BF is None else weight_BF[:, masked:, None, None, None] * error).mean()
