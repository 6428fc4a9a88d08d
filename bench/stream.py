"""`python -m bench stream`: chunks of Wan2.1-1.3B at 480×832 with random weights, without VAE and
text encoder."""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from bench.machine import machine
from bench.timing import reason
from sfmodel.config import PRESETS, Preset
from sfmodel.dit import DiT
from sfmodel.files import atomic
from sfmodel.stream import stream_latents

# Implementation of all ops but attention, and of attention.
RUNS = (("auto", "triton"), ("auto", "gluon"), ("auto", "sdpa"), ("reference", "reference"))


def run(
    preset: Preset,
    device: torch.device,
    *,
    chunks: int = 12,
    impl: str = "auto",
    attention: str = "auto",
) -> dict[str, Any]:
    """Chunk times of an eager stream (no CUDA graph), in seconds; the median of those whose window
    is full, and the frames a second that makes."""
    with device:
        model = DiT(preset.dit, impl, attention).to(torch.bfloat16).eval()
    text = torch.zeros(1, 1, preset.dit.text_dim, device=device)
    for _ in zip(range(2), stream_latents(model, text, preset), strict=False):
        pass  # compiles
    times = []
    last = time.perf_counter()
    for _, latents in zip(range(chunks), stream_latents(model, text, preset), strict=False):
        latents.sum().item()  # waits for the device
        times.append(time.perf_counter() - last)
        last = time.perf_counter()
    full = times[-(-preset.window // preset.chunk) :] or times
    seconds = statistics.median(full)
    return {
        "seconds_per_chunk_full_window": seconds,
        "dit_fps_full_window": 4 * preset.chunk / seconds,
        "first_chunk_seconds": times[0],
        "all_seconds": times,
    }


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench stream", description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("out/stream"), help="folder of the JSON")
    folder = parser.parse_args(arguments).out
    if not torch.cuda.is_available():
        print("python -m bench stream: needs a GPU that PyTorch can use", file=sys.stderr)
        return 2
    device = torch.device("cuda")
    result: dict[str, Any] = {"machine": machine(device)}
    for impl, attention in RUNS:
        name = f"{impl}, attention {attention}"
        try:
            row = run(PRESETS["wan-1.3b"], device, impl=impl, attention=attention)
            print(f"{name}: {row['dit_fps_full_window']:.2f} frames a second", flush=True)
        except (ValueError, RuntimeError) as error:  # not on this GPU; the others still run
            row = {"failed": reason(error)}
            print(f"{name}: {row['failed']}", flush=True)
        result[name] = row
        with atomic(folder / "stream.json") as part:
            part.write_text(json.dumps(result, indent=1))
        torch.cuda.empty_cache()
    return 0
