"""TAEHV for Wan2.1 (github.com/madebyollin/taehv, taew2_1): a tiny autoencoder of its latents.

It takes and makes the normalised latents that diffusion models see. Its only memory is one frame in
each memory block: a clip goes through in chunks of any size, all frames of a chunk together.

Parameters carry the public names. A 1×1 convolution over channels and time and the 3×3 convolution
beside it, neither with a bias, are one linear map and are computed as one. Inside, a tensor is
[B, T, H, W, C], which convolutions take as channels-last.

Shapes: B batch, F latent frames, T pixel frames or those between, N = B·T, C channels, H × W the
size of whichever is meant: pixels are 8 times as high and wide as latents. Of weights, O outputs, C
inputs, M channels between two that become one, S frames on the side that has more.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sfmodel.codec import check_before, check_latents, check_pixels

# Levels by the number of their first layer in the public names: the encoder's, with the frames that
# become one; the decoder's, with the frames that one becomes, and channels in and out.
ENCODER_LEVELS = ((2, 2), (7, 2), (12, 1))
DECODER_LEVELS = ((3, 1, 256, 128), (9, 2, 128, 64), (15, 2, 64, 64))
WIDTH = 64  # channels in the encoder
BLOCKS = 3  # memory blocks of a level


class EncoderState(NamedTuple):
    """Of each memory block in order, the last frame [B, H, W, C] it has seen. Never changed."""

    last: tuple[Tensor, ...]


class DecoderState(NamedTuple):
    """Of each memory block in order, the last frame [B, H, W, C] it has seen. Never changed."""

    last: tuple[Tensor, ...]


class TinyVAE(nn.Module):
    """A `sfmodel.codec.VideoCodec` that computes in the dtype of its weights and returns that.

    A CUDA graph can hold it: no host sync, and shapes follow from those of the arguments.
    `.to(memory_format=torch.channels_last)` spares each call the reordering of weights."""

    latent_channels = 16
    spatial_factor = 8
    temporal_factor = 4

    def __init__(self) -> None:
        super().__init__()
        encoder: dict[int, nn.Module] = {0: _conv(3, WIDTH)}
        for at, frames in ENCODER_LEVELS:
            encoder[at] = _over_time(frames * WIDTH, WIDTH)
            encoder[at + 1] = _conv(WIDTH, WIDTH, bias=False)
            encoder |= {at + 2 + i: MemoryBlock(WIDTH) for i in range(BLOCKS)}
        encoder[17] = _conv(WIDTH, self.latent_channels)
        decoder: dict[int, nn.Module] = {1: _conv(self.latent_channels, DECODER_LEVELS[0][2])}
        for at, frames, channels, outputs in DECODER_LEVELS:
            decoder |= {at + i: MemoryBlock(channels) for i in range(BLOCKS)}
            decoder[at + 4] = _over_time(channels, frames * channels)
            decoder[at + 5] = _conv(channels, outputs, bias=False)
        decoder[22] = _conv(DECODER_LEVELS[-1][3], 3)
        # The numbers left out are layers without parameters in the public model.
        self.encoder = nn.ModuleDict({str(at): layer for at, layer in encoder.items()})
        self.decoder = nn.ModuleDict({str(at): layer for at, layer in decoder.items()})

    def decode_chunk(
        self, latents_BFCHW: Tensor, state: DecoderState | None = None
    ) -> tuple[Tensor, DecoderState]:
        """Latents [B, F, 16, H, W] to pixels [B, T, 3, 8H, 8W] in [-1, 1].

        state: None at the start of a clip, where F latent frames give T = 1 + 4 (F - 1) frames;
        after that what the previous call returned, and T = 4 F. Raises ValueError for other
        shapes."""
        check_latents(self, latents_BFCHW)
        _check_size("latents", latents_BFCHW, state, 1)
        layers: Any = self.decoder
        memory = Memory(state)
        latents_BTHWC = latents_BFCHW.to(layers["1"].weight.dtype).movedim(2, -1).contiguous()
        x_BTHWC = _conv2d((latents_BTHWC / 3).tanh() * 3, layers["1"]).relu_()
        # Of the four frames of a clip's first latent frame only the last is part of the clip. Once
        # no memory needs the others they go: one of two before time doubles again, then one of two.
        skip = int(state is None)
        for at, *_ in DECODER_LEVELS:
            for i in range(BLOCKS):
                x_BTHWC = layers[str(at + i)](x_BTHWC, memory)
            if at == DECODER_LEVELS[-1][0]:
                x_BTHWC = x_BTHWC[:, skip:]
            x_BTHWC = _grow(x_BTHWC, layers[str(at + 4)].conv.weight, layers[str(at + 5)].weight)
        pixels_BTHWC = _conv2d(x_BTHWC[:, skip:].relu_(), layers["22"])
        pixels_BTHWC = (2 * pixels_BTHWC - 1).clamp_(-1, 1)
        return pixels_BTHWC.movedim(-1, 2), DecoderState(tuple(memory.after))

    def encode_chunk(
        self, pixels_BTCHW: Tensor, state: EncoderState | None = None
    ) -> tuple[Tensor, EncoderState]:
        """Pixels [B, T, 3, H, W] in [-1, 1] to latents [B, F, 16, H / 8, W / 8].

        state: None at the start of a clip, where T = 1 + 4k gives k + 1 latent frames as Wan2.1
        counts them, a still and then four frames each, and T = 4k gives k, four frames each, as the
        public encoder does; after that what the previous call returned, and T = 4k gives k. Raises
        ValueError for other shapes."""
        groups = pixels_BTCHW.ndim == 5 and pixels_BTCHW.shape[1] % self.temporal_factor == 0
        check_pixels(self, pixels_BTCHW, starts=state is None and not groups)
        _check_size("pixels", pixels_BTCHW, state, 2)
        if not groups:  # the still fills one
            still_BTCHW = pixels_BTCHW[:, :1].expand(-1, self.temporal_factor - 1, -1, -1, -1)
            pixels_BTCHW = torch.cat([still_BTCHW, pixels_BTCHW], 1)
        layers: Any = self.encoder
        memory = Memory(state)
        pixels_BTHWC = pixels_BTCHW.to(layers["0"].weight.dtype).movedim(2, -1).contiguous()
        x_BTHWC = _conv2d(pixels_BTHWC * 0.5 + 0.5, layers["0"]).relu_()
        for at, _ in ENCODER_LEVELS:
            x_BTHWC = _pool(x_BTHWC, layers[str(at)].conv.weight, layers[str(at + 1)].weight)
            for i in range(BLOCKS):
                x_BTHWC = layers[str(at + 2 + i)](x_BTHWC, memory)
        latents_BFHWC = _conv2d(x_BTHWC, layers["17"])
        return latents_BFHWC.movedim(-1, 2).contiguous(), EncoderState(tuple(memory.after))


class Memory:
    """Hands out the frames of a state, one memory block after the other, and collects the next."""

    def __init__(self, state: EncoderState | DecoderState | None) -> None:
        self._before: Iterator[Tensor] | None = None if state is None else iter(state.last)
        self.after: list[Tensor] = []

    def exchange(self, x_BTHWC: Tensor) -> Tensor:
        """The frame before x; zeros before a clip. Keeps the last one of x: a copy, as a view would
        keep the whole chunk alive."""
        self.after.append(x_BTHWC[:, -1].clone())
        return torch.zeros_like(self.after[-1]) if self._before is None else next(self._before)


class MemoryBlock(nn.Module):
    """x + three convolutions, of which the first sees each frame and the one before it."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        inputs = {"0": 2 * channels, "2": channels, "4": channels}
        self.conv = nn.ModuleDict({at: _conv(C, channels) for at, C in inputs.items()})

    def forward(self, x_BTHWC: Tensor, memory: Memory) -> Tensor:
        layers: Any = self.conv
        # A convolution over two frames finds both where they are, once the frame from before is put
        # in front: x is read and written once more. Setting each frame beside the one before it, as
        # channels, would read and write it twice and let the convolution read 2·C channels; a
        # convolution for each of the two and a shifted sum would read x twice and a result more.
        seen_BTHWC = torch.cat([memory.exchange(x_BTHWC)[:, None], x_BTHWC], 1)
        now_before_OSCHW = layers["0"].weight.unflatten(1, (2, -1))
        before_now_OCSHW = now_before_OSCHW.flip(1).transpose(1, 2)
        h_BTHWC = _conv3d(seen_BTHWC, before_now_OCSHW, layers["0"].bias).relu_()
        h_BTHWC = _conv2d(h_BTHWC, layers["2"]).relu_()
        return _conv2d(h_BTHWC, layers["4"]).add_(x_BTHWC).relu_()


def _pool(x_BTHWC: Tensor, weight_MC11: Tensor, weight_OMHW: Tensor) -> Tensor:
    """One frame of S at half the height and width: a 1×1 convolution of the S·C channels of S
    frames, and a 3×3 convolution of stride 2."""
    frames = weight_MC11.shape[1] // x_BTHWC.shape[-1]
    weight_MSC = _exact(weight_MC11).flatten(1).unflatten(1, (frames, -1))
    weight_OCSHW = torch.einsum("omhw,msc->ocshw", _exact(weight_OMHW), weight_MSC)
    return _conv3d(x_BTHWC, weight_OCSHW.to(x_BTHWC.dtype), stride=(frames, 2, 2))


def _grow(x_BTHWC: Tensor, weight_MC11: Tensor, weight_OMHW: Tensor) -> Tensor:
    """S frames of one at twice the height and width: nearest-neighbour upsampling, a 1×1
    convolution to the S·M channels of S frames, and a 3×3 convolution.

    Each pixel becomes 2×2, P × Q, which see 2×2 pixels of x, some of them under several taps. With
    these taps summed, one 2×2 convolution of x has all of them as its channels: 4/9 of the
    arithmetic, and nothing is upsampled in memory."""
    B, T, H, W, _ = x_BTHWC.shape
    outputs, inputs = weight_OMHW.shape[:2]
    frames = len(weight_MC11) // inputs
    weight_SMC = _exact(weight_MC11).flatten(1).unflatten(0, (frames, -1))
    weight_OMPHQW = _sums_of_taps(_sums_of_taps(_exact(weight_OMHW), 2), 4)
    weight = torch.einsum("omphqw,smc->spqochw", weight_OMPHQW, weight_SMC).flatten(0, 3)
    sums_NCHW = F.conv2d(x_BTHWC.flatten(0, 1).movedim(-1, 1), weight.to(x_BTHWC.dtype), padding=1)
    sums_NHWSPQO = sums_NCHW.movedim(1, -1).unflatten(-1, (frames, 2, 2, outputs))
    # There are H + 1 by W + 1 sums. Row p of the 2×2 that row i becomes is in row i + p, and so for
    # columns: diagonals of windows of two. These are views; one copy puts all pixels in place.
    rows_NHWSQOP = sums_NHWSPQO.unfold(1, 2, 1).diagonal(0, 4, 7)
    out_NHWSOPQ = rows_NHWSQOP.unfold(2, 2, 1).diagonal(0, 4, 7)
    out_NSHPWQO = out_NHWSOPQ.permute(0, 3, 1, 5, 2, 6, 4)
    return out_NSHPWQO.reshape(B, T * frames, 2 * H, 2 * W, outputs)


def _sums_of_taps(weight: Tensor, dim: int) -> Tensor:
    """Three taps to [2, 2]: of the two pixels that one becomes, each on the two that it sees."""
    a, b, c = weight.unbind(dim)
    return torch.stack([torch.stack([a, b + c], dim), torch.stack([a + b, c], dim)], dim)


def _exact(weight: Tensor) -> Tensor:
    """In float32 at least, so that a product of 16-bit weights is rounded once."""
    return weight.to(torch.promote_types(weight.dtype, torch.float32))


def _conv(inputs: int, outputs: int, bias: bool = True) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, 3, padding=1, bias=bias)


def _over_time(inputs: int, outputs: int) -> nn.ModuleDict:
    return nn.ModuleDict({"conv": nn.Conv2d(inputs, outputs, 1, bias=False)})


def _conv2d(x_BTHWC: Tensor, layer: nn.Conv2d) -> Tensor:
    """Of each frame on its own."""
    out_NCHW = layer(x_BTHWC.flatten(0, 1).movedim(-1, 1))
    return out_NCHW.movedim(1, -1).contiguous().unflatten(0, x_BTHWC.shape[:2])


def _conv3d(
    x_BTHWC: Tensor, weight: Tensor, bias: Tensor | None = None, stride: tuple[int, ...] = (1, 1, 1)
) -> Tensor:
    """Pads height and width alone."""
    out_BCTHW = F.conv3d(x_BTHWC.movedim(-1, 1), weight, bias, stride, padding=(0, 1, 1))
    return out_BCTHW.movedim(1, -1).contiguous()


def _check_size(
    name: str, x: Tensor, state: EncoderState | DecoderState | None, scale: int
) -> None:
    """Raises ValueError for a chunk of another batch, height or width than those before it. scale:
    the height of x over that of the first memory block's frames."""
    if state is not None:
        B, H, W, _ = state.last[0].shape
        check_before(name, (len(x), *x.shape[3:]), (B, scale * H, scale * W))
