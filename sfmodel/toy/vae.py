"""The codec of the toy world: a fixed causal encoder and a small learned causal decoder.

`encode_chunk` and `decode_chunk` are those of `sfmodel.vae.codec.VideoCodec`.
`python -m sfmodel.toy.vae` trains the decoder and writes the shipped weights.

Shapes: B batch, T pixel frames, F latent frames, N = B·F, C channels, H × W the size of whichever
is meant: pixels are 8 times as high and wide as latents. S = 4 sub-frames of a latent frame.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sfmodel.extras import needed
from sfmodel.toy import world
from sfmodel.vae.codec import check_latents, check_pixels
from sfmodel.weights.saving import save_tensors

WEIGHTS = Path(__file__).parent / "weights" / "toy_vae.safetensors"

# Mean and standard deviation of the unnormalised latents (red, green, blue, motion), over 1280
# clips of 24 latent frames after the still, seeds 0..39.
_MEAN = (-0.9195, -0.9210, -0.9211, 0.0)
_STD = (0.2751, 0.2625, 0.2661, 0.1322)


class EncoderState(NamedTuple):
    """State of the encoder in a clip: `frames`, the pixel frames seen. No latent frame looks at
    another one's pixels, so there are no tensors to keep."""

    frames: int


class DecoderState(NamedTuple):
    """State of the decoder in a clip: `last_BCHW`, the last latent frame."""

    last_BCHW: Tensor


class LatentSample(NamedTuple):
    latents_BFCHW: Tensor
    truth: world.Truth
    sentences: list[str]


class ToyVAE(nn.Module):
    """Toy codec. A latent frame has four channels: the mean RGB of each 8 × 8 block over the
    sub-frames, and the motion, which is the block's luminance (mean of RGB) in the last sub-frame
    minus that in the first. Each channel has zero mean and unit variance over the toy world.

    The decoder predicts how much of each pixel the ball covers in each sub-frame, at full
    resolution, and its colour, at latent resolution: edges stay sharp with few channels."""

    latent_channels = 4
    spatial_factor = 8
    temporal_factor = 4
    past_frames = 1
    mean_C11: Tensor
    std_C11: Tensor

    def __init__(self, width: int = 64) -> None:
        super().__init__()
        # Normalisation is part of the latents' definition, not of the weights.
        self.register_buffer("mean_C11", torch.tensor(_MEAN).view(-1, 1, 1), persistent=False)
        self.register_buffer("std_C11", torch.tensor(_STD).view(-1, 1, 1), persistent=False)
        inputs = 2 * self.latent_channels + 1  # this frame, the previous one, "is the still"
        self.stem = nn.Conv2d(inputs, width, 3, padding=1)
        self.body = nn.Sequential(*(_Residual(width) for _ in range(3)))
        self.colour = nn.Conv2d(width, 3, 1)
        self.cover = nn.Sequential(
            _up(width, 24),
            nn.SiLU(),
            nn.Conv2d(24, 24, 3, padding=1),
            nn.SiLU(),
            _up(24, 16),
            nn.SiLU(),
            nn.Conv2d(16, 16, 3, padding=1),
            nn.SiLU(),
            _up(16, self.temporal_factor),
        )

    @classmethod
    def from_pretrained(cls, path: str | Path = WEIGHTS) -> ToyVAE:
        """The trained codec, in evaluation mode. Raises ValueError where there is no such file."""
        if not Path(path).is_file():
            raise ValueError(f"{path}: no such weights; `python -m sfmodel.toy.vae` makes them")
        with needed():  # the class itself needs no more than PyTorch
            from safetensors.torch import load_file

        vae = cls()
        vae.load_state_dict(load_file(path))
        return vae.eval()

    def encode_chunk(
        self, pixels_BTCHW: Tensor, state: EncoderState | None = None
    ) -> tuple[Tensor, EncoderState]:
        """Encodes as `VideoCodec`: pixels [B, T, 3, H, W] to latents [B, F, 4, H / 8, W / 8]."""
        check_pixels(self, pixels_BTCHW, state is None)
        T = pixels_BTCHW.shape[1]
        pixels_NCHW = pixels_BTCHW.to(self.mean_C11.dtype).flatten(0, 1)
        pooled = F.avg_pool2d(pixels_NCHW, self.spatial_factor)
        latents = self._latents_of(pooled.unflatten(0, (-1, T)), state is None)
        return latents, EncoderState(T + (state.frames if state else 0))

    def _latents_of(self, pooled_BTCHW: Tensor, start: bool) -> Tensor:
        """Latents [B, F, 4, H, W] of block means of pixels; both share their H and W here."""
        groups_BFSCHW = pooled_BTCHW[:, int(start) :].unflatten(1, (-1, self.temporal_factor))
        difference = groups_BFSCHW[:, :, -1] - groups_BFSCHW[:, :, 0]
        raw = torch.cat([groups_BFSCHW.mean(2), difference.mean(2, keepdim=True)], dim=2)
        if start:
            still = F.pad(pooled_BTCHW[:, :1], (0, 0, 0, 0, 0, 1))  # no motion
            raw = torch.cat([still, raw], dim=1)
        return (raw - self.mean_C11) / self.std_C11

    def decode_chunk(
        self, latents_BFCHW: Tensor, state: DecoderState | None = None
    ) -> tuple[Tensor, DecoderState]:
        """Decodes as `VideoCodec`: latents [B, F, 4, H, W] to pixels [B, T, 3, 8H, 8W]."""
        check_latents(self, latents_BFCHW)
        latents = latents_BFCHW.to(self.mean_C11.dtype)
        frames = latents.shape[1]
        before = torch.zeros_like(latents[:, 0]) if state is None else state.last_BCHW
        if latents[:, 0].shape != before.shape:
            raise ValueError(
                f"latents have frames {[*latents[:, 0].shape]}: must be {[*before.shape]} as before"
            )
        previous = torch.cat([before[:, None], latents[:, :-1]], dim=1)
        still = torch.zeros_like(latents[:, :, :1])
        if state is None:
            still[:, 0] = 1
        inputs = torch.cat([latents, previous, still], dim=2).flatten(0, 1)
        pixels = self._decode(inputs).unflatten(0, (-1, frames)).flatten(1, 2)
        if state is None:
            # The still is the last sub-frame of its latent frame; there is nothing before it.
            pixels = pixels[:, self.temporal_factor - 1 :]
        # A copy: the caller may write its next chunk into the same memory.
        return pixels, DecoderState(latents[:, -1].clone())

    def _decode(self, inputs_NCHW: Tensor) -> Tensor:
        """Sub-frames [N, 4, 3, 8H, 8W] of each latent frame on its own."""
        x_NCHW = self.body(self.stem(inputs_NCHW))
        cover_NSHW = self.cover(x_NCHW).sigmoid()
        colour_NCHW = F.interpolate(
            self.colour(x_NCHW), scale_factor=self.spatial_factor, mode="bilinear"
        )
        return (cover_NSHW[:, :, None] * colour_NCHW[:, None] - 1).clamp(max=1)

    @torch.no_grad()
    def sample_latents(
        self,
        batch: int,
        latent_frames: int,
        seed: int | torch.Generator,
        *,
        drop: float = 0.0,
        empty: float = 0.0,
    ) -> LatentSample:
        """The latents [B, F, 4, 8, 8] of `world.sample` with the same arguments and seed, up to
        rounding, without its pixels."""
        generator = world.generator_of(seed)
        frames = 1 + self.temporal_factor * (latent_frames - 1)
        truth = world.draw(batch, frames, generator, self.mean_C11.device)
        sentences = world.sentences(truth, generator, drop=drop, empty=empty)
        return LatentSample(self.latents_of(truth), truth, sentences)

    @torch.no_grad()
    def latents_of(self, truth: world.Truth) -> Tensor:
        """The latents [B, F, 4, 8, 8] of `world.render`, up to rounding, without its pixels: the
        encoder is linear, so it sees the ball's outline alone."""
        cover_BTHW = F.avg_pool2d(world.coverage(truth), self.spatial_factor)
        pooled_BTCHW = cover_BTHW[:, :, None] * (2 * truth.rgb_B3)[:, None, :, None, None] - 1
        return self._latents_of(pooled_BTCHW, start=True)


class _Residual(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(width, width, 3, padding=1)

    def forward(self, x_NCHW: Tensor) -> Tensor:
        return x_NCHW + self.conv(F.silu(x_NCHW))


def _up(inputs: int, outputs: int) -> nn.Sequential:
    """Upsamples to twice the height and width."""
    return nn.Sequential(nn.Conv2d(inputs, 4 * outputs, 3, padding=1), nn.PixelShuffle(2))


def train(steps: int, seed: int = 0, clips: int = 4, peak_rate: float = 3e-3) -> ToyVAE:
    """Trains the decoder on `clips` new clips of 9 latent frames each step, printing progress.

    The latents carry noise and a wrong scale, as those of a diffusion model do: the decoder learns
    to draw one clean ball from them."""
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    vae = ToyVAE()
    optimizer = torch.optim.AdamW(vae.parameters(), peak_rate, betas=(0.9, 0.98), weight_decay=0.01)
    began, running = time.perf_counter(), math.nan
    for step in range(1, steps + 1):
        rate = peak_rate * min(step / 100, 0.5 + 0.5 * math.cos(math.pi * step / steps))
        for group in optimizer.param_groups:
            group["lr"] = rate
        pixels_BTCHW = world.sample(clips, 33, generator).pixels_BTCHW
        latents_BFCHW, _ = vae.encode_chunk(pixels_BTCHW)
        decoded_BTCHW, _ = vae.decode_chunk(disturb(latents_BFCHW, generator))
        error = decoded_BTCHW - pixels_BTCHW
        mse = error.square().mean()
        # The absolute error pulls small errors to zero, where squares no longer do.
        loss = mse + 0.1 * error.abs().mean()
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
        optimizer.step()
        running = mse.item() if step == 1 else 0.98 * running + 0.02 * mse.item()
        if step % 100 == 0 or step == steps:
            psnr, seconds = 10 * math.log10(4 / running), time.perf_counter() - began
            print(f"step {step:5d}/{steps}  PSNR {psnr:5.2f} dB  {seconds:4.0f} s", flush=True)
    return vae.eval()


def disturb(latents_BFCHW: Tensor, generator: torch.Generator) -> Tensor:
    """Latents with noise of σ up to 0.15 and a scale error of some 3 percent, by clip."""
    one_per_clip = (len(latents_BFCHW), 1, 1, 1, 1)
    sigma = 0.15 * torch.rand(one_per_clip, generator=generator)
    scale = 1 + 0.03 * torch.randn(one_per_clip, generator=generator)
    return latents_BFCHW * scale + sigma * torch.randn(latents_BFCHW.shape, generator=generator)


def main() -> None:
    parser = argparse.ArgumentParser(description="Train the decoder of the toy world's codec.")
    parser.add_argument("--steps", type=int, default=7000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=WEIGHTS)
    arguments = parser.parse_args()
    vae = train(arguments.steps, arguments.seed)
    settings = {"steps": arguments.steps, "seed": arguments.seed}
    save_tensors(arguments.out, vae.state_dict(), {"training": json.dumps(settings)})
    print(f"wrote {arguments.out}")


if __name__ == "__main__":
    main()
