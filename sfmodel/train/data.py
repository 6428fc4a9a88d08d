"""Sources of clips and prompts for training: the toy world, latents, videos, prompts alone.

What one sample of a batch is does not depend on which others are asked for, so that the data are
the same however a batch is split among ranks and micro-batches.

Shapes: B clips, F latent frames, T pixel frames or rows of text, C channels, H × W latents or
pixels, E text_dim. N clips or prompts of a file.
"""

from __future__ import annotations

import itertools
import math
from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from random import Random
from typing import NamedTuple, Protocol

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from sfmodel.config import Preset
from sfmodel.files import VIDEOS, within
from sfmodel.prompts import continued, prompt_beside
from sfmodel.prompts import read_prompts as read_prompts
from sfmodel.toy import world
from sfmodel.toy.text import ToyTextEncoder
from sfmodel.toy.vae import ToyVAE
from sfmodel.train.shards import Shard, finite, opened, read_header
from sfmodel.train.text import KeptText
from sfmodel.vae.codec import VideoCodec

# Sentences to embeddings [B, T, E]; short ones end in rows of zeros.
TextEncoder = Callable[[Sequence[str]], Tensor]


class Clips(NamedTuple):
    """Clips of a batch. latents [B, F, C, H, W], None where they were not asked for; text:
    embeddings [B, T, E], with rows of zeros after the shorter ones; both float32 on the CPU.
    sentences: "" where a file has none."""

    latents_BFCHW: Tensor | None
    text_BTE: Tensor
    sentences: list[str]


class Source(Protocol):
    """Source of clips or prompts. has_latents: whether there are clips, not prompts alone. skipped:
    file name → why it, or a clip of it, could not be used."""

    has_latents: bool
    skipped: dict[str, str]

    def draw(
        self, seed: int, batch: int, frames: int, rows: slice = slice(None), latents: bool = True
    ) -> Clips:
        """The `rows` of a batch of so many clips of `frames` latent frames. Equal arguments give
        equal clips, and what one row is does not depend on `rows`. latents=False: prompts alone.

        Raises ValueError where there are no clips of so many frames, and for no rows."""
        ...


class ToyWorld:
    """The toy world, drawn on the fly. drop_word: the probability that an attribute goes unnamed;
    drop_text: that the sentence is empty."""

    has_latents = True

    def __init__(
        self, codec: ToyVAE, text: ToyTextEncoder, drop_word: float = 0.0, drop_text: float = 0.0
    ) -> None:
        self.codec, self.text = codec, text
        self.drop_word, self.drop_text = drop_word, drop_text
        self.skipped: dict[str, str] = {}

    @torch.no_grad()
    def draw(
        self, seed: int, batch: int, frames: int, rows: slice = slice(None), latents: bool = True
    ) -> Clips:
        """Draws as every `Source`: the whole batch, which is cheap, of which only `rows` are
        rendered, where the codec is."""
        picked = _picked(batch, rows)
        generator = world.generator_of(seed)
        truth = world.draw(batch, 1 + self.codec.temporal_factor * (frames - 1), generator)
        written = world.sentences(truth, generator, drop=self.drop_word, empty=self.drop_text)
        sentences = [written[i] for i in picked]
        clips = None
        if latents:
            device = self.codec.mean_C11.device
            mine = world.Truth(*(value[picked].to(device) for value in vars(truth).values()))
            clips = self.codec.latents_of(mine).cpu()
        return Clips(clips, self.text(sentences), sentences)


class Files:
    """Base of all sources of files. Samples are drawn uniformly, each by a generator of its own;
    where a clip cannot be used, that generator goes on. No clip is remembered as bad: what a sample
    is would then depend on what was drawn before."""

    has_latents = True

    def __init__(
        self,
        path: Path,
        paths: Iterable[Path],
        preset: Preset,
        frames: int,
        text: TextEncoder | None,
    ) -> None:
        """Reads the headers of all `paths`. frames: the most that will be drawn.

        Raises ValueError where no file can be used."""
        self.path, self.preset, self.frames, self.text = path, preset, frames, text
        self.skipped: dict[str, str] = {}
        self.files: list[Shard] = []
        for each in paths:
            try:
                file = self._open(each)
                self._check_sentences(file)
                self.files.append(file)
            except ValueError as error:
                self.skipped[self._name(each)] = str(error)
        if not self.files:
            name, reason = next(iter(self.skipped.items()))
            if path.is_dir():
                reason = f"has no file that can be used: {name} ({reason})"
            raise ValueError(f"{path}: {reason}")
        self._ends = [*itertools.accumulate(len(file.sentences) for file in self.files)]

    @torch.no_grad()
    def draw(
        self, seed: int, batch: int, frames: int, rows: slice = slice(None), latents: bool = True
    ) -> Clips:
        """Draws as every `Source`."""
        if latents and not self.has_latents:
            raise ValueError(
                f"{self.path}: has prompts alone, this recipe needs clips: must be a folder of "
                "videos or of latents as .safetensors"
            )
        if latents and not 1 <= frames <= self.frames:
            raise ValueError(f"frames={frames}: must be 1 to {self.frames} here")
        self.encode_ahead([(seed, batch, rows)])
        samples = [self._sample(seed, i, frames if latents else 0) for i in _picked(batch, rows)]
        text_BTE = pad_sequence([text_TE for _, text_TE, _ in samples], batch_first=True)
        clips = [latents_FCHW for latents_FCHW, _, _ in samples if latents_FCHW is not None]
        sentences = [sentence for *_, sentence in samples]
        return Clips(torch.stack(clips) if clips else None, text_BTE, sentences)

    @torch.no_grad()
    def first(self, count: int) -> Clips:
        """The first prompts, at most so many, without latents."""
        items = [self._at(item) for item in range(min(count, self.count))]
        sentences = [file.sentences[row] for file, row in items]
        if isinstance(self.text, KeptText) and items[-1][0].text is None:
            self.text.encode(sentences)
        texts = [self._embed(file, row) for file, row in items]
        return Clips(None, pad_sequence(texts, batch_first=True), sentences)

    def encode_ahead(self, draws: Iterable[tuple[int, int, slice]]) -> None:
        """Has the prompts of these draws (seed, batch, rows) encoded at once where the text encoder
        is one that is loaded for it. What is drawn is the same."""
        if isinstance(self.text, KeptText):
            self.text.encode(sentence for draw in draws for sentence in self._sentences(*draw))

    def _sentences(self, seed: int, batch: int, rows: slice) -> Iterator[str]:
        """Those of a draw's first choices that have no embeddings."""
        for i in _picked(batch, rows):
            file, row = self._at(next(_shuffled(self.count, Random(f"{seed}/{i}"))))
            if file.text is None:
                yield file.sentences[row]

    def _sample(self, seed: int, i: int, frames: int) -> tuple[Tensor | None, Tensor, str]:
        """Latents (None for no frames), embeddings and sentence of row i of a batch."""
        for item in _shuffled(self.count, Random(f"{seed}/{i}")):
            file, row = self._at(item)
            try:
                # One at a time: in a batch, what is rounded how depends on the other samples.
                latents_FCHW = self._latents(file.path, row, frames) if frames else None
                return latents_FCHW, self._embed(file, row), file.sentences[row]
            except ValueError as error:
                which = f"item {row}: " if len(file.sentences) > 1 else ""
                self.skipped.setdefault(self._name(file.path), f"{which}{error}")
        raise ValueError(f"{self.path}: nothing in it can be used: {skipped_report(self)}")

    @property
    def count(self) -> int:
        """Number of clips or prompts in all files."""
        return self._ends[-1]

    def _at(self, item: int) -> tuple[Shard, int]:
        """The file of one of all clips or prompts, and its row there."""
        index = bisect_right(self._ends, item)
        file = self.files[index]
        return file, item - self._ends[index] + len(file.sentences)

    def _name(self, path: Path) -> str:
        return str(path.relative_to(self.path)) if self.path.is_dir() else path.name

    def _embed(self, file: Shard, row: int) -> Tensor:
        if file.text is not None:
            return file.text.read(row)
        assert self.text is not None  # or the file would have been skipped
        return finite("text", self.text([file.sentences[row]])[0])

    def _check_sentences(self, file: Shard) -> None:
        if file.text is not None:
            return
        if self.text is None:
            raise ValueError(
                "there is no text encoder for its prompts: must be a .safetensors file with their "
                f"embeddings, text [N, T, {self.preset.dit.text_dim}], as `sfmodel encode` writes"
            )
        if isinstance(self.text, ToyTextEncoder):
            for sentence in file.sentences:
                self.text.words(sentence)
        if isinstance(self.text, KeptText):
            _ = self.text.encoder  # says now what is wrong with its files

    # What follows is of .safetensors files; sources of others replace it. A ValueError says why a
    # file, or one of its clips, cannot be used.

    def _open(self, path: Path) -> Shard:
        return read_header(path, self.preset, self.frames)

    def _latents(self, path: Path, row: int, frames: int) -> Tensor:
        """Latents of one clip, [F, C, H, W]."""
        with opened(path) as file:
            return finite("latents", file.get_slice("latents")[row, :frames])


class LatentShards(Files):
    """Clips in a .safetensors file or a folder of such: `latents` [N, F, C, H, W], and `text`
    [N, T, E] or the metadata entry `prompts`, a JSON list of N sentences. Memory-mapped; the first
    frames of longer clips are taken, as latent frame 0 of a clip is a still. `text` may also be
    without padding: the rows of all embeddings [sum of T, E], and `lengths` [N]."""

    def __init__(self, path: Path, preset: Preset, frames: int, text: TextEncoder | None) -> None:
        super().__init__(path, within(path, (".safetensors",)), preset, frames, text)


class Embeddings(LatentShards):
    """The text encoder of embeddings in files, which knows the prompts in them alone. at: where the
    embedding of each is; those of a file without prompts are named by it and their numbers."""

    def __init__(self, path: Path, preset: Preset) -> None:
        """Reads headers. Raises ValueError for a file that holds no embeddings of the preset's."""
        super().__init__(path, preset, 0, None)
        for name, reason in self.skipped.items():
            raise ValueError(f"{path}: {name}: {reason}")
        self.at: dict[str, tuple[Shard, int]] = {}
        for file in self.files:
            for row, sentence in enumerate(file.sentences):
                named = sentence if any(file.sentences) else f"{file.path.stem} {row}"
                self.at.setdefault(named, (file, row))

    def rows(self, sentences: Iterable[str], device: object = None) -> Iterator[Tensor]:
        """The embedding [T, text_dim] of each sentence as it comes, on the CPU. Raises ValueError
        for one that is not there."""
        for sentence in sentences:
            if sentence not in self.at:
                there = f"{len(self.at)} prompts, such as {next(iter(self.at))!r}"
                raise ValueError(f"{self.path}: has no embedding of {sentence!r}: it has {there}")
            yield self._embed(*self.at[sentence])


class VideoFiles(Files):
    """Videos in a folder, from their first frame on, at the preset's frames a second, scaled to
    cover its size, cropped around the centre and encoded each time. The prompt is the text file of
    the same name with suffix .txt, "" where there is none."""

    def __init__(
        self, folder: Path, preset: Preset, frames: int, codec: VideoCodec, text: TextEncoder
    ) -> None:
        from sfmodel import footage  # needs PyAV, which other sources do without

        self.codec, self.footage = codec, footage
        super().__init__(folder, within(folder, VIDEOS), preset, frames, text)

    def _open(self, path: Path) -> Shard:
        with self.footage.opened_video(path) as (_, stream):
            have = self.footage.length(stream, self.preset.fps)
            _long_enough(have, self._pixel_frames(self.frames))
        return Shard(path, [prompt_beside(path)])

    def _latents(self, path: Path, row: int, frames: int) -> Tensor:
        scale = self.codec.spatial_factor
        size = self.preset.height * scale, self.preset.width * scale
        needed = self._pixel_frames(frames)
        frames_of = self.footage.covering_frames(path, *size, self.preset.fps)
        images = [*itertools.islice(frames_of, needed)]
        _long_enough(len(images), needed)
        pixels_TCHW = self.footage.to_pixels(images).to(next(self.codec.parameters()).device)
        return finite("latents", self.codec.encode_chunk(pixels_TCHW[None])[0][0])

    def _pixel_frames(self, frames: int) -> int:
        return 1 + self.codec.temporal_factor * (frames - 1)


class Prompts(Files):
    """Prompts alone: a text file with one a line, or embeddings: a .safetensors file, with those
    that continue it (`continued`), or a folder of such, with `text` as in `LatentShards` and maybe
    the metadata entry `prompts`, a JSON list of N sentences."""

    has_latents = False

    def __init__(self, path: Path, preset: Preset, text: TextEncoder | None) -> None:
        embedded = path.is_dir() or path.suffix.lower() == ".safetensors"
        self.lines = None if embedded else read_prompts(path)
        files = within(path, (".safetensors",))
        if embedded and not path.is_dir():
            more = (continued(path, i) for i in itertools.count(1))
            files += itertools.takewhile(Path.exists, more)
        super().__init__(path, files, preset, 0, text)

    def _open(self, path: Path) -> Shard:
        return super()._open(path) if self.lines is None else Shard(path, self.lines)


def negative_prompt(prompt: str, preset: Preset, text: TextEncoder | None) -> Tensor:
    """Embedding [1, T, E] of a negative prompt, or of the only one in a .txt or .safetensors file
    of that name. Raises ValueError without a text encoder for it, and for a file of several."""
    if prompt.lower().endswith((".txt", ".safetensors")):
        source = Prompts(Path(prompt), preset, text)
        if source.count > 1:
            raise ValueError(f"{prompt}: has {source.count} prompts: must have one")
        return source.first(1).text_BTE
    if text is None:
        short = prompt[:20] + "…" * (len(prompt) > 20)
        raise ValueError(
            f"negative={short!r}: there is no text encoder for it: write it into negative.txt, "
            "`sfmodel encode negative.txt` where there is one, then --negative negative.safetensors"
        )
    return text([prompt])


def open_source(
    path: Path | None,
    preset: Preset,
    frames: int,
    codec: VideoCodec | None,
    text: TextEncoder | None,
    drop_word: float = 0.0,
    drop_text: float = 0.0,
) -> Source:
    """The source that `path` is: None, the toy world; .safetensors files, of a folder or one alone,
    latents, or prompts if they have none; a folder of videos; a .txt file, prompts. Of a folder its
    subfolders too.

    preset: sizes of latents and text. frames: the most latent frames that will be drawn. codec,
    text: None where the model's are not available. drop_word, drop_text: as in `ToyWorld`, for it
    alone. Raises ValueError with one sentence for everything else and where no file can be used."""
    if path is None:
        if isinstance(codec, ToyVAE) and isinstance(text, ToyTextEncoder):
            return ToyWorld(codec, text, drop_word, drop_text)
        raise ValueError(
            "no data: the toy world is for the toy model alone, others need a folder of videos or "
            "of latents as .safetensors, or prompts"
        )
    suffix = path.suffix.lower()
    found = within(path, (".safetensors", *VIDEOS)) if path.is_dir() else [path]
    # What lies in the folder itself counts before what is in subfolders, latents before videos.
    shards = [each for each in found if each.suffix.lower() == ".safetensors"]
    others = [each for each in found if each.suffix.lower() != ".safetensors"]
    if shards and path.exists() and _depth(shards) <= _depth(others):
        if _alone(shards):
            return Prompts(path, preset, text)
        return LatentShards(path, preset, frames, text)
    if path.is_dir() and others:
        if codec is not None and text is not None:
            return VideoFiles(path, preset, frames, codec, text)
        raise ValueError(
            f"{path}: videos of this preset are encoded before training: must be latents and "
            "embeddings as .safetensors, as `sfmodel encode` writes"
        )
    if path.is_file() and suffix == ".txt":
        return Prompts(path, preset, text)
    raise ValueError(
        f"{path}: {'nothing to train on' if path.exists() else 'no such file or folder'}: must be "
        f"a folder of .safetensors files or of videos ({', '.join(VIDEOS[:4])}, …), a .safetensors "
        "file or a .txt file"
    )


def _depth(paths: Sequence[Path]) -> float:
    return min((len(path.parts) for path in paths), default=math.inf)


def _alone(shards: Sequence[Path]) -> bool:
    """Tells whether the first that is whole has prompts alone."""
    for shard in shards:
        with suppress(ValueError), opened(shard) as file:
            return "text" in file.keys() and "latents" not in file.keys()  # noqa: SIM118
    return False


def skipped_report(source: Source) -> str:
    """One line that names up to five skipped files with the reasons, "" if there are none."""
    named = [f"{name} ({reason})" for name, reason in source.skipped.items()]
    if not named:
        return ""
    more = f" and {len(named) - 5} more" if len(named) > 5 else ""
    files = "file" if len(named) == 1 else "files"
    return f"{len(named)} {files} skipped: {', '.join(named[:5])}{more}"


def _picked(batch: int, rows: slice) -> list[int]:
    picked = [*range(batch)[rows]]
    if not picked:
        raise ValueError(f"rows={rows} of batch={batch}: must be at least one")
    return picked


def _shuffled(count: int, random: Random) -> Iterator[int]:
    """All of 0 .. count - 1 in random order, at a constant cost for each that is asked for."""
    moved: dict[int, int] = {}
    for i in range(count):
        j = random.randrange(i, count)
        item, moved[j] = moved.get(j, j), moved.get(i, i)
        yield item


def _long_enough(frames: float, needed: int) -> None:
    if frames < needed:
        raise ValueError(f"has {frames} frames: must be at least {needed}")
