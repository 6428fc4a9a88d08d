"""The blocks of the Wan2.1 diffusion transformer and what all of one forward pass share.

Shapes: B batch, F latent frames, N tokens of a frame, L = F·N tokens, D model dim, T text rows,
S slots of a ring, P pairs of a head's channels.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

import sfkernels as sf
from sfkernels.kv_cache import RingChunk
from sfmodel.config import DiTConfig


class Past(NamedTuple):
    """Past of a chunk in a training rollout: the frames before it, and where it lies itself.

    k, v [layers, B, S, heads, head dim]: keys and values of a whole clip, token after token, which
    take no gradient. spans: the half-open ranges of tokens that are seen. first: the latent frame
    that the chunk begins with. keep: this pass leaves its own keys and values in k and v.
    """

    k: Tensor
    v: Tensor
    spans: tuple[tuple[int, int], ...]
    first: int
    keep: bool = False


class TextKeys(NamedTuple):
    """A prompt's cross-attention keys and values [layers][B or 1, T, heads, head dim]. They depend
    on the prompt alone: who runs many passes on one computes them once."""

    k: Sequence[Tensor] | Tensor
    v: Sequence[Tensor] | Tensor


class Context(NamedTuple):
    """Inputs that all blocks of one forward pass share. The prompt is either embedded, or its keys
    and values are there."""

    rope_LP2: Tensor
    text: Tensor | TextKeys
    layout: sf.BlockLayout | None
    cache: sf.RingKVCache | None
    chunk: RingChunk | None
    past: Past | None = None


class SelfAttention(nn.Module):
    """Attention between frames: under a layout, or of a chunk over the ring."""

    def __init__(self, config: DiTConfig, layer: int, impl: str, attention_impl: str) -> None:
        super().__init__()
        self.layer, self.eps = layer, config.eps
        self.impl, self.attention_impl = impl, attention_impl
        self.qkv = nn.Linear(config.dim, 3 * config.dim)
        self.o = nn.Linear(config.dim, config.dim)
        self.norm_q = nn.Parameter(torch.ones(config.dim))
        self.norm_k = nn.Parameter(torch.ones(config.dim))

    def forward(self, x_BLD: Tensor, context: Context) -> Tensor:
        qkv_BLC, norm = self.qkv(x_BLD), (self.norm_q, self.norm_k, context.rope_LP2)
        if context.cache is not None and context.chunk is not None:
            ring = context.cache.k[self.layer], context.cache.v[self.layer]
            q = sf.qk_norm_rope_append(
                qkv_BLC.to(ring[0].dtype),  # another one under autocast
                *norm,
                *ring,
                context.chunk.slot_F,
                eps=self.eps,
                impl=self.impl,
            )
            out = sf.ring_attention(q, *ring, context.chunk.valid, impl=self.attention_impl)
        else:
            assert context.layout is not None
            q, k, v = sf.qk_norm_rope(qkv_BLC, *norm, eps=self.eps, impl=self.impl)
            past, prefix = context.past, None
            if past is not None:
                prefix = sf.Prefix(past.k[self.layer], past.v[self.layer], past.spans)
                if past.keep:
                    at = past.first * context.layout.frame_tokens
                    past.k[self.layer, :, at : at + k.shape[1]] = k
                    past.v[self.layer, :, at : at + v.shape[1]] = v
            out = sf.block_causal_attention(
                q, k, v, context.layout, prefix=prefix, impl=self.attention_impl
            )
        return self.o(out.flatten(2))


class CrossAttention(nn.Module):
    """Attention to the prompt. Its keys and values depend on the prompt alone."""

    def __init__(self, config: DiTConfig, layer: int, impl: str, attention_impl: str) -> None:
        super().__init__()
        self.layer, self.heads, self.eps = layer, config.heads, config.eps
        self.impl, self.attention_impl = impl, attention_impl
        self.q = nn.Linear(config.dim, config.dim)
        self.kv = nn.Linear(config.dim, 2 * config.dim)
        self.o = nn.Linear(config.dim, config.dim)
        self.norm_q = nn.Parameter(torch.ones(config.dim))
        self.norm_k = nn.Parameter(torch.ones(config.dim))

    def keys_values(self, text_BTD: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values, [B, T, heads, head dim] each."""
        k, v = self.kv(text_BTD).chunk(2, dim=-1)
        k = sf.rms_norm(k, self.norm_k, eps=self.eps, impl=self.impl)
        return k.unflatten(-1, (self.heads, -1)), v.unflatten(-1, (self.heads, -1))

    def forward(self, x_BLD: Tensor, context: Context) -> Tensor:
        q = sf.rms_norm(self.q(x_BLD), self.norm_q, eps=self.eps, impl=self.impl)
        if isinstance(context.text, TextKeys):
            keys = context.text.k[self.layer], context.text.v[self.layer]
        else:
            # By the class: under FSDP the module's own gathers weights that are here already.
            keys = CrossAttention.keys_values(self, context.text)
        k, v = (each.expand(len(x_BLD), -1, -1, -1) for each in keys)
        q = q.unflatten(-1, (self.heads, -1)).to(k.dtype)
        out = sf.cross_attention(q, k, v, impl=self.attention_impl)
        return self.o(out.flatten(2))


class Block(nn.Module):
    def __init__(self, config: DiTConfig, layer: int, impl: str, attention_impl: str) -> None:
        super().__init__()
        self.eps, self.impl = config.eps, impl
        self.self_attn = SelfAttention(config, layer, impl, attention_impl)
        self.norm3 = nn.LayerNorm(config.dim, config.eps)
        self.cross_attn = CrossAttention(config, layer, impl, attention_impl)
        self.ffn = nn.Sequential(
            nn.Linear(config.dim, config.ffn_dim),
            nn.GELU(approximate="tanh"),
            nn.Linear(config.ffn_dim, config.dim),
        )
        self.modulation = nn.Parameter(torch.randn(1, 6, config.dim) / math.sqrt(config.dim))

    def modulate(self, blocks_BF6D: Tensor) -> tuple[Tensor, ...]:
        """shift1, scale1, gate1, shift2, scale2, gate2: [B, F, D] each."""
        return (blocks_BF6D + self.modulation.float()).unbind(2)

    def forward(
        self, x_BLD: Tensor, h_BLD: Tensor, modulation: tuple[Tensor, ...], context: Context
    ) -> tuple[Tensor, Tensor]:
        """h is the first norm of x. Returns x before the FFN's residual and the FFN's output: the
        caller adds them in one pass with the norm that follows."""
        _, _, gate1, shift2, scale2, _ = modulation
        attended = self.self_attn(h_BLD, context)
        options: Any = {"eps": self.eps, "impl": self.impl}
        norm3 = (self.norm3.weight, self.norm3.bias)
        x_BLD, h_BLD = sf.gated_layer_norm(x_BLD, attended, gate1, *norm3, **options)
        attended = self.cross_attn(h_BLD, context)
        x_BLD, h_BLD = sf.gated_adaln(x_BLD, attended, None, shift2, scale2, **options)
        return x_BLD, self.ffn(h_BLD)


class Head(nn.Module):
    def __init__(self, config: DiTConfig) -> None:
        super().__init__()
        self.head = nn.Linear(config.dim, math.prod(config.patch) * config.channels)
        self.modulation = nn.Parameter(torch.randn(1, 2, config.dim) / math.sqrt(config.dim))

    def modulate(self, head_BFD: Tensor) -> tuple[Tensor, ...]:
        """shift, scale: [B, F, D] each."""
        return (head_BFD[:, :, None] + self.modulation.float()).unbind(2)
