"""Nonsense: every function says in a sentence what is wrong, and kernels, which cannot look at a
number on their device, stay inside their memory."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses import FakeTensorMode

import sfkernels as sf
from sfkernels import Noise, Prefix, attention, norm, reference, rope, sampler
from tests.oracle import DEVICE, each_and_reference

HEADS, DIM, FRAMES, GRID, SLOTS = 2, 4, 2, (1, 3), 4
TOKENS, CHANNELS = FRAMES * 3, HEADS * DIM
X = torch.zeros(1, TOKENS, CHANNELS, device=DEVICE)
W = torch.ones(CHANNELS, device=DEVICE)
STATS = torch.ones(1, TOKENS, 2, device=DEVICE)
M = torch.zeros(1, FRAMES, CHANNELS, device=DEVICE)
QKV = torch.zeros(1, TOKENS, 3 * CHANNELS, device=DEVICE)
THREE = QKV, None, None  # as an op takes the fused projection
TABLE = torch.zeros(TOKENS, DIM // 2, 2, device=DEVICE)
RING = torch.zeros(1, SLOTS * 3, HEADS, DIM, device=DEVICE)
PAIR = torch.zeros(1, 2 * SLOTS * 3, HEADS, DIM, device=DEVICE)
FRAME = torch.arange(FRAMES, device=DEVICE)
Q = torch.zeros(1, TOKENS, HEADS, DIM, device=DEVICE)
S = torch.zeros((), device=DEVICE)
NOISE = Noise(torch.zeros(1, dtype=torch.int64, device=DEVICE), FRAME, 0)
LATENTS = torch.zeros(1, FRAMES, 5, device=DEVICE)
OTHER_DTYPES = [torch.bool, torch.int32, torch.complex64, torch.float8_e4m3fn]
BAD_NUMBERS = [0.0, -1.0, math.nan, math.inf, 1e-60, None, "1"]

on_cpu = pytest.mark.skipif(DEVICE == "cuda", reason="values of CUDA tensors are not looked at")


def refused(call: Callable[[], Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        call()


def append(
    k: Any = RING,
    v: Any = PAIR[:, : SLOTS * 3],
    slots: Any = (0, 1),
    impl: str = "auto",
    **more: Any,
) -> Tensor:
    args = dict(qkv_BLC=QKV, q_weight_C=W, k_weight_C=W, table_LP2=TABLE) | more
    slot_F = torch.tensor(slots, device=DEVICE) if isinstance(slots, tuple) else slots
    return sf.qk_norm_rope_append(**args, k_ring_BSHD=k, v_ring_BSHD=v, slot_F=slot_F, impl=impl)


@pytest.mark.parametrize("value", BAD_NUMBERS, ids=str)
@each_and_reference
def test_numbers_that_are_divided_by(value: Any, impl: str) -> None:
    rings = RING, PAIR[:, : SLOTS * 3], FRAME
    for call in (
        lambda **eps: sf.layer_norm(X, W, W, impl=impl, **eps),
        lambda **eps: sf.rms_norm(X, W, impl=impl, **eps),
        lambda **eps: sf.adaln(X, M, M, impl=impl, **eps),
        lambda **eps: sf.gated_adaln(X, X, M, M, M, impl=impl, **eps),
        lambda **eps: sf.gated_layer_norm(X, X, M, W, W, impl=impl, **eps),
        lambda **eps: sf.rms_norm_silu(X, W, impl=impl, **eps),
        lambda **eps: sf.qk_norm_rope(QKV, W, W, TABLE, impl=impl, **eps),
        lambda **eps: sf.qk_norm_rope_append(QKV, W, W, TABLE, *rings, impl=impl, **eps),
    ):
        refused(lambda: call(eps=value), "eps=")  # noqa: B023
    refused(lambda: sf.rope_table(FRAME, GRID, DIM, theta=value, impl=impl), "theta=")
    if value is not None and impl != "cpp":
        refused(lambda: sf.ring_attention(Q, RING, RING, FRAME[1], scale=value, impl=impl), "scale")
    if value not in (0.0, -1.0, 1e-60):
        step = LATENTS, LATENTS, S
        refused(lambda: sf.sampler_step(*step, guidance=value, impl=impl), "guidance=")
        refused(lambda: sf.euler_step(*step, S, guidance=value, impl=impl), "guidance=")


@each_and_reference
@pytest.mark.parametrize(
    ("grid", "head_dim", "said"),
    [
        ((-1, -1), 8, "height of the grid=-1: must be at least 1"),
        ((2, 0), 8, "width of the grid=0"),
        ((2.5, 1), 8, "height of the grid=2.5: must be an integer"),
        ((2,), 8, r"grid is \(2,\): must be \(height, width\)"),
        ((2**40, 1), 8, "elements of the table=.* at most 2147483647"),
        ((2**31, 2**31), 8, "elements of the table="),
        ((2, 2), 0, "head_dim=0"),
        ((2, 2), -2, "head_dim=-2"),
        ((2, 2), 3, "head_dim=3: must be even"),
        ((2, 2), 2**40, "elements of the table="),
    ],
)
def test_sizes_of_a_table(grid: Any, head_dim: int, said: str, impl: str) -> None:
    refused(lambda: sf.rope_table(FRAME, grid, head_dim, impl=impl), said)
    refused(lambda: sf.rope_table(FRAME[:0], grid, head_dim, impl=impl), said)


@each_and_reference
def test_integers_of_other_types(impl: str) -> None:
    for dtype in (torch.int8, torch.uint8, torch.int16, torch.bool, torch.uint16, torch.float32):
        frame, said = FRAME.to(dtype), f"is {dtype} .*must be an integer tensor"
        refused(lambda: sf.rope_table(frame, GRID, DIM, impl=impl), said)  # noqa: B023
        refused(lambda: append(slots=frame, impl=impl), said)  # noqa: B023


@on_cpu
@each_and_reference
@pytest.mark.parametrize(
    ("slots", "said"),
    [
        ((-1, 0), "slot_F has -1: the ring's slots are 0 to 3"),
        ((4, 0), "slot_F has 4"),
        ((2**31 - 1, 0), "slot_F has 2147483647"),
        ((2**62, 0), "slot_F has 4611686018427387904"),
        ((3, 3), r"slot_F is \[3, 3\]: each frame needs a slot of its own"),
    ],
)
def test_slots(slots: Any, said: str, impl: str) -> None:
    before = RING.clone()
    refused(lambda: append(slots=slots, impl=impl), said)
    assert torch.equal(RING, before)


@each_and_reference
@pytest.mark.parametrize(
    ("k", "v", "said"),
    [
        (RING, RING, "share memory"),
        (PAIR[:, :12], PAIR[:, 6:18], "share memory"),
        (PAIR[:, ::2], PAIR[:, ::2], "share memory"),
        (RING[:, :1].expand(-1, 12, -1, -1), PAIR[:, :12], "writing one of its rows changes"),
        (RING, PAIR[:, :9], r"v_ring has shape \[1, 9, 2, 4\]"),
        (QKV.view(1, 18, 2, 4)[:, :12], RING, "share"),
        (None, RING, "k_ring is None: must be a tensor"),
    ],
)
def test_rings(k: Any, v: Any, said: str, impl: str) -> None:
    refused(lambda: append(k, v, impl=impl), said)


@each_and_reference
def test_two_rings_may_lie_in_one_tensor(impl: str) -> None:
    """One behind the other, token by token, or layer by layer."""
    for k, v in (
        (PAIR[:, :12], PAIR[:, 12:]),
        (PAIR[:, ::2], PAIR[:, 1::2]),
        torch.zeros(3, 2, 1, 12, HEADS, DIM, device=DEVICE)[1].unbind(),
        torch.zeros(1, 2, 12, HEADS, DIM, device=DEVICE).unbind(1),
    ):
        append(k, v, impl=impl)


@each_and_reference
def test_tables_without_pairs_and_rows_without_channels(impl: str) -> None:
    refused(lambda: append(table_LP2=TABLE[:, :0], impl=impl), "must have a pair or more")
    refused(lambda: sf.qk_norm_rope(QKV[..., :0], W, W, TABLE, impl=impl), "qkv has 0 channels")
    refused(lambda: sf.rms_norm(X[..., :0], W[:0], impl=impl), "its rows must have an element")


@each_and_reference
@pytest.mark.parametrize("kind", ["none", "number", "sparse", "meta", *OTHER_DTYPES], ids=str)
def test_tensors_of_other_kinds(kind: Any, impl: str) -> None:
    for function, *args in (
        (sf.layer_norm, X, W, W),
        (sf.gated_adaln, X, X, M, M, M),
        (sf.rms_norm_silu, X, W),
        (sf.qk_norm_rope, QKV, W, W, TABLE),
        (sf.sampler_step, LATENTS, LATENTS, S),
        (sf.euler_step, LATENTS, LATENTS, S, S),
        (sf.dmd_gradient, LATENTS, LATENTS, LATENTS),
        (sf.quantize_rows, X),
    ):
        for i in range(len(args)):
            if (i, kind) == (0, "meta") or (function, i, kind) == (sf.gated_adaln, 2, "none"):
                continue  # asks for shapes; may be left out
            spoilt = [*args[:i], spoil(args[i], kind), *args[i + 1 :]]
            with pytest.raises(ValueError, match=r"must be|takes"):
                function(*spoilt, impl=impl)


@on_cpu
@pytest.mark.parametrize("impl", ["auto", "triton", "sdpa", "reference"])
@pytest.mark.parametrize("valid", [0, -3, -12, 13, 10**9, -(2**31)])
def test_tokens_of_a_ring(valid: int, impl: str) -> None:
    said = f"valid is {valid}: must be 1 to 12"
    refused(lambda: sf.ring_attention(Q, RING, RING, torch.tensor(valid), impl=impl), said)


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (lambda: sf.BlockLayout((1.5,), 4), "chunks="),  # type: ignore[arg-type]
        (lambda: sf.BlockLayout([1, 1], 4), "a tuple of"),  # type: ignore[arg-type]
        (lambda: sf.BlockLayout((1,), 0), "frame_tokens=0: must be at least 1"),
        (lambda: sf.BlockLayout((1,), 2, window=-1), "window=-1"),
        (lambda: sf.BlockLayout((1,), 2, window=2.5), "window=2.5"),  # type: ignore[arg-type]
        (lambda: sf.BlockLayout((1,), 2, sink=-1), "sink=-1"),
        (lambda: sf.BlockLayout.causal(0, 1, 2), "frames=0"),
        (lambda: sf.BlockLayout.causal(4, -2, 2), "chunk=-2"),
        (lambda: sf.block_causal_attention(Q, Q, Q, None), "layout is a NoneType"),  # type: ignore[arg-type]
        (lambda: block(prefix=(Q, Q)), "must be a Prefix"),
        (lambda: block(prefix=Prefix(Q, Q, ((0,),))), "pairs of integers"),  # type: ignore[arg-type]
        (lambda: block(prefix=Prefix(Q, Q, (0, 2))), "pairs of integers"),  # type: ignore[arg-type]
        (lambda: block(prefix=Prefix(Q, Q, 2)), "pairs of integers"),  # type: ignore[arg-type]
        (lambda: block(prefix=Prefix(Q, Q, ((0.5, 2),))), "pairs of integers"),  # type: ignore[arg-type]
        (lambda: block(prefix=Prefix(Q, Q, ((-1, 2),))), "inside 0..6"),
        (lambda: block(prefix=Prefix(Q, Q[..., :2])), "prefix v has shape"),
        (lambda: block(scale=math.nan), "scale=nan"),
        (lambda: sf.cross_attention(Q.int(), Q.int(), Q.int()), "q is torch.int32"),
        (lambda: sf.cross_attention(Q, None, Q), "k is None"),  # type: ignore[arg-type]
        (lambda: sf.ring_attention(Q, RING, RING, 3), "valid is 3"),  # type: ignore[arg-type]
        (lambda: sf.ring_attention(Q[..., :3], RING[..., :3], RING[..., :3], FRAME[1],
                                   k_table_SP2=TABLE), "must be even"),
        (lambda: sf.normal(NOISE, (1, FRAMES, -2)), "a size of the noise=-2"),
        (lambda: sf.normal(NOISE, (1, FRAMES, 2**40)), "elements of a frame=1099511627776"),
        (lambda: sf.normal((NOISE.seed_B, FRAME, 0), (1, FRAMES)), "noise is a tuple"),  # type: ignore[arg-type]
        (lambda: sf.normal(NOISE._replace(draw=2**31), (1, FRAMES)), "draw=2147483648"),
        (lambda: sf.normal(NOISE._replace(draw=0.5), (1, FRAMES)), "draw=0.5"),  # type: ignore[arg-type]
        (lambda: sf.sampler_step(LATENTS, LATENTS, 0.5), "sigma is 0.5: must be a tensor"),  # type: ignore[arg-type]
        (lambda: sf.euler_step(LATENTS, LATENTS, S, None), "next_sigma is None: must be a tensor"),  # type: ignore[arg-type]
        (lambda: sf.quantize_rows(X, dtype=None), "dtype is None"),  # type: ignore[arg-type]
    ],
)  # fmt: skip
def test_the_rest(call: Callable[[], Any], said: str) -> None:
    refused(call, said)


def spoil(tensor: Tensor, kind: Any) -> Any:
    """Something of another kind in its place."""
    if kind in ("none", "number"):
        return None if kind == "none" else 1.0
    return tensor.to_sparse() if kind == "sparse" else tensor.to(kind)


def block(**more: Any) -> Tensor:
    return sf.block_causal_attention(Q, Q, Q, sf.BlockLayout((1, 1), 3), **more)


@pytest.mark.parametrize(
    ("op", "args", "said"),
    [
        (norm._norm, (X, M, M[..., :3], 1e-6, True, True), "shift has shape"),
        (norm._norm, (X, M[:, :, ::2], None, 1e-6, False, True), "scale has shape"),
        (norm._norm, (X, M, None, -1.0, False, True), "eps=-1.0"),
        (norm._norm_bwd, (X, X, M, M, X[..., :2].half(), True, True), "stats is torch.float16"),
        (norm._norm_bwd, (X, X, M, M, X[:, 1:, :2], True, True), "stats has shape"),
        (norm._residual_norm, (X, X[:, 1:], M, M, M, 1e-6, True), "y has shape"),
        (norm._residual_norm_bwd, (X, X, X, None, M, M, M, STATS, True), "without y"),
        (norm._rms_norm_silu, (X, W[1:], None, None, None, 1e-6), "weight has shape"),
        (norm._rms_norm_silu_bwd, (None, X[:, 1:], X, W, STATS), "dout has shape"),
        (rope._rope_table, (FRAME.float(), 1, 2, 4, 1e4), "frame_F is torch.float32"),
        (rope._qk_norm_rope, (*THREE, W, W[1:], TABLE, 1e-6), "k_weight has shape"),
        (rope._qk_norm_rope_bwd, (Q, Q, Q[:, 1:], *THREE, W, W, TABLE, STATS), "dv has shape"),
        (
            rope._qk_norm_rope_append,
            (*THREE, W, W, TABLE, RING, RING, FRAME, 1e-6, True),
            "share mem",
        ),
        (attention._attention, (Q, Q, Q, None, None, [0, 6, 1, 0, 7], [], 1.0, True), "rows="),
        (attention._attention, (Q, Q, Q, None, None, [0, 5, 1, 0, 6], [], 1.0, True), "cover the"),
        (attention._attention, (Q, Q, Q, None, None, [0, 6], [], 1.0, True), "rows="),
        (attention._attention, (Q, Q, Q, None, None, [0, 6, 1, 0, 6], [0, 9], 1.0, True), "belong"),
        (attention._attention, (Q, Q, Q, Q, Q, [0, 6, 1, 0, 6], [0, 9], 1.0, True), "prefix spans"),
        (
            attention._attention_bwd,
            (Q, Q, Q, Q, Q, S, None, None, [0, 6, 1, 0, 6], [], 1.0, True),
            "lse",
        ),
        (attention._ring_attention, (Q, RING, RING[1:], S, None, None, False, 1.0), "v_ring"),
        (sampler._normal, (FRAME[:1].int(), FRAME, 0, [1, 2, 3]), "seed_B is torch.int32"),
        (sampler._sampler_step, (LATENTS, LATENTS, None, S, S, None, None, None, 0, 1.0), "belong"),
        (sampler._euler_step, (LATENTS, LATENTS[..., 1:], None, S, S, 1.0), "flow has shape"),
        (sampler._dmd_gradient, (LATENTS, LATENTS, LATENTS[..., 1:]), "fake_x0 has shape"),
    ],
)  # fmt: skip
def test_a_registered_op_without_its_function(op: Any, args: tuple[Any, ...], said: str) -> None:
    refused(lambda: op.registered(*args, "triton"), said)
    with pytest.raises(ValueError, match="impl='reference': a registered op takes|" + said):
        op.registered(*args, "reference")


@each_and_reference
def test_what_cannot_be_looked_at(impl: str) -> None:
    """Numbers and memory are not there while a graph is made."""
    with FakeTensorMode(), torch.no_grad():
        q, ring = (torch.empty(t.shape, device=DEVICE) for t in (Q, RING))
        qkv, weight, table = (torch.empty(t.shape, device=DEVICE) for t in (QKV, W, TABLE))
        slot_F = torch.empty(FRAMES, dtype=torch.int32, device=DEVICE)
        args = qkv, weight, weight, table, ring, torch.empty_like(ring)
        assert sf.qk_norm_rope_append(*args, slot_F, impl=impl).shape == Q.shape
        assert sf.ring_attention(q, ring, ring, slot_F[0], impl="reference").shape == Q.shape


def guarded(shape: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """A tensor of random numbers between two of as many, and all three together."""
    whole = torch.randn(3, *shape, device=DEVICE)
    return whole[1], whole


@pytest.mark.parametrize("parts", [1, 3])
@pytest.mark.parametrize("valid", [-(2**31), 0, 101, 2**40 + 5])
def test_kernels_read_no_more_than_a_ring(
    valid: int, parts: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A length out of range counts as the nearest in range, also where keys are rotated first."""
    gpu = pytest.importorskip("sfkernels.gpu")
    monkeypatch.setattr("sfkernels.gpu.attention.key_splits", lambda *_: parts)
    (k, whole_k), (v, whole_v) = guarded((1, 100, 1, 16)), guarded((1, 100, 1, 16))
    whole_k[::2], whole_v[::2] = math.nan, math.nan
    q, length = torch.randn(1, 9, 1, 16, device=DEVICE), torch.tensor(valid, device=DEVICE)
    near = torch.tensor(min(max(valid, 1), 100), device=DEVICE)
    got = gpu.ring_attention(q, k, v, length, None, 0.3)
    want = reference.ring_attention(q, k, v, near, 0.3)
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)
    if valid > 0:
        table = torch.randn(100, 8, 2, device=DEVICE)
        rotated = gpu.rotate_keys(k, table, length)
        torch.testing.assert_close(rotated, reference.rope(k, table), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("wrong", [-1, 4, -(2**31), 2**31 - 1, 2**62])
def test_kernels_write_no_more_than_a_ring(wrong: int) -> None:
    """Nothing of a frame that has no slot; the other frame as ever."""
    gpu = pytest.importorskip("sfkernels.gpu")
    shape = 1, SLOTS * 3, HEADS, DIM
    (k, whole_k), (v, whole_v) = guarded(shape), guarded(shape)
    want = whole_k.clone(), whole_v.clone()
    qkv = torch.randn(1, TOKENS, 3 * CHANNELS, device=DEVICE)
    table = torch.randn(TOKENS, DIM // 2, 2, device=DEVICE)
    slots = torch.tensor([wrong, 2], device=DEVICE)
    gpu.qk_norm_rope_fwd(qkv, None, None, W, W, table, k, v, slots, 1e-6)
    second = qkv[:, 3:], None, None, W, W, table[3:]
    rings = want[0][1], want[1][1]
    reference.qk_norm_rope_append(*second, *rings, slots[1:], 1e-6)
    for got, expected in zip((whole_k, whole_v), want, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)
