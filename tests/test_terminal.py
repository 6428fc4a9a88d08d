"""The terminal picture, character by character."""

from __future__ import annotations

import io
import re

import pytest
import torch

from sfmodel.terminal import TerminalPlayer, draw


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_every_pixel_has_its_colour() -> None:
    frame = torch.full((3, 4, 2), -1.0)
    frame[0, 0, 1] = 1.0  # red, in the upper half of the second character
    frame[2, 3, 0] = 0.0  # half blue, in the lower half of the second line's first
    lines = draw(frame, 80, 24).splitlines()
    assert len(lines) == 2 and all(line.count("▀") == 2 for line in lines)
    colours = [re.findall(r"[34]8;2;(\d+;\d+;\d+)m", line) for line in lines]
    assert colours[0] == ["0;0;0", "0;0;0", "255;0;0", "0;0;0"]
    assert colours[1] == ["0;0;0", "0;0;128", "0;0;0", "0;0;0"]


@pytest.mark.parametrize("columns", [20, 200])
def test_large_frames_shrink_to_fit(columns: int) -> None:
    lines = draw(torch.zeros(3, 480, 832), columns, 10).splitlines()
    assert len(lines) <= 10 and lines[0].count("▀") <= columns


def test_frames_replace_each_other() -> None:
    out = Terminal()
    player = TerminalPlayer(1000, out)
    player.show(torch.zeros(3, 3, 64, 64), "status")
    said = out.getvalue()
    assert said.count("status") == 3
    rows = {int(n) for n in re.findall(r"\x1b\[(\d+)A", said)}
    assert len(rows) == 1 and said.count(f"\x1b[{rows.pop()}A") == 2


def test_it_needs_a_terminal() -> None:
    with pytest.raises(ValueError, match="not a terminal"):
        TerminalPlayer(16, io.StringIO())
