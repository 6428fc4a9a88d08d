"""The pipeline from nothing to a self-forced model (arXiv 2506.08009, section 4): a bidirectional
teacher, a causal model that starts from it (regression to the teacher's trajectories, CausVid, or
consistency distillation, Causal Forcing++), and self forcing.

Every stage is a run of the trainer in a folder of its own, which begins from the weights of the
stages before it, and is measured once it is over (`checks`). What is over is not done again.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import torch

from sfmodel.extras import needed
from sfmodel.ranks import started
from sfmodel.terminal import plain_console
from sfmodel.toy.vae import ToyVAE
from sfmodel.train import checks, parallel, report
from sfmodel.train.config import TrainConfig
from sfmodel.train.defaults import Variant, defaults, official
from sfmodel.train.loop import train
from sfmodel.train.shards import opened

with needed():
    from rich.table import Table

InitBy = Literal["ode", "consistency"]
# Settings that are numbers of updates or trajectories.
SCALED = ("steps", "pairs", "warmup", "ema_start", "critic_warmup", "log_every", "save_every")


def stages(
    preset: str = "toy",
    output: Path = Path("out/pipeline"),
    init_by: InitBy = "ode",
    teacher: Path | None = None,
    teacher_preset: str | None = None,
    scale: float = 1.0,
    variant: Variant = "paper",
) -> dict[str, TrainConfig]:
    """Settings of each stage, by its name, as far as `defaults` and the stages before it say.

    teacher: weights of the teacher in all stages; without them the toy's is trained, and those of
    Wan2.1 are `official` ones, of the generator's size for the init and of the variant's for self
    forcing. teacher_preset: sizes of the teacher in all stages, where other than the generator's,
    which then starts from the base model of its own. scale: of all numbers of updates and of
    trajectories. Raises ValueError for one that is not positive."""
    check_scale(scale)
    made: dict[str, TrainConfig] = {}
    start: Path | None = None
    score: dict[str, Any] = {}
    if teacher is None and preset == "toy":
        made["teacher"] = replace(
            defaults(preset, "bidirectional"), output=output / "1-teacher", init=None
        )
        teacher = made["teacher"].weights
    if teacher or teacher_preset:
        teacher = teacher or official(teacher_preset or preset)
        if teacher_preset not in (None, preset):
            start = official(preset)
        score = {"teacher": teacher, "teacher_preset": teacher_preset, "critic": start}
    teacher = teacher or official(preset)
    made["init"] = replace(
        defaults(preset, init_by, variant), output=output / "2-init", init=start or teacher,
        teacher=teacher, teacher_preset=teacher_preset,
    )  # fmt: skip
    made["self-forcing"] = replace(
        defaults(preset, "sf+dmd", variant), output=output / "3-self-forcing",
        init=made["init"].weights, **score,
    )  # fmt: skip
    return {name: _scaled(config, scale) for name, config in made.items()}


def check_scale(scale: float) -> None:
    if not 0 < scale <= 1000:
        raise ValueError(f"scale={scale}: must be more than 0 and at most 1000")


def _scaled(config: TrainConfig, scale: float) -> TrainConfig:
    values = {name: getattr(config, name) for name in SCALED}
    return replace(
        config, **{name: max(1, round(scale * value)) for name, value in values.items() if value}
    )


def run_pipeline(
    stages: Mapping[str, TrainConfig],
    output: Path,
    *,
    resume: bool = False,
    accept: bool = False,
    device: torch.device | str | None = None,
) -> Path:
    """Runs what is not over yet of the stages, in their order, and returns the path of the last
    one's weights. output: folder for the curves and samples of all. accept: go on after a stage
    that has not passed its check.

    Raises ValueError for such a stage otherwise, for one that would begin anew under a later one
    that is there, and as `train` does. Stopped, by `process.STOPS` or a kill, it goes on with
    `resume` to the same weights, bit for bit."""
    configs = [*stages.values()]
    shared = configs[0].shard, device, configs[0].patience
    with started(*shared) as ranks, parallel.alone(output, ranks):
        begun = [each for each in configs if parallel.checkpoints(each.output / "checkpoints")]
        if begun and not resume:
            raise ValueError(
                f"{begun[0].output}: holds a run already: resume it (--resume) or name another "
                "--output"
            )
        console = plain_console()
        console.quiet = not ranks.first
        for i, (name, config) in enumerate(stages.items()):
            measures = checks.kept(config) if resume else None
            if measures is None:
                _check_later(config, configs[i + 1 :])
                console.print(table(stages), f"stage {name}: {config.output}", sep="\n")
                if ranks.device.type == "cuda":
                    torch.cuda.reset_peak_memory_stats(ranks.device)
                train(config, resume=config in begun, device=device)
                console.print(f"stage {name}: measuring what it makes")
                if ranks.first:
                    measures = checks.check(config, ranks.device)
                measures = ranks.from_first(measures)
            assert measures is not None
            if failed := [each for each in measures if not each.passed]:
                said = "; ".join(each.said for each in failed)
                said = f"{config.output}: stage {name} has not passed its check: {said}"
                if not accept:
                    raise ValueError(
                        f"{said}: give it more updates (--resume --{name}.steps), or remove it for "
                        f"another learning rate (--{name}.lr), or go on all the same (--resume "
                        "--accept)"
                    )
                console.print(f"{said}; accepted", soft_wrap=True)
        if ranks.first:
            console.print(table(stages))
            draw(stages, output)
    return configs[-1].weights


def _check_later(config: TrainConfig, later: list[TrainConfig]) -> None:
    """Raises ValueError where a stage that is not over has later ones, which began from others."""
    if begun := [each.output for each in later if (each.output / "config.json").exists()]:
        raise ValueError(
            f"{begun[0]}: began from {config.output} as it was, which would change now: remove "
            f"{', '.join(map(str, begun))} or name another output"
        )


def table(stages: Mapping[str, TrainConfig]) -> Table:
    """Table of the stages as they stand: what, from what, how long it took and will take by the
    seconds per update of its log, and what its check said."""
    made, by_weights = Table(), {config.weights: name for name, config in stages.items()}

    def named(path: Path | None) -> str:
        return "random weights" if path is None else by_weights.get(path, path.name)

    for column in (
        "stage",
        "recipe",
        "from",
        "teacher",
        "updates",
        "time of updates",
        "loss",
        "check",
    ):
        made.add_column(column, overflow="fold", no_wrap=column in ("stage", "from"))
    for name, config in stages.items():
        recipe, teacher = config.recipe, ""
        if config.objective.needs_trajectories:
            recipe = f"{config.pairs} trajectories, {recipe}"
        if config.objective.needs_teacher:
            teacher = named(config.teacher)
        updates, time, loss = str(config.steps), "", ""
        if records := report.logged(config.output / "log.jsonl", config.steps):
            last, done = records[-1], int(records[-1]["step"])
            left = (config.steps - done) * last["seconds_per_step"]
            updates = f"{done} of {config.steps}"
            time = _time(last["seconds"]) + (f", {_time(left)} more" if left else "")
            loss = f"{records[0]['loss']:.3g}, {last['loss']:.3g}"
        measures = checks.kept(config) or ()
        said = "\n".join("failed: " * (not each.passed) + each.said for each in measures)
        made.add_row(name, recipe, named(config.init), teacher, updates, time, loss, said)
    return made


def _time(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 120 else f"{seconds / 60:.0f} min"


def draw(stages: Mapping[str, TrainConfig], output: Path) -> None:
    """curves.png: losses and norms of all stages. samples.png, in the toy world: real clips, and
    what each stage makes of the same prompts."""
    logs = {
        f"{config.output.name}: {config.recipe}": report.logged(
            config.output / "log.jsonl", config.steps
        )
        for config in stages.values()
    }
    report.plot(logs, output / "curves.png")
    if all(config.preset == "toy" for config in stages.values()):
        sheet(stages, output / "samples.png")


@torch.no_grad()
def sheet(stages: Mapping[str, TrainConfig], path: Path) -> None:
    """Contact sheet of the clips that the checks have kept, as far as they can be read."""
    from sfmodel.video import contact_sheet_of_rows  # needs PyAV

    clips: dict[str, torch.Tensor] = {}
    prompts: list[str] = []
    for name, config in stages.items():
        with suppress(ValueError), opened(config.output / "check.safetensors") as file:
            prompts = json.loads(file.metadata()["prompts"])
            clips = {"real": file.get_tensor("real"), **clips, name: file.get_tensor("latents")}
    if not clips:
        return
    frames = min(each.shape[1] for each in clips.values())
    rows = torch.stack([each[:, :frames] for each in clips.values()], 1)
    videos = ToyVAE.from_pretrained().decode_chunk(rows.flatten(0, 1))[0]
    labels = [
        f"real: {prompt or '(no prompt)'}" if name == "real" else name
        for prompt in prompts
        for name in clips
    ]
    contact_sheet_of_rows(videos, path, labels, "real clips and what each stage makes")
