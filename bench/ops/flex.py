"""FlexAttention of a layout of equal chunks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

import sfkernels as sf

COMPILE_SECONDS = 60.0  # what compiling it may take


def flex_attention(
    layout: sf.BlockLayout | None, device: torch.device
) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    """FlexAttention of q, k, v [B, L or S, H, D] for this layout (None: all sees all), as fast as
    it tunes itself; on a CPU uncompiled. It masks only those blocks that are seen in part."""
    from torch.nn.attention import flex_attention as flex

    attend: Callable[..., Any] = flex.flex_attention
    make_mask: Callable[..., Any] = flex.create_block_mask
    if device.type == "cuda":
        torch._dynamo.reset()  # one entry for each pattern, not a growing list of guards
        attend = torch.compile(attend, mode="max-autotune-no-cudagraphs", dynamic=False)
        make_mask = torch.compile(make_mask)  # else the whole matrix is made first
    mask = None
    if layout is not None and layout.pairs < layout.tokens**2:
        mask = make_mask(visible(layout), None, None, layout.tokens, layout.tokens, device)

    def run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = (t.transpose(1, 2) for t in (q, k, v))
        out: Tensor = attend(q, k, v, block_mask=mask).transpose(1, 2)
        return out

    return run


def visible(layout: sf.BlockLayout) -> Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]:
    """A layout of equal chunks as FlexAttention's mask_mod."""
    (size,) = set(layout.chunks)
    assert not layout.hide_first
    tokens, frames, sink = layout.frame_tokens, layout.frames, layout.sink
    newest = frames if layout.window is None else layout.window - sink

    def mask_mod(batch: Tensor, head: Tensor, q: Tensor, k: Tensor) -> Tensor:
        q_frame, k_frame = q // tokens, k // tokens
        q_chunk = q_frame % frames // size
        own = q_frame // size == k_frame // size
        past = (k_frame < frames) & (k_frame // size < q_chunk)
        return own | past & ((k_frame >= (q_chunk + 1) * size - newest) | (k_frame < sink))

    return mask_mod
