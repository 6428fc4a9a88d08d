"""`sfmodel generate`: videos streamed from sentences, images and other videos."""

from __future__ import annotations

import math
import sys
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from tyro.conf import OmitArgPrefixes

from sfmodel.cli.encode import check_outputs, latents_of, write_videos
from sfmodel.config import Preset, check_seed
from sfmodel.cost import pixel_frames
from sfmodel.files import check_writable
from sfmodel.footage import covering_image, to_pixels
from sfmodel.pretrained import (
    Vae,
    checked_codec,
    checked_model,
    chosen_vae,
    find_preset,
    load_text,
    progress,
    sized,
)
from sfmodel.process import noting
from sfmodel.prompts import read_prompts, read_timeline
from sfmodel.ranks import started
from sfmodel.saved_stream import load_stream, read_notes, read_preset, save_stream
from sfmodel.schedule import FlowSchedule
from sfmodel.sequence_parallel import Received, Team, chunks_of
from sfmodel.stream import Stream
from sfmodel.vae.codec import VideoCodec
from sfmodel.weights.lora import Lora
from sfmodel.whole_clip import WholeClip

# If nothing else is said: pixel frames of a stream and of a whole clip, its steps, a prompt.
FRAMES, CLIP, STEPS, RED = 121, 81, 50, "a large red ball moves up slowly"


@dataclass(frozen=True)
class Content:
    """What to show.

    Args:
        prompt: What to show. The toy model knows: a small|large dim|bright red|green|blue|yellow|
            magenta|cyan|white ball moves up|down|left|right [and …] slowly|fast; leave out any. If
            not given: a large red ball moves up slowly.
        prompt_file: A text file with one prompt a line, each streamed into a video of its own
            (video-0.mp4, video-1.mp4, …); takes the place of the prompt.
        prompts_at: A text file of prompts over time, each line a second and a prompt ("7.5 a cat
            sleeps"); one at 0 takes the place of the prompt.
        image: A picture that the video starts with, scaled to cover it and cropped.
        video: A video to go on from, from its start, or with a strength to make anew.
        strength: How much of the video is made anew: 0 keeps it, 1 leaves nothing of it.
        frames: Pixel frames in all, those of a given video included, or "endless"; if not given 121
            more than that has, or with a strength as many.
        seed: The same seed gives the same video.
        resume: A stream that was saved, to go on from, of the sizes that it has; under another
            prompt if one is given.
    """

    prompt: str | None = None
    prompt_file: Path | None = None
    prompts_at: Path | None = None
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
    """How it is streamed; what is not given is the preset's.

    Args:
        window: Latent frames that the KV cache holds, the current chunk included.
        sink: First latent frames that stay in the cache for good.
        positions: Of the sink: relative to the window, with which it moves along, or absolute.
        chunk: Latent frames generated at a time.
        first: Of the first chunk, where it has others: 1 is a still.
        height: Of the video in pixels.
        width: Of the video in pixels.
        low_latency: Decode a chunk's latent frames one by one, so that the first come earlier.
        eager: On a GPU, launch kernels one by one instead of by CUDA graphs.
    """

    window: int | None = None
    sink: int | None = None
    positions: Literal["relative", "absolute"] | None = None
    chunk: int | None = None
    first: int | None = None
    height: int | None = None
    width: int | None = None
    low_latency: bool = False
    eager: bool = False


@dataclass(frozen=True)
class Sampling:
    """How noise becomes video.

    Args:
        sampler: few-step streams from a distilled causal model; euler and unipc make a whole clip
            at once, of 81 frames if not said, with a plain bidirectional one, as Wan2.1 is.
        steps: The few-step list, falling from 1000, the preset's if not given; of a whole clip how
            many, 50 if not given.
        shift: Of the noise levels; the preset's if not given.
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
        preset: Sizes of the model and its stream: toy, wan-1.3b or wan-14b; if not given toy, or
            that of the stream that is resumed.
        checkpoint: Weights (.safetensors, .pt, .pth, a folder); if not given the toy's own, or the
            few-step generator in the folder of models.
        lora: Changes to the model that are merged into it, PATH or PATH:STRENGTH each, a file or
            PEFT's folder.
        models: Folder of the public weights; models, or what SFMODEL_MODELS names, if not given.
        vae: Wan2.1's own decoder, the tiny one, or the first of the two that is there.
        tile: Decode in tiles of so many latents a side, for little memory; with --vae wan.
    """

    preset: str | None = None
    checkpoint: Path | None = None
    lora: tuple[str, ...] = ()
    models: Path | None = None
    vae: Vae = "auto"
    tile: int | None = None


@dataclass(frozen=True)
class Output:
    """Where it goes.

    Args:
        output: The MP4 to write.
        save_state: A file to save the stream in at its end, also after Ctrl-C, for --resume.
        watch: Play the video in the terminal while it is made.
    """

    output: Path = Path("out/video.mp4")
    save_state: Path | None = None
    watch: bool = False


def generate(
    content: OmitArgPrefixes[Content] = Content(),
    stream: OmitArgPrefixes[Streaming] = Streaming(),
    sampling: OmitArgPrefixes[Sampling] = Sampling(),
    weights: OmitArgPrefixes[Weights] = Weights(),
    output: OmitArgPrefixes[Output] = Output(),
) -> None:
    """Stream a video from a sentence, chunk by chunk, into an MP4 and a contact sheet beside it.

    Ctrl-C ends the video there and keeps what was written; so do SIGTERM, SIGHUP and SIGUSR1.
    Started by torchrun, the ranks share one stream: they divide the model's heads, all of them or
    all but the last, which then decodes beside the next chunk, as is predicted to be faster.
    """
    content.check()
    saved = read_notes(content.resume) if content.resume else {}
    preset, models = weights.preset or saved.get("preset", "toy"), weights.models
    whole = sampling.sampler != "few-step"
    settings = _settings(content, stream, sampling, preset, saved)
    if whole:
        _check_whole(content, output)
    timeline = read_timeline(content.prompts_at) if content.prompts_at else []
    prompts = read_prompts(content.prompt_file) if content.prompt_file else [content.prompt or RED]
    if timeline and not timeline[0][0]:
        prompts = [timeline.pop(0)[1]]
    check_seed(content.seed, len(prompts))
    file = output.output
    names = [file.with_stem(f"{file.stem}-{i}") for i in range(len(prompts))]
    names = [file] if len(prompts) == 1 else names
    check_outputs(names, output.watch)
    loras = [Lora.parse(said) for said in weights.lora]
    if output.save_state:
        check_writable(output.save_state)
        if len(prompts) > 1:
            raise ValueError("save_state: is of one prompt's stream")
    with started() as ranks:
        ranks.agree(**vars(content), **vars(stream), **vars(sampling), **vars(weights))
        if ranks.world > 1 and (content.resume or output.save_state or whole):
            raise ValueError("resume, save_state and a whole clip: go with one rank")
        kind = "wan" if preset == "toy" else chosen_vae(preset, weights.vae, models)
        team = Team.of(ranks, settings, {"tiny": "taehv"}.get(kind, kind))
        device, encodes = ranks.device, ranks.first and (content.image or content.video)
        # All files are checked before one is loaded. Then the text comes first: its encoder leaves
        # the GPU before the model comes. It keeps on disk what each of many prompts is encoded as.
        text = load_text(preset, models) if ranks.first else None
        load_model = (
            checked_model(preset, weights.checkpoint, device, models, loras, whole)
            if team.runs
            else None
        )
        load_codec = (
            checked_codec(preset, device, weights.vae, models, weights.tile)
            if team.decodes or encodes
            else None
        )
        image = None
        if content.image and encodes:
            image = covering_image(content.image, *_pixels(settings))
        last: deque[Tensor] = deque(maxlen=1)
        later: list[Tensor] = []
        if text is not None:
            with progress("encoding the prompts" if len(prompts) > 1 else "encoding the prompt"):
                more = [p for _, p in timeline] + [sampling.negative] * whole
                later = [row.float().cpu() for row in text.rows(more, device)]
                last.extend(text.rows(prompts, device))
        later = ranks.from_first(later)
        model, codec = load_model and load_model(), load_codec and load_codec()
        given = None
        if encodes:
            assert codec is not None
            given = _given(image, content, settings, codec, device)
        given = ranks.from_first(given)
        frames = _frames(content, given, whole)
        graph = device.type == "cuda" and not stream.eager and not whole
        options: Any = {"graph": graph, "low_latency": stream.low_latency}

        def begun(text_BTE: Tensor, seed: int) -> Stream | Received | WholeClip:
            if whole:
                assert model is not None
                count = sampling.steps[0] if sampling.steps else STEPS
                return WholeClip(
                    model, codec, text_BTE, settings, negative_BTE=later[-1][None].to(device),
                    guidance=sampling.guidance, sampler=sampling.sampler, steps=count, seed=seed,
                    batch=len(text_BTE),
                )  # fmt: skip
            if model is None:
                assert codec is not None
                return Received(codec, settings, len(text_BTE), device, **options)
            model.ranks, batch = team.heads, len(text_BTE)
            decoder = codec if team.decodes else None
            return Stream(model, decoder, text_BTE, settings, seed=seed, batch=batch, **options)

        # A few videos of the toy fit side by side, of a large model one after the other.
        together = 16 if preset == "toy" else 1
        made: Stream | Received | WholeClip | None = None
        for i in range(0, len(prompts), together):
            few, rows = slice(i, i + together), None
            if text is not None:
                encoded = last if len(prompts) == 1 else text.rows(prompts[few], device)
                rows = [row.float().cpu() for row in encoded]
            text_BTE = pad_sequence(ranks.from_first(rows), batch_first=True).to(device)
            if isinstance(made, (Stream, Received)) and made.batch == len(text_BTE):
                made.restart(text_BTE, content.seed + i)
            else:
                with progress("capturing CUDA graphs" if graph else "preparing the stream"):
                    made = begun(text_BTE, content.seed + i)
            if isinstance(made, Stream):
                if given is not None:
                    batch = given.expand(len(text_BTE), -1, -1, -1, -1)
                    made.give(batch.to(device), content.strength)
                for (second, _), row in zip(timeline, later, strict=True):
                    made.set_prompt(row[None].to(device), frame=_latent_frame(second, settings))
                if content.resume:
                    load_stream(made, content.resume)
                    if content.prompt is not None:
                        made.set_prompt(text_BTE)
            if team.decodes:
                for note in made.notes:
                    print(note, file=sys.stderr)
                on = f"{ranks.world} ranks, {device.type}" if ranks.world > 1 else str(device)
                where = f"{on}, in CUDA graphs" if graph and not made.notes else on
                chunks = made.frames(None if frames == "endless" else frames)
                if output.save_state:
                    chunks = _whole_chunks(chunks)
                titles = [" > ".join([each, *(p for _, p in timeline)]) for each in prompts[few]]
                if content.resume and content.prompt is None:
                    titles = [saved["title"]]
                try:
                    write_videos(
                        chunks, names[few], titles, settings.fps, frames, where, output.watch
                    )
                except KeyboardInterrupt as stop:
                    if not isinstance(stop, _TornError):
                        _save(made, output.save_state, preset, titles[0])
                    raise
                _save(made, output.save_state, preset, titles[0])
            elif not isinstance(made, WholeClip):
                left = math.inf if frames == "endless" else chunks_of(settings, frames)
                while left > 0:
                    team.send(made.denoise())
                    left -= 1


class _TornError(KeyboardInterrupt):
    """A second Ctrl-C, within a chunk."""


def _whole_chunks(chunks: Iterator[Tensor]) -> Iterator[Tensor]:
    """The chunks, none of which Ctrl-C tears: a stream that is torn is not worth saving. A second
    Ctrl-C does, and raises `_TornError`."""
    while True:
        try:
            with noting() as signals:
                chunk = next(chunks, None)
        except KeyboardInterrupt:
            print("stopped within a chunk: the stream is not saved", file=sys.stderr)
            raise _TornError from None
        if chunk is None:
            return
        yield chunk
        if signals:
            raise KeyboardInterrupt


def _save(made: object, path: Path | None, preset: str, title: str) -> None:
    if path is not None and isinstance(made, Stream):
        with noting():
            save_stream(made, path, {"preset": preset, "title": title})
        print(f"the stream: {path}")


def _check_whole(content: Content, output: Output) -> None:
    """Raises ValueError for what only a stream can do."""
    asked = ("prompts_at", "image", "video", "resume")
    if given := [name for name in asked if getattr(content, name)]:
        raise ValueError(f"{given[0]}: goes with --sampler few-step, a stream")
    if output.save_state or content.frames == "endless":
        raise ValueError("save_state and endless frames: go with --sampler few-step, a stream")


def _settings(
    content: Content, stream: Streaming, sampling: Sampling, preset: str, saved: dict[str, Any]
) -> Preset:
    """The preset with what was asked for, or that of a saved stream. A picture is a first chunk of
    its own."""
    if content.resume:
        sizes = {"preset": preset, "window": stream.window, "sink": stream.sink}
        sizes |= {"positions": stream.positions, "chunk": stream.chunk}
        sizes |= {"height": stream.height, "width": stream.width}
        for name, value in sizes.items():
            if value not in (None, saved.get(name)):
                raise ValueError(f"{name}={value}: {content.resume} goes on with its own")
        return read_preset(content.resume)
    settings = sized(find_preset(preset), stream.height, stream.width)
    names = ("window", "sink", "positions", "chunk", "first")
    given = {name: getattr(stream, name) for name in names} | {"shift": sampling.shift}
    if content.image:
        given |= {"first": 1}
    if sampling.sampler != "few-step":
        if sampling.steps and len(sampling.steps) > 1:
            raise ValueError(f"steps={sampling.steps}: of a whole clip must be a number of steps")
        frames = content.frames if isinstance(content.frames, int) else CLIP
        given |= dict.fromkeys(("window", "chunk", "first"), 1 - (1 - frames) // 4)
        given |= {"sink": 0}
    elif sampling.steps:
        FlowSchedule().warp(sampling.steps)  # checks them
        given |= {"steps": sampling.steps, "warped": sampling.warped}
    changes: dict[str, Any] = {name: value for name, value in given.items() if value is not None}
    return replace(settings, **changes).check()


def _pixels(settings: Preset) -> tuple[int, int]:
    """Height and width of the video."""
    return settings.height * 8, settings.width * 8


def _latent_frame(second: float, settings: Preset) -> int:
    """The latent frame that shows a second of the video."""
    return -(-round(second * settings.fps) // 4)


@torch.no_grad()
def _given(
    image: Any, content: Content, settings: Preset, codec: VideoCodec, device: torch.device
) -> Tensor:
    """Latents [1, F, C, h, w] of the picture or the video that was given, of whole chunks."""
    if image is not None:
        return codec.encode_chunk(to_pixels([image])[None].to(device))[0].cpu()
    assert content.video is not None
    wanted = content.frames if content.strength and content.frames != "endless" else None
    try:
        latents = latents_of(content.video, codec, settings, None, None, device, most=wanted)
    except ValueError as error:
        raise ValueError(f"{content.video}: {error}") from None
    first = settings.first or settings.chunk
    if latents.shape[1] < first:
        raise ValueError(
            f"{content.video}: has {pixel_frames(latents.shape[1])} frames: must have "
            f"{pixel_frames(first)}, a first chunk"
        )
    return latents[:, : latents.shape[1] - (latents.shape[1] - first) % settings.chunk]


def _frames(content: Content, given: Tensor | None, whole: bool) -> int | Literal["endless"]:
    """Pixel frames of the video. Raises ValueError where those that were given are as many."""
    there = 0 if given is None or content.image else pixel_frames(given.shape[1])
    if content.frames is None and whole:
        return CLIP
    if content.frames is None:
        return there if content.strength else there + FRAMES
    if isinstance(content.frames, int) and not content.strength and content.frames <= there:
        raise ValueError(
            f"frames={content.frames}: {content.video} has {there} already, which are kept: must "
            "be more, or give a --strength"
        )
    return content.frames
