"""Clips for codecs of Wan2.1's latents, whole and in chunks, and the contents of video files."""

from __future__ import annotations

import itertools
import os
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sfmodel.footage import _counted, _picture, _timed, opened_video, to_pixels
from sfmodel.vae.codec import CausalState


def latents() -> Tensor:
    """Latents of two clips."""
    return torch.randn(2, 6, 16, 3, 5, generator=torch.Generator().manual_seed(1))


def pixels() -> Tensor:
    """Pixels in [-1, 1], as many frames as the latents stand for and three more."""
    return 2 * torch.rand(2, 24, 3, 24, 40, generator=torch.Generator().manual_seed(2)) - 1


def in_parts(chunk: Any, x: Tensor, sizes: tuple[int, ...]) -> tuple[Tensor, Any]:
    """Results of x in chunks of these sizes, and the state in the end."""
    parts, state = [], None
    for part in x.split(sizes, 1):
        out, state = chunk(part, state)
        parts.append(out)
    return torch.cat(parts, 1), state


def goes_on_twice(chunk: Any, parts: tuple[Tensor, Tensor, Tensor], apart: float) -> CausalState:
    """The state after the first part, from which the two others go on; they are at least so far
    `apart`, and it does not change."""
    first, second, third = parts
    state: CausalState = chunk(first)[1]
    kept = [frames.clone() for frames in state.before]
    on, other = chunk(second, state)[0], chunk(third, state)[0]
    assert (on - other).abs().max() > apart
    assert all(map(torch.equal, state.before, kept))
    assert_same(chunk(second, state)[0], on)
    return state


def last_depends_on(vae: Any, before: int) -> bool:
    """Whether a latent frame's last pixel frame depends on the latent frame so many before it: NaN
    spreads to all that is computed from it."""
    x = torch.zeros(1, before + 2, vae.latent_channels, 1, 1)
    x[:, 1] = torch.nan  # behind a start, which is decoded otherwise
    with torch.no_grad():
        pixels, _ = in_parts(vae.decode_chunk, x, (1,) * x.shape[1])
    return bool(pixels[:, -1].isnan().any())


def assert_same(a: Any, b: Any) -> None:
    # A convolution may sum in another order for another number of frames.
    torch.testing.assert_close(a, b, rtol=0, atol=1e-5)


def read_video(path: str | os.PathLike[str], max_frames: int | None = None) -> tuple[Tensor, float]:
    """Read a video file: float32 frames [T, 3, H, W] in [-1, 1] and the frames per second.

    path: any format that FFmpeg reads. max_frames: stop after that many; all are held in memory.
    Frames are upright and have square pixels. Raises FileNotFoundError for a missing file,
    ValueError for one that is damaged or no video.
    """
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"no such file: {path}")
    if max_frames is not None and max_frames < 1:
        raise ValueError(f"max_frames: {max_frames}, expected 1 or more")
    try:
        with opened_video(path) as (container, stream):
            frame_rate = stream.average_rate or stream.guessed_rate
            counted = itertools.islice(_counted(_timed(container, stream, None), None), max_frames)
            images = [_picture(frame, stream) for frame, _ in counted]
        if not images or frame_rate is None:
            raise ValueError("damaged: no frame can be decoded")
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    return to_pixels(images).contiguous(), float(frame_rate)
