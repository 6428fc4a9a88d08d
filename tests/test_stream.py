"""The generation loop on a small random model with the toy codec."""

from __future__ import annotations

import functools
import itertools
import resource
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from sfkernels import Noise, normal
from sfmodel.config import PRESETS, Preset
from sfmodel.dit import DiT
from sfmodel.schedule import FlowSchedule
from sfmodel.stream import FewStepSampler, stream, stream_latents
from sfmodel.toy.vae import ToyVAE

TOY = PRESETS["toy"]
SMALL = replace(
    TOY, dit=replace(TOY.dit, dim=64, heads=1, ffn_dim=64, layers=2), first=None, window=6
)


@pytest.fixture(scope="module")
def model() -> DiT:
    torch.manual_seed(0)
    model = DiT(SMALL.dit)
    torch.nn.init.normal_(model.head.head.weight, std=0.1)
    return model.eval()


TEXT = torch.randn(2, 5, 32, generator=torch.Generator().manual_seed(0))


def take(
    count: int, model: DiT, preset: Preset = SMALL, text: Tensor = TEXT[:1], **more: Any
) -> Tensor:
    return torch.cat([*itertools.islice(stream_latents(model, text, preset, **more), count)], 1)


def test_a_seed_is_a_video(model: DiT) -> None:
    a, b, c = (take(5, model, seed=seed) for seed in (1, 1, 2))
    assert a.shape == (1, 15, 4, 8, 8) and a.isfinite().all()
    assert torch.equal(a, b) and not torch.equal(a, c)


@pytest.mark.parametrize("frames", [1, 9, 10, 30])
def test_exactly_the_frames_asked_for(model: DiT, frames: int) -> None:
    """Chunks come as they are made: 3 latent frames are 9 pixel frames at first, then 12; a still
    as first chunk is one frame."""
    for first, pixels in ((None, 9), (1, 1)):
        preset = replace(SMALL, first=first)
        chunks = [*stream(model, ToyVAE(), TEXT[:1], preset, frames=frames)]
        assert torch.cat(chunks, 1).shape == (1, frames, 3, 64, 64)
        assert [c.shape[1] for c in chunks[:-1]] == [pixels, *[12] * 9][: len(chunks) - 1]


def test_the_first_chunk_does_not_wait_for_the_cache(
    model: DiT, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A chunk comes after its steps, its cache update when the next one is asked for; the latents
    are those of a loop that updates at once, past the wrap of the ring."""
    passes = 0
    forward = DiT.forward

    def counted(*arguments: Any, **named: Any) -> Tensor:
        nonlocal passes
        passes += 1
        return forward(*arguments, **named)

    monkeypatch.setattr(DiT, "forward", counted)
    chunks = stream_latents(model, TEXT[:1], SMALL)
    got = [next(chunks)]
    assert passes == len(SMALL.steps)
    got.append(next(chunks))
    assert passes == 2 * len(SMALL.steps) + 1
    got.extend(itertools.islice(chunks, 2))
    passes = 0
    assert len([*stream(model, ToyVAE(), TEXT[:1], SMALL, frames=9)]) == 1
    assert passes == len(SMALL.steps)  # nothing is computed for a chunk that nobody takes

    cache = model.new_cache(1, SMALL.window, SMALL.grid)
    with torch.no_grad():
        model.set_text(cache, TEXT[:1])
        sampler = FewStepSampler(model, cache, FlowSchedule(SMALL.shift), SMALL.steps)
        for latents in got:
            noise = functools.partial(Noise, torch.tensor([0]), cache.chunk(3).frame_F)
            x0 = sampler.denoise(normal(noise(0), latents.shape), noise)
            sampler.append(x0)
            assert torch.equal(latents, x0)


def test_batches_are_streams_of_their_own(model: DiT) -> None:
    both = take(3, model, text=TEXT, batch=2)
    assert both.shape == (2, 9, 4, 8, 8) and not torch.allclose(both[0], both[1])
    swapped = take(3, model, text=TEXT.flip(0), batch=2)
    assert not torch.allclose(both, swapped)  # each follows its own prompt


def test_under_autocast(model: DiT) -> None:
    """The cache is in autocast's dtype, also one made before it in the model's own."""
    want = take(3, model)
    with torch.autocast("cpu", torch.bfloat16):
        got = take(3, model)
        assert model.new_cache(1, 6, SMALL.grid).k.dtype == torch.bfloat16
    assert not torch.equal(got, want)
    torch.testing.assert_close(got, want, rtol=0.1, atol=0.1)
    cache = model.new_cache(1, 6, SMALL.grid)
    with torch.no_grad():
        model.set_text(cache, TEXT[:1])
        with torch.autocast("cpu", torch.bfloat16):
            flow = model(want[:, :3], torch.tensor(500.0), None, cache=cache)
    assert flow.isfinite().all() and cache.k.any()


def test_a_sample_is_the_video_of_its_seed(model: DiT) -> None:
    """In a batch or alone, up to rounding."""
    three = take(3, model, seed=7, batch=3)
    for b in range(3):
        torch.testing.assert_close(three[b : b + 1], take(3, model, seed=7 + b))


def test_noise_does_not_depend_on_the_chunks(model: DiT, monkeypatch: pytest.MonkeyPatch) -> None:
    """Initial noise and renoise of a frame are those of its index, also after given frames."""

    def noise_alone(self: FewStepSampler, noise: Tensor, renoise: Any) -> Tensor:
        return torch.cat([noise, *(normal(renoise(i), noise.shape) for i in (1, 2))], 2)

    monkeypatch.setattr(FewStepSampler, "denoise", noise_alone)
    monkeypatch.setattr(FewStepSampler, "append", lambda self, x0: self.cache.commit(x0.shape[1]))
    threes, twos = take(2, model), take(3, model, replace(SMALL, chunk=2))
    assert threes.shape == (1, 6, 12, 8, 8) and torch.equal(threes, twos)
    assert len({float(x) for x in threes[0, :, ::4, 0, 0].flatten()}) == 18  # each its own
    continued = take(1, model, initial_BFCHW=torch.zeros(1, 3, 4, 8, 8))
    assert torch.equal(continued, threes[:, 3:])


def test_the_past_matters_as_long_as_it_is_in_the_window(model: DiT) -> None:
    initial = torch.randn(1, 6, 4, 8, 8, generator=torch.Generator().manual_seed(3))
    near = initial.clone()
    near[:, 3:] += 1
    base, other = (take(1, model, initial_BFCHW=x) for x in (initial, near))
    assert base.shape == (1, 3, 4, 8, 8) and not torch.allclose(base, other)
    # One layer of a window of one chunk beside the current one cannot see further back.
    shallow = DiT(replace(SMALL.dit, layers=1)).eval()
    torch.nn.init.normal_(shallow.head.head.weight, std=0.1)
    far = initial.clone()
    far[:, :3] += 1
    base, other = (take(1, shallow, initial_BFCHW=x) for x in (initial, far))
    torch.testing.assert_close(base, other)
    sinking = replace(SMALL, sink=3, window=7)
    base, other = (take(1, shallow, sinking, initial_BFCHW=x) for x in (initial, far))
    assert not torch.allclose(base, other)


def test_memory_does_not_grow(model: DiT) -> None:
    chunks = stream_latents(model, TEXT[:1], SMALL)
    for _ in itertools.islice(chunks, 40):
        pass
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for _ in itertools.islice(chunks, 400):
        pass
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 4096  # KiB


@pytest.mark.parametrize(
    ("change", "arguments", "said"),
    [
        (dict(window=2), {}, "window=2 is smaller than a chunk of 3"),
        (dict(sink=6), {}, "sink=6 must be smaller than window=6"),
        (dict(sink=4), {}, "the window must be at least 7"),
        ({}, dict(frames=0), "frames=0: must be at least 1"),
        ({}, dict(frames=-3), "frames=-3"),
        (dict(steps=(250, 500)), {}, "must fall"),
    ],
)
def test_bad_settings(model: DiT, change: Any, arguments: Any, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        next(stream(model, ToyVAE(), TEXT[:1], replace(SMALL, **change), **arguments))


def test_initial_latents_must_be_whole_chunks(model: DiT) -> None:
    initial = torch.zeros(1, 3, 4, 8, 8)
    with pytest.raises(ValueError, match="must be 1 plus a multiple of 3"):
        take(1, model, replace(SMALL, first=1), initial_BFCHW=initial)
    assert take(1, model, replace(SMALL, first=1), initial_BFCHW=initial[:, :1]).shape[1] == 3
