"""Attention: every kernel beside the reference, no work on tiles that nobody sees, and what users
may pass."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses import FakeTensorMode

import sfkernels as sf
from sfkernels import launch, reference
from sfkernels.gpu.tiles import key_splits, visits
from sfkernels.kv_cache import semaphores_needed
from sfkernels.launch import Tile
from sfkernels.layout import BlockLayout, Row, Span, transpose
from sfkernels.testing import close_as_eager, nan_filled
from tests.oracle import DEVICE, DTYPES, check, rand

# Called with unpacked tensors, which mypy takes for arguments without end.
Prefix: Any = sf.Prefix
ring_attention: Any = sf.ring_attention
block_causal_attention: Any = sf.block_causal_attention
qk_norm_rope_append: Any = sf.qk_norm_rope_append

causal = functools.partial(BlockLayout.causal, 4, 2)
LAYOUTS = {
    "bidirectional": BlockLayout((3,), 13),
    "diffusion forcing": causal(13),
    "frame-wise": BlockLayout.causal(4, 1, 9),
    "teacher forcing": causal(11, teacher_forcing=True),
    "window and sink": BlockLayout.causal(7, 1, 7, window=4, sink=1),
    "window and sink, teacher forcing": BlockLayout.causal(
        6, 2, 7, window=5, sink=2, teacher_forcing=True
    ),
    "window across chunks": BlockLayout.causal(6, 2, 9, window=3),
    "independent first frame": BlockLayout.causal(5, 2, 15, first=1, teacher_forcing=True),
    "hidden first chunk": causal(16, hide_first=True),
    "all at once": BlockLayout.causal(
        7, 3, 5, first=1, window=5, sink=1, teacher_forcing=True, hide_first=True
    ),
}
# Small enough for several tiles a row; odd ends everywhere.
SMALL = dict(
    attention_fwd=Tile(16, 16, 4, 2),
    attention_dq=Tile(16, 32, 4, 2),
    attention_dkdv=Tile(32, 16, 4, 1),
)


@pytest.fixture(autouse=True)
def small_tiles(fresh_seed: int) -> Iterator[None]:
    with launch.using(**SMALL):
        yield


def attend(layout: BlockLayout, *qkv: Tensor, impl: str, prefix: Any = None) -> Tensor:
    return block_causal_attention(*qkv, layout, prefix=prefix, impl=impl)


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS.keys())
def test_every_layout(layout: BlockLayout) -> None:
    check(functools.partial(attend, layout), [*rand(3, 2, layout.tokens, 2, 16)], torch.float32)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("head_dim", [8, 24, 64, 128])
def test_every_dtype_and_head_dim(dtype: torch.dtype, head_dim: int) -> None:
    layout = LAYOUTS["window and sink, teacher forcing"]
    check(functools.partial(attend, layout), [*rand(3, 1, layout.tokens, 2, head_dim)], dtype)


@pytest.mark.parametrize(
    "tiles", [Tile(16, 16, 4, 1), Tile(32, 16, 4, 2), Tile(16, 64, 4, 3), Tile(128, 128, 8, 2)]
)
def test_every_tile(tiles: Tile) -> None:
    layout = LAYOUTS["independent first frame"]
    kernels = dict.fromkeys(("attention_fwd", "attention_dq", "attention_dkdv"), tiles)
    with launch.using(**kernels):
        check(functools.partial(attend, layout), [*rand(3, 1, layout.tokens, 1, 32)], torch.float32)


def test_scale_views_and_large_values() -> None:
    """A projection's thirds, and gradients that come transposed; scores far from zero."""
    layout = LAYOUTS["diffusion forcing"]

    def op(qkv: Tensor, impl: str) -> Tensor:
        q, k, v = qkv[:, 1:-1].unflatten(-1, (-1, 16)).chunk(3, dim=2)
        out = block_causal_attention(5 * q, k, v, layout, scale=0.7, impl=impl)
        return out.transpose(1, 2).contiguous()

    check(op, [rand(2, layout.tokens + 2, 3 * 2 * 16)], torch.float32)


@pytest.mark.parametrize("spans", [None, ((3, 20),), ((0, 7), (16, 32), (33, 37))])
@pytest.mark.parametrize("name", ["bidirectional", "teacher forcing"])
def test_prefix(name: str, spans: tuple[Span, ...] | None) -> None:
    """The prefix takes part in the softmax and gets no gradient."""
    layout = LAYOUTS[name]

    def op(*tensors: Tensor, impl: str) -> Tensor:
        prefix = Prefix(*(t[:, 1:].detach() for t in tensors[3:]), spans)
        own = attend(layout, *tensors[:3], impl=impl, prefix=prefix)
        return own + 0 * (tensors[3].sum() + tensors[4].sum())

    check(op, [*rand(3, 2, layout.tokens, 2, 16), *rand(2, 2, 38, 2, 16)], torch.float32)
    layout = BlockLayout((1,), 5)
    q, k, v, *past = rand(5, 1, 5, 2, 16, dtype=torch.float32)
    for impl in ("triton", "sdpa", "reference"):  # of which nothing is seen
        none = attend(layout, q, k, v, impl=impl, prefix=Prefix(*past, ()))
        torch.testing.assert_close(none, attend(layout, q, k, v, impl=impl), rtol=0, atol=0)
    leaves = rand(5, 1, 5, 2, 16, dtype=torch.float32).requires_grad_()
    out = attend(layout, *leaves[:3], impl="triton", prefix=Prefix(*leaves[3:]))
    (grad,) = torch.autograd.grad(out.sum(), leaves)
    assert not grad[3:].any() and grad[:3].any()


def test_prefix_is_what_came_before() -> None:
    """A clip in one causal pass equals its last chunk over the others' keys as a prefix."""
    layout = causal(12)
    q, k, v = rand(3, 2, layout.tokens, 2, 16, dtype=torch.float32)
    whole = attend(layout, q, k, v, impl="triton")[:, 24:]
    last = [t[:, 24:] for t in (q, k, v)]
    prefix = Prefix(k, v, ((0, 24),))
    one = attend(BlockLayout((2,), 12), *last, impl="triton", prefix=prefix)
    torch.testing.assert_close(one, whole, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS.keys())
def test_transposed_pattern(layout: BlockLayout) -> None:
    mask = layout.dense_mask()
    seen = torch.zeros_like(mask)
    last = 0
    for (lo, hi), queries in transpose(layout.rows, layout.tokens):
        assert lo == last
        last = hi
        for a, b in queries:
            assert not seen[a:b, lo:hi].any()
            seen[a:b, lo:hi] = True
    assert last == layout.tokens and torch.equal(seen, mask)


@pytest.mark.skipif(DEVICE == "cuda", reason="counts calls of the interpreter")
@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS.keys())
def test_no_work_on_tiles_that_see_nothing(
    layout: BlockLayout, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each visit of a tile is two products forward, three for queries and four for keys backward;
    the number of visits is that of tiles in which the layout shows anything."""
    from triton.runtime.interpreter import InterpreterBuilder

    count = 0
    create_dot = InterpreterBuilder.create_dot

    def counting(*args: Any) -> Any:
        nonlocal count
        count += 1
        return create_dot(*args)

    monkeypatch.setattr(InterpreterBuilder, "create_dot", counting)
    q, k, v = rand(3, 1, layout.tokens, 1, 16, dtype=torch.float32).requires_grad_()
    out = attend(layout, q, k, v, impl="triton")
    assert count == 2 * visits(layout.rows, (), 16, 16)
    count = 0
    out.sum().backward()
    columns = transpose(layout.rows, layout.tokens)
    assert count == 3 * visits(layout.rows, (), 16, 32) + 4 * visits(columns, (), 32, 16)


def test_visits_are_those_of_the_layout() -> None:
    """By the layout's own account of blocks, at sizes where tiles divide chunks."""
    layout = BlockLayout.causal(8, 2, 16, window=5, sink=1, teacher_forcing=True)
    ours = visits(layout.rows, (), 32, 16)
    shown = layout.dense_mask().unflatten(0, (-1, 32)).unflatten(2, (-1, 16)).any(3).any(1)
    assert ours == int(shown.sum())


def test_unseen_keys_get_zero_gradients() -> None:
    """Queries of a later chunk alone: what they do not see must not keep what was in memory."""
    from sfkernels.gpu import attention_bwd, attention_fwd

    q, k, v = rand(3, 1, 40, 1, 16, dtype=torch.float32)
    rows = (Row((0, 40), ((5, 21),)),)
    with nan_filled():
        o, lse = attention_fwd(q, k, v, rows, None, None, (), 0.25)
        grads = attention_bwd(torch.ones_like(o), q, k, v, o, lse, rows, None, None, (), 0.25)
    for grad in grads[1:]:
        assert not grad[:, :5].any() and not grad[:, 21:].any() and grad[:, 5:21].all()


def test_backward_is_the_same_in_every_run() -> None:
    layout = LAYOUTS["teacher forcing"]
    q, k, v = rand(3, 2, layout.tokens, 2, 32, dtype=torch.float32).requires_grad_()
    upstream = rand(2, layout.tokens, 2, 32, dtype=torch.float32)
    first, second = (
        torch.autograd.grad(attend(layout, q, k, v, impl="triton"), (q, k, v), upstream)
        for _ in range(2)
    )
    assert all(map(torch.equal, first, second))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("valid", [1, 16, 33, 95, 100])
def test_ring(valid: int, dtype: torch.dtype) -> None:
    """Any number of queries over any part of the ring, split over keys as on a full card, where the
    last parts may find nothing to do."""

    def op(q: Tensor, *rings: Tensor, impl: str) -> Tensor:
        layer = (ring[:, 1] for ring in rings)
        return ring_attention(q, *layer, torch.tensor(valid, device=DEVICE), impl=impl)

    tensors = rand(2, 23, 1, 32), *rand(2, 2, 3, 100, 1, 32)
    check(op, tensors, dtype, gradients=False)


def test_ring_says_how_to_train() -> None:
    q = torch.zeros(1, 12, 2, 16, device=DEVICE, requires_grad=True)
    with pytest.raises(RuntimeError, match="to train, pass the past as block_causal_attention"):
        ring(q, X, X, ONE).sum().backward()


@pytest.mark.parametrize("impl", ["triton", "reference", "sdpa", "compiled"])
def test_slots_that_are_not_valid_are_not_read(impl: str) -> None:
    """NaN in them, of a stream before, stays there."""
    q, k, v = rand(1, 5, 2, 16, dtype=torch.float32), *rand(2, 1, 40, 2, 16, dtype=torch.float32)
    valid = torch.tensor(21, dtype=torch.int32, device=DEVICE)
    want = reference.attention(q, k[:, :21], v[:, :21], 0.25)
    k[:, 21:], v[:, 21:] = torch.nan, torch.nan
    named = functools.partial(ring_attention, impl="reference" if impl == "compiled" else impl)
    op = torch.compile(named, backend="eager") if impl == "compiled" else named
    torch.testing.assert_close(op(q, k, v, valid, scale=0.25), want)


@pytest.mark.parametrize("parts", [1, 2, 7])
def test_ring_in_parts(parts: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Joined by whoever ends last, who leaves the semaphores as they were."""
    monkeypatch.setattr("sfkernels.gpu.attention.key_splits", lambda *_: parts)
    semaphores = torch.zeros(semaphores_needed(1, 37, 2), dtype=torch.int32, device=DEVICE)
    for valid in (1, 40, 100):
        length = torch.tensor(valid, dtype=torch.int32, device=DEVICE)

        def op(*tensors: Tensor, impl: str, valid: Tensor = length) -> Tensor:
            options = dict(scale=0.3, semaphores=semaphores, impl=impl)
            return ring_attention(*tensors, valid, **options)

        check(op, [rand(1, 37, 2, 24), *rand(2, 1, 100, 2, 24)], torch.float32, gradients=False)
        assert not semaphores.any()


def test_splits_fill_the_card() -> None:
    """On the 132 multiprocessors of an H100, with tiles of 128 queries, 12 heads and a window of
    32,760 keys: a chunk of 4680 queries in two parts, a frame of 1560 in five."""
    keys = 32_760 // 128
    assert key_splits(37 * 12, 132, keys) == 2
    assert key_splits(13 * 12, 132, keys) == 5
    assert key_splits(132, 132, keys) == 1
    assert key_splits(1, 132, 3) == 3  # no part without a tile


@pytest.mark.parametrize("impl", ["triton", "reference", "sdpa"])
def test_keys_rotated_when_read(impl: str) -> None:
    """Keys stored unrotated, with a table for the slots, as those rotated before."""
    frames, grid, heads, dim = 3, (2, 3), 2, 16
    slots, channels = frames * 6, heads * dim
    table = sf.rope_table(torch.arange(frames, device=DEVICE) + 7, grid, dim, impl="reference")
    qkv, weights = rand(2, slots, 3 * channels).float(), rand(2, channels).float()
    at = torch.tensor([2, 0, 1], dtype=torch.int32, device=DEVICE)
    outs = []
    for rotate_k in (True, False):
        rings = torch.zeros(2, 2, slots, heads, dim, device=DEVICE)
        q = qk_norm_rope_append(
            qkv, *weights, table, *rings, at, rotate_k=rotate_k,
            impl="triton" if impl == "triton" else "reference",
        )  # fmt: skip
        # Frame f of the chunk lies in slot at[f], so that slot at[f] has frame f's position.
        by_slot = table.unflatten(0, (frames, -1))[at.long().argsort()].flatten(0, 1)
        valid = torch.tensor(slots, device=DEVICE)
        k_table = None if rotate_k else by_slot
        outs.append(ring_attention(q, *rings, valid, k_table_SP2=k_table, impl=impl))
    torch.testing.assert_close(*outs, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("impl", ["triton", "sdpa", "reference"])
def test_streaming_equals_one_pass(impl: str) -> None:
    """Chunk by chunk through a ring with a sink, past the wrap, as under the layout."""
    frames, chunk, tokens, window, sink = 10, 2, 7, 5, 1
    layout = BlockLayout.causal(frames, chunk, tokens, window=window, sink=sink)
    q, k, v = rand(3, 2, layout.tokens, 2, 16, dtype=torch.float32)
    whole = attend(layout, q, k, v, impl=impl)
    cache = sf.RingKVCache(
        layers=1, batch=2, window=window, sink=sink, frame_tokens=tokens, heads=2, head_dim=16,
        device=DEVICE,
    )  # fmt: skip
    outs = []
    for part in torch.arange(layout.tokens, device=DEVICE).split(chunk * tokens):
        at = cache.chunk(chunk)
        for ring, new in ((cache.k[0], k), (cache.v[0], v)):
            by_frame = ring.unflatten(1, (window, tokens))
            by_frame[:, at.slot_F.long()] = new[:, part].unflatten(1, (chunk, tokens))
        outs.append(ring_attention(q[:, part], cache.k[0], cache.v[0], at.valid, impl=impl))
        cache.commit(chunk)
    torch.testing.assert_close(torch.cat(outs, 1), whole, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("impl", ["triton", "sdpa"])
def test_cross_attention(impl: str) -> None:
    check(sf.cross_attention, [rand(2, 37, 2, 16), *rand(2, 2, 21, 2, 16)], torch.float32,
          impl=impl)  # fmt: skip


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS.keys())
def test_sdpa_by_rows(layout: BlockLayout) -> None:
    def op(*tensors: Tensor, impl: str) -> Tensor:
        prefix = Prefix(*(t.detach() for t in tensors[3:]), ((1, 3), (4, 9)))
        out = attend(layout, *tensors[:3], impl=impl, prefix=prefix)
        return out + 0 * sum(t.sum() for t in tensors[3:])

    tensors = [*rand(3, 2, layout.tokens, 2, 16), *rand(2, 2, 9, 2, 16)]
    check(op, tensors, torch.float32, impl="sdpa")


X = torch.zeros(1, 12, 2, 16, device=DEVICE)
LAYOUT = BlockLayout.causal(4, 2, 3)
ONE = torch.tensor(3, device=DEVICE)
block: Any = functools.partial(block_causal_attention, impl="triton")
ring: Any = functools.partial(ring_attention, impl="triton")


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (lambda: block(X, X, X, BlockLayout((3,), 5)), r"q has shape \[1, 12, 2, 16\]: must be"),
        (lambda: block(X, X[:, :, :1], X[:, :, :1], LAYOUT), "grouped-query attention is not"),
        (lambda: block(X, X[..., :8], X[..., :8], LAYOUT), r"k has shape .* must be \[1, S, 2, 16"),
        (lambda: block(X, X.half(), X, LAYOUT), "k has dtype torch.float16"),
        (lambda: block(X.double(), X.double(), X.double(), LAYOUT), "q is torch.float64"),
        (lambda: block(X, X, X.transpose(2, 3).contiguous().transpose(2, 3), LAYOUT), "v has str"),
        (lambda: block(X, X, X, LAYOUT, scale=-1.0), "scale=-1.0: must be positive"),
        (lambda: block(X, X, X, LAYOUT, deterministic="no"), "deterministic='no': must be True, F"),
        (lambda: block(X, X, X, LAYOUT, prefix=Prefix(X, X[:, :3])), "prefix v has shape"),
        (lambda: block(X, X, X, LAYOUT, prefix=Prefix(X, X, ((3, 3),))), "must be non-empty"),
        (lambda: block(X, X, X, LAYOUT, prefix=Prefix(X, X, ((3, 6), (5, 9)))), "apart from"),
        (lambda: block(X, X, X, LAYOUT, prefix=Prefix(X, X, ((3, 13),))), "inside 0..12"),
        (lambda: block(*[X.repeat(1, 1, 1, 9)] * 3, LAYOUT), "heads of 144: impl='triton' takes"),
        (lambda: ring(X, X, X, ONE.float()), "valid is torch.float32"),
        (lambda: ring(X, X, X, ONE.repeat(2)), "must be one int32 or int64"),
        (lambda: ring(X, X, X, ONE.to("meta")), "valid is on meta"),
        (lambda: ring(X, X[:, :0], X[:, :0], ONE), "must not be empty"),
        (lambda: ring(X, X, X, ONE, semaphores=ONE), r"semaphores has shape \[\]: must be \[N\]"),
        (lambda: ring(X, X, X, ONE, semaphores=X.flatten()), r"contiguous int32, at least \[2\]"),
        (lambda: ring(X, X, X, ONE, semaphores=ONE.int().view(1)), r"\[1\] .* at least \[2\]"),
        (lambda: ring(X, X, X, ONE, semaphores=ONE.int().expand(9)), r"of strides \(0,\): must be"),
        (
            lambda: ring(X, X, X, ONE, k_table_SP2=X),
            r"k_table has shape .* must be \[1, 12, 8, 2\]",
        ),
        (lambda: sf.cross_attention(X, X, X[:, :3], impl="triton"), "v has shape"),
        (lambda: sf.cross_attention(X, X, X, impl="cpp"), "cross_attention has triton, gluon"),
    ],
)
def test_bad_input_says_what_is_wrong(call: Callable[[], Tensor], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        call()


@pytest.mark.skipif(DEVICE == "cuda", reason="says what a CPU cannot run")
@pytest.mark.parametrize("impl", ["gluon", "flash"])
def test_kernels_for_gpus_refuse_a_cpu(impl: str) -> None:
    assert os.environ["TRITON_INTERPRET"] == "1"
    with pytest.raises(ValueError, match=f"impl='{impl}' takes CUDA tensors"):
        sf.cross_attention(X, X, X, impl=impl)


def test_the_best_is_chosen_by_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a GPU, without one."""
    chosen: list[str] = []

    def choose(op: str, impl: str, *args: Any, **tensors: Any) -> str:
        chosen.append(sf.dispatch.choose(op, impl, torch.device("cuda")))
        return "reference"

    monkeypatch.setattr("sfkernels.attention.choose", choose)
    with FakeTensorMode():
        for head_dim, dtype in ((128, torch.bfloat16), (128, torch.float32), (256, torch.float16)):
            x = torch.empty(1, 12, 2, head_dim, dtype=dtype, device="cuda")
            block_causal_attention(x, x, x, LAYOUT)
            ring_attention(x, x, x, torch.empty((), dtype=torch.int32, device="cuda"))
            sf.cross_attention(x, x, x)
    assert chosen == ["triton", "triton", "sdpa", *["sdpa"] * 6]


def test_lse_is_that_of_the_rows() -> None:
    from sfkernels.gpu import attention_fwd

    q, k, v = rand(3, 2, 30, 2, 16, dtype=torch.float32)
    rows: Sequence[Row] = (Row((0, 13), ((0, 13),)), Row((13, 30), ((2, 9), (13, 30))))
    _, lse = attention_fwd(q, k, v, tuple(rows), None, None, (), 0.25)
    scores = 0.25 * torch.einsum("blhd,bshd->bhls", q.double(), k.double())
    mask = torch.zeros(30, 30, dtype=torch.bool, device=DEVICE)
    for (start, end), spans in rows:
        for lo, hi in spans:
            mask[start:end, lo:hi] = True
    exact = scores.masked_fill(~mask, -torch.inf).logsumexp(-1) / torch.tensor(2.0).log()
    close_as_eager("lse", lse, exact.float(), exact)
