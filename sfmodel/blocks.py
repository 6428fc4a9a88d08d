"""The blocks of the Wan2.1 diffusion transformer and what all of one forward pass share.

Shapes: B batch, F latent frames, N tokens of a frame, L = F·N tokens, D model dim, T text rows,
S slots of a ring, P pairs of a head's channels.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn

import sfkernels as sf
from sfkernels.kv_cache import RingChunk
from sfmodel.config import DiTConfig

if TYPE_CHECKING:
    from sfmodel.sequence_parallel import HeadRanks


class Past(NamedTuple):
    """Past of a chunk in a training rollout: the frames before it, and where it lies itself.

    k, v [layers, B, S, heads, head dim]: keys and values of frames in slots, a frame's tokens one
    after the other, which take no gradient. spans: the half-open ranges of S that are seen. first:
    the latent frame that the chunk begins with. slot_F: the slots of its own frames, int64.
    """

    k: Tensor
    v: Tensor
    spans: tuple[tuple[int, int], ...]
    first: int
    slot_F: Tensor


class Place(NamedTuple):
    """Place of a chunk in a stream: its slots in the ring and the rotations of its tokens. It stays
    the same through all passes over the chunk. sink: rotations of the sink's keys to where the
    chunk sees them, and how many there are to rotate; empty after the chunk's first pass."""

    chunk: RingChunk
    rope_LP2: Tensor
    sink: tuple[Tensor, ...] = ()


class TextKeys(NamedTuple):
    """A prompt's cross-attention keys and values [layers][B or 1, T, heads, head dim]. They depend
    on the prompt alone: who runs many passes on one computes them once."""

    k: Sequence[Tensor] | Tensor
    v: Sequence[Tensor] | Tensor


def by_sample(layer: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """Output of a layer for x [B, …], one sample at a time."""
    return torch.cat([layer(one) for one in x.split(1)]) if len(x) > 1 else layer(x)


class Context(NamedTuple):
    """Inputs that all blocks of one forward pass share.

    text: embedded, or its keys and values. Without a cache: the tokens' rotations, the layout and
    the past, if there is one. With a cache: the places of the chunks, one after the other, whether
    the first of them, and so all, is known to fill the ring, and the ranks that share the pass,
    with the rotations of this one's tokens in all chunks.
    streams: instead of one cache and its places those of each sample, which are streams of their
    own. apart: their linear layers take one sample at a time, since what a matrix product sums in
    which order depends on its rows: each is then what it is alone, bit for bit.
    appended: how many tokens, the first ones, are there to leave their keys and values behind: of
    them nothing more is asked of the last layer.
    """

    text: Tensor | TextKeys
    rope_LP2: Tensor | None = None
    layout: sf.BlockLayout | None = None
    past: Past | None = None
    cache: sf.RingKVCache | None = None
    places: Sequence[Place] = ()
    full: bool = False
    ranks: HeadRanks | None = None
    streams: Sequence[tuple[sf.RingKVCache, Sequence[Place]]] = ()
    apart: bool = False
    appended: int = 0

    def through(self, layer: nn.Module, x_BLD: Tensor) -> Tensor:
        """A layer's output, of one sample at a time where they are kept apart."""
        out: Tensor = by_sample(layer, x_BLD) if self.apart else layer(x_BLD)
        return out


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

    def forward(self, x_BLD: Tensor, context: Context, skip: int = 0) -> Tensor | None:
        """skip: tokens, the first ones, whose keys and values are left behind and whose output
        nobody asks for, which are whole chunks. Returns None where these are all."""
        qkv_BLC = context.through(self.qkv, x_BLD)
        if context.streams:
            outs = [
                self._over_ring(qkv_1LC, cache, context._replace(places=places), skip)
                for qkv_1LC, (cache, places) in zip(qkv_BLC.split(1), context.streams, strict=True)
            ]
            out = None if outs[0] is None else torch.cat([o for o in outs if o is not None])
        elif context.cache is not None:
            out = self._over_ring(qkv_BLC, context.cache, context, skip)
        else:
            out = self._under_layout(qkv_BLC, context, skip)
        return out if out is None else context.through(self.o, out.flatten(2))

    def _over_ring(
        self, qkv_BLC: Tensor, cache: sf.RingKVCache, context: Context, skip: int
    ) -> Tensor | None:
        """Each chunk is appended and then attends, so that it sees those before it and may take the
        slots of frames that they were the last to see."""
        ring, ranks = (cache.k[self.layer], cache.v[self.layer]), context.ranks
        impl = self.attention_impl
        if impl == "cudnn" and not context.full:  # which reads every slot
            impl = "auto"
        attention: Any = {"full": context.full, "semaphores": cache.semaphores, "impl": impl}
        options: Any = {"eps": self.eps, "impl": self.impl}
        qkv_BLC = qkv_BLC.to(ring[0].dtype)  # another one under autocast
        if ranks is not None:
            assert context.rope_LP2 is not None
            norm = self.norm_q, self.norm_k, context.rope_LP2
            q, k, v = ranks.to_heads(*sf.qk_norm_rope(qkv_BLC, *norm, **options))
        end, outs = 0, []
        for (_, slot_F, valid, _), rope_LP2, sink in context.places:
            begin, end = end, end + len(rope_LP2)
            if sink:
                table_SP2, count = sink
                impl = "auto" if self.impl == "cpp" else self.impl
                sf.rotate_keys(cache.sink_k[self.layer], table_SP2, count, ring[0], impl=impl)
            if ranks is not None:
                of_all = slice(begin * ranks.size, end * ranks.size)
                q_BLHD = q[:, of_all]
                ranks.append(k[:, of_all], v[:, of_all], ring, slot_F)
            else:
                norm = self.norm_q, self.norm_k, rope_LP2
                q_BLHD = sf.qk_norm_rope_append(
                    qkv_BLC[:, begin:end], *norm, *ring, slot_F, **options
                )
            if begin >= skip:
                outs.append(sf.ring_attention(q_BLHD, *ring, valid, **attention))
        out = torch.cat(outs, 1) if len(outs) > 1 else outs[0] if outs else None
        return out if ranks is None or out is None else ranks.to_tokens(out)

    def _under_layout(self, qkv_BLC: Tensor, context: Context, skip: int) -> Tensor | None:
        assert context.layout is not None and context.rope_LP2 is not None
        norm = self.norm_q, self.norm_k, context.rope_LP2
        q, k, v = sf.qk_norm_rope(qkv_BLC, *norm, eps=self.eps, impl=self.impl)
        past, prefix = context.past, None
        if past is not None:
            prefix = sf.Prefix(past.k[self.layer], past.v[self.layer], past.spans)
            if context.appended:
                by_frame = (-1, context.layout.frame_tokens)
                for kept, own in ((past.k, k), (past.v, v)):
                    slots = kept[self.layer].unflatten(1, by_frame)
                    slots[:, past.slot_F] = own.unflatten(1, by_frame).to(kept.dtype)
        if skip:
            return None
        return sf.block_causal_attention(
            q, k, v, context.layout, prefix=prefix, impl=self.attention_impl
        )


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
        q = context.through(self.q, x_BLD)
        q = sf.rms_norm(q, self.norm_q, eps=self.eps, impl=self.impl)
        if isinstance(context.text, TextKeys):
            keys = context.text.k[self.layer], context.text.v[self.layer]
        else:
            # By the class: under FSDP the module's own gathers weights that are here already.
            keys = CrossAttention.keys_values(self, context.text)
        k, v = (each.expand(len(x_BLD), -1, -1, -1) for each in keys)
        q = q.unflatten(-1, (self.heads, -1)).to(k.dtype)
        out = sf.cross_attention(q, k, v, impl=self.attention_impl)
        return context.through(self.o, out.flatten(2))


class FeedForward(nn.Sequential):
    """Two linear layers with GELU between them, which the first one applies where it can."""

    def __init__(self, config: DiTConfig, linear_impl: str) -> None:
        super().__init__(
            nn.Linear(config.dim, config.ffn_dim),
            nn.GELU(approximate="tanh"),
            nn.Linear(config.ffn_dim, config.dim),
        )
        self.linear_impl = linear_impl

    def forward(self, x_BLD: Tensor) -> Tensor:
        first: Any = self[0]
        if type(first) is not nn.Linear:  # a LoRA's change comes before GELU
            return super().forward(x_BLD)
        impl = self.linear_impl
        y: Tensor = self[2](sf.linear(x_BLD, first.weight, first.bias, gelu=True, impl=impl))
        return y


class Block(nn.Module):
    def __init__(
        self, config: DiTConfig, layer: int, impl: str, attention_impl: str, linear_impl: str
    ) -> None:
        super().__init__()
        self.eps, self.impl = config.eps, impl
        self.self_attn = SelfAttention(config, layer, impl, attention_impl)
        self.norm3 = nn.LayerNorm(config.dim, config.eps)
        self.cross_attn = CrossAttention(config, layer, impl, attention_impl)
        self.ffn = FeedForward(config, linear_impl)
        self.modulation = nn.Parameter(torch.randn(1, 6, config.dim) / math.sqrt(config.dim))

    def forward(
        self, x_BLD: Tensor, h_BLD: Tensor, modulation: tuple[Tensor, ...], context: Context
    ) -> tuple[Tensor, Tensor | None]:
        """h is the first norm of x; modulation: shift1, scale1, gate1, shift2, scale2, gate2,
        [B, F, D] each. Returns x before the FFN's residual and the FFN's output: the caller adds
        them in one pass with the norm that follows.

        x and modulation may be those of h's last tokens alone: the others then only leave their
        keys and values behind. Where all do there is no output: None."""
        _, _, gate1, shift2, scale2, _ = modulation
        attended = self.self_attn(h_BLD, context, h_BLD.shape[1] - x_BLD.shape[1])
        if attended is None:
            return x_BLD, None
        options: Any = {"eps": self.eps, "impl": self.impl}
        norm3 = (self.norm3.weight, self.norm3.bias)
        x_BLD, h_BLD = sf.gated_layer_norm(x_BLD, attended, gate1, *norm3, **options)
        attended = self.cross_attn(h_BLD, context)
        x_BLD, h_BLD = sf.gated_adaln(x_BLD, attended, None, shift2, scale2, **options)
        return x_BLD, context.through(self.ffn, h_BLD)


class Head(nn.Module):
    def __init__(self, config: DiTConfig) -> None:
        super().__init__()
        self.head = nn.Linear(config.dim, math.prod(config.patch) * config.channels)
        self.modulation = nn.Parameter(torch.randn(1, 2, config.dim) / math.sqrt(config.dim))
