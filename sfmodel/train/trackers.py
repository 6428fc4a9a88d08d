"""Trackers of a run beside its own log: Weights & Biases and TensorBoard, by their libraries.

What a tracker cannot do, for want of a network or a disk, never stops the run.
"""

from __future__ import annotations

import os
import uuid
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol, TypeVar, cast

from sfmodel.files import atomic
from sfmodel.train.config import TrainConfig

T = TypeVar("T")


class Tracker(Protocol):
    """Taker of numbers and of pictures (PNG) by update. after: the last update that it has."""

    after: int

    def log(self, step: int, values: Mapping[str, float]) -> None: ...
    def image(self, step: int, path: Path) -> None: ...
    def close(self) -> None: ...


class WandB:
    """Run of Weights & Biases, of the id in the folder's `wandb-id`: a resumed run goes on in it,
    from the first update that it does not have. The library reads its own variables (WANDB_PROJECT,
    WANDB_MODE=offline, …)."""

    def __init__(self, config: TrainConfig, step: int, logged: int) -> None:
        import wandb

        self.wandb, self.after = wandb, max(step, logged)
        note = config.output / "wandb-id"
        if not step or not note.exists():
            with atomic(note) as part:
                part.write_text(uuid.uuid4().hex[:12])
        self.run = wandb.init(
            project=os.environ.get("WANDB_PROJECT", "sfmodel"), name=config.output.name,
            dir=str(config.output), id=note.read_text(), resume="allow", config=config.plain(),
            allow_val_change=True,
        )  # fmt: skip

    def log(self, step: int, values: Mapping[str, float]) -> None:
        self.run.log(dict(values), step=step)

    def image(self, step: int, path: Path) -> None:
        self.run.log({"sample": self.wandb.Image(str(path))}, step=step)

    def close(self) -> None:
        self.run.finish()


class TensorBoard:
    """Event files in the run's folder `tensorboard`. A resumed run takes the place of what was
    written after its checkpoint."""

    def __init__(self, config: TrainConfig, step: int, logged: int) -> None:
        from torch.utils.tensorboard import SummaryWriter
        from torch.utils.tensorboard.summary import hparams

        self.after = step
        folder = str(config.output / "tensorboard")
        self.writer = cast(Any, SummaryWriter(folder, purge_step=step + 1))
        plain = {
            name: value if isinstance(value, (int, float, str)) else str(value)
            for name, value in config.plain().items()
        }
        # Not by add_hparams: TensorBoard stops to read a file once there is a newer one beside it.
        for summary in hparams(plain, {}):
            self.writer.file_writer.add_summary(summary)

    def log(self, step: int, values: Mapping[str, float]) -> None:
        for name, value in values.items():
            self.writer.add_scalar(name, value, step)
        self.writer.flush()

    def image(self, step: int, path: Path) -> None:
        import numpy as np
        from PIL import Image

        with Image.open(path) as image:
            pixels_HWC = np.asarray(image.convert("RGB"))
        self.writer.add_image("sample", pixels_HWC, step, dataformats="HWC")
        self.writer.flush()

    def close(self) -> None:
        self.writer.close()


TRACKERS: dict[str, Callable[[TrainConfig, int, int], Tracker]] = {
    "wandb": WandB,
    "tensorboard": TensorBoard,
}


class Tracking:
    """The tracker that a run's settings name, if any, until it fails once, which is said."""

    def __init__(
        self, config: TrainConfig, step: int, logged: int, say: Callable[[str], None]
    ) -> None:
        """step: the update that the run goes on from; logged: the last one in its log."""
        self.name, self.say = config.tracker, say
        self.tracker: Tracker | None = None
        if (name := config.tracker) is not None:
            self.tracker = self._safely(lambda: TRACKERS[name](config, step, logged))

    def log(self, step: int, values: Mapping[str, float]) -> None:
        if (tracker := self.tracker) is not None and step > tracker.after:
            self._safely(lambda: tracker.log(step, values))

    def image(self, step: int, path: Path) -> None:
        if (tracker := self.tracker) is not None and step > tracker.after:
            self._safely(lambda: tracker.image(step, path))

    def close(self) -> None:
        if (tracker := self.tracker) is not None:
            self._safely(tracker.close)

    def _safely(self, act: Callable[[], T]) -> T | None:
        try:
            return act()
        except Exception as error:  # the libraries raise any
            reason = str(error).partition("\n")[0] or type(error).__name__
            self.say(f"tracker {self.name} failed, the run goes on without it: {reason}")
            self.tracker = None
            return None
