"""`sfmodel train --dry-run`: what a run would take, as tables."""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Console

from sfmodel.cli import tables
from sfmodel.cli.predict import LABEL
from sfmodel.cost import GIB, GPUS
from sfmodel.train.config import TrainConfig
from sfmodel.train.dry_run import COUNTED, KEPT, DryRun, dry_run

WORLD = int(os.environ.get("WORLD_SIZE", 1))


def check_ranks(ranks: int, dry: bool) -> None:
    """Raises ValueError for --ranks that a run would not have."""
    if ranks < 1 or (not dry and ranks != WORLD):
        raise ValueError(f"ranks={ranks}: goes with a dry run, and must be at least 1")


def show(runs: Mapping[str, TrainConfig], ranks: int, out: Console) -> None:
    """Prints what runs would take that follow each other, each with what it is called. Raises
    ValueError for settings that do not go with so many ranks."""
    for name, config in runs.items():
        found = dry_run(config, ranks, [one.weights for one in runs.values() if one != config])
        title = f"{name}: {config.recipe}" if name else config.recipe
        out.print(f"{title}, {config.preset}, GPUs: {ranks}; {LABEL}, no weights read")
        _show(config, found, ranks, out)


def _show(config: TrainConfig, found: DryRun, ranks: int, out: Console) -> None:
    rows: list[Sequence[Any]] = [
        (part.name, f"{part.parameters / 1e6:,.1f}", f"{part.learned / 1e6:,.1f}",
         *map(_short, part.gib), _short(sum(part.gib)))
        for part in found.parts
    ]  # fmt: skip
    others = [name for name in found.gib if name not in (*KEPT, "total")]
    rows += [(name, *[""] * 6, _short(found.gib[name])) for name in others]
    rows += [("in all", "", "", *(_short(found.gib[name]) for name in (*KEPT, "total")))]
    columns = f"GiB of one GPU|parameters, M|that learn, M|{'|'.join(KEPT)}|in all"
    tables.show(out, "Memory at the peak of an update, with the Triton kernels", columns, rows)

    rows = [
        (name, count, found.clips[name], _short(found.flops[name] / 1e12) if found.flops else "")
        for name, count in found.updates.items()
    ]
    tables.show(out, "The whole run", "of what|how often|clips|TFLOP each", rows)
    rows = []
    for gpu in (GPUS["h100"], GPUS["h200"]):
        seconds = found.seconds(gpu.matmul_tflops, ranks)
        times = [_short(seconds[name]) if found.flops else "" for name in found.updates]
        hours = _short(seconds["run"] / 3600) if found.flops else ""
        fits = "yes" if found.gib["total"] < gpu.memory_gib else "no"
        rows.append((gpu.name, f"{gpu.memory_gib:.0f}", fits, *times, hours))
    title = "Time: floors of bfloat16 arithmetic as if all weights learned, without what GPUs send"
    if not found.flops:
        what = " on rollouts longer than a clip" if config.recipe in COUNTED else ""
        title = f"Time: the FLOPs of {config.recipe}{what} are not worked out"
    learned = "|".join(f"s, {name}" for name in found.updates)
    tables.show(out, title, f"GPU|GiB|fits|{learned}|hours in all", rows)

    rows = [(name, _short(gib)) for name, gib in found.written.items()]
    there = next(each for each in (config.output / "_").absolute().parents if each.exists())
    free = shutil.disk_usage(there).free / GIB
    room = "enough" if free > sum(found.written.values()) else "not enough"
    rows += [("free there", f"{_short(free)}, {room}")]
    tables.show(out, f"Written to {config.output}, beside log and pictures", "what|GiB", rows)
    for refused in found.refused:
        out.print(f"missing or refused: {refused}", soft_wrap=True, highlight=False, markup=False)


def _short(number: float) -> str:
    return f"{number:,.0f}" if number >= 1000 else f"{number:.3g}"
