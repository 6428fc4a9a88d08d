"""Files of clips and prompts (.safetensors): their headers, checked, and what of one row is read.

Shapes: N clips or prompts of a file, F latent frames, T rows of text, E text_dim.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from sfmodel.config import Preset
from sfmodel.extras import needed

with needed():
    from safetensors import SafetensorError, safe_open


class Shard(NamedTuple):
    """A file of N clips or prompts, one sentence for each. text: None where it holds no embeddings
    of them."""

    path: Path
    sentences: list[str]
    text: Text | None = None


class Text(NamedTuple):
    """Place of the embeddings in a file, which is read without its header: in one of many prompts
    that takes longer than all else. starts: the first row of each and the last one's end."""

    path: Path
    begin: int  # byte of the first row
    dtype: torch.dtype
    dim: int
    starts: range | list[int]

    def read(self, i: int) -> Tensor:
        """Embedding [T, E] of prompt i, float32. Raises ValueError for one that is not finite and
        for a file that is not whole any more."""
        rows, size = range(self.starts[i], self.starts[i + 1]), self.dim * self.dtype.itemsize
        try:
            with self.path.open("rb") as file:
                file.seek(self.begin + rows.start * size)
                found = bytearray(file.read(len(rows) * size))
        except OSError as error:
            raise ValueError(f"not a whole safetensors file ({error})") from None
        if len(found) != len(rows) * size:
            raise ValueError("not a whole safetensors file (it has become shorter)")
        return finite("text", torch.frombuffer(found, dtype=self.dtype).view(-1, self.dim))


@contextmanager
def opened(path: Path) -> Iterator[Any]:
    """A file as the library reads it. Raises ValueError, without the name, for what is none."""
    if not path.is_file():  # opening a FIFO would wait for its writer
        raise ValueError("not a whole safetensors file (is no regular file)")
    try:
        with safe_open(path, "pt") as file:
            yield file
    except (SafetensorError, OSError) as error:
        raise ValueError(f"not a whole safetensors file ({error})") from None


def read_header(path: Path, preset: Preset, frames: int) -> Shard:
    """Header of a file with clips of so many frames or more, or, if 0, with prompts alone. Raises
    ValueError, without the name, for one of anything else."""
    dit, count = preset.dit, 0
    with opened(path) as file:
        embedded = not frames or "text" in file.keys()  # noqa: SIM118
        if frames:
            shape, size = _shape(file, "latents"), [dit.channels, preset.height, preset.width]
            if len(shape) != 5 or not shape[0] or shape[1] < frames or shape[2:] != size:
                want = f"[N, {frames} or more, {', '.join(map(str, size))}]"
                raise ValueError(f"latents has shape {shape}: must be {want}")
            count = shape[0]
        text = None
        if embedded:
            text = _text(path, file, count, dit.text_len, dit.text_dim)
            count = len(text.starts) - 1
        written = (file.metadata() or {}).get("prompts")
    if text is not None and written is None:
        return Shard(path, [""] * count, text)
    with suppress(json.JSONDecodeError):
        sentences = json.loads(written or "null")
        if isinstance(sentences, list) and [type(s) for s in sentences] == [str] * count:
            return Shard(path, sentences, text)
    raise ValueError(
        f"must have {'' if embedded else 'text, or '}a JSON list of {count} sentences as prompts "
        "in its metadata"
    )


def _text(path: Path, file: Any, count: int, most: int, dim: int) -> Text:
    """Place of so many embeddings (0: any number), of at most so many rows."""
    shape = _shape(file, "text")
    starts: range | list[int]
    if "lengths" in file.keys():  # noqa: SIM118
        starts = _starts(file, count, most)
        if shape != [starts[-1], dim]:
            raise ValueError(
                f"text has shape {shape}: must be {[starts[-1], dim]}, as its lengths say"
            )
    else:
        fits = len(shape) == 3 and 1 <= shape[1] <= most and shape[2] == dim
        if not fits or not shape[0] or shape[0] != (count or shape[0]):
            raise ValueError(
                f"text has shape {shape}: must be [{count or 'N'}, 1 to {most}, {dim}]"
            )
        starts = range(0, shape[0] * shape[1] + 1, shape[1])
    with path.open("rb") as raw:
        size = int.from_bytes(raw.read(8), "little")
        begin = 8 + size + json.loads(raw.read(size))["text"]["data_offsets"][0]
    return Text(path, begin, file.get_slice("text")[:0].dtype, dim, starts)


def _starts(file: Any, count: int, most: int) -> list[int]:
    """Rows at which each embedding begins in a `text` without padding, and at which the last one
    ends."""
    lengths = file.get_tensor("lengths")
    whole = lengths.dim() == 1 and lengths.dtype in (torch.int32, torch.int64) and len(lengths)
    if not whole or lengths.min() < 1 or lengths.max() > most or len(lengths) != (count or whole):
        raise ValueError(f"lengths must be {count or 'N'} whole numbers from 1 to {most}")
    return [0, *itertools.accumulate(lengths.tolist())]


def _shape(file: Any, name: str) -> list[int]:
    if name not in file.keys():  # noqa: SIM118
        raise ValueError(f"holds no tensor named {name}")
    piece = file.get_slice(name)
    if "F" not in piece.get_dtype():  # F32, BF16, F8_E4M3 …
        raise ValueError(f"{name} is of type {piece.get_dtype()}: must be floating point")
    shape: list[int] = piece.get_shape()
    return shape


def finite(name: str, x: Tensor) -> Tensor:
    """The tensor in float32 on the CPU. Raises ValueError for NaN and infinity."""
    x = x.float().cpu()
    if not x.isfinite().all():
        raise ValueError(f"{name} holds NaN or infinity")
    return x
