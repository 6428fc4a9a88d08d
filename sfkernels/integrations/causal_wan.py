"""`CausalWanModel` of the public Self Forcing, CausVid, LongLive and Rolling Forcing code.

What runs with a KV cache and without gradients uses the kernels; all else, such as training, goes
the model's own way. The tensors of the model's cache are used as rings: a frame keeps its slot,
where the public code shifts the whole cache, layer by layer, once it is full. Indices come from the
integers that the model is called with, so that no layer waits for the device. The cache's own
indices are not read.

Of Rolling Forcing, whose passes hold several chunks at different noise, self-attention stays the
model's own; norms, modulation and attention to text use the kernels.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor, nn

from sfkernels.attention import cross_attention, ring_attention
from sfkernels.integrations.forwards import (
    Options,
    check_norms,
    check_parts,
    eps_of,
    give,
    normed,
    version_of,
    weight_of,
)
from sfkernels.kv_cache import RingChunk, frames_to_redo, place, semaphores_needed
from sfkernels.layout import check_window
from sfkernels.norm import adaln, gated_adaln, gated_layer_norm
from sfkernels.residual import gated_residual
from sfkernels.rope import qk_norm_rope_append, rope_table

SELF_FORCING, CAUSVID = "Self Forcing", "CausVid"
LONGLIVE, ROLLING_FORCING = "LongLive", "Rolling Forcing"
_BLOCK = {
    *("x", "e", "seq_lens", "grid_sizes", "freqs", "context", "context_lens", "block_mask"),
    *("kv_cache", "crossattn_cache", "current_start"),
}
VERSIONS = {
    SELF_FORCING: _BLOCK | {"cache_start"},
    CAUSVID: _BLOCK | {"current_end"},
    LONGLIVE: _BLOCK | {"cache_start", "sink_recache_after_switch"},
    ROLLING_FORCING: _BLOCK | {"cache_start", "updating_cache"},
}
# Kept in a layer's cache: the end of what it holds, in frames, and what `ring_attention` counts by.
_END, _SEMAPHORES = "sfkernels_end", "sfkernels_semaphores"


def patch(model: nn.Module, options: Options) -> None:
    """Gives the blocks and the head of a model their forwards. Raises ValueError for versions that
    are not known."""
    check_parts(model, "the model", "blocks", "head")
    for i, block in enumerate(model.blocks):  # type: ignore[arg-type]
        name = f"blocks.{i}"
        version = version_of(block, name, VERSIONS)
        parts = "self_attn", "cross_attn", "norm1", "norm2", "norm3", "ffn", "modulation"
        check_parts(block, name, *parts)
        for attn in ("self_attn", "cross_attn"):
            part, layers = getattr(block, attn), ("q", "k", "v", "o", "norm_q", "norm_k")
            check_parts(part, f"{name}.{attn}", *layers)
            check_norms(part, f"{name}.{attn}", "norm_q", "norm_k")
        give(block, name, _block, options)
        if version != ROLLING_FORCING:
            forward = _longlive_attention if version == LONGLIVE else _self_attention
            give(block.self_attn, f"{name}.self_attn", forward, options)
        if type(block.cross_attn).__name__ == "WanT2VCrossAttention":
            give(block.cross_attn, f"{name}.cross_attn", _cross_attention, options)
    check_parts(model.head, "head", "norm", "head", "modulation")  # type: ignore[arg-type]
    version_of(model.head, "head", {"all": {"x", "e"}})  # type: ignore[arg-type]
    give(model.head, "head", _head, options)  # type: ignore[arg-type]


def _block(
    self: Any,
    options: Options,
    x: Tensor,
    e: Tensor,
    *,
    context: Tensor,
    context_lens: Any = None,
    kv_cache: Any = None,
    crossattn_cache: Any = None,
    **attention: Any,
) -> Any:
    """Forward of a `CausalWanAttentionBlock`. x [B, L, C]; e [B, F, 6, C]."""
    if kv_cache is None or torch.is_grad_enabled():
        text = dict(context=context, context_lens=context_lens, crossattn_cache=crossattn_cache)
        return type(self).forward(self, x, e, kv_cache=kv_cache, **text, **attention)
    impl = options.impl
    modulation = (self.modulation.unsqueeze(1) + e).chunk(6, dim=2)
    shift, scale, gate, ffn_shift, ffn_scale, ffn_gate = modulation
    h = adaln(x, shift, scale, eps=eps_of(self.norm1), impl=impl)
    y = self.self_attn(h, kv_cache=kv_cache, **attention)
    y, *update = y if isinstance(y, tuple) else (y,)
    y = y.to(x.dtype)  # which it has not under autocast
    if isinstance(self.norm3, nn.Identity):
        x = h = gated_residual(x, y, gate, impl=impl)
    else:
        affine = self.norm3.weight, self.norm3.bias
        x, h = gated_layer_norm(x, y, gate, *affine, eps=eps_of(self.norm3), impl=impl)
    y = self.cross_attn(h, context, context_lens, crossattn_cache=crossattn_cache).to(x.dtype)
    x, h = gated_adaln(x, y, None, ffn_shift, ffn_scale, eps=eps_of(self.norm2), impl=impl)
    x = gated_residual(x, self.ffn(h).to(x.dtype), ffn_gate, impl=impl)
    return (x, *update) if update else x


def _self_attention(
    self: Any,
    options: Options,
    x: Tensor,
    seq_lens: Any = None,
    grid_sizes: Any = None,
    freqs: Any = None,
    block_mask: Any = None,
    kv_cache: Any = None,
    current_start: int = 0,
    *rest: Any,
    **named: Any,
) -> Any:
    """Forward of a `CausalWanSelfAttention`. x [B, L, C], the tokens of whole frames."""
    given = x, seq_lens, grid_sizes, freqs, block_mask, kv_cache, current_start
    if kv_cache is None:
        return type(self).forward(self, *given, *rest, **named)
    frames, height, width = (int(n) for n in grid_sizes[0])
    current_start = int(current_start)
    sink = int(getattr(self, "sink_size", 0))
    k, v, frame_tokens = kv_cache["k"], kv_cache["v"], height * width
    window, end = k.shape[1] // frame_tokens, kv_cache.get(_END, 0)
    if torch.is_grad_enabled():
        if end:  # by passes without gradients: until it is full, a ring is in the model's order
            end = max(end, current_start // frame_tokens + frames)
            if end > window:
                raise ValueError(
                    f"a pass with gradients up to frame {end - 1} over a cache of {window} frames: "
                    "a ring that rolls is for torch.no_grad() alone; unpatch the model to train it"
                )
            kv_cache[_END] = end
        return type(self).forward(self, *given, *rest, **named)
    if k.requires_grad:  # a pass with gradients needs what it has read for its backward pass
        k, v = (t.detach().clone() for t in (k, v))
        kv_cache["k"], kv_cache["v"] = k, v
    start = _check(self, x.shape[1], current_start, frames, frame_tokens, k.shape[1], end)
    at, table = _place(start, frames, (height, width), window, sink, k.shape[3], x.device)
    three = [layer(x).to(k.dtype) for layer in (self.q, self.k, self.v)]  # of autocast's
    q = qk_norm_rope_append(
        three, weight_of(self.norm_q), weight_of(self.norm_k), table, k, v, at.slot_F,
        eps=eps_of(self.norm_q), impl=options.impl,
    )  # fmt: skip
    if x.is_cuda and _SEMAPHORES not in kv_cache:
        needed = semaphores_needed(x.shape[0], k.shape[1], k.shape[2])
        kv_cache[_SEMAPHORES] = torch.zeros(needed, dtype=torch.int32, device=x.device)
    o = ring_attention(
        q, k, v, at.valid, full=start + frames >= window, semaphores=kv_cache.get(_SEMAPHORES),
        impl=options.attention_impl,
    )  # fmt: skip
    kv_cache[_END] = start + frames
    return self.o(o.flatten(2))


def _longlive_attention(self: Any, options: Options, x: Tensor, *args: Any, **named: Any) -> Any:
    """Forward of LongLive's attention, which also says what is to be written into the cache
    afterwards: nothing, as the ring is written already."""
    o = _self_attention(self, options, x, *args, **named)
    if isinstance(o, tuple) or named.get("kv_cache") is None:
        return o
    tokens = named.get("current_start", 0) + x.shape[1]
    return o, (tokens, min(tokens, named["kv_cache"]["k"].shape[1]), None)


def _check(
    attn: Any, tokens: int, current_start: int, frames: int, frame_tokens: int, held: int, end: int
) -> int:
    """The frame that a chunk starts with. Raises ValueError unless it is whole and the ring can
    take it."""
    window, sink = held // frame_tokens, int(getattr(attn, "sink_size", 0))
    if held % frame_tokens or current_start % frame_tokens or tokens != frames * frame_tokens:
        raise ValueError(
            f"a cache of {held} tokens and {tokens} tokens from {current_start} on: must be whole "
            f"frames of {frame_tokens} tokens (the pipeline's frame_seq_length)"
        )
    if getattr(attn, "max_attention_size", held) < held:
        raise ValueError(
            f"max_attention_size is {attn.max_attention_size}: must be {held} at least, the tokens "
            "of the cache, all of which the kernels read"
        )
    start = current_start // frame_tokens
    if start > end:
        raise ValueError(
            f"frame {start} follows frame {end - 1} in this cache: frames come in order, and a "
            "patched model starts its video at frame 0"
        )
    check_window(window, sink, frames)
    rolls = getattr(attn, "local_attn_size", -1) != -1
    if start + frames > window and not rolls:
        raise ValueError(
            f"frames {start} to {start + frames - 1} do not fit in a cache of {window}: give the "
            "model a local_attn_size to roll it"
        )
    if frames < frames_to_redo(end, start, window, sink):
        raise ValueError(
            f"frames {start} to {start + frames - 1} would see those after them, which the ring "
            f"holds up to frame {end - 1}: go on, redo the last {frames}, or start anew"
        )
    return start


def _place(*where: Any) -> tuple[RingChunk, Tensor]:
    """Where a chunk goes, and its rotation: once for all layers, on the stream that asks. In a CUDA
    graph each layer makes its own, which then live as long as the graph."""
    device = where[-1]
    if device.type != "cuda" or torch.compiler.is_compiling():
        return _placed(0, *where)
    if torch.cuda.is_current_stream_capturing():
        return _placed.__wrapped__(0, *where)
    return _placed(torch.cuda.current_stream(device).cuda_stream, *where)


@functools.lru_cache(maxsize=8)
def _placed(
    stream: int, start: int, frames: int, grid: tuple[int, int], window: int, sink: int,
    head_dim: int, device: torch.device,
) -> tuple[RingChunk, Tensor]:  # fmt: skip
    first = torch.full((), start, dtype=torch.int32, device=device)
    at = place(first, frames, window, sink, grid[0] * grid[1])
    return at, rope_table(at.frame_F, grid, head_dim)


def _cross_attention(
    self: Any,
    options: Options,
    x: Tensor,
    context: Tensor,
    context_lens: Any,
    crossattn_cache: Any = None,
) -> Tensor:  # fmt: skip
    """Forward of a `WanT2VCrossAttention`, whose cache keeps the keys and values of the text."""
    if context_lens is not None or torch.is_grad_enabled():
        own: Tensor = type(self).forward(self, x, context, context_lens, crossattn_cache)
        return own
    heads = self.num_heads
    cache: dict[str, Any] = {"is_init": False} if crossattn_cache is None else crossattn_cache
    if not cache["is_init"]:
        cache["k"] = normed(self.norm_k, self.k(context), options.impl).unflatten(2, (heads, -1))
        cache["v"] = self.v(context).unflatten(2, (heads, -1))
        cache["is_init"] = True
    q = normed(self.norm_q, self.q(x), options.impl).unflatten(2, (heads, -1))
    o = cross_attention(q, cache["k"], cache["v"], impl=options.attention_impl)
    out: Tensor = self.o(o.flatten(2))
    return out


def _head(self: Any, options: Options, x: Tensor, e: Tensor) -> Tensor:
    """Forward of a `CausalHead`. x [B, L, C]; e [B, F, 1, C]. Returns [B, F, L/F, channels of a
    patch]."""
    if torch.is_grad_enabled():
        own: Tensor = type(self).forward(self, x, e)
        return own
    shift, scale = (self.modulation.unsqueeze(1) + e).chunk(2, dim=2)
    h = adaln(x, shift, scale, eps=eps_of(self.norm), impl=options.impl)
    out: Tensor = self.head(h).unflatten(1, (e.shape[1], -1))
    return out
