"""The video VAE of Wan2.1 as a stream: causal 3-D encoder and decoder, exact in chunks of any size.

Parameters carry the official names (names.py maps diffusers'). A convolution over time looks
back at the two frames before its own, so a chunk needs those frames of every convolution and
nothing else: they are the state. All latent frames of a chunk are decoded together.

Inside, a tensor is [B, T, H, W, C], which convolutions take as channels-last. What comes between
two of them is one pass over memory, `sfkernels.rms_norm_silu`: it adds the first one's bias and the
residual, normalises, applies SiLU and writes behind the frames kept from before, where the second
one reads both.

Shapes: B batch, F latent frames, T pixel frames or those of a level, C channels, H × W the size of
whichever is meant: pixels are 8 times as high and wide as latents.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import sfkernels as sf
from sfkernels.dispatch import cached_tensors
from sfmodel.config import VAEConfig
from sfmodel.vae import convolution
from sfmodel.vae.codec import CausalState, FrameCache, check_before, check_latents, check_pixels

# Of the latents, by channel: diffusion models see (latents − mean) / std.
MEAN = (
    -0.7571, -0.7089, -0.9113, 0.1075, -0.1745, 0.9653, -0.1517, 1.5508,
    0.4134, -0.0715, 0.5517, -0.3632, -0.1922, -0.9497, 0.2503, -0.2921,
)  # fmt: skip
STD = (
    2.8184, 1.4541, 2.3275, 2.6558, 1.2196, 1.7708, 2.6052, 2.0743,
    3.2687, 2.1526, 2.8652, 1.5579, 1.6382, 1.1253, 2.8251, 1.9160,
)  # fmt: skip
# The official norm divides by max(‖x‖, 1e-12): so zeros stay zeros, and nothing else changes.
EPS = 1e-24
CONTEXT_FRAMES = 2  # frames before its own that a convolution over time sees


class PendingResidual:
    """x + y + bias, still to be taken: whoever comes next does so in the same pass over memory. y
    and its bias are what a residual block adds. It is taken once and then holds no memory, whoever
    still has it."""

    def __init__(self, x: Tensor, y: Tensor | None = None, bias: Tensor | None = None) -> None:
        self._parts = [(x, y, bias)]

    def parts(self) -> tuple[Tensor, Tensor | None, Tensor | None]:
        return self._parts.pop()

    def resolve(self) -> Tensor:
        x, y, bias = self.parts()
        x = x if y is None else x + y
        return x if bias is None else x + bias


class Norm(nn.Module):
    """The weight of an RMSNorm over channels, in one of the official shapes."""

    def __init__(self, channels: int, trailing: int, impl: str) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.ones(channels, *(1,) * trailing))
        self.impl = impl

    def forward(self, x_BTHWC: Tensor) -> Tensor:
        x_BLC = x_BTHWC.flatten(1, 3)
        out_BLC = sf.rms_norm(x_BLC, self.gamma.flatten(), eps=EPS, impl=self.impl)
        return out_BLC.view(x_BTHWC.shape)

    def silu(self, pending: PendingResidual, cache: FrameCache) -> tuple[Tensor, Tensor]:
        """The sum (x itself if there is no y), and SiLU of its norm behind the frames before it,
        whose last ones are kept."""
        x_BTHWC, y_BTHWC, bias_C = pending.parts()
        before = cache.before(x_BTHWC)
        sum_BLC, out_BLC = sf.rms_norm_silu(
            x_BTHWC.flatten(1, 3),
            self.gamma.flatten(),
            None if y_BTHWC is None else y_BTHWC.flatten(1, 3),
            bias_C=bias_C,
            before_BPC=None if before is None else before.flatten(1, 3),
            eps=EPS,
            impl=self.impl,
        )
        out_BTHWC = out_BLC.unflatten(1, (-1, *x_BTHWC.shape[2:4]))
        cache.keep(out_BTHWC)
        return x_BTHWC if sum_BLC is None else sum_BLC.view(x_BTHWC.shape), out_BTHWC


class CausalConv3d(nn.Conv3d):
    """Causal 3-D convolution of frames that stand behind those before them."""

    def __init__(
        self, inputs: int, outputs: int, time: int = 3, space: int = 3, stride: int = 1
    ) -> None:
        super().__init__(inputs, outputs, (time, space, space), (stride, 1, 1))
        self.conv_impl = "auto"

    def forward(self, x_BTHWC: Tensor) -> Tensor:
        return self._convolved(x_BTHWC, self.bias)

    def apart(self, x_BTHWC: Tensor) -> tuple[Tensor, Tensor | None]:
        """The convolution, and the bias where that is still to be added: on a GPU it would take a
        pass over memory of its own."""
        if x_BTHWC.device.type == "cpu":
            return self(x_BTHWC), None
        return self._convolved(x_BTHWC, None), self.bias

    def _convolved(self, x_BTHWC: Tensor, bias: Tensor | None) -> Tensor:
        stride = cast(tuple[int, int, int], self.stride)
        by_library = stride != (1, 1, 1) or self.kernel_size == (1, 1, 1)
        if self.conv_impl == "auto" or by_library or not takes(self.weight):
            return convolution.conv3d(x_BTHWC, self.weight, bias, stride)
        # As there, only the last of the taps in time see a frame that begins a clip.
        seen = self.weight[:, :, -x_BTHWC.shape[1] :]
        return sf.causal_conv3d(x_BTHWC, seen, bias, impl=self.conv_impl)


def takes(weight: Tensor) -> bool:
    """Tells whether `conv_impl` is for this convolution: not from or to colours, whose few channels
    would waste most of a kernel's tile."""
    return not any(channels % 8 for channels in weight.shape[:2])


class ResidualBlock(nn.Module):
    def __init__(self, inputs: int, outputs: int, impl: str) -> None:
        super().__init__()
        self.residual = nn.ModuleDict(
            {
                "0": Norm(inputs, 3, impl),
                "2": CausalConv3d(inputs, outputs),
                "3": Norm(outputs, 3, impl),
                "6": CausalConv3d(outputs, outputs),
            }
        )
        self.shortcut = CausalConv3d(inputs, outputs, 1, 1) if inputs != outputs else nn.Identity()

    def forward(self, pending: PendingResidual, cache: FrameCache) -> PendingResidual:
        norm, conv, norm2, conv2 = cast(Any, self.residual.values())
        x_BTHWC, h_BTHWC = norm.silu(pending, cache)
        out_BTHWC, bias_C = conv.apart(h_BTHWC)
        between = PendingResidual(out_BTHWC, None, bias_C)
        del h_BTHWC, out_BTHWC  # gigabytes
        _, h_BTHWC = norm2.silu(between, cache)
        return PendingResidual(self.shortcut(x_BTHWC), *conv2.apart(h_BTHWC))


class AttentionBlock(nn.Module):
    """Attention of the pixels of each frame to each other, with one head."""

    def __init__(self, channels: int, impl: str) -> None:
        super().__init__()
        self.norm = Norm(channels, 2, impl)
        self.to_qkv = nn.Conv2d(channels, 3 * channels, 1)
        self.proj = nn.Conv2d(channels, channels, 1)

    def forward(self, pending: PendingResidual, cache: FrameCache) -> PendingResidual:
        x_BTHWC = pending.resolve()
        h_NLC = self.norm(x_BTHWC).flatten(0, 1).flatten(1, 2)
        qkv = F.linear(h_NLC, self.to_qkv.weight.flatten(1), self.to_qkv.bias)
        q, k, v = qkv[:, None].chunk(3, -1)
        h_NLC = F.scaled_dot_product_attention(q, k, v).squeeze(1)
        h_NLC = F.linear(h_NLC, self.proj.weight.flatten(1), self.proj.bias)
        return PendingResidual(x_BTHWC, h_NLC.view(x_BTHWC.shape))


class Downsample(nn.Module):
    """Downsampling to half the height and width and, with `time`, half the frames but the first."""

    def __init__(self, channels: int, time: bool) -> None:
        super().__init__()
        self.resample = nn.ModuleDict({"1": nn.Conv2d(channels, channels, 3, 2)})
        if time:
            self.time_conv = CausalConv3d(channels, channels, 3, 1, stride=2)

    def forward(self, pending: PendingResidual, cache: FrameCache) -> PendingResidual:
        x_BTHWC = pending.resolve()
        conv = cast(nn.Conv2d, self.resample["1"])
        x_BTHWC = convolution.conv2d(F.pad(x_BTHWC, (0, 0, 0, 1, 0, 1)), conv)
        if hasattr(self, "time_conv"):
            before = cache.before(x_BTHWC)
            cache.keep(x_BTHWC, 1)
            if before is not None:
                x_BTHWC = self.time_conv(torch.cat([before, x_BTHWC], 1))
        return PendingResidual(x_BTHWC)


class Upsample(nn.Module):
    """Upsampling to twice the height and width and, with `time`, twice the frames but the first."""

    def __init__(self, channels: int, time: bool) -> None:
        super().__init__()
        self.conv_impl = "auto"
        self.resample = nn.ModuleDict({"1": nn.Conv2d(channels, channels // 2, 3)})
        if time:
            self.time_conv = CausalConv3d(channels, 2 * channels, 3, 1)

    def forward(self, pending: PendingResidual, cache: FrameCache) -> PendingResidual:
        x_BTHWC = pending.resolve()
        if hasattr(self, "time_conv"):
            # The first frame of a clip stays one, and the others do not look back at it.
            first = x_BTHWC[:, : int(cache.starts)]
            later = x_BTHWC[:, int(cache.starts) :]
            behind = cache.prepend(later)
            if later.shape[1]:
                pairs_BTHW2C = self.time_conv(behind).unflatten(-1, (2, -1))
                later = pairs_BTHW2C.movedim(-2, 2).flatten(1, 2)
            x_BTHWC = torch.cat([first, later], 1)
        conv = cast(nn.Conv2d, self.resample["1"])
        if self.conv_impl == "auto" or not takes(conv.weight):
            return PendingResidual(convolution.upsampled_conv2d(x_BTHWC, conv.weight, conv.bias))
        weight_PQOHWC = convolution.folded(conv.weight).permute(2, 4, 0, 3, 5, 1)
        weight = weight_PQOHWC.to(x_BTHWC.dtype).contiguous().movedim(-1, 3)
        return PendingResidual(sf.upsampled_conv2d(x_BTHWC, weight, conv.bias, impl=self.conv_impl))


class Coder(nn.Module):
    """Base of encoder and decoder: the outer convolutions and the middle. The head is a norm, SiLU
    and a convolution."""

    def __init__(
        self, inputs: int, inner: int, middle: int, last: int, outputs: int, impl: str
    ) -> None:
        super().__init__()
        self.conv1 = CausalConv3d(inputs, inner)
        self.middle = nn.ModuleList(
            [
                ResidualBlock(middle, middle, impl),
                AttentionBlock(middle, impl),
                ResidualBlock(middle, middle, impl),
            ]
        )
        self.head = nn.ModuleDict({"0": Norm(last, 3, impl), "2": CausalConv3d(last, outputs)})

    def finish(self, pending: PendingResidual, cache: FrameCache) -> Tensor:
        norm, conv = cast(Any, self.head.values())
        return cast(Tensor, conv(norm.silu(pending, cache)[1]))


def _run(layers: nn.ModuleList, pending: PendingResidual, cache: FrameCache) -> PendingResidual:
    for layer in layers:
        pending = layer(pending, cache)
    return pending


class Encoder(Coder):
    def __init__(self, config: VAEConfig, impl: str) -> None:
        widths = [config.dim * m for m in config.multiples]
        layers: list[nn.Module] = []
        width = widths[0]
        for level, wide in enumerate(widths):
            for _ in range(config.blocks):
                layers.append(ResidualBlock(width, wide, impl))
                width = wide
            if level + 1 < len(widths):
                layers.append(Downsample(wide, config.halves_time[level]))
        super().__init__(3, widths[0], width, width, 2 * config.channels, impl)
        self.downsamples = nn.ModuleList(layers)

    def forward(self, x_BTHWC: Tensor, cache: FrameCache) -> Tensor:
        pending = PendingResidual(self.conv1(cache.prepend(x_BTHWC)))
        pending = _run(self.middle, _run(self.downsamples, pending, cache), cache)
        return self.finish(pending, cache)


class Decoder(Coder):
    def __init__(self, config: VAEConfig, impl: str) -> None:
        widths = [config.dim * m for m in config.multiples[::-1]]
        layers: list[nn.Module] = []
        width = widths[0]
        for level, wide in enumerate(widths):
            for _ in range(config.blocks + 1):
                layers.append(ResidualBlock(width, wide, impl))
                width = wide
            if level + 1 < len(widths):
                layers.append(Upsample(wide, config.halves_time[-1 - level]))
                width = wide // 2
        super().__init__(config.channels, widths[0], widths[0], width, 3, impl)
        self.upsamples = nn.ModuleList(layers)
        # Latents around a tile that its pixels depend on: each 3×3 convolution on the way reaches
        # one pixel further at its level. The one after an upsampling lies at the larger size.
        reach = 1
        for level in range(len(widths)):
            reach += 2 * (config.blocks + 1) + (level + 1 < len(widths))
            reach = reach if level + 1 == len(widths) else -(-reach // 2)
        self.reach = reach
        # Latent frames before its own that the last pixel frame of one depends on, from the head
        # back: two for each convolution over time, of which two are one where time has doubled.
        past = CONTEXT_FRAMES
        for level in reversed(range(len(widths))):
            past += 2 * (config.blocks + 1) * CONTEXT_FRAMES
            if level and config.halves_time[-level]:
                past = past // 2 + CONTEXT_FRAMES
        self.past_frames = past + 5 * CONTEXT_FRAMES

    def forward(self, z_BTHWC: Tensor, cache: FrameCache, tile: int | None) -> Tensor:
        pending = _run(self.middle, PendingResidual(self.conv1(cache.prepend(z_BTHWC))), cache)
        H, W = z_BTHWC.shape[2:4]
        if tile is None or tile >= max(H, W):
            return self.finish(_run(self.upsamples, pending, cache), cache)
        x_BTHWC = pending.resolve()
        bands = []
        for rows in _tiles(H, tile, self.reach):
            band = []
            for columns in _tiles(W, tile, self.reach):
                piece_BTHWC = x_BTHWC[:, :, rows.around, columns.around].contiguous()
                pixels = self.finish(
                    _run(self.upsamples, PendingResidual(piece_BTHWC), cache), cache
                )
                scale = pixels.shape[2] // piece_BTHWC.shape[2]
                band.append(pixels[:, :, rows.pixels(scale), columns.pixels(scale)])
            bands.append(torch.cat(band, 3))
        return torch.cat(bands, 2)


class Tile(NamedTuple):
    """Tile of latents along one side: start and end, and what is computed around them."""

    start: int
    end: int
    around: slice

    def pixels(self, scale: int) -> slice:
        """Pixels of the tile in what was computed."""
        first = self.around.start
        return slice((self.start - first) * scale, (self.end - first) * scale)


def _tiles(length: int, tile: int, reach: int) -> Iterator[Tile]:
    for start in range(0, length, tile):
        end = min(start + tile, length)
        yield Tile(start, end, slice(max(0, start - reach), min(length, end + reach)))


class WanVAE(nn.Module):
    """Wan2.1's VAE. impl: of the sfkernels ops. conv_impl: of `sfkernels.causal_conv3d` and
    `upsampled_conv2d`, or "auto" for PyTorch's convolutions and, on a CPU, Winograd's; PyTorch's
    are also strided ones, 1×1 and those from or to colours. tile: latents on a side of the tiles in
    which the decoder works at its larger levels, None for whole frames. Tiles take less memory and
    more time: each is computed with all that its pixels depend on, so the result is the same.

    Pixels are not clamped. Everything is computed in the weights' dtype."""

    spatial_factor = 8
    temporal_factor = 4

    def __init__(
        self,
        config: VAEConfig | None = None,
        impl: str = "auto",
        tile: int | None = None,
        conv_impl: str = "auto",
    ) -> None:
        super().__init__()
        self.config = config = VAEConfig() if config is None else config
        if tile is not None and tile < 1:
            raise ValueError(f"tile={tile}: must be at least 1 latent, or None for whole frames")
        self.latent_channels, self.tile = config.channels, tile
        self.encoder, self.decoder = Encoder(config, impl), Decoder(config, impl)
        self.past_frames = self.decoder.past_frames
        self.conv1 = CausalConv3d(2 * config.channels, 2 * config.channels, 1, 1)
        self.conv2 = CausalConv3d(config.channels, config.channels, 1, 1)
        for module in self.modules():
            if isinstance(module, CausalConv3d | Upsample):
                module.conv_impl = conv_impl

    def encode_chunk(
        self, pixels_BTCHW: Tensor, state: CausalState | None = None
    ) -> tuple[Tensor, CausalState]:
        """Encodes as `VideoCodec`: pixels [B, T, 3, H, W] to normalised latents [B, F, 16, H/8,
        W/8], the means of their distributions, in float32."""
        check_pixels(self, pixels_BTCHW, state is None)
        check_before("pixels", pixels_BTCHW, state)
        latents = []
        # The first frame makes a latent frame, then four at a time do: that bounds the memory.
        first = int(state is None)
        for chunk in (*pixels_BTCHW[:, :first].split(1, 1), *pixels_BTCHW[:, first:].split(4, 1)):
            if not chunk.shape[1]:
                continue
            cache = FrameCache(state, CONTEXT_FRAMES)
            x_BTHWC = chunk.to(self.conv1.weight.dtype).movedim(2, -1).contiguous()
            z_BFHWC = self.conv1(self.encoder(x_BTHWC, cache))
            latents.append(z_BFHWC[..., : self.latent_channels])
            state = cache.state()
        assert state is not None
        z_BFHWC = torch.cat(latents, 1).float()
        mean_C, std_C = _statistics(self.latent_channels, z_BFHWC.device)
        return ((z_BFHWC - mean_C) / std_C).movedim(-1, 2).contiguous(), state

    def decode_chunk(
        self, latents_BFCHW: Tensor, state: CausalState | None = None
    ) -> tuple[Tensor, CausalState]:
        """Decodes as `VideoCodec`: normalised latents [B, F, 16, H, W] to pixels [B, T, 3, 8H,
        8W]."""
        check_latents(self, latents_BFCHW)
        check_before("latents", latents_BFCHW, state)
        mean_C, std_C = _statistics(self.latent_channels, latents_BFCHW.device)
        z_BFHWC = latents_BFCHW.float().movedim(2, -1) * std_C + mean_C
        cache = FrameCache(state, CONTEXT_FRAMES)
        z_BFHWC = self.conv2(z_BFHWC.to(self.conv2.weight.dtype).contiguous())
        pixels_BTHWC = self.decoder(z_BFHWC, cache, self.tile)
        return pixels_BTHWC.movedim(-1, 2), cache.state()


@cached_tensors
def _statistics(channels: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of latents [C]; once a device, so that a CUDA graph copies none
    from the host."""
    if channels != len(MEAN):
        raise ValueError(f"{channels} channels of latents: their mean and variance are not known")
    return torch.tensor(MEAN, device=device), torch.tensor(STD, device=device)
