"""The models of a training run: of files or drawn from its seed, placed on its ranks."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, NamedTuple, TypeVar

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
Learns = Literal["all", "lora", "nothing"]  # of a model's weights


class Models(NamedTuple):
    """All that take part. real: frozen. discriminator: reads the critic's features."""

    generator: DiT
    real: DiT | None = None
    critic: DiT | None = None
    discriminator: Discriminator | None = None

    @classmethod
    def load(cls, config: TrainConfig, ranks: Ranks) -> Models:
        """Those of a run's files or drawn from its seed, on its ranks."""
        return cls.made(config, functools.partial(load, config, ranks))

    @classmethod
    def made(cls, config: TrainConfig, make: Callable[..., Any]) -> Models:
        """Those that the recipe needs, each made of its class, its sizes, its file of weights, and
        what of it learns."""
        objective, own, real, critic, head = config.objective, config.model.dit, None, None, None
        generator = make(DiT, own, config.init, "lora" if config.lora else "all")
        if objective.needs_teacher:
            sizes = PRESETS[config.teacher_preset or config.preset].dit
            real = make(DiT, sizes, config.teacher, "nothing")
        if objective.needs_critic:
            weights = config.critic or config.teacher
            critic = make(DiT, own, weights, "lora" if config.lora_critic else "all")
        if objective.needs_discriminator:
            head = make(Discriminator, own, None, "all")
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
    config: TrainConfig, ranks: Ranks, make: type[Model], sizes: DiTConfig, weights: Path | None,
    learns: Learns,
) -> Model:  # fmt: skip
    """A model of a file's weights, or drawn from the run's seed; the same on all ranks."""
    state: dict[str, Tensor] = {}
    with torch.device("meta"):
        model = _build(config, make, sizes)
    if weights is not None:
        # Every rank looks, so that all of them refuse a file that is not there.
        state, _ = checkpoint.matching(model, weights)
    elif ranks.first:
        with torch.random.fork_rng([]):
            torch.manual_seed(seed_of(config.seed, make.__name__))
            state = _build(config, make, sizes).state_dict()
    model = _frozen(config, model, learns)
    if learns == "lora" and config.lora is not None and ranks.first:
        state = {**state, **config.lora.initial(model, seed_of(config.seed, "LoRA"))}
    placed = parallel.place(model, state, ranks, bf16=config.bf16)
    return placed.train(learns != "nothing")


def empty(
    config: TrainConfig, make: type[Model], sizes: DiTConfig, weights: Path | None, learns: Learns
) -> Model:
    """A model as `load` makes it, on the meta device: no memory for its weights, no file read."""
    with torch.device("meta"):
        return _frozen(config, _build(config, make, sizes), learns)


def _build(config: TrainConfig, make: type[Model], sizes: DiTConfig) -> Model:
    return make(sizes, impl=config.impl, attention_impl=config.attention_impl)


def _frozen(config: TrainConfig, model: Model, learns: Learns) -> Model:
    """The model with what of it does not learn without gradient, in the dtype of the arithmetic."""
    if learns == "all":
        return model
    model = model.bfloat16() if config.bf16 else model
    if learns == "lora" and config.lora is not None:
        assert isinstance(model, DiT)
        return config.lora.add(model)
    return model.requires_grad_(False)
