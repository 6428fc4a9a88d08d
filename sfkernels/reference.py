"""Eager PyTorch of every op: the specification that all other implementations are tested against.

Every function computes in float32 (float64 for float64 inputs) and returns its input's dtype.

Shapes: B batch, L tokens = F frames × N tokens of a frame, C channels, H heads, D head dim,
P = D/2 rotated pairs, S slots (tokens) of a ring; `x_BLC` names a tensor of shape [B, L, C]. B and
F of a modulation may be 1.
"""

from __future__ import annotations

import functools

import torch
import torch.nn.functional as F
from torch import Tensor

from sfkernels.layout import BlockLayout


def _wide(x: Tensor) -> Tensor:
    """The tensor in the dtype to compute in."""
    return x if x.dtype == torch.float64 else x.float()


def layer_norm(x_BLC: Tensor, weight_C: Tensor, bias_C: Tensor, eps: float) -> Tensor:
    return F.layer_norm(_wide(x_BLC), x_BLC.shape[-1:], _wide(weight_C), _wide(bias_C), eps).to(
        x_BLC.dtype
    )


def adaln(x_BLC: Tensor, shift_BFC: Tensor, scale_BFC: Tensor, eps: float) -> Tensor:
    frames = shift_BFC.shape[1]
    x_BFNC = _wide(x_BLC).unflatten(1, (frames, -1))
    normed = F.layer_norm(x_BFNC, x_BLC.shape[-1:], eps=eps)
    out = torch.addcmul(_wide(shift_BFC)[:, :, None], normed, 1 + _wide(scale_BFC)[:, :, None])
    return out.flatten(1, 2).to(x_BLC.dtype)


def gated_residual(x_BLC: Tensor, y_BLC: Tensor, gate_BFC: Tensor) -> Tensor:
    frames = gate_BFC.shape[1]
    x_BFNC, y_BFNC = (_wide(t).unflatten(1, (frames, -1)) for t in (x_BLC, y_BLC))
    return torch.addcmul(x_BFNC, y_BFNC, _wide(gate_BFC)[:, :, None]).flatten(1, 2).to(x_BLC.dtype)


def gated_adaln(
    x_BLC: Tensor,
    y_BLC: Tensor,
    gate_BFC: Tensor,
    shift_BFC: Tensor,
    scale_BFC: Tensor,
    eps: float,
) -> tuple[Tensor, Tensor]:
    x_BLC = gated_residual(x_BLC, y_BLC, gate_BFC)
    return x_BLC, adaln(x_BLC, shift_BFC, scale_BFC, eps)


def rms_norm(x_BLC: Tensor, weight_C: Tensor, eps: float) -> Tensor:
    return F.rms_norm(_wide(x_BLC), x_BLC.shape[-1:], _wide(weight_C), eps).to(x_BLC.dtype)


def rope_table(frame_F: Tensor, grid: tuple[int, int], head_dim: int, theta: float) -> Tensor:
    height, width = grid
    pairs = head_dim // 2
    across = pairs // 3
    # Angles in float64: at frame 100,000 a float32 angle is off by a hundredth of a radian.
    angles = []
    for index, count in (
        (frame_F, pairs - 2 * across),
        (torch.arange(height, device=frame_F.device), across),
        (torch.arange(width, device=frame_F.device), across),
    ):
        exponent = torch.arange(count, device=frame_F.device, dtype=torch.float64) / max(count, 1)
        angles.append(index.double()[:, None] * theta**-exponent)
    sizes = (len(frame_F), height, width, -1)
    angle_FHWP = torch.cat(
        [
            angles[0][:, None, None].expand(sizes),
            angles[1][None, :, None].expand(sizes),
            angles[2][None, None, :].expand(sizes),
        ],
        dim=-1,
    )
    return torch.stack((angle_FHWP.cos(), angle_FHWP.sin()), dim=-1).float().flatten(0, 2)


def rope(x_BLHD: Tensor, table_LP2: Tensor) -> Tensor:
    even, odd = _wide(x_BLHD).unflatten(-1, (-1, 2)).unbind(-1)
    cos, sin = table_LP2.to(even.dtype)[:, None].unbind(-1)
    rotated = torch.stack((even * cos - odd * sin, even * sin + odd * cos), dim=-1)
    return rotated.flatten(-2).to(x_BLHD.dtype)


def qk_norm_rope(
    qkv_BLC: Tensor,
    q_weight_C: Tensor,
    k_weight_C: Tensor,
    table_LP2: Tensor,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor]:
    head_dim = 2 * table_LP2.shape[1]
    q_BLHD, k_BLHD, v_BLHD = (t.unflatten(-1, (-1, head_dim)) for t in qkv_BLC.chunk(3, dim=-1))
    q_BLHD = rope(_norm_heads(q_BLHD, q_weight_C, eps), table_LP2)
    k_BLHD = rope(_norm_heads(k_BLHD, k_weight_C, eps), table_LP2)
    return q_BLHD.to(qkv_BLC.dtype), k_BLHD.to(qkv_BLC.dtype), v_BLHD


def _norm_heads(x_BLHD: Tensor, weight_C: Tensor, eps: float) -> Tensor:
    """RMSNorm over all heads' channels together, left in the wide dtype."""
    return rms_norm(_wide(x_BLHD).flatten(-2), weight_C, eps).view(x_BLHD.shape)


def qk_norm_rope_append(
    qkv_BLC: Tensor,
    q_weight_C: Tensor,
    k_weight_C: Tensor,
    table_LP2: Tensor,
    k_ring_BSHD: Tensor,
    v_ring_BSHD: Tensor,
    slot_F: Tensor,
    eps: float,
) -> Tensor:
    q_BLHD, k_BLHD, v_BLHD = qk_norm_rope(qkv_BLC, q_weight_C, k_weight_C, table_LP2, eps)
    frames = len(slot_F)
    tokens = qkv_BLC.shape[1] // frames
    for ring_BSHD, new_BLHD in ((k_ring_BSHD, k_BLHD), (v_ring_BSHD, v_BLHD)):
        by_frame = ring_BSHD.unflatten(1, (-1, tokens))
        by_frame.index_copy_(
            1, slot_F.long(), new_BLHD.unflatten(1, (frames, tokens)).to(ring_BSHD.dtype)
        )
    return q_BLHD


def attention(q_BLHD: Tensor, k_BSHD: Tensor, v_BSHD: Tensor, scale: float) -> Tensor:
    """Dense attention: every query sees every key. What the two functions below are made of."""
    q, k, v = (t.transpose(1, 2) for t in (q_BLHD, k_BSHD, v_BSHD))
    return F.scaled_dot_product_attention(q, k, v, scale=scale).transpose(1, 2)


def block_causal_attention(
    q_BLHD: Tensor, k_BLHD: Tensor, v_BLHD: Tensor, layout: BlockLayout, scale: float
) -> Tensor:
    batch = len(q_BLHD)
    out = []
    groups, restore_L = _rows_by_shape(layout, q_BLHD.device)
    for query_RQ, key_RS in groups:
        q, k, v = (
            t.index_select(1, index.flatten()).reshape(-1, index.shape[1], *t.shape[2:])
            for t, index in ((q_BLHD, query_RQ), (k_BLHD, key_RS), (v_BLHD, key_RS))
        )
        out.append(attention(q, k, v, scale).reshape(batch, -1, *q_BLHD.shape[2:]))
    return torch.cat(out, 1).index_select(1, restore_L)


@functools.lru_cache(maxsize=32)
@torch.inference_mode(False)  # cached indices may be needed for a backward pass later
def _rows_by_shape(
    layout: BlockLayout, device: torch.device
) -> tuple[list[tuple[Tensor, Tensor]], Tensor]:
    """The layout's rows, those with equally many queries and keys stacked into one call of dense
    attention, as token indices [R, Q] and [R, S]; and where each token's output then is, [L]."""
    groups: dict[tuple[int, int], list[tuple[Tensor, Tensor]]] = {}
    for (q0, q1), spans in layout.rows:
        query = torch.arange(q0, q1)
        key = torch.cat([torch.arange(lo, hi) for lo, hi in spans])
        groups.setdefault((len(query), len(key)), []).append((query, key))
    stacked = [
        (torch.stack([q for q, _ in rows]).to(device), torch.stack([k for _, k in rows]).to(device))
        for rows in groups.values()
    ]
    order = torch.cat([q.flatten() for q, _ in stacked])
    return stacked, order.argsort()


def ring_attention(
    q_BLHD: Tensor, k_ring_BSHD: Tensor, v_ring_BSHD: Tensor, valid: Tensor, scale: float
) -> Tensor:
    if valid.device.type == "cpu":  # reading the length costs nothing here
        count = int(valid)
        return attention(q_BLHD, k_ring_BSHD[:, :count], v_ring_BSHD[:, :count], scale)
    q, k, v = (t.transpose(1, 2) for t in (q_BLHD, k_ring_BSHD, v_ring_BSHD))
    seen = torch.arange(k.shape[2], device=k.device) < valid
    mask = seen.expand(q.shape[2], -1)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale).transpose(1, 2)


def sampler_step(
    x: Tensor,
    flow: Tensor,
    sigma: Tensor,
    next_sigma: Tensor | None,
    noise: Tensor | None,
    uncond_flow: Tensor | None,
    guidance: float,
) -> tuple[Tensor, Tensor]:
    velocity = _wide(flow)
    if uncond_flow is not None:
        velocity = torch.lerp(_wide(uncond_flow), velocity, guidance)
    x0 = _wide(x) - _per_frame(sigma, x) * velocity
    if next_sigma is None or noise is None:
        return x0.to(x.dtype), x0.to(x.dtype)
    renoised = torch.lerp(x0, _wide(noise), _per_frame(next_sigma, x))
    return x0.to(x.dtype), renoised.to(x.dtype)


def _per_frame(sigma: Tensor, x: Tensor) -> Tensor:
    """A scalar, [B] or [B, F] sigma against x [B, F, ...]."""
    sigma = _wide(sigma).to(torch.promote_types(torch.float32, x.dtype))
    return sigma.reshape(sigma.shape + (1,) * (x.dim() - sigma.dim())) if sigma.dim() else sigma
