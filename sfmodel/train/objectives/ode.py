"""Regression to the ends of a teacher's trajectories, which a few-step causal model starts from
(CausVid, arXiv 2412.07772).

Shapes: B samples, F latent frames, C channels, H×W latents, T text rows, E text dim.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from sfkernels import BlockLayout
from sfmodel.dit import DiT
from sfmodel.schedule import FlowSchedule, x0_of
from sfmodel.train.batch import MicroBatch
from sfmodel.train.objectives import Objective


class ODERegression(Objective):
    """Regression of x0 from each chunk at one of the few steps; without clean context also from
    what is clean already."""

    needs_clips = False
    needs_teacher = True
    needs_trajectories = True

    def generator_loss(self, batch: MicroBatch) -> Tensor:
        assert batch.points_BSFCHW is not None
        context, layout, clean = batch.context, batch.batch.layout, batch.points_BSFCHW[:, -1]
        t_BF, x = batch.at_few_steps(batch.points_BSFCHW, clean_too=not layout.teacher_forcing)
        past = clean if layout.teacher_forcing else None
        shared = clean, batch.text_BTE, layout, context.schedule, past
        masked = batch.batch.masked
        return ode_regression_loss(context.models.generator, x, t_BF, *shared, masked=masked)


def ode_regression_loss(
    model: DiT,
    x_BFCHW: Tensor,
    t_BF: Tensor,
    clean_BFCHW: Tensor,
    text_BTE: Tensor,
    layout: BlockLayout,
    schedule: FlowSchedule,
    context_BFCHW: Tensor | None = None,
    masked: int = 0,
) -> Tensor:
    """Initialisation of a few-step causal model (CausVid, arXiv 2412.07772): the mean
    squared error of x0. x: points of the teacher's deterministic trajectories that end in `clean`,
    each chunk's at its own few-step timestep t. context: what the clean half of a layout with
    teacher forcing holds. masked: first frames that the mean leaves out."""
    flow = model(x_BFCHW, t_BF, text_BTE, layout=layout, clean_BFCHW=context_BFCHW)
    x0 = x0_of(x_BFCHW, flow, schedule.sigma(t_BF))
    return F.mse_loss(x0[:, masked:], clean_BFCHW[:, masked:].float())
