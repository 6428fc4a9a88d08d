"""What every video VAE of this project offers, and the checks of what it is given.

Latent frame 0 of a clip is a still of pixel frame 0, latent frame i covers pixel frames
4i - 3 .. 4i. Shapes: B batch, F latent frames, T pixel frames, C channels.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Protocol

from torch import Tensor, nn


class VideoDecoder(Protocol):
    """A clip goes through in chunks of any size, the state goes along explicitly, and the result is
    that of the whole clip at once. A state is never changed, so a clip can go on from it twice."""

    latent_channels: int
    spatial_factor: int
    temporal_factor: int

    def decode_chunk(self, latents_BFCHW: Tensor, state: Any = None) -> tuple[Tensor, Any]:
        """Latents [B, F, C, h, w] → pixels [B, T, 3, 8h, 8w] about in [-1, 1] and the next state.

        state: None at the start of a clip, where F latent frames give T = 1 + 4 (F - 1) frames;
        after that what the previous call returned, and T = 4 F. Raises ValueError for other
        shapes."""
        ...


class VideoCodec(VideoDecoder, Protocol):
    """The same with an encoder. Its tensors are where its parameters are."""

    def parameters(self) -> Iterator[nn.Parameter]: ...

    def encode_chunk(self, pixels_BTCHW: Tensor, state: Any = None) -> tuple[Tensor, Any]:
        """Pixels [B, T, 3, H, W] in [-1, 1] → latents [B, F, C, H / 8, W / 8] and the next state.

        state: None at the start of a clip, where T = 1 + 4k gives k + 1 latent frames; after that
        what the previous call returned, and T = 4k gives k. Raises ValueError for other sizes."""
        ...


def check_pixels(codec: VideoCodec, pixels_BTCHW: Tensor, starts: bool) -> None:
    """Raises ValueError for pixels that are no chunk of a clip (`starts`: its first)."""
    _, T, H, W = _check_shape("pixels", pixels_BTCHW, 3)
    group, scale = codec.temporal_factor, codec.spatial_factor
    if H % scale or W % scale or not (H and W):
        raise ValueError(f"pixels are {H}×{W}: height and width must be multiples of {scale}")
    if not T or T % group != (1 if starts else 0):
        where, allowed = ("at the start", "1 + 4k") if starts else ("within", "4k, k >= 1,")
        raise ValueError(f"pixels have {T} frames: {where} of a clip must be {allowed} frames")


def check_latents(codec: VideoDecoder, latents_BFCHW: Tensor) -> None:
    """Raises ValueError for latents that are no chunk of a clip."""
    _, frames, H, W = _check_shape("latents", latents_BFCHW, codec.latent_channels)
    if not frames or not (H and W):
        raise ValueError(f"latents have {frames} frames of {H}×{W}: none may be 0")


def check_before(name: str, shape: tuple[int, ...], before: tuple[int, ...]) -> None:
    """Raises ValueError where a chunk's frames are not of the size of those before it."""
    if shape != before:
        raise ValueError(f"{name} have frames {[*shape]}: must be {[*before]} as before")


def _check_shape(name: str, x: Tensor, channels: int) -> tuple[int, int, int, int]:
    if x.ndim != 5 or x.shape[2] != channels:
        raise ValueError(f"{name} have shape {[*x.shape]}: must be [B, frames, {channels}, H, W]")
    return x.shape[0], x.shape[1], x.shape[3], x.shape[4]
