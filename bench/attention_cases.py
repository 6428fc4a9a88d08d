"""What `python -m bench attention` measures: attention of streaming and of training at the shapes
of Wan2.1, the arithmetic that each case needs, and its exact result.

Shapes: B batch (1 here), L queries, S keys, H heads, D head dim; tensors are [B, L or S, H, D].
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

import sfkernels as sf
from sfkernels import reference
from sfkernels.layout import Row

CHUNK = 3  # latent frames
SLICE = 1024  # queries at once in float64

Inputs = Sequence[Tensor]


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


@dataclass(frozen=True)
class Case:
    """make: new tensors on a device. ours: the op on them, as its user calls it. plain: the q, k
    and v of the same attention for contestants that know no ring and no prefix: each row of `rows`
    sees its spans of these keys, all of them where there is no `layout`. own: keys, the last ones,
    that take a gradient. compiled: FlexAttention takes part."""

    name: str
    flops: int
    nbytes: int
    rows: tuple[Row, ...]
    own: int
    make: Callable[[torch.device], list[Tensor]]
    ours: Callable[..., Tensor]
    plain: Callable[..., tuple[Tensor, Tensor, Tensor]]
    layout: sf.BlockLayout | None = None
    backward: bool = False
    compiled: bool = False

    @property
    def label(self) -> str:
        return self.name + ", backward" * self.backward


def attention_flops(
    pairs: int, heads: int, head_dim: int, backward: bool = False, no_gradient: int = 0
) -> int:
    """Floating-point operations needed for (query, key) pairs that meet: forward two products;
    backward five, and three for the `no_gradient` pairs whose keys take none."""
    products = 5 * pairs - 2 * no_gradient if backward else 2 * pairs
    return 2 * head_dim * heads * products


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
    """Of q, k, v and o."""
    return 2 * (queries + keys) * sizes.heads * sizes.head_dim * sizes.dtype.itemsize


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


def plainly(case: Case, impl: str, *tensors: Tensor) -> Tensor:
    """The attention of a case on its plain q, k and v."""
    q, k, v = case.plain(*tensors)
    if case.layout is None:
        return sf.cross_attention(q, k, v, impl=impl)
    return sf.block_causal_attention(q, k, v, case.layout, impl=impl)


def exact(case: Case, inputs: Inputs, upstream: Inputs, head: int) -> list[Tensor]:
    """The same of one head, in float64, by slices of the queries: the pattern at full size in a
    fraction of its memory."""
    q, k, v = (t[:, :, head : head + 1].double() for t in case.plain(*inputs))
    out, dk, dv = (torch.zeros_like(t) for t in (q, k, v))  # out: o or dq
    for (start, end), spans in case.rows:
        seen = torch.cat([torch.arange(lo, hi, device=q.device) for lo, hi in spans])
        for lo in range(start, end, SLICE):
            hi = min(lo + SLICE, end)
            leaves = (q[:, lo:hi].detach(), k[:, seen], v[:, seen])
            for leaf in leaves:
                leaf.requires_grad_(case.backward)
            o = reference.attention(*leaves, scale=q.shape[-1] ** -0.5)
            if not case.backward:
                out[:, lo:hi] = o
                continue
            do = upstream[0][:, lo:hi, head : head + 1].double()
            out[:, lo:hi], dk_part, dv_part = torch.autograd.grad(o, leaves, do)
            dk.index_add_(1, seen, dk_part)
            dv.index_add_(1, seen, dv_part)
    return [out, dk[:, -case.own :], dv[:, -case.own :]] if case.backward else [out]
