"""A clip that goes through a codec of Wan2.1's latents, whole and in chunks."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from sfmodel.vae.codec import State


def latents() -> Tensor:
    """Of two clips."""
    return torch.randn(2, 6, 16, 3, 5, generator=torch.Generator().manual_seed(1))


def pixels() -> Tensor:
    """In [-1, 1], as many frames as the latents stand for and three more."""
    return 2 * torch.rand(2, 24, 3, 24, 40, generator=torch.Generator().manual_seed(2)) - 1


def in_parts(chunk: Any, x: Tensor, sizes: tuple[int, ...]) -> tuple[Tensor, Any]:
    """What comes of x in chunks of these sizes, and the state in the end."""
    parts, state = [], None
    for part in x.split(sizes, 1):
        out, state = chunk(part, state)
        parts.append(out)
    return torch.cat(parts, 1), state


def goes_on_twice(chunk: Any, parts: tuple[Tensor, Tensor, Tensor], apart: float) -> State:
    """The state after the first part, from which the two others go on; they are at least so far
    `apart`, and it does not change."""
    first, second, third = parts
    state: State = chunk(first)[1]
    kept = [frames.clone() for frames in state.before]
    on, other = chunk(second, state)[0], chunk(third, state)[0]
    assert (on - other).abs().max() > apart
    assert all(map(torch.equal, state.before, kept))
    assert_same(chunk(second, state)[0], on)
    return state


def assert_same(a: Any, b: Any) -> None:
    # A convolution may sum in another order for another number of frames.
    torch.testing.assert_close(a, b, rtol=0, atol=1e-5)
