"""Three ways to go on past the window (arXiv 2506.08009, Figure 3), timed in one run.

recompute window: no cache; every denoising step runs all frames of the window.
recompute cache:  the window's clean frames are run again for each chunk, then the chunk denoised.
ring cache:       what has been computed stays; a chunk costs its steps and one clean pass.

While the first window fills, all three compute the same video; that is checked before anything is
timed. Past it the two that recompute forget what the ring still carries from older frames.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor

from bench.flops import rolling_flops
from sfkernels import BlockLayout, RingKVCache
from sfmodel.config import Preset
from sfmodel.dit import DiT
from sfmodel.schedule import FlowSchedule
from sfmodel.stream import FewStepSampler, few_steps

Renoise = Callable[[int], Tensor]


class Way(Protocol):
    name: str

    def next_chunk(self, past: Tensor, noise: Tensor, renoise: Renoise) -> Tensor:
        """x0 [B, F, C, h, w] of the chunk after the clean latents `past`, at most a window's."""
        ...


class RecomputeWindow:
    name = "recompute window"

    def __init__(self, model: DiT, preset: Preset, text: Tensor) -> None:
        self.model, self.text, self.context = model, text, preset.window - preset.chunk
        self.chunk, self.tokens = preset.chunk, preset.grid[0] * preset.grid[1]
        schedule = FlowSchedule(preset.shift)
        self.t = schedule.warp(preset.steps).to(model.device)
        self.sigmas = schedule.sigma(self.t)

    def next_chunk(self, past: Tensor, noise: Tensor, renoise: Renoise) -> Tensor:
        past = past[:, -self.context :]
        frames = past.shape[1] + self.chunk
        layout = BlockLayout.causal(frames, self.chunk, self.tokens)
        is_new = torch.arange(frames, device=noise.device) >= past.shape[1]

        def flow(x: Tensor, step: int) -> Tensor:
            t_BF = torch.where(is_new, self.t[step], 0.0)[None]
            whole = self.model(torch.cat([past, x], 1), t_BF, self.text, layout=layout)
            return whole[:, -self.chunk :]

        return few_steps(flow, self.sigmas, noise, renoise, self.model.impl)


class RecomputeCache:
    name = "recompute cache"

    def __init__(self, model: DiT, preset: Preset, cache: RingKVCache) -> None:
        self.context, self.chunk = preset.window - preset.chunk, preset.chunk
        self.sampler = FewStepSampler(model, cache, FlowSchedule(preset.shift), preset.steps)

    def next_chunk(self, past: Tensor, noise: Tensor, renoise: Renoise) -> Tensor:
        self.sampler.cache.reset()
        if past.shape[1]:
            for clean in past[:, -self.context :].split(self.chunk, 1):
                self.sampler.append(clean)
        return self.sampler.denoise(noise, renoise)


class RingCache:
    name = "ring cache"

    def __init__(self, model: DiT, preset: Preset, cache: RingKVCache) -> None:
        self.sampler = FewStepSampler(model, cache, FlowSchedule(preset.shift), preset.steps)

    def next_chunk(self, past: Tensor, noise: Tensor, renoise: Renoise) -> Tensor:
        x0 = self.sampler.denoise(noise, renoise)
        self.sampler.append(x0)
        return x0


@torch.no_grad()
def compare(
    model: DiT,
    preset: Preset,
    text: Tensor,
    *,
    batch: int = 1,
    chunks: int = 12,
    tick: Callable[[str], None] = lambda _: None,
) -> dict[str, Any]:
    """Times the three ways on the same past, chunk by chunk in turn.

    chunks: timed chunks after the window is full. tick: called with what goes on. Returns seconds
    per chunk of each way, its floating-point operations, and both as ratios to the ring's; the
    sizes; and the largest relative difference within the first window. Raises RuntimeError if that
    is not rounding, in which case there is nothing to time, and ValueError unless the window is a
    whole number of chunks."""
    if preset.window % preset.chunk or preset.window == preset.chunk:
        raise ValueError(f"window={preset.window}: must be two or more chunks of {preset.chunk}")
    caches = [model.new_cache(batch, preset.window, preset.grid) for _ in range(2)]
    for cache in caches:
        model.set_text(cache, text)
    ways: list[Way] = [
        RecomputeWindow(model, preset, text),
        RecomputeCache(model, preset, caches[0]),
        RingCache(model, preset, caches[1]),
    ]
    generator = torch.Generator(model.device).manual_seed(0)
    shape = (batch, preset.chunk, model.config.channels, preset.height, preset.width)
    filling = preset.window // preset.chunk
    past = torch.zeros(batch, 0, *shape[2:], device=model.device)
    seconds: dict[str, list[float]] = {way.name: [] for way in ways}
    worst = 0.0
    for i in range(filling + chunks):
        tick("filling the window" if i < filling else f"chunk {i - filling + 1} of {chunks}")
        draws = torch.randn(len(preset.steps), *shape, generator=generator, device=model.device)
        outs: list[Tensor] = []
        for way in ways:
            _wait(model.device)
            began = time.perf_counter()
            outs.append(way.next_chunk(past, draws[0], draws.__getitem__))
            _wait(model.device)
            if i >= filling:
                seconds[way.name].append(time.perf_counter() - began)
        if i < filling:
            errors = [float((o - outs[-1]).norm() / outs[-1].norm()) for o in outs]
            worst = max(worst, *errors)
            if not worst < (1e-3 if model.dtype == torch.float32 else 5e-2):
                raise RuntimeError(
                    f"the three ways differ by {worst:.1e} in chunk {i}, where they must agree: "
                    "nothing is timed"
                )
        past = torch.cat([past, outs[-1]], 1)[:, -preset.window :]
    flops = rolling_flops(
        model.config,
        preset.grid[0] * preset.grid[1],
        preset.window,
        preset.chunk,
        len(preset.steps),
    )
    median = {name: statistics.median(times) for name, times in seconds.items()}
    return {
        "batch": batch,
        "window": preset.window,
        "chunk": preset.chunk,
        "steps": len(preset.steps),
        "relative_difference_in_first_window": worst,
        "ways": {
            name: {
                "seconds_per_chunk": median[name],
                "all_seconds": seconds[name],
                "flops_per_chunk": batch * flops[name],
                "times_the_ring": median[name] / median["ring cache"],
                "times_the_ring_in_theory": flops[name] / flops["ring cache"],
            }
            for name in seconds
        },
    }


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
