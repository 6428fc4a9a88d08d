"""`sfmodel train --pipeline`: all stages of a pipeline, with settings of all and of each."""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

import tyro

from sfmodel.cli.dry_run import WORLD, check_ranks, show
from sfmodel.config import PRESETS
from sfmodel.terminal import plain_console
from sfmodel.train.config import TrainConfig
from sfmodel.train.defaults import Variant
from sfmodel.train.pipeline import InitBy, check_scale, run_pipeline, stages

_INITS = get_args(InitBy)
# Settings of a run that a pipeline has for itself, or that are of one stage alone.
OWN = {"output", "recipe", "init"}


@dataclass(frozen=True)
class Stage(TrainConfig):
    """Settings of one stage."""

    def __post_init__(self) -> None:
        """Leaves it to `checked` to check them: tyro would put words of its own around an error."""

    def checked(self, name: str) -> TrainConfig:
        """The same, of the stage of that name. Raises ValueError as `TrainConfig` does."""
        try:
            return TrainConfig(**vars(self))
        except ValueError as error:
            raise ValueError(f"stage {name}: {error}") from None


def given(arguments: Sequence[str], option: str) -> str | None:
    """The word after an option, of several the last one; None where it is not among the
    arguments."""
    found = None
    for i, word in enumerate(arguments):
        name, equals, value = word.partition("=")
        if name.replace("_", "-") == f"--{option}":
            found = value if equals else "".join(arguments[i + 1 : i + 2])
    return found


def pipeline_stages(arguments: Sequence[str]) -> dict[str, TrainConfig]:
    """The stages that the arguments name, with their defaults; what they say wrongly is refused
    when all of them are read."""
    options: dict[str, Any] = {}
    for name, kind in (("output", Path), ("teacher", Path), ("scale", float)):
        with suppress(ValueError):
            if (word := given(arguments, name)) is not None:
                options[name] = kind(word)
    for name, known in (
        ("preset", PRESETS), ("teacher-preset", PRESETS), ("init-by", _INITS),
        ("variant", get_args(Variant)),
    ):  # fmt: skip
        if (word := given(arguments, name)) in known:
            options[name.replace("-", "_")] = word
    with suppress(ValueError):
        return stages(**options)
    return stages()


def for_stages(arguments: Sequence[str]) -> list[str]:
    """The arguments of a command, where those of a pipeline that are settings of a run without a
    stage's name are said of every stage, before what is said of one."""
    if arguments[:1] != ["train"] or given(arguments, "pipeline") is None:
        return [*arguments]
    settings, names = (
        {each.name for each in fields(TrainConfig)} - OWN,
        [*pipeline_stages(arguments)],
    )
    begins = [i for i, word in enumerate(arguments) if word.startswith("--")] + [len(arguments)]
    of_all, others = [], [*arguments[: begins[0]]]
    for begin, end in itertools.pairwise(begins):
        word, *values = arguments[begin:end]
        name = word.partition("=")[0].removeprefix("--").removeprefix("no-").replace("-", "_")
        if name in settings:
            of_all += [[f"--{stage}.{word[2:]}", *values] for stage in names]
        else:
            others += [word, *values]
    return [*others[:1], *itertools.chain(*of_all), *others[1:]]


def pipeline_command(arguments: Sequence[str]) -> Callable[..., None]:
    """`sfmodel train --pipeline` with the stages that the arguments name."""
    default = {name: Stage(**vars(each)) for name, each in pipeline_stages(arguments).items()}

    def run(
        pipeline: Literal["self-forcing"],
        output: Path = Path("out/pipeline"),
        init_by: InitBy = "ode",
        variant: Variant = "paper",
        scale: float = 1.0,
        resume: bool = False,
        accept: bool = False,
        dry_run: bool = False,
        ranks: int = WORLD,
        stages: Annotated[dict[str, Stage], tyro.conf.arg(name="")] = default,
    ) -> None:
        """Train all stages from nothing to a self-forced model, each in a folder of its own. A
        setting of `sfmodel train` is of all stages (--batch 32), or after its name of one
        (--init.batch 16). With --teacher, and for Wan2.1, no teacher is trained.

        Args:
            pipeline: What is made.
            output: Folder of the stages.
            init_by: How a causal model begins: ode, by regression to the teacher's trajectories, or
                consistency, by consistency distillation.
            variant: Defaults at Wan2.1's size: the paper's 64 ranks and real score of 14B, or those
                of one node, with a real score of 1.3B.
            scale: Factor of all numbers of updates and trajectories.
            resume: Go on where it was stopped, bit for bit, or start where there is nothing.
            accept: Go on after a stage that has not passed its check.
            dry_run: Train nothing: show what each stage would take of memory, time and disk, and
                which of its files are missing.
            ranks: Number of GPUs of a dry run; otherwise torchrun says it.
        """
        check_scale(scale)
        check_ranks(ranks, dry_run)
        checked = {name: each.checked(name) for name, each in stages.items()}
        first = os.environ.get("RANK", "0") == "0"
        if dry_run:
            if first:
                named = {f"stage {name}": each for name, each in checked.items()}
                show(named, ranks, plain_console())
            return
        weights = run_pipeline(checked, output, resume=resume, accept=accept)
        if first:
            print(f"weights: {weights}; see them: sfmodel generate --checkpoint {weights}")

    return run
