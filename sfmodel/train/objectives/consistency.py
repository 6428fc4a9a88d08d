"""Causal consistency distillation, which a few-step causal model starts from without stored
trajectories (Causal Forcing++, arXiv 2605.15141; consistency models, arXiv 2303.01469).

Shapes: B samples, F latent frames, C channels, H×W latents, T text rows, E text dim.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from sfkernels import BlockLayout, euler_step
from sfmodel.dit import DiT
from sfmodel.schedule import TRAIN_STEPS, FlowSchedule, add_noise, x0_of
from sfmodel.train.batch import MicroBatch
from sfmodel.train.objectives import Objective


class Consistency(Objective):
    """Equal x0 at neighbouring points of the teacher's ordinary differential equation, of noised
    clips, each chunk given the clean ones before it.

    The levels are those of `trajectories.solve`, one of them a clip. The teacher sees the whole
    noisy clip, or under `causal_teacher`, as in the paper, what the generator sees."""

    needs_teacher = True
    # Public: configs/causal_cd_*.yaml of Causal-Forcing.
    wan_settings: ClassVar[Mapping[str, Any]] = {
        "steps": 3000, "teacher_steps": 48, "guidance_scale": 3.0,
    }  # fmt: skip

    def generator_loss(self, batch: MicroBatch) -> Tensor:
        context, config = batch.context, batch.context.config
        clean, layout, text = batch.clean_BFCHW, batch.batch.layout, batch.text_BTE
        spaced = torch.linspace(1, 0, config.teacher_steps + 1)
        teacher = context.schedule
        if config.teacher_shift is not None:
            teacher = FlowSchedule(config.teacher_shift)
        sigmas = teacher.shifted(spaced).to(clean.device)
        level_B = (batch.draw.uniform("level") * config.teacher_steps).long()
        sigma_B, next_B = sigmas[level_B], sigmas[level_B + 1]
        x = add_noise(clean, batch.noise("noise"), sigma_B)
        real, t_B = context.models.real, TRAIN_STEPS * sigma_B
        assert real is not None
        seen: Any = {"layout": layout, "clean_BFCHW": clean} if config.causal_teacher else {}
        with torch.no_grad():
            guided = config.guidance_scale != 1
            against = real(x, t_B, context.negative_1TE, **seen) if guided else None
            x_next = euler_step(
                x, real(x, t_B, text, **seen), sigma_B, next_B, uncond_flow=against,
                guidance=config.guidance_scale,
            )  # fmt: skip
        points = (x, sigma_B), (x_next, next_B)
        return consistency_loss(context.models.generator, *points, text, layout, clean)


def consistency_loss(
    model: DiT,
    point: tuple[Tensor, Tensor],
    next_point: tuple[Tensor, Tensor],
    text_BTE: Tensor,
    layout: BlockLayout,
    clean_BFCHW: Tensor,
) -> Tensor:
    """Consistency distillation (arXiv 2303.01469, algorithm 2): the mean squared difference of x0
    at two points (x [B, F, C, H, W], σ [B]) of a trajectory, of which the second, less noisy one
    takes no gradient; at σ = 0 it is x0 itself. clean: the latents that chunks see.

    The second x0 is of the weights as they are, without an average of them (arXiv 2310.14189,
    section 3.2); the public Causal-Forcing takes one of 0.99."""

    def x0(x_BFCHW: Tensor, sigma_B: Tensor) -> Tensor:
        flow = model(
            x_BFCHW, TRAIN_STEPS * sigma_B, text_BTE, layout=layout, clean_BFCHW=clean_BFCHW
        )
        return x0_of(x_BFCHW, flow, sigma_B)

    with torch.no_grad():
        target = x0(*next_point)
    return F.mse_loss(x0(*point), target)
