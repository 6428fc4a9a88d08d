"""Attention by libraries of dense kernels: PyTorch's own (impl="sdpa", which picks cuDNN, flash or
another backend) and flash-attn (impl="flash": version 3, 4 or 2, the first that is installed).

A pattern becomes one call for each of its rows, without a mask, on slices of the keys. Shapes are
named as in reference.py.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from sfkernels import reference
from sfkernels.layout import Row, Span

IMPLS = ("sdpa", "flash")


def attention(q_BLHD: Tensor, k_BSHD: Tensor, v_BSHD: Tensor, scale: float, impl: str) -> Tensor:
    if impl == "sdpa":
        return reference.attention(q_BLHD, k_BSHD, v_BSHD, scale)
    out = _flash()[0](q_BLHD, k_BSHD, v_BSHD, softmax_scale=scale)
    return _first(out)


def block_causal_attention(
    q_BLHD: Tensor,
    k_BLHD: Tensor,
    v_BLHD: Tensor,
    rows: Sequence[Row],
    scale: float,
    k_prefix_BPHD: Tensor | None,
    v_prefix_BPHD: Tensor | None,
    prefix: Sequence[Span],
    impl: str,
) -> Tensor:
    def seen(x_BSHD: Tensor, prefix_BPHD: Tensor | None, spans: Sequence[Span]) -> Tensor:
        past = [] if prefix_BPHD is None else [prefix_BPHD.detach()[:, a:b] for a, b in prefix]
        pieces = [*past, *(x_BSHD[:, a:b] for a, b in spans)]
        return pieces[0] if len(pieces) == 1 else torch.cat(pieces, 1)

    outs = []
    for (start, end), spans in rows:
        k, v = seen(k_BLHD, k_prefix_BPHD, spans), seen(v_BLHD, v_prefix_BPHD, spans)
        outs.append(attention(q_BLHD[:, start:end], k, v, scale, impl))
    return outs[0] if len(outs) == 1 else torch.cat(outs, 1)


def ring_attention(
    q_BLHD: Tensor, k_ring_BSHD: Tensor, v_ring_BSHD: Tensor, valid: Tensor, scale: float, impl: str
) -> Tensor:
    """Without a host sync: flash-attn takes the length as a tensor, and so does the flash backend
    of PyTorch. What that cannot take, float32 and CPU tensors, goes the reference's way."""
    if impl == "sdpa":
        if not q_BLHD.is_cuda or q_BLHD.dtype not in (torch.float16, torch.bfloat16):
            return reference.ring_attention(q_BLHD, k_ring_BSHD, v_ring_BSHD, valid, scale)
        return _varlen_ring_attention(q_BLHD, k_ring_BSHD, v_ring_BSHD, valid, scale)
    with_cache = _flash()[1]
    if with_cache is None:
        raise ValueError(
            "impl='flash': ring_attention needs flash_attn_with_kvcache of flash-attn 2 or 3, and "
            "only version 4 is installed"
        )
    lengths_B = _length(k_ring_BSHD, valid).expand(len(q_BLHD)).contiguous()
    out = with_cache(q_BLHD, k_ring_BSHD, v_ring_BSHD, cache_seqlens=lengths_B, softmax_scale=scale)
    return _first(out)


def _varlen_ring_attention(
    q_BLHD: Tensor, k_ring_BSHD: Tensor, v_ring_BSHD: Tensor, valid: Tensor, scale: float
) -> Tensor:
    """Each sample is a batch of one sequence, whose end is read on the device."""
    from torch.nn.attention.varlen import varlen_attn

    queries, slots, head_dim = q_BLHD.shape[1], k_ring_BSHD.shape[1], q_BLHD.shape[3]
    if scale != head_dim**-0.5:  # not every version takes a scale
        q_BLHD = q_BLHD * (scale * head_dim**0.5)
    q_ends = torch.arange(2, dtype=torch.int32, device=q_BLHD.device) * queries
    k_ends = F.pad(_length(k_ring_BSHD, valid), (1, 0))
    outs = [
        _first(varlen_attn(q, k, v, q_ends, k_ends, queries, slots))
        for q, k, v in zip(q_BLHD, k_ring_BSHD, v_ring_BSHD, strict=True)
    ]
    return torch.stack(outs)


def _length(k_ring_BSHD: Tensor, valid: Tensor) -> Tensor:
    """How many keys are seen, in range whatever `valid` is; int32 [1]."""
    return valid.reshape(1).clamp(1, k_ring_BSHD.shape[1]).to(torch.int32)


def _first(out: Tensor | tuple[Tensor, ...]) -> Tensor:
    """Versions 3 and 4 may return the logarithms of sums too."""
    return out if isinstance(out, Tensor) else out[0]


@functools.cache
def _flash() -> tuple[Callable[..., Any], Callable[..., Any] | None]:
    """flash_attn_func and flash_attn_with_kvcache. Raises ValueError where none is installed."""
    for name in ("flash_attn_interface", "flash_attn.cute", "flash_attn"):
        try:
            module = importlib.import_module(name)
        except ImportError:
            continue
        if hasattr(module, "flash_attn_func"):
            return module.flash_attn_func, getattr(module, "flash_attn_with_kvcache", None)
    raise ValueError("impl='flash': no flash-attn is installed (pip install flash-attn)")
