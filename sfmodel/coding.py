"""`sfmodel encode` and `sfmodel decode`: videos to latents, prompts to embeddings, and latents to
videos. What `encode` writes is what training at full size reads."""

from __future__ import annotations

import contextlib
import itertools
import json
import time
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Literal

import torch
import tyro
from rich.console import Console
from rich.progress import Progress, SpinnerColumn, TextColumn
from torch import Tensor

from sfmodel import checkpoint
from sfmodel.codec import VideoCodec
from sfmodel.config import Preset
from sfmodel.files import check_writable
from sfmodel.pretrained import (
    Vae,
    checked_codec,
    default_device,
    find_preset,
    load_codec,
    load_text,
    sized,
    told,
)
from sfmodel.tensors import save_tensors
from sfmodel.terminal import TerminalPlayer
from sfmodel.train.data import prompt_beside, read_prompts, within
from sfmodel.video import VIDEOS, ContactSheet, VideoWriter, check_name, covering_frames, to_pixels

CHUNK = 16  # pixel frames that go to the encoder at once
LATENTS = 3  # latent frames that go to the decoder at once
PROMPTS = 256  # whose embeddings are in memory at once


@torch.no_grad()
def encode(
    source: tyro.conf.Positional[Path],
    output: Path = Path("out/latents"),
    preset: str = "wan-1.3b",
    models: Path | None = None,
    vae: Vae = "auto",
    frames: int | None = None,
    height: int | None = None,
    width: int | None = None,
) -> None:
    """Encode videos into latents, or prompts into embeddings, as training reads them.

    A video NAME.mp4 becomes NAME.safetensors with its latents and, from NAME.txt, the embedding of
    its prompt; a text file with one prompt a line becomes one file of embeddings. What is there
    already is left, so that a run that was stopped goes on.

    Args:
        source: A video, a folder of videos, or a .txt file of prompts.
        output: Folder to write to.
        preset: Whose video encoder, text encoder and size: toy, wan-1.3b or wan-14b.
        models: Folder of the public weights; models, or what SFMODEL_MODELS names, if not given.
        vae: Wan2.1's own encoder, the tiny one, or the first of the two that is there.
        frames: Latent frames of each video, from its first on; all if not given.
        height: In pixels, which frames are scaled to cover and cropped to; the preset's if not
            given.
        width: The same.
    """
    settings, device = sized(find_preset(preset), height, width), default_device()
    if frames is not None and frames < 1:
        raise ValueError(f"frames={frames}: must be at least 1")
    check_writable(output / f"{source.stem}.safetensors")
    text = load_text(preset, models)
    if source.suffix.lower() == ".txt":
        target = output / f"{source.stem}.safetensors"
        prompts = read_prompts(source)
        with told(f"encoding {len(prompts)} prompts"):
            embeddings_NTE = text(prompts, device)
        _save(target, {"text": embeddings_NTE}, prompts)
        print(f"{len(prompts)} prompts: {target}")
        return
    if not source.exists():
        raise ValueError(f"{source}: there is no such file or folder")
    videos = within(source, VIDEOS)
    if not videos:
        raise ValueError(f"{source}: holds no video: must be a file or folder of {VIDEOS}")
    todo = [(each, output / f"{each.stem}.safetensors") for each in videos]
    todo = [(each, target) for each, target in todo if not target.exists()]
    # The text first: its encoder leaves the GPU before the video encoder comes. It is loaded once
    # for many prompts and keeps on disk what each is encoded as.
    prompts = [prompt_beside(each) for each, _ in todo]
    load = checked_codec(preset, device, vae, models)
    with told("encoding the prompts"):
        for i in range(0, len(prompts), PROMPTS):
            text(prompts[i : i + PROMPTS], device)
    codec = load()
    for (each, target), prompt in zip(todo, prompts, strict=True):
        text_1TE = text([prompt], device)
        latents_1FCHW = _latents_of(each, codec, settings, frames, device)
        _save(target, {"latents": latents_1FCHW, "text": text_1TE}, [prompt])
        count = latents_1FCHW.shape[1]
        print(f"{each.name}: {count} latent frames, {prompt or '(no prompt)'}: {target}")
    if len(todo) < len(videos):
        print(f"{len(videos) - len(todo)} of {len(videos)} were there already")


@torch.no_grad()
def decode(
    source: tyro.conf.Positional[Path],
    output: Path = Path("out/decoded.mp4"),
    preset: str = "wan-1.3b",
    models: Path | None = None,
    vae: Vae = "auto",
    tile: int | None = None,
    axes: Literal["auto", "frames-channels", "channels-frames"] = "auto",
) -> None:
    """Decode latents into MP4s and contact sheets, a few frames at a time.

    Args:
        source: A .safetensors, .pt or .pth file with the latents [N, frames, channels, height,
            width] of a normal distribution, as diffusion models make them, named `latents` or alone
            in the file.
        output: The MP4 to write; of several videos video-0.mp4, video-1.mp4, …
        preset: Whose video decoder: toy, wan-1.3b or wan-14b.
        models: Folder of the public weights; models, or what SFMODEL_MODELS names, if not given.
        vae: Wan2.1's own decoder, the tiny one, or the first of the two that is there.
        tile: Decode in tiles of so many latents a side, for little memory; with --vae wan.
        axes: Whether frames or channels come first; must be said where there are as many of both.
    """
    settings, device = find_preset(preset), default_device()
    latents_NFCHW = _read_latents(source, settings.dit.channels, axes)
    count = len(latents_NFCHW)
    names = [output.with_stem(f"{output.stem}-{i}") if count > 1 else output for i in range(count)]
    check_outputs(names)
    codec = load_codec(preset, device, vae, models, tile)
    frames = 1 + codec.temporal_factor * (latents_NFCHW.shape[1] - 1)
    for name, latents_1FCHW in zip(names, latents_NFCHW.split(1), strict=True):
        chunks = _decoded(latents_1FCHW, codec, device)
        write_videos(chunks, [name], [source.name], settings.fps, frames, device)


def check_outputs(names: Sequence[Path], watch: bool = False) -> None:
    """Raises as `write_videos` does where it cannot write or show a video, and leaves nothing."""
    for name in names:
        check_name(name)
        check_writable(name)
        check_writable(name.with_suffix(".png"))
    if watch:
        TerminalPlayer(1)


def write_videos(
    chunks: Iterable[Tensor],
    names: Sequence[Path],
    titles: Sequence[str],
    fps: float,
    frames: int | str,
    device: torch.device,
    watch: bool = False,
) -> None:
    """Videos that come as chunks [B, T, 3, H, W] from `device` into an MP4 and a contact sheet
    each. frames: how many will come, or "endless". watch: play the first one in the terminal.
    Ctrl-C ends them there and is raised again."""
    sheets = [ContactSheet() for _ in names]
    player = TerminalPlayer(fps) if watch else None
    done, began, first = 0, time.perf_counter(), 0.0
    console = Console()
    columns = (SpinnerColumn(), TextColumn("{task.fields[said]}"))
    interrupted = False
    with contextlib.ExitStack() as stack:
        writers = [stack.enter_context(VideoWriter(name, fps)) for name in names]
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
                status = f"frame {done} of {'∞' if frames == 'endless' else frames}, {rate:.1f} FPS"
                progress.update(task, said=status)
                if player:
                    player.show(pixels[0], f"{titles[0]}  {status}")
        except KeyboardInterrupt:
            if not done:
                raise
            interrupted = True
    for sheet, name, title in zip(sheets, names, titles, strict=True):
        sheet.save(name.with_suffix(".png"), title=title or "(no prompt)")
    seconds = time.perf_counter() - began
    print(
        f"{'stopped after ' if interrupted else ''}{done} frames in {seconds:.2f} s "
        f"({len(names) * done / seconds:.1f} FPS; first frame after {first:.3f} s), "
        f"{device}: {', '.join(str(name) for name in names)}"
    )
    if interrupted:
        raise KeyboardInterrupt


def _latents_of(
    path: Path, codec: VideoCodec, preset: Preset, frames: int | None, device: torch.device
) -> Tensor:
    """[1, F, C, h, w]. Pixel frames at the end that do not fill a latent frame are left out."""
    scale, group = codec.spatial_factor, codec.temporal_factor
    size = preset.height * scale, preset.width * scale
    count = None if frames is None else 1 + group * (frames - 1)
    images = itertools.islice(covering_frames(path, *size), count)
    latents, state, first = [], None, 1
    with _progress(path.name) as progress:
        try:
            while chunk := [*itertools.islice(images, first or CHUNK)]:
                whole = len(chunk) if first else len(chunk) // group * group
                if whole:
                    pixels_1TCHW = to_pixels(chunk[:whole])[None].to(device)
                    latents_1FCHW, state = codec.encode_chunk(pixels_1TCHW, state)
                    latents.append(latents_1FCHW.cpu())
                first = 0
                done = sum(each.shape[1] for each in latents)
                said = f"{path.name}: {done} latent frames"
                progress.update(progress.task_ids[0], description=said)
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from None
    done = sum(each.shape[1] for each in latents)
    if not latents or (frames is not None and done < frames):
        raise ValueError(f"{path}: has {done} latent frames: must have {frames or 1} or more")
    return torch.cat(latents, 1)


def _decoded(latents_1FCHW: Tensor, codec: VideoCodec, device: torch.device) -> Iterator[Tensor]:
    state = None
    for part in latents_1FCHW.split(LATENTS, 1):
        pixels_1TCHW, state = codec.decode_chunk(part.to(device), state)
        yield pixels_1TCHW


def _read_latents(path: Path, channels: int, axes: str) -> Tensor:
    """[N, F, C, H, W]. Raises ValueError with one sentence for what is no latents."""
    tensors, _ = checkpoint.read(path)
    name = "latents" if "latents" in tensors else next(iter(tensors))
    if len(tensors) > 1 and name != "latents":
        raise ValueError(f"{path}: holds {len(tensors)} tensors, none of them named latents")
    x = tensors[name]
    x = x[None] if x.dim() == 4 else x
    if x.dim() != 5 or not x.is_floating_point() or channels not in x.shape[1:3]:
        want = f"[N, frames, {channels}, height, width] or [N, {channels}, frames, height, width]"
        raise ValueError(f"{path}: {name} has shape {[*x.shape]}: must be {want}")
    if 0 in x.shape:
        raise ValueError(f"{path}: {name} has shape {[*x.shape]}: none may be 0")
    if axes == "auto" and x.shape[1] == x.shape[2]:
        raise ValueError(
            f"{path}: {name} has {channels} frames and as many channels: --axes must say which "
            "come first, frames-channels or channels-frames"
        )
    frames_first = x.shape[2] == channels if axes == "auto" else axes == "frames-channels"
    x = x if frames_first else x.transpose(1, 2)
    if x.shape[2] != channels:
        raise ValueError(f"{path}: {name} has {x.shape[2]} channels by these axes: not {channels}")
    return x


def _save(path: Path, tensors: dict[str, Tensor], prompts: list[str]) -> None:
    save_tensors(path, tensors, {"prompts": json.dumps(prompts)})


def _progress(name: str) -> Progress:
    console = Console(stderr=True)
    columns = SpinnerColumn(), TextColumn("{task.description}")
    progress = Progress(*columns, console=console, disable=not console.is_terminal, transient=True)
    progress.add_task(name)
    return progress
