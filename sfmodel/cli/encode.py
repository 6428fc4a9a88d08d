"""`sfmodel encode` and `sfmodel decode`: videos to latents, prompts to embeddings, and latents to
videos. What `encode` writes is what training at full size reads."""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import json
import os
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
import tyro
from rich.console import Console
from rich.progress import Progress, SpinnerColumn, TextColumn
from safetensors import SafetensorError, safe_open
from torch import Tensor

from sfmodel.config import Preset
from sfmodel.files import LONGEST, VIDEOS, check_writable, within
from sfmodel.footage import covering_frames, to_pixels
from sfmodel.frame_files import STANDARD_OUTPUT, check_name, file_of, numbered, sheet_of, writer
from sfmodel.pretrained import (
    TextEncoder,
    Vae,
    checked_codec,
    chosen_vae,
    default_device,
    find_preset,
    load_codec,
    load_text,
    progress,
    sized,
)
from sfmodel.process import noting
from sfmodel.prompts import continued, prompt_beside, prompts_in
from sfmodel.terminal import TerminalPlayer
from sfmodel.toy.text import ToyTextEncoder
from sfmodel.vae.codec import NotFinite, VideoCodec
from sfmodel.video import ContactSheet
from sfmodel.weights import checkpoint
from sfmodel.weights.saving import save_tensors

CHUNK = 16  # pixel frames that go to the encoder at once
LATENTS = 3  # latent frames that go to the decoder at once
SHARD = 2**26  # bytes of embeddings in a file, of which twice as many are in memory


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
    fps: float | None = None,
) -> None:
    """Encode videos into latents, or prompts into embeddings, as training reads them.

    A video NAME.mp4 becomes NAME.safetensors with its latents and, from NAME.txt, the embedding of
    its prompt, of subfolders in subfolders; where another video of that name is there it becomes
    NAME.mp4.safetensors. A text file with one prompt a line becomes NAME.safetensors and, if it is
    long, NAME-00001.safetensors and so on. Videos that cannot be read are named and left out.

    What is there already and whole is left, so that a run that was stopped goes on. The settings
    are kept in each file, and an output folder with files of others is refused.

    Args:
        source: A video, a folder of videos, or a .txt file of prompts.
        output: Folder to write to.
        preset: Whose video encoder, text encoder, size and frame rate: toy, wan-1.3b or wan-14b.
        models: Folder of the public weights; models, or what SFMODEL_MODELS names, if not given.
        vae: Wan2.1's own encoder, the tiny one, or the first of the two that is there.
        frames: Latent frames of each video, from its first on; all if not given.
        height: In pixels, which frames are scaled to cover and cropped to; the preset's if not
            given.
        width: The same.
        fps: Frames a second that the videos run at, where their files say it wrongly.
    """
    settings, device = sized(find_preset(preset), height, width), default_device()
    if frames is not None and frames < 1:
        raise ValueError(f"frames={frames}: must be at least 1")
    if fps is not None and not 0.01 <= fps <= 1000:
        raise ValueError(f"fps={fps}: must be 0.01 to 1000")
    check_writable(output / f"{source.stem}.safetensors")
    alone = source.suffix.lower() == ".txt"
    text = load_text(preset, models, not alone)  # a quarter million need no second place on disk
    same: dict[str, Any] = {"preset": preset, "text": text.identity[:16]}
    if alone:
        _encode_prompts(source, output, text, same, device)
        return
    if not source.exists():
        raise ValueError(f"{source}: there is no such file or folder")
    videos = within(source, VIDEOS)
    if not videos:
        raise ValueError(f"{source}: holds no video: must be a file or folder of {VIDEOS}")
    same |= {
        "vae": "toy" if preset == "toy" else chosen_vae(preset, vae, models),
        "latents": [frames, settings.height, settings.width],
        "fps": [settings.fps, fps],
    }
    whole = _whole(output, same)
    root = source if source.is_dir() else source.parent
    names = [each.relative_to(root).as_posix() for each in videos]
    todo: list[_Job] = []
    skipped = 0

    def skip(name: str, error: ValueError) -> None:
        nonlocal skipped
        if not source.is_dir():
            raise ValueError(f"{source}: {error}") from None
        skipped += 1
        print(f"{name}: skipped: {error}", file=sys.stderr, flush=True)

    for video, name, target in zip(videos, names, _targets(names, output), strict=True):
        try:
            if len(os.fsencode(target.name)) > LONGEST:
                raise ValueError(f"its name is too long for one that ends in {target.suffix}")
            if name.encode(errors="ignore").decode() != name:
                raise ValueError("its name is not UTF-8, which files of tensors need")
            prompt = prompt_beside(video)
            if isinstance(text, ToyTextEncoder):
                text.words(prompt)  # is all it takes to encode them
            of = {"file": name, "bytes": video.stat().st_size if video.exists() else 0}
            job = _Job(video, target, prompt, of)
            if not _is_done(whole.get(target), job, names):
                todo.append(job)
        except ValueError as error:
            skip(name, error)
    there = len(videos) - len(todo) - skipped
    # The text first: its encoder leaves the GPU before the video encoder comes. It is loaded once
    # for many prompts and keeps on disk what each is encoded as.
    load = checked_codec(preset, device, vae, models)
    with progress("encoding the prompts"):
        for _ in text.rows((job.prompt for job in todo), device):
            pass
    codec = load() if todo else None
    for job in todo:
        assert codec is not None
        name = job.of["file"]
        try:
            latents_1FCHW = latents_of(job.video, codec, settings, frames, fps, device)
        except ValueError as error:
            skip(name, error)
            continue
        text_TE = next(text.rows([job.prompt], device))
        tensors = {"latents": latents_1FCHW, "text": _small(text_TE)[None]}
        _save(job.target, tensors, [job.prompt], same, job.of)
        count = latents_1FCHW.shape[1]
        print(f"{name}: {count} latent frames, {job.prompt or '(no prompt)'}: {job.target}")
    if there:
        print(f"{there} of {len(videos)} were there already")
    if skipped:
        raise ValueError(f"{skipped} of {len(videos)} videos were skipped, each named above")


class _Job(NamedTuple):
    """A video to encode. of: what its file will say it was made of."""

    video: Path
    target: Path
    prompt: str
    of: dict[str, Any]


def _targets(names: Sequence[str], output: Path) -> Iterator[Path]:
    """A file for each video, by its sorted name in the source: no two the same."""
    taken: set[Path] = set()
    for name in map(Path, names):
        stem = output / name.with_suffix(".safetensors")
        target = output / f"{name}.safetensors" if stem in taken else stem
        taken.add(target)
        yield target


class _Made(NamedTuple):
    """Metadata of files that `encode` wrote: by which settings, of what, and the prompts. Empty for
    a file of another's."""

    settings: dict[str, Any]
    of: dict[str, Any]
    prompts: list[str]


def _made(path: Path) -> _Made | None:
    """Metadata of a file; None where it is not there or not whole."""
    try:
        if not path.is_file():
            return None
        with safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
        made = json.loads(metadata["encoded"])
        return _Made(dict(made["settings"]), dict(made["of"]), json.loads(metadata["prompts"]))
    except (SafetensorError, OSError):
        return None
    except (ValueError, KeyError, TypeError):
        return _Made({}, {}, [])


def _whole(output: Path, settings: dict[str, Any]) -> dict[Path, _Made]:
    """The files in a folder and its subfolders. Raises ValueError if one is of other settings."""
    if output.exists() and not output.is_dir():
        raise ValueError(f"{output}: must be a folder")
    out = {}
    for path in within(output, (".safetensors",)) if output.exists() else []:
        made = _made(path)
        if made is not None:
            other = [k for k in settings if made.settings.get(k, settings[k]) != settings[k]]
            if other:
                was = ", ".join(f"{k}={made.settings[k]} (now {settings[k]})" for k in other)
                raise ValueError(f"{path}: was encoded with {was}: must be another --output")
            out[path] = made
    return out


def _is_done(there: _Made | None, job: _Job, names: Sequence[str]) -> bool:
    """Tells whether a video's file is there; one of another prompt, or of another of the videos
    `names`, is written anew. Raises ValueError if that would lose what is not of these videos."""
    if there is None or there.of == job.of:
        return there is not None and there.prompts == [job.prompt]
    other = there.of.get("file")
    if other == job.of["file"] or other not in names:
        was = f"of another {other}" if other else "not of this command, or of an older version"
        raise ValueError(f"{job.target} is there and {was}: must be another --output")
    return False


def _encode_prompts(
    source: Path, output: Path, text: TextEncoder, settings: dict[str, Any], device: torch.device
) -> None:
    """Writes embeddings into files of SHARD bytes, with the memory of one."""
    if source.exists() and not source.is_file():
        raise ValueError(f"prompt file {source}: must be a regular file, because it is read twice")
    digest, count = hashlib.sha256(), 0
    for prompt in prompts_in(source):
        count += 1
        digest.update(f"{prompt}\n".encode())
        if isinstance(text, ToyTextEncoder):
            text.words(prompt)  # raises for one that it does not know
    of = {"file": source.name, "sha256": digest.hexdigest(), "prompts": count}
    first = output / f"{source.stem}.safetensors"
    there = _whole(output, settings)
    for path, made in there.items():
        if made.of != of and (path == first or made.of.get("file") == source.name):
            raise ValueError(f"{path} is there and of other prompts: must be another --output")
    files = itertools.chain([first], (continued(first, i) for i in itertools.count(1)))
    target, done = next(files), 0
    while target in there and there[target].of == of:  # by a run that was stopped
        done += len(there[target].prompts)
        target = next(files)

    def left() -> Iterator[str]:
        return itertools.islice(prompts_in(source), done, None)

    few: list[str] = []
    rows: list[Tensor] = []
    size = 0
    with _progress(source.name) as progress:
        for prompt, text_TE in zip(left(), text.rows(left(), device), strict=True):
            few.append(prompt)
            rows.append(_small(text_TE))
            size += rows[-1].nbytes
            done += 1
            progress.update(progress.task_ids[0], description=f"{done} of {count} prompts")
            if done == count or size >= SHARD:
                if target in there and there[target].of != of:
                    raise ValueError(f"{target} is there and of other prompts")
                lengths = torch.tensor([len(row) for row in rows], dtype=torch.int32)
                _save(target, {"text": torch.cat(rows), "lengths": lengths}, few, settings, of)
                few, rows, size, target = [], [], 0, next(files)
    print(f"{count} prompts: {first}")


def _small(text_TE: Tensor) -> Tensor:
    """Embedding in bfloat16, which public encoders compute in, where nothing is lost by it."""
    small_TE = text_TE.bfloat16()
    return small_TE if torch.equal(small_TE.float(), text_TE.float()) else text_TE


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
        output: The MP4 to write (or a .gif, …, as `generate`); of several video-0.mp4, …
        preset: Whose video decoder: toy, wan-1.3b or wan-14b.
        models: Folder of the public weights; models, or what SFMODEL_MODELS names, if not given.
        vae: Wan2.1's own decoder, the tiny one, or the first of the two that is there.
        tile: Decode in tiles of so many latents a side, for little memory; with --vae wan.
        axes: Whether frames or channels come first; must be said where there are as many of both.
    """
    settings, device = find_preset(preset), default_device()
    latents_NFCHW = _read_latents(source, settings.dit.channels, axes)
    count = len(latents_NFCHW)
    names = numbered(output, count)
    check_outputs(names)
    codec = load_codec(preset, device, vae, models, tile)
    frames = 1 + codec.temporal_factor * (latents_NFCHW.shape[1] - 1)
    for name, latents_1FCHW in zip(names, latents_NFCHW.split(1), strict=True):
        chunks = _decoded(latents_1FCHW, codec, device)
        write_videos(chunks, [name], [source.name], settings.fps, frames, str(device))


def check_outputs(names: Sequence[Path], watch: bool = False) -> None:
    """Raises as `write_videos` does where it cannot write or show a video, and leaves nothing."""
    for name in names:
        check_name(name)
        if name != STANDARD_OUTPUT:
            check_writable(file_of(name, 0))
        if sheet := sheet_of(name):
            check_writable(sheet)
    if watch and STANDARD_OUTPUT in names:
        raise ValueError("watch: goes with a file, not with output -")
    if watch:
        TerminalPlayer(1)


def write_videos(
    chunks: Iterable[Tensor],
    names: Sequence[Path],
    titles: Sequence[str],
    fps: float,
    frames: int | str,
    where: str,
    watch: bool = False,
) -> None:
    """Writes videos that come as chunks, [B, T, 3, H, W] in [-1, 1] or bytes [B, T, H, W, 3], into
    an MP4 and a contact sheet each.
    where: on what device they are made. frames: how many will come, or "endless". watch: play the
    first one in the terminal. Ctrl-C ends them there and is raised again; so does a frame with NaN
    or infinity, with FloatingPointError. What came before is kept."""
    sheets = [ContactSheet() for _ in names]
    player = TerminalPlayer(fps) if watch else None
    done, shown, began, first = 0, 0, time.perf_counter(), 0.0
    console = Console(stderr=STANDARD_OUTPUT in names)
    columns = (SpinnerColumn(), TextColumn("{task.fields[text]}"))
    stopped: BaseException | None = None
    with contextlib.ExitStack() as stack:
        writers = [stack.enter_context(writer(name, fps)) for name in names]
        progress = stack.enter_context(
            Progress(*columns, console=console, disable=watch or not console.is_terminal)
        )
        task = progress.add_task("", text="first chunk")
        try:
            for pixels in chunks:
                done += pixels.shape[1]
                first = first or time.perf_counter() - began
                with noting() as signals:  # a chunk is written whole or not at all
                    for each, sheet, video in zip(writers, sheets, pixels, strict=True):
                        each.write(video)
                        sheet.add(video)
                    shown = done
                if signals:
                    raise KeyboardInterrupt
                rate = done / (time.perf_counter() - began)
                status = f"frame {done} of {'∞' if frames == 'endless' else frames}, {rate:.1f} FPS"
                progress.update(task, text=status)
                if player:
                    player.show(pixels[0], f"{titles[0]}  {status}")
        except (KeyboardInterrupt, FloatingPointError, BrokenPipeError) as error:
            if isinstance(error, BrokenPipeError):  # nobody reads any more
                stopped = KeyboardInterrupt()
            elif isinstance(error, NotFinite):
                stopped = FloatingPointError(f"{names[error.video]}: {error}")
            else:
                stopped = error
            if not shown:
                print("stopped before the first frame: no video was written")
                raise stopped from None
    for sheet, name, title in zip(sheets, names, titles, strict=True):
        if beside := sheet_of(name):
            sheet.save(beside, title=title or "(no prompt)")
    seconds = time.perf_counter() - began
    print(
        f"{'stopped after ' if stopped else ''}{shown} frames in {seconds:.2f} s "
        f"({len(names) * shown / seconds:.1f} FPS; first frame after {first:.3f} s), "
        f"{where}: {', '.join(str(name) for name in names)}",
        file=sys.stderr if STANDARD_OUTPUT in names else sys.stdout,
    )
    if stopped:
        raise stopped


def latents_of(
    path: Path,
    codec: VideoCodec,
    preset: Preset,
    frames: int | None,
    fps: float | None,
    device: torch.device,
    most: int | None = None,
) -> Tensor:
    """Latents [1, F, C, h, w], without pixel frames at the end that do not fill one. frames: latent
    frames that there must be, and all that are read; most: pixel frames that are read. Raises
    ValueError, without the name, for a video that cannot be read, is too short or gives NaN."""
    scale, group = codec.spatial_factor, codec.temporal_factor
    size = preset.height * scale, preset.width * scale
    count = most if frames is None else 1 + group * (frames - 1)
    images = itertools.islice(covering_frames(path, *size, preset.fps, fps), count)
    latents, state, first, done = [], None, 1, 0
    with _progress(path.name) as progress:
        while chunk := [*itertools.islice(images, first or CHUNK)]:
            whole = len(chunk) if first else len(chunk) // group * group
            if whole:
                pixels_1TCHW = to_pixels(chunk[:whole])[None].to(device)
                latents_1FCHW, state = codec.encode_chunk(pixels_1TCHW, state)
                latents.append(latents_1FCHW.cpu())
                if not latents[-1].isfinite().all():
                    raise ValueError(f"its latents hold NaN or infinity from frame {done} on")
                done += latents_1FCHW.shape[1]
            first = 0
            text = f"{path.name}: {done} latent frames"
            progress.update(progress.task_ids[0], description=text)
    if not latents or (frames is not None and done < frames):
        raise ValueError(f"has {done} latent frames: must have {frames or 1} or more")
    return torch.cat(latents, 1)


def _decoded(latents_1FCHW: Tensor, codec: VideoCodec, device: torch.device) -> Iterator[Tensor]:
    state = None
    for part in latents_1FCHW.split(LATENTS, 1):
        pixels_1TCHW, state = codec.decode_chunk(part.to(device), state)
        yield pixels_1TCHW


def _read_latents(path: Path, channels: int, axes: str) -> Tensor:
    """Latents [N, F, C, H, W] in a file. Raises ValueError with one sentence for other contents."""
    tensors, _ = checkpoint.read(path)
    name = "latents" if "latents" in tensors else next(iter(tensors))
    if len(tensors) > 1 and name != "latents":
        raise ValueError(f"{path}: holds {len(tensors)} tensors, none of them named latents")
    x = tensors[name]
    x = x[None] if x.dim() == 4 else x
    if not x.is_floating_point():
        raise ValueError(f"{path}: {name} is {x.dtype}: must be floating point")
    if x.dim() != 5 or channels not in x.shape[1:3]:
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


def _save(
    path: Path,
    tensors: dict[str, Tensor],
    prompts: list[str],
    settings: dict[str, Any],
    of: dict[str, Any],
) -> None:
    encoded = json.dumps({"settings": settings, "of": of})
    save_tensors(path, tensors, {"prompts": json.dumps(prompts), "encoded": encoded})


def _progress(name: str) -> Progress:
    console = Console(stderr=True)
    columns = SpinnerColumn(), TextColumn("{task.description}")
    progress = Progress(*columns, console=console, disable=not console.is_terminal, transient=True)
    progress.add_task(name)
    return progress
