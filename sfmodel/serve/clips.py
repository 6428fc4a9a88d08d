"""Clips that clients saved: MP4 files, each with a contact sheet, in a folder of the server's."""

from __future__ import annotations

import io
import secrets
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image

from sfmodel.video import ContactSheet, VideoWriter

LARGEST = 2**30  # bytes of all clips of a server
BATCH = 16  # frames that are decoded at a time


class Clip(NamedTuple):
    """A saved clip. seconds: that it plays; size: bytes of both files."""

    video: Path
    sheet: Path
    frames: int
    seconds: float
    size: int

    def facts(self) -> dict[str, Any]:
        """Facts that a client is told of it."""
        return {
            "url": f"/clips/{self.video.name}",
            "sheet": f"/clips/{self.sheet.name}",
            "frames": self.frames,
            "seconds": round(self.seconds, 2),
            "bytes": self.size,
        }


class Clips:
    """The clips of a server. A client's name of one is looked up here, never opened."""

    def __init__(self, folder: Path, fps: float) -> None:
        self.folder, self.fps = folder, fps
        self.saved: dict[str, Clip] = {}

    def save(self, frames: Sequence[bytes], title: str) -> Clip:
        """Writes JPEG files as a clip. Raises ValueError without frames and where all clips take
        too much, OSError where it cannot be written."""
        if not frames:
            raise ValueError("there is no frame to save yet")
        if (used := sum(clip.size for clip in self.there())) > LARGEST:
            raise ValueError(f"the saved clips take {used / 2**30:.1f} GiB: no more are taken")
        name = f"{time.strftime('%Y%m%d-%H%M%S')}-{secrets.token_hex(3)}"
        video, sheet = self.folder / f"{name}.mp4", self.folder / f"{name}.png"
        drawn = ContactSheet()
        with VideoWriter(video, self.fps) as writer:
            for at in range(0, len(frames), BATCH):
                images = [np.asarray(Image.open(io.BytesIO(x))) for x in frames[at : at + BATCH]]
                images_THWC = torch.from_numpy(np.stack(images))
                writer.write(images_THWC)
                drawn.add(images_THWC)
        try:
            drawn.save(sheet, title=title)
        except OSError:
            video.unlink(missing_ok=True)
            raise
        size = video.stat().st_size + sheet.stat().st_size
        clip = Clip(video, sheet, len(frames), len(frames) / self.fps, size)
        self.saved[name] = clip
        return clip

    def there(self) -> list[Clip]:
        """Those whose files nobody has removed."""
        return [clip for clip in [*self.saved.values()] if clip.video.is_file()]

    def find(self, name: str) -> Path | None:
        """The file of a name such as "20260102-030405-abcdef.mp4"; None for any other."""
        stem, _, kind = name.partition(".")
        clip = self.saved.get(stem)
        return clip and {"mp4": clip.video, "png": clip.sheet}.get(kind)
