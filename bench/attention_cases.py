"""What `python -m bench kernels` measures of attention, of streaming and of training, at the shapes
of Wan2.1: the cases, for attention.py.

Shapes: B batch (1 here), L queries, S keys, H heads, D head dim; tensors are [B, L or S, H, D].
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

import sfkernels as sf
from bench.attention import Case
from sfkernels.layout import Row
from sfkernels.roofline import attention_bytes, attention_flops

CHUNK = 3  # latent frames


@dataclass(frozen=True)
class Sizes:
    """rings, clips: latent frames of each, the most telling first. window, sink: of a layout whose
    window moves. wide: heads of the larger model, 0 for none. text: keys of a prompt."""

    frame_tokens: int
    heads: int
    wide: int
    head_dim: int
    text: int
    rings: tuple[int, ...]
    clips: tuple[int, ...]
    window: int
    sink: int
    dtype: torch.dtype


FULL = Sizes(1560, 12, 40, 128, 512, (21, 9, 3, 1), (21, 9, 3), 9, 3, torch.bfloat16)
TINY = Sizes(8, 1, 2, 16, 7, (6, 3, 1), (6, 3), 5, 1, torch.float32)


def cases(sizes: Sizes) -> Iterator[Case]:
    """The most telling first, so that a time limit cuts the rest."""
    ring, *rings = sizes.rings
    clip, *clips = sizes.clips
    for frames in (CHUNK, 1):
        yield _ring(sizes, frames, ring, ring, compiled=frames == CHUNK)
    yield from _training(sizes, clip)
    yield from _self_forcing(sizes, clip)
    if sizes.wide:
        wide = replace(sizes, heads=sizes.wide)
        for frames in (CHUNK, 1):
            yield _ring(wide, frames, ring, ring, f", {sizes.wide} heads")
    yield _cross(sizes)
    half = CHUNK * -(-ring // (2 * CHUNK))
    yield _ring(sizes, CHUNK, ring, half, f", {half} valid")
    yield from _training(sizes, clip, sizes.window, sizes.sink)
    for frames in (CHUNK, 1):
        for length in rings:
            if length >= frames:  # a chunk is in the ring it attends to
                yield _ring(sizes, frames, length, length)
    for length in clips:
        yield from _training(sizes, length, compiled=False)


def _rand(sizes: Sizes, tokens: int, device: torch.device) -> Tensor:
    return torch.randn(1, tokens, sizes.heads, sizes.head_dim, device=device).to(sizes.dtype)


def _bytes(sizes: Sizes, queries: int, keys: int) -> int:
    return attention_bytes(queries, keys, sizes.heads, sizes.head_dim, sizes.dtype.itemsize)


def _ring(
    sizes: Sizes, frames: int, capacity: int, valid: int, more: str = "", compiled: bool = False
) -> Case:
    queries, slots, count = (n * sizes.frame_tokens for n in (frames, capacity, valid))

    def make(device: torch.device) -> list[Tensor]:
        rings = [_rand(sizes, slots, device) for _ in range(2)]
        filled = torch.tensor(count, dtype=torch.int32, device=device)
        return [_rand(sizes, queries, device), *rings, filled]

    def plain(q: Tensor, k: Tensor, v: Tensor, _: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return q, k[:, :count], v[:, :count]

    return Case(
        f"{queries} queries, ring of {capacity} frame{'s' * (capacity > 1)}{more}",
        attention_flops(queries * count, sizes.heads, sizes.head_dim),
        _bytes(sizes, queries, count),
        (Row((0, queries), ((0, count),)),),
        count,
        make,
        sf.ring_attention,
        plain,
        compiled=compiled,
    )


def _cross(sizes: Sizes) -> Case:
    queries = CHUNK * sizes.frame_tokens

    def make(device: torch.device) -> list[Tensor]:
        return [_rand(sizes, tokens, device) for tokens in (queries, sizes.text, sizes.text)]

    return Case(
        f"{queries} queries, text of {sizes.text}",
        attention_flops(queries * sizes.text, sizes.heads, sizes.head_dim),
        _bytes(sizes, queries, sizes.text),
        (Row((0, queries), ((0, sizes.text),)),),
        sizes.text,
        make,
        sf.cross_attention,
        lambda q, k, v: (q, k, v),
    )


def _training(
    sizes: Sizes, frames: int, window: int | None = None, sink: int = 0, compiled: bool = True
) -> Iterator[Case]:
    for forcing in (False, True):
        layout = sf.BlockLayout.causal(
            *(frames, CHUNK, sizes.frame_tokens),
            window=window,
            sink=sink,
            teacher_forcing=forcing,
        )

        def make(device: torch.device, tokens: int = layout.tokens) -> list[Tensor]:
            return [_rand(sizes, tokens, device) for _ in range(3)]

        name = f"{'teacher' if forcing else 'diffusion'} forcing, {frames} frames"
        for backward in (False, True):
            yield Case(
                name + f", window {window}, sink {sink}" * (window is not None),
                attention_flops(layout.pairs, sizes.heads, sizes.head_dim, backward),
                _bytes(sizes, layout.tokens, layout.tokens),
                layout.rows,
                layout.tokens,
                make,
                functools.partial(_under_layout, layout),
                lambda q, k, v: (q, k, v),
                layout,
                backward,
                compiled,
            )


def _under_layout(layout: sf.BlockLayout, q: Tensor, k: Tensor, v: Tensor, impl: str) -> Tensor:
    return sf.block_causal_attention(q, k, v, layout, impl=impl)


def _self_forcing(sizes: Sizes, frames: int) -> Iterator[Case]:
    """A chunk at the end of a clip whose other frames are a prefix."""
    past, queries = (n * sizes.frame_tokens for n in (frames - CHUNK, CHUNK))
    layout = sf.BlockLayout((CHUNK,), sizes.frame_tokens)

    def make(device: torch.device) -> list[Tensor]:
        """q, k, v, the prefix, and for those that know none its concatenation with k and v, which
        so costs them nothing."""
        q, k, v = (_rand(sizes, queries, device) for _ in range(3))
        k_past, v_past = (_rand(sizes, past, device) for _ in range(2))
        return [q, k, v, k_past, v_past, torch.cat([k_past, k], 1), torch.cat([v_past, v], 1)]

    def ours(q: Tensor, k: Tensor, v: Tensor, k_past: Tensor, v_past: Tensor, *_: Tensor,
             impl: str) -> Tensor:  # fmt: skip
        return sf.block_causal_attention(
            q, k, v, layout, prefix=sf.Prefix(k_past, v_past), impl=impl
        )

    keys = past + queries
    for backward in (False, True):
        flops = attention_flops(
            queries * keys, sizes.heads, sizes.head_dim, backward, no_gradient=queries * past
        )
        yield Case(
            f"self forcing, {CHUNK} frames after {frames - CHUNK}",
            flops,
            _bytes(sizes, queries, keys),
            (Row((0, queries), ((0, keys),)),),
            queries,
            make,
            ours,
            lambda *t: (t[0], t[5], t[6]),
            backward=backward,
            compiled=True,
        )
