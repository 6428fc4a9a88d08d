"""A whole clip at once, by a bidirectional model in many steps with guidance: Wan2.1 as it was
published, which the paper's Table 1 has for comparison.

Samplers: Euler, and UniPC (arXiv 2302.04867) of order 2 in x0 with B(h) = e^h − 1, both at noise
levels σ that are equally spaced before the schedule's shift.

Shapes: B clips, F latent frames, C channels, h×w latents, T text rows, E text dim.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from dataclasses import replace
from typing import cast

import torch
from torch import Tensor

from sfkernels import Noise, euler_step, normal
from sfkernels.arguments import check_count, check_shape
from sfmodel.config import Preset, check_seed
from sfmodel.dit import DiT
from sfmodel.frames import FrameStream
from sfmodel.ranges import phase
from sfmodel.schedule import TRAIN_STEPS, FlowSchedule
from sfmodel.vae.codec import VideoDecoder

SAMPLERS = ("euler", "unipc")


def levels(sampler: str, steps: int, shift: float) -> list[float]:
    """σ of each step, falling, and 0. UniPC, which takes logarithms, begins just below 1."""
    begin = 1.0 if sampler == "euler" else 1 - 1 / TRAIN_STEPS
    spaced = torch.linspace(begin, 0, steps + 1, dtype=torch.float64)
    return FlowSchedule(shift).shifted(spaced).tolist()


class UniPC:
    """Steps of UniPC. sigmas: of the steps, and 0. `step(x, x0)` takes x at the next level from x
    at this one and what the model sees in it, after correcting x by the same."""

    def __init__(self, sigmas: list[float]) -> None:
        self.sigmas, self.i = sigmas, 0
        self.seen: list[Tensor] = []  # x0 of this level and of the one before, the newest first
        self.x: Tensor | None = None  # at the level before, corrected

    def step(self, x: Tensor, x0: Tensor) -> Tensor:
        if self.x is not None:
            x = self._advance(self.x, self.i - 1, min(2, self.i), x0)
        self.seen = [x0, *self.seen[:1]]
        left = len(self.sigmas) - 1 - self.i
        order = min(2, self.i + 1, left)
        self.x, self.i = x, self.i + 1
        return self._advance(x, self.i - 1, order, None)

    def _advance(self, x: Tensor, i: int, order: int, x0: Tensor | None) -> Tensor:
        """x at level i + 1 from that at level i; x0: what the model sees there, to correct it."""
        now, then = self.sigmas[i], self.sigmas[i + 1]
        newest = self.seen[0]
        if not then:
            return newest
        h = _log_ratio(then) - _log_ratio(now)
        b = -math.expm1(-h)  # B(h), of the reverse sign
        out = then / now * x + (1 - then) * b * newest
        older = []
        if order == 2:
            r = (_log_ratio(self.sigmas[i - 1]) - _log_ratio(now)) / h
            older = [(r, (self.seen[1] - newest) / r)]
        if x0 is None:
            return out + sum((1 - then) * b * 0.5 * d for _, d in older)
        points = [r for r, _ in older] + [1.0]
        weights = _corrector(points, h)
        differences = [d for _, d in older] + [x0 - newest]
        return out + sum((1 - then) * b * w * d for w, d in zip(weights, differences, strict=True))


def _log_ratio(sigma: float) -> float:
    """λ, the logarithm of the signal over the noise."""
    return math.log(1 - sigma) - math.log(sigma)


def _corrector(points: list[float], h: float) -> list[float]:
    """Weights of the corrector's differences at points r, exact for polynomials of their number
    (section 3.2 of the paper, equation 5); of one point always a half."""
    if len(points) == 1:
        return [0.5]
    hh, phi_1 = -h, math.expm1(-h)
    phi, factorial, right = phi_1 / hh - 1, 1.0, []
    for k in range(1, len(points) + 1):
        right.append(phi * factorial / phi_1)
        factorial *= k + 1
        phi = phi / hh - 1 / factorial
    matrix = torch.tensor([[r ** (k - 1) for r in points] for k in range(1, len(points) + 1)],
                          dtype=torch.float64)  # fmt: skip
    weights: list[float] = torch.linalg.solve(
        matrix, torch.tensor(right, dtype=torch.float64)
    ).tolist()
    return weights


class WholeClip(FrameStream):
    """A clip of `preset.chunk` latent frames, by a model that sees all of them at once.

    text, negative [1 or B, T, E]: prompt embeddings, and what guidance leads away from; without
    guidance (1) the second is not needed. sampler: "euler" or "unipc". seed: as of `Stream`, the
    clip of seed + b. Raises ValueError for sizes that do not fit together."""

    @torch.no_grad()
    def __init__(
        self,
        model: DiT,
        codec: VideoDecoder | None,
        text_BTE: Tensor,
        preset: Preset,
        *,
        negative_BTE: Tensor | None = None,
        guidance: float = 5.0,
        sampler: str = "unipc",
        steps: int = 50,
        seed: int = 0,
        batch: int = 1,
    ) -> None:
        check_seed(seed, batch)
        check_count("steps", steps, most=TRAIN_STEPS)
        if sampler not in SAMPLERS:
            raise ValueError(f"sampler={sampler!r}: must be one of {', '.join(SAMPLERS)}")
        if guidance != 1 and negative_BTE is None:
            raise ValueError(f"guidance={guidance:g}: needs a negative prompt to lead away from")
        for name, each in (("text", text_BTE), ("negative", negative_BTE)):
            if each is not None:
                check_shape(name, each, ("B", "T", model.config.text_dim))
                if len(each) not in (1, batch):
                    raise ValueError(f"{name} has {len(each)} prompts: must be 1 or {batch}")
        self.model, self.sampler, self.steps, self.guidance = model, sampler, steps, guidance
        self.sigmas = levels(sampler, steps, preset.shift)
        self.text = model.text_keys(text_BTE)
        guided = negative_BTE is not None and guidance != 1
        self.negative = model.text_keys(cast(Tensor, negative_BTE)) if guided else None
        self.seed_B = torch.arange(seed, seed + batch, device=model.device)
        super().__init__(codec, replace(preset, first=None), batch, model.device)

    @torch.no_grad()
    def denoise(self) -> Tensor:
        """The clip's clean latents x0 [B, F, C, h, w] in float32. Raises ValueError when called
        again: there is one clip."""
        *_, latents = self.denoised()
        return latents

    @torch.no_grad()
    def denoised(self) -> Iterator[Tensor]:
        """x after each step, the last the clip's clean latents, where `denoise` leaves them."""
        if self.handed_out or self.decoded:
            raise ValueError(f"a whole clip has {self.preset.chunk} latent frames: no more to come")
        latents = self.latents_BFCHW[self.size]
        frame_F = torch.arange(self.size, dtype=torch.int32, device=self.device)
        x = normal(Noise(self.seed_B, frame_F, 0), latents.shape, impl=self.model.impl)
        solver = UniPC(self.sigmas)
        for i, (now, then) in enumerate(itertools.pairwise(self.sigmas), 1):
            with phase(f"step {i}"):
                t = torch.tensor(TRAIN_STEPS * now, dtype=torch.float32, device=self.device)
                flow = self.model(x, t, self.text)
                if self.negative is not None:
                    flow = torch.lerp(self.model(x, t, self.negative), flow, self.guidance)
                if self.sampler == "unipc":
                    x = solver.step(x, x - now * flow)
                else:
                    at = [
                        torch.tensor(s, dtype=torch.float32, device=self.device)
                        for s in (now, then)
                    ]
                    x = euler_step(x, flow, *at, impl=self.model.impl)
            yield x
        latents.copy_(x)
        yield latents
