"""`sfmodel generate`: videos streamed from sentences, images and other videos."""

from __future__ import annotations

import math
import sys
from collections import deque
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from tyro.conf import OmitArgPrefixes

from sfmodel.cli.chosen import choose
from sfmodel.cli.encode import check_outputs, latents_of, write_videos
from sfmodel.cli.options import (
    CLIP,
    FRAMES,
    RED,
    STEPS,
    Content,
    Output,
    Sampling,
    Streaming,
    Weights,
    check_sampler,
)
from sfmodel.config import Preset
from sfmodel.cost import pixel_frames
from sfmodel.dit import DiT
from sfmodel.files import check_writable
from sfmodel.footage import to_pixels
from sfmodel.frame_files import STANDARD_OUTPUT, sheet_of, writes
from sfmodel.pictures import covering_image
from sfmodel.pretrained import (
    TextEncoder,
    checked_codec,
    chosen_vae,
    load_text,
    progress,
)
from sfmodel.process import noting
from sfmodel.prompts import read_prompts, read_timeline
from sfmodel.ranks import started
from sfmodel.saved_stream import load_stream, read_notes, save_stream
from sfmodel.sequence_parallel import Received, Team, chunks_of
from sfmodel.stream import Stream
from sfmodel.train.data import Embeddings
from sfmodel.vae.codec import VideoCodec
from sfmodel.whole_clip import WholeClip

Made = Stream | Received | WholeClip


def generate(
    content: OmitArgPrefixes[Content],
    stream: OmitArgPrefixes[Streaming],
    sampling: OmitArgPrefixes[Sampling],
    weights: OmitArgPrefixes[Weights],
    output: OmitArgPrefixes[Output],
    eager: bool = False,
) -> None:
    """Stream a video from a sentence, chunk by chunk, into an MP4 and a contact sheet beside it.

    Ctrl-C ends the video there and keeps what was written; so do SIGTERM, SIGHUP and SIGUSR1.
    Started by torchrun, the ranks share one stream: they divide the model's heads, all of them or
    all but the last, which then decodes beside the next chunk, as is predicted to be faster.

    Args:
        eager: On a GPU, launch kernels one by one instead of by CUDA graphs.
    """
    content.check()
    saved = read_notes(content.resume) if content.resume else {}
    whole, models = sampling.sampler != "few-step", weights.models
    chosen = choose(content, stream, sampling, weights, saved)
    preset, settings = chosen.preset, chosen.settings
    check_sampler(content, stream, sampling, output)
    timeline = read_timeline(content.prompts_at) if content.prompts_at else []
    prompts = read_prompts(content.prompt_file) if content.prompt_file else [content.prompt or RED]
    embedded = Embeddings(weights.embeddings, settings) if weights.embeddings else None
    if embedded and not (content.prompt or content.prompt_file or timeline):
        prompts = [*embedded.at][: 1 if content.resume else None]
    if timeline and not timeline[0][0]:
        prompts = [timeline.pop(0)[1]]
    jobs = output.jobs(prompts, content.seed)
    if output.save_state:
        check_writable(output.save_state)
        if output.layout != "numbers":  # whose videos may be there already
            raise ValueError(f"save_state: goes with --layout numbers, not {output.layout}")
        if len(jobs) > 1:
            raise ValueError("save_state: is of one prompt's stream")
    if content.frames == "endless" and len(jobs) > 1:
        raise ValueError(f"frames=endless: the first of {len(jobs)} videos would never end")
    _check_apart(content, output, [job.file for job in jobs])
    if content.resume and len(jobs) > 1:
        raise ValueError(f"resume: is of one stream, and {len(jobs)} videos are asked for")
    if output.layout != "numbers":
        there = [job for job in jobs if job.file.exists()]
        jobs = [job for job in jobs if job not in there]
        if there:
            print(f"{len(there)} of {len(there) + len(jobs)} videos were there already")
    check_outputs([job.file for job in jobs], output.watch)
    if not jobs:
        return
    with started() as ranks:
        asked = vars(content) | vars(stream) | vars(sampling) | vars(weights)
        ranks.agree(**asked, eager=eager)
        if ranks.world > 1 and (content.resume or output.save_state or whole):
            raise ValueError("resume, save_state and a whole clip: go with one rank")
        kind = "wan" if preset == "toy" else chosen_vae(preset, weights.vae, models)
        team = Team.of(ranks, settings, {"tiny": "taehv"}.get(kind, kind))
        device, encodes = ranks.device, ranks.first and (content.image or content.video)
        # All files are checked before one is loaded. Then the text comes first: its encoder leaves
        # the GPU before the model comes. It keeps on disk what each of many prompts is encoded as.
        text: TextEncoder | Embeddings | None = None
        if ranks.first:
            text = embedded or load_text(preset, models)
        load_model = load_codec = image = None
        if team.runs:
            load_model, line = chosen.checked(device)
            if line and ranks.first and not content.resume:
                print(line, file=sys.stderr)
        if team.decodes or encodes:
            load_codec = checked_codec(preset, device, weights.vae, models, weights.tile)
        if content.image and encodes:
            image = covering_image(content.image, *_pixels(settings))
        last: deque[Tensor] = deque(maxlen=1)
        later: list[Tensor] = []
        if text is not None:
            with progress("encoding the prompts" if len(prompts) > 1 else "encoding the prompt"):
                more = [prompt for _, prompt in timeline] + [sampling.negative] * whole
                later = [row.float().cpu() for row in text.rows(more, device)]
                last.extend(text.rows(dict.fromkeys(job.prompt for job in jobs), device))
        later = [row.to(device) for row in ranks.from_first(later)]
        model, codec = load_model and load_model(), load_codec and load_codec()
        given = None
        if encodes:
            assert codec is not None
            given = _given(image, content, settings, codec, device)
        given = ranks.from_first(given)
        frames = _frames(content, given, whole)
        graph = device.type == "cuda" and not eager and not whole
        if model is not None:
            model.ranks = team.heads
        decoder = codec if team.decodes else None

        def begun(text_BTE: Tensor) -> Made:
            batch = len(text_BTE)
            if whole:
                assert model is not None
                return _whole_clip(model, decoder, text_BTE, later[-1], settings, sampling)
            options: Any = {"graph": graph, "low_latency": stream.low_latency}
            if model is None:
                return Received(decoder, settings, batch, device, **options)
            return Stream(model, decoder, text_BTE, settings, batch=batch, **options)

        # A few videos of the toy fit side by side, of a large model one after the other.
        together = output.batch or (16 if preset == "toy" else 1)
        made: Made | None = None
        for i in range(0, len(jobs), together):
            few, rows = jobs[i : i + together], None
            if text is not None:
                encoded = last if len(prompts) == 1 else text.rows([j.prompt for j in few], device)
                rows = [row.float().cpu() for row in encoded] * (
                    len(few) if len(prompts) == 1 else 1
                )
            text_BTE = pad_sequence(ranks.from_first(rows), batch_first=True).to(device)
            if isinstance(made, (Stream, Received)) and made.batch == len(text_BTE):
                made.restart(text_BTE)
            else:
                with progress("capturing CUDA graphs" if graph else "preparing the stream"):
                    made = begun(text_BTE)
            if isinstance(made, (Stream, WholeClip)):
                made.seed_B.copy_(torch.tensor([job.seed for job in few]))
            titles = [" > ".join([job.prompt, *(p for _, p in timeline)]) for job in few]
            if isinstance(made, Stream):
                if given is not None:
                    batch = given.expand(len(text_BTE), -1, -1, -1, -1)
                    made.give(batch.to(device), content.strength)
                count = len(made.text_BTE)
                how: Any = {"over": content.prompt_over, "recompute": not content.keep_cache}
                for (second, _), row in zip(timeline, later, strict=True):
                    row_BTE = row[None].expand(count, -1, -1)
                    made.set_prompt(row_BTE, frame=_latent_frame(second, settings), **how)
                if content.resume:
                    load_stream(made, content.resume)
                    if content.prompt is not None:
                        made.set_prompt(text_BTE, **how)
                    else:
                        titles = [saved.get("title", "a stream that goes on")]
            if not team.decodes:
                assert isinstance(made, Stream)
                _send(made, team, math.inf if frames == "endless" else chunks_of(settings, frames))
                continue
            for note in made.notes:
                print(note, file=sys.stderr)
            on = f"{ranks.world} ranks, {device.type}" if ranks.world > 1 else str(device)
            where = f"{on}, in CUDA graphs" if graph and not made.notes else on
            chunks = made.frames(None if frames == "endless" else frames)
            chunks = _whole_chunks(chunks) if output.save_state else chunks
            files = [job.file for job in few]
            try:
                write_videos(chunks, files, titles, settings.fps, frames, where, output.watch)
            except BaseException as stop:
                if output.layout != "numbers":  # where what is there counts as made
                    for file in files:
                        file.unlink(missing_ok=True)
                    print("the unfinished videos are removed")
                if isinstance(stop, KeyboardInterrupt) and not isinstance(stop, _TornError):
                    _save(made, output.save_state, preset, titles[0])
                raise
            _save(made, output.save_state, preset, titles[0])


def _whole_clip(
    model: DiT,
    codec: VideoCodec | None,
    text_BTE: Tensor,
    negative_TE: Tensor,
    settings: Preset,
    sampling: Sampling,
) -> WholeClip:
    return WholeClip(
        model, codec, text_BTE, settings, negative_BTE=negative_TE[None],
        guidance=sampling.guidance, sampler=sampling.sampler, batch=len(text_BTE),
        steps=sampling.steps[0] if sampling.steps else STEPS,
    )  # fmt: skip


def _send(made: Stream, team: Team, chunks: float) -> None:
    """Makes so many chunks and sends their latents to the rank that decodes."""
    while chunks > 0:
        team.send(made.denoise())
        chunks -= 1


def _check_apart(content: Content, output: Output, files: Sequence[Path]) -> None:
    """Raises ValueError where a file that is written is one that is read, or another one."""
    read = [content.image, content.video, content.prompt_file, content.prompts_at]
    written: set[Path] = set()
    for each in (*files, *(sheet_of(file) for file in files), output.save_state):
        if each is not None and each != STANDARD_OUTPUT:
            over = [other for other in read if other is not None and writes(each, other)]
            if over or each.resolve() in written:
                raise ValueError(
                    f"{[*over, each][0]}: would be written over: name another --output"
                )
            written.add(each.resolve())


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
        print(f"the stream: {path}", file=sys.stderr)


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
            f"{content.video}: fills {latents.shape[1]} latent frames: must fill a first chunk, of "
            f"{first}, with {pixel_frames(first)} frames"
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
