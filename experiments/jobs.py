"""Jobs of an experiment: runs of the trainer and what they are measured by, in processes of their
own, one to a CPU core. What is done is kept: an experiment that was stopped goes on where it was.
"""

from __future__ import annotations

import contextlib
import json
import multiprocessing
import os
import statistics
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path
from typing import Any, Protocol, TypeVar

import torch

from sfmodel.files import atomic
from sfmodel.train.config import TrainConfig
from sfmodel.train.loop import train
from sfmodel.train.parallel import checkpoints

Result = dict[str, Any]


class Job(Protocol):
    @property
    def name(self) -> str: ...


J = TypeVar("J", bound=Job)


def on_gpu() -> bool:
    return torch.cuda.is_available()


def one_thread() -> None:
    """Computes with one CPU thread: a second one waits longer for tensors this small than it
    computes, and its core has a job of its own."""
    if not on_gpu():
        torch.set_num_threads(1)


def check_among(name: str, chosen: Sequence[str], known: Sequence[str]) -> None:
    """Raises ValueError for one that does not exist."""
    for each in chosen:
        if each not in known:
            raise ValueError(f"{name}={each!r}: must be of {', '.join(map(repr, known))}")


def begin(folder: Path, settings: Mapping[str, Any]) -> None:
    """Begins or goes on with an experiment, whose results depend on these settings. Raises
    ValueError where the folder holds one of others."""
    note, said = folder / "settings.json", json.dumps(settings)
    if note.exists() and note.read_text() != said:
        raise ValueError(f"{folder}: holds an experiment of other settings: name another folder")
    with atomic(note) as part:
        part.write_text(said)
    one_thread()


def trained(config: TrainConfig) -> Path:
    """The averaged weights of a run, silently, on one CPU thread; one that was stopped, or that is
    to have more updates than it had, goes on."""
    one_thread()
    # A run that is over goes on to nothing; an interrupted one has left weights, not its last.
    resume = bool(checkpoints(config.output / "checkpoints"))
    with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere):
        return train(config, resume=resume)


def run_all(
    run: Callable[[J], Result],
    jobs: Sequence[J],
    workers: int | None,
    line: Callable[[Result], str],
) -> list[Result]:
    """The results of all jobs, in their order; a line for each as it is done. run: a function of a
    module. workers: jobs at a time; None: one a CPU core, up to eight on a GPU."""
    # Models this small leave a GPU waiting for launches: several processes share it.
    cores = len(os.sched_getaffinity(0))
    workers = workers or (min(cores, 8) if on_gpu() else cores)
    # Tensors of some MiB come and go: without this glibc returns each one to the kernel.
    os.environ.setdefault("MALLOC_MMAP_THRESHOLD_", str(2**30))
    os.environ.setdefault("MALLOC_TRIM_THRESHOLD_", str(2**32))
    done: dict[J, Result] = {}
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, mp_context=context) as pool:
        waiting = {pool.submit(run, job): job for job in jobs}
        try:
            for future in as_completed(waiting):
                job = waiting[future]
                result = done[job] = future.result()
                print(f"{len(done)}/{len(jobs)}  {job.name}: {line(result)}", flush=True)
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            for process in [*(pool._processes or {}).values()]:
                process.terminate()
            raise
    return [done[job] for job in jobs]


def keep(file: Path, result: Result, digits: int | None = None) -> None:
    """Writes a result as JSON. digits: of its numbers, as many as a table or figure shows."""
    text = json.dumps(result)
    if digits:
        text = json.dumps(
            json.loads(text, parse_float=lambda said: float(f"{float(said):.{digits}g}"))
        )
    with atomic(file) as part:
        part.write_text(text)


def mean(values: Sequence[float]) -> str:
    """Mean ± deviation over seeds."""
    spread = f" ± {statistics.stdev(values):.2f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.2f}{spread}"
