"""Needs of a run, worked out without weights, data or a GPU: its models lie on the meta
device, so that 14B parameters take seconds and no memory. None of it is measured.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from sfmodel.config import PRESETS
from sfmodel.cost import GIB, clip_chunks
from sfmodel.pretrained import checked_codec
from sfmodel.ranks import sharing
from sfmodel.train import parallel
from sfmodel.train.config import TrainConfig
from sfmodel.train.data import TextEncoder, negative_prompt
from sfmodel.train.learner import learners
from sfmodel.train.loop import check_source, source_of
from sfmodel.train.models import Models, empty
from sfmodel.train.text import KeptText, text_encoder
from sfmodel.training_cost import Update, training_flops, trajectory_flops
from sfmodel.training_memory import training_gib

# Recipes whose FLOPs are worked out, as those of others by turns.
COUNTED = {name: (name,) for name in ("tf", "df", "tf+dmd", "df+dmd", "sf+dmd")} | {
    "ode": ("df", "tf"),
    "df+ode": ("df",),
}

MOMENTS: dict[type, int] = {torch.optim.AdamW: 2, torch.optim.Muon: 1}  # of a parameter
KEPT = ("weights", "gradients", "moments", "average")


class Part(NamedTuple):
    """A model: parameters, how many of them learn, and GiB of one rank of each of KEPT."""

    name: str
    parameters: int
    learned: int
    gib: tuple[float, ...]


class DryRun(NamedTuple):
    """parts: all models. gib: of one rank at the peak of an update. updates, clips: in the whole
    run, by learner, and of "trajectory" how many are made before. flops: of one of them; empty
    where they are not worked out.
    written: files and folders of the run with GiB at most. refused: why it would not start."""

    parts: list[Part]
    gib: dict[str, float]
    updates: dict[str, int]
    clips: dict[str, int]
    flops: dict[str, float]
    written: dict[str, float]
    refused: list[str]

    def seconds(self, tflops: float, ranks: int) -> dict[str, float]:
        """Least seconds of an update, by learner, and of the whole "run", at a rate of each rank's
        matrix products. What ranks send to each other comes on top."""
        each = {name: flops / ranks / tflops / 1e12 for name, flops in self.flops.items()}
        whole = sum(self.updates[name] * seconds for name, seconds in each.items())
        return {**each, "run": whole}


def dry_run(config: TrainConfig, ranks: int = 1, to_come: Collection[Path] = ()) -> DryRun:
    """Needs of a run on so many ranks. Reads the heads of its files. to_come: weights that are made
    before it starts. Raises ValueError for settings that do not go with so many ranks."""
    config.check_ranks(ranks)
    sharers = sharing(config.shard, ranks)
    models = Models.made(config, functools.partial(empty, config))
    moments = {
        parameter: MOMENTS[type(optimizer)] * _nbytes([parameter])
        for learner in learners(models, config).values()
        for optimizer in learner.optimizers
        for group in optimizer.param_groups
        for parameter in group["params"]
    }
    parts = []
    for name, model in models._asdict().items():
        if model is None:
            continue
        own, learns = [*model.parameters()], [*parallel.learned(model).values()]
        averaged = learns if config.ema and name == "generator" else []
        nbytes = (
            _nbytes(own), _nbytes(learns), sum(moments.get(p, 0) for p in own), _nbytes(averaged)
        )  # fmt: skip
        gib_of = tuple(each / sharers / GIB for each in nbytes)
        count, learned_count = (sum(tensor.numel() for tensor in each) for each in (own, learns))
        parts.append(Part(name, count, learned_count, gib_of))
    kept = zip(*(part.gib for part in parts), strict=True)
    gib = _largest(config, ranks, sharers) | dict(zip(KEPT, map(sum, kept), strict=True))
    gib["total"] = sum(gib[name] for name in gib if name != "total")
    updates = {"generator": config.steps}
    if config.objective.needs_critic:
        updates["critic"] = sum(map(config.critic_updates, range(config.steps)))
    each = max(config.clips(frames) for frames in config.frames)
    clips = {name: count * each for name, count in updates.items()}
    if config.objective.needs_trajectories:
        updates["trajectory"] = clips["trajectory"] = config.pairs
    return DryRun(
        parts, gib, updates, clips,
        _flops(config), _written(config, models, sum(moments.values())), _refused(config, to_come),
    )  # fmt: skip


def _nbytes(tensors: Iterable[Tensor]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def _largest(config: TrainConfig, ranks: int, sharers: int) -> dict[str, float]:
    """GiB of one rank at the sizes of clips and chunks that take the most."""
    teacher = PRESETS[config.teacher_preset] if config.teacher_preset else None
    found = []
    longest = max(config.rollouts, default=0)
    for frames, chunk in itertools.product(config.frames, config.chunks):
        held = min(max(frames, longest), frames + max(config.windows))  # at most
        _, micro = config.split(config.clips(frames), ranks)
        gib = training_gib(
            config.model, config.recipe, sharers, teacher, micro, config.lora_rank,
            config.lora_critic, lora_targets=config.lora_targets, recompute=config.recompute,
            chunks=config.layout(frames, chunk, max(config.windows)).chunks, cached=held,
            bf16=config.bf16,
        )  # fmt: skip
        found.append(gib)
    return max(found, key=lambda gib: gib["total"])


def _flops(config: TrainConfig) -> dict[str, float]:
    """FLOPs of an update by learner, as if all weights learned, the mean over the sizes of chunks
    and the exit steps: those of a clip of Wan2.1 by its length. Of rollouts that are longer they
    are not worked out."""
    if config.recipe not in COUNTED or config.longer:
        return {}
    real = PRESETS[config.teacher_preset].dit if config.teacher_preset else None
    presets = [replace(config.model, chunk=chunk) for chunk in config.chunks]
    steps = range(len(config.model.steps))
    exits = steps[-1:] if config.last_step_only else steps
    options = real, config.guidance_scale != 1, config.recompute
    frames = config.batch * max(config.frames)  # in clips of any length
    found: dict[str, float] = {}
    for learner in ("generator", "critic") if config.objective.needs_critic else ("generator",):
        a_frame = [
            training_flops(each, Update(recipe, learner, exit_step), *options)
            / sum(clip_chunks(each))
            for each, recipe, exit_step in itertools.product(presets, COUNTED[config.recipe], exits)
        ]
        found[learner] = frames * sum(a_frame) / len(a_frame)
    if config.objective.needs_trajectories:
        guided = config.guidance_scale != 1
        whole = trajectory_flops(presets[0], real or config.model.dit, config.teacher_steps, guided)
        found["trajectory"] = max(config.frames) * whole / sum(clip_chunks(presets[0]))
    return found


def _written(config: TrainConfig, models: Models, moments: int) -> dict[str, float]:
    """GiB of what a run leaves, by its name. moments: bytes of all that there are."""
    state, learned = models.generator.state_dict(), parallel.learned(models.generator)
    whole = config.lora.merged(state) if config.lora else state
    found = {"model.safetensors": _nbytes(whole.values()) / GIB}
    if config.lora:
        found["lora/"] = _nbytes(learned.values()) / GIB
    # What learns, its moments, and the generator's average.
    saved = [*learned.values()]
    for model in models:
        saved += parallel.learned(model).values() if model is not None else []
    found["checkpoints/, at most three"] = 3 * (_nbytes(saved) + moments) / GIB
    if config.objective.needs_trajectories:
        preset, (frames,) = config.model, config.frames
        point = frames * preset.dit.channels * preset.height * preset.width
        text = preset.dit.text_len * preset.dit.text_dim
        each = (len(preset.steps) + 1) * point + text
        found["trajectories/"] = 4 * config.pairs * each / GIB
    return found


def _refused(config: TrainConfig, to_come: Collection[Path]) -> list[str]:
    """Sentences on what is missing or of something else."""
    said = [str(error) for error in config.refusals(to_come)]
    encoder, width = text_encoder(config.preset, torch.device("cpu")), config.model.dit.text_dim
    text: TextEncoder | None = encoder
    if isinstance(encoder, KeptText):  # which is not loaded

        def text(sentences: Sequence[str]) -> Tensor:
            return torch.zeros(len(sentences), 1, width)

    checks: list[Callable[[], object]] = [lambda: check_source(config, source_of(config, text))]
    if config.guided:
        checks.append(lambda: negative_prompt(config.negative or "", config.model, text))
    if config.longer and config.preset != "toy":
        cpu = torch.device("cpu")
        checks.append(lambda: checked_codec(config.preset, cpu, "wan", config.models))
    for check in checks:
        try:
            check()
        except (ValueError, OSError) as error:
            said.append(str(error))
    return [*dict.fromkeys(said)]
