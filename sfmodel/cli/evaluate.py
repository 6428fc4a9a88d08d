"""`sfmodel evaluate`: a model of the toy world, measured against real videos."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, Literal

from sfmodel.config import PRESETS
from sfmodel.files import atomic, check_writable
from sfmodel.pretrained import TOY_WEIGHTS, load_toy
from sfmodel.terminal import plain_console
from sfmodel.toy.evaluate import Sampling, draw, held_out, score, seen_in, table
from sfmodel.toy.evaluate import evaluate as measure_model
from sfmodel.weights.known import by_metadata


def evaluate(
    checkpoint: Path | None = None,
    chunk: int | None = None,
    window: int | None = None,
    sink: int | None = None,
    positions: Literal["relative", "absolute"] = "relative",
    frames: int = 28,
    trained: int = 7,
    videos: int = 256,
    euler: int = 0,
    given: int = 0,
    split: Literal["test", "validation"] = "test",
    output: Path = Path("out/evaluation"),
) -> None:
    """Measure a model of the toy world against real videos that it has never seen, by frame: a
    table, evaluation.json and evaluation.png.

    Args:
        checkpoint: Weights; the shipped ones if not given.
        chunk: Latent frames generated at a time; if not given as the weights were trained, else 3.
        window: Latent frames that the KV cache holds, the current chunk included; likewise, else 7.
        sink: First latent frames that stay in the cache for good; likewise, else 0.
        positions: Of the sink: relative to the window, with which it moves along, or absolute.
        frames: Latent frames of a video.
        trained: Latent frames of a training clip, within which the exposure gap is measured.
        videos: To generate.
        euler: Euler steps a chunk, for a model that is not distilled; 0 takes the few steps.
        given: Latent frames of a real video that each goes on from, whole chunks.
        split: Real videos to measure against.
        output: Folder for the files.
    """
    for name, value in (("videos", videos), ("trained", trained), ("frames", frames)):
        least = {"videos": 16, "trained": 2, "frames": trained}[name]
        if value < least:
            raise ValueError(f"{name}={value}: must be at least {least}")
    known, asked = by_metadata(checkpoint), {"chunk": chunk, "window": window, "sink": sink}
    settings: dict[str, Any] = {"chunk": 3, "window": 7, "sink": 0, "positions": positions}
    settings |= known.settings if known and known.preset == "toy" else {}
    settings |= {name: value for name, value in asked.items() if value is not None}
    preset = replace(PRESETS["toy"], **settings)
    sampling = Sampling(preset, euler, given)
    if given >= trained:
        raise ValueError(f"given={given}: must be less than trained={trained}")
    for name in ("evaluation.json", "evaluation.png"):
        check_writable(output / name)
    model, codec, _ = load_toy(checkpoint)
    held = held_out(codec, frames, videos, split)
    floor = score(seen_in(codec, held.latents_BFCHW), held.real_NFD)
    console = plain_console(120)
    with console.status("generating") as status:
        result = measure_model(model, sampling, codec, held, trained, progress=status.update)
    facts = {
        "checkpoint": str(checkpoint or TOY_WEIGHTS),
        "preset": asdict(sampling.preset),
        "floor": floor,
    }
    with atomic(output / "evaluation.json") as part:
        part.write_text(json.dumps({**facts, **result}, indent=1))
    draw(result, floor, trained, output / "evaluation.png")
    console.print(table(result, floor, trained))
    print(f"{output}/evaluation.json, evaluation.png")
