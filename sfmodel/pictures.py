"""Pictures as they are meant to be seen, scaled to cover a video's frame and cropped.

`python -m sfmodel.pictures HEIGHT WIDTH` does it in a process of its own, for pictures that anyone
may have made: a file on standard input, bytes [H, W, 3] on standard output, within limits of
memory and time.
"""

from __future__ import annotations

import resource
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import BinaryIO

import numpy as np
import numpy.typing as npt

from sfmodel.extras import needed

with needed():
    from PIL import Image, ImageOps

Images = npt.NDArray[np.uint8]

MAX_PIXELS = 2**26  # of a coded frame; a header that says more would take gigabytes
UPLOADS = ("JPEG", "PNG", "WEBP")  # formats of pictures that anyone may have made
MEMORY, SECONDS = 2**31, 10  # limits of the process that reads one


def covering_image(
    source: Path | BinaryIO, height: int, width: int, formats: tuple[str, ...] | None = None
) -> Images:
    """A picture [H, W, 3], upright, scaled to cover H × W and cropped around the centre. formats:
    Pillow's names of those that are read; None for all. Raises ValueError for a file that is
    none."""
    name = f"{source}: " if isinstance(source, Path) else ""
    try:
        with Image.open(source, formats=formats) as image:
            if image.width * image.height > MAX_PIXELS:
                raise ValueError(
                    f"{name}is {image.width} × {image.height} pixels: must be at most "
                    f"{MAX_PIXELS:,}"
                )
            upright = ImageOps.exif_transpose(image).convert("RGB")
            fitted = ImageOps.fit(upright, (width, height), Image.Resampling.BICUBIC)
    except (OSError, SyntaxError, Image.DecompressionBombError) as error:
        reason = getattr(error, "strerror", None) or "damaged, or no picture"
        raise ValueError(f"{name}{reason}") from None
    return np.asarray(fitted)


def covering_upload(data: bytes, height: int, width: int) -> Images:
    """Picture of a JPEG, PNG or WebP file by `covering_image`, in a process of its own. Raises
    ValueError for a file that is none, or that takes more memory or time than there is for one."""
    command = [sys.executable, "-m", "sfmodel.pictures", str(height), str(width)]
    try:
        done = subprocess.run(command, input=data, capture_output=True, timeout=2 * SECONDS)
    except subprocess.TimeoutExpired:
        raise ValueError("image: takes too long to read") from None
    if done.returncode == 2:
        raise ValueError(f"image: {done.stderr.decode(errors='replace').strip()}")
    if done.returncode or len(done.stdout) != height * width * 3:
        raise ValueError("image: damaged, or takes too much memory or time to read")
    return np.frombuffer(done.stdout, np.uint8).reshape(height, width, 3)


def main(arguments: Sequence[str]) -> int:
    """The process of `covering_upload`. Returns 2, with a sentence on standard error, for a file
    that is no picture."""
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    resource.setrlimit(resource.RLIMIT_CPU, (SECONDS, SECONDS))
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))
    height, width = map(int, arguments)
    try:
        image_HWC = covering_image(sys.stdin.buffer, height, width, UPLOADS)
    except ValueError as error:
        print(error, file=sys.stderr)
        return 2
    except MemoryError:
        return 1
    sys.stdout.buffer.write(image_HWC.tobytes())
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
