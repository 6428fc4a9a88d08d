"""The toy world: short videos of one coloured ball that bounces in a dark box, with known physics.

Videos are made on the fly from a seed. `measure` reads the physics back from pixels alone, so that
a generated video can be judged without a learned judge.

Units are pixels and pixel frames. x points right, y points down, and pixel i covers [i, i + 1], so
that the box is [0, 64] × [0, 64].

Shapes: B batch, T pixel frames, N = B·T, C = 3 colours, H = W = 64, P palette; 2 is (x, y).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

SIZE = 64

# The largest component of a colour is 1, so that brightness is the largest component of the ball.
# No component is 0: every colour then shows in a plain mean over RGB.
COLOURS: dict[str, tuple[float, float, float]] = {
    "red": (1.0, 0.15, 0.15),
    "green": (0.15, 1.0, 0.25),
    "blue": (0.2, 0.35, 1.0),
    "yellow": (1.0, 0.9, 0.15),
    "magenta": (1.0, 0.2, 0.9),
    "cyan": (0.15, 0.95, 1.0),
    "white": (1.0, 1.0, 1.0),
}
# What a word means, as a range that values are drawn from uniformly.
RADIUS = {"small": (7.0, 9.0), "large": (11.0, 14.0)}  # px
BRIGHTNESS = {"dim": (0.45, 0.6), "bright": (0.8, 1.0)}  # black 0, full 1
SPEED = {"slowly": (0.7, 1.2), "fast": (1.8, 2.5)}  # px per frame
# Index i is the sector of ±22.5° around the angle i · 45°; angles run from +x to +y, clockwise on
# the screen.
DIRECTIONS = (
    "right",
    "down and right",
    "down",
    "down and left",
    "left",
    "up and left",
    "up",
    "up and right",
)
# No ball touches a wall in this many first frames, so that the sentence's direction can be seen.
FREE_FRAMES = 8

_BLOCK = 64  # frames rendered at a time: 1 MiB, which stays in a core's cache


@dataclass(frozen=True)
class Truth:
    """Physics of a batch of videos.

    colour_B: index into COLOURS. radius_B in px, brightness_B in 0..1, speed_B in px per frame.
    angle_B: of the first movement, radians in [0, 2π) from +x to +y.
    position_BT2: the ball's centre in px.
    """

    colour_B: Tensor
    radius_B: Tensor
    brightness_B: Tensor
    speed_B: Tensor
    angle_B: Tensor
    position_BT2: Tensor

    @property
    def rgb_B3(self) -> Tensor:
        """The ball's colour with its brightness, in 0..1."""
        return _palette(self.colour_B.device)[self.colour_B] * self.brightness_B[:, None]


class Sample(NamedTuple):
    """Videos. pixels_BTCHW: in [-1, 1], the background -1. sentences: one for each video."""

    pixels_BTCHW: Tensor
    truth: Truth
    sentences: list[str]


def draw(
    batch: int,
    frames: int,
    seed: int | torch.Generator,
    device: torch.device | str = "cpu",
) -> Truth:
    """Draws `batch` balls and moves them for `frames` frames. Equal seeds give equal balls on every
    device, and their first frames do not depend on `frames`."""
    if batch < 1 or frames < 1:
        raise ValueError(f"batch={batch}, frames={frames}: must be at least 1")
    generator = generator_of(seed)

    def uniform(low: Tensor | float, high: Tensor | float) -> Tensor:
        return low + (high - low) * torch.rand(batch, generator=generator, dtype=torch.float64)

    def of_bucket(buckets: Mapping[str, tuple[float, float]]) -> Tensor:
        ranges = torch.tensor(list(buckets.values()), dtype=torch.float64)
        low, high = ranges[torch.randint(len(ranges), (batch,), generator=generator)].unbind(1)
        return uniform(low, high)

    colour_B = torch.randint(len(COLOURS), (batch,), generator=generator)
    radius_B, brightness_B, speed_B = of_bucket(RADIUS), of_bucket(BRIGHTNESS), of_bucket(SPEED)
    angle_B = uniform(0.0, 2 * math.pi)
    step_B2 = speed_B[:, None] * torch.stack([angle_B.cos(), angle_B.sin()], dim=1)
    free_B2 = step_B2 * FREE_FRAMES
    low_B2 = radius_B[:, None] - free_B2.clamp(max=0)
    high_B2 = SIZE - radius_B[:, None] - free_B2.clamp(min=0)
    start_B2 = torch.stack([uniform(low_B2[:, i], high_B2[:, i]) for i in range(2)], dim=1)
    position_BT2 = bounce(start_B2, step_B2, radius_B, frames)
    values = (radius_B, brightness_B, speed_B, angle_B, position_BT2)
    return Truth(colour_B.to(device), *(v.to(device, torch.float32) for v in values))


def bounce(start_B2: Tensor, step_B2: Tensor, radius_B: Tensor, frames: int) -> Tensor:
    """Centres [B, T, 2] of balls that start at `start` and move by `step` each frame. Where a rim
    meets a wall, also between two frames, the ball is reflected: a free ball's path, folded."""
    time_T1 = torch.arange(frames, dtype=start_B2.dtype, device=start_B2.device)[:, None]
    free_BT2 = start_B2[:, None] + step_B2[:, None] * time_T1
    radius_B11 = radius_B[:, None, None]
    span_B11 = SIZE - 2 * radius_B11
    folded_BT2 = (free_BT2 - radius_B11).remainder(2 * span_B11)
    return radius_B11 + span_B11 - (folded_BT2 - span_B11).abs()


def coverage(truth: Truth) -> Tensor:
    """The share of each pixel that the ball covers [B, T, H, W], float32 in 0..1. The edge is one
    pixel wide."""
    B, T, _ = truth.position_BT2.shape
    centre_axis = torch.arange(SIZE, device=truth.radius_B.device) + 0.5
    squares_N2S = (truth.position_BT2.reshape(-1, 2, 1) - centre_axis).square()
    outer_N11 = (truth.radius_B + 0.5).repeat_interleave(T)[:, None, None]
    out_NHW = torch.empty(B * T, SIZE, SIZE, device=truth.radius_B.device)
    for i in range(0, B * T, _BLOCK):
        part = slice(i, i + _BLOCK)
        x_N1W, y_NH1 = squares_N2S[part, 0, None, :], squares_N2S[part, 1, :, None]
        distance_NHW = torch.add(x_N1W, y_NH1, out=out_NHW[part]).sqrt_()
        distance_NHW.neg_().add_(outer_N11[part]).clamp_(0, 1)
    return out_NHW.view(B, T, SIZE, SIZE)


def render(truth: Truth) -> Tensor:
    """The videos [B, T, 3, 64, 64] of the balls, float32 in [-1, 1]."""
    B, T, _ = truth.position_BT2.shape
    coverage_BTHW = coverage(truth)
    pixels_BTCHW = torch.empty(B, T, 3, SIZE, SIZE, device=coverage_BTHW.device)
    background = torch.full((), -1.0, device=coverage_BTHW.device)
    for pixels, cover, rgb in zip(pixels_BTCHW, coverage_BTHW, 2 * truth.rgb_B3, strict=True):
        torch.addcmul(background, cover[:, None], rgb[:, None, None], out=pixels)
    return pixels_BTCHW


def sample(
    batch: int, frames: int, seed: int | torch.Generator, *, drop: float = 0.0, empty: float = 0.0
) -> Sample:
    """Videos with their truth and sentences. drop, empty: as in `sentences`."""
    generator = generator_of(seed)
    truth = draw(batch, frames, generator)
    return Sample(render(truth), truth, sentences(truth, generator, drop=drop, empty=empty))


def sentences(
    truth: Truth, seed: int | torch.Generator = 0, *, drop: float = 0.0, empty: float = 0.0
) -> list[str]:
    """One English sentence for each video, such as "a small bright red ball moves up slowly".

    drop: the probability that an attribute (size, brightness, colour, direction, speed) goes
    unnamed, each on its own. empty: the probability of an empty sentence, as
    classifier-free guidance needs in training."""
    for name, value in (("drop", drop), ("empty", empty)):
        if not 0 <= value <= 1:
            raise ValueError(f"{name}={value}: must be a probability, 0 to 1")
    named_B6 = torch.rand(len(truth.radius_B), 6, generator=generator_of(seed))
    named_B6 = named_B6 >= torch.tensor([drop] * 5 + [empty])
    values = (truth.radius_B, truth.brightness_B, truth.colour_B, truth.angle_B, truth.speed_B)
    out = []
    for named, radius, brightness, colour, angle, speed in zip(
        named_B6.tolist(), *(v.tolist() for v in values), strict=True
    ):
        words = (
            bucket(RADIUS, radius),
            bucket(BRIGHTNESS, brightness),
            list(COLOURS)[colour],
            direction(angle),
            bucket(SPEED, speed),
        )
        kept = [word if keep else "" for word, keep in zip(words, named, strict=False)]
        moves = "moves" if kept[3] or kept[4] else ""
        sentence = " ".join(filter(None, ["a", *kept[:3], "ball", moves, *kept[3:]]))
        out.append(sentence if named[5] else "")
    return out


def bucket(buckets: Mapping[str, tuple[float, float]], value: float) -> str:
    """The word of RADIUS, BRIGHTNESS or SPEED for a value: the range whose middle is nearest."""
    return min(buckets, key=lambda word: abs(sum(buckets[word]) / 2 - value))


def direction(angle: float) -> str:
    """The words for a direction of movement; `angle` in radians from +x to +y."""
    return DIRECTIONS[round(angle / (math.pi / 4)) % 8]


@dataclass(frozen=True)
class Measurement:
    """Physics that pixels show, frame by frame. Where nothing is bright, `position`, `radius` and
    `rgb` are NaN and `colour` is -1.

    position_BT2, radius_BT: in px, of the disc with the same centroid and area.
    rgb_BT3: in 0..1, the mean inside the disc. colour_BT: index of the nearest of COLOURS.
    outside_BT: share of the light that lies outside the disc; a second ball or a ghost raises it.
    fill_BT: mean coverage inside the disc; holes and overlaps lower it.
    edge_BT: mean absolute difference from a sharp disc, as a share of the disc: blur raises it.
    """

    position_BT2: Tensor
    radius_BT: Tensor
    rgb_BT3: Tensor
    colour_BT: Tensor
    outside_BT: Tensor
    fill_BT: Tensor
    edge_BT: Tensor

    @property
    def brightness_BT(self) -> Tensor:
        return self.rgb_BT3.amax(-1)

    @property
    def velocity_BT2(self) -> Tensor:
        """Movement between neighbouring frames [B, T - 1, 2] in px per frame."""
        return self.position_BT2.diff(dim=1)

    @property
    def acceleration_BT2(self) -> Tensor:
        """Change of velocity around each inner frame [B, T - 2, 2] in px per frame²."""
        return self.velocity_BT2.diff(dim=1)

    @property
    def free_BT(self) -> Tensor:
        """Flags [B, T - 2]: the ball is too far from every wall to bounce between the neighbouring
        frames, so that any acceleration there breaks the laws of this world."""
        centre_BT2, radius_BT1 = self.position_BT2[:, 1:-1], self.radius_BT[:, 1:-1, None]
        gap_BT2 = torch.minimum(centre_BT2, SIZE - centre_BT2) - radius_BT1
        return (gap_BT2 > max(SPEED["fast"]) + 1).all(-1)

    @property
    def clean_BT(self) -> Tensor:
        """Flags [B, T]: the frame shows one sharp ball and nothing else."""
        return (self.outside_BT < 0.05) & (self.fill_BT > 0.9) & (self.edge_BT < 0.2)


def measure(pixels_BTCHW: Tensor) -> Measurement:
    """Reads position, size, colour and cleanness back from pixels [B, T, 3, 64, 64] in [-1, 1]
    (values somewhat beyond are clamped). Knows nothing of how the video was made."""
    if pixels_BTCHW.ndim != 5 or pixels_BTCHW.shape[2:] != (3, SIZE, SIZE):
        raise ValueError(
            f"pixels have shape {[*pixels_BTCHW.shape]}: must be [B, T, 3, {SIZE}, {SIZE}]"
        )
    B, T = pixels_BTCHW.shape[:2]
    parts = [_measure(part) for part in pixels_BTCHW.flatten(0, 1).float().split(_BLOCK)]
    whole = (torch.cat(part_N).unflatten(0, (B, T)) for part_N in zip(*parts, strict=True))
    return Measurement(*whole)


def _measure(pixels_NCHW: Tensor) -> tuple[Tensor, ...]:
    """The fields of Measurement, in its order, for N frames."""
    rgb_NCHW = ((pixels_NCHW + 1) / 2).clamp(0, 1)
    light_NHW = rgb_NCHW.mean(1)
    total_N = light_NHW.sum((1, 2))
    # The light of a typical lit pixel: exact for a disc of one colour, whatever its size.
    level_N = light_NHW.square().sum((1, 2)) / total_N.clamp(min=1e-6)
    # A ramp around half of that light keeps the position sub-pixel, and leaves faint noise and
    # halos out.
    cover_NHW = light_NHW / level_N.clamp(min=1e-6)[:, None, None]
    body_NHW = (1.25 * cover_NHW - 0.125).clamp(0, 1)
    area_N = body_NHW.sum((1, 2))
    seen_N = (total_N > 4) & (area_N > 4)
    axis = torch.arange(SIZE, device=light_NHW.device) + 0.5
    moments = [(body_NHW.sum(dim) * axis).sum(1) for dim in (1, 2)]
    position_N2 = torch.stack(moments, dim=1) / area_N.clamp(min=1e-6)[:, None]
    radius_N = (area_N / math.pi).sqrt()

    x_NW, y_NH = (axis - position_N2[..., None]).square().unbind(1)
    rim_NHW = (x_NW[:, None, :] + y_NH[:, :, None]).sqrt() - radius_N[:, None, None]
    disc_NHW = (0.5 - rim_NHW).clamp(0, 1)
    core_NHW = (rim_NHW < -1.5).float()
    core_N = core_NHW.sum((1, 2)).clamp(min=1)
    capped_NHW = cover_NHW.clamp(max=1)
    rgb_N3 = torch.einsum("nchw,nhw->nc", rgb_NCHW, core_NHW) / core_N[:, None]
    hue_N3 = rgb_N3 / rgb_N3.amax(1, keepdim=True).clamp(min=1e-6)
    nearest_N = torch.cdist(hue_N3, _palette(hue_N3.device)).argmin(1)
    outside_N = (light_NHW * (rim_NHW > 2)).sum((1, 2)) / total_N.clamp(min=1e-6)
    fill_N = (capped_NHW * core_NHW).sum((1, 2)) / core_N
    edge_N = (capped_NHW - disc_NHW).abs().sum((1, 2)) / disc_NHW.sum((1, 2)).clamp(min=1)
    return (
        position_N2.masked_fill(~seen_N[:, None], math.nan),
        radius_N.masked_fill(~seen_N, math.nan),
        rgb_N3.masked_fill(~seen_N[:, None], math.nan),
        nearest_N.masked_fill(~seen_N, -1),
        outside_N.masked_fill(~seen_N, 1.0),
        fill_N.masked_fill(~seen_N, 0.0),
        edge_N.masked_fill(~seen_N, 1.0),
    )


def generator_of(seed: int | torch.Generator) -> torch.Generator:
    """The seed's generator; a generator stands for itself and goes on from where it is."""
    return seed if isinstance(seed, torch.Generator) else torch.Generator().manual_seed(seed)


def _palette(device: torch.device) -> Tensor:
    return torch.tensor(list(COLOURS.values()), device=device)
