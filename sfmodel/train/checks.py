"""Checks of a stage of `pipeline`: what its averaged weights make, in numbers with bounds.

Shapes: B videos, F latent frames, C channels, H×W latents, T text rows, E text dim.
"""

from __future__ import annotations

import functools
import json
import math
from typing import NamedTuple

import torch
from torch import Tensor

from sfmodel.files import atomic
from sfmodel.pretrained import load_model
from sfmodel.schedule import FlowSchedule
from sfmodel.toy.evaluate import (
    HeldOut,
    Sampling,
    distances,
    generate,
    held_out,
    over,
    seen_in,
)
from sfmodel.toy.vae import ToyVAE
from sfmodel.train.batch import Draw, seed_of
from sfmodel.train.config import TrainConfig
from sfmodel.train.data import open_source
from sfmodel.train.report import logged
from sfmodel.train.text import text_encoder
from sfmodel.train.trajectories import solve
from sfmodel.weights.saving import save_tensors

VIDEOS = 128  # of the toy world, by which a stage is measured
CLIPS = 4  # of other models, one after the other
SHOWN = 2  # videos that are kept

# Fréchet distance from real videos in the second half of a clip, by what a chunk sees. Of 128
# videos, other real ones have 0.3, an earlier teacher 1.6 and its ODE regression 6.0; their mean,
# which shows nothing, 23, and noise 50.
WHOLE, REAL, OWN = 4.0, 12.0, 4.0
# Wan2.1's latents are normalised, per channel over its data. A clip alone, of 16 frames, has means
# of -0.6 to 0.8, deviations of 0.6 to 1.2, and correlations from 0.81 on between neighbours in a
# row; the bounds are about twice as wide. The first two find what has collapsed or saturated, the
# third one noise, whose mean is 0 and whose deviation 1.
MEAN, DEVIATION, CORRELATION = (-1.5, 1.5), (0.3, 2.0), (0.4, 1.0)


class Measure(NamedTuple):
    """A number and what it must be: at least `low` and at most `high`."""

    what: str
    value: float
    low: float
    high: float

    @property
    def said(self) -> str:
        """The number and its bounds."""
        bounds = f"{self.low:g} to {self.high:g}" if self.low else f"at most {self.high:g}"
        return f"{self.what} {self.value:.3g} (must be {bounds})"

    @property
    def passed(self) -> bool:
        return self.low <= self.value <= self.high  # which NaN is not


def check(config: TrainConfig, device: torch.device) -> list[Measure]:
    """Measures of a run that is over, which are kept in its folder: `kept` gives them again.
    check.safetensors has the first latents that were measured, in the toy world beside real ones
    of the same prompts."""
    if config.preset == "toy":
        codec, frames = ToyVAE.from_pretrained(), max(config.frames)
        held = held_out(codec, frames, VIDEOS, "validation")
        made, text = sample(config, held.text_BTE, device), held.sentences
        measures = [distance(made, held, codec, config)]
        shown = {"latents": made[:SHOWN], "real": held.latents_BFCHW[:SHOWN]}
    else:
        text_of = text_encoder(config.preset, device)
        source = open_source(config.data, config.model, max(config.frames), None, text_of)
        seed = seed_of(config.seed, "check")
        drawn = source.draw(seed, CLIPS, max(config.frames), latents=False)
        made, text = sample(config, drawn.text_BTE, device), drawn.sentences
        measures = [*learning(config), *spread(made)]
        shown = {"latents": made[:SHOWN]}
    save_tensors(config.output / "check.safetensors", shown, {"prompts": json.dumps(text[:SHOWN])})
    facts = {
        "step": config.steps,
        "config": config.plain(),
        "measures": [each._asdict() for each in measures],
    }
    with atomic(config.output / "check.json") as part:
        part.write_text(json.dumps(facts, indent=1) + "\n")
    return measures


def kept(config: TrainConfig) -> list[Measure] | None:
    """Measures that `check` has kept of a run of these settings and updates; None where it has
    none. Raises ValueError for those of other settings and a file that is damaged."""
    path = config.output / "check.json"
    if not path.exists():
        return None
    try:
        facts = json.loads(path.read_text())
        step, other = int(facts["step"]), config.differing(facts["config"])
        measures = [
            Measure(str(each["what"]), *(float(each[k]) for k in ("value", "low", "high")))
            for each in facts["measures"]
        ]
    except (ValueError, KeyError, TypeError, AttributeError):
        raise ValueError(f"{path}: is no check: remove it, and the stage is checked anew") from None
    if other:
        was = ", ".join(f"{name}={value!r}" for name, value in other.items())
        raise ValueError(f"{path}: is of a run with {was}: resume with the same settings")
    return measures if step == config.steps else None


@torch.no_grad()
def sample(config: TrainConfig, text_BTE: Tensor, device: torch.device) -> Tensor:
    """Latents [B, F, C, H, W], on the CPU, that a run's averaged weights make of prompts: whole
    clips in the teacher's steps, or streams as they were trained."""
    model, preset = load_model(config.preset, config.weights, device), config.model
    seed, frames, made = seed_of(config.seed, "check"), max(config.frames), []
    together = len(text_BTE) if config.preset == "toy" else 1
    for begin in range(0, len(text_BTE), together):
        text = text_BTE[begin : begin + together].to(device)
        if config.objective.context == "whole":
            rows = range(begin, begin + len(text))
            shape = frames, preset.dit.channels, preset.height, preset.width
            noise = Draw(seed, rows, device).normal("noise", *shape)
            flow = functools.partial(model, text_BTE=text)
            clips = solve(flow, noise, FlowSchedule(preset.shift), (), config.teacher_steps)[:, -1]
        else:
            clips = generate(model, Sampling(preset), text, frames, seed=seed + begin)
        made.append(clips.cpu())
    return torch.cat(made)


def distance(made_BFCHW: Tensor, held: HeldOut, codec: ToyVAE, config: TrainConfig) -> Measure:
    """Fréchet distance of `sfmodel.toy.evaluate`, in the second half of the frames."""
    frames = made_BFCHW.shape[1]
    by_frame = distances(seen_in(codec, made_BFCHW).statistics, held.real_NFD)
    most = {"whole": WHOLE, "own": OWN}.get(config.objective.context, REAL)
    band = frames // 2, frames
    what = f"Fréchet distance at frames {band[0]}-{frames - 1}"
    return Measure(what, over(by_frame, band), 0.0, most)


def learning(config: TrainConfig) -> list[Measure]:
    """Mean loss of the last tenth of a run's log over that of the first one, where it is the error
    of a prediction, which must not grow. Every update draws other clips and noise."""
    objective = config.objective
    if objective.needs_critic or config.recipe == "consistency":
        return []  # whose losses move with what they are measured against
    losses = [each["loss"] for each in logged(config.output / "log.jsonl", config.steps)]
    if not losses:
        return []  # the log is lost
    part = math.ceil(len(losses) / 10)
    ratio = sum(losses[-part:]) / sum(losses[:part])
    return [Measure("loss at the end over that at the start", ratio, 0.0, 1.0)]


def spread(made_BFCHW: Tensor) -> list[Measure]:
    """Statistics of each channel over all videos: the outermost mean, the outermost deviations, and
    the least correlation of horizontal neighbours."""
    by_channel = made_BFCHW.double().movedim(2, 0)
    mean_C = by_channel.flatten(1).mean(1)
    std_C = by_channel.flatten(1).std(1)
    centred = by_channel - mean_C.view(-1, 1, 1, 1, 1)
    along = (centred[..., 1:] * centred[..., :-1]).flatten(1).mean(1) / std_C.square()
    outermost = mean_C[mean_C.abs().argmax()]
    named = [
        ("mean of the outermost channel", outermost, MEAN),
        ("deviation of the narrowest channel", std_C.min(), DEVIATION),
        ("deviation of the widest channel", std_C.max(), DEVIATION),
        ("correlation of neighbours in the noisiest channel", along.min(), CORRELATION),
    ]
    return [Measure(what, float(value), *bounds) for what, value, bounds in named]
