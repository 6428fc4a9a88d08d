"""Runs recorded cases of the public implementation through this project's model.

    python -m tests.parity FOLDER… [--dtype bfloat16] [--device cuda]
                                   [--impl triton] [--attention-impl reference]

A folder holds config.json, weights.safetensors and cases.safetensors; the name of a case says what
to run (README.md beside this file). Prints the relative error ‖a − b‖ / ‖b‖ of every case and exits
1 if any is too large or cannot be run.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import torch
from rich.console import Console
from rich.table import Table
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from sfkernels import BlockLayout
from sfkernels.dispatch import IMPLS
from sfkernels.layout import chunk_sizes
from sfmodel import checkpoint
from sfmodel.config import DiTConfig
from sfmodel.dit import DiT
from sfmodel.schedule import FlowSchedule
from sfmodel.stream import FewStepSampler
from sfmodel.train.rollout import Rollout

# Allowed relative error of an output, and of a parameter's gradient.
LIMITS = {"float32": 1e-4, "bfloat16": 3e-2}
GRADIENTS = {"float32": 1e-3, "bfloat16": 1e-1}
STEPS = (1000, 750, 500, 250)


class NotSupported(Exception):
    """The case is of a kind that this project cannot run yet."""


class Case(NamedTuple):
    """A parsed name: `roll_chunk3_window6` is kind roll with options chunk 3, window 6."""

    kind: str
    options: dict[str, int]

    @classmethod
    def parse(cls, name: str) -> Case:
        kind, *words = name.split("_")
        options: dict[str, int] = {}
        for word in words:
            match = re.fullmatch(r"(first|chunk|local|window|sink|exit)(\d+)|(i2v|extend)", word)
            if match is None:
                raise NotSupported(f"not supported: {word!r} in the name")
            options[match[1] or match[3]] = int(match[2] or 1)
        return cls(kind, options)


def run_case(
    name: str, tensors: Mapping[str, Tensor], model: DiT, text: Tensor
) -> tuple[Tensor, Tensor]:
    """What this project computes for a case, and what was recorded."""
    case = Case.parse(name)
    if case.kind in ("bidir", "df", "tf"):
        x = tensors["x"].transpose(1, 2)
        clean = tensors["clean"].transpose(1, 2) if case.kind == "tf" else None
        flow = model(
            x,
            tensors["t"],
            text[: len(x)],
            layout=None if case.kind == "bidir" else layout_of(case, x, model),
            clean_BFCHW=clean,
        )
        return flow.transpose(1, 2), tensors["flow"]
    if case.kind == "roll":
        return roll(case, tensors, model, text), tensors["video"]
    if case.kind == "sf":
        return self_force(case, tensors, model, text), tensors["video"]
    raise NotSupported(f"not supported: kind {case.kind!r}")


def layout_of(case: Case, x_BFCHW: Tensor, model: DiT) -> BlockLayout:
    _, ph, pw = model.config.patch
    return BlockLayout.causal(
        x_BFCHW.shape[1],
        case.options["chunk"],
        (x_BFCHW.shape[3] // ph) * (x_BFCHW.shape[4] // pw),
        first=case.options.get("first"),
        window=case.options.get("window", case.options.get("local")),
        sink=case.options.get("sink", 0),
        teacher_forcing=case.kind == "tf",
    )


def roll(case: Case, tensors: Mapping[str, Tensor], model: DiT, text: Tensor) -> Tensor:
    noise, renoise = tensors["noise"], tensors["renoise"]
    initial = tensors.get("initial", noise[:, :0])
    frames = initial.shape[1] + noise.shape[1]
    _, ph, pw = model.config.patch
    grid = noise.shape[3] // ph, noise.shape[4] // pw
    options = case.options
    cache = model.new_cache(len(noise), options.get("window", frames), grid, options.get("sink", 0))
    model.set_text(cache, text[: len(noise)])
    sampler = FewStepSampler(model, cache, FlowSchedule(), STEPS)
    video, at = [], 0
    for size in chunk_sizes(frames, options["chunk"], options.get("first")):
        here = slice(at - initial.shape[1], at - initial.shape[1] + size)
        if at < initial.shape[1]:
            sampler.append(initial[:, at : at + size])
        else:
            fresh = renoise[:, here]
            x0 = sampler.denoise(noise[:, here], lambda i, fresh=fresh: fresh[:, :, i - 1])  # type: ignore[misc]
            sampler.append(x0)
            video.append(x0)
        at += size
    # A recording may or may not repeat the frames it was given.
    given = [initial] if tensors["video"].shape[1] == frames else []
    return torch.cat([*given, *video], 1)


def self_force(case: Case, tensors: Mapping[str, Tensor], model: DiT, text: Tensor) -> Tensor:
    """The video; leaves the gradients of sum(video · upstream) in the parameters."""
    noise = tensors["noise"]
    model.zero_grad()
    rollout = Rollout(
        model,
        layout_of(case, noise, model),
        FlowSchedule(),
        STEPS,
        case.options["exit"],
        noise,
        tensors["renoise"],
        text[: len(noise)],
        context_noise_BFCHW=tensors["context_noise"],
    )
    rollout.backward(tensors["upstream"])
    return rollout.video


def worst_gradient(tensors: Mapping[str, Tensor], model: DiT) -> float:
    """The largest relative error of a recorded gradient; 0 where none is."""
    grads = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    ours, worst = checkpoint.to_official(grads), 0.0
    for key, recorded in tensors.items():
        if key.startswith("grad."):
            error = ours[key.removeprefix("grad.")].double() - recorded
            worst = max(worst, float(error.norm() / recorded.double().norm()))
    return worst


def run_folder(folder: Path, options: argparse.Namespace, table: Table) -> tuple[int, int]:
    """(passed, not passed) of every case of a folder."""
    dtype, device = options.dtype, options.device
    config = json.loads((folder / "config.json").read_text())
    cases: dict[str, dict[str, Tensor]] = defaultdict(dict)
    shared: dict[str, Tensor] = {}
    for key, value in load_file(folder / "cases.safetensors", device).items():
        name, dot, leaf = key.partition(".")
        (cases[name] if dot else shared)[leaf or name] = value
    model = None
    if "num_layers" in config:
        model = DiT(DiTConfig.from_wan(config), options.impl, options.attention_impl)
        model = model.to(device, getattr(torch, dtype))
        checkpoint.load(model, folder / "weights.safetensors")
    passed = 0
    for name, tensors in sorted(cases.items()):
        error, verdict = "", "ok"
        try:
            if model is None:
                raise NotSupported("not supported: VAE")
            with torch.no_grad():
                ours, recorded = run_case(name, tensors, model, shared["text"])
            relative = float((ours.double() - recorded).norm() / recorded.double().norm())
            error = f"{relative:.2e}"
            if not relative < LIMITS[dtype]:
                verdict = f"FAILED: over {LIMITS[dtype]:.0e}"
            gradients = worst_gradient(tensors, model)
            if not gradients < GRADIENTS[dtype]:
                verdict = f"FAILED: a gradient is off by {gradients:.0e}"
            if gradients:
                error += f", gradients {gradients:.2e}"
        except NotSupported as reason:
            verdict = str(reason)
        except (ValueError, KeyError, RuntimeError) as problem:
            verdict = f"FAILED: {type(problem).__name__}: {problem}"
        passed += verdict == "ok"
        table.add_row(folder.name, name, dtype, error, verdict)
    return passed, len(cases) - passed


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser("python -m tests.parity", description="Parity with recordings")
    parser.add_argument("folders", nargs="+", type=Path, metavar="FOLDER")
    parser.add_argument("--dtype", choices=LIMITS, default="float32")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--impl", choices=IMPLS, default="auto")
    parser.add_argument("--attention-impl", choices=IMPLS, default="auto")
    options = parser.parse_args(arguments)
    table = Table("folder", "case", "dtype", "relative error", "verdict")
    passed = failed = 0
    for folder in options.folders:
        try:
            counts = run_folder(folder, options, table)
        except (OSError, ValueError, KeyError, SafetensorError) as problem:
            table.add_row(folder.name, "", options.dtype, "", f"FAILED: cannot be read: {problem}")
            counts = (0, 1)
        passed, failed = passed + counts[0], failed + counts[1]
    console = Console()
    if not console.is_terminal:
        console.width = 120
    console.print(table)
    console.print(f"{passed} passed, {failed} not passed")
    return 1 if failed or not passed else 0


if __name__ == "__main__":
    sys.exit(main())
