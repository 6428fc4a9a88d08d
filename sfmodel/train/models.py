"""The models of a training run: of files or drawn from its seed, placed on its ranks."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from sfmodel.config import PRESETS
from sfmodel.dit import DiT
from sfmodel.train import parallel
from sfmodel.train.batch import seed_of
from sfmodel.train.config import TrainConfig
from sfmodel.train.discriminator import Discriminator
from sfmodel.train.parallel import Ranks
from sfmodel.weights import checkpoint


class Models(NamedTuple):
    """All that take part. real: frozen. discriminator: reads the critic's features."""

    generator: DiT
    real: DiT | None = None
    critic: DiT | None = None
    discriminator: Discriminator | None = None

    @classmethod
    def load(cls, config: TrainConfig, ranks: Ranks) -> Models:
        objective, real, critic, head = config.objective, None, None, None
        generator = load_dit(config, ranks, config.preset, config.init)
        if objective.needs_teacher:
            sizes = config.teacher_preset or config.preset
            real = load_dit(config, ranks, sizes, config.teacher, frozen=True)
        if objective.needs_critic:
            critic = load_dit(config, ranks, config.preset, config.critic or config.teacher)
        if objective.needs_discriminator:
            head = _placed(config, ranks, Discriminator, config.model.dit)
        return cls(generator, real, critic, head)

    def check(self, config: TrainConfig) -> None:
        """Raises ValueError unless exactly those are there that the recipe needs."""
        objective = config.objective
        needs = objective.needs_teacher, objective.needs_critic, objective.needs_discriminator
        if needs != tuple(model is not None for model in self[1:]):
            names = [name for name, needed in zip(self._fields[1:], needs, strict=True) if needed]
            must = f"a generator and {', '.join(names) or 'nothing else'}"
            raise ValueError(f"models: recipe={config.recipe!r} learns with {must}")


def load_dit(
    config: TrainConfig, ranks: Ranks, preset: str, weights: Path | None, frozen: bool = False
) -> DiT:
    """A model of a file's weights, or drawn from the run's seed; the same on all ranks. frozen: in
    the dtype of the arithmetic, without gradient."""
    arguments = PRESETS[preset].dit, config.impl, config.attention_impl
    model = _placed(config, ranks, DiT, *arguments, weights=weights, frozen=frozen)
    return model.requires_grad_(not frozen).train(not frozen)


def _placed(
    config: TrainConfig, ranks: Ranks, make: Callable[..., Any], *arguments: Any,
    weights: Path | None = None, frozen: bool = False,
) -> Any:  # fmt: skip
    state: dict[str, Tensor] = {}
    with torch.device("meta"):
        model = make(*arguments)
    if frozen and config.bf16:
        model = model.bfloat16()
    if weights is not None:
        # Every rank looks, so that all of them refuse a file that is not there.
        state, _ = checkpoint.matching(model, weights)
    elif ranks.first:
        with torch.random.fork_rng([]):
            torch.manual_seed(seed_of(config.seed, make.__name__))
            state = make(*arguments).state_dict()
    return parallel.place(model, state, ranks, bf16=config.bf16)
