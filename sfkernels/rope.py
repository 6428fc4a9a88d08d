"""Query/key normalisation with 3-D rotary embedding, and the append to a ring.
Shapes are named as in reference.py."""

from __future__ import annotations

import torch
from torch import Tensor

from sfkernels.dispatch import check_same, check_shape, implementation


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
    return implementation("rope_table", impl, frame_F)(frame_F, grid, head_dim, theta)


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
    v, each [B, L, H, D]; v may be a view of qkv. Raises ValueError for shapes that do not fit."""
    _check_qkv(qkv_BLC, q_weight_C, k_weight_C, table_LP2)
    return implementation("qk_norm_rope", impl, qkv_BLC)(
        qkv_BLC, q_weight_C, k_weight_C, table_LP2, eps
    )


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
    impl: str = "auto",
) -> Tensor:
    """`qk_norm_rope` that writes keys and values straight into their slots of a ring, in place, and
    returns q [B, L, H, D].

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
    if tokens % len(slot_F) or k_ring_BSHD.shape[1] % (tokens // len(slot_F)):
        raise ValueError(
            f"slot_F names {len(slot_F)} frames: {tokens} tokens and a ring of "
            f"{k_ring_BSHD.shape[1]} must be whole frames"
        )
    return implementation("qk_norm_rope_append", impl, qkv_BLC)(
        qkv_BLC, q_weight_C, k_weight_C, table_LP2, k_ring_BSHD, v_ring_BSHD, slot_F, eps
    )


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
