"""Prompts in text files: one a line, or one beside a video."""

from __future__ import annotations

import itertools
import math
import os
from collections.abc import Iterator
from pathlib import Path

LONGEST = 2**16  # bytes of a prompt: a hundred times what a text encoder reads
MOST, LARGEST = 2_000_000, 2**28  # prompts and characters that are held in memory at once


def prompts_in(path: Path) -> Iterator[str]:
    """The non-empty lines of a text file in UTF-8, one by one. A line ends at a newline and nowhere
    else.

    Raises ValueError for a file that is missing, without a prompt or no text, where it is met."""
    any_yet = False
    try:
        # A FIFO that nobody writes to is empty; opened in the usual way it would wait.
        with os.fdopen(os.open(path, os.O_RDONLY | os.O_NONBLOCK), "rb") as file:
            os.set_blocking(file.fileno(), True)
            for number in itertools.count(1):
                line = file.readline(LONGEST + 1)
                if not line:
                    break
                if b"\0" in line:
                    raise ValueError(f"prompt file {path}: not a text file")
                if len(line) > LONGEST:
                    raise ValueError(
                        f"prompt file {path}: line {number} has more than {LONGEST:,} bytes: must "
                        "be one prompt"
                    )
                prompt = line.decode("utf-8-sig" if number == 1 else "utf-8").strip()
                any_yet = any_yet or bool(prompt)
                if prompt:
                    yield prompt
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "not a text file"
        raise ValueError(f"prompt file {path}: {reason}") from None
    if not any_yet:
        raise ValueError(f"prompt file {path}: has no prompt, must have one a line")


def read_prompts(path: Path, largest: int = LARGEST) -> list[str]:
    """Prompts of `prompts_in`, at once. Raises ValueError as it does, and for more than can be held
    at once: MOST prompts, or so many characters."""
    prompts, size = [], 0
    for prompt in prompts_in(path):
        prompts.append(prompt)
        size += len(prompt)
        if len(prompts) > MOST or size > largest:
            raise ValueError(
                f"prompt file {path}: too long: must have at most {MOST:,} prompts and "
                f"{largest:,} characters"
            )
    return prompts


def read_timeline(path: Path) -> list[tuple[float, str]]:
    """Prompts over time, in the order of their seconds, of lines such as "7.5 a cat sleeps". Raises
    ValueError as `read_prompts` does, and for a line without a second or with that of another."""
    found: dict[float, str] = {}
    for line in read_prompts(path):
        second, _, prompt = line.partition(" ")
        try:
            at = float(second.removesuffix(":").removesuffix("s"))
        except ValueError:
            at = math.nan
        if not (0 <= at < math.inf and prompt.strip()):
            raise ValueError(f"{path}: {line!r} must be a second and a prompt: 7.5 a cat sleeps")
        if at in found:
            raise ValueError(f"{path}: has two prompts at second {at:g}")
        found[at] = prompt.strip()
    return sorted(found.items())


def prompt_beside(video: Path) -> str:
    """The prompt in the text file of the same name; "" where there is none. Raises ValueError as
    `read_prompts` does."""
    beside = video.with_suffix(".txt")
    return " ".join(read_prompts(beside, LONGEST)) if os.path.lexists(beside) else ""


def continued(path: Path, number: int) -> Path:
    """The file that continues a file of prompts, from 1 on: NAME-00001.safetensors, …"""
    return path.with_stem(f"{path.stem}-{number:05d}")
