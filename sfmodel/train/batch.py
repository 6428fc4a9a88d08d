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
    from sfmodel.vae.codec import VideoCodec


class TrainContext(NamedTuple):
    """Everything that does not change between updates. negative: the prompt that guidance leads
    away from. dark: latents of the toy world without light. schedule: of the generator;
    score_schedule: the table of σ that scores of generated videos have. codec: where rollouts are
    longer than clips."""

    config: TrainConfig
    models: Models
    source: Source
    trajectories: Trajectories
    negative_1TE: Tensor
    dark_CHW: Tensor | None
    device: torch.device
    schedule: FlowSchedule
    score_schedule: FlowSchedule
    codec: VideoCodec | None = None


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
    frames, the index of the few step at which rollouts exit (None: each chunk at its own), and
    their latent frames, of which the last are judged as a clip."""

    context: TrainContext
    step: int
    seed: int
    frames: int
    chunk: int
    window: int
    exit_step: int | None
    rollout: int

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
        steps = range(len(config.model.steps))
        exit_step: int | None = choose(steps[-1:] if config.last_step_only else steps)
        if not (config.same_step_across_blocks or config.last_step_only):
            exit_step = None
        rollout = choose(config.rollouts or (frames,))
        if config.judged == "random":  # what comes after the window would change nothing in it
            rollout = choose(range(frames, rollout + 1, chunk))
        return cls(context, step, seed, frames, chunk, window, exit_step, rollout)

    @property
    def clips(self) -> int:
        return self.context.config.clips(self.frames)

    @functools.cached_property
    def layout(self) -> BlockLayout:
        config = self.context.config
        forcing = config.objective.teacher_forcing(self.step)
        return config.layout(self.frames, self.chunk, self.window, forcing)

    @functools.cached_property
    def rollout_layout(self) -> BlockLayout:
        return self.context.config.layout(self.rollout, self.chunk, self.window)

    @functools.cached_property
    def exit_steps(self) -> tuple[int, ...]:
        """The index of the few step at which each chunk of a rollout exits."""
        chunks, steps = len(self.rollout_layout.chunks), len(self.context.config.model.steps)
        if self.exit_step is not None:
            return (self.exit_step,) * chunks
        generator = torch.Generator().manual_seed(seed_of(self.seed, "exit steps"))
        return tuple(torch.randint(steps, (chunks,), generator=generator).tolist())

    @property
    def masked(self) -> int:
        """First latent frames of the videos that take no loss: those of the first chunk, where it
        is given or stands for what came before."""
        masked = self.context.config.image or self.rollout > self.frames
        return self.layout.chunks[0] if masked else 0

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
            needs = context.config.needs_clips
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
        """Normal numbers of the clips' shape, [B, *several, F, C, H, W]."""
        return self.draw.normal(name, *several, self.batch.frames, *self._latent)

    def chunk_noise(self, frames: slice, i: int) -> Tensor:
        """Normal numbers of a chunk of a rollout, as `rollout.ChunkNoise`. Drawn as they are
        needed: those of a long rollout take no memory."""
        size = frames.stop - frames.start
        return self.draw.normal(f"rollout {frames.start} {i}", size, *self._latent)

    @property
    def _latent(self) -> tuple[int, int, int]:
        """[C, H, W]."""
        preset = self.context.config.model
        return preset.dit.channels, preset.height, preset.width

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
        """t [B, F] of one of the few steps, drawn for each chunk, and the points [B, S + 1, F, C,
        H, W] there, of which the last are clean. clean_too: or t = 0, where a chunk that is given
        stands."""
        steps = self.context.config.model.steps
        t_S = torch.cat([self.context.schedule.warp(steps), torch.zeros(1)])
        levels = len(steps) + clean_too
        k_BK = (self.draw.uniform("step", len(self.batch.layout.chunks)) * levels).long()
        k_BF = self.by_frame(k_BK)
        k_BF[:, : self.batch.masked] = len(steps)
        at = k_BF[:, None, :, None, None, None].expand(-1, 1, *points_BSFCHW.shape[2:])
        return t_S.to(k_BF.device)[k_BF], points_BSFCHW.gather(1, at)[:, 0]
