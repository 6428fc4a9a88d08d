"""Runs recorded cases of the public implementations through this project's models.

    python -m tests.parity FOLDER… [--dtype bfloat16] [--device cuda]
                                   [--impl triton] [--attention-impl reference]

A folder holds config.json, weights.safetensors (or the seed of weights that are drawn) and
cases.safetensors: of a diffusion transformer, of Wan2.1's VAE or of the tiny one. The name of a
case says what to run (README.md beside this file). Prints the relative error ‖a − b‖ / ‖b‖ of every
case and exits 1 if any is too large or cannot be run.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import json
import math
import re
import sys
from collections import defaultdict
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from rich.console import Console
from rich.table import Table
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from sfkernels import BlockLayout
from sfkernels.dispatch import IMPLS
from sfkernels.layout import chunk_sizes
from sfmodel.config import DiTConfig, Preset, VAEConfig
from sfmodel.dit import DiT
from sfmodel.schedule import FlowSchedule
from sfmodel.stream import Stream
from sfmodel.train.rollout import Rollout
from sfmodel.vae.codec import VideoCodec
from sfmodel.vae.taehv import TinyVAE
from sfmodel.vae.wan import WanVAE
from sfmodel.weights import checkpoint

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


class Result(NamedTuple):
    """What this project computes, what was recorded, and the largest relative error of a recorded
    gradient: 0 where none is."""

    ours: Tensor
    recorded: Tensor
    gradients: float = 0.0


Tensors = Mapping[str, Tensor]
Runner = Callable[[Case, Tensors], Result]


def run_dit(model: DiT, text: Tensor, case: Case, tensors: Tensors) -> Result:
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
        return Result(flow.transpose(1, 2), tensors["flow"])
    if case.kind == "roll":
        return Result(roll(case, tensors, model, text), tensors["video"])
    if case.kind == "sf":
        video = self_force(case, tensors, model, text)
        return Result(video, tensors["video"], worst_gradient(tensors, model))
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


def roll(case: Case, tensors: Tensors, model: DiT, text: Tensor) -> Tensor:
    noise, renoise, options = tensors["noise"], tensors["renoise"], case.options
    initial = tensors.get("initial", noise[:, :0])
    frames = initial.shape[1] + noise.shape[1]
    preset = Preset(
        model.config, noise.shape[3], noise.shape[4], steps=STEPS, chunk=options["chunk"],
        first=options.get("first"), window=options.get("window", frames),
        sink=options.get("sink", 0),
    )  # fmt: skip
    video = noise[:, :0]

    def given(i: int) -> Tensor:
        here = slice(video.shape[1], video.shape[1] + stream.size)
        return renoise[:, here, i - 1] if i else noise[:, here]

    batch = len(noise)
    stream = Stream(model, None, text[:batch], preset, batch=batch, noise=given)
    stream.prefill(initial)
    for _ in chunk_sizes(frames, options["chunk"], options.get("first")):
        if video.shape[1] < noise.shape[1]:
            video = torch.cat([video, stream.denoise()], 1)
    # A recording may or may not repeat the frames it was given.
    return torch.cat([initial, video], 1) if tensors["video"].shape[1] == frames else video


def self_force(case: Case, tensors: Tensors, model: DiT, text: Tensor) -> Tensor:
    """The video; leaves the gradients of sum(video · upstream) in the parameters."""
    noise = tensors["noise"]
    draws = [noise, *tensors["renoise"].unbind(2), tensors["context_noise"]]
    layout = layout_of(case, noise, model)
    model.zero_grad()
    rollout = Rollout(
        model,
        layout,
        FlowSchedule(),
        STEPS,
        (case.options["exit"],) * len(layout.chunks),
        lambda frames, i: draws[i][:, frames].contiguous(),
        text[: len(noise)],
        renoise_context=True,
    )
    video = rollout.generate()
    rollout.backward(tensors["upstream"])
    return video


def worst_gradient(tensors: Tensors, model: DiT) -> float:
    """The largest relative error of a recorded gradient; 0 where none is."""
    grads = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    ours, worst = checkpoint.to_official(grads), 0.0
    for key, recorded in tensors.items():
        if key.startswith("grad."):
            error = ours[key.removeprefix("grad.")].double() - recorded
            worst = max(worst, float(error.norm() / recorded.double().norm()))
    return worst


@dataclass(frozen=True)
class CodecRunner:
    """Runs the cases of a VAE's folder.

    frames_first: recordings are [B, frames, C, H, W], as everywhere in this project, and not
    [B, C, frames, H, W]. unit: their pixels are in [0, 1], and not about in [-1, 1]."""

    codec: VideoCodec
    frames_first: bool
    unit: bool

    def __call__(self, case: Case, tensors: Tensors) -> Result:
        options = case.options
        known = {"decode": set(), "encode": set(), "stream": {"first", "chunk"}}
        if case.kind not in known or options.keys() - known[case.kind]:
            raise NotSupported(f"not supported: {case.kind!r} of a VAE with options {[*options]}")
        if case.kind == "encode":
            return Result(self.encode(tensors["pixels"]), tensors["z"])
        z_BFCHW, recorded = self.swapped(tensors["z"]), tensors["pixels"]
        ways: list[tuple[int, ...]] = [(1, 3, 2), (2, 1, 3)]
        if case.kind == "decode":
            ways = [(z_BFCHW.shape[1],)]
        elif options:
            ways = [(options.get("first", options["chunk"]), options["chunk"])]
        videos = [self.decode(z_BFCHW, sizes) for sizes in ways]
        return Result(torch.cat(videos), torch.cat([recorded] * len(ways)))

    def decode(self, z_BFCHW: Tensor, sizes: tuple[int, ...]) -> Tensor:
        """Decodes in calls of so many latent frames each, and of the last size from then on."""
        parts, state = [], None
        for size in itertools.chain(sizes, itertools.repeat(sizes[-1])):
            part_BTCHW, state = self.codec.decode_chunk(z_BFCHW[:, :size], state)
            parts.append(part_BTCHW)
            z_BFCHW = z_BFCHW[:, size:]
            if not z_BFCHW.shape[1]:
                break
        pixels = self.swapped(torch.cat(parts, 1))
        return pixels / 2 + 0.5 if self.unit else pixels

    def encode(self, pixels: Tensor) -> Tensor:
        pixels_BTCHW = self.swapped(pixels)
        if self.unit:  # the public tiny encoder repeats the last frame up to a group of four
            missing = -pixels_BTCHW.shape[1] % self.codec.temporal_factor
            last = pixels_BTCHW[:, -1:].expand(-1, missing, -1, -1, -1)
            pixels_BTCHW = 2 * torch.cat([pixels_BTCHW, last], 1) - 1
        return self.swapped(self.codec.encode_chunk(pixels_BTCHW)[0])

    def swapped(self, x: Tensor) -> Tensor:
        """Swaps this project's order of dimensions for the recording's, or back."""
        return x if self.frames_first else x.transpose(1, 2)


def drawn_weights(config: Mapping[str, Any]) -> dict[str, Tensor]:
    """Weights of the tiny VAE, stored as a seed."""
    generator = torch.Generator().manual_seed(config["seed"])
    weights = {}
    for key, shape in config["keys"].items():
        scale = 0.1 if key.endswith("bias") else (1 / math.prod(shape[1:])) ** 0.5
        weights[key] = torch.randn(shape, generator=generator) * scale
    last = [key for key in weights if key.startswith("decoder.") and key.endswith("bias")][-1]
    weights[last].fill_(0.5)
    return weights


def runner_of(folder: Path, shared: Tensors, options: argparse.Namespace) -> Runner:
    config = json.loads((folder / "config.json").read_text())
    weights = folder / "weights.safetensors"
    to = options.device, getattr(torch, options.dtype)
    if "num_layers" in config:
        dit = DiT(DiTConfig.from_wan(config), options.impl, options.attention_impl).to(*to)
        checkpoint.load(dit, weights)
        return functools.partial(run_dit, dit, shared["text"])
    if "z_dim" in config:
        vae = WanVAE(VAEConfig.from_wan(config), impl=options.impl)
        vae.load_state_dict(load_file(weights))
        return CodecRunner(vae.to(*to), frames_first=False, unit=False)
    if config.get("kind") == "taehv":
        tiny = TinyVAE()
        tiny.load_state_dict(drawn_weights(config))
        return CodecRunner(tiny.to(*to), frames_first=True, unit=True)
    raise NotSupported("not supported: the model of config.json")


def run_folder(folder: Path, options: argparse.Namespace, table: Table) -> tuple[int, int]:
    """(passed, not passed) of every case of a folder."""
    dtype = options.dtype
    cases: dict[str, dict[str, Tensor]] = defaultdict(dict)
    shared: dict[str, Tensor] = {}
    for key, value in load_file(folder / "cases.safetensors", options.device).items():
        name, dot, leaf = key.partition(".")
        (cases[name] if dot else shared)[leaf or name] = value
    runner = runner_of(folder, shared, options)
    passed = 0
    for name, tensors in sorted(cases.items()):
        error, verdict = "", "ok"
        try:
            # By default a GPU's convolutions round float32 to ten bits (TF32).
            with torch.no_grad(), torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
                ours, recorded, gradients = runner(Case.parse(name), tensors)
            relative = float((ours.double() - recorded).norm() / recorded.double().norm())
            error = f"{relative:.2e}"
            if not relative < LIMITS[dtype]:
                verdict = f"FAILED: over {LIMITS[dtype]:.0e}"
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
        except NotSupported as reason:
            table.add_row(folder.name, "", options.dtype, "", str(reason))
            counts = (0, 1)
        except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as problem:
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
