"""`python -m bench wall-clock`: quality by training time in the toy world, as the right half of the
paper's Figure 6 (arXiv 2506.08009). Self, diffusion and teacher forcing with DMD start from the
same weights; each is measured on the way, until it has trained for as many seconds.

A run is the trainer's own, one to a CPU core, and its seconds are those that it says it trained
for: measuring takes none of them. What is done is kept (`experiments.jobs`).
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from bench import figures
from bench.tables import Table, show
from experiments import jobs, table2
from sfmodel.machine import describe, machine
from sfmodel.terminal import plain_console
from sfmodel.toy.evaluate import over
from sfmodel.train.parallel import checkpoints, facts

COLOURS = {"SF + DMD": figures.BLUE, "DF + DMD (CausVid)": figures.ORANGE, "TF + DMD": "#4f7a3a"}
BANDS = table2.PARTS[0], table2.LATE  # of latent frames
START = "start"


@dataclass(frozen=True)
class Job(table2.Job):
    """A row of the experiment by time. scale.updates: of the generator, between two measurements;
    seconds: of training after which it ends."""

    seconds: float = 0.0


def run(job: Job) -> dict[str, Any]:
    """Trains one model and measures it on the way, as far as that is not done. The learning rate
    stays: it cannot fall towards an end that no update has."""
    config, points = replace(job.config(), decay_fraction=0.0), list[dict[str, Any]]()
    while not points or points[-1]["seconds"] < job.seconds:
        updates = job.scale.updates * (len(points) + 1)
        path = config.output / f"{job.split}-{updates:06d}.json"
        if not path.exists():
            weights = jobs.trained(replace(config, steps=updates))
            trained = facts(checkpoints(config.output / "checkpoints")[-1])
            assert trained["step"] == updates
            distance = table2.measured(job, weights)["distance"]
            point = {"updates": updates, "seconds": trained["seconds"], "distance": distance}
            jobs.keep(path, point)
        points.append(json.loads(path.read_text()))
    return {"row": job.row, "seed": job.seed, "points": points}


def wall_clock(
    output: Path = Path("out/wall-clock"),
    rows: tuple[str, ...] = tuple(COLOURS),
    seconds: float = 120.0,
    every: int = 16,
    batch: int = 20,
    seeds: int = 3,
    videos: int = 192,
    split: Literal["test", "validation"] = "test",
    workers: int | None = None,
) -> None:
    """Quality by training time, of self, diffusion and teacher forcing with DMD in the toy world:
    results.json, a table and wall-clock.png. About twenty minutes on two idle cores.

    Args:
        output: Folder of the experiment; what is done there is not done again.
        rows: That are trained.
        seconds: Of training, measuring not counted; a larger number goes on where a run ended.
        every: Updates of the generator between two measurements.
        batch: Clips an update.
        seeds: Runs of each row.
        videos: That each measurement is of.
        split: Real videos to measure against; settings are chosen on "validation".
        workers: Jobs at a time; by default one a CPU core, up to eight on a GPU.
    """
    jobs.check_among("rows", rows, [*COLOURS])
    scale = table2.Scale(every, batch, seeds, videos)
    for name, number in (("seconds", seconds), *vars(scale).items()):
        if not 0 < number < float("inf"):
            raise ValueError(f"{'every' if name == 'updates' else name}={number}: must be positive")
    planned = [
        Job(row, "chunk-wise", seed, scale, output, split, seconds)
        for seed in range(seeds)
        for row in rows
    ]
    changes = {name: str(table2.ROWS[name]) for name in COLOURS}
    jobs.begin(output, {"scale": vars(scale), "rows": changes})
    init = planned[0].config().init
    assert init is not None
    summary = {
        "machine": machine("cuda" if jobs.on_gpu() else "cpu"),
        "scale": vars(scale),
        "seconds": seconds,
        "split": split,
        "references": table2.references(scale, split),
        START: table2.measured(planned[0], init)["distance"],
        "results": jobs.run_all(run, planned, workers, _line),
    }
    jobs.keep(output / "results.json", summary, digits=4)
    figures.save(draw(summary), output / "wall-clock.png")
    show(table(summary), plain_console(140))
    print(f"{output}/results.json, wall-clock.png")


def _line(result: dict[str, Any]) -> str:
    last = result["points"][-1]
    distances = ", ".join(f"{over(last['distance'], band):.2f}" for band in BANDS)
    return f"distance {distances} after {last['updates']} updates, {last['seconds']:.0f} s"


def _by_row(summary: dict[str, Any]) -> Iterator[tuple[str, list[Sequence[dict[str, Any]]]]]:
    """Each row with its measurements, those of all seeds together, as far as all of them have any;
    first the start, which takes no time."""
    start = {"updates": 0, "seconds": 0.0, "distance": summary[START]}
    for row in COLOURS:
        runs = [[start, *r["points"]] for r in summary["results"] if r["row"] == row]
        if runs:
            yield row, [*zip(*runs, strict=False)]


def table(summary: dict[str, Any]) -> Table:
    """Means ± deviations over seeds, a line a measurement."""
    lines = []
    for row, measured in _by_row(summary):
        for i, points in enumerate(measured):
            seconds = statistics.mean(point["seconds"] for point in points)
            distances = [[over(p["distance"], band) for p in points] for band in BANDS]
            cells = [str(points[0]["updates"]), f"{seconds:.0f}", *map(jobs.mean, distances)]
            lines.append([row if i < 1 else "", *cells])
    heads = [f"distance {a}-{b - 1}" for a, b in BANDS]
    scale, least = summary["scale"], summary["references"]
    for name, of in least.items():
        known = [f"{over(of['distance'], b):.2f}" for b in BANDS if b[1] <= len(of["distance"])]
        lines.append([name, "", "", *known, *[""] * (len(BANDS) - len(known))])
    title = f"{describe(summary['machine'])}, {scale['batch']} clips, {scale['seeds']} seeds"
    return Table(title, ["", "updates", "s of training", *heads], lines)


def draw(summary: dict[str, Any]) -> Any:
    """Distance by seconds: means over seeds, and each seed's line behind them."""
    title = f"{describe(summary['machine'])}, {summary['scale']['seeds']} seeds"
    figure, axes = figures.new(title, 11, 4.4, columns=len(BANDS))
    for ax, band in zip(axes, BANDS, strict=True):
        for row, measured in _by_row(summary):
            at = [[point["seconds"] for point in points] for points in measured]
            found = [[over(p["distance"], band) for p in points] for points in measured]
            ax.plot(at, found, color=COLOURS[row], alpha=0.25, linewidth=0.8)
            mean = ([*map(statistics.mean, each)] for each in (at, found))
            ax.plot(*mean, "o-", color=COLOURS[row], markersize=3, label=row)
        for (name, least), style in zip(summary["references"].items(), ("--", ":"), strict=True):
            if band[1] <= len(least["distance"]):
                level = over(least["distance"], band)
                ax.axhline(level, linestyle=style, color=figures.GREY, label=name)
        ax.set(yscale="log", title=f"latent frames {band[0]}-{band[1] - 1}",
               xlabel="seconds of training")  # fmt: skip
        ax.grid(alpha=0.3, which="both")
    axes[0].set_ylabel("Fréchet distance from real videos")
    handles = axes[0].get_legend_handles_labels()
    figure.legend(*handles, loc="outside lower center", ncols=5, fontsize=8)
    return figure
