"""The model: its passes agree with each other, and it refuses what does not fit."""

from __future__ import annotations

import copy
import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from sfkernels import BlockLayout
from sfkernels.layout import chunk_sizes
from sfmodel.config import PRESETS, DiTConfig
from sfmodel.dit import DiT

CONFIG = DiTConfig(
    dim=32, ffn_dim=48, heads=2, layers=3, channels=4, freq_dim=16, text_dim=8, text_len=6
)
GRID = (3, 2)
N = math.prod(GRID)


def make(config: DiTConfig = CONFIG) -> DiT:
    torch.manual_seed(0)
    model = DiT(config)
    for parameter in model.parameters():  # the head is zero at first: any output would agree
        torch.nn.init.normal_(parameter, std=0.2)
    return model.eval()


def latents(batch: int, frames: int) -> Tensor:
    return torch.randn(batch, frames, 4, 2 * GRID[0], 2 * GRID[1])


@pytest.mark.parametrize("prediction", ["flow", "x0"])
@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize(
    ("frames", "chunk", "first", "window", "sink"),
    [
        (9, 3, None, None, 0),
        (5, 1, None, 2, 0),
        (15, 3, None, 6, 0),  # wraps twice, whole chunks
        (15, 3, None, 4, 0),  # the window ends inside a chunk
        (14, 2, None, 7, 3),  # a chunk that wraps around the ring's end
        (13, 3, 1, 5, 1),
    ],
)
@torch.no_grad()
def test_cached_chunks_equal_one_teacher_forcing_pass(
    frames: int,
    chunk: int,
    first: int | None,
    window: int | None,
    sink: int,
    batch: int,
    prediction: Any,
) -> None:
    model = make(replace(CONFIG, prediction=prediction))
    x, clean, text = latents(batch, frames), latents(batch, frames), torch.randn(batch, 5, 8)
    sizes = chunk_sizes(frames, chunk, first)
    t = torch.cat([torch.rand(batch, 1).expand(batch, size) for size in sizes], 1) * 1000
    layout = BlockLayout.causal(
        frames, chunk, N, first=first, window=window, sink=sink, teacher_forcing=True
    )
    whole = model(x, t, text, layout=layout, clean_BFCHW=clean)

    cache = model.new_cache(batch, window or frames, GRID, sink)
    model.set_text(cache, text)
    at = 0
    for size in sizes:
        here = slice(at, at + size)
        model(latents(batch, size), t[:, here], None, cache=cache)  # overwritten by the next pass
        flow = model(x[:, here], t[:, here], None, cache=cache)
        torch.testing.assert_close(flow, whole[:, here], rtol=1e-5, atol=1e-5 * whole.std().item())
        # The next chunk behind this one's clean latents, in the pass that appends these.
        after = slice(here.stop, here.stop + chunk)
        if after.stop <= frames:
            held = copy.deepcopy(cache)
            behind = clean[:, here]
            flow = model(x[:, after], t[:, after], None, clean_BFCHW=behind, cache=held)
            close = dict(rtol=1e-5, atol=1e-5 * whole.std().item())
            torch.testing.assert_close(flow, whole[:, after], **close)
        model.append(clean[:, here], torch.zeros(()), None, cache=cache)
        cache.commit(size)
        at += size


@torch.no_grad()
def test_one_chunk_of_every_pass_is_bidirectional() -> None:
    model, x, text = make(), latents(2, 4), torch.randn(1, 6, 8)
    t = torch.tensor([300.0, 700.0])
    want = model(x, t, text)
    torch.testing.assert_close(model(x, t, text, layout=BlockLayout((4,), N)), want)
    torch.testing.assert_close(model(x, model.modulation(t), text), want)
    assert not torch.allclose(want, model(x, t, text, layout=BlockLayout.causal(4, 1, N)))


@torch.no_grad()
def test_bfloat16_keeps_timesteps_apart() -> None:
    """Rounded to bfloat16, 996 and 998 would be one timestep."""
    model, x, text = make().bfloat16(), latents(1, 2), torch.randn(1, 6, 8)
    near = [model(x, torch.tensor(t), text) for t in (996.0, 998.0)]
    assert near[0].dtype == torch.float32 and not torch.equal(*near)


@torch.no_grad()
def test_positions_have_no_end() -> None:
    """Only distances matter: past a million frames the model computes what it did at frame 1000."""
    model, x, text = make(), latents(1, 2), torch.randn(1, 6, 8)
    out = []
    for start in (1_000, 1_000_000):
        cache = model.new_cache(1, 4, GRID)
        model.set_text(cache, text)
        cache.start.fill_(start)
        for _ in range(3):
            flow = model(x, torch.tensor(500.0), None, cache=cache)
            cache.commit(2)
        out.append(flow)
    torch.testing.assert_close(out[0], out[1], rtol=1e-4, atol=1e-4)


def test_gradients_reach_every_parameter() -> None:
    model = make()
    x, clean, text = latents(1, 4), latents(1, 4), torch.randn(1, 5, 8)
    layout = BlockLayout.causal(4, 2, N, teacher_forcing=True)
    model(
        x, torch.rand(1, 4) * 1000, text, layout=layout, clean_BFCHW=clean
    ).square().sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in model.parameters())


def test_recomputed_blocks_keep_less_and_change_nothing() -> None:
    x, clean, text = latents(1, 4), latents(1, 4), torch.randn(1, 5, 8)
    t = torch.rand(1, 4) * 1000
    kept, grads = [], []
    for recompute in (False, True):
        model = make()
        model.recompute = recompute
        saved: dict[int, Tensor] = {}

        def keep(tensor: Tensor, saved: dict[int, Tensor] = saved) -> Tensor:
            return saved.setdefault(id(tensor), tensor)

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            out = model(x, t, text, layout=TF, clean_BFCHW=clean)
        kept.append(sum(tensor.nbytes for tensor in saved.values()))
        out.square().sum().backward()
        grads.append([p.grad for p in model.parameters()])
    assert kept[1] < 0.15 * kept[0]
    torch.testing.assert_close(grads[0], grads[1], rtol=0, atol=0)


def test_a_cached_pass_is_not_recomputed() -> None:
    """The backward pass would write the ring again, where other chunks may lie by then: a pass over
    a cache has no gradient, and says so."""
    model, x, text = make(), latents(1, 2), torch.randn(1, 5, 8)
    model.recompute = True
    cache = model.new_cache(1, 2, GRID)
    with torch.no_grad():
        model.set_text(cache, text)
    with pytest.raises(ValueError, match="qk_norm_rope_append has no gradient"):
        model(x, torch.tensor(500.0), None, cache=cache)
    assert not cache.k.any()


def test_size_of_the_public_model() -> None:
    with torch.device("meta"):
        model = DiT(PRESETS["wan-1.3b"].dit)
    assert sum(p.numel() for p in model.parameters()) == 1_418_996_800


MODEL, X, TEXT = make(), latents(1, 4), torch.randn(1, 5, 8)
TF = BlockLayout.causal(4, 2, N, teacher_forcing=True)


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (lambda: MODEL(X[:, :, :3], torch.tensor(1.0), TEXT), "x has shape"),
        (lambda: MODEL(X[..., :3], torch.tensor(1.0), TEXT), "must be multiples of 2×2"),
        (lambda: MODEL(X, torch.ones(1, 4, 1), TEXT), "must be \\[\\], \\[B\\] or \\[B, F\\]"),
        (lambda: MODEL(X, torch.tensor(1.0), torch.zeros(1, 7, 8)), "at most 6"),
        (lambda: MODEL(X, torch.tensor(1.0), torch.zeros(1, 5, 9)), "text has shape"),
        (lambda: MODEL(X, torch.tensor(1.0), None), "text is None exactly when"),
        (lambda: MODEL(X, torch.tensor(1.0), TEXT, layout=TF), "clean latents go with"),
        (lambda: MODEL(X, torch.tensor(1.0), TEXT, clean_BFCHW=X), "clean latents go with"),
        (
            lambda: MODEL(
                X,
                MODEL.modulation(torch.ones(1, 4)),
                None,
                clean_BFCHW=X[:, :2],
                cache=MODEL.new_cache(1, 6, GRID),
            ),
            "modulation of 4 frames: must be of the 2 clean ones and the 4 of x",
        ),
        (
            lambda: MODEL(X, torch.tensor(1.0), TEXT, layout=BlockLayout((3,), N)),
            "x has 4 frames of 6 tokens: the layout has 3",
        ),
        (
            lambda: MODEL(X, torch.tensor(1.0), None, cache=MODEL.new_cache(1, 4, (4, 4))),
            "x has 6 tokens a frame: the cache has 16",
        ),
        (
            lambda: MODEL(X, torch.tensor(1.0), None, cache=MODEL.new_cache(1, 3, GRID)),
            "smaller than a chunk of 4",
        ),
        (lambda: DiTConfig(32, 48, 3, 1), "must divide into 3 heads"),
        (lambda: DiTConfig(32, 48, 2, 1, patch=(2, 2, 2)), "must be"),
        (lambda: DiTConfig.from_wan({"model_type": "i2v"}), "model_type='i2v'"),
    ],
)
def test_bad_input_says_what_is_wrong(call: Any, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        call()
