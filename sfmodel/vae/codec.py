"""Interface of the video VAEs, their state between chunks, and the checks of their arguments.

Latent frame 0 of a clip is a still of pixel frame 0, latent frame i covers pixel frames
4i - 3 .. 4i. Shapes: B batch, F latent frames, T pixel frames, C channels.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class VideoDecoder(Protocol):
    """Decoder of clips in chunks of any size, with an explicit state: the result is that of the
    whole clip at once. A state is never changed, so a clip can go on from it twice."""

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
    """Decoder and encoder of clips. Its tensors are where its parameters are. past_frames: latent
    frames before its own that a latent frame's last pixel frame depends on."""

    past_frames: int

    def parameters(self) -> Iterator[nn.Parameter]: ...

    def encode_chunk(self, pixels_BTCHW: Tensor, state: Any = None) -> tuple[Tensor, Any]:
        """Pixels [B, T, 3, H, W] in [-1, 1] → latents [B, F, C, H / 8, W / 8] and the next state.

        state: None at the start of a clip, where T = 1 + 4k gives k + 1 latent frames; after that
        what the previous call returned, and T = 4k gives k. Raises ValueError for other sizes."""
        ...


class CausalState(NamedTuple):
    """State that the next chunk of a clip needs of those before: the last frames [B, T, H, W, C]
    that each convolution over time has seen, in the order in which they run. Never changed."""

    before: tuple[Tensor, ...]


class FrameCache:
    """Hands out the frames of a CausalState, one convolution over time after the other, and
    collects the next. context_frames: how many frames before its own a convolution sees."""

    def __init__(self, state: CausalState | None, context_frames: int) -> None:
        self.starts, self.context_frames = state is None, context_frames
        self._before: Iterator[Tensor] = iter(() if state is None else state.before)
        self._after: list[Tensor] = []

    def before(self, x_BTHWC: Tensor) -> Tensor | None:
        """The frames before x; zeros at the start of a clip. None if x is the first frame alone:
        its convolutions leave out the taps that would see zeros."""
        if not self.starts:
            return next(self._before)
        B, T, *size = x_BTHWC.shape
        return None if T == 1 else x_BTHWC.new_zeros(B, self.context_frames, *size)

    def keep(self, x_BTHWC: Tensor, count: int | None = None) -> None:
        """Keeps the last `count` frames of x (None: context_frames), after zeros where there are
        fewer. A copy: a view would keep the memory of the whole chunk."""
        count = self.context_frames if count is None else count
        missing, last_BTHWC = count - x_BTHWC.shape[1], x_BTHWC[:, -count:]
        padding = (0, 0, 0, 0, 0, 0, missing, 0)
        self._after.append(F.pad(last_BTHWC, padding) if missing > 0 else last_BTHWC.clone())

    def prepend(self, x_BTHWC: Tensor) -> Tensor:
        """x behind the frames before it, and its last frames kept."""
        before = self.before(x_BTHWC)
        x_BTHWC = x_BTHWC if before is None else torch.cat([before, x_BTHWC], 1)
        self.keep(x_BTHWC)
        return x_BTHWC

    def state(self) -> CausalState:
        return CausalState(tuple(self._after))


class NotFinite(FloatingPointError):
    """Frame `frame` of video `video` of a batch that holds NaN or infinity."""

    def __init__(self, frame: int, video: int = 0) -> None:
        why = "the weights are damaged, or the arithmetic overflows"
        super().__init__(f"frame {frame} holds NaN or infinity: {why}")
        self.video = video


def finite_frames(pixels_BTCHW: Tensor) -> Tensor:
    """Tells of each frame [..., 3, H, W] whether all its numbers are finite, on the same device."""
    return pixels_BTCHW.isfinite().flatten(-3).all(-1)


def to_bytes(pixels_BTCHW: Tensor) -> Tensor:
    """Pixels [..., 3, H, W], clamped to [-1, 1], as bytes [..., H, W, 3] on the same device."""
    scaled = pixels_BTCHW.float().clamp(-1, 1).add(1).mul(127.5).round()
    return scaled.to(torch.uint8).movedim(-3, -1).contiguous()


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


def check_before(name: str, x_BTCHW: Tensor, state: CausalState | None, scale: int = 1) -> None:
    """Raises ValueError for a chunk of another batch, height or width than those before it. scale:
    its height over that of the frames that are kept first."""
    if state is not None:
        B, _, H, W, _ = state.before[0].shape
        got, want = [len(x_BTCHW), *x_BTCHW.shape[3:]], [B, scale * H, scale * W]
        if got != want:
            raise ValueError(f"{name} have batch, height, width {got}: must be {want} as before")


def _check_shape(name: str, x: Tensor, channels: int) -> tuple[int, int, int, int]:
    if x.ndim != 5 or x.shape[2] != channels:
        raise ValueError(f"{name} have shape {[*x.shape]}: must be [B, frames, {channels}, H, W]")
    return x.shape[0], x.shape[1], x.shape[3], x.shape[4]
