"""Sums over programs of the sums over their rows: the gradients of modulations and weights.

Sums go in a fixed order, so that the same inputs give the same bits in every run. Bytes: 4 for each
partial sum, for 88 strips of 3 frames, 1536 channels and 3 sums 4.9 MB, or 1.1 us at 4.3 TB/s. This
second launch takes 3 us of the 29 us of gated_adaln's backward pass at one chunk on an H200.
Letting it overlap with the end of the first (programmatic dependent launch) saved 0.5 us there,
too little to keep.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from sfkernels import launch

# A tile of strips × channels: about as many programs as multiprocessors at 1536 channels and 3
# frames, each with its loads in flight at once.
_BLOCK_S, _BLOCK_C = 64, 32


@triton.jit
def _sum_rows(partial_ptr, out_ptr, rows, first, count, step, strips, strip_rows, C: tl.constexpr,
              BLOCK_S: tl.constexpr, BLOCK_C: tl.constexpr):  # fmt: skip
    """out [rows, C]: row r sums all strips of the partial rows first·r + step·i, i < count."""
    row = tl.program_id(1)
    if row < rows:
        col_C = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
        sum_C = tl.zeros([BLOCK_C], tl.float32)
        for start in range(0, strips * count, BLOCK_S):
            at_S = start + tl.arange(0, BLOCK_S)
            row_S = at_S // count * strip_rows + first * row + at_S % count * step
            mask_SC = (at_S < strips * count)[:, None] & (col_C < C)[None, :]
            at_SC = row_S.to(tl.int64)[:, None] * C + col_C[None, :]
            sum_C += tl.sum(tl.load(partial_ptr + at_SC, mask_SC, 0.0), 0)
        out_at = out_ptr + row.to(tl.int64) * C + col_C
        tl.store(out_at, sum_C.to(out_ptr.dtype.element_ty), col_C < C)


@triton.jit(do_not_specialize=["strips"])  # one strip would be a constant, which has no dtype
def _sum_partials_kernel(
    partial_ptr,
    out0_ptr,
    out1_ptr,
    out2_ptr,
    strips,
    strip_rows,
    rows0,
    first0,
    count0,
    step0,
    rows1,
    first1,
    count1,
    step1,
    rows2,
    first2,
    count2,
    step2,
    C: tl.constexpr,
    COUNT: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    which = tl.program_id(2)
    size = strips.to(tl.int64) * strip_rows * C
    if which == 0:
        _sum_rows(partial_ptr, out0_ptr, rows0, first0, count0, step0, strips, strip_rows, C,
                  BLOCK_S, BLOCK_C)  # fmt: skip
    if COUNT > 1:
        if which == 1:
            _sum_rows(partial_ptr + size, out1_ptr, rows1, first1, count1, step1, strips,
                      strip_rows, C, BLOCK_S, BLOCK_C)  # fmt: skip
    if COUNT > 2:
        if which == 2:
            _sum_rows(partial_ptr + 2 * size, out2_ptr, rows2, first2, count2, step2, strips,
                      strip_rows, C, BLOCK_S, BLOCK_C)  # fmt: skip


def empty_partials(
    sums: int, strips: int, batch: int, frames: int, channels: int, device: torch.device
) -> Tensor:
    """Empty [sums, S, B, F, C] float32, for the programs of a kernel to fill."""
    return torch.empty(sums, strips, batch, frames, channels, dtype=torch.float32, device=device)


def sum_partials(partial_KSBFC: Tensor, likes: Sequence[Tensor]) -> list[Tensor]:
    """Gradients of the shapes, [B or 1, F or 1, C] or [C], and dtypes of up to three `like`: summed
    over the strips, and over B or F where they were broadcast. All are contiguous."""
    sums, strips, batch, frames, channels = partial_KSBFC.shape
    outs = [torch.empty_like(like, memory_format=torch.contiguous_format) for like in likes]
    ways = []
    for like in likes:
        b, f = (1, 1) if like.dim() == 1 else like.shape[:2]
        first = frames if f < frames and b == batch else 1
        count = (batch // b) * (frames // f)
        ways.append((b * f, first, count, frames if b < batch and f == frames else 1))
    launch.run(
        _sum_partials_kernel,
        (triton.cdiv(channels, _BLOCK_C), max(rows for rows, *_ in ways), sums),
        (
            *(partial_KSBFC, *outs, *[None] * (3 - sums), strips, batch * frames),
            *(n for way in (*ways, *[(0, 0, 1, 0)] * (3 - sums)) for n in way),
        ),
        num_warps=4,
        C=channels,
        COUNT=sums,
        BLOCK_S=_BLOCK_S,
        BLOCK_C=_BLOCK_C,
    )
    return outs
