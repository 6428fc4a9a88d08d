"""Self-rollouts: what they generate is what a stream does, and their gradient is that of the exit
steps alone."""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Iterator
from dataclasses import replace
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor

import sfkernels as sf
from sfkernels import BlockLayout
from sfmodel.config import DiTConfig
from sfmodel.dit import DiT
from sfmodel.schedule import FlowSchedule, add_noise, few_step
from sfmodel.train.rollout import ChunkNoise, Rollout

CONFIG = DiTConfig(
    dim=32, ffn_dim=48, heads=2, layers=2, channels=4, patch=(1, 2, 2), freq_dim=16, text_dim=8,
    text_len=5,
)  # fmt: skip
GRID, STEPS = (2, 3), (1000, 750, 500, 250)
TOKENS = GRID[0] * GRID[1]


@pytest.fixture
def model() -> DiT:
    torch.manual_seed(0)
    model = DiT(CONFIG)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    return model.double()


class Generated(Rollout):
    """A rollout and its video."""

    def __init__(self, *arguments: Any, **more: Any) -> None:
        super().__init__(*arguments, **more)
        self.video = self.generate()


def rollout(
    model: DiT, layout: BlockLayout, exit_step: int = 3, batch: int = 2, **more: Any
) -> Generated:
    """With the same noise whatever the exit step."""
    generator = torch.Generator().manual_seed(1)
    noise, renoise, context = (
        torch.randn(batch, layout.frames, *shape, generator=generator)
        for shape in ((4, 4, 6), (3, 4, 4, 6), (4, 4, 6))
    )
    text = torch.randn(batch, 3, 8, generator=generator)
    exits = (exit_step,) * len(layout.chunks)
    draws = drawn(noise, renoise, context)
    return Generated(model, layout, FlowSchedule(), STEPS, exits, draws, text, **more)


def drawn(noise: Tensor, renoise_BFSCHW: Tensor, context: Tensor) -> ChunkNoise:
    """Noise that lies in tensors."""
    whole = [noise, *renoise_BFSCHW.unbind(2), context]
    return lambda frames, i: whole[i][:, frames].contiguous()


@pytest.mark.parametrize("chunks", [(3, 3, 3, 3), (1, 2, 2, 2), (1,) * 6])
@pytest.mark.parametrize(("window", "sink"), [(None, 0), (6, 0), (5, 1)])
def test_a_rollout_to_the_last_step_is_the_stream(
    model: DiT, chunks: tuple[int, ...], window: int | None, sink: int
) -> None:
    """Through the ring, past its wrap."""
    got = rollout(model, BlockLayout(chunks, TOKENS, window=window, sink=sink))
    generator = torch.Generator().manual_seed(1)
    frames = sum(chunks)
    noise = torch.randn(2, frames, 4, 4, 6, generator=generator)
    renoise = torch.randn(2, frames, 3, 4, 4, 6, generator=generator)
    cache = model.new_cache(2, window or frames, GRID, sink)
    with torch.no_grad():
        model.set_text(cache, got.text_BTE)
        t = FlowSchedule().warp(STEPS)
        sigmas = FlowSchedule().sigma(t)
        want = []
        for now in got.chunks:
            fresh = renoise[:, now]
            x = noise[:, now]
            for i in range(len(STEPS)):
                flow = model(x, t[i], None, cache=cache)
                x = few_step(flow, x, i, sigmas, lambda i, f=fresh: f[:, :, i - 1].contiguous())[1]  # type: ignore[misc]
            model(x, torch.tensor(0.0), None, cache=cache)
            cache.commit(x.shape[1])
            want.append(x)
    torch.testing.assert_close(got.video, torch.cat(want, 1), rtol=1e-5, atol=1e-5)
    assert not got.video.requires_grad


def whole_graph(
    model: DiT, r: Rollout, exit_step: int, context: Tensor | None = None, detach: bool = True
) -> Tensor:
    """The video with its gradient, by autograd through every exit step at once: keys and values of
    the past come from clean passes over the whole past, without gradient, under a block-causal
    layout. Nothing here is shared with the rollout but the model."""
    schedule = FlowSchedule()
    t = schedule.warp(STEPS)
    sigma = schedule.sigma(t)[exit_step]
    video: list[Tensor] = []
    seen: list[Tensor] = []
    for i, now in enumerate(r.chunks):
        x = r.exit_inputs[i]
        hide = r.layout.hide_first and i + 1 == len(r.chunks)
        layout = replace(r.layout, chunks=r.layout.chunks[: i + 1], hide_first=hide)
        past = torch.cat(seen, 1) if seen else x[:, :0]
        times = torch.cat([torch.zeros(len(x), past.shape[1]), t[exit_step].expand(x.shape[:2])], 1)
        with past_detached(past.shape[1] * TOKENS * detach):
            flow = model(torch.cat([past, x], 1), times, r.text_BTE, layout=layout)
        x0 = x - sigma * flow[:, past.shape[1] :]
        video.append(x0)
        clean = x0.detach()
        if context is not None:
            clean = add_noise(clean, context[:, now], schedule.sigma(torch.zeros(())))
        seen.append(clean)
    return torch.cat(video, 1)


@contextlib.contextmanager
def past_detached(tokens: int) -> Iterator[None]:
    """No gradient to the keys and values of the first tokens of a pass."""
    attend = sf.block_causal_attention

    def detached(q: Tensor, k: Tensor, v: Tensor, layout: BlockLayout, **options: Any) -> Tensor:
        k, v = (torch.cat([one[:, :tokens].detach(), one[:, tokens:]], 1) for one in (k, v))
        return attend(q, k, v, layout, **options)

    with mock.patch.object(sf, "block_causal_attention", detached):
        yield


@pytest.mark.parametrize("exit_step", [0, 2])
@pytest.mark.parametrize(
    ("chunks", "options"),
    [((2, 2, 2), {}), ((1, 2, 2), {"window": 4, "sink": 1}), ((2, 2, 2), {"hide_first": True})],
)
def test_the_gradient_is_that_of_the_exit_steps(
    model: DiT, chunks: tuple[int, ...], options: dict[str, Any], exit_step: int
) -> None:
    """Against autograd through all chunks at once, where the past is detached."""
    got = rollout(model, BlockLayout(chunks, TOKENS, **options), exit_step, renoise_context=True)
    generator = torch.Generator().manual_seed(1)
    shape = got.video.shape
    for draw in (shape, (*shape[:2], 3, *shape[2:])):
        torch.randn(draw, generator=generator)
    context = torch.randn(shape, generator=generator)
    video = whole_graph(model, got, exit_step, context)
    torch.testing.assert_close(got.video, video.detach().float(), rtol=1e-4, atol=1e-4)
    upstream = torch.randn(shape)
    (video * upstream).sum().backward()
    want = gradients(model)
    got.backward(upstream)
    assert off(gradients(model), want) < 1e-4


def gradients(model: DiT) -> dict[str, Tensor]:
    """And leaves none."""
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return found


def off(got: dict[str, Tensor], want: dict[str, Tensor]) -> float:
    """The largest relative error of a parameter's gradient."""
    assert got.keys() == want.keys()
    return max(float((got[name] - w).norm() / w.norm()) for name, w in want.items())


def test_a_gradient_between_chunks_would_be_seen(model: DiT) -> None:
    """The comparison above, against autograd that does not detach the past: it differs by much."""
    got = rollout(model, BlockLayout((2, 2, 2), TOKENS), exit_step=1)
    upstream = torch.randn(got.video.shape)
    got.backward(upstream)
    ours = gradients(model)
    for detach, leaks in ((True, False), (False, True)):
        (whole_graph(model, got, 1, detach=detach) * upstream).sum().backward()
        assert (off(ours, gradients(model)) > 1e-2) == leaks


def test_only_the_last_frames_take_a_gradient(model: DiT) -> None:
    layout = BlockLayout((2, 2, 2), TOKENS)
    whole, last = rollout(model, layout, 1), rollout(model, layout, 1, gradient_frames=4)
    torch.testing.assert_close(whole.video, last.video, rtol=0, atol=0)
    upstream = torch.randn(whole.video.shape)
    last.backward(upstream)
    got = gradients(model)
    upstream[:, :2] = 0
    whole.backward(upstream)
    assert off(got, gradients(model)) < 1e-6


def test_the_hidden_first_chunk_is_not_seen(model: DiT) -> None:
    """By the last of two, which then has no past at all."""
    two = BlockLayout((3, 3), TOKENS)
    alone = rollout(model, replace(two, hide_first=True))
    seen = rollout(model, two)
    torch.testing.assert_close(alone.video[:, :3], seen.video[:, :3], rtol=0, atol=0)
    assert (alone.video[:, 3:] - seen.video[:, 3:]).abs().max() > 1e-2


def test_memory_does_not_grow_with_steps_or_chunks(model: DiT) -> None:
    """What autograd keeps at a time: one step of one chunk, whatever comes before."""
    kept = {}
    for exit_step, chunks in ((0, 2), (3, 2), (0, 4)):
        found = rollout(model, BlockLayout((2,) * chunks, TOKENS), exit_step)
        alive = most = 0

        def pack(tensor: Tensor) -> tuple[Tensor, Any]:
            nonlocal alive, most
            nbytes = tensor.nbytes
            alive += nbytes
            most = max(most, alive)
            return tensor, weakref.finalize(token := _Token(), release, nbytes), token  # type: ignore[return-value]

        def release(nbytes: int) -> None:
            nonlocal alive
            alive -= nbytes

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda packed: packed[0]):
            found.backward(torch.ones_like(found.video))
        kept[exit_step, chunks] = most
        model.zero_grad()
    # A longer past is a longer prefix, which is kept by reference: the cache, not a copy.
    past = 2 * CONFIG.layers * 2 * 2 * 4 * TOKENS * CONFIG.dim * 8
    assert 0 < kept[0, 2] == kept[3, 2]
    assert kept[0, 4] <= kept[0, 2] + past


class _Token:
    """Lives as long as what autograd keeps."""


def test_what_does_not_fit(model: DiT) -> None:
    layout = BlockLayout((2, 2), TOKENS)
    with pytest.raises(ValueError, match=r"exit_steps=\(4, 4\): must be from 0 to 3, one of each"):
        rollout(model, layout, 4)
    with pytest.raises(ValueError, match="teacher_forcing=True"):
        rollout(model, replace(layout, teacher_forcing=True))
    with pytest.raises(ValueError, match="positions='rolling': must be 'absolute' or 'relative'"):
        rollout(model, layout, positions="rolling")
    with pytest.raises(ValueError, match="still has 1 latent frames: must have 2, as the first"):
        rollout(model, layout, still_BFCHW=torch.zeros(2, 1, 4, 4, 6))
