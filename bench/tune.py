"""`python -m bench tune`: searches the launch settings of every kernel on this GPU.

Candidates are compared with what the default setting computes, then timed in turn at the sizes of
Wan2.1. The best by its mean time relative to each size's best goes into tuned/sm_XX.json, with what
was measured. Check such a file with `python -m sfkernels.check --tuned` before it ships.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import gc
import itertools
import json
import math
import multiprocessing
import os
import statistics
import sys
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bench import timing
from bench.works import Search, Work, searches, works
from sfkernels import check, launch
from sfkernels.launch import Flat, RowTile, Setting, Tile
from sfmodel.files import atomic
from sfmodel.machine import machine

BATCH = 24  # candidates timed in turn, with the default among them
SMALLEST_TILE, LARGEST_TILE = 512, 16384  # elements


def untuned(kernel: str, device: torch.device, channels: int) -> Setting:
    """The default for the nearest number of channels, whatever was measured before."""
    settings = launch.DEFAULTS[launch.architecture(device)][kernel]
    return settings[min(settings, key=lambda n: abs(math.log2(n / channels)))]


def candidates(
    default: Setting, channels: int, sums: bool = False, specialised: bool = False
) -> list[Setting]:
    """The default, then all others that make a program of their own. sums: the kernel keeps sums
    over its tiles, so that every program must loop. specialised: warps are."""
    found: list[Setting] = [default]
    if isinstance(default, Flat):
        flats = [Flat(b, w) for b in (256, 512, 1024, 2048, 4096) for w in (1, 2, 4, 8)]
        return found + [f for f in flats if (f.block, f.warps) != (default.block, default.warps)]
    if isinstance(default, Tile):
        same = replace(default, why="")
        # Where warps are specialised, a consumer has four and there are two of 64 tokens.
        fixed = (128,), (32, 64, 128), (4,), (2, 3, 4), (0, 1)
        free = (64, 128), (32, 64, 128), (4, 8), (1, 2, 3, 4), (0,)
        tiles = itertools.product(*(fixed if specialised else free))
        return found + [tile for t in tiles if (tile := Tile(*t)) != same]
    block = 2 ** math.ceil(math.log2(channels))
    few = [rows for rows in (1, 2, 4) if rows * block >= SMALLEST_TILE]
    more = [rows for rows in (8, 16, 32, 64) if rows * block <= LARGEST_TILE // 2]
    seen = {replace(default, why="")}
    for rows, per_thread, stages, warps_per_sm in itertools.product(
        few + more, (8, 16, 32), (1, 2, 3, 4), (0, 8, 16, 32, 64)
    ):
        setting = RowTile(rows, per_thread, 1, stages)
        warps = setting.warps(block)
        whole = warps * 32 * per_thread == rows * block  # not clamped
        if not whole or rows * block > LARGEST_TILE or warps_per_sm % warps:
            continue
        if not warps_per_sm and (sums or stages > 1):
            continue  # one tile a program has no next one to load, and no sums to keep
        setting = replace(setting, per_sm=warps_per_sm // warps)
        if setting not in seen:
            seen.add(setting)
            found.append(setting)
    return found


def within_bounds(search: Search, settings: Sequence[Setting], arch: int) -> list[Setting]:
    """The first setting, and those whose kernels compile and hold the bounds of `sfkernels.check`
    (all but that on narrow loads, which is a case's). All are compiled side by side, into Triton's
    cache."""
    kinds = [replace(s, per_sm=1, why="") if isinstance(s, RowTile) else s for s in settings]
    unique = list(dict.fromkeys(kinds))
    work = functools.partial(_holds_bounds, search.kernel, search.channels, arch)
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(os.cpu_count(), mp_context=context) as pool:
        fine = dict(zip(unique, pool.map(work, unique), strict=True))
    rest = zip(settings[1:], kinds[1:], strict=True)
    return [settings[0], *(setting for setting, kind in rest if fine[kind])]


def _holds_bounds(kernel: str, channels: int, arch: int, setting: Setting) -> bool:
    """Whether all kernels of a launcher compile for an architecture within its bounds."""
    fine = True

    def compile_only(
        jit: Any, _: Sequence[int], args: Sequence[Any], *, num_warps: int, **options: Any
    ) -> None:
        nonlocal fine
        out = check.Compiled(check.kernel_name(jit), "", kernel, arch, warps=num_warps)
        try:
            binary = jit.warmup(*args, grid=(1,), num_warps=num_warps, **options)
            (sass,) = check.disassemble([binary.asm["cubin"]], arch)
            check.examine(jit, binary, sass, out)
            fine = fine and not check.judge(out, narrow=sys.maxsize, may_serialise=True)
        except Exception:  # the compiler's
            fine = False

    os.environ.pop("TRITON_INTERPRET", None)
    check.use_driver(arch)
    launch.target, launch.recorder = arch, compile_only
    work = works(channels)[kernel][0]
    with using(kernel, setting):
        work.run(*work.make(torch.device("meta")))
    return fine


@contextlib.contextmanager
def using(kernel: str, setting: Setting) -> Iterator[None]:
    before = dict(launch.overrides)
    launch.overrides[kernel] = setting
    try:
        yield
    finally:
        launch.overrides.clear()
        launch.overrides.update(before)


def tune(
    search: Search, device: torch.device, deadline: float, rounds: int = 10
) -> dict[str, Any] | None:
    """The entry for tuned/sm_XX.json, or None where no candidate was timed before `deadline` (of
    time.monotonic) or the default fails."""
    default = untuned(search.kernel, device, search.channels)
    sums, specialised = search.kernel.endswith("_bwd"), search.kernel.startswith("hopper")
    every = candidates(default, search.channels, sums, specialised)
    if device.type == "cuda" and search.channels > 1:
        every = within_bounds(search, every, launch.architecture(device))
    # Milliseconds of each candidate in each size; one that is wrong or fails drops out.
    times: dict[Setting, list[float]] = {setting: [] for setting in every}
    of_copy: list[float] = []
    for work in search.works:
        if of_copy and time.monotonic() > deadline:
            break  # what is known of the first size decides
        torch.manual_seed(0)
        sets = [work.make(device) for _ in range(timing.count_sets(work.nbytes, device))]
        with using(search.kernel, default):
            want = _tensors(work.run(*sets[0]))
        right = [
            s
            for s in times
            if s == default
            # Candidates are compiled at the first size; past the deadline no further one is.
            or (
                (of_copy or time.monotonic() < deadline)
                and _agrees(search.kernel, s, work, sets[0], want)
            )
        ]
        measured: dict[Setting, float] = {}
        for start in range(0, max(len(right) - 1, 1), BATCH):
            group = [default, *right[1 + start : 1 + start + BATCH]]
            if measured and time.monotonic() > deadline:
                break
            one = timing.measure(
                [
                    timing.Contestant(
                        str(i), work.run, around=functools.partial(using, search.kernel, s)
                    )
                    for i, s in enumerate(group)
                ],
                sets,
                rounds,
            )
            anchor = one["0"]
            if isinstance(anchor, str):
                return None
            # What the clocks did between two groups shows in the default, which is in both.
            drift = anchor.p50 / measured.setdefault(default, anchor.p50)
            for i, setting in enumerate(group):
                timed = one[str(i)]
                if not isinstance(timed, str):
                    measured[setting] = timed.p50 / drift
        times = {s: [*times[s], measured[s]] for s in times if s in measured}
        copied = timing.copy_bandwidth(device, work.nbytes, rounds)
        of_copy.append(copied)
        del sets
        timing.free(device)
    if not times:
        return None
    best_of_size = [min(column) for column in zip(*times.values(), strict=True)]
    score = {
        s: statistics.mean(t / b for t, b in zip(column, best_of_size, strict=True))
        for s, column in times.items()
    }
    order = sorted(score, key=lambda s: score[s])
    best = order[0]
    why = _why(search, best, order, default, times, score, of_copy)
    entry: dict[str, Any] = {"channels": search.channels, **vars(replace(best, why=why))}
    return entry


def _why(
    search: Search,
    best: Setting,
    order: Sequence[Setting],
    default: Setting,
    times: dict[Setting, list[float]],
    score: dict[Setting, float],
    of_copy: Sequence[float],
) -> str:
    sizes = []
    for work, ms, copied in zip(search.works, times[best], of_copy, strict=False):
        rate = f"{100 * timing.gbps(work.nbytes, ms) / copied:.0f}% of a copy"
        if work.flops:
            rate = f"{work.flops / ms / 1e9:.0f} TFLOP/s"
        sizes.append(f"{1e3 * ms:.1f} us at {work.said}, {rate}")
    if len(order) > 1:
        second = order[1]
        sizes.append(f"next best {_said(second)} {score[second] / score[best]:.3f} x")
    sizes.append(f"default {score[default] / score[best]:.3f} x of {len(order)} timed")
    return "; ".join(sizes)


def _said(setting: Setting) -> str:
    return " ".join(f"{k}={v}" for k, v in vars(setting).items() if k != "why")


def _agrees(
    kernel: str,
    setting: Setting,
    work: Work,
    inputs: Sequence[Tensor],
    want: Sequence[Tensor],
) -> bool:
    """Whether a candidate computes what the default does, to a few roundings of the dtype and the
    order of sums."""
    try:
        with using(kernel, setting):
            got = _tensors(work.run(*inputs))
    except Exception as error:
        print(f"  {kernel} {_said(setting)}: {timing.reason(error)}", file=sys.stderr)
        return False
    for ours, theirs in zip(got, want, strict=True):
        eps = torch.finfo(theirs.dtype).eps if theirs.is_floating_point() else 0.0
        relative = max(4 * eps, 1e-4)
        allowed = relative * float(theirs.float().abs().max())
        if not float((ours.float() - theirs.float()).abs().max()) <= allowed:  # NaN fails too
            print(f"  {kernel} {_said(setting)}: differs from the default", file=sys.stderr)
            return False
    return True


def _tensors(out: Any) -> list[Tensor]:
    return [t for t in (out if isinstance(out, tuple | list) else [out]) if t is not None]


def write(folder: Path, arch: int, here: dict[str, Any], found: dict[str, list[Any]]) -> Path:
    """Writes sm_XX.json; kernels that were not searched keep what the file said."""
    file = folder / f"sm_{arch}.json"
    kernels = json.loads(file.read_text())["kernels"] if file.exists() else {}
    for kernel, entries in found.items():
        channels = {entry["channels"] for entry in entries}
        kept = [e for e in kernels.get(kernel, []) if e["channels"] not in channels]
        kernels[kernel] = sorted([*kept, *entries], key=lambda e: int(e["channels"]))
    with atomic(file) as part:
        part.write_text(json.dumps({"machine": here, "kernels": kernels}, indent=1) + "\n")
    return file


def run(
    device: torch.device, folder: Path, seconds: float, only: Sequence[str] = ()
) -> dict[str, list[Any]]:
    """Searches kernel after kernel until `seconds` are over, and writes after each."""
    deadline = time.monotonic() + seconds
    gc.freeze()  # capturing a graph collects garbage first, hundreds of times here
    arch, here = launch.architecture(device), machine(device)
    found: dict[str, list[Any]] = {}
    for search in searches(device):
        name = search.kernel + (f" at {search.channels} channels" * (search.channels > 1))
        if only and search.kernel not in only:
            continue
        if time.monotonic() > deadline:
            print(f"no time for {name}", flush=True)
            continue
        try:
            entry = tune(search, device, deadline)
        except RuntimeError as error:
            print(f"{name}: {timing.reason(error)}", flush=True)
            continue
        if entry is None:
            print(f"{name}: the default setting could not be timed", flush=True)
            continue
        found.setdefault(search.kernel, []).append(entry)
        write(folder, arch, here, found)
        print(f"{name}: {entry}", flush=True)
    return found


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench tune", description=__doc__)
    parser.add_argument("--seconds", type=float, default=240.0, help="in total")
    parser.add_argument("--out", type=Path, default=launch.TUNED, help="folder of sm_XX.json")
    parser.add_argument("--kernel", action="append", default=[], help="only this one")
    chosen = parser.parse_args(arguments)
    if unknown := set(chosen.kernel) - set(launch.DEFAULTS[90]):
        print(
            f"python -m bench tune: kernel {min(unknown)!r}: must be one of "
            f"{', '.join(launch.DEFAULTS[90])}",
            file=sys.stderr,
        )
        return 2
    if not torch.cuda.is_available():
        print("python -m bench tune: needs a GPU that PyTorch can use", file=sys.stderr)
        return 2
    try:
        run(torch.device("cuda"), chosen.out, chosen.seconds, chosen.kernel)
    except (ValueError, OSError) as error:
        print(f"python -m bench tune: {error}", file=sys.stderr)
        return 2
    return 0
