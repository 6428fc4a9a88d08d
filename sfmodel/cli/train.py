"""`sfmodel train`: the trainer, with the defaults of a preset and a recipe."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Sequence
from typing import Annotated

import tyro

from sfmodel.cli.pipeline import given, pipeline_command
from sfmodel.config import PRESETS
from sfmodel.train.config import RECIPES, TrainConfig
from sfmodel.train.defaults import defaults
from sfmodel.train.loop import train


def train_command(arguments: Sequence[str]) -> Callable[..., None]:
    """`sfmodel train` with the defaults of the preset and the recipe that the arguments name, or of
    the pipeline."""
    if given(arguments, "pipeline") is not None:
        return pipeline_command(arguments)

    def named(option: str, known: Iterable[str], otherwise: str) -> str:
        value = given(arguments, option)
        return value if value and value in known else otherwise  # an unknown one is refused later

    default = defaults(named("preset", PRESETS, "toy"), named("recipe", RECIPES, "tf"))

    def run(
        config: Annotated[TrainConfig, tyro.conf.arg(name="")] = default, resume: bool = False
    ) -> None:
        """Train a model: progress, log.jsonl, curves.png, samples, checkpoints, weights. The
        defaults are those of the preset and the recipe. Under torchrun, on all its ranks.
        --pipeline self-forcing trains all models from nothing to a self-forced one: its --help.

        Args:
            resume: Continue the run in the output folder, bit for bit as if it had not stopped, or
                start it where there is none.
        """
        weights = train(config, resume=resume)
        if os.environ.get("RANK", "0") == "0":
            print(f"weights: {weights}; see them: sfmodel generate --checkpoint {weights}")

    return run
