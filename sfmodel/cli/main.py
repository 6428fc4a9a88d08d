"""The command line: `sfmodel generate | train | evaluate | encode | decode | convert | doctor`."""

from __future__ import annotations

import json
import os
import sys
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Annotated, Any, Literal

from sfmodel.extras import require

require("sfmodel", "model")

import tyro
from rich.console import Console
from torch.nn.utils.rnn import pad_sequence

from sfmodel.cli.convert import convert
from sfmodel.cli.doctor import doctor
from sfmodel.cli.encode import check_outputs, decode, encode, write_videos
from sfmodel.config import PRESETS, check_seed
from sfmodel.files import atomic, check_writable
from sfmodel.pretrained import (
    TOY_WEIGHTS,
    Vae,
    checked_codec,
    checked_model,
    default_device,
    find_preset,
    load_text,
    load_toy,
    sized,
    told,
)
from sfmodel.process import prepared
from sfmodel.stream import Stream
from sfmodel.toy.evaluate import Sampling, draw, held_out, score, seen_in, table
from sfmodel.toy.evaluate import evaluate as measure_model
from sfmodel.train.config import RECIPES, TrainConfig, defaults
from sfmodel.train.data import read_prompts
from sfmodel.train.loop import train


def generate(
    prompt: str = "a large red ball moves up slowly",
    prompt_file: Path | None = None,
    frames: int | Literal["endless"] = 121,
    window: int | None = None,
    sink: int | None = None,
    chunk: int | None = None,
    height: int | None = None,
    width: int | None = None,
    seed: int = 0,
    checkpoint: Path | None = None,
    preset: str = "toy",
    models: Path | None = None,
    vae: Vae = "auto",
    tile: int | None = None,
    output: Path = Path("out/video.mp4"),
    watch: bool = False,
    eager: bool = False,
) -> None:
    """Stream a video from a sentence, chunk by chunk, into an MP4 and a contact sheet beside it.

    Ctrl-C ends the video there and keeps what was written; so do SIGTERM, SIGHUP and SIGUSR1.

    Args:
        prompt: What to show. The toy model knows: a small|large dim|bright red|green|blue|yellow|
            magenta|cyan|white ball moves up|down|left|right [and …] slowly|fast; leave out any.
        prompt_file: A text file with one prompt a line, each streamed into a video of its own
            (video-0.mp4, video-1.mp4, …); takes the place of the prompt.
        frames: Pixel frames, or "endless".
        window: Latent frames that the KV cache holds, the current chunk included.
        sink: First latent frames that stay in the cache for good.
        chunk: Latent frames generated at a time.
        height: Of the video in pixels; the preset's if not given.
        width: Of the video in pixels; the preset's if not given.
        seed: The same seed gives the same video.
        checkpoint: Weights (.safetensors, .pt, .pth, a folder); if not given the toy's own, or the
            few-step generator in the folder of models.
        preset: Sizes of the model and its stream: toy, wan-1.3b or wan-14b.
        models: Folder of the public weights; models, or what SFMODEL_MODELS names, if not given.
        vae: Wan2.1's own decoder, the tiny one, or the first of the two that is there.
        tile: Decode in tiles of so many latents a side, for little memory; with --vae wan.
        output: The MP4 to write.
        watch: Play the video in the terminal while it is made.
        eager: On a GPU, launch kernels one by one instead of by CUDA graphs.
    """
    settings = sized(find_preset(preset), height, width)
    settings = replace(
        settings,
        window=settings.window if window is None else window,
        sink=settings.sink if sink is None else sink,
        chunk=settings.chunk if chunk is None else chunk,
    ).check()
    if frames != "endless" and frames < 1:
        raise ValueError(f"frames={frames}: must be at least 1")
    prompts = [prompt] if prompt_file is None else read_prompts(prompt_file)
    check_seed(seed, len(prompts))
    names = (
        [output]
        if len(prompts) == 1
        else [output.with_stem(f"{output.stem}-{i}") for i in range(len(prompts))]
    )
    check_outputs(names, watch)
    device = default_device()
    # All files are checked before one is loaded. Then the text comes first: its encoder leaves the
    # GPU before the model comes. It keeps on disk what each of many prompts is encoded as.
    text = load_text(preset, models)
    load_model = checked_model(preset, checkpoint, device, models)
    load_codec = checked_codec(preset, device, vae, models, tile)
    with told("encoding the prompt" + "s" * (len(prompts) > 1)):
        last = deque(text.rows(prompts, device), maxlen=1)
    model, codec = load_model(), load_codec()
    # A few videos of the toy fit side by side, of a large model one after the other.
    together = 16 if preset == "toy" else 1
    graph = device.type == "cuda" and not eager
    stream: Stream | None = None
    for i in range(0, len(prompts), together):
        few = slice(i, i + together)
        rows = last if len(prompts) == 1 else text.rows(prompts[few], device)
        text_BTE = pad_sequence([row.float() for row in rows], batch_first=True).to(device)
        if stream is not None and stream.batch == len(text_BTE):
            stream.restart(text_BTE, seed + i)
        else:
            options: Any = {"seed": seed + i, "batch": len(text_BTE), "graph": graph}
            with told("capturing CUDA graphs" if graph else "preparing the stream"):
                stream = Stream(model, codec, text_BTE, settings, **options)
            for note in stream.notes:
                print(f"launched one by one: {note}", file=sys.stderr)
        where = f"{device}, in CUDA graphs" if graph and not stream.notes else str(device)
        chunks = stream.video(None if frames == "endless" else frames)
        write_videos(chunks, names[few], prompts[few], settings.fps, frames, where, watch)


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
            resume: Continue the run in the output folder, bit for bit as if it had not stopped, or
                start it where there is none.
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
    sampling = Sampling(replace(PRESETS["toy"], chunk=chunk, window=window, sink=sink), euler)
    for name in ("evaluation.json", "evaluation.png"):
        check_writable(output / name)
    model, codec, _ = load_toy(checkpoint)
    held = held_out(codec, frames, videos, split)
    floor = score(seen_in(codec, held.latents_BFCHW), held.real_NFD)
    console = Console(width=None if Console().is_terminal else 120)
    with console.status("generating") as status:
        result = measure_model(model, sampling, codec, held, trained, told=status.update)
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


def run_command(
    program: str, commands: dict[str, Callable[..., None]], arguments: Sequence[str]
) -> None:
    """Runs the command that the arguments name. Exit code 2 and one sentence for bad input, 130
    for Ctrl-C and the other `process.STOPS`."""
    with prepared():
        try:
            tyro.extras.subcommand_cli_from_dict(commands, prog=program, args=arguments)
        except KeyboardInterrupt:
            sys.exit(130)
        except (ValueError, OSError, MemoryError, FloatingPointError) as error:
            print(f"{program}: {error}", file=sys.stderr)
            if type(error) is ConnectionError:
                # A rank is lost. Threads that wait for it would abort a process that ends tidily.
                sys.stdout.flush()
                sys.stderr.flush()
                os._exit(2)
            sys.exit(2)


def main() -> None:
    """Entry point of `sfmodel`."""
    arguments = sys.argv[1:]
    commands: dict[str, Callable[..., None]] = {
        "generate": generate,
        "train": train_command(arguments),
        "evaluate": evaluate,
        "encode": encode,
        "decode": decode,
        "convert": convert,
        "doctor": doctor,
    }
    run_command("sfmodel", commands, arguments)
