"""Attention of a training pass under a BlockLayout, and of a streaming chunk over a ring.
Shapes are named as in reference.py."""

from __future__ import annotations

from torch import Tensor

from sfkernels import reference
from sfkernels.dispatch import check_same, check_shape, choose
from sfkernels.layout import BlockLayout


def block_causal_attention(
    q_BLHD: Tensor,
    k_BLHD: Tensor,
    v_BLHD: Tensor,
    layout: BlockLayout,
    *,
    scale: float | None = None,
    impl: str = "auto",
) -> Tensor:
    """Softmax attention where `layout` says who sees whom.

    q, k, v [B, layout.tokens, H, D]; scale defaults to D^-½. Returns [B, L, H, D]. Raises
    ValueError for shapes that do not fit the layout or each other (grouped-query attention, fewer
    key heads than query heads, is not offered)."""
    _check_heads(q_BLHD, k_BLHD, v_BLHD)
    check_shape("q", q_BLHD, ("B", layout.tokens, "H", "D"))
    check_shape("k", k_BLHD, tuple(q_BLHD.shape))
    scale = q_BLHD.shape[-1] ** -0.5 if scale is None else scale
    choose("block_causal_attention", impl, q_BLHD.device, q=q_BLHD, k=k_BLHD, v=v_BLHD)
    return reference.block_causal_attention(q_BLHD, k_BLHD, v_BLHD, layout, scale)


def ring_attention(
    q_BLHD: Tensor,
    k_ring_BSHD: Tensor,
    v_ring_BSHD: Tensor,
    valid: Tensor,
    *,
    scale: float | None = None,
    impl: str = "auto",
) -> Tensor:
    """Softmax attention of a chunk over the first `valid` slots of a ring, read where they lie.

    q [B, L, H, D]; k_ring, v_ring [B, S, H, D], keys already rotated, so that their order does not
    matter; valid: an int32 scalar tensor on the same device, the tokens written so far, at most S.
    Every query sees every valid slot. scale defaults to D^-½. Returns [B, L, H, D]. Raises
    ValueError for shapes that do not fit."""
    _check_heads(q_BLHD, k_ring_BSHD, v_ring_BSHD)
    if valid.numel() != 1 or valid.is_floating_point() or valid.device != q_BLHD.device:
        raise ValueError(
            f"valid is {valid.dtype} {[*valid.shape]} on {valid.device}: must be one integer on "
            f"{q_BLHD.device}"
        )
    scale = q_BLHD.shape[-1] ** -0.5 if scale is None else scale
    choose("ring_attention", impl, q_BLHD.device, q=q_BLHD, k_ring=k_ring_BSHD, v_ring=v_ring_BSHD)
    return reference.ring_attention(q_BLHD, k_ring_BSHD, v_ring_BSHD, valid, scale)


def cross_attention(
    q_BLHD: Tensor,
    k_BSHD: Tensor,
    v_BSHD: Tensor,
    *,
    scale: float | None = None,
    impl: str = "auto",
) -> Tensor:
    """Softmax attention of every query over every key, for text; q [B, L, H, D], k and v
    [B, S, H, D]. Returns [B, L, H, D]. Raises ValueError for shapes that do not fit."""
    _check_heads(q_BLHD, k_BSHD, v_BSHD)
    scale = q_BLHD.shape[-1] ** -0.5 if scale is None else scale
    choose("cross_attention", impl, q_BLHD.device, q=q_BLHD, k=k_BSHD, v=v_BSHD)
    return reference.attention(q_BLHD, k_BSHD, v_BSHD, scale)


def _check_heads(q_BLHD: Tensor, k_BSHD: Tensor, v_BSHD: Tensor) -> None:
    check_shape("q", q_BLHD, ("B", "L", "H", "D"))
    batch, _, heads, head_dim = q_BLHD.shape
    check_shape("k", k_BSHD, (batch, "S", heads, head_dim))
    check_shape("v", v_BSHD, tuple(k_BSHD.shape))
    check_same("k", k_BSHD, "q", q_BLHD)
    check_same("v", v_BSHD, "q", q_BLHD)
