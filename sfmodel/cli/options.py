"""Options of `sfmodel generate`, and what follows from them alone."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, NamedTuple

from sfmodel.config import Preset, check_seed
from sfmodel.files import LONGEST
from sfmodel.frame_files import STANDARD_OUTPUT, numbered
from sfmodel.pretrained import Vae, find_preset, sized
from sfmodel.prompts import MOST
from sfmodel.saved_stream import read_preset
from sfmodel.schedule import FlowSchedule

# If nothing else is said: pixel frames of a stream and of a whole clip, its steps, a prompt.
FRAMES, CLIP, STEPS, RED = 121, 81, 50, "a large red ball moves up slowly"
STREAM = ("window", "sink", "positions", "chunk", "first")  # of Streaming, as a Preset has them


@dataclass(frozen=True)
class Content:
    """Content of the video.

    Args:
        prompt: What to show. The toy model knows: a small|large dim|bright red|green|blue|yellow|
            magenta|cyan|white ball moves up|down|left|right [and …] slowly|fast; leave out any. If
            not given: a large red ball moves up slowly.
        prompt_file: A text file with one prompt a line, each streamed into a video of its own
            (video-0.mp4, video-1.mp4, …); takes the place of the prompt.
        prompts_at: A text file of prompts over time, each line a second and a prompt ("7.5 a cat
            sleeps"); one at 0 takes the place of the prompt.
        prompt_over: Chunks over which one prompt becomes the next.
        keep_cache: What was seen under the old prompt stays in the cache, and fades out.
        image: A picture that the video starts with, scaled to cover it and cropped.
        video: A video to go on from, from its start, or with a strength to make anew.
        strength: How much of the video is made anew: 0 keeps it, 1 leaves nothing of it; between
            them it begins at the first of the steps (of 1000) that is not above it.
        frames: Pixel frames in all, those of a given video included, or "endless"; if not given 121
            more than that has, or with a strength as many.
        seed: The same seed gives the same video.
        resume: A stream that was saved, to go on from, of the sizes that it has; under another
            prompt if one is given.
    """

    prompt: str | None = None
    prompt_file: Path | None = None
    prompts_at: Path | None = None
    prompt_over: int = 1
    keep_cache: bool = False
    image: Path | None = None
    video: Path | None = None
    strength: float = 0.0
    frames: int | Literal["endless"] | None = None
    seed: int = 0
    resume: Path | None = None

    def check(self) -> None:
        """Raises ValueError for what does not go together."""
        if isinstance(self.frames, int) and self.frames < 1:
            raise ValueError(f"frames={self.frames}: must be at least 1")
        if self.prompt_over < 1:
            raise ValueError(f"prompt_over={self.prompt_over}: must be at least 1")
        if self.image and self.video:
            raise ValueError("image and video: give one of them")
        if self.strength and not self.video:
            raise ValueError(f"strength={self.strength}: goes with a video")
        if not 0 <= self.strength <= 1:
            raise ValueError(f"strength={self.strength}: must be 0 to 1")
        if self.prompt_file and self.prompts_at:
            raise ValueError("prompt_file and prompts_at: give one of them")
        new = ("prompt_file", "prompts_at", "image", "video", "seed")
        if self.resume and (given := [name for name in new if getattr(self, name)]):
            raise ValueError(f"{given[0]}: is of a new stream, and {self.resume} is resumed")


@dataclass(frozen=True)
class Streaming:
    """How it is streamed; what is not given is as a checkpoint was published or trained with
    (docs/models.md), else the preset's.

    Args:
        window: Latent frames that the KV cache holds, the current chunk included.
        sink: First latent frames that stay in the cache for good.
        positions: Of the sink: relative to the window, with which it moves along, or absolute.
        chunk: Latent frames generated at a time.
        first: Of the first chunk, where it has others: 1 is a still.
        height: Of the video in pixels.
        width: Of the video in pixels.
        low_latency: Decode a chunk's latent frames one by one, so that the first come earlier.
    """

    window: int | None = None
    sink: int | None = None
    positions: Literal["relative", "absolute"] | None = None
    chunk: int | None = None
    first: int | None = None
    height: int | None = None
    width: int | None = None
    low_latency: bool = False


@dataclass(frozen=True)
class Sampling:
    """How noise becomes video.

    Args:
        sampler: few-step streams from a distilled causal model; euler and unipc make a whole clip
            at once, of 81 frames if not said, with a plain bidirectional one, as Wan2.1 is.
        steps: The few-step list, falling, of 1000 to 1, the checkpoint's or the preset's if not
            given; of a whole clip how many, 50 if not given.
        shift: Of the noise levels; the checkpoint's or the preset's if not given.
        warped: The steps are meant as they are, not to be shifted (CausVid).
        guidance: Of a whole clip: how far from the negative prompt; 1 is none.
        negative: A prompt that guidance leads away from.
    """

    sampler: Literal["few-step", "euler", "unipc"] = "few-step"
    steps: tuple[int, ...] | None = None
    shift: float | None = None
    warped: bool = False
    guidance: float = 5.0
    negative: str = ""


@dataclass(frozen=True)
class Weights:
    """The model and its weights.

    Args:
        preset: Sizes of the model and its stream: toy, wan-1.3b or wan-14b; if not given that of
            the stream that is resumed or of a checkpoint that is known, else toy.
        checkpoint: Weights (.safetensors, .pt, .pth, a folder); if not given the toy's own, or the
            few-step generator in the folder of models.
        weights: Which part of a training checkpoint; if not given as it was published, else the
            averaged weights if they are whole.
        lora: Changes to the model that are merged into it, PATH or PATH:STRENGTH each, a file or
            PEFT's folder; if not given LongLive's own for LongLive.
        attention_impl: Implementation of attention, as of the functions of sfkernels.
        embeddings: A .safetensors file of embeddings, or a folder of such, in place of the text
            encoder, as `sfmodel encode PROMPTS.txt` writes them; all its prompts if none is given.
        models: Folder of the public weights; models, or what SFMODEL_MODELS names, if not given.
        vae: Wan2.1's own decoder, the tiny one, or the first of the two that is there.
        tile: Decode in tiles of so many latents a side, for little memory; with --vae wan.
    """

    preset: str | None = None
    checkpoint: Path | None = None
    weights: Literal["generator", "generator_ema"] | None = None
    lora: tuple[str, ...] = ()
    attention_impl: str = "auto"
    embeddings: Path | None = None
    models: Path | None = None
    vae: Vae = "auto"
    tile: int | None = None


class Job(NamedTuple):
    """A video to make."""

    prompt: str
    seed: int
    file: Path


@dataclass(frozen=True)
class Output:
    """Where it goes.

    Args:
        output: The file to write: .mp4, .gif, a .png each (frames/%05d.png), or - for raw bytes
            (rgb24) to standard output; with a layout the folder for the videos. out/video.mp4, or
            out, if not given.
        samples: Videos of each prompt, each of a seed of its own.
        layout: Names of several videos: of numbers (video-0.mp4, …); of vbench, "PROMPT-0.mp4"; of
            moviegen the number of the prompt, "0.mp4". The last two leave what is there already.
        batch: Videos that are made at a time; if not given 16 of the toy, else 1.
        save_state: A file to save the stream in at its end, also after Ctrl-C, for --resume.
        watch: Play the video in the terminal while it is made.
    """

    output: Path | None = None
    samples: int = 1
    layout: Literal["numbers", "vbench", "moviegen"] = "numbers"
    batch: int | None = None
    save_state: Path | None = None
    watch: bool = False

    def jobs(self, prompts: Sequence[str], seed: int) -> list[Job]:
        """Videos that are to be made. Raises ValueError for a prompt that cannot be a name."""
        for name in ("samples", "batch"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)}: must be at least 1")
        every = [(i, prompt, s) for i, prompt in enumerate(prompts) for s in range(self.samples)]
        if len(every) > MOST:
            raise ValueError(f"samples={self.samples}: {len(every):,} videos, at most {MOST:,}")
        check_seed(seed, len(every))
        if self.layout == "numbers":
            names = numbered(self.output or Path("out/video.mp4"), len(every))
        else:
            folder = self.output or Path("out")
            if folder.suffix or folder == STANDARD_OUTPUT:
                raise ValueError(f"output {str(folder)!r}: with a layout must be a folder")
            names = [folder / self._name(*each) for each in every]
            if twice := [name for name in names if names.count(name) > 1]:
                raise ValueError(f"{twice[0]}: two prompts are the same: use another --layout")
        return [
            Job(prompt, seed + i, name)
            for i, ((_, prompt, _), name) in enumerate(zip(every, names, strict=True))
        ]

    def _name(self, number: int, prompt: str, sample: int) -> str:
        if self.layout == "moviegen":
            return f"{number}-{sample}.mp4" if self.samples > 1 else f"{number}.mp4"
        name = f"{prompt}-{sample}.mp4"
        if "/" in name or len(os.fsencode(name)) > LONGEST:
            raise ValueError(
                f"{prompt[:60]!r}…: cannot be the name of a file: use another --layout"
            )
        return name


def check_sampler(content: Content, stream: Streaming, sampling: Sampling, output: Output) -> None:
    """Raises ValueError for what only a stream can do where a whole clip is asked for, and for what
    only that can where it is not."""
    if sampling.sampler == "few-step":
        if sampling.negative or sampling.guidance != Sampling.guidance:
            raise ValueError("guidance and negative: go with --sampler euler or unipc")
        return
    asked = {name: getattr(content, name) for name in ("prompts_at", "image", "video", "resume")}
    asked |= {"save_state": output.save_state, "frames=endless": content.frames == "endless"}
    asked |= {"prompt_over": content.prompt_over > 1, "keep_cache": content.keep_cache}
    asked |= {"warped": sampling.warped}
    asked |= {
        name: value for name, value in vars(stream).items() if name not in ("height", "width")
    }
    if given := [name for name, value in asked.items() if value]:
        raise ValueError(f"{given[0]}: goes with --sampler few-step, a stream")


def explicit(stream: Streaming, sampling: Sampling) -> dict[str, Any]:
    """Fields of a Preset that options of a stream set. Steps that are given are shifted unless it
    is said, whatever the checkpoint's own are."""
    given = {name: getattr(stream, name) for name in STREAM} | {"shift": sampling.shift}
    given |= {"steps": sampling.steps, "warped": sampling.warped or None}
    if sampling.steps:
        given["warped"] = sampling.warped
    return {name: value for name, value in given.items() if value is not None}


def settings_of(
    content: Content,
    stream: Streaming,
    sampling: Sampling,
    preset: str,
    saved: dict[str, Any],
    published: Mapping[str, Any],
) -> Preset:
    """The preset with what was asked for, or that of a saved stream. A picture is a first chunk of
    its own. published: settings of the checkpoint, which come before the preset's."""
    if content.resume:
        sizes: dict[str, Any] = {"preset": preset, "window": stream.window, "sink": stream.sink}
        sizes |= {"positions": stream.positions, "chunk": stream.chunk}
        sizes |= {"height": stream.height, "width": stream.width, "first": stream.first}
        sizes |= {"steps": sampling.steps, "shift": sampling.shift}
        sizes |= {"warped": sampling.warped or None}
        saved = {"preset": preset} | saved
        for name, value in sizes.items():
            if value not in (None, saved.get(name)):
                raise ValueError(f"{name}={value}: {content.resume} goes on with its own")
        return read_preset(content.resume)
    settings = sized(find_preset(preset), stream.height, stream.width)
    given = explicit(stream, sampling)
    if content.image:
        given |= {"first": 1}
    if sampling.sampler != "few-step":
        published, given = {}, {name: given[name] for name in ("shift",) if name in given}
        if sampling.steps and len(sampling.steps) > 1:
            raise ValueError(f"steps={sampling.steps}: of a whole clip must be a number of steps")
        frames = content.frames if isinstance(content.frames, int) else CLIP
        given |= dict.fromkeys(("window", "chunk", "first"), 1 - (1 - frames) // 4)
        given |= {"sink": 0}
    elif sampling.steps:
        FlowSchedule().warp(sampling.steps)  # checks them
    changes: dict[str, Any] = {**published, **given}
    return replace(settings, **changes).check()
