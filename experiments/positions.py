"""A sink whose position stays, or moves along with the window, in streams far longer than what the
toy model was trained on."""

from __future__ import annotations

import itertools
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from bench import figures, tables
from bench.figures import BLUE, GREY, LIGHT, ORANGE
from bench.tables import Table
from sfmodel.config import PRESETS
from sfmodel.files import atomic
from sfmodel.machine import describe, machine
from sfmodel.pretrained import load_toy
from sfmodel.terminal import plain_console
from sfmodel.toy.evaluate import Sampling, generate, held_out, over, score, seen_in

TRAINED = 7  # latent frames of a training clip, and of the window
TIMES = (1, 4, 10, 30)  # of them; ends of the bands that are shown
SETTINGS: dict[str, dict[str, Any]] = {
    "no sink": {},
    **{
        f"sink of {sink}, {positions}": {"sink": sink, "positions": positions}
        for sink in (1, 3)
        for positions in ("absolute", "relative")
    },
}
COLOURS = dict(zip(SETTINGS, (GREY, ORANGE, BLUE, "#c96a6a", "#4f7a3a"), strict=True))


@torch.no_grad()
def positions(videos: int = 128, output: Path = Path("out/positions")) -> None:
    """Compare positions of a sink over videos of 30 times the training length: a table,
    positions.json and positions.png.

    Args:
        videos: Of each setting.
        output: Folder for the files.
    """
    if videos < 16:
        raise ValueError(f"videos={videos}: must be at least 16")
    model, codec, _ = load_toy()
    frames, console = TRAINED * TIMES[-1], plain_console(110)
    found: dict[str, list[float]] = {}
    with console.status("real videos") as status:
        held = held_out(codec, frames, videos)
        of_real = score(seen_in(codec, held.latents_BFCHW), held.real_NFD)
        found["real, other videos"] = of_real["distance"]
        for name, options in SETTINGS.items():
            status.update(name)
            sampling = Sampling(replace(PRESETS["toy"], window=TRAINED, **options))
            made = generate(model, sampling, held.text_BTE.to(model.device), frames)
            found[name] = score(seen_in(codec, made), held.real_NFD)["distance"]
    result = {
        "machine": machine(model.device),
        "videos": videos,
        "trained": TRAINED,
        "distance": {name: [float(f"{x:.4g}") for x in each] for name, each in found.items()},
    }
    with atomic(output / "positions.json") as part:
        part.write_text(json.dumps(result) + "\n")
    figures.save(draw(result), output / "positions.png")
    bands = [(TRAINED * a, TRAINED * b) for a, b in itertools.pairwise(TIMES)]
    rows = [[name, *(f"{over(each, band):.2f}" for band in bands)]
            for name, each in found.items()]  # fmt: skip
    columns = ["", *(f"{a}-{b - 1}" for a, b in bands)]
    tables.show(Table("Fréchet distance by latent frame", columns, rows), console)
    console.print(f"{output}/positions.json, positions.png")


def draw(result: dict[str, Any]) -> Any:
    """Distances by frame, as means over a training clip's length."""
    where = f"{describe(result['machine'])}, {result['videos']} videos"
    figure, (ax,) = figures.new(where, 7, 4.2)
    for name, each in result["distance"].items():
        lines = torch.tensor(each).unfold(0, TRAINED, 1).mean(1)
        style = "--" if name.endswith("absolute") else ":" if name not in SETTINGS else "-"
        ax.plot(lines, style, color=COLOURS.get(name, "#000000"), label=name)
    ax.axvline(TRAINED, color=LIGHT, linewidth=0.8)
    ax.set(yscale="log", xlabel=f"latent frame (trained on {TRAINED})",
           ylabel="Fréchet distance from real videos")  # fmt: skip
    ax.grid(alpha=0.3, which="both")
    figure.legend(loc="outside lower center", ncols=3, fontsize=8)
    return figure
