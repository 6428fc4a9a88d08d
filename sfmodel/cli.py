"""The command line: `sfmodel generate`, `sfmodel train`, `sfmodel evaluate`."""

from __future__ import annotations

import contextlib
import json
import os
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Annotated, Literal

import torch
import tyro
from rich.console import Console
from rich.progress import Progress, SpinnerColumn, TextColumn

from sfmodel import checkpoint
from sfmodel.config import PRESETS, Preset
from sfmodel.dit import DiT
from sfmodel.evaluate import Sampling, draw, held_out, judge, seen_in, table
from sfmodel.evaluate import evaluate as measure_model
from sfmodel.files import atomic
from sfmodel.stream import stream
from sfmodel.terminal import TerminalPlayer
from sfmodel.text import ToyTextEncoder
from sfmodel.toy_vae import ToyVAE
from sfmodel.train.config import RECIPES, TrainConfig, defaults
from sfmodel.train.data import read_prompts
from sfmodel.train.loop import train
from sfmodel.video import ContactSheet, VideoWriter

TOY_WEIGHTS = Path(__file__).parent / "weights" / "toy.safetensors"


def generate(
    prompt: str = "a large red ball moves up slowly",
    prompt_file: Path | None = None,
    frames: int | Literal["endless"] = 121,
    window: int | None = None,
    sink: int | None = None,
    chunk: int | None = None,
    seed: int = 0,
    checkpoint: Path | None = None,
    preset: str = "toy",
    output: Path = Path("out/video.mp4"),
    watch: bool = False,
) -> None:
    """Stream a video from a sentence, chunk by chunk, into an MP4 and a contact sheet beside it.

    Ctrl-C ends the video there and keeps what was written.

    Args:
        prompt: What to show. The toy model knows: a small|large dim|bright red|green|blue|yellow|
            magenta|cyan|white ball moves up|down|left|right [and …] slowly|fast; leave out any.
        prompt_file: A text file with one prompt a line, each streamed into a video of its own
            (video-0.mp4, video-1.mp4, …); takes the place of the prompt.
        frames: Pixel frames, or "endless".
        window: Latent frames that the KV cache holds, the current chunk included.
        sink: First latent frames that stay in the cache for good.
        chunk: Latent frames generated at a time.
        seed: The same seed gives the same video.
        checkpoint: Weights (.safetensors, .pt, .pth); the preset's own if not given.
        preset: Sizes of the model and its stream.
        output: The MP4 to write.
        watch: Play the video in the terminal while it is made.
    """
    settings = find_preset(preset)
    settings = replace(
        settings,
        window=settings.window if window is None else window,
        sink=settings.sink if sink is None else sink,
        chunk=settings.chunk if chunk is None else chunk,
    )
    prompts = [prompt] if prompt_file is None else read_prompts(prompt_file)
    model, codec, text = load_toy(checkpoint)
    embeddings = text(prompts, model.device)
    names = (
        [output]
        if len(prompts) == 1
        else [output.with_stem(f"{output.stem}-{i}") for i in range(len(prompts))]
    )
    total = None if frames == "endless" else frames
    chunks = stream(model, codec, embeddings, settings, frames=total, seed=seed, batch=len(prompts))
    sheets = [ContactSheet() for _ in prompts]
    player = TerminalPlayer(settings.fps) if watch else None
    done, began, first = 0, time.perf_counter(), 0.0
    console = Console()
    columns = (SpinnerColumn(), TextColumn("{task.fields[said]}"))
    interrupted = False
    with contextlib.ExitStack() as stack:
        writers = [stack.enter_context(VideoWriter(name, settings.fps)) for name in names]
        progress = stack.enter_context(
            Progress(*columns, console=console, disable=watch or not console.is_terminal)
        )
        task = progress.add_task("", said="first chunk")
        try:
            for pixels in chunks:
                done += pixels.shape[1]
                first = first or time.perf_counter() - began
                for writer, sheet, video in zip(writers, sheets, pixels, strict=True):
                    writer.write(video)
                    sheet.add(video)
                rate = done / (time.perf_counter() - began)
                status = f"frame {done} of {total or '∞'}, {rate:.1f} FPS"
                progress.update(task, said=status)
                if player:
                    player.show(pixels[0], f"{prompts[0]}  {status}")
        except KeyboardInterrupt:
            if not done:
                raise
            interrupted = True
    for sheet, name, sentence in zip(sheets, names, prompts, strict=True):
        sheet.save(name.with_suffix(".png"), title=sentence or "(no prompt)")
    seconds = time.perf_counter() - began
    print(
        f"{'stopped after ' if interrupted else ''}{done} frames in {seconds:.2f} s "
        f"({len(prompts) * done / seconds:.1f} FPS; first frame after {first:.3f} s), "
        f"{model.device}: {', '.join(str(n) for n in names)}"
    )
    if interrupted:
        raise KeyboardInterrupt


def train_command(arguments: Sequence[str]) -> Callable[..., None]:
    """`sfmodel train` with the defaults of the preset and the recipe that the arguments name."""

    def named(option: str, known: Iterable[str], otherwise: str) -> str:
        for i, word in enumerate(arguments):
            name, equals, value = word.partition("=")
            if name == f"--{option}":
                value = value if equals else "".join(arguments[i + 1 : i + 2])
                return value if value in known else otherwise  # an unknown one is refused later
        return otherwise

    default = defaults(named("preset", PRESETS, "toy"), named("recipe", RECIPES, "tf"))

    def run(
        config: Annotated[TrainConfig, tyro.conf.arg(name="")] = default, resume: bool = False
    ) -> None:
        """Train a model: progress, log.jsonl, curves.png, samples, checkpoints, weights. The
        defaults are those of the preset and the recipe. Under torchrun, on all its ranks.

        Args:
            resume: Continue the run in the output folder, bit for bit as if it had not stopped.
        """
        weights = train(config, resume=resume)
        if os.environ.get("RANK", "0") == "0":
            print(f"weights: {weights}; see them: sfmodel generate --checkpoint {weights}")

    return run


def evaluate(
    checkpoint: Path | None = None,
    chunk: int = 3,
    window: int = 7,
    sink: int = 0,
    frames: int = 28,
    trained: int = 7,
    videos: int = 256,
    euler: int = 0,
    split: Literal["test", "validation"] = "test",
    output: Path = Path("out/evaluation"),
) -> None:
    """Measure a model of the toy world against real videos that it has never seen, by frame: a
    table, evaluation.json and evaluation.png.

    Args:
        checkpoint: Weights; the shipped ones if not given.
        chunk: Latent frames generated at a time.
        window: Latent frames that the KV cache holds, the current chunk included.
        sink: First latent frames that stay in the cache for good.
        frames: Latent frames of a video.
        trained: Latent frames of a training clip, within which the exposure gap is measured.
        videos: To generate.
        euler: Euler steps a chunk, for a model that is not distilled; 0 takes the few steps.
        split: Real videos to measure against.
        output: Folder for the files.
    """
    for name, value in (("videos", videos), ("trained", trained), ("frames", frames)):
        least = {"videos": 16, "trained": 2, "frames": trained}[name]
        if value < least:
            raise ValueError(f"{name}={value}: must be at least {least}")
    settings = replace(find_preset("toy"), chunk=chunk, window=window, sink=sink)
    model, codec, _ = load_toy(checkpoint)
    held = held_out(codec, frames, videos, split)
    floor = judge(seen_in(codec, held.latents_BFCHW), held.real_NFD)
    console = Console(width=None if Console().is_terminal else 120)
    with console.status("generating") as status:
        result = measure_model(
            model, Sampling(settings, euler), codec, held, trained, told=status.update
        )
    facts = {
        "checkpoint": str(checkpoint or TOY_WEIGHTS),
        "preset": asdict(settings),
        "floor": floor,
    }
    with atomic(output / "evaluation.json") as part:
        part.write_text(json.dumps({**facts, **result}, indent=1))
    draw(result, floor, trained, output / "evaluation.png")
    console.print(table(result, floor, trained))
    print(f"{output}/evaluation.json, evaluation.png")


def find_preset(name: str) -> Preset:
    """Raises ValueError for a preset that does not exist or cannot be streamed yet."""
    if name not in PRESETS:
        raise ValueError(f"preset={name!r}: must be one of {', '.join(PRESETS)}")
    if name != "toy":
        raise ValueError(
            f"preset={name!r}: its video decoder and text encoder are not part of this version; "
            "'toy' is"
        )
    return PRESETS[name]


def load_toy(path: Path | None = None) -> tuple[DiT, ToyVAE, ToyTextEncoder]:
    """The toy model with the given or the shipped weights, its codec and its text encoder."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = DiT(PRESETS["toy"].dit)
    checkpoint.load(model, path or TOY_WEIGHTS)
    return model.to(device).eval(), ToyVAE.from_pretrained().to(device), ToyTextEncoder()


def run_command(
    program: str, commands: dict[str, Callable[..., None]], arguments: Sequence[str]
) -> None:
    """Runs the command that the arguments name. Exit code 2 and one sentence for bad input, 130
    for Ctrl-C."""
    try:
        tyro.extras.subcommand_cli_from_dict(commands, prog=program, args=arguments)
    except KeyboardInterrupt:
        sys.exit(130)
    except (ValueError, OSError, MemoryError, FloatingPointError) as error:
        print(f"{program}: {error}", file=sys.stderr)
        sys.exit(2)


def main() -> None:
    """Entry point of `sfmodel`."""
    arguments = sys.argv[1:]
    commands: dict[str, Callable[..., None]] = {
        "generate": generate,
        "train": train_command(arguments),
        "evaluate": evaluate,
    }
    run_command("sfmodel", commands, arguments)
