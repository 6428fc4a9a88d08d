"""`sfmodel train`: the trainer, with the defaults of a preset and a recipe."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Sequence
from typing import Annotated, get_args

import tyro

from sfmodel.cli.dry_run import WORLD, check_ranks, show
from sfmodel.cli.pipeline import given, pipeline_command
from sfmodel.config import PRESETS
from sfmodel.terminal import plain_console
from sfmodel.train.config import RECIPES, TrainConfig
from sfmodel.train.defaults import Variant, defaults
from sfmodel.train.loop import train


def train_command(arguments: Sequence[str]) -> Callable[..., None]:
    """`sfmodel train` with the defaults of the preset, the recipe and the variant that the
    arguments name, or of the pipeline."""
    if given(arguments, "pipeline") is not None:
        return pipeline_command(arguments)

    def named(option: str, known: Iterable[str], otherwise: str) -> str:
        value = given(arguments, option)
        return value if value and value in known else otherwise  # an unknown one is refused later

    default = defaults(
        named("preset", PRESETS, "toy"),
        named("recipe", RECIPES, "tf"),
        named("variant", get_args(Variant), "paper"),
    )

    def run(
        config: Annotated[TrainConfig, tyro.conf.arg(name="")] = default,
        resume: bool = False,
        variant: Variant = "paper",
        dry_run: bool = False,
        ranks: int = WORLD,
    ) -> None:
        """Train a model: progress, log.jsonl, curves.png, samples, checkpoints, weights. The
        defaults are those of the preset, the recipe and the variant. Under torchrun, on all its
        ranks. --pipeline self-forcing trains all models from nothing to a self-forced one: its
        --help.

        Args:
            resume: Continue the run in the output folder, bit for bit as if it had not stopped, or
                start it where there is none.
            variant: Defaults at Wan2.1's size: the paper's 64 ranks and real score of 14B, or those
                of one node, with a real score of 1.3B.
            dry_run: Train nothing: show what the run would take of memory, time and disk, and which
                of its files are missing.
            ranks: Number of GPUs of a dry run; otherwise torchrun says it.
        """
        check_ranks(ranks, dry_run)
        first = os.environ.get("RANK", "0") == "0"
        if dry_run:
            if first:
                show({"": config}, ranks, plain_console())
            return
        weights = train(config, resume=resume)
        if first:
            print(f"weights: {weights}; see them: sfmodel generate --checkpoint {weights}")

    return run
