"""Videos that a run's averaged weights generate, as MP4s and a contact sheet.

Shapes: T pixel frames, H × W pixels.
"""

from __future__ import annotations

import textwrap
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from sfmodel.dit import DiT
from sfmodel.pretrained import default_dtype
from sfmodel.stream import Stream
from sfmodel.train.data import Clips, Files
from sfmodel.vae.codec import VideoCodec

if TYPE_CHECKING:
    from sfmodel.train.loop import Run

TOY_PROMPTS = ("a large red ball moves up slowly", "a small bright blue ball moves right fast", "")
LONGEST = 120  # letters of a prompt beside its video


def write_samples(
    run: Run, weights: Mapping[str, Tensor], codec: VideoCodec, path: Path
) -> Iterator[None]:
    """Writes a video NAME-0.mp4, … of each prompt, twice as long as the longest training clip, or
    as the longest rollout where that is longer, and at last NAME.png. Gives a turn after each
    chunk. The model, of weights on the CPU, is on the device meanwhile, with the cache of one
    video."""
    from sfmodel.video import VideoWriter, contact_sheet_of_rows  # needs PyAV

    config, device, preset = run.config, run.ranks.device, run.preset
    clips = _prompts(run)  # first: a text encoder needs the room that the model takes
    with torch.device("meta"):
        model = DiT(preset.dit, config.impl, config.attention_impl)
    model.load_state_dict(weights, assign=True)
    dtype = torch.float32 if config.preset == "toy" else default_dtype(device)
    model = model.to(device, dtype).eval()
    latents = max([2 * max(config.frames), *config.rollouts])
    count = 1 + codec.temporal_factor * (latents - 1)
    videos = []
    for i, text_TE in enumerate(clips.text_BTE.to(device)):
        stream = Stream(model, codec, text_TE[None], preset, seed=config.seed + i)
        if clips.latents_BFCHW is not None:
            stream.give(clips.latents_BFCHW[i : i + 1, :1].to(device))
        chunks = []
        with VideoWriter(path.with_name(f"{path.stem}-{i}.mp4"), preset.fps) as writer:
            for frames_1THWC in stream.frames(count):
                writer.write(frames_1THWC[0])
                chunks.append(frames_1THWC[0].clone())
                yield
        videos.append(torch.cat(chunks))
    labels = [
        textwrap.shorten(sentence, LONGEST, placeholder="…") or "(no prompt)"
        for sentence in clips.sentences
    ]
    title = f"{config.recipe}, update {run.step}"
    contact_sheet_of_rows(torch.stack(videos), path, labels, title)


def _prompts(run: Run) -> Clips:
    """Prompts to generate videos of: three of the toy world, or the first three of the data; under
    `image` clips that begin with stills to go on from."""
    if run.config.image:
        return run.source.draw(run.config.seed, len(TOY_PROMPTS), max(run.config.frames))
    if run.config.preset == "toy":
        assert run.text is not None
        return Clips(None, run.text(TOY_PROMPTS), [*TOY_PROMPTS])
    count = len(TOY_PROMPTS)
    if isinstance(run.source, Files):
        return run.source.first(count)
    return run.source.draw(0, count, 1, latents=False)
