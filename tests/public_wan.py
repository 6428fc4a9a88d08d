"""The interface of the public causal Wan models, written anew: what `sfkernels.integrations` finds
in Self Forcing, CausVid and LongLive."""

from __future__ import annotations

import types
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sfkernels import reference

DIM, HEADS, TEXT, GRID = 48, 2, 6, (2, 3)
TOKENS = GRID[0] * GRID[1]  # of a frame


class WanRMSNorm(nn.Module):
    def __init__(self, dim: int, eps: float = 1e-6) -> None:
        super().__init__()
        self.eps, self.weight = eps, nn.Parameter(torch.ones(dim))

    def forward(self, x: Tensor) -> Tensor:
        wide = x.double() if x.dtype == torch.float64 else x.float()
        return F.rms_norm(wide, x.shape[-1:], None, self.eps).type_as(x) * self.weight


class WanLayerNorm(nn.LayerNorm):
    pass


class _Attention(nn.Module):
    def __init__(self, norm: bool = True) -> None:
        super().__init__()
        self.num_heads = HEADS
        self.q, self.k, self.v, self.o = (nn.Linear(DIM, DIM) for _ in range(4))
        self.norm_q, self.norm_k = (WanRMSNorm(DIM) if norm else nn.Identity() for _ in range(2))

    def heads(self, x: Tensor) -> Tensor:
        return x.unflatten(2, (HEADS, -1))


class CausalWanSelfAttention(_Attention):
    def __init__(self, window: int, sink: int, norm: bool = True) -> None:
        super().__init__(norm)
        self.local_attn_size, self.sink_size = window, sink
        self.max_attention_size = 32760 if window == -1 else window * 1560

    def attend(self, x: Tensor, grid_sizes: Tensor, cache: Any, current_start: int) -> Tensor:
        """Over the chunk and, with a cache, the sink and the newest frames before it."""
        frames, *grid = grid_sizes[0].tolist()
        start = current_start // TOKENS
        index = torch.arange(start, start + frames)
        table = reference.rope_table(index, (grid[0], grid[1]), DIM // HEADS, 1e4)
        q, k = self.heads(self.norm_q(self.q(x))), self.heads(self.norm_k(self.k(x)))
        q, k, v = reference.rope(q, table), reference.rope(k, table), self.heads(self.v(x))
        if cache is not None:
            k, v = self.held(cache, k, v, start + frames)
        out: Tensor = self.o(reference.attention(q, k, v, (DIM // HEADS) ** -0.5).flatten(2))
        return out

    def held(self, cache: Any, k: Tensor, v: Tensor, end: int) -> tuple[Tensor, Tensor]:
        """What a cache holds once these frames, which end before frame `end`, are written: behind
        those before them, which are shifted over the oldest where there is no room."""
        window, sink = cache["k"].shape[1], getattr(self, "sink_size", 0) * TOKENS
        last = int(cache["local_end_index"]) + end * TOKENS - int(cache["global_end_index"])
        over, last = max(0, last - window), min(last, window)
        for name, new in (("k", k), ("v", v)):
            held = cache[name].clone()
            if over:
                held[:, sink : window - over] = cache[name][:, sink + over :]
            held[:, last - new.shape[1] : last] = new
            cache[name] = held
        cache["local_end_index"], cache["global_end_index"] = (
            torch.tensor([n]) for n in (last, end * TOKENS)
        )
        return cache["k"][:, :last], cache["v"][:, :last]

    def forward(self, x: Any, seq_lens: Any, grid_sizes: Any, freqs: Any, block_mask: Any,
                kv_cache: Any = None, current_start: int = 0,
                cache_start: Any = None) -> Any:  # fmt: skip
        return self.attend(x, grid_sizes, kv_cache, current_start)


class CausVidAttention(CausalWanSelfAttention):
    def __init__(self, window: int, sink: int, norm: bool = True) -> None:
        super().__init__(window, sink, norm)
        del self.local_attn_size, self.sink_size, self.max_attention_size  # which it has not

    def forward(self, x: Any, seq_lens: Any, grid_sizes: Any, freqs: Any, block_mask: Any,
                kv_cache: Any = None, current_start: int = 0,
                current_end: int = 0) -> Any:  # fmt: skip
        return self.attend(x, grid_sizes, kv_cache, current_start)


class LongLiveAttention(CausalWanSelfAttention):
    def forward(self, x: Any, seq_lens: Any, grid_sizes: Any, freqs: Any, block_mask: Any,
                kv_cache: Any = None, current_start: int = 0, cache_start: Any = None,
                sink_recache_after_switch: bool = False) -> Any:  # fmt: skip
        out = self.attend(x, grid_sizes, kv_cache, current_start)
        return out if kv_cache is None else (out, (current_start + x.shape[1], 0, {"written": 1}))


class WanT2VCrossAttention(_Attention):
    def forward(
        self, x: Tensor, context: Tensor, context_lens: Any, crossattn_cache: Any = None
    ) -> Tensor:
        cache: dict[str, Any] = {"is_init": False} if crossattn_cache is None else crossattn_cache
        if not cache["is_init"]:
            cache["k"] = self.heads(self.norm_k(self.k(context)))
            cache["v"] = self.heads(self.v(context))
            cache["is_init"] = True
        q = self.heads(self.norm_q(self.q(x)))
        o = reference.attention(q, cache["k"], cache["v"], (DIM // HEADS) ** -0.5)
        out: Tensor = self.o(o.flatten(2))
        return out


class _Block(nn.Module):
    attention: type[CausalWanSelfAttention] = CausalWanSelfAttention

    def __init__(
        self, window: int, sink: int, qk_norm: bool = True, text_norm: bool = True
    ) -> None:
        super().__init__()
        self.norm1, self.norm2 = (
            WanLayerNorm(DIM, 1e-6, elementwise_affine=False) for _ in range(2)
        )
        self.norm3 = WanLayerNorm(DIM, 1e-6) if text_norm else nn.Identity()
        self.self_attn = self.attention(window, sink, qk_norm)
        self.cross_attn = WanT2VCrossAttention(qk_norm)
        self.ffn = nn.Sequential(
            nn.Linear(DIM, 2 * DIM), nn.GELU(approximate="tanh"), nn.Linear(2 * DIM, DIM)
        )
        self.modulation = nn.Parameter(torch.randn(1, 6, DIM) / DIM**0.5)

    def run(self, x: Tensor, e: Tensor, context: Tensor, crossattn_cache: Any,
            **attention: Any) -> Any:  # fmt: skip
        frames = e.shape[1]
        e = self.modulation.unsqueeze(1) + e

        def modulated(x: Tensor, norm: nn.Module, at: int) -> Tensor:
            by_frame = norm(x).unflatten(1, (frames, -1))
            return (by_frame * (1 + e[:, :, at + 1, None]) + e[:, :, at, None]).flatten(1, 2)

        def gated(y: Tensor, at: int) -> Tensor:
            return (y.unflatten(1, (frames, -1)) * e[:, :, at, None]).flatten(1, 2)

        y = self.self_attn(modulated(x, self.norm1, 0), freqs=None, block_mask=None, **attention)
        y, *update = y if isinstance(y, tuple) else (y,)
        x = x + gated(y, 2)
        x = x + self.cross_attn(self.norm3(x), context, None, crossattn_cache=crossattn_cache)
        x = x + gated(self.ffn(modulated(x, self.norm2, 3)), 5)
        return (x, *update) if update else x


class CausalWanAttentionBlock(_Block):
    def forward(self, x: Any, e: Any, seq_lens: Any, grid_sizes: Any, freqs: Any, context: Any,
                context_lens: Any, block_mask: Any, kv_cache: Any = None,
                crossattn_cache: Any = None, current_start: int = 0,
                cache_start: Any = None) -> Any:  # fmt: skip
        return self.run(x, e, context, crossattn_cache, seq_lens=seq_lens, grid_sizes=grid_sizes,
                        kv_cache=kv_cache, current_start=current_start)  # fmt: skip


class CausVidBlock(_Block):
    attention = CausVidAttention

    def forward(self, x: Any, e: Any, seq_lens: Any, grid_sizes: Any, freqs: Any, context: Any,
                context_lens: Any, block_mask: Any, kv_cache: Any = None,
                crossattn_cache: Any = None, current_start: int = 0,
                current_end: int = 0) -> Any:  # fmt: skip
        return self.run(x, e, context, crossattn_cache, seq_lens=seq_lens, grid_sizes=grid_sizes,
                        kv_cache=kv_cache, current_start=current_start)  # fmt: skip


class LongLiveBlock(_Block):
    attention = LongLiveAttention

    def forward(self, x: Any, e: Any, seq_lens: Any, grid_sizes: Any, freqs: Any, context: Any,
                context_lens: Any, block_mask: Any, kv_cache: Any = None,
                crossattn_cache: Any = None, current_start: int = 0, cache_start: Any = None,
                sink_recache_after_switch: bool = False) -> Any:  # fmt: skip
        return self.run(x, e, context, crossattn_cache, seq_lens=seq_lens, grid_sizes=grid_sizes,
                        kv_cache=kv_cache, current_start=current_start)  # fmt: skip


class CausalHead(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = WanLayerNorm(DIM, 1e-6, elementwise_affine=False)
        self.head = nn.Linear(DIM, 16)
        self.modulation = nn.Parameter(torch.randn(1, 2, DIM) / DIM**0.5)

    def forward(self, x: Tensor, e: Tensor) -> Tensor:
        e = self.modulation.unsqueeze(1) + e
        h = self.norm(x).unflatten(1, (e.shape[1], -1))
        out: Tensor = self.head(h * (1 + e[:, :, 1, None]) + e[:, :, 0, None])
        return out


class CausalWanModel(nn.Module):
    """x [B, F·6, 48], tokens in place of latents; e [B, F, 6, 48] and [B, F, 1, 48], their
    modulation."""

    def __init__(self, block: type[_Block] = CausalWanAttentionBlock, window: int = 5,
                 sink: int = 0, layers: int = 2, **norms: bool) -> None:  # fmt: skip
        super().__init__()
        self.blocks = nn.ModuleList(block(window, sink, **norms) for _ in range(layers))
        self.head = CausalHead()

    def forward(self, x: Tensor, e: Tensor, e_head: Tensor, context: Tensor, *,
                kv_cache: Any = None, crossattn_cache: Any = None,
                current_start: int = 0) -> Tensor:  # fmt: skip
        grid = torch.tensor([[e.shape[1], *GRID]] * len(x))
        for i, block in enumerate(self.blocks):
            found: Any = block(
                x, e=e, seq_lens=None, grid_sizes=grid, freqs=None, context=context,
                context_lens=None, block_mask=None, current_start=current_start,
                kv_cache=None if kv_cache is None else kv_cache[i],
                crossattn_cache=None if crossattn_cache is None else crossattn_cache[i],
            )  # fmt: skip
            x = found[0] if isinstance(found, tuple) else found
        out: Tensor = self.head(x, e_head)
        return out


class WholeModel(CausalWanModel):
    """Latents in and out, by the constructor and the forward of the public models; their sizes must
    be those above, 4 channels and patches of 2×2. A clone's CausalWanModel, by its `block`."""

    block: type[_Block] = CausalWanAttentionBlock

    def __init__(self, *, patch_size: Any, in_dim: int, dim: int, freq_dim: int, text_dim: int,
                 num_layers: int, local_attn_size: int = -1, **_: Any) -> None:  # fmt: skip
        super().__init__(self.block, local_attn_size, layers=num_layers)
        self.freq_dim, self.freqs = freq_dim, torch.zeros(1)
        self.patch_embedding = nn.Conv3d(in_dim, dim, patch_size, patch_size)
        self.text_embedding = nn.Sequential(
            nn.Linear(text_dim, dim), nn.GELU(approximate="tanh"), nn.Linear(dim, dim)
        )
        self.time_embedding = nn.Sequential(
            nn.Linear(freq_dim, dim), nn.SiLU(), nn.Linear(dim, dim)
        )
        self.time_projection = nn.Sequential(nn.SiLU(), nn.Linear(dim, 6 * dim))

    def forward(self, x: Tensor, t: Tensor, context: Tensor, seq_len: int,  # type: ignore[override]
                current_end: int = 0, **cached: Any) -> Tensor:  # fmt: skip
        half = self.freq_dim // 2
        angle = t[..., None].double() * 1e4 ** -(torch.arange(half) / half)
        e = self.time_embedding(torch.cat([angle.cos(), angle.sin()], -1).type_as(x))
        tokens, e6 = self.patch_embedding(x), self.time_projection(e).unflatten(-1, (6, -1))
        tokens, text = tokens.flatten(2).transpose(1, 2), self.text_embedding(context)
        assert tokens.shape[1] <= seq_len
        out = super().forward(tokens, e6, e[:, :, None], text, **cached)
        by_patch = out.unflatten(2, GRID).unflatten(-1, (2, 2, -1))
        return by_patch.permute(0, 6, 1, 2, 4, 3, 5).flatten(5, 6).flatten(3, 4)


def caches(model: nn.Module, batch: int, window: int, dtype: torch.dtype) -> dict[str, Any]:
    """As the public pipelines make them, for every layer."""
    shape = batch, window * TOKENS, HEADS, DIM // HEADS
    layers = range(len(model.blocks))  # type: ignore[arg-type]
    return {
        "kv_cache": [
            {name: torch.zeros(shape, dtype=dtype) for name in "kv"}
            | {f"{which}_end_index": torch.tensor([0]) for which in ("global", "local")}
            for _ in layers
        ],
        "crossattn_cache": [{"is_init": False} for _ in layers],
    }


def pipeline(model: nn.Module) -> Any:
    """As `CausalInferencePipeline` keeps its model."""
    return types.SimpleNamespace(generator=types.SimpleNamespace(model=model))
