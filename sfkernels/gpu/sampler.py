"""The update of a sampler, noise from a counter, and DMD's gradient.

Shapes: B batch, F frames of E elements each, G = E/4 groups of four normals from one Philox call.

Bytes, for x in a dtype of e bytes an element: a step reads x, flow and writes x0 (3e), with noise
drawn here x_next too (4e); noise from memory and an unconditional flow add e each. Euler: 3e.
Normals write 4. DMD reads x, real, then real, fake and writes the gradient (5e). In float32, at the
4.3 TB/s an H200 copies: a chunk [1, 3, 16, 60, 104] takes 1.1 us (step that draws its noise), 0.3
(normals), 1.4 (DMD); 21 frames 7.8, 2.0 and 9.8 us. A launch takes longer than a chunk: what counts
here is that each is one (DMD: two).
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from sfkernels import launch


@triton.jit
def _box_muller(word_G, other_G):
    """Two normals of two random words: r·cos 2πu and r·sin 2πu. Angles are cut to an eighth of a
    turn, exactly; tl.cos would cut them in float64. The polynomials are CUDA's cospi and sinpi."""
    radius_G = tl.sqrt(-2.0 * tl.log(_uniform(word_G)))
    turn_G = _uniform(other_G)
    quarter_G = tl.floor(4.0 * turn_G + 0.5)
    t = 2.0 * turn_G - 0.5 * quarter_G  # in half turns, -1/4 to 1/4
    s = t * t
    cos = (0.23138427734375 * s - 1.33502197265625) * s + 4.058703899383545
    cos = (cos * s - 4.934802055358887) * s + 1.0
    sin = (-0.595703125 * s + 2.5503995418548584) * s - 5.167724132537842
    sin = t * 3.141592502593994 + t * s * sin
    quarter = quarter_G.to(tl.int32)
    odd = (quarter & 1) != 0
    x, y = tl.where(odd, sin, cos), tl.where(odd, cos, sin)
    x = tl.where(((quarter + 1) & 2) != 0, -x, x)
    y = tl.where((quarter & 2) != 0, -y, y)
    return radius_G * x, radius_G * y


@triton.jit
def _uniform(word_G):
    return ((word_G >> 9).to(tl.float32) + 0.5) * 1.1920928955078125e-07


@triton.jit
def _draw(seed_ptr, frame_ptr, batch, frame, draw, BLOCK: tl.constexpr):
    """The normals [BLOCK] of this program's elements, as sfkernels.normal defines them."""
    group_G = tl.program_id(0) * (BLOCK // 4) + tl.arange(0, BLOCK // 4)
    index = tl.load(frame_ptr + frame).to(tl.int32)
    w0, w1, w2, w3 = tl.philox(tl.load(seed_ptr + batch), group_G, index, draw, 0)
    n0, n1 = _box_muller(w0, w1)
    n2, n3 = _box_muller(w2, w3)
    return tl.interleave(tl.interleave(n0, n2), tl.interleave(n1, n3))


@triton.jit
def _load(ptr, batch, frame, stride_b, stride_f, index_E, mask_E):
    at = ptr + batch * stride_b + frame * stride_f
    return tl.load(at + index_E, mask_E, 0.0).to(tl.float32)


@triton.jit
def _load_scalar(ptr, batch, frame, stride_b, stride_f):
    return tl.load(ptr + batch * stride_b + frame * stride_f).to(tl.float32)


@triton.jit(do_not_specialize=["draw"])
def _sampler_step_kernel(
    x_ptr,
    flow_ptr,
    uncond_ptr,
    noise_ptr,
    sigma_ptr,
    next_sigma_ptr,
    seed_ptr,
    frame_ptr,
    x0_ptr,
    next_ptr,
    draw,
    guidance,
    elements,
    stride_xb,
    stride_xf,
    stride_fb,
    stride_ff,
    stride_ub,
    stride_uf,
    stride_nb,
    stride_nf,
    stride_sb,
    stride_sf,
    stride_tb,
    stride_tf,
    GUIDED: tl.constexpr,
    EULER: tl.constexpr,
    LAST: tl.constexpr,
    DRAWN: tl.constexpr,
    BLOCK: tl.constexpr,
):
    frame, batch = tl.program_id(1).to(tl.int64), tl.program_id(2).to(tl.int64)
    index_E = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask_E = index_E < elements
    out_E = (batch * tl.num_programs(1) + frame) * elements + index_E

    x_E = _load(x_ptr, batch, frame, stride_xb, stride_xf, index_E, mask_E)
    flow_E = _load(flow_ptr, batch, frame, stride_fb, stride_ff, index_E, mask_E)
    if GUIDED:
        uncond_E = _load(uncond_ptr, batch, frame, stride_ub, stride_uf, index_E, mask_E)
        flow_E = uncond_E + guidance * (flow_E - uncond_E)
    sigma = _load_scalar(sigma_ptr, batch, frame, stride_sb, stride_sf)
    if not LAST:
        next_sigma = _load_scalar(next_sigma_ptr, batch, frame, stride_tb, stride_tf)
    if EULER:
        next_E = x_E + (next_sigma - sigma) * flow_E
    else:
        x0_E = x_E - sigma * flow_E
        tl.store(x0_ptr + out_E, x0_E.to(x0_ptr.dtype.element_ty), mask_E)
        if not LAST:
            if DRAWN:
                noise_E = _draw(seed_ptr, frame_ptr, batch, frame, draw, BLOCK)
            else:
                noise_E = _load(noise_ptr, batch, frame, stride_nb, stride_nf, index_E, mask_E)
            next_E = (1.0 - next_sigma) * x0_E + next_sigma * noise_E
    if not LAST:
        tl.store(next_ptr + out_E, next_E.to(next_ptr.dtype.element_ty), mask_E)


@triton.jit(do_not_specialize=["draw"])
def _normal_kernel(seed_ptr, frame_ptr, out_ptr, draw, elements, BLOCK: tl.constexpr):
    frame, batch = tl.program_id(1).to(tl.int64), tl.program_id(2).to(tl.int64)
    index_E = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    out_E = (batch * tl.num_programs(1) + frame) * elements + index_E
    tl.store(
        out_ptr + out_E,
        _draw(seed_ptr, frame_ptr, batch, frame, draw, BLOCK),
        index_E < elements,
    )


@triton.jit
def _dmd_sum_kernel(
    x_ptr, real_ptr, partial_ptr, elements, stride_xb, stride_rb, BLOCK: tl.constexpr
):
    """One part of a sample, every P-th block of it: partial [B, P] takes the sum of |x − real|."""
    part, batch = tl.program_id(0), tl.program_id(1).to(tl.int64)
    sum_E = tl.zeros([BLOCK], tl.float32)
    for start in range(part * BLOCK, elements, tl.num_programs(0) * BLOCK):
        index_E = start + tl.arange(0, BLOCK)
        mask_E = index_E < elements
        x_E = _load(x_ptr, batch, 0, stride_xb, 0, index_E, mask_E)
        sum_E += tl.abs(x_E - _load(real_ptr, batch, 0, stride_rb, 0, index_E, mask_E))
    tl.store(partial_ptr + batch * tl.num_programs(0) + part, tl.sum(sum_E, 0))


@triton.jit
def _dmd_scale_kernel(
    real_ptr,
    fake_ptr,
    partial_ptr,
    out_ptr,
    elements,
    stride_rb,
    stride_fb,
    LARGEST: tl.constexpr,
    PARTS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    batch = tl.program_id(1).to(tl.int64)
    index_E = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask_E = index_E < elements
    mean = tl.sum(tl.load(partial_ptr + batch * PARTS + tl.arange(0, PARTS)), 0) / elements
    real_E = _load(real_ptr, batch, 0, stride_rb, 0, index_E, mask_E)
    fake_E = _load(fake_ptr, batch, 0, stride_fb, 0, index_E, mask_E)
    grad_E = (fake_E - real_E) / mean
    finite_E = tl.minimum(tl.maximum(grad_E, -LARGEST), LARGEST)
    grad_E = tl.where(grad_E == grad_E, finite_E, 0.0)  # NaN is not itself
    tl.store(out_ptr + batch * elements + index_E, grad_E.to(out_ptr.dtype.element_ty), mask_E)


def sampler_step(
    x: Tensor,
    flow: Tensor,
    uncond_flow: Tensor | None,
    sigma: Tensor,
    next_sigma: Tensor | None,
    noise: Tensor | None,
    seed_B: Tensor | None,
    frame_F: Tensor | None,
    draw: int,
    guidance: float,
    euler: bool,
) -> tuple[Tensor | None, Tensor | None]:
    """x0 and x at next_sigma, contiguous; None for x0 of an Euler step and x_next of a last one."""
    frames_BFE = [None if t is None else _rows(t, 2) for t in (x, flow, uncond_flow, noise)]
    sigmas_BF = [None if s is None else _by_frame(s, x) for s in (sigma, next_sigma)]
    out = torch.empty_like(x, memory_format=torch.contiguous_format)
    x0 = None if euler else out
    following = out if euler else None if next_sigma is None else torch.empty_like(out)
    elements = math.prod(x.shape[2:])
    setting = launch.flat("sampler", x.device)
    launch.run(
        _sampler_step_kernel,
        (triton.cdiv(elements, setting.block), x.shape[1], x.shape[0]),
        (
            *(*frames_BFE, *sigmas_BF, _dense(seed_B), _dense(frame_F), x0, following),
            *(draw, guidance, elements, *launch.outer_strides(*frames_BFE, *sigmas_BF)),
        ),
        num_warps=setting.warps,
        GUIDED=uncond_flow is not None,
        EULER=euler,
        LAST=next_sigma is None,
        DRAWN=seed_B is not None,
        BLOCK=setting.block,
    )
    return x0, following


def normal(seed_B: Tensor, frame_F: Tensor, draw: int, shape: Sequence[int]) -> Tensor:
    """Standard normal noise of a shape [B, F, ...] in float32."""
    out = torch.empty(*shape, dtype=torch.float32, device=seed_B.device)
    elements = math.prod(shape[2:])
    setting = launch.flat("sampler", out.device)
    launch.run(
        _normal_kernel,
        (triton.cdiv(elements, setting.block), shape[1], shape[0]),
        (_dense(seed_B), _dense(frame_F), out, draw, elements),
        num_warps=setting.warps,
        BLOCK=setting.block,
    )
    return out


# The sums of a sample: fixed, so that the same sample gives the same bits on GPUs of any size.
_PARTS = 256


def dmd_gradient(x: Tensor, real_x0: Tensor, fake_x0: Tensor) -> Tensor:
    """(fake − real) / mean |x − real| by sample, contiguous."""
    elements = math.prod(x.shape[1:])
    x_BE, real_BE, fake_BE = (_rows(t, 1) for t in (x, real_x0, fake_x0))
    out = torch.empty_like(x, memory_format=torch.contiguous_format)
    setting = launch.flat("sampler", x.device)
    blocks = triton.cdiv(elements, setting.block)
    parts = min(triton.next_power_of_2(blocks), _PARTS)
    partial_BP = torch.empty(x.shape[0], parts, dtype=torch.float32, device=x.device)
    launch.run(
        _dmd_sum_kernel,
        (parts, x.shape[0]),
        (x_BE, real_BE, partial_BP, elements, x_BE.stride(0), real_BE.stride(0)),
        num_warps=setting.warps,
        BLOCK=setting.block,
    )
    launch.run(
        _dmd_scale_kernel,
        (blocks, x.shape[0]),
        (real_BE, fake_BE, partial_BP, out, elements, real_BE.stride(0), fake_BE.stride(0)),
        num_warps=setting.warps,
        LARGEST=torch.finfo(x.dtype).max,
        PARTS=parts,
        BLOCK=setting.block,
    )
    return out


def _by_frame(sigma: Tensor, x: Tensor) -> Tensor:
    """A sigma of shape [], [B] or [B, F] as a view of shape [B, F]."""
    return sigma.view(*sigma.shape, *[1] * (2 - sigma.dim())).expand(x.shape[:2])


def _rows(t: Tensor, outer: int) -> Tensor:
    """View of all but the first `outer` dimensions as one of stride 1, or a copy where they do not
    lie side by side in memory."""
    flat = t.reshape(*t.shape[:outer], math.prod(t.shape[outer:]))
    return flat if flat.stride(-1) == 1 else flat.contiguous()


def _dense(t: Tensor | None) -> Tensor | None:
    return None if t is None else t.contiguous()
