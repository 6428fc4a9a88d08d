"""The generation loop: chunk by chunk through the ring cache, frames out as they are ready."""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from sfkernels import Noise, RingKVCache, normal, sampler_step
from sfmodel.config import Preset, check_seed
from sfmodel.dit import DiT
from sfmodel.schedule import FlowSchedule
from sfmodel.vae.codec import VideoDecoder


def few_steps(
    flow: Callable[[Tensor, int], Tensor],
    sigmas: Tensor,
    noise: Tensor,
    renoise: Callable[[int], Tensor | Noise],
    impl: str = "auto",
) -> Tensor:
    """x0 after all steps: from the flow at (x, step i), x0; then fresh noise, `renoise(i + 1)`, up
    to the next of the falling `sigmas` [steps]."""
    x = noise
    for i in range(len(sigmas)):
        x0, x = few_step(x, flow(x, i), sigmas, i, renoise, impl)
    return x0


def few_step(
    x: Tensor,
    flow: Tensor,
    sigmas: Tensor,
    i: int,
    renoise: Callable[[int], Tensor | Noise],
    impl: str,
) -> tuple[Tensor, Tensor]:
    """From the flow at (x, step i): x0, and x at the σ of step i + 1; after the last step both are
    x0."""
    following = () if i + 1 == len(sigmas) else (sigmas[i + 1], renoise(i + 1))
    return sampler_step(x, flow, sigmas[i], *following, impl=impl)


class FewStepSampler:
    """Generates the next chunk of a stream with a few-step causal model (arXiv 2506.08009,
    algorithm 2): predict x0, renoise to the next level, and at last one clean pass that leaves the
    chunk's final keys and values in the cache.

    steps: falling indices in 1..1000, warped by the schedule. Everything that depends on them alone
    is computed here, once.
    """

    def __init__(
        self, model: DiT, cache: RingKVCache, schedule: FlowSchedule, steps: Sequence[int]
    ) -> None:
        self.model, self.cache = model, cache
        t = schedule.warp(steps).to(model.device)
        self.sigmas = schedule.sigma(t)
        self.modulations = [model.modulation(one) for one in t]
        self.clean = model.modulation(torch.zeros((), device=model.device))

    def denoise(self, noise_BFCHW: Tensor, renoise: Callable[[int], Tensor | Noise]) -> Tensor:
        """x0 of the next chunk, float32, from its initial noise; `renoise(i)` gives the fresh noise
        before step i. The cache is left holding keys and values of the last noisy step."""
        return few_steps(self._flow, self.sigmas, noise_BFCHW, renoise, self.model.impl)

    def step(
        self, x_BFCHW: Tensor, i: int, renoise: Callable[[int], Tensor | Noise]
    ) -> tuple[Tensor, Tensor]:
        """Step i of `denoise` alone: x0 as predicted from x, and x for step i + 1, which after the
        last step is x0 too."""
        flow = self._flow(x_BFCHW, i)
        return few_step(x_BFCHW, flow, self.sigmas, i, renoise, self.model.impl)

    def integrate(self, noise_BFCHW: Tensor) -> Tensor:
        """x0 of the next chunk by Euler steps of dx/dσ = flow, for models not distilled."""
        x = noise_BFCHW
        following = [*self.sigmas[1:], torch.zeros_like(self.sigmas[0])]
        for i, (now, then) in enumerate(zip(self.sigmas, following, strict=True)):
            x = x + (then - now) * self._flow(x, i)
        return x

    def _flow(self, x_BFCHW: Tensor, i: int) -> Tensor:
        return self.model(x_BFCHW, self.modulations[i], None, cache=self.cache)

    def append(self, x0_BFCHW: Tensor) -> None:
        """The cache-update pass: the chunk's clean keys and values become the past."""
        self.model(x0_BFCHW, self.clean, None, cache=self.cache)
        self.cache.commit(x0_BFCHW.shape[1])


@torch.no_grad()
def stream_latents(
    model: DiT,
    text_BTE: Tensor,
    preset: Preset,
    *,
    seed: int = 0,
    batch: int = 1,
    initial_BFCHW: Tensor | None = None,
) -> Iterator[Tensor]:
    """Endless clean latents, one chunk [batch, F, C, h, w] in float32 at a time, as soon as its
    last step is done: its cache-update pass runs when the next chunk is asked for. That pass still
    reads the latents, so they must not be changed in place.

    text: prompt embeddings [1 or batch, T, text_dim]. preset: sizes, chunks, window, sink, steps.
    initial: latents that come before the first one generated (image-to-video, continuation), whole
    chunks; they are not yielded.
    Sample b of the batch is the video of seed + b, the same on any device, in any batch and by any
    implementation, up to rounding. Raises ValueError where sizes do not fit together and
    MemoryError where the cache does not fit.
    """
    check_seed(seed, batch)
    preset.check()
    first = preset.first or preset.chunk
    cache = model.new_cache(batch, preset.window, preset.grid, preset.sink)
    model.set_text(cache, text_BTE)
    sampler = FewStepSampler(model, cache, FlowSchedule(preset.shift), preset.steps)
    seed_B = torch.arange(seed, seed + batch, device=model.device)
    sizes = itertools.chain([first], itertools.repeat(preset.chunk))

    if initial_BFCHW is not None:
        remaining = initial_BFCHW.float()
        while remaining.shape[1]:
            size = next(sizes)
            if size > remaining.shape[1]:
                raise ValueError(
                    f"initial has {initial_BFCHW.shape[1]} latent frames: must be {first} plus a "
                    f"multiple of {preset.chunk}"
                )
            sampler.append(remaining[:, :size])
            remaining = remaining[:, size:]

    for size in sizes:
        shape = (batch, size, model.config.channels, preset.height, preset.width)
        noise = functools.partial(Noise, seed_B, cache.chunk(size).frame_F)
        x0 = sampler.denoise(normal(noise(0), shape, impl=model.impl), noise)
        yield x0
        sampler.append(x0)


@torch.no_grad()
def stream(
    model: DiT,
    codec: VideoDecoder,
    text_BTE: Tensor,
    preset: Preset,
    *,
    frames: int | None = None,
    seed: int = 0,
    batch: int = 1,
) -> Iterator[Tensor]:
    """Decoded video, one chunk of pixel frames [batch, T, 3, H, W] in about [-1, 1] at a time, as
    soon as it is ready; `frames` pixel frames in all, endless if None. Memory does not grow.

    The arguments are those of `stream_latents`. Raises ValueError for frames below 1."""
    if frames is not None and frames < 1:
        raise ValueError(f"frames={frames}: must be at least 1")
    state = None
    left = math.inf if frames is None else frames
    for latents in stream_latents(model, text_BTE, preset, seed=seed, batch=batch):
        pixels, state = codec.decode_chunk(latents, state)
        pixels = pixels[:, : int(min(left, pixels.shape[1]))]
        yield pixels
        left -= pixels.shape[1]
        if left <= 0:
            return
