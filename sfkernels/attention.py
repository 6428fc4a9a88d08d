"""Attention of a training pass under a BlockLayout, of a streaming chunk over a ring, and to text.
Shapes are named as in reference.py."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from sfkernels import library_attention, reference
from sfkernels.arguments import (
    check_device,
    check_floating,
    check_lengths,
    check_positive,
    check_rotation,
    check_same,
    check_shape,
    numbers,
)
from sfkernels.dispatch import choose, kernel, ranking, registered
from sfkernels.kv_cache import semaphores_needed
from sfkernels.layout import (
    BlockLayout,
    Row,
    Span,
    as_spans,
    flat_rows,
    in_order,
    unflattened,
)

_RING_KERNELS = ("triton", "gluon", "cudnn")  # behind the registered op


class Prefix(NamedTuple):
    """Past keys and values that all queries of a pass see beside their own, and that take no
    gradient: the cache of a self-forcing rollout (arXiv 2506.08009, section 3.3).

    k, v [B, P, H, D]; spans: the tokens of them that are seen, half-open, None for all, () for
    none. What lies between spans must be finite too, as "gluon" multiplies some of it by zero. They
    are read again in the backward pass and must not change before it.
    """

    k_BPHD: Tensor
    v_BPHD: Tensor
    spans: tuple[Span, ...] | None = None


def block_causal_attention(
    q_BLHD: Tensor,
    k_BLHD: Tensor,
    v_BLHD: Tensor,
    layout: BlockLayout,
    *,
    prefix: Prefix | None = None,
    scale: float | None = None,
    deterministic: bool | None = None,
    impl: str = "auto",
) -> Tensor:
    """Softmax attention under the mask that `layout` describes.

    q, k, v [B, layout.tokens, H, D]; scale defaults to D^-½; prefix: what all queries see as well.
    deterministic: whether gradients are to be the same bits in every run, where it is faster not
    to ("gluon", heads of 128, no prefix); None: as torch.use_deterministic_algorithms says now,
    which alone decides for the kernels of libraries.
    Returns [B, L, H, D]. Raises ValueError for shapes that do not fit the layout or each other
    (grouped-query attention, fewer key heads than query heads, is not offered)."""
    if not isinstance(layout, BlockLayout):
        raise ValueError(f"layout is a {type(layout).__name__}: must be a BlockLayout")
    _check_heads(q_BLHD, k_BLHD, v_BLHD)
    check_shape("q", q_BLHD, ("B", layout.tokens, "H", "D"))
    check_shape("k", k_BLHD, tuple(q_BLHD.shape))
    spans = _check_prefix(prefix, q_BLHD)
    scale = _scale(scale, q_BLHD)
    past_k, past_v = (prefix.k_BPHD, prefix.v_BPHD) if prefix and spans else (None, None)
    named = dict(k=k_BLHD, v=v_BLHD, prefix_k=past_k, prefix_v=past_v)
    impl = _choose("attention", impl, q_BLHD, "", **named)
    if impl == "reference":
        return reference.block_causal_attention(
            q_BLHD, k_BLHD, v_BLHD, layout, scale, past_k, past_v, spans
        )
    if impl in library_attention.IMPLS:
        return library_attention.block_causal_attention(
            q_BLHD, k_BLHD, v_BLHD, layout.rows, scale, past_k, past_v, spans, impl
        )
    rows = flat_rows(*layout.fields)
    flat_spans = [edge for span in spans for edge in span]
    settings = scale, _deterministic(deterministic), impl
    return _attention(q_BLHD, k_BLHD, v_BLHD, past_k, past_v, rows, flat_spans, *settings)[0]


def _deterministic(asked: bool | None) -> bool:
    if asked is None:
        return torch.are_deterministic_algorithms_enabled()
    if not isinstance(asked, bool):
        raise ValueError(f"deterministic={asked!r}: must be True, False or None")
    return asked


def ring_attention(
    q_BLHD: Tensor,
    k_ring_BSHD: Tensor,
    v_ring_BSHD: Tensor,
    valid: Tensor,
    *,
    full: bool = False,
    k_table_SP2: Tensor | None = None,
    semaphores: Tensor | None = None,
    scale: float | None = None,
    impl: str = "auto",
) -> Tensor:
    """Softmax attention of a chunk over the first `valid` slots of a ring, read where they lie.

    q [B, L, H, D]; k_ring, v_ring [B, S, H, D], keys already rotated, so that their order does not
    matter; valid: an int32 or int64 scalar tensor on the same device, the tokens written so far,
    1 to S, or [B] of them where samples are at different frames. Every query sees every valid slot;
    what the others hold must be finite, as "gluon" multiplies some of it by zero.
    scale defaults to D^-½. Returns [B, L, H, D].
    A valid out of range raises ValueError; on a GPU, where looking would make the host wait, and
    under torch.compile it counts as the nearest in range.

    full: whether the caller knows on the host that every slot is valid and stays so in each replay
    of a CUDA graph that is being captured. cuDNN takes no length from the device, so that "cudnn"
    needs it; a graph to be replayed while the ring fills needs another implementation.

    k_table: the rotation [S, D/2, 2] (see `rope_table`) of the position that each slot has now, or
    [B, S, D/2, 2], for rings whose keys are stored unrotated and positions move with the window;
    the queries come rotated.

    semaphores: int32 zeros on the same device, those of a `RingKVCache` or at least B·H·⌈L/16⌉, by
    which programs that share the keys of a tile know the last of them to end. They are zeros again
    at the end; two calls at once need two such tensors. None: a new one for each call, whose
    zeroing is a launch more.

    Raises ValueError for shapes that do not fit. For training, see `Prefix`: this function has a
    gradient under impl="reference" and "sdpa" only."""
    impl = _choose_ring(
        impl, q_BLHD, k_ring_BSHD, v_ring_BSHD, valid, k_table_SP2, full, semaphores
    )
    scale = _scale(scale, q_BLHD)
    if impl not in _RING_KERNELS:
        if k_table_SP2 is not None:
            k_ring_BSHD = reference.rope(k_ring_BSHD, k_table_SP2)
        if impl == "reference":
            return reference.ring_attention(q_BLHD, k_ring_BSHD, v_ring_BSHD, valid, scale)
        return library_attention.ring_attention(
            q_BLHD, k_ring_BSHD, v_ring_BSHD, valid, scale, impl
        )
    return _ring_attention(
        q_BLHD, k_ring_BSHD, v_ring_BSHD, valid, k_table_SP2, semaphores, full, scale, impl
    )


def differs_when_full(impl: str, device: torch.device) -> bool:
    """Tells whether `ring_attention` computes otherwise once `full` is known."""
    return impl == "cudnn" or (impl == "auto" and "cudnn" in ranking("ring_attention", device))


def cross_attention(
    q_BLHD: Tensor,
    k_BSHD: Tensor,
    v_BSHD: Tensor,
    *,
    scale: float | None = None,
    deterministic: bool | None = None,
    impl: str = "auto",
) -> Tensor:
    """Softmax attention of every query over every key, for text; q [B, L, H, D], k and v
    [B, S, H, D]. deterministic: as of `block_causal_attention`. Returns [B, L, H, D]. Raises
    ValueError for shapes that do not fit."""
    _check_heads(q_BLHD, k_BSHD, v_BSHD)
    scale = _scale(scale, q_BLHD)
    impl = _choose("cross_attention", impl, q_BLHD, "", k=k_BSHD, v=v_BSHD)
    if impl == "reference":
        return reference.attention(q_BLHD, k_BSHD, v_BSHD, scale)
    if impl in library_attention.IMPLS:
        return library_attention.attention(q_BLHD, k_BSHD, v_BSHD, scale, impl)
    rows = [0, q_BLHD.shape[1], 1, 0, k_BSHD.shape[1]]
    settings = scale, _deterministic(deterministic), impl
    return _attention(q_BLHD, k_BSHD, v_BSHD, None, None, rows, [], *settings)[0]


def _choose_ring(
    impl: str,
    q_BLHD: Tensor,
    k_ring_BSHD: Tensor,
    v_ring_BSHD: Tensor,
    valid: Tensor,
    k_table_SP2: Tensor | None,
    full: bool,
    semaphores: Tensor | None,
) -> str:
    """Chooses the implementation; raises ValueError for what `ring_attention` does not take."""
    _check_heads(q_BLHD, k_ring_BSHD, v_ring_BSHD, "k_ring", "v_ring")
    slots = k_ring_BSHD.shape[1]
    check_lengths("valid", valid, q_BLHD)
    for count in numbers(valid) or ():
        if not 1 <= count <= slots:
            raise ValueError(f"valid is {count}: must be 1 to {slots}, the tokens of the ring")
        if full and count < slots:
            raise ValueError(
                f"full=True: valid is {count}, must be {slots}, the tokens of the ring"
            )
    if k_table_SP2 is not None:
        if q_BLHD.shape[3] % 2:
            raise ValueError(f"heads of {q_BLHD.shape[3]}: must be even to be rotated by k_table")
        check_rotation("k_table", k_table_SP2, len(q_BLHD), slots, q_BLHD.shape[3] // 2)
    if semaphores is not None:
        check_shape("semaphores", semaphores, ("N",))
        check_device("semaphores", semaphores, q_BLHD.device)
        needed = semaphores_needed(*q_BLHD.shape[:3])
        if (
            semaphores.dtype != torch.int32
            or len(semaphores) < needed
            or not semaphores.is_contiguous()
        ):
            raise ValueError(
                f"semaphores is {semaphores.dtype} {[*semaphores.shape]} of strides "
                f"{semaphores.stride()}: must be contiguous int32, at least [{needed}]"
            )
    named = dict(k_ring=k_ring_BSHD, v_ring=v_ring_BSHD, k_table=k_table_SP2)
    impl = _choose("ring_attention", impl, q_BLHD, "" if full else "cudnn", **named)
    if impl not in _RING_KERNELS:
        return impl
    if impl == "cudnn" and not full:
        raise ValueError(
            "impl='cudnn' reads every slot of a ring: pass full=True once all are valid, and use "
            "'triton' before"
        )
    side_by_side = k_ring_BSHD.stride(2) == k_ring_BSHD.shape[3]
    if k_table_SP2 is not None and not (k_table_SP2.is_contiguous() and side_by_side):
        raise ValueError(
            f"k_table has strides {k_table_SP2.stride()} and k_ring {k_ring_BSHD.stride()}: the "
            "table must be contiguous and the heads of a slot lie side by side"
        )
    return impl


def _check_heads(
    q_BLHD: Tensor, k_BSHD: Tensor, v_BSHD: Tensor, k_name: str = "k", v_name: str = "v"
) -> None:
    check_shape("q", q_BLHD, ("B", "L", "H", "D"))
    check_floating("q", q_BLHD)
    batch, _, heads, head_dim = q_BLHD.shape
    check_shape(k_name, k_BSHD, ("B", "S", "H", "D"))
    if k_BSHD.shape[2] != heads:
        raise ValueError(
            f"q has {heads} heads and {k_name} {k_BSHD.shape[2]}: grouped-query attention is not "
            "offered; repeat the heads of keys and values"
        )
    check_shape(k_name, k_BSHD, (batch, "S", heads, head_dim))
    check_shape(v_name, v_BSHD, tuple(k_BSHD.shape))
    check_same(k_name, k_BSHD, "q", q_BLHD)
    check_same(v_name, v_BSHD, "q", q_BLHD)
    if not q_BLHD.numel() or not k_BSHD.numel():
        raise ValueError(
            f"q has shape {[*q_BLHD.shape]} and {k_name} {[*k_BSHD.shape]}: must not be empty"
        )


def _check_prefix(prefix: Prefix | None, q_BLHD: Tensor) -> tuple[Span, ...]:
    """The spans of the prefix that are seen."""
    if prefix is None:
        return ()
    if not isinstance(prefix, Prefix):
        raise ValueError(f"prefix is a {type(prefix).__name__}: must be a Prefix")
    _check_heads(q_BLHD, prefix.k_BPHD, prefix.v_BPHD, "prefix k", "prefix v")
    tokens = prefix.k_BPHD.shape[1]
    spans = ((0, tokens),) if prefix.spans is None else prefix.spans
    if not isinstance(spans, Sequence) or not in_order(spans, tokens):
        raise ValueError(
            f"prefix spans {spans}: must be non-empty pairs of integers, in order, apart from each "
            f"other and inside 0..{tokens}"
        )
    return spans


def _choose(op: str, impl: str, q_BLHD: Tensor, without: str, **others: Tensor | None) -> str:
    """Chooses the implementation. What our kernels are not made for, longer heads and float32,
    which they multiply exactly and slowly, is for "sdpa" to take under "auto" on a GPU."""
    made_for = q_BLHD.shape[3] <= 128 and q_BLHD.dtype in (torch.bfloat16, torch.float16)
    if impl == "auto" and q_BLHD.device.type == "cuda" and not made_for:
        impl = "sdpa"
    return choose(op, impl, q_BLHD.device, "", without, q=q_BLHD, **others)


def _scale(scale: float | None, q_BLHD: Tensor) -> float:
    if scale is None:
        return float(q_BLHD.shape[-1] ** -0.5)
    check_positive("scale", scale)
    return scale


@registered("attention")
def _attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    k_prefix: Tensor | None,
    v_prefix: Tensor | None,
    rows: Sequence[int],
    prefix: Sequence[int],
    scale: float,
    deterministic: bool,
    impl: str,
) -> tuple[Tensor, Tensor]:
    """o, and the logarithm of each query's sum of exponentials, which has no gradient."""
    seen = _check_pattern(q, k, v, k_prefix, v_prefix, rows, prefix, scale, impl)
    o, lse = kernel(impl, "attention_fwd")(
        q, k, v, seen, k_prefix, v_prefix, as_spans(prefix), scale
    )
    return o, lse


@_attention.register_fake
def _(q: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    batch, queries, heads = q.shape[:3]
    lse = q.new_empty(batch, heads, queries, dtype=torch.float32)
    return torch.empty_like(q, memory_format=torch.contiguous_format), lse


@registered("attention_bwd")
def _attention_bwd(
    do: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    o: Tensor,
    lse: Tensor,
    k_prefix: Tensor | None,
    v_prefix: Tensor | None,
    rows: Sequence[int],
    prefix: Sequence[int],
    scale: float,
    deterministic: bool,
    impl: str,
) -> tuple[Tensor, Tensor, Tensor]:
    seen = _check_pattern(q, k, v, k_prefix, v_prefix, rows, prefix, scale, impl)
    for name, t in (("do", do), ("o", o)):
        check_shape(name, t, tuple(q.shape))
        check_same(name, t, "q", q)
    check_shape("lse", lse, (q.shape[0], q.shape[2], q.shape[1]))
    if lse.dtype != torch.float32 or not lse.is_contiguous() or not o.is_contiguous():
        raise ValueError(
            f"lse is {lse.dtype} of strides {lse.stride()}, o has {o.stride()}: both must be "
            "contiguous, lse in float32"
        )
    do = do if do.stride()[2:] == (do.shape[3], 1) else do.contiguous()
    dq, dk, dv = kernel(impl, "attention_bwd")(
        do, q, k, v, o, lse, seen, k_prefix, v_prefix, as_spans(prefix), scale, deterministic
    )
    return dq, dk, dv


@_attention_bwd.register_fake
def _(do: Tensor, q: Tensor, k: Tensor, v: Tensor, *_: Any) -> tuple[Tensor, ...]:
    return tuple(torch.empty_like(t, memory_format=torch.contiguous_format) for t in (q, k, v))


def _no_second_derivative(ctx: Any, *grads: Tensor | None) -> Any:
    raise RuntimeError(
        "kernels of attention have no second derivative: take it with impl='reference' inside "
        "torch.nn.attention.sdpa_kernel(SDPBackend.MATH)"
    )


_attention_bwd.register_autograd(_no_second_derivative)


def _setup_context(ctx: Any, inputs: Any, output: Any) -> None:
    q, k, v, k_prefix, v_prefix, *ctx.options = inputs
    ctx.save_for_backward(q, k, v, *output, k_prefix, v_prefix)
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, do: Tensor | None, _: None) -> Any:
    if do is None:
        return (None,) * 10
    grads = _attention_bwd(do, *ctx.saved_tensors, *ctx.options)
    return *grads, *(None,) * 7


_attention.register_autograd(_backward, setup_context=_setup_context)


@registered("ring_attention")
def _ring_attention(
    q: Tensor,
    k_ring: Tensor,
    v_ring: Tensor,
    valid: Tensor,
    k_table: Tensor | None,
    semaphores: Tensor | None,
    full: bool,
    scale: float,
    impl: str,
) -> Tensor:
    """Attention over a ring. Counting in `semaphores` is no mutation: they end as they were."""
    _choose_ring(impl, q, k_ring, v_ring, valid, k_table, full, semaphores)
    check_positive("scale", scale)
    if k_table is not None:
        k_ring = kernel("triton", "rotate_keys")(k_ring, k_table, valid)
    o: Tensor = kernel(impl, "ring_attention")(q, k_ring, v_ring, valid, semaphores, scale)
    return o


@_ring_attention.register_fake
def _(q: Tensor, *_: Any) -> Tensor:
    return torch.empty_like(q, memory_format=torch.contiguous_format)


def _check_pattern(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    k_prefix: Tensor | None,
    v_prefix: Tensor | None,
    rows: Sequence[int],
    prefix: Sequence[int],
    scale: float,
    impl: str,
) -> tuple[Row, ...]:
    """The rows of a pattern. Raises ValueError for what an op does not take, which may be called
    without its function."""
    _check_heads(q, k, v)
    if k_prefix is not None and v_prefix is not None:
        _check_prefix(Prefix(k_prefix, v_prefix, as_spans(prefix)), q)
    elif prefix or k_prefix is not None or v_prefix is not None:
        raise ValueError("k_prefix, v_prefix and the spans of prefix belong together")
    check_positive("scale", scale)
    _choose("attention", impl, q, "", k=k, v=v, prefix_k=k_prefix, prefix_v=v_prefix)
    return unflattened(tuple(rows), q.shape[1], k.shape[1])


def _no_gradient(ctx: Any, do: Tensor) -> Any:
    raise RuntimeError(
        "ring_attention has a gradient under impl='reference' and 'sdpa' only: to train, pass the "
        "past as block_causal_attention(..., prefix=Prefix(k, v))"
    )


_ring_attention.register_autograd(_no_gradient)
