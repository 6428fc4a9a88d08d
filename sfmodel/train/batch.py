"""The data of one update: a global batch, its micro-batches and their random numbers.

Everything random in an update follows from its seed and, sample by sample, from the sample's place
in the global batch: any split into ranks and micro-batches learns the same.

Shapes: B samples of a micro-batch, F latent frames, K chunks, C channels, H×W latents, S few steps,
T text rows, E text dim.
"""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from sfkernels import BlockLayout
from sfmodel.schedule import FlowSchedule

if TYPE_CHECKING:
    from sfmodel.train.config import TrainConfig
    from sfmodel.train.data import Source
    from sfmodel.train.models import Models
    from sfmodel.train.trajectories import Trajectories


class TrainContext(NamedTuple):
    """Everything that does not change between updates. negative: the prompt that guidance leads
    away from. dark: latents of the toy world without light."""

    config: TrainConfig
    models: Models
    source: Source
    trajectories: Trajectories
    negative_1TE: Tensor
    dark_CHW: Tensor | None
    device: torch.device
    schedule: FlowSchedule


class Draw(NamedTuple):
    """Random numbers of some samples of a global batch, by name."""

    seed: int
    samples: range
    device: torch.device

    def normal(self, name: str, *shape: int) -> Tensor:
        """Normal numbers, [B, *shape]."""
        return self._each(torch.randn, name, shape)

    def uniform(self, name: str, *shape: int) -> Tensor:
        """Uniform numbers in [0, 1), [B, *shape]."""
        return self._each(torch.rand, name, shape)

    def _each(self, draw: Callable[..., Tensor], name: str, shape: Sequence[int]) -> Tensor:
        """Numbers drawn on the CPU, so that they are the same on any device."""
        generator = torch.Generator()
        drawn = []
        for sample in self.samples:
            generator.manual_seed(seed_of(self.seed, name, sample))
            drawn.append(draw(shape, generator=generator))
        return torch.stack(drawn).to(self.device)


def seed_of(*what: object) -> int:
    """Seed that follows from all of these."""
    return int.from_bytes(hashlib.blake2b(repr(what).encode(), digest_size=7).digest(), "big")


@dataclass(frozen=True)
class Batch:
    """One update's global batch, the same on all ranks: its seed, the sizes of its clips in latent
    frames, and the index of the few step at which rollouts exit."""

    context: TrainContext
    step: int
    seed: int
    frames: int
    chunk: int
    window: int
    exit_step: int

    @classmethod
    def draw(cls, context: TrainContext, step: int, name: str) -> Batch:
        """The batch of update `step` that follows from the run's seed. name: "generator" or one of
        the critic's."""
        config = context.config
        seed = seed_of(config.seed, step, name)
        generator = torch.Generator().manual_seed(seed_of(seed, "shared"))

        def choose(options: Sequence[int]) -> int:
            return options[int(torch.randint(len(options), (), generator=generator))]

        frames, chunk, window = map(choose, (config.frames, config.chunks, config.windows))
        exit_step = choose(range(len(config.model.steps)))
        return cls(context, step, seed, frames, chunk, window, exit_step)

    @property
    def clips(self) -> int:
        return self.context.config.clips(self.frames)

    @functools.cached_property
    def layout(self) -> BlockLayout:
        config = self.context.config
        forcing = config.objective.teacher_forcing(self.step)
        return config.layout(self.frames, self.chunk, self.window, forcing)

    def rows(self, samples: range) -> tuple[int, int, slice]:
        """Seed, size and rows of the draw from the source that some of the samples are."""
        return seed_of(self.seed, "data"), self.clips, slice(samples.start, samples.stop)

    def load(self, samples: range) -> MicroBatch:
        """Some of the batch's samples, with their data."""
        context, objective = self.context, self.context.config.objective
        draw, clips, points = Draw(self.seed, samples, context.device), None, None
        if objective.needs_trajectories:
            chosen = draw.uniform("trajectory") * context.trajectories.count
            points, text = context.trajectories.draw(chosen.long().tolist())
        else:
            seed, batch, rows = self.rows(samples)
            needs = objective.needs_clips
            clips, text, _ = context.source.draw(seed, batch, self.frames, rows, latents=needs)
        clips, points = (x if x is None else x.to(context.device) for x in (clips, points))
        return MicroBatch(context, self, draw, text.to(context.device), clips, points)


class MicroBatch(NamedTuple):
    """Samples of a batch. draw: their random numbers. clips [B, F, C, H, W]: clean latents, where
    the objective needs them; points [B, S + 1, F, C, H, W]: of the teacher's trajectories, at each
    few step and at the end, where it needs those."""

    context: TrainContext
    batch: Batch
    draw: Draw
    text_BTE: Tensor
    clips_BFCHW: Tensor | None = None
    points_BSFCHW: Tensor | None = None

    @property
    def clean_BFCHW(self) -> Tensor:
        assert self.clips_BFCHW is not None
        return self.clips_BFCHW

    def noise(self, name: str, *several: int) -> Tensor:
        """Normal numbers of the latents' shape, [B, *several, F, C, H, W]."""
        preset = self.context.config.model
        shape = self.batch.frames, preset.dit.channels, preset.height, preset.width
        return self.draw.normal(name, *several, *shape)

    def flow_weight(self, t: Tensor) -> Tensor:
        """Weight of the squared error of the flow at timesteps t, of the same shape."""
        schedule, least = self.context.schedule, self.context.config.min_sigma
        if least is None:
            return schedule.weight(t)
        return (schedule.sigma(t) / least).clamp(max=1).square()

    def by_frame(self, value_BK: Tensor) -> Tensor:
        """Values [B, F] of one value a chunk."""
        sizes = torch.tensor(self.batch.layout.chunks, device=value_BK.device)
        return value_BK.repeat_interleave(sizes, 1)

    def at_few_steps(self, points_BSFCHW: Tensor, clean_too: bool = False) -> tuple[Tensor, Tensor]:
        """t [B, F] of one of the few steps, drawn for each chunk, and the points there. clean_too:
        or t = 0, with the points after those of the steps."""
        steps = self.context.config.model.steps
        t_S = torch.cat([self.context.schedule.warp(steps), torch.zeros(1)])
        levels = len(steps) + clean_too
        k_BK = (self.draw.uniform("step", len(self.batch.layout.chunks)) * levels).long()
        k_BF = self.by_frame(k_BK)
        at = k_BF[:, None, :, None, None, None].expand(-1, 1, *points_BSFCHW.shape[2:])
        return t_S.to(k_BF.device)[k_BF], points_BSFCHW.gather(1, at)[:, 0]
