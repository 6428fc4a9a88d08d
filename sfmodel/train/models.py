"""The models of a training run: of files or drawn from its seed, placed on its ranks."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor

from sfmodel.config import PRESETS, DiTConfig
from sfmodel.dit import DiT
from sfmodel.ranks import Ranks
from sfmodel.train import parallel
from sfmodel.train.batch import seed_of
from sfmodel.train.config import TrainConfig
from sfmodel.train.discriminator import Discriminator
from sfmodel.weights import checkpoint

Model = TypeVar("Model", DiT, Discriminator)


class Models(NamedTuple):
    """All that take part. real: frozen. discriminator: reads the critic's features."""

    generator: DiT
    real: DiT | None = None
    critic: DiT | None = None
    discriminator: Discriminator | None = None

    @classmethod
    def load(cls, config: TrainConfig, ranks: Ranks) -> Models:
        objective, own, real, critic, head = config.objective, config.model.dit, None, None, None
        generator = load(config, ranks, DiT, own, config.init)
        if objective.needs_teacher:
            sizes = PRESETS[config.teacher_preset or config.preset].dit
            real = load(config, ranks, DiT, sizes, config.teacher, frozen=True)
        if objective.needs_critic:
            critic = load(config, ranks, DiT, own, config.critic or config.teacher)
        if objective.needs_discriminator:
            head = load(config, ranks, Discriminator, own)
        return cls(generator, real, critic, head)

    def check(self, config: TrainConfig) -> None:
        """Raises ValueError unless exactly those are there that the recipe needs."""
        objective = config.objective
        needs = objective.needs_teacher, objective.needs_critic, objective.needs_discriminator
        if needs != tuple(model is not None for model in self[1:]):
            names = [name for name, needed in zip(self._fields[1:], needs, strict=True) if needed]
            must = f"a generator and {', '.join(names) or 'nothing else'}"
            raise ValueError(f"models: recipe={config.recipe!r} learns with {must}")


def load(
    config: TrainConfig, ranks: Ranks, make: type[Model], sizes: DiTConfig,
    weights: Path | None = None, frozen: bool = False,
) -> Model:  # fmt: skip
    """A model of a file's weights, or drawn from the run's seed; the same on all ranks. frozen: in
    the dtype of the arithmetic, without gradient."""
    build: Callable[[], Model] = functools.partial(
        make, sizes, impl=config.impl, attention_impl=config.attention_impl
    )
    state: dict[str, Tensor] = {}
    with torch.device("meta"):
        model = build()
    if frozen and config.bf16:
        model = model.bfloat16()
    if weights is not None:
        # Every rank looks, so that all of them refuse a file that is not there.
        state, _ = checkpoint.matching(model, weights)
    elif ranks.first:
        with torch.random.fork_rng([]):
            torch.manual_seed(seed_of(config.seed, make.__name__))
            state = build().state_dict()
    placed = parallel.place(model, state, ranks, bf16=config.bf16)
    return placed.requires_grad_(not frozen).train(not frozen)
