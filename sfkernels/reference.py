"""Eager PyTorch of every op: the specification that all other implementations are tested against.

Every function computes in float32 (float64 for float64 inputs) and returns its input's dtype, but
for `linear`, which is PyTorch's own in the dtype of its inputs.

Shapes: B batch, L tokens = F frames × N tokens of a frame, C channels, H heads, D head dim,
P = D/2 rotated pairs, S slots (tokens) of a ring, O outputs; `x_BLC` names a tensor of shape
[B, L, C]. B and F of a modulation may be 1.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from sfkernels.arguments import numbers
from sfkernels.dispatch import cached_tensors
from sfkernels.layout import BlockLayout


def _wide(x: Tensor) -> Tensor:
    """The tensor in the dtype to compute in."""
    return x if x.dtype == torch.float64 else x.float()


def layer_norm(x_BLC: Tensor, weight_C: Tensor, bias_C: Tensor, eps: float) -> Tensor:
    x_wide = _wide(x_BLC)
    weight_C, bias_C = (t.to(x_wide.dtype) for t in (weight_C, bias_C))
    return F.layer_norm(x_wide, x_BLC.shape[-1:], weight_C, bias_C, eps).to(x_BLC.dtype)


def adaln(x_BLC: Tensor, shift_BFC: Tensor, scale_BFC: Tensor, eps: float) -> Tensor:
    x_BFNC = _by_frame(x_BLC, shift_BFC, scale_BFC)
    normed = F.layer_norm(x_BFNC, x_BLC.shape[-1:], eps=eps)
    out = torch.addcmul(_wide(shift_BFC)[:, :, None], normed, 1 + _wide(scale_BFC)[:, :, None])
    return out.flatten(1, 2).to(x_BLC.dtype)


def gated_adaln(
    x_BLC: Tensor,
    y_BLC: Tensor,
    gate_BFC: Tensor | None,
    shift_BFC: Tensor,
    scale_BFC: Tensor,
    eps: float,
) -> tuple[Tensor, Tensor]:
    x_BLC = residual(x_BLC, y_BLC, gate_BFC)
    return x_BLC, adaln(x_BLC, shift_BFC, scale_BFC, eps)


def gated_layer_norm(
    x_BLC: Tensor,
    y_BLC: Tensor,
    gate_BFC: Tensor | None,
    weight_C: Tensor,
    bias_C: Tensor,
    eps: float,
) -> tuple[Tensor, Tensor]:
    x_BLC = residual(x_BLC, y_BLC, gate_BFC)
    return x_BLC, layer_norm(x_BLC, weight_C, bias_C, eps)


def residual(x_BLC: Tensor, y_BLC: Tensor, gate_BFC: Tensor | None) -> Tensor:
    if gate_BFC is None:
        return x_BLC + y_BLC
    x_BFNC, y_BFNC = _by_frame(x_BLC, gate_BFC), _by_frame(y_BLC, gate_BFC)
    return torch.addcmul(x_BFNC, y_BFNC, _wide(gate_BFC)[:, :, None]).flatten(1, 2).to(x_BLC.dtype)


def _by_frame(x_BLC: Tensor, *modulations_BFC: Tensor) -> Tensor:
    """View [B, F, N, C] in the dtype to compute in."""
    return _wide(x_BLC).unflatten(1, (max(m.shape[1] for m in modulations_BFC), -1))


def rms_norm(x_BLC: Tensor, weight_C: Tensor, eps: float) -> Tensor:
    return F.rms_norm(_wide(x_BLC), x_BLC.shape[-1:], _wide(weight_C), eps).to(x_BLC.dtype)


def rms_norm_silu(
    x_BLC: Tensor,
    weight_C: Tensor,
    y_BLC: Tensor | None,
    bias_C: Tensor | None,
    before_BPC: Tensor | None,
    eps: float,
) -> tuple[Tensor, Tensor]:
    dtype = x_BLC.dtype
    if bias_C is not None:
        x_BLC = _wide(x_BLC) + _wide(bias_C)
    if y_BLC is not None:
        x_BLC = (x_BLC + y_BLC).to(dtype)
    normed_BLC = F.rms_norm(_wide(x_BLC), x_BLC.shape[-1:], _wide(weight_C), eps)
    out_BLC = F.silu(normed_BLC).to(dtype)
    return x_BLC, out_BLC if before_BPC is None else torch.cat([before_BPC, out_BLC], 1)


def linear(x_BLC: Tensor, weight_OC: Tensor, bias_O: Tensor | None, gelu: bool) -> Tensor:
    y_BLO = F.linear(x_BLC, weight_OC, bias_O)
    return F.gelu(y_BLO, approximate="tanh") if gelu else y_BLO


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
    cos, sin = table_LP2.to(even.dtype).unsqueeze(-3).unbind(-1)
    rotated = torch.stack((even * cos - odd * sin, even * sin + odd * cos), dim=-1)
    return rotated.flatten(-2).to(x_BLHD.dtype)


def rotate_keys(k_BSHD: Tensor, table_SP2: Tensor, valid: Tensor, out_BSHD: Tensor) -> None:
    seen_BS = torch.arange(k_BSHD.shape[1], device=valid.device) < valid.view(-1, 1)
    out_BSHD = out_BSHD[:, : k_BSHD.shape[1]]
    out_BSHD.copy_(torch.where(seen_BS[:, :, None, None], rope(k_BSHD, table_SP2), out_BSHD))


def qk_norm_rope(
    qkv_BLC: Tensor,
    k_BLC: Tensor | None,
    v_BLC: Tensor | None,
    q_weight_C: Tensor | None,
    k_weight_C: Tensor | None,
    table_LP2: Tensor,
    eps: float,
    rotate_k: bool = True,
) -> tuple[Tensor, Tensor, Tensor]:
    """qkv: the fused projection, or q alone where k and v are given."""
    head_dim = 2 * table_LP2.shape[-2]
    three = qkv_BLC.chunk(3, dim=-1) if k_BLC is None or v_BLC is None else (qkv_BLC, k_BLC, v_BLC)
    q_BLHD, k_BLHD, v_BLHD = (t.unflatten(-1, (-1, head_dim)) for t in three)
    q_BLHD = rope(_norm_heads(q_BLHD, q_weight_C, eps), table_LP2)
    k_BLHD = _norm_heads(k_BLHD, k_weight_C, eps)
    if rotate_k:
        k_BLHD = rope(k_BLHD, table_LP2)
    return q_BLHD.to(qkv_BLC.dtype), k_BLHD.to(qkv_BLC.dtype), v_BLHD


def _norm_heads(x_BLHD: Tensor, weight_C: Tensor | None, eps: float) -> Tensor:
    """RMSNorm over all heads' channels together or, with weights of one head, of each; left in the
    wide dtype."""
    x_BLHD = _wide(x_BLHD)
    if weight_C is None:
        return x_BLHD
    if weight_C.shape[0] == x_BLHD.shape[-1]:
        return rms_norm(x_BLHD, weight_C, eps)
    return rms_norm(x_BLHD.flatten(-2), weight_C, eps).view(x_BLHD.shape)


def qk_norm_rope_append(
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
    rotate_k: bool = True,
) -> Tensor:
    q_BLHD, k_BLHD, v_BLHD = qk_norm_rope(
        qkv_BLC, k_BLC, v_BLC, q_weight_C, k_weight_C, table_LP2, eps, rotate_k
    )
    frames = slot_F.shape[-1]
    tokens = qkv_BLC.shape[1] // frames
    slot_BF = slot_F.long().expand(len(q_BLHD), frames)
    sample_B1 = torch.arange(len(q_BLHD), device=slot_F.device)[:, None]
    for ring_BSHD, new_BLHD in ((k_ring_BSHD, k_BLHD), (v_ring_BSHD, v_BLHD)):
        by_frame = ring_BSHD.unflatten(1, (-1, tokens))
        by_frame[sample_B1, slot_BF] = new_BLHD.unflatten(1, (frames, tokens)).to(ring_BSHD.dtype)
    return q_BLHD


def attention(q_BLHD: Tensor, k_BSHD: Tensor, v_BSHD: Tensor, scale: float) -> Tensor:
    """Dense attention: every query sees every key."""
    q, k, v = (t.transpose(1, 2) for t in (q_BLHD, k_BSHD, v_BSHD))
    return F.scaled_dot_product_attention(q, k, v, scale=scale).transpose(1, 2)


def block_causal_attention(
    q_BLHD: Tensor,
    k_BLHD: Tensor,
    v_BLHD: Tensor,
    layout: BlockLayout,
    scale: float,
    k_prefix_BPHD: Tensor | None = None,
    v_prefix_BPHD: Tensor | None = None,
    prefix: Sequence[tuple[int, int]] = (),
) -> Tensor:
    batch = len(q_BLHD)
    out = []
    past = []
    if k_prefix_BPHD is not None and v_prefix_BPHD is not None:
        for whole in (k_prefix_BPHD.detach(), v_prefix_BPHD.detach()):
            past.append(torch.cat([whole[:, lo:hi] for lo, hi in prefix], 1))
    groups, restore_L = _rows_by_shape(q_BLHD.device, *layout.fields)
    for query_RQ, key_RS in groups:
        q, k, v = (
            t.index_select(1, index.flatten()).reshape(-1, index.shape[1], *t.shape[2:])
            for t, index in ((q_BLHD, query_RQ), (k_BLHD, key_RS), (v_BLHD, key_RS))
        )
        if past:
            repeat = len(query_RQ)
            k, v = (
                torch.cat([p.repeat_interleave(repeat, 0), t], 1)
                for p, t in zip(past, (k, v), strict=True)
            )
        out.append(attention(q, k, v, scale).reshape(batch, -1, *q_BLHD.shape[2:]))
    return torch.cat(out, 1).index_select(1, restore_L)


def _rows_by_shape(
    device: torch.device, *fields: Any
) -> tuple[list[tuple[Tensor, Tensor]], Tensor]:
    return _cached_rows_by_shape(BlockLayout(*fields), device)


# A constant for torch.compile, as in layout.py.
_rows_by_shape._dynamo_marked_constant = True  # type: ignore[attr-defined]


@cached_tensors
def _cached_rows_by_shape(
    layout: BlockLayout, device: torch.device
) -> tuple[list[tuple[Tensor, Tensor]], Tensor]:
    """The layout's rows, those with equally many queries and keys stacked into one call of dense
    attention, as token indices [R, Q] and [R, S]; and where each token's output then is, [L]."""
    groups: dict[tuple[int, int], list[tuple[Tensor, Tensor]]] = {}
    for (q0, q1), spans in layout.rows:
        query = torch.arange(q0, q1, device=device)
        key = torch.cat([torch.arange(lo, hi, device=device) for lo, hi in spans])
        groups.setdefault((len(query), len(key)), []).append((query, key))
    stacked = [
        (torch.stack([q for q, _ in rows]), torch.stack([k for _, k in rows]))
        for rows in groups.values()
    ]
    order = torch.cat([q.flatten() for q, _ in stacked])
    return stacked, order.argsort()


def ring_attention(
    q_BLHD: Tensor, k_ring_BSHD: Tensor, v_ring_BSHD: Tensor, valid: Tensor, scale: float
) -> Tensor:
    # Reading a length costs nothing on the CPU, except where a graph is made.
    counts = numbers(valid)
    if counts and len(counts) == 1:
        seen = slice(counts[0])
        return attention(q_BLHD, k_ring_BSHD[:, seen], v_ring_BSHD[:, seen], scale)
    slots, lengths_B1 = k_ring_BSHD.shape[1], valid.view(-1, 1).clamp(min=1)
    seen_BS = torch.arange(slots, device=valid.device) < lengths_B1
    # A mask alone would let a NaN through, which is one times zero too.
    seen_BS11, zero = seen_BS.view(-1, slots, 1, 1), q_BLHD.new_zeros(())
    k, v = (torch.where(seen_BS11, t, zero) for t in (k_ring_BSHD, v_ring_BSHD))
    q, k, v = (t.transpose(1, 2) for t in (q_BLHD, k, v))
    mask = seen_BS if len(seen_BS) == 1 else seen_BS.view(-1, 1, 1, slots)
    mask = mask.expand(*mask.shape[:-2], q.shape[2], -1)
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
    x0 = _wide(x) - per_frame(sigma, x) * _guided(flow, uncond_flow, guidance)
    if next_sigma is None or noise is None:
        return x0.to(x.dtype), x0.to(x.dtype)
    renoised = torch.lerp(x0, noise.to(x0.dtype), per_frame(next_sigma, x))
    return x0.to(x.dtype), renoised.to(x.dtype)


def euler_step(
    x: Tensor,
    flow: Tensor,
    sigma: Tensor,
    next_sigma: Tensor,
    uncond_flow: Tensor | None,
    guidance: float,
) -> Tensor:
    change = per_frame(next_sigma, x) - per_frame(sigma, x)
    return (_wide(x) + change * _guided(flow, uncond_flow, guidance)).to(x.dtype)


def _guided(flow: Tensor, uncond_flow: Tensor | None, guidance: float) -> Tensor:
    if uncond_flow is None:
        return _wide(flow)
    dtype = torch.promote_types(_wide(flow).dtype, _wide(uncond_flow).dtype)
    return torch.lerp(uncond_flow.to(dtype), flow.to(dtype), guidance)


def per_frame(sigma: Tensor, x: Tensor) -> Tensor:
    """View of a sigma [], [B] or [B, F] that broadcasts against x [B, F, ...]."""
    sigma = _wide(sigma).to(torch.promote_types(torch.float32, x.dtype))
    return sigma.reshape(sigma.shape + (1,) * (x.dim() - sigma.dim())) if sigma.dim() else sigma


def normal(seed_B: Tensor, frame_F: Tensor, draw: int, shape: Sequence[int]) -> Tensor:
    elements = math.prod(shape[2:])
    group_G = torch.arange((elements + 3) // 4, device=seed_B.device)
    word02 = torch.stack((group_G, torch.full_like(group_G, draw))).view(2, 1, 1, -1)
    frame_F = frame_F.long()
    word13 = torch.stack((frame_F, torch.zeros_like(frame_F))).view(2, 1, -1, 1)
    key = torch.stack((seed_B, seed_B >> 32)).view(2, -1, 1, 1)
    # The words of an even place make a radius and those of an odd one an angle.
    words = torch.stack(philox(word02, word13, key))
    u, turn = (((words >> 9).float() + 0.5) * 2.0**-23).unbind()
    radius, angle = (-2 * u.log()).sqrt(), 2 * math.pi * turn
    pairs_2BFG2 = torch.stack((radius * angle.cos(), radius * angle.sin()), dim=-1)
    normal_BFE = pairs_2BFG2.permute(1, 2, 3, 0, 4).flatten(2)[..., :elements]
    return normal_BFE.reshape(*shape)


def philox(word02: Tensor, word13: Tensor, key: Tensor) -> tuple[Tensor, Tensor]:
    """Philox4x32-10 (Salmon et al., SC 2011) of counters whose words 0 and 2 are `word02` [2, ...]
    and words 1 and 3 `word13`, all int64; the words of the result in the same order.

    Of `word13` and `key` only the low 32 bits count. A product of two words may wrap in int64, but
    its 64 bits are the right ones."""
    # Constants of the two lanes, by arithmetic: a CUDA graph cannot capture a copy to the device.
    lane = torch.arange(2, device=key.device).view(2, *[1] * (key.dim() - 1))
    factor = 0xD2511F53 + lane * (0xCD9E8D57 - 0xD2511F53)
    bump = 0x9E3779B9 + lane * (0xBB67AE85 - 0x9E3779B9)
    for _ in range(10):
        product = (word02 * factor).flip(0)
        word02 = (product >> 32 ^ word13 ^ key) & 0xFFFFFFFF
        word13, key = product, key + bump
    return word02, word13 & 0xFFFFFFFF


def dmd_gradient(x: Tensor, real_x0: Tensor, fake_x0: Tensor) -> Tensor:
    mean_B = (_wide(x) - _wide(real_x0)).abs().flatten(1).mean(1)
    gradient = (_wide(fake_x0) - _wide(real_x0)) / mean_B.view(-1, *[1] * (x.dim() - 1))
    return gradient.to(x.dtype).nan_to_num()


def causal_conv3d(x_BTHWC: Tensor, weight: Tensor, bias_O: Tensor | None) -> Tensor:
    return _in_wide(padded_in_space, x_BTHWC, weight, bias_O)


def upsampled_conv2d(x_BTHWC: Tensor, weight_PQOCYX: Tensor, bias_O: Tensor | None) -> Tensor:
    return _in_wide(interleaved, x_BTHWC, weight_PQOCYX, bias_O)


def _in_wide(
    convolution: Callable[..., Tensor], x_BTHWC: Tensor, weight: Tensor, bias_O: Tensor | None
) -> Tensor:
    bias_O = None if bias_O is None else _wide(bias_O)
    return convolution(_wide(x_BTHWC), _wide(weight), bias_O).to(x_BTHWC.dtype)


def padded_in_space(x_BTHWC: Tensor, weight: Tensor, bias_O: Tensor | None) -> Tensor:
    """A 3-D convolution that pads height and width alone, in the dtype of the tensors."""
    padding = (0, weight.shape[3] // 2, weight.shape[4] // 2)
    out_BOTHW = F.conv3d(x_BTHWC.movedim(-1, 1), weight, bias_O, padding=padding)
    return out_BOTHW.movedim(1, -1).contiguous()


def interleaved(x_BTHWC: Tensor, weight_PQOCYX: Tensor, bias_O: Tensor | None) -> Tensor:
    """Four 2×2 convolutions, each for one of the 2×2 pixels, in the dtype of the tensors."""
    x_NCHW = x_BTHWC.flatten(0, 1).movedim(-1, 1)
    out_PQNOHW = torch.stack(
        [
            F.conv2d(F.pad(x_NCHW, (1 - q, q, 1 - p, p)), weight_PQOCYX[p, q], bias_O)
            for p in range(2)
            for q in range(2)
        ]
    ).unflatten(0, (2, 2))
    out_NHPWQO = out_PQNOHW.permute(2, 4, 0, 5, 1, 3)
    return out_NHPWQO.flatten(3, 4).flatten(1, 2).unflatten(0, x_BTHWC.shape[:2]).contiguous()


# The largest number of each 8-bit dtype that rows are quantised to.
LARGEST = {torch.int8: 127, torch.float8_e4m3fn: 448}


def quantize_rows(x_BLC: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    x_BLC = _wide(x_BLC)
    amax_BL1 = x_BLC.abs().amax(-1, keepdim=True)
    # As a tensor: PyTorch divides numbers, and on a GPU by numbers, with a second rounding.
    largest_BL1 = torch.full_like(amax_BL1, LARGEST[dtype])
    inverse_BL1 = largest_BL1 / amax_BL1
    inverse_BL1 = torch.where(inverse_BL1.isfinite(), inverse_BL1, 0)
    q_BLC = (x_BLC * inverse_BL1).clamp(-LARGEST[dtype], LARGEST[dtype])
    if not dtype.is_floating_point:
        q_BLC = q_BLC.round()
    return q_BLC.to(dtype).contiguous(), (amax_BL1 / largest_BL1).squeeze(-1)
