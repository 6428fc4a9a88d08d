"""The QK-norm + RoPE kernels against the reference: rotation, gradients, slots of a ring."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

import sfkernels as sf
from sfkernels import launch, reference
from sfkernels.launch import RowTile
from sfkernels.testing import close_as_eager, nan_filled
from tests.oracle import DEVICE, check, each, each_and_reference, each_size, rand

# Called with unpacked tensors, which mypy takes for arguments without end.
qk_norm_rope: Any = sf.qk_norm_rope
qk_norm_rope_append: Any = sf.qk_norm_rope_append
ring_attention: Any = sf.ring_attention

pytestmark = pytest.mark.usefixtures("fresh_seed")

# (rows of a program, batch, frames, (height, width), heads, head dim)
SIZES = [
    (8, 2, 2, (7, 9), 3, 16),
    (32, 1, 1, (3, 41), 2, 64),
    (1, 2, 2, (1, 5), 1, 128),
    (4, 1, 7, (1, 1), 5, 6),
]
# Of C++: rows that end inside a vector, strips of rows that end early.
OF_CPP = [(1, 2, 2, (5, 9), 7, 2), (1, 2, 2, (5, 9), 3, 34)]


@pytest.fixture
def size(request: pytest.FixtureRequest) -> Iterator[tuple[int, int, tuple[int, int], int, int]]:
    """batch, frames, grid, heads, head dim, under a setting with so many rows a program."""
    rows, *sizes = request.param
    row_setting = RowTile(rows, 8, per_sm=2)
    with launch.using(
        rope_table=row_setting, qk_norm_rope_fwd=row_setting, qk_norm_rope_bwd=row_setting
    ):
        yield tuple(sizes)


def frames_from(first: int, frames: int) -> Tensor:
    return torch.arange(first, first + frames, dtype=torch.int32, device=DEVICE)


@each
@pytest.mark.parametrize("size", SIZES, ids=str, indirect=True)
@pytest.mark.parametrize("first", [0, 5, 1030, 100_000, 2**31 - 10])
def test_rope_table_is_exact_at_any_frame(size: tuple, first: int, impl: str) -> None:
    _, frames, grid, _, head_dim = size
    frame_F = frames_from(first, frames)
    want = sf.rope_table(frame_F, grid, head_dim, impl="reference")
    for dtype in (torch.int32, torch.int64):
        strided = torch.stack((frame_F, frame_F), dim=1)[:, 0].to(dtype)
        with nan_filled():
            got = sf.rope_table(strided, grid, head_dim, impl=impl)
        torch.testing.assert_close(got, want, rtol=0, atol=2.5e-7)  # two units of float32 at 1


@each_size(SIZES, OF_CPP)
def test_qk_norm_rope(size: tuple, impl: str, dtype: torch.dtype) -> None:
    batch, frames, grid, heads, head_dim = size
    channels = heads * head_dim
    table = sf.rope_table(frames_from(70, frames), grid, head_dim, impl="reference")
    qkv = rand(batch, len(table), 3 * channels)

    def op(qkv: Tensor, q_weight: Tensor, k_weight: Tensor, *, impl: str) -> tuple[Tensor, ...]:
        return sf.qk_norm_rope(qkv, q_weight, k_weight, table, impl=impl)

    check(op, (qkv, 1 + rand(channels) / 4, 1 + rand(channels) / 4), dtype, impl=impl)
    check(op, (qkv, *rand(2, channels)), dtype, wide=[1, 2], impl=impl)


@pytest.mark.parametrize("fused", [True, False])
@each_size(SIZES, OF_CPP)
def test_norms_of_heads_and_none(size: tuple, impl: str, dtype: torch.dtype, fused: bool) -> None:
    """And one table for each sample; q, k and v from one projection or from three."""
    batch, frames, grid, heads, head_dim = size
    channels = heads * head_dim
    first = torch.arange(batch, dtype=torch.int32, device=DEVICE)[:, None]
    table = sf.rope_table(5 * first + frames_from(3, frames), grid, head_dim, impl="reference")
    qkv = rand(3, batch, table.shape[1], channels)

    def op(q: Tensor, k: Tensor, v: Tensor, *weights: Tensor, impl: str) -> tuple[Tensor, ...]:
        three = torch.cat((q, k, v), dim=2) if fused else (q, k, v)
        return qk_norm_rope(three, *weights or (None, None), table, impl=impl)

    check(op, [*qkv], dtype, impl=impl)
    check(op, [*qkv, *rand(2, channels)], dtype, wide=[3], impl=impl)
    if impl == "triton" and head_dim & (head_dim - 1):
        with pytest.raises(ValueError, match="norms of heads of 6 channels"):
            op(*qkv.to(dtype), *rand(2, head_dim, dtype=dtype), impl=impl)
    else:
        check(op, [*qkv, *rand(2, head_dim)], dtype, wide=[3], impl=impl)


@each_and_reference
@pytest.mark.parametrize("rotate_k", [True, False])
def test_samples_at_different_frames(impl: str, rotate_k: bool) -> None:
    """Each is written, rotated and read as if it were alone."""
    frames, grid, heads, head_dim, window = 2, (2, 3), 2, 8, 5
    tokens, channels = math.prod(grid), heads * head_dim
    starts = torch.tensor([[0], [3], [40]], dtype=torch.int32, device=DEVICE)
    frame_F = starts + frames_from(0, frames)
    slot_F, valid = frame_F % window, (frame_F[:, -1] + 1).clamp(max=window) * tokens
    qkv = rand(3, 3, frames * tokens, channels, dtype=torch.float32)
    weights = rand(2, head_dim, dtype=torch.float32)
    old = rand(2, 3, window * tokens, heads, head_dim, dtype=torch.float32)

    def run(pick: slice) -> list[Tensor]:
        table = sf.rope_table(frame_F[pick], grid, head_dim, impl=impl)
        rings = old[:, pick].clone()
        three = tuple(qkv[:, pick])
        q = qk_norm_rope_append(
            three, *weights, table, *rings, slot_F[pick], rotate_k=rotate_k, impl=impl
        )
        reads = impl if impl != "cpp" else "auto"
        seen = {} if rotate_k else dict(k_table_SP2=positions[pick])
        o = ring_attention(q, *rings, valid[pick], **seen, impl=reads)
        moved = torch.zeros_like(rings[0])
        rotate = impl if impl != "cpp" else "auto"
        sf.rotate_keys(rings[0], positions[pick], valid[pick], moved, impl=rotate)
        return [q, *rings, o, moved]

    slots = torch.arange(window, device=DEVICE).repeat(3, 1) + starts
    positions = sf.rope_table(slots, grid, head_dim, impl="reference")
    together = run(slice(None))
    for i in range(3):
        for got, want in zip(together, run(slice(i, i + 1)), strict=True):
            torch.testing.assert_close(got[i : i + 1], want, rtol=1e-5, atol=1e-6)


def test_append_says_what_to_train_with() -> None:
    qkv = QKV.clone().requires_grad_()
    rings = RING.clone(), RING.clone()
    with pytest.raises(ValueError, match=r"no gradient: call it under torch.no_grad\(\), or train"):
        sf.qk_norm_rope_append(qkv, W, W, TABLE, *rings, SLOTS)
    with torch.no_grad():
        sf.qk_norm_rope_append(qkv, W, W, TABLE, *rings, SLOTS)


@each
def test_projection_and_gradients_may_be_views(impl: str) -> None:
    """As a chunk of a longer sequence, and as attention kernels return gradients."""
    table = sf.rope_table(frames_from(0, 2), (3, 5), 16, impl="reference")

    def op(longer: Tensor, q_weight: Tensor, k_weight: Tensor, *, impl: str) -> list[Tensor]:
        q, k, v = sf.qk_norm_rope(longer[:, 3:33], q_weight, k_weight, table, impl=impl)
        return [t.transpose(1, 2).contiguous() for t in (q, k, v)]

    check(op, (rand(2, 40, 96), rand(32), rand(32)), torch.float32, impl=impl)


@pytest.mark.parametrize("slot_dtype", [torch.int32, torch.int64])
@each_size(SIZES, OF_CPP)
def test_append_writes_its_slots_alone(
    size: tuple, impl: str, dtype: torch.dtype, slot_dtype: torch.dtype
) -> None:
    batch, frames, grid, heads, head_dim = size
    channels, tokens = heads * head_dim, math.prod(grid)
    table = sf.rope_table(frames_from(100_000, frames), grid, head_dim, impl="reference")
    slots = torch.randperm(frames + 2, device=DEVICE)[:frames].to(slot_dtype)
    slots = torch.stack((slots, slots), dim=1)[:, 0]  # need not be dense
    qkv, weights = rand(batch, frames * tokens, 3 * channels), rand(2, channels)

    def run(impl: str, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
        # A layer's part of a larger ring.
        rings = torch.full(
            (2, batch, 2, (frames + 2) * tokens, heads, head_dim), math.nan, device=DEVICE
        ).to(dtype)
        k_ring, v_ring = rings[0, :, 1], rings[1, :, 1]
        args = qkv.to(dtype), *weights.to(dtype), table, k_ring, v_ring, slots
        with nan_filled():
            q = sf.qk_norm_rope_append(*args, impl=impl)
        assert rings[:, :, 0].isnan().all()
        return q, k_ring, v_ring

    exact, eager, ours = (
        run("reference", torch.float64), run("reference", dtype), run(impl, dtype)
    )  # fmt: skip
    written = torch.zeros(frames + 2, tokens, dtype=torch.bool, device=DEVICE)
    written[slots.long()] = True
    for name, got, plain, want in zip("qkv", ours, eager, exact, strict=True):
        if name == "q":
            close_as_eager(name, got, plain, want)
        else:
            assert got[:, ~written.flatten()].isnan().all()
            close_as_eager(name, *(t[:, written.flatten()] for t in (got, plain, want)))


QKV = torch.zeros(2, 6, 3 * 8, device=DEVICE)
W = torch.zeros(8, device=DEVICE)
TABLE = torch.zeros(6, 2, 2, device=DEVICE)
RING = torch.zeros(2, 6, 2, 4, device=DEVICE)
BY_HEAD = torch.zeros(2, 2, 6, 4, device=DEVICE).transpose(1, 2)
SLOTS = torch.zeros(1, dtype=torch.int32, device=DEVICE)
rope = qk_norm_rope
append = functools.partial(sf.qk_norm_rope_append, QKV, W, W, TABLE)


@each
@pytest.mark.parametrize(
    ("call", "said"),
    [
        (
            lambda impl: rope(QKV, W, W, TABLE[..., :1].expand(-1, -1, 2), impl=impl),
            "table has stride 0 in its",
        ),
        (
            lambda impl: rope(QKV, W, W, TABLE[:, :1].expand(-1, 2, -1), impl=impl),
            "table has strides",
        ),
        (lambda impl: rope(QKV.double(), W, W, TABLE, impl=impl), "qkv is torch.float64"),
        (lambda impl: rope(QKV, W.to("meta"), W, TABLE, impl=impl), "q_weight is on meta"),
        (lambda impl: append(RING, RING.half(), SLOTS, impl=impl), "v_ring has dtype"),
        (lambda impl: rope((QKV, QKV), W, W, TABLE, impl=impl), "qkv is a tuple of 2: must be a"),
        (lambda impl: rope("qkv", W, W, TABLE, impl=impl), "qkv is a str: must be a tensor, or"),
        (
            lambda impl: rope([QKV, QKV, None], W, W, TABLE, impl=impl),
            "v is None: must be a tensor, as q",
        ),
        (lambda impl: rope([QKV] * 3, W, W, TABLE, impl=impl), r"q_weight has shape \[8\]"),
        (lambda impl: rope(QKV, W, None, TABLE, impl=impl), "k_weight is None: must be a tensor"),
        (lambda impl: rope(QKV, (W,), W, TABLE, impl=impl), "q_weight is a tuple: must be a tens"),
        (
            lambda impl: append(RING, RING, SLOTS.expand(3, 1), impl=impl),
            r"slot_F has shape \[3, 1\]: must be \[2, F\]",
        ),
        (
            lambda impl: append(RING, BY_HEAD, SLOTS, impl=impl),
            "heads of a slot must lie side by side",
        ),
        (
            lambda impl: append(RING[:, :4], RING[:, :4], SLOTS, impl=impl),
            "must hold the chunk's 6",
        ),
        (lambda impl: append(RING, RING, SLOTS.float(), impl=impl), "must be an integer tensor"),
        (lambda impl: append(RING, RING, SLOTS.to("meta"), impl=impl), "slot_F is on meta"),
    ],
)
def test_bad_input_says_what_is_wrong(call: Callable[[str], Any], said: str, impl: str) -> None:
    with pytest.raises(ValueError, match=said):
        call(impl)


@pytest.mark.parametrize("valid", [-3, 0, 1, 13, 14, 100])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_keys_rotated_into_a_ring(valid: int, dtype: torch.dtype) -> None:
    """The first `valid` of them, into the first slots of one layer of a ring; nothing else."""
    batch, tokens, heads, head_dim = 2, 14, 3, 16
    table = sf.rope_table(frames_from(9, tokens), (1, 1), head_dim, impl="reference")
    count = torch.tensor(valid, device=DEVICE, dtype=torch.int32)

    def op(k: Tensor, rings: Tensor, impl: str) -> Tensor:
        rings = rings.clone()
        with launch.using(qk_norm_rope_fwd=RowTile(4, 8)):
            sf.rotate_keys(k[:, 1], table, count, rings[:, 1], impl=impl)
        return rings

    tensors = [rand(batch, 2, tokens, heads, head_dim), rand(batch, 2, 20, heads, head_dim)]
    check(op, tensors, dtype, gradients=False)
    k, rings = tensors
    changed = (op(k, rings, "reference") != rings).flatten(3).any(3)
    written = max(0, min(valid, tokens))
    assert changed[:, 1, :written].all() and changed.sum() == batch * written


def test_keys_are_moved_in_time_alone() -> None:
    """A key that was rotated at one frame, by a table of single tokens, to that of another."""
    head_dim, grid = 32, (3, 5)
    keys = rand(1, 15, 2, head_dim)
    at, later = (
        sf.rope_table(frames_from(first, 1), grid, head_dim, impl="reference") for first in (4, 11)
    )
    move = sf.rope_table(torch.full((15,), 7, device=DEVICE), (1, 1), head_dim, impl="reference")
    moved = torch.zeros_like(keys)
    count = torch.tensor(15, device=DEVICE)
    sf.rotate_keys(reference.rope(keys, at), move, count, moved, impl="reference")
    torch.testing.assert_close(moved, reference.rope(keys, later), rtol=1e-6, atol=1e-6)


K = torch.zeros(1, 6, 2, 8, device=DEVICE)
MOVE, COUNT = torch.zeros(6, 4, 2, device=DEVICE), torch.tensor(6, device=DEVICE)


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (lambda: sf.rotate_keys(K, MOVE[1:], COUNT, K + 1), r"table has shape .* \[6, 4, 2\]"),
        (lambda: sf.rotate_keys(K, MOVE, COUNT.float(), K + 1), "valid is torch.float32"),
        (lambda: sf.rotate_keys(K, MOVE, COUNT, K[:, 1:].clone()), "out holds 5 tokens: must hold"),
        (lambda: sf.rotate_keys(K, MOVE, COUNT, K), "out and k share memory"),
        (lambda: sf.rotate_keys(K, MOVE, COUNT, K.half()), "out has dtype torch.float16"),
        (lambda: sf.rotate_keys(K, MOVE, COUNT, K + 1, impl="cpp"), "rotate_keys has triton, ref"),
        (lambda: sf.rotate_keys(K[0], MOVE, COUNT, K + 1), r"k has shape \[6, 2, 8\]"),
        (lambda: sf.rotate_keys(K[:, :0], MOVE[:0], COUNT, K + 1), "must have keys"),
    ],
)
def test_keys_that_cannot_be_rotated(call: Callable[[], None], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        call()
