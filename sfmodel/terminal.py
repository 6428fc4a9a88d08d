"""Output to a terminal: tables, and a video, two pixels to a character, as it is made."""

from __future__ import annotations

import shutil
import sys
import time
from typing import TextIO

import torch
import torch.nn.functional as F
from torch import Tensor

from sfmodel.extras import needed

with needed():
    from rich.console import Console

_RESET = "\x1b[0m"


def plain_console(width: int = 160) -> Console:
    """The standard output, of that width where it is no terminal."""
    console = Console()
    if not console.is_terminal:
        console.width = width
    return console


class TerminalPlayer:
    """Plays frames as they come, no faster than `fps`. Needs a terminal with 24-bit colours.

    Raises ValueError where `out` is not a terminal."""

    def __init__(self, fps: float, out: TextIO | None = None) -> None:
        """Player on `out`, the standard output if not given."""
        out = out or sys.stdout
        if not out.isatty():
            raise ValueError("the output is not a terminal: a video can only be watched in one")
        self.fps, self.out = fps, out
        self._rows = 0  # of the picture on the screen
        self._due = time.perf_counter()

    def show(self, frames: Tensor, status: str) -> None:
        """frames: float [T, 3, H, W] in [-1, 1], or bytes [T, H, W, 3]; status: a line under
        them."""
        if frames.dtype == torch.uint8:
            frames = frames.movedim(-1, 1) / 127.5 - 1
        columns, rows = shutil.get_terminal_size()
        for frame in frames:
            picture = draw(frame, columns, rows - 2)
            self._due = max(self._due + 1 / self.fps, time.perf_counter() - 1 / self.fps)
            time.sleep(max(0.0, self._due - time.perf_counter()))
            up = f"\x1b[{self._rows}A\r" if self._rows else ""
            self.out.write(f"{up}{picture}\x1b[2K{status[: columns - 1]}\n")
            self.out.flush()
            self._rows = picture.count("\n") + 1


def draw(frame: Tensor, columns: int, rows: int) -> str:
    """One frame [3, H, W] as lines of half blocks that fit into columns × rows characters. The
    upper pixel is the character's colour, the lower one its background."""
    height, width = frame.shape[1:]
    scale = min(1.0, columns / width, 2 * rows / height)
    size = max(2, 2 * int(height * scale / 2)), max(1, int(width * scale))
    small = F.interpolate(frame[None].float(), size, mode="area")[0] if scale < 1 else frame
    pixels = ((small.clamp(-1, 1) + 1) * 127.5).round().int().permute(1, 2, 0).tolist()
    lines = []
    for upper, lower in zip(pixels[0::2], pixels[1::2], strict=False):
        cells = (
            f"\x1b[38;2;{a[0]};{a[1]};{a[2]}m\x1b[48;2;{b[0]};{b[1]};{b[2]}m▀"
            for a, b in zip(upper, lower, strict=True)
        )
        lines.append("".join(cells) + _RESET + "\n")
    return "".join(lines)
