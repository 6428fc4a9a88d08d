"""The Wan2.1 diffusion transformer, bidirectional, block-causal or cached, on sfkernels' ops.

Shapes: B batch, F latent frames, C channels, h×w tokens of a frame, N = h·w, L = F·N tokens,
D model dim, T text rows, S slots of a ring.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import Any, NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import sfkernels as sf
from sfkernels.arguments import check_shape
from sfmodel.blocks import Block, Context, Head, Past, TextKeys
from sfmodel.config import DiTConfig
from sfmodel.schedule import TRAIN_STEPS


class Modulation(NamedTuple):
    """Time embedding of each frame in float32: `t` [B, F], `head` [B, F, D], `blocks`
    [B, F, 6, D]. B and F may be 1. Depends on t alone: a sampler computes it once per step."""

    t: Tensor
    head: Tensor
    blocks: Tensor


class DiT(nn.Module):
    """Wan2.1 as one module: bidirectional teacher or critic, causal student, cached generator.

    Parameters carry the official names, except that q, k, v (and k, v of the prompt) are one
    projection each; checkpoint.py maps both ways. impl: the implementation of the sfkernels ops;
    attention_impl: that of the attention ops. recompute: recompute each block's activations in the
    backward pass instead of keeping them.
    """

    def __init__(
        self,
        config: DiTConfig,
        impl: str = "auto",
        attention_impl: str = "auto",
        recompute: bool = False,
    ) -> None:
        super().__init__()
        self.config, self.impl, self.recompute = config, impl, recompute
        dim = config.dim
        self.patch_embedding = nn.Conv3d(config.channels, dim, config.patch, config.patch)
        self.text_embedding = nn.Sequential(
            nn.Linear(config.text_dim, dim), nn.GELU(approximate="tanh"), nn.Linear(dim, dim)
        )
        self.time_embedding = nn.Sequential(
            nn.Linear(config.freq_dim, dim), nn.SiLU(), nn.Linear(dim, dim)
        )
        self.time_projection = nn.Sequential(nn.SiLU(), nn.Linear(dim, 6 * dim))
        self.blocks = nn.ModuleList(
            Block(config, i, impl, attention_impl) for i in range(config.layers)
        )
        self.head = Head(config)
        self._initialise()

    def _initialise(self) -> None:
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
        nn.init.xavier_uniform_(self.patch_embedding.weight.flatten(1))
        nn.init.zeros_(self.head.head.weight)

    @property
    def dtype(self) -> torch.dtype:
        return self.patch_embedding.weight.dtype

    @property
    def device(self) -> torch.device:
        return self.patch_embedding.weight.device

    def forward(
        self,
        x_BFCHW: Tensor,
        t: Tensor | Modulation,
        text_BTE: Tensor | TextKeys | None,
        *,
        layout: sf.BlockLayout | None = None,
        clean_BFCHW: Tensor | None = None,
        cache: sf.RingKVCache | None = None,
        past: Past | None = None,
    ) -> Tensor:
        """Predicts the flow ε − x0, [B, F, C, H, W] float32.

        x: noisy latents [B, F, C, H, W]. t: timesteps in 0..1000, [], [B] or [B, F], or what
        `modulation` made of them. text: prompt embeddings [B or 1, T <= text_len, text_dim], or
        what `text_keys` made of them, or None when `set_text` has put the prompt into the cache.

        Neither layout nor cache: bidirectional attention. layout: block-causal; one with
        teacher_forcing takes the clean latents, same shape as x, and returns the noisy half. cache:
        x is the next chunk of a stream; its keys and values are written in place, and the caller
        commits them after the pass at t = 0 on the final latents. past: x is a chunk of a training
        rollout, which sees itself and those keys and values.

        Raises ValueError for shapes or arguments that do not fit together.
        """
        grid, frames = self._check_latents(x_BFCHW), x_BFCHW.shape[1]
        tokens_BLD, modulation, context = self._inputs(
            x_BFCHW, t, text_BTE, layout, clean_BFCHW, cache, past
        )
        h_BLD, _ = self._run(tokens_BLD, modulation, context)
        out_BLE = self.head.head(h_BLD)
        out = self._unpatchify(out_BLE[:, -frames * math.prod(grid) :].float(), grid)
        if self.config.prediction == "x0":
            sigma = (modulation.t[:, -frames:] / TRAIN_STEPS).clamp(min=1 / TRAIN_STEPS)
            out = (x_BFCHW.float() - out) / sigma[:, :, None, None, None]
        return out

    def features(
        self,
        x_BFCHW: Tensor,
        t: Tensor | Modulation,
        text_BTE: Tensor | TextKeys,
        keep: Sequence[int],
    ) -> list[Tensor]:
        """The residual stream [B, L, D] after each block of `keep`, in its order, in a
        bidirectional pass; arguments of `forward`. Blocks after the last of them are not run.
        Raises ValueError for a block that does not exist."""
        if not all(0 <= i < self.config.layers for i in keep):
            raise ValueError(f"keep={[*keep]}: must be blocks in 0..{self.config.layers - 1}")
        return self._run(*self._inputs(x_BFCHW, t, text_BTE), keep)[1]

    def _inputs(
        self,
        x_BFCHW: Tensor,
        t: Tensor | Modulation,
        text_BTE: Tensor | TextKeys | None,
        layout: sf.BlockLayout | None = None,
        clean_BFCHW: Tensor | None = None,
        cache: sf.RingKVCache | None = None,
        past: Past | None = None,
    ) -> tuple[Tensor, Modulation, Context]:
        """Arguments of `forward` as `_run` takes them: tokens, modulation and context."""
        grid = self._check_latents(x_BFCHW)
        batch, frames = x_BFCHW.shape[:2]
        if (clean_BFCHW is not None) != (layout is not None and layout.teacher_forcing):
            raise ValueError("clean latents and a layout with teacher_forcing belong together")
        if (text_BTE is None) != (cache is not None):
            raise ValueError("text is None exactly when a cache is given: set_text puts it there")
        if sum(one is not None for one in (layout, cache, past)) > 1:
            raise ValueError("give one of layout, cache and past")
        if past is not None and past.keep and torch.is_grad_enabled():
            raise ValueError("past.keep: keys and values are kept without gradient only")

        chunk = None
        if cache is not None:
            if cache.frame_tokens != math.prod(grid):
                raise ValueError(
                    f"x has {math.prod(grid)} tokens a frame: the cache has {cache.frame_tokens}"
                )
            chunk = cache.chunk(frames)
            frame_F = chunk.frame_F
        else:
            if layout is None:
                layout = sf.BlockLayout((frames,), math.prod(grid))
            if (layout.frames, layout.frame_tokens) != (frames, math.prod(grid)):
                raise ValueError(
                    f"x has {frames} frames of {math.prod(grid)} tokens: the layout has "
                    f"{layout.frames} of {layout.frame_tokens}"
                )
            frame_F = torch.arange(frames, dtype=torch.int32, device=x_BFCHW.device)
            if past is not None:
                frame_F += past.first

        tokens_BLD = self._patchify(x_BFCHW)
        if clean_BFCHW is not None:  # the sequence is [clean ‖ noisy], the clean half at t = 0
            check_shape("clean", clean_BFCHW, tuple(x_BFCHW.shape))
            if isinstance(t, Modulation):
                raise ValueError("teacher forcing takes timesteps, not a Modulation")
            t_BF = _by_frame(t).expand(batch, frames)
            t = torch.cat([torch.zeros_like(t_BF), t_BF], 1)
            tokens_BLD = torch.cat([self._patchify(clean_BFCHW), tokens_BLD], 1)
            frame_F = frame_F.repeat(2)
        modulation = t if isinstance(t, Modulation) else self.modulation(t)
        if cache is not None:
            text: Tensor | TextKeys = TextKeys(cache.text_k, cache.text_v)
        else:
            assert text_BTE is not None
            text = text_BTE if isinstance(text_BTE, TextKeys) else self._embed_text(text_BTE)
        context = Context(
            sf.rope_table(frame_F, grid, self.config.head_dim, impl=self.impl),
            text,
            layout,
            cache,
            chunk,
            past,
        )
        return tokens_BLD, modulation, context

    def modulation(self, t: Tensor) -> Modulation:
        """Time embedding of timesteps [], [B] or [B, F], in float32 whatever the model's dtype:
        bfloat16 would collapse the 1000 training timesteps to 294."""
        t_BF = _by_frame(t)
        half = self.config.freq_dim // 2
        exponent = torch.arange(half, device=t.device, dtype=torch.float64) / half
        angle = t_BF.double()[..., None] * 10_000.0**-exponent
        sinusoid = torch.cat([angle.cos(), angle.sin()], -1).float()
        with torch.autocast(t.device.type, enabled=False):
            hidden = F.silu(_linear32(sinusoid, self.time_embedding[0]))
            head = _linear32(hidden, self.time_embedding[2])
            blocks = _linear32(F.silu(head), self.time_projection[1])
        return Modulation(t_BF.float(), head, blocks.unflatten(-1, (6, -1)))

    def text_keys(self, text_BTE: Tensor) -> TextKeys:
        """Keys and values of prompt embeddings [B or 1, T <= text_len, text_dim]."""
        text_BTD = self._embed_text(text_BTE)
        keys = [cast(Block, block).cross_attn.keys_values(text_BTD) for block in self.blocks]
        return TextKeys(*zip(*keys, strict=True))

    def set_text(self, cache: sf.RingKVCache, text_BTE: Tensor) -> None:
        """Puts the keys and values of prompt embeddings [B or 1, T, text_dim] into the cache."""
        for i, (k, v) in enumerate(zip(*self.text_keys(text_BTE), strict=True)):
            cache.text_k[i].copy_(k)
            cache.text_v[i].copy_(v)

    def new_cache(
        self, batch: int, window: int, grid: tuple[int, int], sink: int = 0
    ) -> sf.RingKVCache:
        """An empty cache for streams of this model, in its dtype or, under autocast, in that of its
        linear layers; grid: (height, width) of a frame in tokens."""
        kind = self.device.type
        autocast = torch.is_autocast_enabled(kind)
        return sf.RingKVCache(
            layers=self.config.layers,
            batch=batch,
            window=window,
            sink=sink,
            frame_tokens=math.prod(grid),
            heads=self.config.heads,
            head_dim=self.config.head_dim,
            text_tokens=self.config.text_len,
            dtype=torch.get_autocast_dtype(kind) if autocast else self.dtype,
            device=self.device,
        )

    def _run(
        self, x_BLD: Tensor, modulation: Modulation, context: Context, keep: Sequence[int] = ()
    ) -> tuple[Tensor, list[Tensor]]:
        """All blocks, or those up to the last of `keep`: the head's norm of x, and x after each of
        `keep`. Each norm is computed in one pass with the residual before it, so that the first one
        stands before the loop and the last one is the head's."""
        last = max(keep, default=self.config.layers - 1)
        blocks = [cast(Block, block) for block in self.blocks][: last + 1]
        tables = [block.modulate(modulation.blocks) for block in blocks]
        # The (shift, scale) of the norm that follows each block.
        following = [(m[0], m[1]) for m in tables[1:]] + [self.head.modulate(modulation.head)]
        shift, scale = tables[0][:2]
        h_BLD = sf.adaln(x_BLD, shift, scale, eps=self.config.eps, impl=self.impl)

        def through(
            block: Block, table: tuple[Tensor, ...], after: tuple[Tensor, Tensor],
            x_BLD: Tensor, h_BLD: Tensor,
        ) -> tuple[Tensor, Tensor]:  # fmt: skip
            x_BLD, y_BLD = block(x_BLD, h_BLD, table, context)
            options: Any = {"eps": self.config.eps, "impl": self.impl}
            return sf.gated_adaln(x_BLD, y_BLD, table[5], *after, **options)

        # A cached pass writes the ring, which the backward pass must not do again.
        run: Any = through
        if self.recompute and torch.is_grad_enabled() and context.cache is None:
            options: Any = {"use_reentrant": False, "preserve_rng_state": False}
            run = functools.partial(checkpoint, through, **options)
        kept: dict[int, Tensor] = {}
        for i, (block, table, after) in enumerate(zip(blocks, tables, following, strict=True)):
            x_BLD, h_BLD = run(block, table, after, x_BLD, h_BLD)
            if i in keep:
                kept[i] = x_BLD
        return h_BLD, [kept[i] for i in keep]

    def _embed_text(self, text_BTE: Tensor) -> Tensor:
        """Pads with zeros to text_len rows, all of which are attended to, and projects."""
        check_shape("text", text_BTE, ("B", "T", self.config.text_dim))
        missing = self.config.text_len - text_BTE.shape[1]
        if missing < 0:
            raise ValueError(
                f"text has {text_BTE.shape[1]} rows: must be at most {self.config.text_len}"
            )
        return self.text_embedding(F.pad(text_BTE.to(self.dtype), (0, 0, 0, missing)))

    def _check_latents(self, x_BFCHW: Tensor) -> tuple[int, int]:
        """The token grid (h, w) of the latents."""
        check_shape("x", x_BFCHW, ("B", "F", self.config.channels, "H", "W"))
        _, ph, pw = self.config.patch
        height, width = x_BFCHW.shape[3:]
        if height % ph or width % pw:
            raise ValueError(f"latents are {height}×{width}: must be multiples of {ph}×{pw}")
        return height // ph, width // pw

    def _patchify(self, x_BFCHW: Tensor) -> Tensor:
        """Tokens [B, L, D]: one matrix product, as the patch convolution's stride is its kernel."""
        _, ph, pw = self.config.patch
        patches = x_BFCHW.to(self.dtype).unflatten(4, (-1, pw)).unflatten(3, (-1, ph))
        patches_BLE = patches.permute(0, 1, 3, 5, 2, 4, 6).flatten(4).flatten(1, 3)
        return F.linear(
            patches_BLE, self.patch_embedding.weight.flatten(1), self.patch_embedding.bias
        )

    def _unpatchify(self, out_BLE: Tensor, grid: tuple[int, int]) -> Tensor:
        _, ph, pw = self.config.patch
        patches = out_BLE.unflatten(2, (ph, pw, -1)).unflatten(1, (-1, *grid))
        return patches.permute(0, 1, 6, 2, 4, 3, 5).flatten(5, 6).flatten(3, 4)


def _by_frame(t: Tensor) -> Tensor:
    """View of [], [B] or [B, F] as [B, F], where B and F may be 1."""
    if t.dim() > 2:
        raise ValueError(f"t has shape {[*t.shape]}: must be [], [B] or [B, F]")
    return t.reshape(t.shape + (1,) * (2 - t.dim()))


def _linear32(x: Tensor, linear: nn.Module) -> Tensor:
    assert isinstance(linear, nn.Linear)
    return F.linear(x, linear.weight.float(), linear.bias.float())
