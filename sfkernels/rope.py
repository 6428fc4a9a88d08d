"""Query/key normalisation with 3-D rotary embedding, and the append to a ring.
Shapes are named as in reference.py."""

from __future__ import annotations

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
    check_positive,
    check_same,
    check_shape,
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
    tokens. grid: (height, width) in tokens. The D/2 pairs split into D/2 − 2⌊D/6⌋ for time and
    ⌊D/6⌋ each for height and width (Wan2.1). Raises ValueError for another frame_F, an empty grid,
    an odd head dim, a theta that is not positive and finite, and 2³¹ elements or more."""
    impl = _check_table(frame_F, *_sides(grid), head_dim, theta, impl)
    if impl == "reference":
        return reference.rope_table(frame_F, grid, head_dim, theta)
    return _rope_table(frame_F, *grid, head_dim, theta, impl)


def qk_norm_rope(
    qkv_BLC: Tensor,
    q_weight_C: Tensor,
    k_weight_C: Tensor,
    table_LP2: Tensor,
    *,
    eps: float = 1e-6,
    impl: str = "auto",
) -> tuple[Tensor, Tensor, Tensor]:
    """RMSNorm of queries and keys over all heads' channels together, then 3-D RoPE on adjacent
    pairs (Wan2.1).

    qkv [B, L, 3·H·D], the fused projection; weights [H·D]; table from `rope_table`. Returns q, k,
    v, each [B, L, H, D]; v may be a view of qkv. The table takes no gradient. Raises ValueError for
    shapes that do not fit."""
    args = qkv_BLC, q_weight_C, k_weight_C, table_LP2
    _check_qkv(*args, eps)
    impl = _choose(impl, *args)
    if impl == "reference":
        return reference.qk_norm_rope(*args, eps)
    q_BLHD, k_BLHD, v_BLHD, _ = _qk_norm_rope(*args, eps, impl)
    return q_BLHD, k_BLHD, v_BLHD


def qk_norm_rope_append(
    qkv_BLC: Tensor,
    q_weight_C: Tensor,
    k_weight_C: Tensor,
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
    slot_F, an int32 or int64 tensor [F] on the same device, names the frame slot of each frame of
    the chunk, each another. Raises ValueError for shapes that do not fit, a ring smaller than the
    chunk, and slots out of range or named twice: on a GPU, where looking would make the host wait,
    and under torch.compile a frame without a slot is not written by the kernels, and of two with
    the same one either."""
    args = qkv_BLC, q_weight_C, k_weight_C, table_LP2, k_ring_BSHD, v_ring_BSHD
    _check_rings(*args, slot_F, eps)
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

    valid: an int32 or int64 scalar tensor on the same device; of 0 or less nothing is written.
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


@registered("qk_norm_rope")
def _qk_norm_rope(
    qkv: Tensor, q_weight: Tensor, k_weight: Tensor, table: Tensor, eps: float, impl: str
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """q, k, v, and what the backward pass needs of each row, which has no gradient."""
    if impl != "cpp":
        _check_qkv(qkv, q_weight, k_weight, table, eps)
        _choose(impl, qkv, q_weight, k_weight, table)
    q, k, v, rstd = kernel(impl, "qk_norm_rope_fwd")(
        qkv, q_weight, k_weight, table, None, None, None, eps
    )
    return q, k, v, rstd


@_qk_norm_rope.register_fake
def _(qkv: Tensor, q_weight: Tensor, k_weight: Tensor, table: Tensor, *_: Any) -> Any:
    rstd = qkv.new_empty(*qkv.shape[:2], 2, dtype=torch.float32)
    return *(_heads(qkv, table) for _ in range(3)), rstd


@registered("qk_norm_rope_bwd")
def _qk_norm_rope_bwd(
    dq: Tensor,
    dk: Tensor,
    dv: Tensor,
    qkv: Tensor,
    q_weight: Tensor,
    k_weight: Tensor,
    table: Tensor,
    rstd: Tensor,
    impl: str,
) -> tuple[Tensor, Tensor, Tensor]:
    for name, t in (("dq", dq), ("dk", dk), ("dv", dv)):
        check_shape(name, t, ("B", "L", "H", "D"))
    if impl != "cpp":
        _check_qkv(qkv, q_weight, k_weight, table)
        _choose(impl, qkv, q_weight, k_weight, table)
        for name, t in (("dq", dq), ("dk", dk), ("dv", dv)):
            check_shape(name, t, tuple(_heads(qkv, table).shape))
            check_same(name, t, "qkv", qkv)
        check_shape("rstd", rstd, (*qkv.shape[:2], 2))
        if rstd.dtype != torch.float32 or not rstd.is_contiguous():
            raise ValueError(f"rstd is {rstd.dtype}, {rstd.stride()}: must be dense float32")
    grads = (t if t.stride()[2:] == (t.shape[3], 1) else t.contiguous() for t in (dq, dk, dv))
    dqkv, dq_weight, dk_weight = kernel(impl, "qk_norm_rope_bwd")(
        *grads, qkv, q_weight, k_weight, table, rstd
    )
    return dqkv, dq_weight, dk_weight


@_qk_norm_rope_bwd.register_fake
def _(dq: Tensor, dk: Tensor, dv: Tensor, qkv: Tensor, *weights_and_rest: Any) -> Any:
    inputs = qkv, *weights_and_rest[:2]
    return tuple(contiguous_like(t) for t in inputs)


def _setup_context(ctx: Any, inputs: Any, output: Any) -> None:
    *tensors, ctx.eps, ctx.impl = inputs
    ctx.save_for_backward(*tensors, output[3])
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, *grads: Tensor | None) -> Any:
    saved = ctx.saved_tensors  # once: checkpointing recomputes what is asked for and drops it
    qkv, q_weight, k_weight, table, _ = saved
    given = [_heads(qkv, table).zero_() if g is None else g for g in grads[:3]]
    if torch.is_grad_enabled():

        def plain(qkv: Tensor, q_weight: Tensor, k_weight: Tensor) -> tuple[Tensor, ...]:
            return reference.qk_norm_rope(qkv, q_weight, k_weight, table, ctx.eps)

        return *derivatives(plain, (qkv, q_weight, k_weight), *given), None, None, None
    return *_qk_norm_rope_bwd(*given, *saved, ctx.impl), None, None, None


_qk_norm_rope.register_autograd(_backward, setup_context=_setup_context)


@registered("qk_norm_rope_append", mutates_args=("k_ring", "v_ring"))
def _qk_norm_rope_append(
    qkv: Tensor,
    q_weight: Tensor,
    k_weight: Tensor,
    table: Tensor,
    k_ring: Tensor,
    v_ring: Tensor,
    slot: Tensor,
    eps: float,
    rotate_k: bool,
    impl: str,
) -> Tensor:
    if impl != "cpp":
        args = qkv, q_weight, k_weight, table, k_ring, v_ring
        _check_rings(*args, slot, eps)
        _choose(impl, *args)
        _check_memory(*args, slot)
    q: Tensor = kernel(impl, "qk_norm_rope_fwd")(
        qkv, q_weight, k_weight, table, k_ring, v_ring, slot, eps, rotate_k
    )[0]
    return q


@_qk_norm_rope_append.register_fake
def _(qkv: Tensor, q_weight: Tensor, k_weight: Tensor, table: Tensor, *_: Any) -> Tensor:
    return _heads(qkv, table)


def _heads(qkv: Tensor, table: Tensor) -> Tensor:
    """An empty [B, L, H, D] for one of q, k and v."""
    head_dim = 2 * table.shape[1]
    return qkv.new_empty(*qkv.shape[:2], qkv.shape[2] // 3 // head_dim, head_dim)


def _choose(impl: str, *tensors: Tensor) -> str:
    names = "qkv", "q_weight", "k_weight", "table", "k_ring", "v_ring"
    named = dict(zip(names, tensors, strict=False))
    return choose("qk_norm_rope", impl, tensors[0].device, _refusal(named), **named)


def _refusal(named: dict[str, Tensor]) -> str:
    """Reason why kernels cannot take these tensors, beside those that `choose` knows of."""
    for name in ("table", "k_table"):
        if name in named and not named[name].is_contiguous():
            return f"table has strides {named[name].stride()}: must be contiguous"
    for name in ("k_ring", "v_ring", "k", "out"):
        if name in named and named[name].stride(2) != named[name].shape[3]:
            strides = named[name].stride()
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
    qkv_BLC: Tensor, q_weight_C: Tensor, k_weight_C: Tensor, table_LP2: Tensor, eps: float = 1.0
) -> None:
    check_shape("qkv", qkv_BLC, ("B", "L", "3·H·D"))
    check_shape("table", table_LP2, (qkv_BLC.shape[1], "D/2", 2))
    channels, head_dim = qkv_BLC.shape[2], 2 * table_LP2.shape[1]
    if not head_dim:
        raise ValueError(
            f"table has shape {[*table_LP2.shape]}: must have a pair or more to rotate"
        )
    if not channels or channels % (3 * head_dim):
        raise ValueError(
            f"qkv has {channels} channels: must be a multiple of 3 × head dim {head_dim}"
        )
    check_shape("q_weight", q_weight_C, (channels // 3,))
    check_shape("k_weight", k_weight_C, (channels // 3,))
    check_positive("eps", eps)


def _check_keys(k_BSHD: Tensor, table_SP2: Tensor, valid: Tensor, out_BSHD: Tensor) -> None:
    check_shape("k", k_BSHD, ("B", "S", "H", "D"))
    batch, slots, heads, head_dim = k_BSHD.shape
    check_shape("out", out_BSHD, (batch, "S", heads, head_dim))
    check_same("out", out_BSHD, "k", k_BSHD)
    check_shape("table", table_SP2, (slots, head_dim // 2, 2))
    if head_dim % 2 or not k_BSHD.numel():
        raise ValueError(f"k has shape {[*k_BSHD.shape]}: must have keys, in pairs of channels")
    if out_BSHD.shape[1] < slots:
        raise ValueError(f"out holds {out_BSHD.shape[1]} tokens: must hold the {slots} of k")
    if valid.numel() != 1 or valid.dtype not in (torch.int32, torch.int64):
        raise ValueError(
            f"valid is {valid.dtype} {[*valid.shape]}: must be one int32 or int64 number"
        )
    check_device("valid", valid, k_BSHD.device)
    check_apart("out", out_BSHD, k=k_BSHD, table=table_SP2, valid=valid)


def _check_rings(
    qkv_BLC: Tensor,
    q_weight_C: Tensor,
    k_weight_C: Tensor,
    table_LP2: Tensor,
    k_ring_BSHD: Tensor,
    v_ring_BSHD: Tensor,
    slot_F: Tensor,
    eps: float,
) -> None:
    _check_qkv(qkv_BLC, q_weight_C, k_weight_C, table_LP2, eps)
    batch, tokens, channels = qkv_BLC.shape
    head_dim = 2 * table_LP2.shape[1]
    for name, ring in (("k_ring", k_ring_BSHD), ("v_ring", v_ring_BSHD)):
        check_shape(name, ring, (batch, "S", channels // 3 // head_dim, head_dim))
        check_same(name, ring, "qkv", qkv_BLC)
        if ring.shape[1] < tokens:
            raise ValueError(
                f"{name} holds {ring.shape[1]} tokens: must hold the chunk's {tokens} at least"
            )
    check_shape("v_ring", v_ring_BSHD, tuple(k_ring_BSHD.shape))
    check_integers("slot_F", slot_F, "F")
    check_device("slot_F", slot_F, qkv_BLC.device)
    frames, held = len(slot_F), k_ring_BSHD.shape[1]
    if not tokens or not frames or tokens % frames or held % (tokens // frames):
        raise ValueError(
            f"slot_F names {frames} frames: {tokens} tokens and a ring of {held} must be whole "
            "frames"
        )


def _check_memory(
    qkv_BLC: Tensor,
    q_weight_C: Tensor,
    k_weight_C: Tensor,
    table_LP2: Tensor,
    k_ring_BSHD: Tensor,
    v_ring_BSHD: Tensor,
    slot_F: Tensor,
) -> None:
    """Raises ValueError unless each frame is written where nothing else is. The C++ looks for
    itself."""
    read = dict(qkv=qkv_BLC, q_weight=q_weight_C, k_weight=k_weight_C, table=table_LP2, slot=slot_F)
    check_apart("k_ring", k_ring_BSHD, v_ring=v_ring_BSHD, **read)
    check_apart("v_ring", v_ring_BSHD, **read)
    slots = numbers(slot_F)
    last = k_ring_BSHD.shape[1] * len(slot_F) // qkv_BLC.shape[1] - 1
    for slot in slots or ():
        if not 0 <= slot <= last:
            raise ValueError(f"slot_F has {slot}: the ring's slots are 0 to {last}")
    if slots and len({*slots}) < len(slots):
        raise ValueError(f"slot_F is {slots}: each frame needs a slot of its own")
