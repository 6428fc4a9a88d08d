"""Score identity distillation (SiD, arXiv 2404.04057): the scores and the critic of DMD, and a
loss whose gradient goes through both scores.

Shapes: B samples, F latent frames, C channels, H×W latents.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor

from sfmodel.train.batch import MicroBatch
from sfmodel.train.objectives.dmd import DMD, Score


class SiD(DMD):
    """Score identity distillation."""

    wan_settings: ClassVar[Mapping[str, Any]] = {"lr_critic": 2e-6, "weight_decay": 0.0}

    def generator_loss(self, batch: MicroBatch, video_BFCHW: Tensor) -> Tensor:
        alpha, masked = batch.context.config.sid_alpha, batch.batch.masked
        return sid_loss(video_BFCHW, self.score(batch), alpha, masked)


def sid_loss(x_BFCHW: Tensor, score: Score, alpha: float = 1.0, masked: int = 0) -> Tensor:
    """Score identity distillation (SiD, arXiv 2404.04057): mean of (real − fake)·((real − x) −
    α·(real − fake)) / mean|x − real|, the scores' x0 of x after noising, with the gradient through
    both of them but not through the mean. masked: first frames that the outer mean leaves out."""
    real_x0, fake_x0 = score(x_BFCHW)
    apart = real_x0 - fake_x0
    error = apart * ((real_x0 - x_BFCHW) - alpha * apart)
    with torch.no_grad():
        size = (x_BFCHW - real_x0).abs().mean((1, 2, 3, 4), keepdim=True)
    return (error / size).nan_to_num()[:, masked:].mean()
