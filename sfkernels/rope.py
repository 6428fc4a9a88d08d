"""Query/key normalisation with 3-D rotary embedding, and the append to a ring.
Shapes are named as in reference.py."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from sfkernels import reference
from sfkernels.arguments import (
    TOO_MANY,
    check_apart,
    check_count,
    check_device,
    check_integers,
    check_lengths,
    check_positive,
    check_rotation,
    check_same,
    check_shape,
    check_tensor,
    numbers,
)
from sfkernels.dispatch import choose, contiguous_like, derivatives, kernel, registered


def rope_table(
    frame_F: Tensor,
    grid: tuple[int, int],
    head_dim: int,
    *,
    theta: float = 10_000.0,
    impl: str = "auto",
) -> Tensor:
    """Cosine and sine of every token's rotation, [L, D/2, 2] float32 with L = F · height · width.

    frame_F: int32 or int64 tensor [F] of absolute latent-frame indices, on the device of the
    tokens; of samples at different frames [B, F], for a table [B, L, D/2, 2]. grid: (height, width)
    in tokens. The D/2 pairs split into D/2 − 2⌊D/6⌋ for time and ⌊D/6⌋ each for height and width
    (Wan2.1). Raises ValueError for another frame_F, an empty grid, an odd head dim, a theta that is
    not positive and finite, and 2³¹ elements or more."""
    if isinstance(frame_F, Tensor) and frame_F.dim() == 2:
        table = rope_table(frame_F.flatten(), grid, head_dim, theta=theta, impl=impl)
        return table.unflatten(0, (frame_F.shape[0], -1))
    impl = _check_table(frame_F, *_sides(grid), head_dim, theta, impl)
    if impl == "reference":
        return reference.rope_table(frame_F, grid, head_dim, theta)
    return _rope_table(frame_F, *grid, head_dim, theta, impl)


def qk_norm_rope(
    qkv_BLC: Tensor | Sequence[Tensor],
    q_weight_C: Tensor | None,
    k_weight_C: Tensor | None,
    table_LP2: Tensor,
    *,
    eps: float = 1e-6,
    impl: str = "auto",
) -> tuple[Tensor, Tensor, Tensor]:
    """RMSNorm of queries and keys, then 3-D RoPE on adjacent pairs (Wan2.1).

    qkv: the fused projection [B, L, 3·H·D], or three tensors q, k, v [B, L, H·D] where each has a
    projection of its own. q_weight, k_weight [H·D] for a norm over all heads' channels together
    (Wan2.1), [D] for a norm of each head, None for no norm. table from `rope_table`, or one for
    each sample [B, L, D/2, 2]; it takes no gradient. Returns q, k, v, each [B, L, H, D]; v may be a
    view of what was given. Raises ValueError for shapes that do not fit."""
    qkv, args = _tensors(qkv_BLC), (q_weight_C, k_weight_C, table_LP2)
    _check_qkv(*qkv, *args, eps)
    impl = _choose(impl, *qkv, *args)
    if impl == "reference":
        return reference.qk_norm_rope(*qkv, *args, eps)
    q_BLHD, k_BLHD, v_BLHD, _ = _qk_norm_rope(*qkv, *args, eps, impl)
    return q_BLHD, k_BLHD, v_BLHD


def qk_norm_rope_append(
    qkv_BLC: Tensor | Sequence[Tensor],
    q_weight_C: Tensor | None,
    k_weight_C: Tensor | None,
    table_LP2: Tensor,
    k_ring_BSHD: Tensor,
    v_ring_BSHD: Tensor,
    slot_F: Tensor,
    *,
    eps: float = 1e-6,
    rotate_k: bool = True,
    impl: str = "auto",
) -> Tensor:
    """`qk_norm_rope` that writes keys and values straight into their slots of a ring, in place, and
    returns q [B, L, H, D]. rotate_k=False stores keys unrotated, for `ring_attention` to rotate by
    a table of its own.

    k_ring, v_ring [B, S, H, D] with S a multiple of the tokens of a frame, sharing no memory;
    slot_F, an int32 or int64 tensor on the same device, names the frame slot of each frame of the
    chunk, each another: [F] for all samples, or [B, F]. There is no gradient: what trains takes
    `qk_norm_rope` and `block_causal_attention` with a `Prefix`, and ValueError says so where one
    would be recorded.

    Raises ValueError for shapes that do not fit, a ring smaller than the chunk, and slots out of
    range or named twice: on a GPU, where looking would make the host wait, and under torch.compile
    a frame without a slot is not written by the kernels, and of two with the same one either."""
    args = *_tensors(qkv_BLC), q_weight_C, k_weight_C, table_LP2, k_ring_BSHD, v_ring_BSHD
    _check_rings(*args, slot_F, eps)
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in args):
        raise ValueError(
            "qk_norm_rope_append has no gradient: call it under torch.no_grad(), or train with "
            "qk_norm_rope and block_causal_attention(..., prefix=)"
        )
    impl = _choose(impl, *args)
    if impl == "reference":
        _check_memory(*args, slot_F)
        return reference.qk_norm_rope_append(*args, slot_F, eps, rotate_k)
    return _qk_norm_rope_append(*args, slot_F, eps, rotate_k, impl)


def rotate_keys(
    k_BSHD: Tensor,
    table_SP2: Tensor,
    valid: Tensor,
    out_BSHD: Tensor,
    *,
    impl: str = "auto",
) -> None:
    """Rotates the first `valid` keys of k [B, S, H, D] by a table [S, D/2, 2] into the same slots
    of `out` [B, S or more, H, D], in place: so the sink of a `RingKVCache` moves with its window.

    valid: an int32 or int64 scalar tensor on the same device; of 0 or less nothing is written. Both
    may differ from sample to sample: a table [B, S, D/2, 2], valid [B].
    Raises ValueError for shapes that do not fit and an `out` that shares memory with the others."""
    _check_keys(k_BSHD, table_SP2, valid, out_BSHD)
    named = dict(k=k_BSHD, out=out_BSHD, k_table=table_SP2)
    if choose("rotate_keys", impl, k_BSHD.device, _refusal(named), **named) == "reference":
        reference.rotate_keys(k_BSHD, table_SP2, valid, out_BSHD)
    else:
        _rotate_keys(k_BSHD, table_SP2, valid, out_BSHD, "triton")


@registered("rotate_keys", mutates_args=("out",))
def _rotate_keys(k: Tensor, table: Tensor, valid: Tensor, out: Tensor, impl: str) -> None:
    _check_keys(k, table, valid, out)
    named = dict(k=k, out=out, k_table=table)
    choose("rotate_keys", impl, k.device, _refusal(named), **named)
    kernel(impl, "rotate_keys")(k, table, valid, out)


@_rotate_keys.register_fake
def _(k: Tensor, table: Tensor, valid: Tensor, out: Tensor, impl: str) -> None:
    return None


@registered("rope_table")
def _rope_table(
    frame: Tensor, height: int, width: int, head_dim: int, theta: float, impl: str
) -> Tensor:
    if impl != "cpp":  # which looks for itself, as below
        _check_table(frame, height, width, head_dim, theta, impl)
    table: Tensor = kernel(impl, "rope_table")(frame, (height, width), head_dim, theta)
    return table


@_rope_table.register_fake
def _(frame: Tensor, height: int, width: int, head_dim: int, theta: float, impl: str) -> Tensor:
    tokens = frame.shape[0] * height * width
    return frame.new_empty(tokens, head_dim // 2, 2, dtype=torch.float32)


# The ops. qkv: the fused projection, or q alone where k and v are given.


@registered("qk_norm_rope")
def _qk_norm_rope(
    qkv: Tensor,
    k: Tensor | None,
    v: Tensor | None,
    q_weight: Tensor | None,
    k_weight: Tensor | None,
    table: Tensor,
    eps: float,
    impl: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """q, k, v, and what the backward pass needs of each row, which has no gradient."""
    args = qkv, k, v, q_weight, k_weight, table
    if impl != "cpp":
        _check_qkv(*args, eps)
        _choose(impl, *args)
    q_BLHD, k_BLHD, v_BLHD, rstd = kernel(impl, "qk_norm_rope_fwd")(*args, None, None, None, eps)
    return q_BLHD, k_BLHD, v_BLHD, rstd


@_qk_norm_rope.register_fake
def _(
    qkv: Tensor,
    k: Tensor | None,
    v: Tensor | None,
    q_weight: Tensor | None,
    k_weight: Tensor | None,
    table: Tensor,
    *_: Any,
) -> Any:
    q = _heads(qkv, k, table)
    norms = _norms(q_weight, *q.shape[2:])
    rstd = qkv.new_empty(*qkv.shape[:2], 2 * norms, dtype=torch.float32)
    return q, torch.empty_like(q), torch.empty_like(q), rstd


@registered("qk_norm_rope_bwd")
def _qk_norm_rope_bwd(
    dq: Tensor,
    dk: Tensor,
    dv: Tensor,
    qkv: Tensor,
    k: Tensor | None,
    v: Tensor | None,
    q_weight: Tensor | None,
    k_weight: Tensor | None,
    table: Tensor,
    rstd: Tensor,
    impl: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """dqkv, dk, dv, dq_weight, dk_weight; what was not given has none, which is empty."""
    for name, t in (("dq", dq), ("dk", dk), ("dv", dv)):
        check_shape(name, t, ("B", "L", "H", "D"))
    args = qkv, k, v, q_weight, k_weight, table
    if impl != "cpp":
        _check_qkv(*args)
        _choose(impl, *args)
        sizes = _head_sizes(qkv, k, table)
        for name, t in (("dq", dq), ("dk", dk), ("dv", dv)):
            check_shape(name, t, (*qkv.shape[:2], *sizes))
            check_same(name, t, "qkv", qkv)
        check_shape("rstd", rstd, (*qkv.shape[:2], 2 * _norms(q_weight, *sizes)))
        if rstd.dtype != torch.float32 or not rstd.is_contiguous():
            raise ValueError(f"rstd is {rstd.dtype}, {rstd.stride()}: must be dense float32")
    grads = (t if t.stride()[2:] == (t.shape[3], 1) else t.contiguous() for t in (dq, dk, dv))
    found = kernel(impl, "qk_norm_rope_bwd")(*grads, *args, rstd)
    dqkv, dk_BLC, dv_BLC, dq_weight, dk_weight = (
        qkv.new_empty(0) if t is None else t for t in found
    )
    return dqkv, dk_BLC, dv_BLC, dq_weight, dk_weight


@_qk_norm_rope_bwd.register_fake
def _(dq: Tensor, dk: Tensor, dv: Tensor, qkv: Tensor, *rest: Any) -> Any:
    return tuple(qkv.new_empty(0) if t is None else contiguous_like(t) for t in (qkv, *rest[:4]))


def _setup_context(ctx: Any, inputs: Any, output: Any) -> None:
    *tensors, ctx.eps, ctx.impl = inputs
    ctx.save_for_backward(*tensors, output[3])
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, *grads: Tensor | None) -> Any:
    saved = ctx.saved_tensors  # once: checkpointing recomputes what is asked for and drops it
    *inputs, table, _ = saved
    qkv, k, *_ = inputs
    given = [_heads(qkv, k, table).zero_() if g is None else g for g in grads[:3]]
    if torch.is_grad_enabled():

        def plain(qkv: Tensor, *rest: Any) -> tuple[Tensor, ...]:
            k, v, q_weight, k_weight = rest
            return reference.qk_norm_rope(qkv, k, v, q_weight, k_weight, table, ctx.eps)

        return *derivatives(plain, inputs, *given), None, None, None
    found = _qk_norm_rope_bwd(*given, *saved, ctx.impl)
    grads = tuple(None if t is None else g for t, g in zip(inputs, found, strict=True))
    return *grads, None, None, None


_qk_norm_rope.register_autograd(_backward, setup_context=_setup_context)


@registered("qk_norm_rope_append", mutates_args=("k_ring", "v_ring"))
def _qk_norm_rope_append(
    qkv: Tensor,
    k: Tensor | None,
    v: Tensor | None,
    q_weight: Tensor | None,
    k_weight: Tensor | None,
    table: Tensor,
    k_ring: Tensor,
    v_ring: Tensor,
    slot: Tensor,
    eps: float,
    rotate_k: bool,
    impl: str,
) -> Tensor:
    args = qkv, k, v, q_weight, k_weight, table, k_ring, v_ring
    if impl != "cpp":
        _check_rings(*args, slot, eps)
        _choose(impl, *args)
        _check_memory(*args, slot)
    q: Tensor = kernel(impl, "qk_norm_rope_fwd")(*args, slot, eps, rotate_k)[0]
    return q


@_qk_norm_rope_append.register_fake
def _(
    qkv: Tensor,
    k: Tensor | None,
    v: Tensor | None,
    q_weight: Tensor | None,
    k_weight: Tensor | None,
    table: Tensor,
    *_: Any,
) -> Tensor:
    return _heads(qkv, k, table)


def _tensors(qkv: Any) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Arguments of the ops for the fused projection, or for three."""
    if isinstance(qkv, Tensor):
        return qkv, None, None
    if not isinstance(qkv, (tuple, list)) or len(qkv) != 3:
        count = f" of {len(qkv)}" if isinstance(qkv, (tuple, list)) else ""
        raise ValueError(
            f"qkv is a {type(qkv).__name__}{count}: must be a tensor, or three: q, k and v"
        )
    return tuple(qkv)


def _head_sizes(qkv: Tensor, k: Tensor | None, table: Tensor) -> tuple[int, int]:
    """The heads of one of q, k and v, and their dimension."""
    head_dim = 2 * table.shape[-2]
    return (qkv.shape[2] // 3 if k is None else qkv.shape[2]) // head_dim, head_dim


def _heads(qkv: Tensor, k: Tensor | None, table: Tensor) -> Tensor:
    """An empty [B, L, H, D] for one of q, k and v."""
    return qkv.new_empty(*qkv.shape[:2], *_head_sizes(qkv, k, table))


def _norms(weight: Tensor | None, heads: int, head_dim: int) -> int:
    """Number of norms that a row of q takes: none, one, or one for each head."""
    return 0 if weight is None else heads if weight.shape[0] == head_dim else 1


def _choose(impl: str, *tensors: Tensor | None) -> str:
    names = "qkv", "k", "v", "q_weight", "k_weight", "table", "k_ring", "v_ring"
    named = dict(zip(names, tensors, strict=False))
    qkv = tensors[0]
    assert qkv is not None
    return choose("qk_norm_rope", impl, qkv.device, _refusal(named), **named)


def _refusal(named: Mapping[str, Tensor | None]) -> str:
    """Reason why kernels cannot take these tensors, beside those that `choose` knows of."""
    for name, t in named.items():
        if t is None:
            continue
        if name.endswith("table") and not t.is_contiguous():
            return f"table has strides {t.stride()}: must be contiguous"
        heads = t.dim() == 4 and not name.endswith("table")
        if heads and t.stride(2) != t.shape[3]:
            strides = t.stride()
            return f"{name} has strides {strides}: the heads of a slot must lie side by side"
    return ""


def _sides(grid: Any) -> tuple[int, int]:
    if not isinstance(grid, (tuple, list)) or len(grid) != 2:
        raise ValueError(f"grid is {grid}: must be (height, width) in tokens")
    return grid[0], grid[1]


def _check_table(
    frame_F: Tensor, height: int, width: int, head_dim: int, theta: float, impl: str
) -> str:
    """The implementation to take."""
    check_integers("frame_F", frame_F, "F")
    for name, size in (("height of the grid", height), ("width of the grid", width)):
        check_count(name, size)
    check_count("head_dim", head_dim)
    if head_dim % 2:
        raise ValueError(f"head_dim={head_dim}: must be even")
    elements = max(len(frame_F), 1) * height * width * head_dim
    check_count("elements of the table", elements, most=TOO_MANY - 1)
    check_positive("theta", theta)
    return choose("rope_table", impl, frame_F.device)


def _check_qkv(
    qkv_BLC: Tensor,
    k_BLC: Tensor | None,
    v_BLC: Tensor | None,
    q_weight_C: Tensor | None,
    k_weight_C: Tensor | None,
    table_LP2: Tensor,
    eps: float = 1.0,
) -> None:
    check_shape("qkv", qkv_BLC, ("B", "L", "3·H·D" if k_BLC is None else "H·D"))
    check_rotation("table", table_LP2, qkv_BLC.shape[0], qkv_BLC.shape[1], "D/2")
    head_dim = 2 * table_LP2.shape[-2]
    if not head_dim:
        raise ValueError(
            f"table has shape {[*table_LP2.shape]}: must have a pair or more to rotate"
        )
    of, three, channels = "qkv", 3, qkv_BLC.shape[2]
    if k_BLC is not None or v_BLC is not None:
        of, three = "q", 1
        for name, t in (("k", k_BLC), ("v", v_BLC)):
            if t is None:
                raise ValueError(f"{name} is None: must be a tensor, as q")
            check_shape(name, t, tuple(qkv_BLC.shape))
            check_same(name, t, "q", qkv_BLC)
    if not channels or channels % (three * head_dim):
        times = "3 × " if three == 3 else ""
        must = f"must be a multiple of {times}head dim {head_dim}"
        raise ValueError(f"{of} has {channels} channels: {must}")
    if q_weight_C is not None or k_weight_C is not None:
        per_head = isinstance(q_weight_C, Tensor) and q_weight_C.shape == (head_dim,)
        size = head_dim if per_head else channels // three
        for name, weight in (("q_weight", q_weight_C), ("k_weight", k_weight_C)):
            if weight is None:
                raise ValueError(f"{name} is None: must be a tensor, or both weights None")
            check_shape(name, weight, (size,))
    check_positive("eps", eps)


def _check_keys(k_BSHD: Tensor, table_SP2: Tensor, valid: Tensor, out_BSHD: Tensor) -> None:
    check_shape("k", k_BSHD, ("B", "S", "H", "D"))
    batch, slots, heads, head_dim = k_BSHD.shape
    check_shape("out", out_BSHD, (batch, "S", heads, head_dim))
    check_same("out", out_BSHD, "k", k_BSHD)
    check_rotation("table", table_SP2, batch, slots, head_dim // 2)
    if head_dim % 2 or not k_BSHD.numel():
        raise ValueError(f"k has shape {[*k_BSHD.shape]}: must have keys, in pairs of channels")
    if out_BSHD.shape[1] < slots:
        raise ValueError(f"out holds {out_BSHD.shape[1]} tokens: must hold the {slots} of k")
    check_lengths("valid", valid, k_BSHD)
    check_apart("out", out_BSHD, k=k_BSHD, table=table_SP2, valid=valid)


def _check_rings(
    qkv_BLC: Tensor,
    k_BLC: Tensor | None,
    v_BLC: Tensor | None,
    q_weight_C: Tensor | None,
    k_weight_C: Tensor | None,
    table_LP2: Tensor,
    k_ring_BSHD: Tensor,
    v_ring_BSHD: Tensor,
    slot_F: Tensor,
    eps: float,
) -> None:
    _check_qkv(qkv_BLC, k_BLC, v_BLC, q_weight_C, k_weight_C, table_LP2, eps)
    batch, tokens = qkv_BLC.shape[:2]
    heads, head_dim = _head_sizes(qkv_BLC, k_BLC, table_LP2)
    for name, ring in (("k_ring", k_ring_BSHD), ("v_ring", v_ring_BSHD)):
        check_shape(name, ring, (batch, "S", heads, head_dim))
        check_same(name, ring, "qkv", qkv_BLC)
        if ring.shape[1] < tokens:
            raise ValueError(
                f"{name} holds {ring.shape[1]} tokens: must hold the chunk's {tokens} at least"
            )
    check_shape("v_ring", v_ring_BSHD, tuple(k_ring_BSHD.shape))
    check_tensor("slot_F", slot_F)
    check_integers("slot_F", slot_F, "F", *((batch,) if slot_F.dim() == 2 else ()))
    check_device("slot_F", slot_F, qkv_BLC.device)
    frames, held = slot_F.shape[-1], k_ring_BSHD.shape[1]
    if not tokens or not frames or tokens % frames or held % (tokens // frames):
        raise ValueError(
            f"slot_F names {frames} frames: {tokens} tokens and a ring of {held} must be whole "
            "frames"
        )


def _check_memory(
    qkv_BLC: Tensor,
    k_BLC: Tensor | None,
    v_BLC: Tensor | None,
    q_weight_C: Tensor | None,
    k_weight_C: Tensor | None,
    table_LP2: Tensor,
    k_ring_BSHD: Tensor,
    v_ring_BSHD: Tensor,
    slot_F: Tensor,
) -> None:
    """Raises ValueError unless each frame is written where nothing else is. The C++ looks for
    itself."""
    given = dict(qkv=qkv_BLC, k=k_BLC, v=v_BLC, q_weight=q_weight_C, k_weight=k_weight_C)
    read = {name: t for name, t in given.items() if t is not None}
    read |= dict(table=table_LP2, slot=slot_F)
    check_apart("k_ring", k_ring_BSHD, v_ring=v_ring_BSHD, **read)
    check_apart("v_ring", v_ring_BSHD, **read)
    frames = slot_F.shape[-1]
    slots = numbers(slot_F) or []
    last = k_ring_BSHD.shape[1] * frames // qkv_BLC.shape[1] - 1
    for slot in slots:
        if not 0 <= slot <= last:
            raise ValueError(f"slot_F has {slot}: the ring's slots are 0 to {last}")
    for first in range(0, len(slots), frames):
        if len({*slots[first : first + frames]}) < frames:
            raise ValueError(f"slot_F is {slots}: each frame needs a slot of its own")
