"""The Wan2.1 diffusion transformer, bidirectional, block-causal or cached, on sfkernels' ops.

Shapes: B batch, F latent frames, C channels, h×w tokens of a frame, N = h·w, L = F·N tokens,
D model dim, T text rows, S slots of a ring.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils import _pytree as pytree
from torch.utils.checkpoint import checkpoint

import sfkernels as sf
from sfkernels.arguments import check_shape
from sfmodel.blocks import Block, Context, Head, Past, Place, TextKeys, by_sample
from sfmodel.config import DiTConfig
from sfmodel.schedule import TRAIN_STEPS

if TYPE_CHECKING:
    from sfmodel.sequence_parallel import HeadRanks


class Modulation(NamedTuple):
    """Shifts, scales and gates of all layers at the timesteps `t` [B, F], in float32: of each block
    [B, F, 6, D], of the head [B, F, 2, D]. B and F may be 1. Depends on t alone: a sampler computes
    it once per step."""

    t: Tensor
    head: Tensor
    blocks: Sequence[Tensor]

    def behind(self, clean: Modulation, frames: int, own: int) -> Modulation:
        """Modulation of a chunk of `own` frames behind one of `frames` frames under `clean`."""

        def joined(clean_B1: Tensor, own_B1: Tensor) -> Tensor:
            sizes = zip((clean_B1, own_B1), (frames, own), strict=True)
            return torch.cat([t.expand(t.shape[0], n, *t.shape[2:]) for t, n in sizes], 1)

        return Modulation(*pytree.tree_map(joined, tuple(clean), tuple(self)))


class DiT(nn.Module):
    """Wan2.1 as one module: bidirectional teacher or critic, causal student, cached generator.

    Parameters carry the official names, except that q, k, v (and k, v of the prompt) are one
    projection each; checkpoint.py maps both ways. impl: the implementation of the sfkernels ops;
    attention_impl, linear_impl: that of attention and of the FFN's first layer. recompute:
    recompute each block's activations in the backward pass instead of keeping them.

    ranks: those that share the passes over a cache; None for this one alone.
    """

    ranks: HeadRanks | None = None

    def __init__(
        self,
        config: DiTConfig,
        impl: str = "auto",
        attention_impl: str = "auto",
        linear_impl: str = "auto",
        recompute: bool = False,
    ) -> None:
        super().__init__()
        self.config, self.impl, self.recompute = config, impl, recompute
        self.attention_impl = attention_impl
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
            Block(config, i, impl, attention_impl, linear_impl) for i in range(config.layers)
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
        cache: sf.RingKVCache | Sequence[sf.RingKVCache] | None = None,
        past: Past | None = None,
        places: Sequence[Any] = (),
        full: bool = False,
        apart: bool = False,
    ) -> Tensor:
        """Predicts the flow ε − x0, [B, F, C, H, W] float32.

        x: noisy latents [B, F, C, H, W]. t: timesteps in 0..1000, [], [B] or [B, F], or what
        `modulation` made of them. text: prompt embeddings [B or 1, T <= text_len, text_dim], or
        what `text_keys` made of them, or None when `set_text` has put the prompt into the cache.

        Neither layout nor cache: bidirectional attention. layout: block-causal; one with
        teacher_forcing takes the clean latents, same shape as x, and returns the noisy half. past:
        x is a chunk of a training rollout, which sees itself and those keys and values.

        cache: x is the next chunk of a stream. Its keys and values are written in place, and are
        past once `append` has written those of its final latents and the caller has committed them.
        With clean latents [B, F', C, H, W] in front x is the chunk after them, and the pass appends
        them as well: the caller commits F' frames. places: of the chunks, where the caller has them
        from `place`. full: whether the caller knows that the first of them fills the ring, as
        `sfkernels.ring_attention` says. A list of caches, of one sample each: the samples are
        streams of their own, each wherever it is, and places, if given, a list for each. apart: the
        linear layers take one of these streams at a time, so that each is what it is alone, bit for
        bit.

        Raises ValueError for shapes or arguments that do not fit together.
        """
        grid, frames = self._check_latents(x_BFCHW), x_BFCHW.shape[1]
        tokens_BLD, modulation, context = self._inputs(
            x_BFCHW, t, text_BTE, layout, clean_BFCHW, cache, past, places, apart
        )
        h_BLD, _ = self._run(tokens_BLD, modulation, context._replace(full=full))
        out_BLE = context.through(self.head.head, h_BLD)
        if context.ranks is not None:
            out_BLE = context.ranks.whole(out_BLE)
        out = self._unpatchify(out_BLE[:, -frames * math.prod(grid) :].float(), grid)
        return self.flow(out, x_BFCHW, modulation.t[:, -frames:])

    def flow(self, out_BFCHW: Tensor, x_BFCHW: Tensor, t_BF: Tensor) -> Tensor:
        """The flow that the network's output in float32 stands for at timesteps [B, F], each of
        which may be 1."""
        if self.config.prediction == "flow":
            return out_BFCHW
        sigma = (t_BF / TRAIN_STEPS).clamp(min=1 / TRAIN_STEPS)
        return (x_BFCHW.float() - out_BFCHW) / sigma[:, :, None, None, None]

    @torch.no_grad()
    def append(
        self,
        x_BFCHW: Tensor,
        t: Tensor | Modulation,
        text_BTE: Tensor | TextKeys | None,
        *,
        cache: sf.RingKVCache | Sequence[sf.RingKVCache] | None = None,
        past: Past | None = None,
        apart: bool = False,
    ) -> None:
        """Leaves the keys and values of a chunk's final latents in the cache, which the caller
        commits, or in the past: a pass that ends with those of the last layer. Arguments of
        `forward`."""
        tokens_BLD, modulation, context = self._inputs(
            x_BFCHW, t, text_BTE, cache=cache, past=past, apart=apart
        )
        self._run(tokens_BLD, modulation, context._replace(appended=tokens_BLD.shape[1]))

    def place(
        self, cache: sf.RingKVCache, frames: int, grid: tuple[int, int], after: int = 0
    ) -> Place:
        """Place of the next `frames` frames in a stream, or of those after the next `after`. grid:
        (height, width) of a frame in tokens."""
        chunk, head_dim = cache.chunk(frames, after), self.config.head_dim
        table = sf.rope_table(chunk.frame_F, grid, head_dim, impl=self.impl)
        sink: tuple[Tensor, ...] = ()
        if tokens := cache.sink_k.shape[2]:
            sink = self.moving(chunk.moved, tokens), chunk.moved.clamp(max=1) * tokens
        return Place(chunk, self.ranks.own(table[None])[0] if self.ranks else table, sink)

    def moving(self, moved: Tensor, tokens: int) -> Tensor:
        """Rotation [tokens, D/2, 2] of keys that move by so many frames, an int32 scalar. In time
        alone: each token is moved as a frame of a single one."""
        head_dim = self.config.head_dim
        return sf.rope_table(moved.expand(tokens), (1, 1), head_dim, impl=self.impl)

    def _placed(
        self, cache: sf.RingKVCache, before: int, frames: int, grid: tuple[int, int]
    ) -> list[Place]:
        """The places of so many frames and of those before them in a pass."""
        first = [self.place(cache, before, grid)] if before else []
        return [*first, self.place(cache, frames, grid, before)]

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
        cache: sf.RingKVCache | Sequence[sf.RingKVCache] | None = None,
        past: Past | None = None,
        places: Sequence[Any] = (),
        apart: bool = False,
    ) -> tuple[Tensor, Modulation, Context]:
        """Arguments of `forward` as `_run` takes them: tokens, modulation and context."""
        grid = self._check_latents(x_BFCHW)
        batch, frames, *latent = x_BFCHW.shape
        forced = layout is not None and layout.teacher_forcing
        if forced != (clean_BFCHW is not None) and (forced or cache is None):
            raise ValueError("clean latents go with a cache or a layout with teacher_forcing")
        if (text_BTE is None) != (cache is not None):
            raise ValueError("text is None exactly when a cache is given: set_text puts it there")
        if sum(one is not None for one in (layout, cache, past)) > 1:
            raise ValueError("give one of layout, cache and past")
        if apart and (cache is None or isinstance(cache, sf.RingKVCache)):
            raise ValueError("apart: goes with a list of caches, of one sample each")

        # The sequence is [clean ‖ noisy], the clean latents at t = 0.
        patchify = functools.partial(by_sample, self._patchify) if apart else self._patchify
        tokens_BLD, before = patchify(x_BFCHW), 0
        if clean_BFCHW is not None:
            before = frames if forced else clean_BFCHW.shape[1]
            check_shape("clean", clean_BFCHW, (batch, before, *latent))
            tokens_BLD = torch.cat([patchify(clean_BFCHW), tokens_BLD], 1)
        if isinstance(t, Modulation):
            if before and t.t.shape[1] != before + frames:
                raise ValueError(
                    f"modulation of {t.t.shape[1]} frames: must be of the {before} clean ones and "
                    f"the {frames} of x"
                )
            modulation = t
        else:
            if before:
                t_BF = _by_frame(t).expand(batch, frames)
                t = torch.cat([t_BF.new_zeros(batch, before), t_BF], 1)
            modulation = self.modulation(t)

        if cache is not None:
            caches = [cache] if isinstance(cache, sf.RingKVCache) else [*cache]
            for each in caches:
                if each.frame_tokens != math.prod(grid):
                    raise ValueError(
                        f"x has {math.prod(grid)} tokens a frame: the cache has {each.frame_tokens}"
                    )
            appended = tokens_BLD.shape[1] * before // (before + frames)
            if not isinstance(cache, sf.RingKVCache):
                if len(caches) != batch or self.ranks is not None:
                    raise ValueError(
                        f"{len(caches)} caches: must be one for each of {batch} samples, on 1 rank"
                    )
                of_each = places or [self._placed(each, before, frames, grid) for each in caches]
                of_layers = range(self.config.layers)
                text_keys = TextKeys(
                    [torch.cat([each.text_k[i] for each in caches]) for i in of_layers],
                    [torch.cat([each.text_v[i] for each in caches]) for i in of_layers],
                )
                streams = [*zip(caches, of_each, strict=True)]
                context = Context(text_keys, streams=streams, apart=apart, appended=appended)
                return tokens_BLD, modulation, context
            places = places or self._placed(cache, before, frames, grid)
            table = None
            if self.ranks is not None:
                tokens_BLD = self.ranks.own(tokens_BLD)
                table = torch.cat([place.rope_LP2 for place in places])
                appended = tokens_BLD.shape[1] * before // (before + frames)
            context = Context(
                TextKeys(cache.text_k, cache.text_v),
                table,
                cache=cache,
                places=places,
                ranks=self.ranks,
                appended=appended,
            )
            return tokens_BLD, modulation, context
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
        if before:
            frame_F = frame_F.repeat(2)
        assert text_BTE is not None
        text = text_BTE if isinstance(text_BTE, TextKeys) else self._embed_text(text_BTE)
        table = sf.rope_table(frame_F, grid, self.config.head_dim, impl=self.impl)
        return tokens_BLD, modulation, Context(text, table, layout, past)

    def modulation(self, t: Tensor) -> Modulation:
        """Modulation at timesteps [], [B] or [B, F], in float32 whatever the model's dtype:
        bfloat16 would collapse the 1000 training timesteps to 294."""
        t_BF = _by_frame(t)
        half = self.config.freq_dim // 2
        exponent = torch.arange(half, device=t.device, dtype=torch.float64) / half
        angle = t_BF.double()[..., None] * 10_000.0**-exponent
        sinusoid = torch.cat([angle.cos(), angle.sin()], -1).float()
        with torch.autocast(t.device.type, enabled=False):
            hidden = F.silu(_linear32(sinusoid, self.time_embedding[0]))
            head = _linear32(hidden, self.time_embedding[2])
            shared = _linear32(F.silu(head), self.time_projection[1]).unflatten(-1, (6, -1))
        blocks = [shared + cast(Block, block).modulation.float() for block in self.blocks]
        return Modulation(t_BF.float(), head[:, :, None] + self.head.modulation.float(), blocks)

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
        self,
        batch: int,
        window: int,
        grid: tuple[int, int],
        sink: int = 0,
        positions: str = "absolute",
    ) -> sf.RingKVCache:
        """An empty cache for streams of this model, in its dtype or, under autocast, in that of its
        linear layers; grid: (height, width) of a frame in tokens; positions: of the sink."""
        kind = self.device.type
        autocast = torch.is_autocast_enabled(kind)
        return sf.RingKVCache(
            layers=self.config.layers,
            batch=batch,
            window=window,
            sink=sink,
            positions=positions,
            frame_tokens=math.prod(grid),
            heads=self.config.heads // (self.ranks.size if self.ranks else 1),
            head_dim=self.config.head_dim,
            text_tokens=self.config.text_len,
            text_heads=self.config.heads,
            dtype=torch.get_autocast_dtype(kind) if autocast else self.dtype,
            device=self.device,
        )

    def _run(
        self, x_BLD: Tensor, modulation: Modulation, context: Context, keep: Sequence[int] = ()
    ) -> tuple[Tensor, list[Tensor]]:
        """All blocks, or those up to the last of `keep`: the head's norm of x, and x after each of
        `keep`. Each norm is computed in one pass with the residual before it, so that the first one
        stands before the loop and the last one is the head's. Tokens that are there for their keys
        and values alone do not come out of the last block."""
        last = max(keep, default=self.config.layers - 1)
        blocks = [cast(Block, block) for block in self.blocks][: last + 1]
        tables = [table.unbind(2) for table in modulation.blocks[: last + 1]]
        # The (shift, scale) of the norm that follows each block.
        following = [(m[0], m[1]) for m in tables[1:]] + [modulation.head.unbind(2)]
        shift, scale = tables[0][:2]
        h_BLD = sf.adaln(x_BLD, shift, scale, eps=self.config.eps, impl=self.impl)

        def through(
            block: Block, table: tuple[Tensor, ...], after: tuple[Tensor, Tensor],
            x_BLD: Tensor, h_BLD: Tensor,
        ) -> tuple[Tensor, Tensor]:  # fmt: skip
            x_BLD, y_BLD = block(x_BLD, h_BLD, table, context)
            if y_BLD is None:
                return x_BLD, x_BLD
            options: Any = {"eps": self.config.eps, "impl": self.impl}
            return sf.gated_adaln(x_BLD, y_BLD, table[5], *after, **options)

        # A cached pass writes the ring, which the backward pass must not do again.
        run: Any = through
        cached = context.cache is not None or context.streams
        if self.recompute and torch.is_grad_enabled() and not cached:
            options: Any = {"use_reentrant": False, "preserve_rng_state": False}
            run = functools.partial(checkpoint, through, **options)
        kept: dict[int, Tensor] = {}
        for i, (block, table, after) in enumerate(zip(blocks, tables, following, strict=True)):
            if context.appended and i == self.config.layers - 1:
                goes_on = x_BLD.shape[1] - context.appended
                frames = table[0].shape[1] * goes_on // x_BLD.shape[1]
                x_BLD = x_BLD[:, context.appended :]
                table, after = (
                    tuple(m[:, -frames:] if frames else m for m in of) for of in (table, after)
                )
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
