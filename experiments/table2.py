"""`python -m bench experiment`: the comparison of the paper's Table 2 in the toy world. Teacher,
diffusion and self forcing from one initialisation, with as many updates of the generator each, over
several seeds, chunk by chunk and frame by frame; every model measured on videos up to four times as
long as those it was trained on (`sfmodel.toy.evaluate`).

What is done is kept (`experiments.jobs`).
"""

from __future__ import annotations

import functools
import itertools
import json
import statistics
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch

from bench import figures
from bench.tables import Table, show
from experiments import jobs
from sfmodel.config import PRESETS
from sfmodel.dit import DiT
from sfmodel.machine import describe, machine
from sfmodel.schedule import FlowSchedule
from sfmodel.terminal import plain_console
from sfmodel.toy import evaluate
from sfmodel.toy.evaluate import BATCH, Sampling, bands, over
from sfmodel.toy.vae import ToyVAE
from sfmodel.train.batch import Draw
from sfmodel.train.config import TrainConfig
from sfmodel.train.defaults import defaults
from sfmodel.train.trajectories import solve
from sfmodel.video import contact_sheet_of_rows
from sfmodel.weights import checkpoint

FRAMES = 7  # latent frames of a training clip, and of the window
LONG = 4 * FRAMES
PARTS = bands(LONG, FRAMES)  # of the table's columns
LATE = PARTS[-1]
EULER = 10  # steps of a model that is not distilled
CODEC = ToyVAE.from_pretrained()


@dataclass(frozen=True)
class Row:
    """A row of the table. euler: of its sampler (`Sampling`). change: settings other than the
    recipe's own, chosen on the validation split."""

    recipe: str
    euler: int = 0
    change: tuple[tuple[str, Any], ...] = ()


# Learning rates are the best of a few on the validation split (docs/training.md).
FLOW = (("optimizer", "adamw"), ("lr", 1e-3), ("betas", (0.0, 0.99)), ("ema", 0.8),
        ("ema_start", 0), ("warmup", 5), ("decay_fraction", 1.0), ("drop_text", 0.0),
        ("darken", 0.0), ("context_noise", 0.0))  # fmt: skip
ROWS = {
    "TF": Row("tf", EULER, FLOW),
    "DF": Row("df", EULER, (*FLOW, ("lr", 2e-3))),
    "TF + DMD": Row("tf+dmd", change=(("lr", 4e-4),)),
    "DF + DMD (CausVid)": Row("df+dmd", change=(("lr", 1.6e-3),)),
    "SF + DMD": Row("sf+dmd", change=(("lr", 1e-4),)),
    "SF + SiD": Row("sf+sid", change=(("lr", 1e-4),)),
    "SF + GAN": Row("sf+gan", change=(("lr", 1e-4),)),
    "SF + DMD, first hidden": Row("sf+dmd", change=(("lr", 1e-4), ("hide_first", True))),
}
WAYS = {"chunk-wise": 3, "frame-wise": 1}


@dataclass(frozen=True)
class Scale:
    """Size of an experiment. updates: of the generator. videos: that a model is measured by."""

    updates: int = 32
    batch: int = 20
    seeds: int = 3
    videos: int = 192

    def asked(self, **sizes: int | None) -> Scale:
        """The same with those that are not None. Raises ValueError for less than 1."""
        scale = replace(self, **{name: n for name, n in sizes.items() if n is not None})
        if min(vars(scale).values()) < 1:
            raise ValueError(f"{scale}: each must be at least 1")
        return scale


# Meant to take under nine minutes on one; not measured on a GPU yet.
ON_GPU = Scale(updates=48, batch=64, seeds=3, videos=512)


@dataclass(frozen=True)
class Job:
    row: str
    way: str
    seed: int
    scale: Scale
    folder: Path
    split: str

    @property
    def name(self) -> str:
        row = "".join(c if c.isalnum() else "-" for c in self.row.lower())
        return f"{self.way}-{row}-{self.seed}"

    def sampling(self) -> Sampling:
        preset = replace(PRESETS["toy"], chunk=WAYS[self.way], window=FRAMES)
        return Sampling(preset, ROWS[self.row].euler)

    def config(self) -> TrainConfig:
        row, output = ROWS[self.row], self.folder / self.name
        return settings(
            row.recipe, output, self.scale, self.seed, chunks=(WAYS[self.way],), **dict(row.change)
        )


def settings(recipe: str, output: Path, scale: Scale, seed: int, **change: Any) -> TrainConfig:
    """Settings of a run from the start that all share."""
    return replace(
        defaults("toy", recipe),
        init=defaults("toy", "sf+dmd").init,
        output=output,
        frames=(FRAMES,),
        windows=(FRAMES,),
        steps=scale.updates,
        batch=scale.batch,
        seed=seed,
        save_every=scale.updates,
        log_every=max(1, scale.updates // 20),
        **change,
    )


def run(job: Job) -> dict[str, Any]:
    """Trains and measures one model, unless that is done."""
    config = job.config()
    path = config.output / f"{job.split}.json"
    if path.exists():
        return json.loads(path.read_text())
    began = time.perf_counter()
    weights = jobs.trained(config)
    trained = time.perf_counter()
    result = measured(job, weights)
    seconds = {"train": trained - began, "measure": time.perf_counter() - trained}
    result |= {"row": job.row, "way": job.way, "seed": job.seed, "seconds": seconds}
    jobs.keep(path, result)
    return result


def measured(job: Job, weights: Path) -> dict[str, Any]:
    """`evaluate` of weights, sampled as the job's row is."""
    held = held_out(job.scale.videos, job.split)
    return evaluate.evaluate(load(weights), job.sampling(), CODEC, held, FRAMES)


def load(weights: Path) -> DiT:
    model = DiT(PRESETS["toy"].dit)
    checkpoint.load(model, weights)
    return model.to("cuda" if jobs.on_gpu() else "cpu").eval()


held_out = functools.cache(functools.partial(evaluate.held_out, CODEC, LONG))


def experiment(
    output: Path = Path("out/experiment"),
    rows: tuple[str, ...] = tuple(ROWS),
    ways: tuple[str, ...] = tuple(WAYS),
    updates: int | None = None,
    batch: int | None = None,
    seeds: int | None = None,
    videos: int | None = None,
    split: Literal["test", "validation"] = "test",
    workers: int | None = None,
) -> None:
    """Compare teacher, diffusion and self forcing in the toy world: trains and measures every row
    and writes results.json, a table, figures and contact sheets. About half an hour on two cores.

    Args:
        output: Folder of the experiment; jobs that are done there are not done again.
        rows: Of the table.
        ways: Chunk-wise, frame-wise.
        updates: Of the generator, the same for all rows.
        batch: Clips an update.
        seeds: Runs of each row.
        videos: That each model is measured by.
        split: Real videos to measure against; settings are chosen on "validation".
        workers: Jobs at a time; by default one a CPU core, up to eight on a GPU.
    """
    jobs.check_among("rows", rows, [*ROWS])
    jobs.check_among("ways", ways, [*WAYS])
    asked = {"updates": updates, "batch": batch, "seeds": seeds, "videos": videos}
    scale = (ON_GPU if jobs.on_gpu() else Scale()).asked(**asked)
    seeded = itertools.product(range(scale.seeds), ways, rows)
    planned = [Job(row, way, seed, scale, output, split) for seed, way, row in seeded]
    of_rows = {name: str(row) for name, row in ROWS.items()}
    jobs.begin(output, {"scale": vars(scale), "rows": of_rows})
    began = time.perf_counter()
    results = jobs.run_all(run, planned, workers, _line)
    summary = {
        "machine": machine("cuda" if jobs.on_gpu() else "cpu"),
        "scale": vars(scale),
        "split": split,
        "seconds": time.perf_counter() - began,
        "references": references(scale, split),
        "results": results,
    }
    jobs.keep(output / "results.json", summary, digits=4)
    draw(summary, output)
    sheets(planned, output)
    for table in tables(summary):
        show(table, plain_console(140))
    print(f"{output}/results.json, distance.png, gap.png, sheet-*.png")


def _line(result: dict[str, Any]) -> str:
    parts = (f"{over(result['distance'], band):.2f}" for band in PARTS)
    took = sum(result["seconds"].values())
    return f"distance {', '.join(parts)}, gap {result['gap']:.2f}, {took:.0f} s"


def references(scale: Scale, split: str) -> dict[str, dict[str, Any]]:
    """`score` of other real videos, the least that can be had, and of the teacher's, which sees a
    whole training clip at once."""
    held, config = held_out(scale.videos, split), defaults("toy", "sf+dmd")
    assert config.teacher is not None
    teacher = load(config.teacher)
    schedule, made = FlowSchedule(config.model.shift), []
    for begin in range(0, scale.videos, BATCH):
        rows = range(begin, min(begin + BATCH, scale.videos))
        size = held.latents_BFCHW[0, :FRAMES].shape
        noise = Draw(0, rows, teacher.device).normal("teacher", *size)
        text = held.text_BTE[rows.start : rows.stop].to(teacher.device)
        flow = functools.partial(teacher, text_BTE=text)
        made.append(solve(flow, noise, schedule, (), config.teacher_steps)[:, -1].cpu())
    latents = {
        "real, other videos": held.latents_BFCHW,
        f"teacher, {config.teacher_steps} steps": torch.cat(made),
    }
    return {
        name: evaluate.score(evaluate.seen_in(CODEC, each), held.real_NFD)
        for name, each in latents.items()
    }


def _by_row(summary: dict[str, Any]) -> dict[str, dict[str, list[dict[str, Any]]]]:
    """Results by way and row, in the order of WAYS and ROWS; only those that there are."""
    found: dict[str, dict[str, list[dict[str, Any]]]] = {}
    for way, row in itertools.product(WAYS, ROWS):
        if results := [r for r in summary["results"] if (r["row"], r["way"]) == (row, way)]:
            found.setdefault(way, {})[row] = results
    return found


def cells(summary: dict[str, Any], way: str) -> tuple[list[str], list[list[str]]]:
    """The columns and rows of the table of one way."""
    columns = ["", *(f"distance {a}-{b - 1}" for a, b in PARTS), "exposure gap",
               f"radius drift, px, {LATE[0]}-{LATE[1] - 1}", "other colour",
               "impossible moves"]  # fmt: skip
    rows = []
    for name, found in summary["references"].items():
        within = [band for band in PARTS if band[1] <= len(found["distance"])]
        known = [f"{over(found['distance'], band):.2f}" for band in within]
        rows.append([name, *known, *[""] * (len(columns) - 1 - len(known))])
    for name, results in _by_row(summary).get(way, {}).items():
        by_seed = [
            [*(over(r["distance"], band) for band in PARTS), r["gap"],
             *(over(r[what], LATE) for what in ("radius", "colour", "impossible"))]
            for r in results
        ]  # fmt: skip
        rows.append([name, *map(jobs.mean, zip(*by_seed, strict=True))])
    return columns, rows


def tables(summary: dict[str, Any]) -> Iterator[Table]:
    scale = summary["scale"]
    sizes = f"{scale['updates']} updates of {scale['batch']} clips, {scale['seeds']} seeds"
    for way in _by_row(summary):
        yield Table(f"{way}, {sizes}, by latent frame (trained on {FRAMES})", *cells(summary, way))


def draw(summary: dict[str, Any], output: Path) -> None:
    """distance.png: over time, a line a row with the range of its seeds. gap.png: own and real
    past, beside each other."""
    from matplotlib import colormaps

    ways = _by_row(summary)
    colours = dict(zip(ROWS, colormaps["tab10"](range(10)), strict=False))
    where = f"{describe(summary['machine'])}, {summary['scale']['seeds']} seeds"
    late = f"{FRAMES // 2}-{FRAMES - 1}"
    for name, title, label, draw_way in (
        ("distance", where, "Fréchet distance from real videos", _draw_distance),
        ("gap", f"exposure gap: the difference of a pair; {where}",
         f"distance at frames {late}, frames alone", _draw_gap),
    ):  # fmt: skip
        figure, axes = figures.new(title, 6 * len(ways), 4.6, columns=len(ways), sharey=True)
        for ax, (way, found) in zip(axes, ways.items(), strict=True):
            draw_way(ax, summary, found, colours)
            ax.set_title(way)
        axes[0].set_ylabel(label)
        named = axes[0].get_legend_handles_labels()
        figure.legend(*named, loc="outside lower center", ncols=5, fontsize=8)
        figures.save(figure, output / f"{name}.png")


def _draw_distance(ax: Any, summary: Any, found: Any, colours: Any) -> None:
    for row, results in found.items():
        lines = torch.tensor([r["distance"] for r in results])[:, 1:]
        at = range(1, 1 + lines.shape[1])
        ax.plot(at, lines.mean(0), color=colours[row], label=row)
        ax.fill_between(at, lines.amin(0), lines.amax(0), color=colours[row], alpha=0.15)
    for (name, least), style in zip(summary["references"].items(), ("--", ":"), strict=True):
        at = range(1, len(least["distance"]))
        ax.plot(at, least["distance"][1:], style, color="#555555", label=name)
    ax.axvline(FRAMES - 0.5, color="#aaaaaa", linewidth=0.8)
    ax.set(yscale="log", xlabel=f"latent frame (trained on the first {FRAMES})")
    ax.grid(alpha=0.3, which="both")


def _draw_gap(ax: Any, _: Any, found: Any, colours: Any) -> None:
    late, shades = slice(FRAMES // 2, FRAMES), [colours[row] for row in found]
    for past, label, side, alpha in (
        ("real", "on a real past", -0.2, 0.45),
        ("own", "on its own past", 0.2, 1.0),
    ):
        each = [[statistics.mean(r[past][late]) for r in results] for results in found.values()]
        places = [i + side for i in range(len(found))]
        means = [*map(statistics.mean, each)]
        ax.bar(places, means, 0.38, color=shades, alpha=alpha, label=label)
        for x, values in zip(places, each, strict=True):
            ax.plot([x] * len(values), values, "k.", markersize=3)
    ax.set_xticks(range(len(found)), [*found], rotation=35, ha="right")
    ax.grid(alpha=0.3, axis="y")


def sheets(planned: Sequence[Job], output: Path) -> None:
    """sheet-WAY.png: the video of one prompt by the first seed of every row, and a real one."""
    for way in dict.fromkeys(job.way for job in planned):
        chosen = [job for job in planned if job.way == way and job.seed == 0]
        held = held_out(chosen[0].scale.videos, chosen[0].split)
        latents = {"real": held.latents_BFCHW[:1]}
        for job in chosen:
            model = load(job.config().output / "model.safetensors")
            text = held.text_BTE[:1].to(model.device)
            latents[job.row] = evaluate.generate(model, job.sampling(), text, LONG).cpu()
        with torch.no_grad():
            videos = CODEC.decode_chunk(torch.cat([*latents.values()]))[0]
        title = f"{way}, trained on {CODEC.temporal_factor * (FRAMES - 1) + 1} frames: one prompt"
        contact_sheet_of_rows(videos, output / f"sheet-{way}.png", [*latents], title)
