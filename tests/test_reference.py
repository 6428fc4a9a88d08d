"""The reference ops against independent float64 arithmetic, and their refusal of bad input."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

import sfkernels as sf
from tests.test_layout import LAYOUTS

B, FRAMES, HEADS, DIM = 2, 3, 2, 16
GRID = (3, 5)
TOKENS = FRAMES * math.prod(GRID)
C = HEADS * DIM


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def rand(*shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, dtype=dtype)


def close(a: Tensor, b: Tensor, tolerance: float = 1e-12) -> None:
    torch.testing.assert_close(a.double(), b.double(), rtol=tolerance, atol=tolerance)


def normed(x: Tensor, eps: float) -> Tensor:
    centred = x - x.mean(-1, keepdim=True)
    return centred / (centred.square().mean(-1, keepdim=True) + eps).sqrt()


def per_token(m_BFC: Tensor) -> Tensor:
    return m_BFC.repeat_interleave(TOKENS // m_BFC.shape[1], 1)


@pytest.mark.parametrize("frames", [1, FRAMES])
def test_adaln_and_gated_adaln(frames: int) -> None:
    x, y = rand(B, TOKENS, C), rand(B, TOKENS, C)
    six = rand(B, frames, 6, C)
    gate, shift, scale = six[:, :, 2], six[:, :, 0], six[:, :, 1]  # strided views
    close(
        sf.adaln(x, shift, scale, eps=1e-3),
        normed(x, 1e-3) * (1 + per_token(scale)) + per_token(shift),
    )
    residual, out = sf.gated_adaln(x, y, gate, shift, scale)
    close(residual, x + per_token(gate) * y)
    close(out, sf.adaln(residual, shift, scale))
    residual, out = sf.gated_adaln(x, y, None, shift, scale)
    close(residual, x + y)
    weight, bias = rand(2, C)
    residual, out = sf.gated_layer_norm(x, y, gate, weight, bias)
    close(residual, x + per_token(gate) * y)
    close(out, sf.layer_norm(residual, weight, bias))


def test_norms() -> None:
    x, weight, bias = rand(B, TOKENS, C), rand(C), rand(C)
    close(sf.layer_norm(x, weight, bias, eps=1e-3), normed(x, 1e-3) * weight + bias)
    root = (x.square().mean(-1, keepdim=True) + 1e-3).sqrt()
    close(sf.rms_norm(x, weight, eps=1e-3), x / root * weight)


def rope_by_complex(x_BLHD: Tensor, frames: list[int], grid: tuple[int, int]) -> Tensor:
    """Wan2.1's definition in complex numbers, one token at a time."""
    out = torch.view_as_complex(x_BLHD.double().unflatten(-1, (-1, 2)).contiguous()).clone()
    pairs = x_BLHD.shape[-1] // 2
    sizes = (pairs - 2 * (pairs // 3), pairs // 3, pairs // 3)
    positions = [(f, i, j) for f in frames for i in range(grid[0]) for j in range(grid[1])]
    for token, position in enumerate(positions):
        angles = [
            p * 10_000.0 ** (-i / size)
            for p, size in zip(position, sizes, strict=True)
            for i in range(size)
        ]
        out[:, token] *= torch.tensor([complex(math.cos(a), math.sin(a)) for a in angles])
    return torch.view_as_real(out).flatten(-2)


@pytest.mark.parametrize("first", [0, 1030, 100_000])
@pytest.mark.parametrize("head_dim", [16, 64, 128])
def test_rope_is_exact_at_any_frame(first: int, head_dim: int) -> None:
    frame_F = torch.arange(first, first + FRAMES, dtype=torch.int32)
    qkv = rand(B, TOKENS, 3 * HEADS * head_dim, dtype=torch.float32)
    weight = 1 + 0.1 * rand(2, HEADS * head_dim, dtype=torch.float32)
    table = sf.rope_table(frame_F, GRID, head_dim)
    q, k, v = sf.qk_norm_rope(qkv, weight[0], weight[1], table)
    for got, raw, w in zip((q, k), qkv.double().chunk(3, -1), weight.double(), strict=False):
        root = (raw.square().mean(-1, keepdim=True) + 1e-6).sqrt()
        want = (raw / root * w).unflatten(-1, (HEADS, head_dim))
        close(got, rope_by_complex(want, frame_F.tolist(), GRID), 1e-5)
    close(v, qkv[..., -HEADS * head_dim :].unflatten(-1, (HEADS, head_dim)), 0)


def test_append_writes_only_its_slots() -> None:
    table = sf.rope_table(torch.arange(2, dtype=torch.int32), GRID, DIM)
    n = math.prod(GRID)
    qkv, q_weight, k_weight = rand(B, 2 * n, 3 * C), rand(C), rand(C)
    k_ring, v_ring = torch.full((2, B, 4 * n, HEADS, DIM), math.nan, dtype=torch.float64)
    slot_F = torch.tensor([3, 1], dtype=torch.int32)
    q = sf.qk_norm_rope_append(qkv, q_weight, k_weight, table, k_ring, v_ring, slot_F)
    want_q, want_k, want_v = sf.qk_norm_rope(qkv, q_weight, k_weight, table)
    close(q, want_q, 0)
    for ring, want in zip((k_ring, v_ring), (want_k, want_v), strict=True):
        by_frame = ring.unflatten(1, (4, n))
        close(by_frame[:, [3, 1]].flatten(1, 2), want, 0)
        assert by_frame[:, [0, 2]].isnan().all()


def naive_attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, scale: float) -> Tensor:
    scores = torch.einsum("blhd,bshd->bhls", q, k) * scale
    weights = scores.masked_fill(~mask, -math.inf).softmax(-1)
    return torch.einsum("bhls,bshd->blhd", weights, v)


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_block_causal_attention_and_gradients(layout: sf.BlockLayout) -> None:
    shape = (B, layout.tokens, HEADS, DIM)
    q, k, v = (rand(*shape).requires_grad_() for _ in range(3))
    upstream = rand(*shape)
    out = sf.block_causal_attention(q, k, v, layout, scale=0.3)
    want = naive_attention(q, k, v, layout.dense_mask(), 0.3)
    close(out, want)
    ours = torch.autograd.grad(out, (q, k, v), upstream)
    theirs = torch.autograd.grad(want, (q, k, v), upstream)
    for a, b in zip(ours, theirs, strict=True):
        close(a, b)


def test_training_after_inference() -> None:
    """What is kept from a pass in inference mode must not spoil a later backward pass."""
    layout = sf.BlockLayout((1, 1, 2), 3)
    with torch.inference_mode():
        x = rand(1, 12, HEADS, DIM)
        sf.block_causal_attention(x, x, x, layout)
    q, k, v = rand(3, 1, 12, HEADS, DIM).requires_grad_()
    sf.block_causal_attention(q, k, v, layout).sum().backward()


@pytest.mark.parametrize("valid", [1, 7, 20])
def test_ring_attention_reads_valid_slots_only(valid: int) -> None:
    q, k, v = rand(B, 6, HEADS, DIM), rand(B, 20, HEADS, DIM), rand(B, 20, HEADS, DIM)
    k[:, valid:], v[:, valid:] = math.nan, math.nan
    out = sf.ring_attention(q, k, v, torch.tensor(valid, dtype=torch.int32))
    mask = torch.ones(6, valid, dtype=torch.bool)
    close(out, naive_attention(q, k[:, :valid], v[:, :valid], mask, DIM**-0.5))


@pytest.mark.parametrize("shape", [(), (B,), (B, FRAMES)])
def test_sampler_step(shape: tuple[int, ...]) -> None:
    x, flow, uncond, noise = (rand(B, FRAMES, 4, 2, 2) for _ in range(4))
    sigma = torch.rand(shape, dtype=torch.float64)
    following = sigma / 2
    x0, x_next = sf.sampler_step(x, flow, sigma, following, noise, uncond_flow=uncond, guidance=3.0)
    s, n = (t.reshape(shape + (1,) * (5 - len(shape))) for t in (sigma, following))
    want = x - s * (uncond + 3 * (flow - uncond))
    close(x0, want)
    close(x_next, (1 - n) * want + n * noise)
    last, same = sf.sampler_step(x, flow, sigma)
    close(last, x - s * flow)
    assert torch.equal(last, same)


def test_low_precision_is_computed_in_float32() -> None:
    """bfloat16 in, bfloat16 out, with the rounding of one cast and not of every step."""
    x, weight = rand(B, TOKENS, C).bfloat16(), rand(C).bfloat16()
    exact = sf.rms_norm(x.double(), weight.double())
    assert sf.rms_norm(x, weight).dtype == torch.bfloat16
    close(sf.rms_norm(x, weight), exact, 2**-8)


X = torch.zeros(B, TOKENS, C)
M = torch.zeros(B, FRAMES, C)
Q = torch.zeros(B, TOKENS, HEADS, DIM)
TABLE = sf.rope_table(torch.arange(FRAMES), GRID, DIM)
QKV = torch.zeros(B, TOKENS, 3 * C)
W = torch.zeros(C)
LAYOUT = sf.BlockLayout((FRAMES,), math.prod(GRID))
SLOTS = torch.arange(FRAMES, dtype=torch.int32)


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (lambda: sf.adaln(X, M[:, :2], M), "a divisor of the 45 tokens"),
        (lambda: sf.adaln(X, M[..., :4], M), r"shift has shape \[2, 3, 4\]"),
        (lambda: sf.adaln(X[0], M, M), r"x has shape \[45, 32\]"),
        (lambda: sf.adaln(X, M, M, impl="cuda"), "norm has triton, cpp, reference"),
        (lambda: sf.adaln(X, M, M, impl="gluon"), "norm has triton, cpp, reference"),
        (lambda: sf.gated_adaln(X, X.bfloat16(), M, M, M), "y has dtype torch.bfloat16"),
        (lambda: sf.gated_adaln(X, X[:1], M, M, M), "y has shape"),
        (lambda: sf.adaln(X, M.to("meta"), M), "shift is on meta"),
        (lambda: sf.rms_norm(X, W[:3]), r"weight has shape \[3\]"),
        (lambda: sf.layer_norm(X, W, W[:3]), r"bias has shape \[3\]"),
        (lambda: sf.rope_table(torch.zeros(3), GRID, DIM), "must be an integer tensor"),
        (lambda: sf.rope_table(SLOTS, GRID, 15), "head_dim=15"),
        (lambda: sf.qk_norm_rope(QKV, W, W, TABLE[:4]), r"table has shape \[4"),
        (lambda: sf.qk_norm_rope(QKV[..., :-2], W, W, TABLE), "94 channels"),
        (
            lambda: sf.qk_norm_rope_append(QKV, W, W, TABLE, Q[:, :30], Q[:, :30], SLOTS),
            "holds 30 tokens: must hold the chunk's 45",
        ),
        (
            lambda: sf.qk_norm_rope_append(QKV, W, W, TABLE, Q, Q.half(), SLOTS),
            "v_ring has dtype torch.float16",
        ),
        (
            lambda: sf.qk_norm_rope_append(QKV, W, W, TABLE, Q, Q, SLOTS[:2]),
            "must be whole frames",
        ),
        (lambda: sf.block_causal_attention(Q[:, :5], Q, Q, LAYOUT), r"q has shape \[2, 5"),
        (
            lambda: sf.block_causal_attention(Q, Q[:, :, :1], Q[:, :, :1], LAYOUT),
            "grouped-query attention is not offered",
        ),
        (lambda: sf.ring_attention(Q, Q, Q, torch.tensor(3.0)), "must be one int32 or int64"),
        (lambda: sf.sampler_step(Q, Q, W[:3]), r"sigma has shape \[3\]"),
        (lambda: sf.sampler_step(Q, Q, torch.tensor(1.0), torch.tensor(0.5)), "belong together"),
        (lambda: sf.sampler_step(Q, Q[:1], torch.tensor(1.0)), "flow has shape"),
    ],
)
def test_bad_input_says_what_is_wrong(call: Any, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        call()
