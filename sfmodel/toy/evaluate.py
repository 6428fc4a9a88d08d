"""Distance of a model's videos from the toy world, frame by frame: what they show, read back from
pixels alone, against real videos that it has never seen.

The distance of a frame is the Fréchet distance, between generated and real videos, of what the ball
is and does there: position, radius, colour with brightness, velocity, speed and acceleration, each
in units of its deviation in real videos. Its floor is that of other real videos through the codec.

The exposure gap is the distance of what a model makes of its own past minus the distance of what
the same model makes of a real past: what self forcing (arXiv 2506.08009) is to close.

Shapes: B videos, T pixel frames, F latent frames, C channels, H×W latents, D statistics.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from sfmodel.config import Preset
from sfmodel.dit import DiT
from sfmodel.extras import needed
from sfmodel.files import atomic
from sfmodel.schedule import check_euler
from sfmodel.stream import Stream
from sfmodel.toy import world
from sfmodel.toy.text import ToyTextEncoder
from sfmodel.toy.vae import ToyVAE

with needed():
    from rich.table import Table

STATISTICS = ("x", "y", "radius", "red", "green", "blue", "vx", "vy", "speed", "acceleration")
STILL = slice(0, 6)  # those of a frame alone
REAL = 1024  # videos that the others are compared with
IMPOSSIBLE = 0.75  # px per frame²: more, far from every wall, breaks the laws of the world
BATCH = 128  # videos at a time
DECODED = 128 * 28  # latent frames at a time
MEASURES = {
    "distance": "Fréchet distance",
    "radius": "mean drift from the first frame, px",
    "brightness": "the same, 0 to 1",
    "colour": "share of balls of another one",
    "impossible": "share of moves far from walls",
    "unclean": "share of frames",
}


class Measurements(NamedTuple):
    """Measurements of videos, [B, F] each but the first. statistics [B, F, D]: as `statistics` has
    them. radius in px, brightness in 0..1, colour an index; whether a frame is clean
    (`world.Measurement.clean_BT`); whether, in a pixel frame since the latent frame before, the
    ball was far from every wall (free), and whether its movement then changed (impossible)."""

    statistics: Tensor
    radius: Tensor
    brightness: Tensor
    colour: Tensor
    clean: Tensor
    free: Tensor
    impossible: Tensor


def measure(pixels_BTCHW: Tensor) -> Measurements:
    """Measurements of videos of T = 1 + 4·(F − 1) pixel frames."""
    m = world.measure(pixels_BTCHW)
    at = slice(None, None, ToyVAE.temporal_factor)
    jumps = m.acceleration_BT2.norm(dim=-1).nan_to_num(math.inf) > IMPOSSIBLE

    def since_last(flags_BT: Tensor) -> Tensor:
        """Flags of latent frames: whether an inner pixel frame's is set since the one before."""
        padded = F.pad(flags_BT, (0, 1))  # nothing is known of the last one
        still = torch.zeros_like(padded[:, :1])
        return torch.cat([still, padded.unflatten(1, (-1, ToyVAE.temporal_factor)).any(2)], 1)

    return Measurements(
        statistics(m.position_BT2[:, at], m.radius_BT[:, at], m.rgb_BT3[:, at]),
        m.radius_BT[:, at],
        m.brightness_BT[:, at],
        m.colour_BT[:, at],
        m.clean_BT[:, at],
        since_last(m.free_BT),
        since_last(m.free_BT & jumps),
    )


def statistics(position_BF2: Tensor, radius_BF: Tensor, rgb_BF3: Tensor) -> Tensor:
    """Statistics [B, F, D], in the order of STATISTICS, of the last pixel frame of each latent
    frame. Velocity is the mean since the latent frame before. A frame without a ball is all zeros,
    and so is a change where there is no frame before it."""
    velocity, change = torch.zeros_like(position_BF2), torch.zeros_like(position_BF2)
    velocity[:, 1:] = position_BF2.diff(dim=1) / ToyVAE.temporal_factor
    change[:, 2:] = velocity[:, 1:].diff(dim=1) / ToyVAE.temporal_factor
    lengths = [each.norm(dim=-1, keepdim=True) for each in (velocity, change)]
    rows = [position_BF2, radius_BF[..., None], rgb_BF3, velocity, *lengths]
    return torch.cat(rows, -1).nan_to_num(0.0)


def frechet(a_ND: Tensor, b_ND: Tensor) -> float:
    """The squared 2-Wasserstein distance of two Gaussians with the means and covariances of a and
    b: ‖μa − μb‖² + tr(Σa + Σb − 2·(Σa·Σb)^½)."""
    a, b = a_ND.double(), b_ND.double()
    cov_a, cov_b = torch.cov(a.T), torch.cov(b.T)
    # Of a product of two positive matrices, whose eigenvalues are real and not negative.
    root = torch.linalg.eigvals(cov_a @ cov_b).real.clamp(min=0).sqrt().sum()
    apart = (a.mean(0) - b.mean(0)).square().sum()
    return float(apart + cov_a.trace() + cov_b.trace() - 2 * root)


def distances(made_BFD: Tensor, real_NFD: Tensor, which: slice = slice(None)) -> list[float]:
    """The Fréchet distance of each frame. which: of the statistics."""
    scale = real_NFD[:, 2:].flatten(0, 1).std(0).clamp(min=1e-6)
    pairs = zip(made_BFD.unbind(1), real_NFD.unbind(1), strict=False)
    return [frechet((a / scale)[:, which], (b / scale)[:, which]) for a, b in pairs]


@dataclass(frozen=True)
class Sampling:
    """The way a model is sampled. euler: so many equal Euler steps (flow-matching models) instead
    of the preset's few steps with fresh noise in between. given: latent frames of a real video that
    each begins with, whole chunks."""

    preset: Preset
    euler: int = 0
    given: int = 0

    def __post_init__(self) -> None:
        self.preset.check()
        check_euler(self.euler)
        first, chunk = self.preset.first or self.preset.chunk, self.preset.chunk
        if self.given and (self.given < first or (self.given - first) % chunk):
            raise ValueError(f"given={self.given}: must be {first} plus a multiple of {chunk}")


def generate(
    model: DiT,
    sampling: Sampling,
    text_BTE: Tensor,
    frames: int,
    *,
    seed: int = 0,
    context_BFCHW: Tensor | None = None,
    start_BFCHW: Tensor | None = None,
) -> Tensor:
    """Latents [B, F, C, H, W] that a model generates chunk by chunk, on its own past, or, where
    real latents are given as context, every chunk on theirs. start: the first of them."""
    preset, euler = sampling.preset, sampling.euler
    stream = Stream(model, None, text_BTE, preset, seed=seed, batch=len(text_BTE), euler=euler)
    if start_BFCHW is not None:
        stream.give(start_BFCHW)
    made = stream.denoise().clone()
    while (begin := made.shape[1]) < frames:
        if context_BFCHW is not None:
            stream.update(context_BFCHW[:, begin - stream.size : begin])
        made = torch.cat([made, stream.denoise()], 1)
    return made[:, :frames]


class HeldOut(NamedTuple):
    """Data that no model has seen. real: statistics [N, F, D] of real videos. text, sentences,
    latents: prompts, and one real clip for each, other than those."""

    real_NFD: Tensor
    text_BTE: Tensor
    latents_BFCHW: Tensor
    sentences: list[str]


@torch.no_grad()
def held_out(codec: ToyVAE, frames: int, videos: int, split: str = "test") -> HeldOut:
    """Real videos and prompts of a split: "test", or "validation", on which settings are chosen."""
    seed = {"test": 7_000_001, "validation": 8_000_001}[split]
    real = []
    for i in range(-(-REAL // BATCH)):
        truth = world.draw(BATCH, 1 + codec.temporal_factor * (frames - 1), seed + i)
        some = replace(truth, position_BT2=truth.position_BT2[:, :: codec.temporal_factor])
        m = world.measure(world.render(some))
        real.append(statistics(m.position_BT2, m.radius_BT, m.rgb_BT3))
    clips = codec.sample_latents(videos, frames, seed + 1000)
    text_BTE = ToyTextEncoder()(clips.sentences)
    return HeldOut(torch.cat(real), text_BTE, clips.latents_BFCHW, clips.sentences)


@torch.no_grad()
def seen_in(codec: ToyVAE, latents_BFCHW: Tensor) -> Measurements:
    """Measurements of latents. Raises FloatingPointError where one holds NaN or infinity."""
    bad = (~latents_BFCHW.isfinite()).flatten(2).any(2).nonzero().tolist()
    if bad:
        raise FloatingPointError(
            f"video {bad[0][0]} holds NaN or infinity from latent frame {bad[0][1]} on: the "
            "weights are damaged, or the arithmetic overflows"
        )
    device = codec.mean_C11.device
    split = latents_BFCHW.split(max(1, DECODED // latents_BFCHW.shape[1]))
    parts = [measure(codec.decode_chunk(part.to(device))[0].cpu()) for part in split]
    return Measurements(*(torch.cat(each) for each in zip(*parts, strict=True)))


def score(seen: Measurements, real_NFD: Tensor) -> dict[str, list[float]]:
    """Scores by latent frame: the Fréchet "distance"; the drift of each ball from its own first
    frame, as a mean: "radius" in px, "brightness" in 0..1, "colour" the share whose colour is
    another one; the share of moves far from walls that are "impossible"; the share of frames that
    are not "clean"."""
    first = slice(0, 1)

    def mean(values_BF: Tensor) -> list[float]:
        return values_BF.float().nanmean(0).tolist()

    moves, broken = seen.free.sum(0), seen.impossible.sum(0)
    return {
        "distance": distances(seen.statistics, real_NFD),
        "radius": mean((seen.radius - seen.radius[:, first]).abs()),
        "brightness": mean((seen.brightness - seen.brightness[:, first]).abs()),
        "colour": mean(seen.colour != seen.colour[:, first]),
        "impossible": (broken / moves.clamp(min=1)).tolist(),
        "unclean": mean(~seen.clean),
    }


@torch.no_grad()
def evaluate(
    model: DiT, sampling: Sampling, codec: ToyVAE, held: HeldOut, trained: int, seed: int = 0,
    progress: Callable[[str], None] = lambda what: None,
) -> dict[str, Any]:  # fmt: skip
    """`score` of a video for each of `held`'s prompts, as long as they are. trained: latent frames
    of a training clip: within them, "own" and "real" are the distances by frame of the statistics
    of a frame alone, on the model's own past and on a real one, and "gap" is the difference of
    their means over the second half."""
    videos, frames = held.latents_BFCHW.shape[:2]

    def made(length: int, real: bool) -> Tensor:
        parts = []
        for begin in range(0, videos, BATCH):
            progress(f"{'real' if real else 'own'} past: video {begin} of {videos}")
            rows = slice(begin, begin + BATCH)
            latents = held.latents_BFCHW[rows].to(model.device)
            text = held.text_BTE[rows].to(model.device)
            options: Any = {"seed": seed + begin, "context_BFCHW": latents if real else None}
            if sampling.given and not real:
                options["start_BFCHW"] = latents[:, : sampling.given]
            parts.append(generate(model, sampling, text, length, **options).cpu())
        return torch.cat(parts)

    own = seen_in(codec, made(frames, real=False))
    on_real = seen_in(codec, made(trained, real=True))
    result: dict[str, Any] = dict(score(own, held.real_NFD))
    pasts = {"own": own, "real": on_real}
    still = {
        name: distances(seen.statistics, held.real_NFD, STILL)[:trained]
        for name, seen in pasts.items()
    }
    late = slice(trained // 2, trained)
    means = {name: sum(d[late]) / len(d[late]) for name, d in still.items()}
    return {**result, **still, "gap": means["own"] - means["real"]}


def bands(frames: int, trained: int) -> list[tuple[int, int]]:
    """Half-open ranges of latent frames to average over: the second half of what was trained, then
    up to 2, 4 and 10 times as long."""
    ends = [trained // 2, *(trained * k for k in (1, 2, 4, 10) if trained * k <= frames)]
    return [*itertools.pairwise(ends)]


def over(values: Sequence[float], band: tuple[int, int]) -> float:
    """The mean in a band."""
    part = values[slice(*band)]
    return sum(part) / len(part)


def table(result: Mapping[str, Any], floor: Mapping[str, Any], trained: int) -> Table:
    """Table of what `evaluate` found, by bands of frames, beside the `score` of real videos."""
    parts = bands(len(result["distance"]), trained)
    made = Table(title="by latent frame; in brackets: other real videos through the codec")
    made.add_column("")
    for a, b in parts:
        made.add_column(f"{a}-{b - 1}", justify="right")
    for name, unit in MEASURES.items():
        cells = (f"{over(result[name], b):.3f} ({over(floor[name], b):.3f})" for b in parts)
        made.add_row(f"{name}: {unit}", *cells)
    made.add_row("exposure gap: distance on its own past − on a real one", f"{result['gap']:.3f}")
    return made


def draw(result: Mapping[str, Any], floor: Mapping[str, Any], trained: int, path: Path) -> None:
    """Distance over frames, and on both pasts within what was trained, as a PNG."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.2), layout="constrained")
    ax = figure.subplots()
    ax.plot(result["distance"], label="generated")
    ax.plot(floor["distance"], "--", color="#555555", label="real, other videos")
    for name, style in (("own", "-"), ("real", ":")):
        label = f"frames alone, on {'its own' if name == 'own' else 'a real'} past"
        ax.plot(result[name], style, color="tab:red", label=label)
    ax.axvline(trained - 0.5, color="#aaaaaa", linewidth=0.8)
    ax.set(yscale="log", xlabel="latent frame", ylabel="Fréchet distance from real videos")
    ax.grid(alpha=0.3, which="both")
    figure.legend(loc="outside lower center", ncols=2, fontsize=8)
    with atomic(path) as part:
        figure.savefig(part, format="png", dpi=120)
