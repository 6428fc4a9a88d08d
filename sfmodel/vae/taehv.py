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

from typing import Any

import torch
from torch import Tensor, nn

from sfmodel.vae.codec import CausalState, FrameCache, check_before, check_latents, check_pixels
from sfmodel.vae.convolution import conv2d, conv3d, upsampled_conv2d

# Levels by the number of their first layer in the public names: the encoder's, with the frames that
# become one; the decoder's, with the frames that one becomes, and channels in and out.
ENCODER_LEVELS = ((2, 2), (7, 2), (12, 1))
DECODER_LEVELS = ((3, 1, 256, 128), (9, 2, 128, 64), (15, 2, 64, 64))
WIDTH = 64  # channels in the encoder
BLOCKS = 3  # memory blocks of a level


class TinyVAE(nn.Module):
    """A `sfmodel.vae.codec.VideoCodec` that computes in the dtype of its weights and returns that.

    A CUDA graph can hold it: no host sync, and shapes follow from those of the arguments.
    `.to(memory_format=torch.channels_last)` spares each call the reordering of weights."""

    latent_channels = 16
    spatial_factor = 8
    temporal_factor = 4
    # Six memory blocks before time first doubles, and half of three rounded down behind it.
    past_frames = 7

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
        self, latents_BFCHW: Tensor, state: CausalState | None = None
    ) -> tuple[Tensor, CausalState]:
        """Decodes latents [B, F, 16, H, W] to pixels [B, T, 3, 8H, 8W] in [-1, 1]."""
        check_latents(self, latents_BFCHW)
        check_before("latents", latents_BFCHW, state)
        layers: Any = self.decoder
        cache = FrameCache(state, 1)
        latents_BTHWC = latents_BFCHW.to(layers["1"].weight.dtype).movedim(2, -1).contiguous()
        x_BTHWC = conv2d((latents_BTHWC / 3).tanh() * 3, layers["1"]).relu_()
        # Of the four frames of a clip's first latent frame only the last is part of the clip. Once
        # no memory needs the others they go: one of two before time doubles again, then one of two.
        skip = int(state is None)
        for at, *_ in DECODER_LEVELS:
            for i in range(BLOCKS):
                x_BTHWC = layers[str(at + i)](x_BTHWC, cache)
            if at == DECODER_LEVELS[-1][0]:
                x_BTHWC = x_BTHWC[:, skip:]
            x_BTHWC = _grow(x_BTHWC, layers[str(at + 4)].conv.weight, layers[str(at + 5)].weight)
        pixels_BTHWC = conv2d(x_BTHWC[:, skip:].relu_(), layers["22"])
        pixels_BTHWC = (2 * pixels_BTHWC - 1).clamp_(-1, 1)
        return pixels_BTHWC.movedim(-1, 2), cache.state()

    def encode_chunk(
        self, pixels_BTCHW: Tensor, state: CausalState | None = None
    ) -> tuple[Tensor, CausalState]:
        """Pixels [B, T, 3, H, W] in [-1, 1] to latents [B, F, 16, H / 8, W / 8].

        state: None at the start of a clip, where T = 1 + 4k gives k + 1 latent frames as Wan2.1
        counts them, a still and then four frames each, and T = 4k gives k, four frames each, as the
        public encoder does; after that what the previous call returned, and T = 4k gives k. Raises
        ValueError for other shapes."""
        groups = pixels_BTCHW.ndim == 5 and pixels_BTCHW.shape[1] % self.temporal_factor == 0
        check_pixels(self, pixels_BTCHW, starts=state is None and not groups)
        check_before("pixels", pixels_BTCHW, state, 2)
        if not groups:  # the still fills one
            still_BTCHW = pixels_BTCHW[:, :1].expand(-1, self.temporal_factor - 1, -1, -1, -1)
            pixels_BTCHW = torch.cat([still_BTCHW, pixels_BTCHW], 1)
        layers: Any = self.encoder
        cache = FrameCache(state, 1)
        pixels_BTHWC = pixels_BTCHW.to(layers["0"].weight.dtype).movedim(2, -1).contiguous()
        x_BTHWC = conv2d(pixels_BTHWC * 0.5 + 0.5, layers["0"]).relu_()
        for at, _ in ENCODER_LEVELS:
            x_BTHWC = _pool(x_BTHWC, layers[str(at)].conv.weight, layers[str(at + 1)].weight)
            for i in range(BLOCKS):
                x_BTHWC = layers[str(at + 2 + i)](x_BTHWC, cache)
        latents_BFHWC = conv2d(x_BTHWC, layers["17"])
        return latents_BFHWC.movedim(-1, 2).contiguous(), cache.state()


class MemoryBlock(nn.Module):
    """x + three convolutions, of which the first sees each frame and the one before it."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        inputs = {"0": 2 * channels, "2": channels, "4": channels}
        self.conv = nn.ModuleDict({at: _conv(C, channels) for at, C in inputs.items()})

    def forward(self, x_BTHWC: Tensor, cache: FrameCache) -> Tensor:
        layers: Any = self.conv
        # A convolution over two frames finds both where they are, once the frame from before is put
        # in front: x is read and written once more. Setting each frame beside the one before it, as
        # channels, would read and write it twice and let the convolution read 2·C channels; a
        # convolution for each of the two and a shifted sum would read x twice and a result more.
        now_before_OSCHW = layers["0"].weight.unflatten(1, (2, -1))
        before_now_OCSHW = now_before_OSCHW.flip(1).transpose(1, 2)
        h_BTHWC = conv3d(cache.prepend(x_BTHWC), before_now_OCSHW, layers["0"].bias).relu_()
        h_BTHWC = conv2d(h_BTHWC, layers["2"]).relu_()
        return conv2d(h_BTHWC, layers["4"]).add_(x_BTHWC).relu_()


def _pool(x_BTHWC: Tensor, weight_MC11: Tensor, weight_OMHW: Tensor) -> Tensor:
    """One frame of S at half the height and width: a 1×1 convolution of the S·C channels of S
    frames, and a 3×3 convolution of stride 2."""
    frames = weight_MC11.shape[1] // x_BTHWC.shape[-1]
    weight_MSC = _exact(weight_MC11).flatten(1).unflatten(1, (frames, -1))
    weight_OCSHW = torch.einsum("omhw,msc->ocshw", _exact(weight_OMHW), weight_MSC)
    return conv3d(x_BTHWC, weight_OCSHW.to(x_BTHWC.dtype), stride=(frames, 2, 2))


def _grow(x_BTHWC: Tensor, weight_MC11: Tensor, weight_OMHW: Tensor) -> Tensor:
    """S frames of one at twice the height and width: nearest-neighbour upsampling, a 1×1
    convolution to the S·M channels of S frames, and a 3×3 convolution."""
    frames = len(weight_MC11) // weight_OMHW.shape[1]
    weight_SMC = _exact(weight_MC11).flatten(1).unflatten(0, (frames, -1))
    weight_SOCHW = torch.einsum("omhw,smc->sochw", _exact(weight_OMHW), weight_SMC)
    return upsampled_conv2d(x_BTHWC, weight_SOCHW.flatten(0, 1), frames=frames)


def _exact(weight: Tensor) -> Tensor:
    """Weights in float32 at least, so that a product of 16-bit weights is rounded once."""
    return weight.to(torch.promote_types(weight.dtype, torch.float32))


def _conv(inputs: int, outputs: int, bias: bool = True) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, 3, padding=1, bias=bias)


def _over_time(inputs: int, outputs: int) -> nn.ModuleDict:
    return nn.ModuleDict({"conv": nn.Conv2d(inputs, outputs, 1, bias=False)})
