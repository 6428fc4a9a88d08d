"""`python -m bench cpu`: the ops in C++ beside eager PyTorch and torch.compile on this CPU, at the
shapes of Wan2.1, with one thread and with two, in float32 and bfloat16; then what they make of a
toy stream and of a toy training step.

Every result is compared with float64 first. Five minutes on two cores, most of it torch.compile's.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import tempfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from bench import timing
from bench.figures import race
from bench.harness import CPP, EAGER, Job
from bench.ops import kernels, memory_bound
from bench.tables import Result, Table, failures, left_out, microseconds, percent, timed
from sfkernels import cpp
from sfkernels.cases import FRAME
from sfmodel.config import PRESETS
from sfmodel.machine import describe
from sfmodel.pretrained import TOY_WEIGHTS, load_toy
from sfmodel.ranks import started
from sfmodel.stream import Stream
from sfmodel.train.defaults import defaults
from sfmodel.train.loop import Run

ROUNDS = 10
DTYPES = (torch.float32, torch.bfloat16)
THREADS = (1, 2)
CHUNK = (3, FRAME, 1536)  # of Wan2.1-1.3B
LEVELS = ((2, 240 * 416, 96), (3, 60 * 104, 384))  # of its video decoder
STREAMED = 61  # pixel frames
RECIPES = ("tf", "sf+dmd")


def run(job: Job) -> Result:
    if cpp.MISSING:
        raise ValueError(f"there are no ops in C++ to measure: {cpp.MISSING}")
    timing.keep_memory()
    threads = torch.get_num_threads()
    job.rounds = min(job.rounds, ROUNDS)
    result = job.begin("cpu", torch.float32)
    result["instructions"] = cpp.LOADED
    copies: dict[int, dict[int, float]] = {count: {} for count in THREADS}
    threads_name = {count: f"{count} thread{'s' * (count > 1)}" for count in THREADS}
    try:
        for dtype in DTYPES[:1] if job.tiny else DTYPES:
            full = memory_bound.Sizes((CHUNK,), (CHUNK,), LEVELS, dtype)
            cases = [case for case, _ in memory_bound.rows(memory_bound.TINY if job.tiny else full)]
            for count in THREADS:
                torch.set_num_threads(count)
                label = f", {str(dtype).removeprefix('torch.')}, {threads_name[count]}"
                for case in cases:
                    row = functools.partial(
                        kernels.row, case, job, result, copies[count], not job.tiny
                    )
                    job.add(result, case.label + label, row)
        for count in THREADS:
            torch.set_num_threads(count)
            job.add(result, f"toy stream, {threads_name[count]}", functools.partial(_stream, job))
            for recipe in RECIPES:
                name = f"toy training step, {recipe}, {threads_name[count]}"
                job.add(result, name, functools.partial(_train, recipe, count, job))
    finally:
        torch.set_num_threads(threads)
    return job.end(result)


def _stream(job: Job) -> Result:
    """Milliseconds of a decoded frame."""
    preset = PRESETS["toy"]
    runs = {}
    for name, impl in ((CPP, "auto"), (EAGER, "reference")):
        model, codec, text = load_toy(device=job.device)
        for module in model.modules():  # attention is PyTorch's in both
            if hasattr(module, "impl"):
                vars(module)["impl"] = impl
        embedding = text(["a large red ball moves up slowly"], model.device)
        runs[name] = functools.partial(_frames, model, codec, embedding, preset)
    return _timed(runs, job, STREAMED)


def _frames(*args: Any) -> None:
    for _ in Stream(*args).video(STREAMED):
        pass


def _train(recipe: str, threads: int, job: Job) -> Result:
    """Milliseconds of an update of the generator, those of the critic before it included."""
    with contextlib.ExitStack() as held:
        runs = {}
        for name, impl in ((CPP, "auto"), (EAGER, "reference")):
            folder = Path(held.enter_context(tempfile.TemporaryDirectory()))
            config = defaults("toy", recipe)
            batch = 4 if job.tiny else config.batch
            changes: dict[str, Any] = {"output": folder, "impl": impl, "batch": batch}
            if config.objective.needs_teacher:
                changes |= {"teacher": TOY_WEIGHTS, "init": TOY_WEIGHTS, "critic_warmup": 0}
            ranks = held.enter_context(started(0, job.device))
            trained = Run(dataclasses.replace(config, **changes, threads=threads), ranks)
            trained.prepare()
            runs[name] = trained.train_step
        return _timed(runs, job, 1)


def _timed(runs: Mapping[str, Callable[[], Any]], job: Job, count: int) -> Result:
    """Milliseconds of one of the `count` that a run makes, all in turn."""
    calls = {name: functools.partial(timing.once, run, job.device) for name, run in runs.items()}
    times, errors = timing.in_turn(calls, 1 + (2 if job.tiny else job.rounds))
    entries = {name: timing.failed(error) for name, error in errors.items()}
    for name, values in times.items():  # the first only warms up
        entries[name] = timing.entry(timing.summary([ms / count for ms in values[1:]]))
    return {"contestants": entries}


def tables(result: Result) -> list[Table]:
    """Ratios above 1: the C++ is faster."""
    ops, ends = [], []
    for row in result["rows"]:
        times = {name: e["ms"] for name, e in timed(row).items()}
        if CPP not in times:
            continue
        ours = times[CPP]
        eager, compiled, native = (
            f"{times[name] / ours:.2f}" if name in times else ""
            for name in (EAGER, "compile", "native")
        )
        if "copy_gbps" in row:
            share = percent(row["contestants"][CPP]["gbps"], row["copy_gbps"])
            ops.append([row["case"], microseconds(ours), share, eager, compiled, native])
        else:
            ends.append([row["case"], f"{ours:.2f}", f"{times[EAGER]:.2f}", eager])
    here = f"{describe(result['machine'])}, {result['instructions']}"
    notes = failures(result) + left_out(result)
    heads = ("op", "µs", "% of a copy of as many bytes", "eager / C++", "torch.compile / C++",
             "PyTorch's own op / C++")  # fmt: skip
    of_ends = "", "ms, C++", "ms, eager", "eager / C++"
    return [
        Table(f"C++ on {here}", heads, ops),
        Table(f"end to end on {here}", of_ends, ends, notes),
    ]


def figures(result: Result) -> Iterator[tuple[str, Any]]:
    ops = [row for row in result["rows"] if "copy_gbps" in row and CPP in timed(row)]
    yield from race("cpu", result, ops, kernels.bandwidth, 100, kernels.BANDWIDTH)
