"""Rollouts longer than their window: what they generate is what a stream does, their gradient is
that of a model which keeps everything, and they take no more memory than short ones."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from sfkernels import BlockLayout, reference
from sfkernels.layout import chunk_sizes
from sfmodel.blocks import Context, SelfAttention
from sfmodel.config import Preset
from sfmodel.dit import DiT
from sfmodel.schedule import FlowSchedule
from sfmodel.stream import Stream
from sfmodel.toy.vae import ToyVAE
from sfmodel.train.rollout import ChunkNoise, Rollout, as_still
from tests.test_memory import Counting
from tests.test_rollout import CONFIG, GRID, STEPS, TOKENS, drawn, gradients, off
from tests.test_rollout import model as model
from tests.test_vae import small

SCHEDULE = FlowSchedule()
SHAPE = 4, 4, 6  # of a latent frame


def noise_of(frames: int, batch: int = 2) -> ChunkNoise:
    generator = torch.Generator().manual_seed(1)
    shapes = SHAPE, (3, *SHAPE), SHAPE
    return drawn(*(torch.randn(batch, frames, *shape, generator=generator) for shape in shapes))


TEXT = torch.randn(2, 3, 8, generator=torch.Generator().manual_seed(2))


def streamed(
    model: DiT, layout: BlockLayout, noise: ChunkNoise, positions: str, still: Tensor | None = None
) -> Tensor:
    """What a stream makes of the same noise."""
    assert layout.window is not None
    preset = Preset(
        CONFIG, GRID[0] * 2, GRID[1] * 2, steps=STEPS, chunk=layout.chunks[-1],
        first=layout.chunks[0], window=layout.window, sink=layout.sink, positions=positions,
    )  # fmt: skip
    made: list[Tensor] = []

    def given(i: int) -> Tensor:
        begin = sum(x.shape[1] for x in made)
        return noise(slice(begin, begin + stream.size), i)

    stream = Stream(model, None, TEXT, preset, batch=2, noise=given)
    if still is not None:
        stream.give(still)
    for _ in layout.chunks:
        made.append(stream.denoise().clone())
    return torch.cat(made, 1)


@pytest.mark.parametrize("positions", ["absolute", "relative"])
@pytest.mark.parametrize(
    ("chunk", "first", "window", "sink"),
    [(2, 1, 6, 0), (2, 1, 5, 1), (2, None, 7, 3), (1, None, 4, 2), (3, 2, 7, 3)],
)
def test_it_is_the_stream(
    model: DiT, chunk: int, first: int | None, window: int, sink: int, positions: str
) -> None:
    """Past several wraps of the ring."""
    model = model.float()
    frames = (first or chunk) + chunk * (15 // chunk)
    layout = BlockLayout.causal(frames, chunk, TOKENS, first=first, window=window, sink=sink)
    tensors = SCHEDULE, STEPS, (3,) * len(layout.chunks), noise_of(frames), TEXT
    got = Rollout(model, layout, *tensors, positions=positions, gradient_frames=chunk)
    assert got.capacity <= window
    video, want = got.generate(), streamed(model, layout, got.noise, positions)
    torch.testing.assert_close(video, want, rtol=1e-5, atol=1e-5)
    last = Rollout(model, layout, *tensors, positions=positions, frames=5, gradient_frames=0)
    assert torch.equal(last.generate(), video[:, -5:])
    if sink and positions == "relative":  # which makes a difference
        stays = Rollout(model, layout, *tensors)
        assert (stays.generate()[:, -chunk:] - want[:, -chunk:]).abs().max() > 1e-3


def test_it_goes_on_from_a_still_as_the_stream_does(model: DiT) -> None:
    model, still = model.float(), torch.randn(2, 1, *SHAPE)
    layout = BlockLayout.causal(9, 2, TOKENS, first=1, window=4)
    tensors = SCHEDULE, STEPS, (3,) * 5, noise_of(9), TEXT
    got = Rollout(model, layout, *tensors, still_BFCHW=still)
    video, want = got.generate(), streamed(model, layout, got.noise, "absolute", still)
    assert torch.equal(video[:, :1], still) and got.with_gradient == [False] + 4 * [True]
    torch.testing.assert_close(video, want, rtol=1e-5, atol=1e-5)
    noisy = Rollout(model, layout, *tensors, renoise_context=True, still_BFCHW=still).generate()
    assert torch.equal(noisy[:, 1:3], video[:, 1:3])  # the still is seen clean
    assert not torch.equal(noisy[:, 3:], video[:, 3:])


class Dense:
    """A rollout that keeps everything: each pass sees all clean frames so far, under a mask, with
    each key rotated anew to where its query sees it, and autograd goes through all exit steps."""

    def __init__(
        self, model: DiT, chunks: tuple[int, ...], window: int, sink: int, positions: str
    ) -> None:
        self.model, self.sink, self.relative = model, sink, positions == "relative"
        self.window = window
        ends = torch.tensor(chunks).cumsum(0).tolist()
        self.own = [range(end - size, end) for end, size in zip(ends, chunks, strict=True)]

    def attend(self, module: SelfAttention, x_BLD: Tensor, context: Context, skip: int = 0) -> Any:
        """In place of the model's own."""
        q, k, v = module.qkv(x_BLD).chunk(3, -1)
        q, k = (
            F.rms_norm(x, (CONFIG.dim,), weight, CONFIG.eps)
            for x, weight in ((q, module.norm_q), (k, module.norm_k))
        )
        by_frame = (x.unflatten(1, (-1, TOKENS)) for x in (q, k, v))
        q, k, v = (x.unflatten(3, (CONFIG.heads, -1)) for x in by_frame)
        out = []
        chunks = [own for own in self.own if own.stop <= q.shape[1]]
        past = chunks[-1].start
        k, v = (torch.cat([x[:, :past].detach(), x[:, past:]], 1) for x in (k, v))
        for own in chunks:
            newest = own.stop - (self.window - self.sink)
            seen = [f for f in range(own.stop) if f in own or f < self.sink or f >= newest]
            moved = max(0, own.stop - self.window) if self.relative else 0
            at = [f + moved if f < self.sink else f for f in seen]
            keys = self.rotated(k[:, seen], at)
            queries = self.rotated(q[:, own.start : own.stop], [*own])
            scores = torch.einsum("blhd,bmhd->bhlm", queries, keys) * queries.shape[-1] ** -0.5
            values = v[:, seen].flatten(1, 2)
            out.append(torch.einsum("bhlm,bmhd->blhd", scores.softmax(-1), values))
        return module.o(torch.cat(out, 1).flatten(2))

    def rotated(self, x_BFNHD: Tensor, frames: list[int]) -> Tensor:
        index = torch.tensor(frames, dtype=torch.int32)
        table = reference.rope_table(index, GRID, CONFIG.head_dim, 1e4)
        return reference.rope(x_BFNHD.flatten(1, 2), table)

    def video(self, exits: tuple[int, ...], noise: ChunkNoise) -> Tensor:
        t = SCHEDULE.warp(STEPS)
        sigma, clean = SCHEDULE.sigma(t), SCHEDULE.sigma(torch.zeros(()))
        video: list[Tensor] = []
        context: list[Tensor] = []
        for own, last in zip(self.own, exits, strict=True):
            here = slice(own.start, own.stop)
            x = noise(here, 0).double()
            for i in range(last + 1):
                before = torch.cat(context, 1) if context else x[:, :0]
                t_BF = torch.cat([torch.zeros(2, own.start), t[i].expand(x.shape[:2])], 1)
                flow = self.model(torch.cat([before, x], 1), t_BF, TEXT)[:, own.start :]
                x0 = x - sigma[i].double() * flow
                if i < last:
                    s = sigma[i + 1].double()
                    x = ((1 - s) * x0 + s * noise(here, i + 1)).detach()
            video.append(x0)
            context.append(((1 - clean) * x0 + clean * noise(here, len(STEPS))).detach())
        return torch.cat(video, 1)


@pytest.mark.parametrize("positions", ["absolute", "relative"])
@pytest.mark.parametrize(
    ("chunk", "first", "window", "sink", "learned"),
    [(2, 1, 5, 1, 4), (2, 1, 5, 1, None), (1, None, 4, 2, 5), (3, 3, 6, 0, 6), (2, 2, 7, 3, 6)],
)
def test_the_gradient_is_that_of_a_model_that_keeps_everything(
    model: DiT, monkeypatch: pytest.MonkeyPatch, chunk: int, first: int | None, window: int,
    sink: int, learned: int | None, positions: str,
) -> None:  # fmt: skip
    """Past the window, where the ring has wrapped, each chunk at an exit step of its own, in a loss
    that sees the last frames alone."""
    frames = (first or chunk) + chunk * (10 // chunk)
    chunks = chunk_sizes(frames, chunk, first)
    exits = tuple((0, 2, 1, 3, 1)[i % 5] for i in range(len(chunks)))
    noise, judged = noise_of(frames), frames if learned is None else learned + 1
    got = Rollout(
        model, BlockLayout(chunks, TOKENS, window=window, sink=sink), SCHEDULE, STEPS, exits, noise,
        TEXT, renoise_context=True, positions=positions, frames=judged, gradient_frames=learned,
    )  # fmt: skip
    assert (got.capacity < frames - chunk) == (learned is not None)  # it wraps
    video = got.generate()
    upstream = torch.randn(video.shape, generator=torch.Generator().manual_seed(4))
    for _ in range(2):  # the sink goes back to where it was
        got.backward(upstream)
        ours = gradients(model)
    dense = Dense(model, chunks, window, sink, positions)
    monkeypatch.setattr(SelfAttention, "forward", lambda *given: dense.attend(*given))
    whole = dense.video(exits, noise)
    torch.testing.assert_close(video, whole[:, -judged:].float(), rtol=1e-4, atol=1e-4)
    begins = [own for own in dense.own if own.start >= frames - (learned or frames)]
    sees = slice(begins[0].start - frames, None)
    (whole[:, sees] * upstream[:, sees]).sum().backward()
    assert off(ours, gradients(model)) < 1e-4


def peak(model: DiT, frames: int, positions: str) -> int:
    """Bytes at most, beside the model."""
    with Counting() as counting:

        def noise(frames: slice, i: int) -> Tensor:
            return torch.randn(2, frames.stop - frames.start, *SHAPE)

        layout = BlockLayout.causal(frames, 2, TOKENS, first=1, window=5, sink=1)
        found = Rollout(
            model, layout, SCHEDULE, STEPS, (1,) * len(layout.chunks), noise, TEXT,
            renoise_context=True, positions=positions, frames=5, gradient_frames=4,
        )  # fmt: skip
        found.backward(found.generate())
    model.zero_grad()
    return counting.peak


@pytest.mark.parametrize("positions", ["absolute", "relative"])
def test_memory_does_not_grow_with_the_length(model: DiT, positions: str) -> None:
    peak(model, 9, positions)  # what is computed once
    short, long = (peak(model, frames, positions) for frames in (9, 33))
    assert short == long
    ring = 2 * CONFIG.layers * 2 * (5 + 2) * TOKENS * CONFIG.dim * 8
    assert short > ring  # keys and values are counted


@pytest.mark.parametrize(("vae", "size"), [(ToyVAE.from_pretrained(), 8), (small(), 1)])
def test_a_window_begins_with_the_last_pixel_frame_as_a_still(vae: Any, size: int) -> None:
    """As if all frames were decoded, of which few are."""
    least = vae.past_frames + 1
    latents = torch.randn(2, least + 2, vae.latent_channels, size, size)
    with torch.no_grad():
        pixels, _ = vae.decode_chunk(latents)
        want, _ = vae.encode_chunk(pixels[:, -1:].clamp(-1, 1))
    for frames in (least + 2, least):
        got = as_still(vae, latents[:, -frames:])
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)
    assert (as_still(vae, latents[:, -1:]) - want).abs().max() > 1e-3
