"""Self-rollout: a video that a few-step model generates on its own context, and its gradient
(arXiv 2506.08009, algorithm 1).

No gradient flows from a chunk into an earlier one, so that given the gradient of the loss with
respect to the video, each chunk has its backward pass alone: its exit step is run again, now with
gradient, on the input and on the keys and values that it had. That is what checkpointing of the
whole rollout would compute, with the activations of one step of one chunk in memory at a time,
however many steps come before the exit and however many chunks there are.

Keys and values lie in a ring of what is seen at once, so that a rollout of any length takes the
memory of its window and of the frames that take a gradient.

Shapes: B batch, F latent frames, C channels, H×W latents, T text rows, E text dim.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from sfkernels import BlockLayout, rotate_keys, sampler_step
from sfkernels.kv_cache import place
from sfkernels.layout import check_positions, merge
from sfmodel.blocks import Past, TextKeys
from sfmodel.dit import DiT
from sfmodel.schedule import FlowSchedule, add_noise, few_step
from sfmodel.vae.codec import VideoCodec

# Noise [B, F, C, H, W] of a slice of frames: before step i, of their context at i = len(steps).
ChunkNoise = Callable[[slice, int], Tensor]


@dataclass(eq=False)
class Rollout:
    """A video that `generate` makes and through which `backward` takes a gradient.

    layout: chunks, window, sink and whether the last chunk sees the first; not teacher forcing.
    steps: falling indices in 1..1000, warped by the schedule. exit_steps: of each chunk the index
    of the step whose prediction of x0 is its result and carries the gradient. noise: what each
    chunk begins with, goes on with before further steps and, if renoise_context is set, is noised
    with at the schedule's smallest σ where later chunks see it. text [B, T, E]: prompts.
    positions: of the sink, as of `sfkernels.RingKVCache`. still [B, F, C, H, W]: the first chunk,
    where it is given; what sees it sees it clean.
    frames: how many there are in the video, the last ones (None: all). gradient_frames: backward
    passes only for chunks that begin in the last so many (None: all); the others are context.

    Raises ValueError for sizes that do not fit together.
    """

    model: DiT
    layout: BlockLayout
    schedule: FlowSchedule
    steps: Sequence[int]
    exit_steps: Sequence[int]
    noise: ChunkNoise
    text_BTE: Tensor
    renoise_context: bool = False
    positions: str = "absolute"
    still_BFCHW: Tensor | None = None
    frames: int | None = None
    gradient_frames: int | None = None

    def __post_init__(self) -> None:
        layout, last, given = self.layout, len(self.steps) - 1, self.still_BFCHW
        count, total = len(layout.chunks), layout.frames
        if layout.teacher_forcing:
            raise ValueError("layout has teacher_forcing=True: a rollout takes one without")
        if len(self.exit_steps) != count or not all(0 <= step <= last for step in self.exit_steps):
            raise ValueError(
                f"exit_steps={self.exit_steps}: must be from 0 to {last}, one of each of the "
                f"{count} chunks"
            )
        check_positions(self.positions)
        if given is not None and given.shape[1] != layout.chunks[0]:
            raise ValueError(
                f"still has {given.shape[1]} latent frames: must have {layout.chunks[0]}, as the "
                "first chunk"
            )
        self.t = self.schedule.warp(self.steps).to(self.model.device)
        self.sigmas = self.schedule.sigma(self.t)
        ends = [*itertools.accumulate(layout.chunks)]
        sizes = zip(ends, layout.chunks, strict=True)
        self.chunks = [slice(end - size, end) for end, size in sizes]
        keep_from = 0 if self.gradient_frames is None else total - self.gradient_frames
        self.with_gradient = [chunk.start >= keep_from for chunk in self.chunks]
        self.with_gradient[0] &= given is None
        # With each chunk the ring holds what is seen by it, by those to come and, from the first
        # with gradient on, by those whose exit step is run again.
        newest = total if layout.window is None else layout.window - layout.sink
        oldest = [max(layout.sink, end - newest) for end in ends]
        again = self.with_gradient.index(True) if any(self.with_gradient) else count
        held = [end - oldest[min(i, again)] for i, end in enumerate(ends[:-1])]
        self.capacity = layout.sink + max([1, *held])
        start = torch.zeros((), dtype=torch.int32)
        self.slots = place(start, total, self.capacity, layout.sink, 1).slot_F.tolist()

    @torch.no_grad()
    def generate(self) -> Tensor:
        """The video [B, F, C, H, W] in float32. Keeps what `backward` needs: the keys and values
        that are seen again, and the input of each exit step."""
        model, clean = self.model, torch.zeros((), device=self.model.device)
        self.k, self.v = self._new_cache()
        self.sink_k: Tensor | None = None
        self.keys = model.text_keys(self.text_BTE)
        self.exit_inputs: dict[int, Tensor] = {}
        shown = 0 if self.frames is None else self.layout.frames - self.frames
        video = []
        for i, chunk in enumerate(self.chunks):
            past = self._past(i)
            given = self.still_BFCHW if i == 0 else None
            x0 = self._denoised(i, past) if given is None else given.float()
            if chunk.stop > shown:
                video.append(x0)
            if i + 1 == len(self.chunks):  # which nobody sees
                break
            if self.renoise_context and given is None:
                noise = self.noise(chunk, len(self.steps)).float()
                x0 = add_noise(x0, noise, self.schedule.sigma(clean))
            model.append(x0, clean, self.keys, past=past)
        return torch.cat(video, 1)[:, -(self.layout.frames - shown) :]

    def backward(self, upstream_BFCHW: Tensor) -> None:
        """Adds to the parameters' gradients those of a loss whose gradient with respect to the last
        F frames is `upstream` [B, F, C, H, W], any number of times once they are generated. F: at
        least as many as take a gradient."""
        if not any(self.with_gradient):
            return
        first = self.layout.frames - upstream_BFCHW.shape[1]
        with torch.enable_grad():
            # All chunks share the prompt's keys: their gradients meet there and go back once.
            keys = self.model.text_keys(self.text_BTE)
            learned = [each for pair in keys for each in pair if each.requires_grad]
            cut = [[each.detach().requires_grad_(each.requires_grad) for each in k] for k in keys]
            self.keys = TextKeys(*cut)
            for i, x in self.exit_inputs.items():
                begin, end = self.chunks[i].start - first, self.chunks[i].stop - first
                assert begin >= 0
                self._x0(i, x, self._past(i)).backward(upstream_BFCHW[:, begin:end])
            if learned:  # not so where a LoRA leaves them alone
                grads = [each.grad for k in cut for each in k if each.requires_grad]
                torch.autograd.backward(learned, grads)

    def _new_cache(self) -> tuple[Tensor, Tensor]:
        """Keys and values of the frames in the ring, [layers, B, L, heads, head_dim] each."""
        config, device = self.model.config, self.model.device
        half = torch.is_autocast_enabled(device.type)
        dtype = torch.get_autocast_dtype(device.type) if half else self.model.dtype
        tokens = self.capacity * self.layout.frame_tokens
        size = config.layers, len(self.text_BTE), tokens, config.heads, config.head_dim
        k, v = (torch.zeros(size, dtype=dtype, device=device) for _ in range(2))
        return k, v

    def _past(self, i: int) -> Past:
        """The past of chunk i, once the sink is where the chunk sees it."""
        chunk, n = self.chunks[i], self.layout.frame_tokens
        self._move_sink(chunk.stop)
        seen = (range(lo // n, min(hi // n, chunk.start)) for lo, hi in self.layout.rows[i].keys)
        slots = sorted(self.slots[frame] for frame in itertools.chain(*seen))
        spans = tuple(merge([(slot * n, slot * n + n) for slot in slots]))
        own = torch.tensor(self.slots[chunk], device=self.k.device)
        return Past(self.k, self.v, spans, chunk.start, own)

    def _move_sink(self, end: int) -> None:
        """Rotates the sink's keys to where a chunk that ends before frame `end` sees them."""
        layout, model = self.layout, self.model
        if self.positions == "absolute" or layout.window is None or not layout.sink:
            return
        moved, tokens = max(0, end - layout.window), layout.sink * layout.frame_tokens
        if moved and self.sink_k is None:  # where they were written, until now
            self.sink_k = self.k[:, :, :tokens].clone()
        if self.sink_k is not None:
            scalar = functools.partial(torch.tensor, dtype=torch.int32, device=self.k.device)
            table, impl = model.moving(scalar(moved), tokens), model.impl
            for kept, ring in zip(self.sink_k, self.k, strict=True):
                impl = "auto" if impl == "cpp" else impl  # which has none
                rotate_keys(kept, table, scalar(tokens), ring, impl=impl)

    def _flow(self, x_BFCHW: Tensor, t: Tensor, past: Past) -> Tensor:
        return self.model(x_BFCHW, t, self.keys, past=past)

    def _denoised(self, i: int, past: Past) -> Tensor:
        """x0 of chunk i, from noise to its exit step."""
        noise = functools.partial(self.noise, self.chunks[i])
        x = noise(0).float()
        for step in range(self.exit_steps[i]):
            flow = self._flow(x, self.t[step], past)
            _, x = few_step(flow, x, step, self.sigmas, noise, self.model.impl)
        if self.with_gradient[i]:
            self.exit_inputs[i] = x
        return self._x0(i, x, past)

    def _x0(self, i: int, x_BFCHW: Tensor, past: Past) -> Tensor:
        """x0 of chunk i by its exit step."""
        step = self.exit_steps[i]
        flow = self._flow(x_BFCHW, self.t[step], past)
        return sampler_step(x_BFCHW, flow, self.sigmas[step], impl=self.model.impl)[0]


@torch.no_grad()
def as_still(codec: VideoCodec, latents_BFCHW: Tensor) -> Tensor:
    """Latents [B, 1, C, H, W] of the last pixel frame that latents [B, F, C, H, W] show, as the
    start of a clip: what a window of a longer video begins with, for models of clips that begin
    with a still. Of the frames before, the last `codec.past_frames` count."""
    weight, state = next(iter(codec.parameters())), None
    with torch.autocast(weight.device.type, enabled=False):
        for frame_B1CHW in latents_BFCHW[:, -1 - codec.past_frames :].split(1, 1):
            pixels_BTCHW, state = codec.decode_chunk(frame_B1CHW, state)
        still_B1CHW, _ = codec.encode_chunk(pixels_BTCHW[:, -1:].clamp(-1, 1))
    return still_B1CHW.to(latents_BFCHW)
