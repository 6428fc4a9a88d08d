"""Attention of a chunk over a full ring by cuDNN, called through PyTorch, with the keys split.

cuDNN gives a block of threads all keys of a tile of queries and fills 83% of an H200's waves with a
chunk of Wan2.1-1.3B (4680 queries, 12 heads) and 55% with a frame (1560). A ring [B, S, H, D] is
also, as a view, a batch of its parts, [B·parts, S/parts, H, D]: two parts of a chunk fill 95%, five
of a frame 92%. The queries are the same for all parts; no key is copied.

cuDNN rounds the parts to the dtype of the queries before they are joined. With its arithmetic
emulated on a CPU, over 32,760 keys and in two or five parts, the result is at most 1.9 times as far
from float64 as unsplit, 1.4 times in the root mean square: in bfloat16 1.4e-2 instead of 7.7e-3 of
outputs up to 3, where eager PyTorch's 7.7e-3 would allow 6.4e-2. Not measured on a GPU yet.

Shapes: B batch, H heads, D head dim, L queries, S slots, P parts.
"""

from __future__ import annotations

import torch
import triton
from torch import Tensor

from sfkernels import launch
from sfkernels.gpu.attention import LOG2E, combine_parts
from sfkernels.gpu.tiles import key_splits

TILE = 128  # queries, and keys, of a tile: what the number of parts is chosen for


def ring_attention(
    q_BLHD: Tensor,
    k_ring_BSHD: Tensor,
    v_ring_BSHD: Tensor,
    valid: Tensor,
    semaphores: Tensor | None,
    scale: float,
) -> Tensor:
    """o [B, L, H, D] of queries that see every slot of the ring: all are valid, and `valid` is not
    read, nor are `semaphores`. In a batch the queries are copied once for each part, and rings
    whose samples do not lie one after the other are copied too."""
    batch, queries, heads, _ = q_BLHD.shape
    slots = k_ring_BSHD.shape[1]
    parts = key_splits(
        triton.cdiv(queries, TILE) * batch * heads,
        launch.multiprocessors(q_BLHD.device),
        triton.cdiv(slots, TILE),
        slots,
    )
    q, k, v = (
        x_BPLHD.flatten(0, 1).transpose(1, 2)
        for x_BPLHD in (
            q_BLHD[:, None].expand(-1, parts, -1, -1, -1),
            k_ring_BSHD.unflatten(1, (parts, -1)),
            v_ring_BSHD.unflatten(1, (parts, -1)),
        )
    )
    # The logarithms are wanted for the parts' weights alone; those of cuDNN are natural.
    part, lse, *_ = torch.ops.aten._scaled_dot_product_cudnn_attention(
        q, k, v, None, parts > 1, scale=scale
    )
    part_PBLHD = part.transpose(1, 2).unflatten(0, (batch, parts)).transpose(0, 1).contiguous()
    if parts > 1:
        lse_PBHL = lse.reshape(batch, parts, heads, queries).transpose(0, 1) * LOG2E
        return combine_parts(part_PBLHD, lse_PBHL.contiguous(), q_BLHD.dtype)
    return part_PBLHD.squeeze_(0)
