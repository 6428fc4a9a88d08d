"""diffusers' `WanTransformer3DModel`: an attention processor, whole-block forwards for the norms,
and a cache for autoregressive rollouts.

diffusers' registry of attention backends is closed (`set_attention_backend` takes the names of its
own enumeration), so that attention comes in as a processor, which also replaces norm and RoPE. What
the kernels do not compute, attention to an image, masks and context parallelism, goes to the
processor that was there before. Gradients flow as before, except in a cached rollout.
"""

from __future__ import annotations

import contextlib
import itertools
import threading
import weakref
from collections.abc import Iterator
from contextvars import ContextVar
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from sfkernels.attention import cross_attention, ring_attention
from sfkernels.integrations.forwards import (
    Options,
    check_norms,
    check_parts,
    eps_of,
    give,
    is_patched,
    normed,
    version_of,
    weight_of,
)
from sfkernels.kv_cache import RingKVCache, frames_to_redo
from sfkernels.norm import adaln, gated_adaln, gated_layer_norm
from sfkernels.residual import gated_residual
from sfkernels.rope import qk_norm_rope, qk_norm_rope_append, rope_table

VERSIONS = {
    "diffusers 0.36 to 0.42": {"hidden_states", "encoder_hidden_states", "temb", "rotary_emb"},
}


class Placed(NamedTuple):
    """Place of a cached pass, for its blocks instead of cosines and sines: under which key the
    processor of each has its ring, where this chunk goes in it, and its rotation."""

    key: int
    slot_F: Tensor
    valid: Tensor
    table_LP2: Tensor
    semaphores: Tensor


_KEYS = threading.Lock()
_ROLLOUT: ContextVar[WanKVCache | None] = ContextVar("rollout", default=None)


class WanKVCache:
    """Keys and values of the newest frames of an autoregressive rollout by a patched
    `WanTransformer3DModel`, in a ring: nothing is shifted or copied when it is full.

        cache = WanKVCache(transformer, window=21, sink=1, height=60, width=104)
        for chunk in chunks:
            with cache.append():  # the first pass of a chunk goes behind all that came before
                flow = transformer(noise, t, text).sample
            with cache.overwrite():  # later ones, the clean one too, go in its place
                flow = transformer(latents, t, text).sample

    Inside a `with` every frame of the pass sees all frames of its chunk and those in the window;
    outside, the model is what it was. Calls in other threads are not concerned.

    window: latent frames that the ring holds, the chunk included; sink: the first frames, never
    evicted; height, width: of the latents, batch: samples. ring: the `RingKVCache` itself. Raises
    ValueError for a model that is not patched and for sizes that do not fit."""

    def __init__(
        self,
        model: nn.Module,
        *,
        window: int,
        height: int,
        width: int,
        sink: int = 0,
        batch: int = 1,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        if not is_patched(getattr(model, "rope", model)):
            raise ValueError("the model is not patched: call sfkernels.integrations.patch(model)")
        config: Any = model.config
        frames, rows, columns = config.patch_size
        if frames != 1 or height % rows or width % columns:
            raise ValueError(
                f"latents of {height} × {width} in patches of {frames} × {rows} × {columns}: must "
                "be whole patches of one frame"
            )
        weight: Any = model.patch_embedding.weight  # type: ignore[union-attr]
        self.height, self.width, self.grid = height, width, (height // rows, width // columns)
        self.ring = RingKVCache(
            layers=config.num_layers, batch=batch, window=window, sink=sink,
            frame_tokens=self.grid[0] * self.grid[1], heads=config.num_attention_heads,
            head_dim=config.attention_head_dim, dtype=dtype or weight.dtype,
            device=device or weight.device,
        )  # fmt: skip
        # The newest chunk, and the end of what the ring holds, of passes that failed too.
        self._begin = self._end = self._held = 0
        self.model = model
        # Each block finds its ring at its own processor: an index of layers would be a constant in
        # what torch.compile makes of a block, and other in each.
        rings = [block.attn1.processor.rings for block in model.blocks]  # type: ignore[union-attr]
        with _KEYS:
            self._key = next(key for key in itertools.count() if key not in rings[0])
            for layer, own in enumerate(rings):
                own[self._key] = self.ring.k[layer], self.ring.v[layer]
        self._rings = rings
        weakref.finalize(self, _forget, rings, self._key)

    @contextlib.contextmanager
    def append(self, frame_offset: int | None = None) -> Iterator[WanKVCache]:
        """Passes inside go behind the newest chunk; one pass, or several of the same chunk.
        frame_offset: the first frame, which must be the next one (a check) or 0 (a new video).
        Raises ValueError for others."""
        if frame_offset == 0:
            self.reset()
        self._check(frame_offset, self._end)
        self._begin = self._end
        try:
            with self._active():
                yield self
        except BaseException:
            self._end = self._begin  # of a pass that was cut short some layers have nothing
            raise
        if self._end == self._begin:
            raise ValueError("no pass of the cache's model was made inside append()")

    @contextlib.contextmanager
    def overwrite(self, frame_offset: int | None = None) -> Iterator[WanKVCache]:
        """Passes inside write the newest chunk again. frame_offset: its first frame, as a check.
        Raises ValueError for another, and where there is no chunk yet."""
        if self._end == self._begin:
            raise ValueError("there is no chunk to write again: the first pass of a chunk appends")
        self._check(frame_offset, self._begin)
        with self._active():
            yield self

    def reset(self) -> None:
        """Empties the ring, for a new video."""
        self.ring.reset()
        self._begin = self._end = self._held = 0

    @property
    def frames(self) -> int:
        """Frames that have been written so far, those that have left the window included."""
        return self._end

    def _check(self, frame_offset: int | None, expected: int) -> None:
        if frame_offset not in (None, expected):
            raise ValueError(f"frame_offset={frame_offset}: must be {expected}, where the chunk is")

    @contextlib.contextmanager
    def _active(self) -> Iterator[None]:
        model: Any = self.model
        if getattr(model.blocks[0].attn1.processor, "rings", None) is not self._rings[0]:
            raise ValueError("the model was unpatched since: make a new cache once it is patched")
        token = _ROLLOUT.set(self)
        try:
            yield
        finally:
            _ROLLOUT.reset(token)

    def _place(self, latents_BCFHW: Tensor) -> Placed:
        """The place of a pass. Raises ValueError for latents that are not of this cache."""
        ring, (batch, _, frames, *sizes) = self.ring, latents_BCFHW.shape
        wanted = [self.height, self.width]
        if sizes != wanted:
            raise ValueError(f"latents of {sizes}: the cache is for {wanted}, height and width")
        began = self._end > self._begin
        if began and frames != self._end - self._begin:
            raise ValueError(
                f"{frames} frames in place of {self._end - self._begin}: must be as many in all "
                "passes of a chunk"
            )
        if batch != ring.k.shape[1]:
            raise ValueError(f"a batch of {batch}: the cache is of {ring.k.shape[1]}")
        if frames < (redo := frames_to_redo(self._held, self._begin, ring.window, ring.sink)):
            raise ValueError(
                f"{frames} frames in place of {redo} whose pass failed: must be as many"
            )
        first = torch.full((), self._begin, dtype=torch.int32, device=ring.k.device)
        at = ring.chunk(frames, start=first)
        self._end = self._held = self._begin + frames
        ring.start.fill_(self._begin)
        head_dim = ring.k.shape[-1]
        table = rope_table(at.frame_F, self.grid, head_dim)
        return Placed(self._key, at.slot_F, at.valid, table, ring.semaphores)


def _forget(rings: list[dict[int, Any]], key: int) -> None:
    with _KEYS:
        for own in rings:
            own.pop(key, None)


def patch(model: nn.Module, options: Options) -> None:
    """Gives a model's attention processors and its blocks forwards. Raises ValueError for versions
    that are not known."""
    check_parts(model, "the model", "blocks", "rope", "patch_embedding", "config")
    for i, block in enumerate(model.blocks):  # type: ignore[arg-type]
        name = f"blocks.{i}"
        version_of(block, name, VERSIONS)
        parts = "attn1", "attn2", "norm1", "norm2", "norm3", "ffn", "scale_shift_table"
        check_parts(block, name, *parts)
        for attn in (block.attn1, block.attn2):
            check_parts(attn, f"{name}'s attention", "to_q", "to_out", "norm_q", "norm_k", "heads")
            check_norms(attn, f"{name}'s attention", "norm_q", "norm_k")
        give(block, name, _block, options)
    give(model.rope, "rope", _rope, options)  # type: ignore[arg-type]
    for block in model.blocks:  # type: ignore[union-attr]
        for attn in (block.attn1, block.attn2):
            if isinstance(attn.processor, WanProcessor):  # with the rings of its caches
                attn.processor.options = options
            else:
                attn.processor = WanProcessor(options, attn.processor)


class WanProcessor:
    """Attention of diffusers' Wan: `processor(attn, x, text, mask, (cos, sin))`.

    original: the processor for what the kernels do not compute. rings: of this block, keys and
    values, by the key of a `WanKVCache`."""

    _attention_backend = None
    _parallel_config = None

    def __init__(self, options: Options, original: Any) -> None:
        self.options, self.sfkernels_original = options, original
        self.rings: dict[int, tuple[Tensor, Tensor]] = {}

    def __getstate__(self) -> dict[str, Any]:
        return vars(self) | {"rings": {}}  # caches are of this model, not of a copy

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        rotary_emb: Any = None,
        **others: Any,
    ) -> Tensor:
        if self._attention_backend is not None:
            raise ValueError(
                f"attention backend {self._attention_backend!r} on a patched model: choose by "
                "patch(model, attention_impl=…), or unpatch it first"
            )
        of_image = getattr(attn, "add_k_proj", None) is not None
        parallel = self._parallel_config is not None
        if of_image or attention_mask is not None or parallel or others:
            if isinstance(rotary_emb, Placed):
                raise ValueError("a cached rollout takes no mask, image or context parallelism")
            self.sfkernels_original._parallel_config = self._parallel_config
            given = hidden_states, encoder_hidden_states, attention_mask, rotary_emb
            own: Tensor = self.sfkernels_original(attn, *given, **others)
            return own
        if rotary_emb is None:
            o = self._of_text(attn, hidden_states, encoder_hidden_states)
        else:
            o = self._of_video(attn, hidden_states, rotary_emb)
        out: Tensor = attn.to_out[1](attn.to_out[0](o.flatten(2)))
        return out

    def _of_video(self, attn: Any, x_BLC: Tensor, rotary_emb: Any) -> Tensor:
        impl, attention_impl = self.options
        if getattr(attn, "fused_projections", False):
            qkv = attn.to_qkv(x_BLC)
        else:
            qkv = attn.to_q(x_BLC), attn.to_k(x_BLC), attn.to_v(x_BLC)
        weights = weight_of(attn.norm_q), weight_of(attn.norm_k)
        named: Any = dict(eps=eps_of(attn.norm_q), impl=impl)
        if isinstance(rotary_emb, Placed):
            k, v = self.rings[rotary_emb.key]
            table, slot_F = rotary_emb.table_LP2, rotary_emb.slot_F
            # Which they have not under autocast.
            qkv = qkv.to(k.dtype) if isinstance(qkv, Tensor) else [t.to(k.dtype) for t in qkv]
            q = qk_norm_rope_append(qkv, *weights, table, k, v, slot_F, **named)
            counters = rotary_emb.semaphores
            return ring_attention(
                q, k, v, rotary_emb.valid, semaphores=counters, impl=attention_impl
            )
        q, k, v = qk_norm_rope(qkv, *weights, _table(*rotary_emb), **named)
        return cross_attention(q, k, v, impl=attention_impl)

    def _of_text(self, attn: Any, x_BLC: Tensor, text_BTC: Tensor | None) -> Tensor:
        impl, attention_impl = self.options
        text_BTC = x_BLC if text_BTC is None else text_BTC
        if getattr(attn, "fused_projections", False):
            k, v = attn.to_kv(text_BTC).chunk(2, dim=-1)
        else:
            k, v = attn.to_k(text_BTC), attn.to_v(text_BTC)
        q = normed(attn.norm_q, attn.to_q(x_BLC), impl)
        k = normed(attn.norm_k, k.contiguous(), impl)
        q, k, v = (t.unflatten(2, (attn.heads, -1)) for t in (q, k, v))
        return cross_attention(q, k, v, impl=attention_impl)


def _table(cos_1L1D: Tensor, sin_1L1D: Tensor) -> Tensor:
    """The rotation [L, D/2, 2] of cosines and sines that are given twice, for both of a pair."""
    cos, sin = cos_1L1D[0, :, 0, 0::2], sin_1L1D[0, :, 0, 1::2]
    return torch.stack((cos, sin), dim=-1).float()


@torch.compiler.disable
def _rope(self: Any, options: Options, hidden_states: Tensor) -> Any:
    """Forward of the model's `rope`: cosines and sines, or what a cached pass has instead."""
    cache = _ROLLOUT.get()
    if cache is None or cache.model.rope is not self:
        return type(self).forward(self, hidden_states)
    return cache._place(hidden_states)


def _block(
    self: Any,
    options: Options,
    hidden_states: Tensor,
    encoder_hidden_states: Tensor,
    temb: Tensor,
    rotary_emb: Any,
) -> Tensor:
    """Forward of a `WanTransformerBlock`. temb: [B, 6, C], or of every token [B, L, 6, C]."""
    x, impl = hidden_states, options.impl
    table = self.scale_shift_table.unsqueeze(0) if temb.dim() == 4 else self.scale_shift_table
    modulation = (table + temb.float()).chunk(6, dim=-2)
    shift, scale, gate, ffn_shift, ffn_scale, ffn_gate = modulation
    h = adaln(x, shift, scale, eps=eps_of(self.norm1), impl=impl)
    y = self.attn1(hidden_states=h, rotary_emb=rotary_emb).to(x.dtype)
    if isinstance(self.norm2, nn.Identity):
        x = h = gated_residual(x, y, gate, impl=impl)
    else:
        affine = self.norm2.weight, self.norm2.bias
        x, h = gated_layer_norm(x, y, gate, *affine, eps=eps_of(self.norm2), impl=impl)
    y = self.attn2(hidden_states=h, encoder_hidden_states=encoder_hidden_states).to(x.dtype)
    x, h = gated_adaln(x, y, None, ffn_shift, ffn_scale, eps=eps_of(self.norm3), impl=impl)
    return gated_residual(x, self.ffn(h).to(x.dtype), ffn_gate, impl=impl)
