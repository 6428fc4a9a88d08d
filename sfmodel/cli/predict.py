"""`sfmodel predict`: the arithmetic of sfmodel/cost.py for one GPU and one setting, as tables: what
a chunk and a training iteration must cost, frames a second, latency, waves, memory, several GPUs.
"""

from __future__ import annotations

import json as json_format
import math
from collections.abc import Iterable, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from sfmodel.cli import tables
from sfmodel.config import PRESETS, Preset
from sfmodel.cost import (
    GPUS,
    TILE,
    VAE_STRIDE,
    Gpu,
    best_split,
    clip_chunks,
    decode,
    dit,
    fps,
    latency_ms,
    linears,
    memory_gib,
    multi_gpu,
    total,
    waves,
)
from sfmodel.extras import needed
from sfmodel.files import atomic
from sfmodel.terminal import plain_console
from sfmodel.training_cost import Update, figure6, floor_seconds, to_first, training_flops
from sfmodel.training_memory import training_gib
from sfmodel.vae.flops import DECODERS

with needed():
    from rich.console import Console

MODELS = ("wan-1.3b", "wan-14b")
PRECISIONS = ("bf16", "8-bit")
STEPS = 4  # at most, of the self rollouts in the table of training: the paper's
LORA_RANK = 256  # as LongLive's
LABEL = "predicted, not measured"


def setting(
    model: str, height: int, width: int, window: int = 21, chunk: int = 3, steps: int = 4
) -> Preset:
    """A preset at a size in pixels. Raises ValueError for one that does not exist."""
    _among("model", model, MODELS)
    for name, value in (("window", window), ("chunk", chunk)):
        if value < 1:
            raise ValueError(f"{name}={value}: must be at least 1")
    if not 1 <= steps <= 1000:
        raise ValueError(f"steps={steps}: must be from 1 to 1000")
    if chunk > window:
        raise ValueError(f"window={window} is smaller than a chunk of {chunk} latent frames")
    for name, value in (("height", height), ("width", width)):
        if value < 1 or value % (2 * VAE_STRIDE):
            raise ValueError(f"{name}={value}: must be a multiple of {2 * VAE_STRIDE} pixels")
    return replace(
        PRESETS[model],
        height=height // VAE_STRIDE,
        width=width // VAE_STRIDE,
        window=window,
        chunk=chunk,
        steps=tuple(1000 * (steps - i) // steps for i in range(steps)),
    )


def _among(name: str, value: str, known: Iterable[str]) -> None:
    if value not in known:
        raise ValueError(f"{name} {value!r}: must be one of {', '.join(known)}")


def prediction(
    preset: Preset, gpu: Gpu, precision: str = "bf16", decoder: str = "wan", gpus: int = 1
) -> dict[str, Any]:
    """Everything above for one setting, as JSON holds it; batch 1. Raises ValueError for a
    precision, decoder, rate or number of GPUs that does not exist."""
    _among("precision", precision, PRECISIONS)
    _among("decoder", decoder, DECODERS)
    for name, number in (("gpus", gpus), ("matmul_tflops", gpu.matmul_tflops),
                         ("copy_tbps", gpu.copy_tbps)):  # fmt: skip
        if not 0 < number < math.inf:
            raise ValueError(f"{name}={number}: must be a positive number")
    config, tokens = preset.dit, preset.chunk * math.prod(preset.grid)
    components = dit(preset, gpu, preset.window, precision)
    components["DiT"] = total(components.values())
    components["decode"] = decode(preset, gpu, precision, decoder)

    split = best_split(tokens, config.heads, gpu.multiprocessors)
    tiled = [("self-attention", float(config.heads), s) for s in sorted({1, split})]
    tiled += [(f"linear: {name}", b / TILE, 1) for name, _, _, b in linears(config)]
    frames, short = sum(clip_chunks(preset)), max(preset.chunk, min(9, preset.window))
    ends = range(preset.chunk, frames + 1, preset.chunk)
    clip = [min(end, preset.window) for end in ends]
    memory = memory_gib(preset, precision=precision)
    return {
        "label": LABEL,
        "gpu": asdict(gpu),
        "setting": {
            **asdict(preset),
            "height_pixels": preset.height * VAE_STRIDE,
            "width_pixels": preset.width * VAE_STRIDE,
            "precision": precision,
            "decoder": decoder,
            "clip_frames": frames,
        },
        "components": components,
        "fps": {
            key: {"what": what, **fps(preset, gpu, seen, precision, decoder)}
            for key, what, seen in (
                ("full_window", f"full window of {preset.window} frames", [preset.window]),
                ("clip", f"mean over a clip of {frames} frames", clip),
                ("short_window", f"window of {short} frames", [short]),
            )
        },
        "latency_ms": latency_ms(preset, gpu, precision, decoder),
        "waves": [
            {"what": what, "columns": columns, "split": split,
             "share": waves(tokens, columns, gpu.multiprocessors, split=split)}
            for what, columns, split in tiled
        ],
        "training": training(preset, gpu),
        "memory_gib": {**memory, "gpu": gpu.memory_gib, "fits": memory["total"] < gpu.memory_gib},
        "training_gib": training_memory(preset),
        "multi_gpu": multi_gpu(preset, gpu, gpus, precision, decoder),
    }  # fmt: skip


def training(preset: Preset, gpu: Gpu) -> list[dict[str, Any]]:
    """TFLOP and seconds of updates: of flow matching, and those of Figure 6 (arXiv 2506.08009), by
    sizes of the real score where it takes part, with their ratio to SF-1's."""
    named = figure6(min(len(preset.steps), STEPS))
    critics = {name: update for name, update in named.items() if update.learner == "critic"}
    generators = {name: update for name, update in named.items() if name not in critics}
    flow = {"DF, flow matching": Update("df"), "TF, flow matching": Update("tf")}
    scored = [(real, generators) for real in _real_scores(preset)]
    rows: list[dict[str, Any]] = []
    for real, updates in (("", flow), *scored, ("", critics)):
        score = PRESETS[real].dit if real else None
        flops = {name: training_flops(preset, each, score) for name, each in updates.items()}
        ratios = to_first(flops)
        rows += [
            {"update": name, "real_score": real, "tflop": one / 1e12,
             "floor_seconds": floor_seconds(one, gpu), "to_sf1": ratios.get(name)}
            for name, one in flops.items()
        ]  # fmt: skip
    return rows


def training_memory(preset: Preset) -> list[dict[str, Any]]:
    """GiB of one rank by recipe, sizes of the real score, rank of the LoRA that generator and
    critic learn, and number of ranks."""
    rows: list[dict[str, Any]] = []
    distilled = [("sf+dmd", name, rank) for name in _real_scores(preset) for rank in (0, LORA_RANK)]
    for recipe, real, rank in (("tf", "", 0), ("df", "", 0), *distilled):
        score = PRESETS[real] if real else None
        for ranks in (1, 8, 64):
            gib = training_gib(preset, recipe, ranks, score, 1, rank, rank > 0)
            of = {"recipe": recipe, "real_score": real, "lora_rank": rank or "", "gpus": ranks}
            rows.append(of | gib)
    return rows


def _real_scores(preset: Preset) -> list[str]:
    """Models that are at least as large."""
    return [name for name in MODELS if PRESETS[name].dit.dim >= preset.dit.dim]


def report(result: dict[str, Any], console: Console) -> None:
    def table(title: str, columns: str, rows: Iterable[Sequence[Any]]) -> None:
        tables.show(console, f"{title} ({LABEL})", columns, rows)

    s, gpu, memory = result["setting"], result["gpu"], result["memory_gib"]
    console.print(
        f"{s['dit']['layers']} layers of {s['dit']['dim']}, {s['height_pixels']}×"
        f"{s['width_pixels']}, window {s['window']}, chunk {s['chunk']}, {len(s['steps'])} steps, "
        f"{s['precision']}, decoder {s['decoder']}; {gpu['name']}: {gpu['matmul_tflops']:.0f} bf16 "
        f"TFLOP/s, copy {gpu['copy_tbps']:.2f} TB/s ({gpu['source']})"
    )
    if len(result["multi_gpu"]) > 1:
        several = [
            (r["gpus"], r["transformer_gpus"], "own" if r["own_decoder"] else "shared", r["dit_ms"],
             r["exchange_ms"], r["fps"], r["reaction_ms"], r["memory_gib"])
            for r in result["multi_gpu"]
        ]  # fmt: skip
        columns = "GPUs|transformer|decoder|DiT ms|of it exchange|FPS|reaction ms|GiB each"
        table(f"Several GPUs at {gpu['link_gbps']:.0f} GB/s, full window, floors", columns, several)
    rows = [(name, *row.values()) for name, row in result["components"].items()]
    table("A chunk at a full window", "component|TFLOP|GB|floor ms|ms in whole waves", rows)
    rows = [(f"FPS, {row['what']}", row["floor"], row["whole_waves"])
            for row in result["fps"].values()]  # fmt: skip
    rows += [(f"{name.replace('_', ' ')}, ms", *row.values())
             for name, row in result["latency_ms"].items()]  # fmt: skip
    table("Frames a second and latency", "|floor|in whole waves", rows)
    rows = [(w["what"], w["columns"], w["split"], f"{w['share']:.0%}") for w in result["waves"]]
    table("Waves of tiles", "product|tiles across|split|filled", rows)
    rows = [tuple(row.values()) for row in result["training"]]
    columns = "update|real score|TFLOP|floor s|to SF-1's"
    table(f"Training, {s['clip_frames']} latent frames, batch 1", columns, rows)
    console.print(
        f"Memory: weights {memory['weights']:.1f} GiB, cache {memory['cache']:.1f} GiB of "
        f"{memory['gpu']:.0f}{'' if memory['fits'] else ', which is too much'} (activations, "
        "decoder and text encoder left out)"
    )
    columns = "recipe|real score|LoRA|GPUs|weights|gradients|moments|average|activations|cache|"
    columns += "gathered|in all"
    rows = [tuple(row.values()) for row in result["training_gib"]]
    table("GiB of one GPU in training, one clip at a time", columns, rows)


def predict(
    gpu: str = "h200",
    matmul_tflops: float | None = None,
    copy_tbps: float | None = None,
    model: str = "wan-1.3b",
    height: int = 480,
    width: int = 832,
    window: int = 21,
    chunk: int = 3,
    steps: int = 4,
    precision: str = "bf16",
    decoder: str = "wan",
    gpus: int = 1,
    json: Path | None = None,
) -> None:
    """Predict what streaming and training must cost on a GPU, from arithmetic alone.

    Args:
        gpu: h200, h100, a100, b200, l40s or rtx4090.
        matmul_tflops: bf16, as measured on your GPU.
        copy_tbps: Read and written, as measured there.
        model: wan-1.3b or wan-14b.
        height: Pixels.
        width: Pixels.
        window: Latent frames.
        chunk: Latent frames.
        steps: Of denoising.
        precision: bf16 or 8-bit.
        decoder: wan, taehv or none.
        gpus: At most, for the table of several GPUs.
        json: File for the result.
    """
    _among("gpu", gpu, GPUS)
    rates: dict[str, Any] = {"matmul_tflops": matmul_tflops, "copy_tbps": copy_tbps}
    chosen = GPUS[gpu]
    if given := {name: rate for name, rate in rates.items() if rate is not None}:
        chosen = replace(chosen, **given, source="rates given")
    preset = setting(model, height, width, window, chunk, steps)
    result = prediction(preset, chosen, precision, decoder, gpus)
    if json:
        with atomic(json) as part:
            part.write_text(json_format.dumps(result, indent=1) + "\n")
    report(result, plain_console())
