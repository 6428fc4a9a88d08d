"""The flow-matching noise schedule, x_t = (1 − σ)·x0 + σ·ε with t = 1000·σ, and the few-step
sampler on it."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from sfkernels import Noise, sampler_step

TRAIN_STEPS = 1000


class FlowSchedule:
    """σ = shift·s / (1 + (shift − 1)·s) for s = 1, 0.999, …, 0.001 (Wan2.1 uses shift 5).

    sigmas, timesteps: float32 [1000], falling; timesteps = 1000·sigmas.
    """

    def __init__(self, shift: float = 5.0) -> None:
        self.shift = shift
        s = torch.linspace(1, 0, TRAIN_STEPS + 1)[:-1]
        self.sigmas = self.shifted(s)
        self.timesteps = self.sigmas * TRAIN_STEPS

    def shifted(self, s: Tensor) -> Tensor:
        """σ of a uniform s in [0, 1]."""
        return self.shift * s / (1 + (self.shift - 1) * s)

    def sigma(self, t: Tensor) -> Tensor:
        """σ of any t (any shape): the table's entry with the nearest t, so that t = 0 gives the
        smallest σ, not 0. For t of a chunk that is clean, use t = 0 and the latents as they are."""
        return self.sigmas.to(t.device)[self._nearest(t)]

    def weight(self, t: Tensor) -> Tensor:
        """Loss weight of the flow at any t (any shape): `flow_weights` of the nearest t."""
        return self.flow_weights().to(t.device)[self._nearest(t)]

    def _nearest(self, t: Tensor) -> Tensor:
        return (self.timesteps.to(t.device) - t.float().unsqueeze(-1)).abs().argmin(-1)

    def warp(self, steps: Sequence[int]) -> Tensor:
        """t of few-step indices in 1..1000, such as [1000, 750, 500, 250] → [1000, 937.5, 833.3,
        625] at shift 5. Raises ValueError for indices outside or not falling."""
        falling = all(a > b for a, b in itertools.pairwise(steps))
        if not steps or not falling or steps[0] > TRAIN_STEPS or steps[-1] < 1:
            raise ValueError(
                f"steps={[*steps]}: must fall from at most {TRAIN_STEPS} to at least 1"
            )
        return self.timesteps[[TRAIN_STEPS - k for k in steps]]

    def flow_weights(self) -> Tensor:
        """Loss weight of each training step, [1000]: exp(−2·((t − 500)/1000)²) minus its minimum,
        normalised to mean 1 (Wan2.1)."""
        bell = torch.exp(-2 * ((self.timesteps - TRAIN_STEPS / 2) / TRAIN_STEPS) ** 2)
        bell = bell - bell.min()
        return bell * (TRAIN_STEPS / bell.sum())


def add_noise(x0: Tensor, noise: Tensor, sigma: Tensor) -> Tensor:
    """x_t of x0 and noise [B, F, ...] for sigma [], [B] or [B, F]."""
    sigma = sigma.reshape(sigma.shape + (1,) * (x0.dim() - sigma.dim()))
    return torch.lerp(x0, noise, sigma.to(x0.dtype))


def x0_of(x: Tensor, flow: Tensor, sigma: Tensor) -> Tensor:
    """x0 that a flow predicts at x [B, F, ...] for sigma [], [B] or [B, F]."""
    return x - sigma.reshape(sigma.shape + (1,) * (x.dim() - sigma.dim())) * flow


def few_step(
    flow: Tensor,
    x: Tensor,
    i: int,
    sigmas: Sequence[Tensor] | Tensor,
    renoise: Callable[[int], Tensor | Noise],
    impl: str = "auto",
) -> tuple[Tensor, Tensor]:
    """Step i of a few-step sampler: from the flow [B, F, C, h, w] at x, x0, and x at the σ of step
    i + 1 with fresh noise, `renoise(i + 1)`; after the last of the falling `sigmas` both are x0."""
    following = () if i + 1 == len(sigmas) else (sigmas[i + 1], renoise(i + 1))
    return sampler_step(x, flow, sigmas[i], *following, impl=impl)


def check_euler(steps: int) -> None:
    """Raises ValueError for a number of Euler steps that the schedule does not have; 0 is none."""
    if not 0 <= steps <= TRAIN_STEPS:
        raise ValueError(f"euler={steps}: must be 0 to {TRAIN_STEPS} steps")
