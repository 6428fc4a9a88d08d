"""The teacher's deterministic trajectories from noise to clean latents, which a few-step causal
model is initialised by (CausVid, arXiv 2412.07772).

A trajectory is kept where the few-step model stands on it: at each of its steps and at the end.
They lie in a folder of safetensors files; what is there is not made again.

Shapes: N trajectories, S few steps, F latent frames, C channels, H×W latents, T text rows.
"""

from __future__ import annotations

import functools
import itertools
import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sfkernels import euler_step
from sfmodel.files import atomic
from sfmodel.ranks import Ranks
from sfmodel.schedule import TRAIN_STEPS, FlowSchedule
from sfmodel.train.shards import opened
from sfmodel.weights.saving import save_tensors

IN_FILE = 64  # trajectories


Flow = Callable[[Tensor, Tensor], Tensor]  # of x [B, F, C, H, W] and t []


@torch.no_grad()
def solve(
    flow: Flow,
    noise_BFCHW: Tensor,
    schedule: FlowSchedule,
    steps: Sequence[int],
    euler_steps: int,
    *,
    shift: float | None = None,
    unprompted: Flow | None = None,
    guidance: float = 1.0,
) -> Tensor:
    """Points [B, S + 1, F, C, H, W] of trajectories: x at each of `steps` of the schedule and at
    last x0, by Euler steps of dx/dσ = flow at levels equally spaced before the shift, which is the
    schedule's if None. Between two levels a trajectory is a line, so that a step of another shift
    lies on it too. unprompted: the flow that a guidance other than 1 leads away from. Raises
    ValueError for steps that do not fall."""
    teacher = schedule if shift is None else FlowSchedule(shift)
    levels = schedule.sigma(schedule.warp(steps)) if steps else torch.empty(0)
    sigmas = teacher.shifted(torch.linspace(1, 0, euler_steps + 1))
    x, kept = noise_BFCHW.float(), list[Tensor]()
    for now, then in itertools.pairwise(sigmas):
        sigma = now.to(x.device)
        t = TRAIN_STEPS * sigma
        against = None if unprompted is None or guidance == 1 else unprompted(x, t)
        step: Any = functools.partial(
            euler_step, x, flow(x, t), sigma, uncond_flow=against, guidance=guidance
        )
        kept += [step(at.to(x.device)) for at in levels[len(kept) :] if at > then]
        x = step(then.to(x.device))
    return torch.stack([*kept, x], 1)


class Trajectories:
    """Trajectories of a folder, in order."""

    def __init__(self, folder: Path, count: int) -> None:
        self.folder, self.count = folder, count

    def files(self) -> Iterator[tuple[Path, range]]:
        """All files that there are to be, and the trajectories of each."""
        for begin in range(0, self.count, IN_FILE):
            end = min(begin + IN_FILE, self.count)
            yield self.folder / f"trajectories-{begin:06d}.safetensors", range(begin, end)

    def make(
        self, solve: Callable[[range], tuple[Tensor, Tensor]], facts: dict[str, object],
        ranks: Ranks, progress: Callable[[int], None] = lambda done: None,
    ) -> None:  # fmt: skip
        """Writes what is missing: `solve` gives points and text of some trajectories. facts: what
        they depend on, None where a folder made before does not say. Raises ValueError where it
        holds those of others."""
        files = [*self.files()]
        note = self.folder / "trajectories.json"
        settings = json.dumps(facts, sort_keys=True)
        try:
            others = note.exists() and {**dict.fromkeys(facts), **json.loads(note.read_text())}
        except (ValueError, TypeError):
            raise ValueError(f"{note}: is damaged: remove {self.folder}") from None
        if others and others != facts:
            raise ValueError(f"{self.folder}: holds trajectories of other settings: remove them")
        ranks.wait()
        if ranks.first:
            with atomic(note) as part:
                part.write_text(settings)
        # A sharded teacher runs on all ranks at once, each on a file of its own.
        for begin in range(0, len(files), ranks.world):
            path, rows = files[min(begin + ranks.rank, len(files) - 1)]
            if not ranks.any(not path.exists()):
                continue
            points, text = solve(rows)
            if begin + ranks.rank < len(files) and not path.exists():
                save_tensors(path, {"points": points, "text": text}, {})
            progress(files[min(begin + ranks.world, len(files)) - 1][1].stop)
        ranks.wait()

    def draw(self, indices: Sequence[int]) -> tuple[Tensor, Tensor]:
        """points [B, S + 1, F, C, H, W] and text [B, T, E] of these."""
        points, texts = [], []
        for index in indices:
            name = f"trajectories-{index // IN_FILE * IN_FILE:06d}.safetensors"
            row = index % IN_FILE
            try:
                with opened(self.folder / name) as file:
                    points.append(file.get_slice("points")[row].float())
                    texts.append(file.get_slice("text")[row])
            except ValueError as error:
                raise ValueError(
                    f"{self.folder / name}: {error}: remove it, and --resume makes it anew"
                ) from None
        rows = max(map(len, texts))
        padded = [torch.nn.functional.pad(t, (0, 0, 0, rows - len(t))) for t in texts]
        return torch.stack(points), torch.stack(padded)
