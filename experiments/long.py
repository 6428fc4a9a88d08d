"""`python -m bench long`: streams of up to 30 times the training length, in the toy world. Teacher
forcing, self forcing on clips and on rollouts longer than a clip, these also with every chunk at
its last step, and with a sink whose position stays or moves along with the window; every model
sampled past its window by the ring.

What is done is kept (`experiments.jobs`).
"""

from __future__ import annotations

import functools
import itertools
import json
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch

from bench import figures
from bench.tables import Table, show
from experiments import jobs
from experiments.table2 import CODEC, EULER, FLOW, FRAMES, Scale, load, settings
from sfmodel.config import PRESETS
from sfmodel.machine import describe, machine
from sfmodel.terminal import plain_console
from sfmodel.toy import evaluate
from sfmodel.toy.evaluate import BATCH, Sampling, over
from sfmodel.train.config import TrainConfig
from sfmodel.video import contact_sheet_of_rows

LENGTHS = (1, 4, 10, 30)  # of a training clip; each is measured in its last frames
LAST = 4
CHUNK = 3
SCALE = Scale(videos=96)
ROLLOUTS = (7, 16, 28)  # latent frames, one of them an update
MEASURED = {
    "distance": "distance",
    "radius": "radius drift, px",
    "colour": "other colour",
    "impossible": "impossible moves",
}
Sink = Literal["none", "absolute", "relative"]


@dataclass(frozen=True)
class Training:
    """A way to train. sink: one latent frame is kept, at a position of this kind. sampled: sinks
    that the model is streamed with, its own if none is given."""

    recipe: str
    sink: Sink = "none"
    sampled: tuple[Sink, ...] = ()
    euler: int = 0
    change: tuple[tuple[str, Any], ...] = ()


_LONG = (("rollouts", ROLLOUTS), ("judged", "random"))
TRAININGS = {
    "TF": Training("tf", sampled=("none", "relative"), euler=EULER, change=FLOW),
    "SF": Training("sf+dmd", sampled=("none", "absolute", "relative")),
    "long SF": Training("sf+dmd", change=_LONG),
    "long SF, last step": Training("sf+dmd", change=(*_LONG, ("last_step_only", True))),
    "long SF, sink absolute": Training("sf+dmd", "absolute", change=_LONG),
    "long SF, sink relative": Training("sf+dmd", "relative", change=_LONG),
}


def sinks(sink: Sink) -> dict[str, Any]:
    """Settings of a sink, of a preset as of a run of the trainer."""
    return {} if sink == "none" else {"sink": 1, "positions": sink}


@dataclass(frozen=True)
class Job:
    training: str
    seed: int
    scale: Scale
    folder: Path
    split: str

    @property
    def name(self) -> str:
        return f"{self.training.replace(', ', '-').replace(' ', '-').lower()}-{self.seed}"

    def config(self) -> TrainConfig:
        training, output = TRAININGS[self.training], self.folder / self.name
        change = {"chunks": (CHUNK,), **sinks(training.sink), **dict(training.change)}
        return settings(training.recipe, output, self.scale, self.seed, **change)

    def samplings(self) -> dict[str, Sampling]:
        """The ways that the model is streamed, by the name of their row in the table."""
        training = TRAININGS[self.training]
        preset = replace(PRESETS["toy"], chunk=CHUNK, window=FRAMES)
        return {
            self.training + (f", sampled with sink, {sink}" if sink != training.sink else ""):
                Sampling(replace(preset, **sinks(sink)), training.euler)
            for sink in training.sampled or (training.sink,)
        }  # fmt: skip


def run(job: Job) -> dict[str, Any]:
    """Trains one model and measures the ways to stream it, unless that is done."""
    config = job.config()
    path = config.output / f"{job.split}.json"
    if path.exists():
        return json.loads(path.read_text())
    began = time.perf_counter()
    model = load(jobs.trained(config))
    trained = time.perf_counter()
    held, scores = held_out(job.scale.videos, job.split), {}
    for name, sampling in job.samplings().items():
        made = [
            evaluate.generate(model, sampling, text.to(model.device), frames(), seed=i).cpu()
            for i, text in enumerate(held.text_BTE.split(BATCH))
        ]
        scores[name] = evaluate.score(evaluate.seen_in(CODEC, torch.cat(made)), held.real_NFD)
    seconds = {"train": trained - began, "measure": time.perf_counter() - trained}
    result = {"training": job.training, "seed": job.seed, "seconds": seconds, "scores": scores}
    jobs.keep(path, result)
    return result


def frames() -> int:
    """Latent frames of a video."""
    return FRAMES * LENGTHS[-1]


@functools.cache
def held_out(videos: int, split: str) -> evaluate.HeldOut:
    return evaluate.held_out(CODEC, frames(), videos, split)


def long(
    output: Path = Path("out/long"),
    trainings: tuple[str, ...] = tuple(TRAININGS),
    updates: int | None = None,
    batch: int | None = None,
    seeds: int | None = None,
    videos: int | None = None,
    split: Literal["test", "validation"] = "test",
    workers: int | None = None,
) -> None:
    """Streams of up to 30 times the training length, by how the model was trained and is streamed:
    trains and measures, and writes results.json, a table, a figure and a contact sheet.

    Args:
        output: Folder of the experiment; jobs that are done there are not done again.
        trainings: Ways to train.
        updates: Of the generator, the same for all.
        batch: Clips an update.
        seeds: Runs of each.
        videos: That each way to stream a model is measured by.
        split: Real videos to measure against; settings are chosen on "validation".
        workers: Jobs at a time; by default one a CPU core, up to eight on a GPU.
    """
    jobs.check_among("trainings", trainings, [*TRAININGS])
    asked = {"updates": updates, "batch": batch, "seeds": seeds, "videos": videos}
    scale = SCALE.asked(**asked)
    seeded = itertools.product(range(scale.seeds), trainings)
    planned = [Job(name, seed, scale, output, split) for seed, name in seeded]
    described = {name: str(training) for name, training in TRAININGS.items()}
    jobs.begin(output, {"scale": vars(scale), "trainings": described})
    began = time.perf_counter()
    results = jobs.run_all(run, planned, workers, _line)
    held = held_out(scale.videos, split)
    summary = {
        "machine": machine("cuda" if jobs.on_gpu() else "cpu"),
        "scale": vars(scale),
        "split": split,
        "seconds": time.perf_counter() - began,
        "real": evaluate.score(evaluate.seen_in(CODEC, held.latents_BFCHW), held.real_NFD),
        "results": results,
    }
    jobs.keep(output / "results.json", summary, digits=4)
    figures.save(draw(summary), output / "long.png")
    sheet(planned, output)
    show(table(summary), plain_console(160))
    print(f"{output}/results.json, long.png, sheet.png")


def _line(result: dict[str, Any]) -> str:
    name, scores = next(iter(result["scores"].items()))
    distances = ", ".join(f"{over(scores['distance'], band):.2f}" for band in bands())
    return f"{name}: distance {distances}, {sum(result['seconds'].values()):.0f} s"


def bands() -> list[tuple[int, int]]:
    """Half-open ranges of latent frames, the last ones of each length."""
    return [(FRAMES * length - LAST, FRAMES * length) for length in LENGTHS]


def _rows(summary: dict[str, Any]) -> Iterator[tuple[str, list[dict[str, Any]]]]:
    """Each row of the table with the scores of its seeds."""
    by_name: dict[str, list[dict[str, Any]]] = {}
    for name in TRAININGS:
        for result in (r for r in summary["results"] if r["training"] == name):
            for row, scores in result["scores"].items():
                by_name.setdefault(row, []).append(scores)
    yield from by_name.items()


def table(summary: dict[str, Any]) -> Table:
    """Means ± deviations over seeds, by the length of the stream."""
    scale, longest = summary["scale"], bands()[-1]
    rest = [*MEASURED][1:]
    columns = ["", *(f"distance at {length} ×" for length in LENGTHS)]
    columns += [f"{MEASURED[what]} at {LENGTHS[-1]} ×" for what in rest]
    lines = []
    for name, seeds in [("real, other videos", [summary["real"]]), *_rows(summary)]:
        values = [[over(each["distance"], band) for each in seeds] for band in bands()]
        values += [[over(each[what], longest) for each in seeds] for what in rest]
        lines.append([name, *map(jobs.mean, values)])
    title = f"{scale['updates']} updates of {scale['batch']} clips of {FRAMES} latent frames, "
    title += f"{scale['seeds']} seeds, {describe(summary['machine'])}"
    return Table(title, columns, lines)


def draw(summary: dict[str, Any]) -> Any:
    """Distance over time, as means over a training clip's length, with the range of the seeds."""
    title = f"{describe(summary['machine'])}, {summary['scale']['seeds']} seeds"
    figure, (ax,) = figures.new(title, 9, 4.8)

    def by_clip(distance: Sequence[float]) -> list[float]:
        return [over(distance, (at, at + FRAMES)) for at in range(0, frames(), FRAMES)]

    at = [FRAMES * (i + 1) for i in range(LENGTHS[-1])]
    for name, seeds in _rows(summary):
        lines = torch.tensor([by_clip(each["distance"]) for each in seeds])
        style = ":" if "sampled" in name else "-"
        (line,) = ax.plot(at, lines.mean(0), style, label=name)
        ax.fill_between(at, lines.amin(0), lines.amax(0), color=line.get_color(), alpha=0.12)
    ax.plot(at, by_clip(summary["real"]["distance"]), "--", color="#555555", label="real")
    ax.set(xscale="log", yscale="log", xlabel="latent frames", ylabel="Fréchet distance from real")
    ax.set_xticks([FRAMES * length for length in LENGTHS], [f"{length} ×" for length in LENGTHS])
    ax.grid(alpha=0.3, which="both")
    figure.legend(loc="outside lower center", ncols=3, fontsize=8)
    return figure


def sheet(planned: Sequence[Job], output: Path) -> None:
    """sheet.png: the end of each length of one prompt's video, by the first seed of every row."""
    held = held_out(planned[0].scale.videos, planned[0].split)
    latents = {"real": held.latents_BFCHW[:1]}
    for job in (job for job in planned if job.seed == 0):
        model = load(job.config().output / "model.safetensors")
        for name, sampling in job.samplings().items():
            text = held.text_BTE[:1].to(model.device)
            latents[name] = evaluate.generate(model, sampling, text, frames()).cpu()
    with torch.no_grad():
        videos = CODEC.decode_chunk(torch.cat([*latents.values()]))[0]
    pixel_frames = CODEC.temporal_factor
    ends = [pixel_frames * (FRAMES * length - 1) + 1 for length in LENGTHS]
    shown = torch.cat([videos[:, end - pixel_frames * 2 : end : 2] for end in ends], 1)
    title = f"the last {pixel_frames * 2} frames of {', '.join(f'{n} ×' for n in LENGTHS)} a clip"
    contact_sheet_of_rows(shown, output / "sheet.png", [*latents], title, shown.shape[1])
