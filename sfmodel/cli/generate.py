"""`sfmodel generate`: videos streamed from sentences."""

from __future__ import annotations

import math
import sys
from collections import deque
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from sfmodel.cli.encode import check_outputs, write_videos
from sfmodel.config import check_seed
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
from sfmodel.prompts import read_prompts
from sfmodel.ranks import started
from sfmodel.sequence_parallel import Received, Team, chunks_of
from sfmodel.stream import Stream


def generate(
    prompt: str = "a large red ball moves up slowly",
    prompt_file: Path | None = None,
    frames: int | Literal["endless"] = 121,
    window: int | None = None,
    sink: int | None = None,
    positions: Literal["relative", "absolute"] | None = None,
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
    low_latency: bool = False,
) -> None:
    """Stream a video from a sentence, chunk by chunk, into an MP4 and a contact sheet beside it.

    Ctrl-C ends the video there and keeps what was written; so do SIGTERM, SIGHUP and SIGUSR1.
    Started by torchrun, the ranks share one stream: they divide the model's heads, all of them or
    all but the last, which then decodes beside the next chunk, as is predicted to be faster.

    Args:
        prompt: What to show. The toy model knows: a small|large dim|bright red|green|blue|yellow|
            magenta|cyan|white ball moves up|down|left|right [and …] slowly|fast; leave out any.
        prompt_file: A text file with one prompt a line, each streamed into a video of its own
            (video-0.mp4, video-1.mp4, …); takes the place of the prompt.
        frames: Pixel frames, or "endless".
        window: Latent frames that the KV cache holds, the current chunk included.
        sink: First latent frames that stay in the cache for good.
        positions: Of the sink: relative to the window, with which it moves along, or absolute.
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
        low_latency: Decode a chunk's latent frames one by one, so that the first come earlier.
    """
    given = dict(locals())
    settings = sized(find_preset(preset), height, width)
    settings = replace(
        settings,
        window=settings.window if window is None else window,
        sink=settings.sink if sink is None else sink,
        chunk=settings.chunk if chunk is None else chunk,
        positions=positions or settings.positions,
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
    with started() as ranks:
        ranks.agree(**given)
        kind = "wan" if preset == "toy" else chosen_vae(preset, vae, models)
        team = Team.of(ranks, settings, {"tiny": "taehv"}.get(kind, kind))
        device = ranks.device
        # All files are checked before one is loaded. Then the text comes first: its encoder leaves
        # the GPU before the model comes. It keeps on disk what each of many prompts is encoded as.
        text = load_text(preset, models) if ranks.first else None
        load_model = checked_model(preset, checkpoint, device, models) if team.runs else None
        load_codec = checked_codec(preset, device, vae, models, tile) if team.decodes else None
        if text is not None:
            with progress("encoding the prompts" if len(prompts) > 1 else "encoding the prompt"):
                last = deque(text.rows(prompts, device), maxlen=1)
        model, codec = load_model and load_model(), load_codec and load_codec()
        graph = device.type == "cuda" and not eager
        options: Any = {"graph": graph, "low_latency": low_latency}

        def begun(text_BTE: Tensor, seed: int) -> Stream | Received:
            if model is None:
                assert codec is not None
                return Received(codec, settings, len(text_BTE), device, **options)
            model.ranks, batch = team.heads, len(text_BTE)
            return Stream(model, codec, text_BTE, settings, seed=seed, batch=batch, **options)

        # A few videos of the toy fit side by side, of a large model one after the other.
        together = 16 if preset == "toy" else 1
        stream: Stream | Received | None = None
        for i in range(0, len(prompts), together):
            few, rows = slice(i, i + together), None
            if text is not None:
                encoded = last if len(prompts) == 1 else text.rows(prompts[few], device)
                rows = [row.float().cpu() for row in encoded]
            text_BTE = pad_sequence(ranks.from_first(rows), batch_first=True).to(device)
            if stream is not None and stream.batch == len(text_BTE):
                stream.restart(text_BTE, seed + i)
            else:
                with progress("capturing CUDA graphs" if graph else "preparing the stream"):
                    stream = begun(text_BTE, seed + i)
            if team.decodes:
                for note in stream.notes:
                    print(note, file=sys.stderr)
                on = f"{ranks.world} ranks, {device.type}" if ranks.world > 1 else str(device)
                where = f"{on}, in CUDA graphs" if graph and not stream.notes else on
                chunks = stream.frames(None if frames == "endless" else frames)
                write_videos(chunks, names[few], prompts[few], settings.fps, frames, where, watch)
            else:
                left = math.inf if frames == "endless" else chunks_of(settings, frames)
                while left > 0:
                    team.send(stream.denoise())
                    left -= 1
