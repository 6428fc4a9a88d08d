"""Progress, log and samples of a run of the trainer."""

from __future__ import annotations

import contextlib
import json
import math
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from sfmodel.extras import needed
from sfmodel.files import atomic, cannot_write
from sfmodel.pretrained import checked_codec
from sfmodel.train.data import skipped_report
from sfmodel.train.samples import write_samples
from sfmodel.train.trackers import Tracking
from sfmodel.vae.codec import VideoCodec

with needed():
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

if TYPE_CHECKING:
    from sfmodel.train.loop import Run

Record = dict[str, float]


class Report:
    """Output of a run while it goes on, on its first rank: progress in a terminal, plain lines
    elsewhere; log.jsonl, and a tracker, with the means of every few updates; at the end
    curves.png."""

    def __init__(self, run: Run) -> None:
        self.run, self.config = run, run.config
        self.first = run.ranks.first
        self.path = run.config.output / "log.jsonl"
        self.console = Console(quiet=not self.first)
        columns = (TextColumn("{task.description}"), BarColumn())
        more = (TextColumn("{task.completed}/{task.total} {task.fields[text]}"),)
        live = self.console.is_terminal and self.first
        self.progress = Progress(
            *columns, *more, TimeRemainingColumn(), console=self.console, disable=not live
        )
        self.live = live
        self.records: list[Record] = []  # logged
        self.failed: OSError | None = None  # to write the log
        self.decoder: Callable[[], VideoCodec] | None = None  # of samples, on the first rank
        self.tracking: Tracking | None = None  # on the first rank
        self.began, self.done = time.perf_counter(), 0  # of updates

    def __enter__(self) -> Report:
        run = self.run
        if self.first:
            before = logged(self.path) if run.step else []
            self.records = [each for each in before if each["step"] <= run.step]
            # A resumed run writes again what it logged after its checkpoint.
            with atomic(self.path) as part:
                part.write_text("".join(json.dumps(each) + "\n" for each in self.records))
            self.skipped = skipped_report(run.source)
            if self.skipped:
                self.say(self.skipped)
            self.decoder = self._decoder()
            last = int(max((each["step"] for each in before), default=0))
            self.tracking = Tracking(self.config, run.step, last, self.say)
        self.progress.start()
        name = self.config.recipe
        self.task = self.progress.add_task(
            name, total=self.config.steps, completed=run.step, text=""
        )
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self.progress.stop()
        # Some files show that they are bad only when a clip of theirs is drawn.
        if self.first and (report := skipped_report(self.run.source)) != self.skipped:
            self.say(report)
        if self.tracking is not None:
            self.tracking.close()
        if self.first and self.records:
            # On a full disk, the first failure is the one to report.
            with contextlib.suppress(*([] if kind is None else [OSError])):
                plot({self.config.recipe: self.records}, self.config.output / "curves.png")

    def say(self, text: str) -> None:
        if self.first:
            self.progress.print(text) if self.live else print(text, flush=True)

    def preparing(self, done: int) -> None:
        """Shows that so many of the teacher's trajectories are made."""
        text = f"trajectory {done} of {self.config.pairs}"
        if self.live:
            self.progress.update(self.task, text=text)
        else:
            self.say(text)

    def update(self, record: Record) -> None:
        step, steps = self.run.step, self.config.steps
        self.run.recent.append(record)
        self.done += 1
        if step % self.config.log_every and step != steps:
            self.progress.update(self.task, completed=step)
            return
        mean = means(self.run.recent)
        rate = (time.perf_counter() - self.began) / self.done
        line = {"step": step, **mean, "seconds": self.run.seconds, "seconds_per_step": rate}
        if self.run.ranks.device.type == "cuda":
            line["peak_gib"] = torch.cuda.max_memory_allocated() / 2**30
        self.run.recent = []
        self.records.append(line)
        if self.first:
            try:
                with open(self.path, "a") as file:
                    file.write(json.dumps(line) + "\n")
            except OSError as error:
                self.failed = cannot_write(self.path, error)
        if self.tracking is not None:
            self.tracking.log(step, {name: line[name] for name in line if name != "step"})
        text = "  ".join(f"{key} {value:.4g}" for key, value in mean.items())
        self.progress.update(self.task, completed=step, text=text)
        if not self.live:
            left = (steps - step) * rate / 60
            self.say(f"update {step}/{steps}  {text}  {rate:.2f} s each  {left:.0f} min left")

    def _decoder(self) -> Callable[[], VideoCodec] | None:
        """Loader of what decodes samples: the toy's codec, or the tiny VAE where its weights are.
        Says why there is none."""
        codec, config = self.run.codec, self.config
        if config.objective.context == "whole":  # which does not stream
            return None
        if codec is not None:
            return lambda: codec
        try:
            return checked_codec(config.preset, self.run.ranks.device, "tiny")
        except ValueError as error:
            self.say(f"no samples are drawn: {error}")
            return None

    def sample(self) -> None:
        """Videos that the averaged weights generate, where there is a decoder: after every
        `sample_every` updates and the last, unless they are there."""
        run, config = self.run, self.config
        due = run.step == config.steps or (
            config.sample_every and run.step % config.sample_every == 0
        )
        path = config.output / "samples" / f"update-{run.step:06d}.png"
        if not run.step or not due:
            return
        if run.ranks.any(self.decoder is not None and not path.exists()):
            self._draw(path)
        if self.tracking is not None and path.exists():
            self.tracking.image(run.step, path)

    def _draw(self, path: Path) -> None:
        """Draws samples on the first rank, while the others wait for it."""
        run = self.run
        # Under FSDP a model is whole only inside its own forward pass.
        weights, more = run.averaged_weights(), True
        if not self.first:
            while self._goes_on(False):
                pass
            return
        assert self.decoder is not None
        benchmark = torch.backends.cudnn.benchmark  # which loading a codec turns on
        try:
            for _ in write_samples(run, weights, self.decoder(), path):
                if not (more := self._goes_on(True)):
                    break
        except (torch.OutOfMemoryError, MemoryError) as error:
            self.say(f"no sample of update {run.step}: {str(error).partition(chr(10))[0]}")
        finally:
            torch.backends.cudnn.benchmark = benchmark
            if more:
                self._goes_on(False)
        if run.ranks.device.type == "cuda":
            torch.cuda.empty_cache()

    def _goes_on(self, more: bool) -> bool:
        """Tells all ranks whether the first one, which they wait for, draws one more chunk: none
        then waits for longer than that takes, and all stop together where it is asked for."""
        return self.run.ranks.any(more) and not self.run.asked()


def logged(path: Path, step: float = math.inf) -> list[Record]:
    """The lines of a log up to an update, without what a kill left unfinished; none where there is
    no log."""
    records = []
    for text in path.read_text(errors="replace").splitlines() if path.exists() else ():
        with contextlib.suppress(ValueError, AttributeError, TypeError, RecursionError):
            line = json.loads(text)
            if (
                line.keys() >= {"step", "loss", "norm", "seconds", "seconds_per_step"}
                and 0 <= line["step"] <= step
            ):
                records.append(line)
    return records


def plot(runs: Mapping[str, list[Record]], path: Path) -> None:
    """The losses and the norms of the gradients of runs as a PNG, a row for each, by its name."""
    from matplotlib.figure import Figure

    runs = {title: records for title, records in runs.items() if records}
    figure = Figure(figsize=(9, 0.3 + 3.2 * len(runs)), layout="constrained")
    rows = figure.subplots(len(runs), 2, squeeze=False)
    for axes, (title, records) in zip(rows, runs.items(), strict=True):
        for ax, what in zip(axes, ("loss", "norm"), strict=True):
            for prefix, name in (("", "generator"), ("critic_", "critic")):
                if prefix + what in records[-1]:
                    values = [(r["step"], r[prefix + what]) for r in records]
                    style = "-" if len(values) > 1 else "."
                    ax.plot(*zip(*values, strict=True), style, label=name, linewidth=1.2)
            positive = all(r[key] > 0 for r in records for key in r if key.endswith(what))
            ax.set_yscale("log" if positive else "linear")
            ax.set_xlabel("update of the generator")
            ax.set_ylabel(f"{what} of the gradient" if what == "norm" else what)
            ax.set_title(title, loc="left", fontsize=10)
            ax.grid(alpha=0.3, which="both")
            ax.legend()
    with atomic(path) as temporary:
        figure.savefig(temporary, format="png", dpi=120)


def means(records: list[Record]) -> Record:
    return {key: sum(each[key] for each in records) / len(records) for key in records[0]}
