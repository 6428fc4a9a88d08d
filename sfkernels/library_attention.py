"""Attention by other libraries' kernels: PyTorch's own (impl="sdpa", which picks cuDNN, flash or
another backend; "cudnn" and "sdpa_flash", which are these two), its FlexAttention (impl="flex", in
Triton, and "flex_flash", by flash-attn 4) and flash-attn (impl="flash": version 3, 4 or 2, the
first that is installed). A ring under "cudnn" is in gpu/cudnn.py.

To all but FlexAttention a pattern is one call for each of its rows, without a mask, on slices of
the keys. That one takes it whole, as a BlockMask. Shapes are named as in reference.py.
"""

from __future__ import annotations

import functools
import importlib
import inspect
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from sfkernels import reference
from sfkernels.dispatch import cached_tensors
from sfkernels.layout import Row, Span

IMPLS = ("sdpa", "cudnn", "sdpa_flash", "flash", "flex", "flex_flash")
FLEX = {"flex": "TRITON", "flex_flash": "FLASH"}  # FlexAttention, and what computes it
FLEX_BLOCK = 128  # queries, and keys, that FlexAttention skips, masks or computes whole


def attention(q_BLHD: Tensor, k_BSHD: Tensor, v_BSHD: Tensor, scale: float, impl: str) -> Tensor:
    """Attention of every query to every key, [B, L, H, D]."""
    if impl == "sdpa":
        return reference.attention(q_BLHD, k_BSHD, v_BSHD, scale)
    if impl in FLEX:
        return _flex(q_BLHD, k_BSHD, v_BSHD, scale, None, impl)
    if impl in ("cudnn", "sdpa_flash"):
        # By the ops themselves: to choose a backend for a while is a setting of the whole process.
        q, k, v = (t.transpose(1, 2) for t in (q_BLHD, k_BSHD, v_BSHD))
        if impl == "cudnn":
            learns = torch.is_grad_enabled() and any(t.requires_grad for t in (q, k, v))
            found = torch.ops.aten._scaled_dot_product_cudnn_attention(
                q, k, v, None, learns, scale=scale
            )
        else:
            found = torch.ops.aten._scaled_dot_product_flash_attention(q, k, v, scale=scale)
        return _first(found).transpose(1, 2)
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
    """Attention of each row's queries to the spans of the prefix and to those of the row."""

    def seen(x_BSHD: Tensor, prefix_BPHD: Tensor | None, spans: Sequence[Span]) -> Tensor:
        past = [] if prefix_BPHD is None else [prefix_BPHD.detach()[:, a:b] for a, b in prefix]
        pieces = [*past, *(x_BSHD[:, a:b] for a, b in spans)]
        return pieces[0] if len(pieces) == 1 else torch.cat(pieces, 1)

    if impl in FLEX:
        every = ((0, k_BLHD.shape[1]),)
        k, v = seen(k_BLHD, k_prefix_BPHD, every), seen(v_BLHD, v_prefix_BPHD, every)
        mask = flex_mask(tuple(rows), k.shape[1] - k_BLHD.shape[1], k.shape[1], k.device)
        return _flex(q_BLHD, k, v, scale, mask, impl)
    outs = []
    for (start, end), spans in rows:
        k, v = seen(k_BLHD, k_prefix_BPHD, spans), seen(v_BLHD, v_prefix_BPHD, spans)
        outs.append(attention(q_BLHD[:, start:end], k, v, scale, impl))
    return outs[0] if len(outs) == 1 else torch.cat(outs, 1)


def ring_attention(
    q_BLHD: Tensor, k_ring_BSHD: Tensor, v_ring_BSHD: Tensor, valid: Tensor, scale: float, impl: str
) -> Tensor:
    """Attention to the first `valid` slots, without a host sync: flash-attn takes the length as a
    tensor, and so do the flash backend of PyTorch and the BlockMask of FlexAttention. What "sdpa"
    cannot take so, float32 and CPU tensors, goes the reference's way."""
    if impl in FLEX:
        mask = _flex_ring_mask(q_BLHD.shape[1], k_ring_BSHD.shape[1], _length(k_ring_BSHD, valid))
        return _flex(q_BLHD, k_ring_BSHD, v_ring_BSHD, scale, mask, impl)
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
    lengths_B = _length(k_ring_BSHD, valid)
    out = with_cache(q_BLHD, k_ring_BSHD, v_ring_BSHD, cache_seqlens=lengths_B, softmax_scale=scale)
    return _first(out)


def _varlen_ring_attention(
    q_BLHD: Tensor, k_ring_BSHD: Tensor, v_ring_BSHD: Tensor, valid: Tensor, scale: float
) -> Tensor:
    """Attention of each sample as a batch of one sequence, whose end is read on the device."""
    from torch.nn.attention.varlen import varlen_attn

    queries, slots, head_dim = q_BLHD.shape[1], k_ring_BSHD.shape[1], q_BLHD.shape[3]
    if scale != head_dim**-0.5:  # not every version takes a scale
        q_BLHD = q_BLHD * (scale * head_dim**0.5)
    q_ends = torch.arange(2, dtype=torch.int32, device=q_BLHD.device) * queries
    k_ends_B2 = F.pad(_length(k_ring_BSHD, valid)[:, None], (1, 0))
    outs = [
        _first(varlen_attn(q, k, v, q_ends, k_ends, queries, slots))
        for q, k, v, k_ends in zip(q_BLHD, k_ring_BSHD, v_ring_BSHD, k_ends_B2, strict=True)
    ]
    return torch.stack(outs)


def _length(k_ring_BSHD: Tensor, valid: Tensor) -> Tensor:
    """Number of keys that each sample sees, in range whatever `valid` is; int32 [B]."""
    lengths = valid.reshape(-1).expand(len(k_ring_BSHD))
    return lengths.clamp(1, k_ring_BSHD.shape[1]).to(torch.int32)


def _first(out: Tensor | tuple[Tensor, ...]) -> Tensor:
    """The output alone: versions 3 and 4 may return the logarithms of sums too."""
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
            function = module.flash_attn_func
            if "num_splits" in inspect.signature(function).parameters:
                # Few queries do not fill a GPU, and by default their keys are not split.
                function = functools.partial(function, num_splits=0)
            return function, getattr(module, "flash_attn_with_kvcache", None)
    raise ValueError(
        "impl='flash': no flash-attn is installed (pip install 'sfkernels[flash]' or flash-attn)"
    )


def _flex(
    q_BLHD: Tensor, k_BSHD: Tensor, v_BSHD: Tensor, scale: float, mask: Any, impl: str
) -> Tensor:
    q, k, v = (t.transpose(1, 2) for t in (q_BLHD, k_BSHD, v_BSHD))
    on_cpu = q.device.type == "cpu"
    if on_cpu and torch.is_grad_enabled() and any(t.requires_grad for t in (q, k, v)):
        raise ValueError("impl='flex' has no gradient on a CPU: use 'sdpa' or 'reference'")
    if on_cpu or torch.compiler.is_compiling():
        from torch.nn.attention.flex_attention import flex_attention

        out = flex_attention(q, k, v, block_mask=mask, scale=scale)
    else:
        with torch._dynamo.config.patch(recompile_limit=1000):  # one entry for each pattern
            options = {"BACKEND": FLEX[impl]}
            out = _compiled_flex()(q, k, v, block_mask=mask, scale=scale, kernel_options=options)
    return out.transpose(1, 2)


@functools.cache
def _compiled_flex() -> Callable[..., Any]:
    """FlexAttention, compiled and tuned at each new size; not measured on a GPU yet."""
    from torch.nn.attention.flex_attention import flex_attention

    mode = "max-autotune-no-cudagraphs"
    return torch.compile(flex_attention, mode=mode, dynamic=False, fullgraph=True)


@cached_tensors
def flex_mask(rows: tuple[Row, ...], past: int, keys: int, device: torch.device) -> Any:
    """The BlockMask of a pattern behind `past` keys that all queries see, of `keys` keys in all;
    None where all see all. Blocks are counted from the rows, and no matrix of tokens is made."""
    from torch.nn.attention.flex_attention import BlockMask

    spans = [[(0, past)] * (past > 0) + [(a + past, b + past) for a, b in row.keys] for row in rows]
    queries = rows[-1].queries[1]
    if all(sum(b - a for a, b in seen) == keys for seen in spans):
        return None
    seen_QK = torch.zeros(-(-queries // FLEX_BLOCK), -(-keys // FLEX_BLOCK), dtype=torch.int64)
    for row, seen in zip(rows, spans, strict=True):
        seen_QK += torch.outer(_in_blocks(queries, [row.queries]), _in_blocks(keys, seen))
    whole_QK = torch.outer(_in_blocks(queries, [(0, queries)]), _in_blocks(keys, [(0, keys)]))
    full_QK = seen_QK == whole_QK
    partly = [t.to(device) for t in _listed((seen_QK > 0) & ~full_QK)]
    fully = [t.to(device) for t in _listed(full_QK)]

    # Of every query the spans that its row sees, the shorter lists filled up with empty ones.
    most = max(map(len, spans))
    edges_RS2 = torch.tensor([[*seen, *[(0, 0)] * (most - len(seen))] for seen in spans])
    sizes = torch.tensor([row.queries[1] - row.queries[0] for row in rows])
    edges_S2L = edges_RS2.repeat_interleave(sizes, 0).permute(1, 2, 0).to(device)

    def mask_mod(batch: Tensor, head: Tensor, q: Tensor, k: Tensor) -> Tensor:
        found = (k >= edges_S2L[0, 0, q]) & (k < edges_S2L[0, 1, q])
        for i in range(1, most):
            found = found | (k >= edges_S2L[i, 0, q]) & (k < edges_S2L[i, 1, q])
        return found

    sizes_QK = queries, keys
    return BlockMask.from_kv_blocks(
        partly[0], partly[1], fully[0], fully[1], FLEX_BLOCK, mask_mod, sizes_QK
    )


def _flex_ring_mask(queries: int, slots: int, length: Tensor) -> Any:
    """The BlockMask of all queries over the first `length` [B] slots, computed on the device."""
    from torch.nn.attention.flex_attention import BlockMask

    rows, columns = -(-queries // FLEX_BLOCK), -(-slots // FLEX_BLOCK)
    length_B11 = length[:, None, None]
    whole, rest = length_B11 // FLEX_BLOCK, length_B11 % FLEX_BLOCK
    order = torch.arange(columns, dtype=torch.int32, device=length.device)
    shape = len(length), 1, rows, columns
    return BlockMask.from_kv_blocks(
        (rest > 0).int().expand(shape[:3]).contiguous(),
        ((order + whole[..., None]) % columns).int().expand(shape).contiguous(),
        whole.expand(shape[:3]).contiguous(),
        order.expand(shape).contiguous(),
        FLEX_BLOCK,
        lambda batch, head, q, k: k < length[batch],
        (queries, slots),
    )


def _in_blocks(tokens: int, spans: Sequence[Span]) -> Tensor:
    """Number of the tokens in `spans` that each block holds, [blocks]."""
    inside = torch.zeros(-(-tokens // FLEX_BLOCK) * FLEX_BLOCK, dtype=torch.int64)
    for lo, hi in spans:
        inside[lo:hi] = 1
    return inside.unflatten(0, (-1, FLEX_BLOCK)).sum(1)


def _listed(chosen_QK: Tensor) -> tuple[Tensor, Tensor]:
    """Number of blocks of keys chosen for each block of queries, [1, 1, Q], and which, chosen ones
    first, [1, 1, Q, K]; in int32."""
    order = chosen_QK.to(torch.int32).argsort(dim=1, descending=True, stable=True)
    return chosen_QK.sum(1).int()[None, None], order.int()[None, None]
