"""Progress, log and samples of a run of the trainer."""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from sfmodel.dit import DiT
from sfmodel.extras import needed
from sfmodel.files import atomic, cannot_write
from sfmodel.stream import Stream
from sfmodel.train import parallel
from sfmodel.train.data import skipped_report

with needed():
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

if TYPE_CHECKING:
    from sfmodel.train.loop import Run

Record = dict[str, float]
# Of the samples that a run of the toy world shows.
PROMPTS = ("a large red ball moves up slowly", "a small bright blue ball moves right fast", "")


class Report:
    """Output of a run while it goes on, on its first rank: progress in a terminal, plain lines
    elsewhere; log.jsonl with the means of every few updates; at the end curves.png."""

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
        self.began, self.done = time.perf_counter(), 0  # of updates

    def __enter__(self) -> Report:
        run = self.run
        if self.first:
            if run.step:
                self.records = logged(self.path, run.step)
            # A resumed run writes again what it logged after its checkpoint.
            with atomic(self.path) as part:
                part.write_text("".join(json.dumps(each) + "\n" for each in self.records))
            self.skipped = skipped_report(run.source)
            if self.skipped:
                self.say(self.skipped)
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
        text = "  ".join(f"{key} {value:.4g}" for key, value in mean.items())
        self.progress.update(self.task, completed=step, text=text)
        if not self.live:
            left = (steps - step) * rate / 60
            self.say(f"update {step}/{steps}  {text}  {rate:.2f} s each  {left:.0f} min left")

    def sample(self) -> None:
        """A contact sheet of what the averaged weights generate, where there is a decoder: after
        every `sample_every` updates and the last, unless it is there."""
        run, config = self.run, self.config
        if run.codec is None or run.text is None or config.objective.context == "whole":
            return
        due = run.step == config.steps or (
            config.sample_every and run.step % config.sample_every == 0
        )
        path = config.output / "samples" / f"update-{run.step:06d}.png"
        if not run.step or not due or not run.ranks.any(self.first and not path.exists()):
            return
        # Under FSDP a model is whole only inside its own forward pass.
        state = parallel.full_state(run.average, run.ranks)
        if not self.first:
            return
        model = DiT(run.preset.dit, config.impl, config.attention_impl)
        model.load_state_dict(state)
        text = run.text(PROMPTS, run.ranks.device)
        model = model.to(run.ranks.device).eval()
        frames = 1 + run.codec.temporal_factor * (2 * max(config.frames) - 1)
        made = Stream(model, run.codec, text, run.preset, seed=config.seed, batch=len(PROMPTS))
        videos = torch.cat([*made.video(frames)], 1)
        labels = [prompt or "(no prompt)" for prompt in PROMPTS]
        from sfmodel.video import contact_sheet_of_rows  # needs PyAV

        contact_sheet_of_rows(videos, path, labels, f"{config.recipe}, update {run.step}")


def logged(path: Path, step: int) -> list[Record]:
    """The lines of a log up to an update, without what a kill left unfinished; none where there is
    no log."""
    records = []
    for text in path.read_text(errors="replace").splitlines() if path.exists() else ():
        with contextlib.suppress(ValueError, AttributeError, TypeError, RecursionError):
            line = json.loads(text)
            if line.keys() >= {"step", "loss", "norm"} and line["step"] <= step:
                records.append(line)
    return records


def plot(runs: Mapping[str, list[Record]], path: Path) -> None:
    """The losses and the norms of the gradients of runs as a PNG, a row for each, by its name."""
    from matplotlib.figure import Figure

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
