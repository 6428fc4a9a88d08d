"""Self-rollout: a clip that a few-step model generates on its own context, and its gradient
(arXiv 2506.08009, algorithm 1).

No gradient flows from a chunk into an earlier one, so that given the gradient of the loss with
respect to the video, each chunk has its backward pass alone: its exit step is run again, now with
gradient, on the input and on the keys and values that it had. That is what checkpointing of the
whole rollout would compute, with the activations of one step of one chunk in memory at a time,
however many steps come before the exit and however many chunks there are.

Shapes: B batch, F latent frames of the clip, C channels, H×W latents.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from sfkernels import BlockLayout, sampler_step
from sfmodel.blocks import Past, TextKeys
from sfmodel.dit import DiT
from sfmodel.schedule import FlowSchedule, add_noise, few_step


@dataclass(eq=False)
class Rollout:
    """A clip that `generate` makes and through which `backward` takes a gradient.

    layout: chunks, window, sink and whether the last chunk sees the first; not teacher forcing.
    steps: falling indices in 1..1000, warped by the schedule. exit_step: index of the step whose
    prediction of x0 is each chunk's result and carries the gradient, the same for all of them.
    noise [B, F, C, H, W]: the latents at the first step. renoise [B, F, len(steps) - 1, C, H, W]:
    fresh noise before each further one. context_noise, as noise: lightly noises, at the schedule's
    smallest σ, what later chunks see of each; None leaves it clean. text: prompt embeddings.
    gradient_frames: backward passes only for chunks that begin in the last so many frames (None:
    all); the others are context.

    Raises ValueError for sizes that do not fit together.
    """

    model: DiT
    layout: BlockLayout
    schedule: FlowSchedule
    steps: Sequence[int]
    exit_step: int
    noise_BFCHW: Tensor
    renoise_BFSCHW: Tensor
    text_BTE: Tensor
    context_noise_BFCHW: Tensor | None = None
    gradient_frames: int | None = None

    def __post_init__(self) -> None:
        layout, last = self.layout, len(self.steps) - 1
        batch, frames, *shape = self.noise_BFCHW.shape
        if layout.teacher_forcing or layout.frames != frames:
            raise ValueError(
                f"layout has {layout.frames} frames, teacher_forcing={layout.teacher_forcing}: a "
                f"rollout of {frames} frames takes one of as many, without"
            )
        if not 0 <= self.exit_step <= last:
            raise ValueError(f"exit_step={self.exit_step}: must be from 0 to {last}")
        got, want = [*self.renoise_BFSCHW.shape], [batch, frames, last, *shape]
        if got != want:
            raise ValueError(f"renoise has shape {got}: must be {want}")
        self.t = self.schedule.warp(self.steps).to(self.model.device)
        self.sigmas = self.schedule.sigma(self.t)
        ends = [*itertools.accumulate(layout.chunks)]
        sizes = zip(ends, layout.chunks, strict=True)
        self.chunks = [slice(end - size, end) for end, size in sizes]
        keep_from = 0 if self.gradient_frames is None else frames - self.gradient_frames
        self.with_gradient = [chunk.start >= keep_from for chunk in self.chunks]

    @torch.no_grad()
    def generate(self) -> Tensor:
        """The video [B, F, C, H, W] in float32. Keeps what `backward` needs: the keys and values of
        the clip, and the input of each chunk's exit step."""
        model, clean = self.model, torch.zeros((), device=self.model.device)
        self.k, self.v = self._new_cache()
        self.keys = model.text_keys(self.text_BTE)
        self.exit_inputs: list[Tensor] = []
        video = []
        for i, chunk in enumerate(self.chunks):
            x, fresh = self.noise_BFCHW[:, chunk].float(), self.renoise_BFSCHW[:, chunk]
            noises = {n + 1: fresh[:, :, n].contiguous() for n in range(self.exit_step)}
            for step in range(self.exit_step):
                flow = self._flow(i, x, self.t[step])
                _, x = few_step(flow, x, step, self.sigmas, noises.__getitem__, model.impl)
            self.exit_inputs.append(x)
            x0 = self._x0(i)
            video.append(x0)
            if self.context_noise_BFCHW is not None:
                noise = self.context_noise_BFCHW[:, chunk].float()
                x0 = add_noise(x0, noise, self.schedule.sigma(clean))
            model.append(x0, clean, self.keys, past=self._past(i))
        return torch.cat(video, 1)

    def backward(self, upstream_BFCHW: Tensor) -> None:
        """Adds to the parameters' gradients those of a loss whose gradient with respect to the
        video is `upstream` [B, F, C, H, W], any number of times once it is generated."""
        with torch.enable_grad():
            # All chunks share the prompt's keys: their gradients meet there and go back once.
            keys = self.model.text_keys(self.text_BTE)
            learned = [each for pair in keys for each in pair if each.requires_grad]
            cut = [[each.detach().requires_grad_(each.requires_grad) for each in k] for k in keys]
            self.keys = TextKeys(*cut)
            for i, chunk in enumerate(self.chunks):
                if self.with_gradient[i]:
                    self._x0(i).backward(upstream_BFCHW[:, chunk])
            if learned:  # not so where a LoRA leaves them alone
                grads = [each.grad for k in cut for each in k if each.requires_grad]
                torch.autograd.backward(learned, grads)

    def _new_cache(self) -> tuple[Tensor, Tensor]:
        """Keys and values of the whole clip, [layers, B, L, heads, head_dim] each."""
        config, device = self.model.config, self.model.device
        half = torch.is_autocast_enabled(device.type)
        dtype = torch.get_autocast_dtype(device.type) if half else self.model.dtype
        size = (
            config.layers,
            len(self.noise_BFCHW),
            self.layout.tokens,
            config.heads,
            config.head_dim,
        )
        k, v = (torch.zeros(size, dtype=dtype, device=device) for _ in range(2))
        return k, v

    def _past(self, i: int) -> Past:
        begin = self.chunks[i].start * self.layout.frame_tokens
        spans = ((lo, min(hi, begin)) for lo, hi in self.layout.rows[i].keys if lo < begin)
        return Past(self.k, self.v, tuple(spans), self.chunks[i].start)

    def _flow(self, i: int, x_BFCHW: Tensor, t: Tensor) -> Tensor:
        return self.model(x_BFCHW, t, self.keys, past=self._past(i))

    def _x0(self, i: int) -> Tensor:
        """x0 of chunk i by its exit step."""
        x, sigma = self.exit_inputs[i], self.sigmas[self.exit_step]
        flow = self._flow(i, x, self.t[self.exit_step])
        return sampler_step(x, flow, sigma, impl=self.model.impl)[0]
