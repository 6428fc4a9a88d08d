"""Query/key normalisation with 3-D rotary embedding, and the append to a ring.
Shapes are named as in reference.py."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from sfkernels import reference
from sfkernels.dispatch import (
    check_device,
    check_same,
    check_shape,
    choose,
    contiguous_like,
    derivatives,
    kernel,
    registered,
)


def rope_table(
    frame_F: Tensor,
    grid: tuple[int, int],
    head_dim: int,
    *,
    theta: float = 10_000.0,
    impl: str = "auto",
) -> Tensor:
    """Cosine and sine of every token's rotation, [L, D/2, 2] float32 with L = F · height · width.

    frame_F: integer tensor [F] of absolute latent-frame indices, any size, on the device of the
    tokens. grid: (height, width) in tokens. The D/2 pairs split into D/2 − 2⌊D/6⌋ for time and
    ⌊D/6⌋ each for height and width (Wan2.1). Raises ValueError for an odd head dim or a frame_F
    that is not a list of integers."""
    if frame_F.dim() != 1 or frame_F.is_floating_point():
        raise ValueError(
            f"frame_F is {frame_F.dtype} of shape {[*frame_F.shape]}: must be an integer tensor [F]"
        )
    if head_dim % 2:
        raise ValueError(f"head_dim={head_dim}: must be even")
    impl = choose("rope_table", impl, frame_F.device)
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
    _check_qkv(*args)
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

    k_ring, v_ring [B, S, H, D] with S a multiple of the tokens of a frame; slot_F, an int32 or
    int64 tensor [F] on the same device, names the frame slot of each frame of the chunk. Raises
    ValueError for shapes that do not fit or a ring smaller than the chunk."""
    _check_qkv(qkv_BLC, q_weight_C, k_weight_C, table_LP2)
    batch, tokens, channels = qkv_BLC.shape
    head_dim = 2 * table_LP2.shape[1]
    for name, ring in (("k_ring", k_ring_BSHD), ("v_ring", v_ring_BSHD)):
        check_shape(name, ring, (batch, "S", channels // 3 // head_dim, head_dim))
        check_same(name, ring, "qkv", qkv_BLC)
        if ring.shape[1] < tokens:
            raise ValueError(
                f"{name} holds {ring.shape[1]} tokens: must hold the chunk's {tokens} at least"
            )
    if slot_F.dim() != 1 or slot_F.dtype not in (torch.int32, torch.int64):
        raise ValueError(
            f"slot_F is {slot_F.dtype} {[*slot_F.shape]}: must be an integer tensor [F]"
        )
    if (
        not tokens
        or not len(slot_F)
        or tokens % len(slot_F)
        or k_ring_BSHD.shape[1] % (tokens // len(slot_F))
    ):
        raise ValueError(
            f"slot_F names {len(slot_F)} frames: {tokens} tokens and a ring of "
            f"{k_ring_BSHD.shape[1]} must be whole frames"
        )
    check_device("slot_F", slot_F, qkv_BLC.device)
    args = qkv_BLC, q_weight_C, k_weight_C, table_LP2, k_ring_BSHD, v_ring_BSHD
    impl = _choose(impl, *args)
    if impl == "reference":
        return reference.qk_norm_rope_append(*args, slot_F, eps, rotate_k)
    return _qk_norm_rope_append(*args, slot_F, eps, rotate_k, impl)


@registered("rope_table")
def _rope_table(
    frame: Tensor, height: int, width: int, head_dim: int, theta: float, impl: str
) -> Tensor:
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
    """What kernels cannot take, beside that which `choose` knows of."""
    if not named["table"].is_contiguous():
        return f"table has strides {named['table'].stride()}: must be contiguous"
    for name in ("k_ring", "v_ring"):
        if name in named and named[name].stride(2) != named[name].shape[3]:
            strides = named[name].stride()
            return f"{name} has strides {strides}: the heads of a slot must lie side by side"
    return ""


def _check_qkv(qkv_BLC: Tensor, q_weight_C: Tensor, k_weight_C: Tensor, table_LP2: Tensor) -> None:
    check_shape("qkv", qkv_BLC, ("B", "L", "3·H·D"))
    check_shape("table", table_LP2, (qkv_BLC.shape[1], "D/2", 2))
    channels, head_dim = qkv_BLC.shape[2], 2 * table_LP2.shape[1]
    if channels % (3 * head_dim):
        raise ValueError(
            f"qkv has {channels} channels: must be a multiple of 3 × head dim {head_dim}"
        )
    check_shape("q_weight", q_weight_C, (channels // 3,))
    check_shape("k_weight", k_weight_C, (channels // 3,))
