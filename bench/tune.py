"""`python -m bench tune`: searches the launch settings of every kernel on this GPU, and finds which
implementation of attention "auto" shall take, each under the settings that were there before.

Candidates are compared with what the default setting computes, then timed in turn at the sizes of
Wan2.1. The best by its mean time relative to each case's best goes into tuned/sm_XX.json, with what
was measured. Check such a file with `python -m sfkernels.check --tuned` before it ships.
"""

from __future__ import annotations

import argparse
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
from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from bench import timing
from bench.ops.measure import run_case
from sfkernels import cases, check, dispatch, launch, machine_code, testing
from sfkernels.cases import CHUNK, FRAME, WINDOW, Case, Heads
from sfkernels.launch import RowTile, Setting
from sfmodel.files import atomic
from sfmodel.machine import machine

ROUNDS = 10
NO_LIMITS = dict.fromkeys(("matmul_tflops", "copy_gbps"), math.inf)
BATCH = 24  # candidates timed in turn, with the default among them


class Search(NamedTuple):
    """A kernel's setting for a number of channels (1 for elementwise kernels, for attention the
    bytes of a head's row, for linear layers and convolutions what comes out), and the cases that it
    is timed in."""

    kernel: str
    channels: int
    cases: tuple[Case, ...]
    impl: str = "triton"


# Of kernels over rows: the op whose setting it is.
_FORMS = {"residual_norm": "gated_adaln", "qk_norm_rope": "qk_norm_rope", "norm": "rms_norm",
          "adaln": "adaln"}  # fmt: skip
ROWS = {f"{form}_{way}": op for way in ("fwd", "bwd") for form, op in _FORMS.items()}
ROWS["quantize_rows"] = "quantize_rows"
# Of the video decoder: frames and pixels of a frame in a chunk, channels.
LEVELS = ((12, 480 * 832, 96), (12, 240 * 416, 192), (6, 120 * 208, 384))
STREAMS = tuple(cases.ring_attention(Heads(), frames, WINDOW) for frames in (CHUNK, 1))
# By op: where its implementations are timed.
CONTESTS = {
    "cross_attention": tuple(cases.cross_attention(Heads(), n * FRAME, 512) for n in (CHUNK, 1)),
    "ring_attention": STREAMS,
}


def searches(device: torch.device) -> Iterator[Search]:
    """The most valuable first: what runs most often per frame."""
    dtype = torch.float32 if device.type == "cpu" else torch.bfloat16
    clip = (cases.training(Heads(), 9, backward=True),)
    same_bits = (cases.training(Heads(), 9, backward=True, deterministic=True),)
    for prefix, impl in (("attention", "triton"), ("hopper", "gluon")):
        if impl == "triton" or launch.architecture(device) == 90:
            yield Search(f"{prefix}_fwd", 256, STREAMS, impl)
            yield Search(f"{prefix}_dkdv", 256, same_bits, impl)
            yield Search(f"{prefix}_dq", 256, same_bits, impl)
    if launch.architecture(device) == 90:
        yield Search("hopper_bwd", 256, clip, "gluon")
    for outputs, inputs in ((8960, (1536,)), (1536, (8960, 1536)), (4608, (1536,))):
        layer = functools.partial(cases.linear, gelu=outputs == 8960, dtype=torch.bfloat16)
        sizes = itertools.product((CHUNK * FRAME, 2 * CHUNK * FRAME), inputs)
        yield Search("linear", outputs, tuple(layer(*size, outputs) for size in sizes))
    for size in cases.CONVOLUTIONS[:3]:
        yield Search("causal_conv3d", size[4], (cases.causal_conv3d(*size, dtype),))
    for channels in (1536, 5120):
        for kernel, op in ROWS.items():
            backward = kernel.endswith("_bwd")
            of = tuple(_rows(op, frames, channels, dtype, backward) for frames in (CHUNK, WINDOW))
            yield Search(kernel, channels, of)
    for level in LEVELS:
        for way, backward in (("fwd", False), ("bwd", True)):
            case = cases.rms_norm_silu(*level, dtype, backward, bias=False)
            yield Search(f"norm_silu_{way}", level[2], (case,))
    yield Search("sampler", 1, (cases.sampler_step("drawn noise"),))


def _rows(op: str, frames: int, channels: int, dtype: torch.dtype, backward: bool) -> Case:
    if op == "quantize_rows":
        return cases.quantize_rows(frames * FRAME, channels, dtype, torch.int8)
    if op == "qk_norm_rope":
        return cases.qk_norm_rope(frames, FRAME, channels, 128, dtype, backward)
    return cases.normalisation(op, frames, FRAME, channels, dtype, backward)


def within_bounds(search: Search, settings: Sequence[Setting], arch: int) -> list[Setting]:
    """The first setting, and those whose kernels compile, side by side and into Triton's cache, and
    hold the bounds of `sfkernels.check` (all but that on narrow loads, which is a case's)."""
    kinds = [replace(s, per_sm=1, why="") if isinstance(s, RowTile) else s for s in settings]
    unique = list(dict.fromkeys(kinds))
    work = functools.partial(_holds_bounds, search.kernel, search.channels, arch)
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(os.cpu_count(), mp_context=context) as pool:
        fine = dict(zip(unique, pool.map(work, unique), strict=True))
    rest = zip(settings[1:], kinds[1:], strict=True)
    return [settings[0], *(setting for setting, kind in rest if fine[kind])]


def _holds_bounds(kernel: str, channels: int, arch: int, setting: Setting) -> bool:
    """True where all kernels of a launcher compile for an architecture within its bounds."""
    fine = True

    def compile_only(
        jit: Any, _: Sequence[int], args: Sequence[Any], *, num_warps: int, **options: Any
    ) -> None:
        nonlocal fine
        out = check.Compiled(check.kernel_name(jit), "", kernel, arch, warps=num_warps)
        try:
            binary = jit.warmup(*args, grid=(1,), num_warps=num_warps, **options)
            (sass,) = machine_code.disassemble([binary.asm["cubin"]], arch)
            check.examine(jit, binary, sass, out, options)
            fine = fine and not check.judge(out, narrow=sys.maxsize, may_serialise=True)
        except Exception:  # the compiler's
            fine = False

    os.environ.pop("TRITON_INTERPRET", None)
    check.use_driver(arch)
    launch.target, launch.recorder = arch, compile_only
    meta = torch.device("meta")
    (search,) = (s for s in searches(meta) if (s.kernel, s.channels) == (kernel, channels))
    with launch.using(**{kernel: setting}):
        search.cases[0].launch(search.impl, meta)
    return fine


def tune(search: Search, device: torch.device, deadline: float) -> dict[str, Any] | None:
    """The entry for tuned/sm_XX.json, or None where no candidate was timed before `deadline` (of
    time.monotonic) or the default fails."""
    default = launch.untuned(search.kernel, device, search.channels)
    sums, specialised = search.kernel.endswith("_bwd"), search.kernel.startswith("hopper")
    every = launch.candidates(default, search.channels, sums, specialised)
    if device.type == "cuda" and search.channels > 1:
        every = within_bounds(search, every, launch.architecture(device))
    # Milliseconds of each candidate in each case; one that is wrong or fails drops out.
    times: dict[Setting, list[float]] = {setting: [] for setting in every}
    of_copy: list[float] = []
    for case in search.cases:
        if of_copy and time.monotonic() > deadline:
            break  # what is known of the first case decides
        measured = time_in(case, search, [*times], device, deadline, bool(of_copy))
        times = {s: [*times[s], measured[s]] for s in times if s in measured}
        of_copy.append(timing.copy_bandwidth(device, case.nbytes, ROUNDS))
        timing.free(device)
    if not times:
        return None
    score = scores(times)
    best, *others = sorted(score, key=score.__getitem__)
    why = []
    for case, ms, copied in zip(search.cases, times[best], of_copy, strict=False):
        rate = f"{100 * case.nbytes / ms / 1e6 / copied:.0f}% of a copy"
        if not isinstance(default, RowTile | launch.Flat):
            rate = f"{case.flops / ms / 1e9:.0f} TFLOP/s"
        why.append(f"{1e3 * ms:.1f} us at {case.size}, {rate}")
    if others:
        why.append(f"next best {_said(others[0])} {score[others[0]] / score[best]:.3f} x")
    why.append(f"default {score[default] / score[best]:.3f} x of {len(score)} timed")
    return {"channels": search.channels, **vars(replace(best, why="; ".join(why)))}


def scores(times: dict[Any, list[float]]) -> dict[Any, float]:
    """The mean over the cases of each one's time relative to the best."""
    best = [min(column) for column in zip(*times.values(), strict=True)]
    return {
        one: statistics.mean(t / b for t, b in zip(column, best, strict=True))
        for one, column in times.items()
    }


def rank(op: str, device: torch.device) -> list[str]:
    """Implementations of an op that are right in every case of CONTESTS, the fastest first."""
    times: dict[str, list[float]] = {
        name: [] for name in dispatch.RANKED if name in dispatch.implementations(op)
    }
    for case in CONTESTS[op]:
        known = [timing.Implementation(name, case.by(name)) for name in times]
        entries = run_case(case, device, NO_LIMITS, ROUNDS, known=known)["contestants"]
        times = {n: [*times[n], e["ms"]] for n, e in entries.items() if "ms" in e}
        timing.free(device)
    return sorted(times, key=scores(times).__getitem__)


def time_in(
    case: Case,
    search: Search,
    settings: Sequence[Setting],
    device: torch.device,
    deadline: float,
    compiled: bool,
) -> dict[Setting, float]:
    """Milliseconds of those settings that agree with the first, the default; of none if that
    fails. Past the deadline none is compiled that is not already, and no further group is timed."""
    torch.manual_seed(0)
    op, default = case.by(search.impl), settings[0]
    sets = [case.make(device) for _ in range(timing.count_sets(case.nbytes, device))]
    upstream: list[Tensor] = []

    def under(setting: Setting) -> AbstractContextManager[None]:
        return launch.using(**{search.kernel: setting})

    def results(setting: Setting) -> list[Tensor]:
        with under(setting):
            return testing.results(op, sets[0], upstream)

    def agrees(setting: Setting) -> bool:
        """True where one computes what the default does, to a few roundings."""
        try:
            for ours, theirs in zip(results(setting), want, strict=True):
                eps = torch.finfo(theirs.dtype).eps if theirs.is_floating_point() else 0.0
                allowed = max(4 * eps, 1e-4) * float(theirs.float().abs().max())
                worst = float((ours.float() - theirs.float()).abs().max())
                assert worst <= allowed, f"{worst:.1e} from the default"  # NaN fails too
        except Exception as error:
            print(f"  {_said(setting)}: {timing.reason(error)}", file=sys.stderr)
            return False
        return True

    want = results(default)
    if case.backward:
        upstream += [torch.randn_like(out) for out in want]
        want = results(default)
    right = [s for s in settings[1:] if (compiled or time.monotonic() < deadline) and agrees(s)]
    grads = [upstream] * len(sets) if case.backward else None
    measured: dict[Setting, float] = {}
    for start in range(0, max(len(right), 1), BATCH):
        if measured and time.monotonic() > deadline:
            break
        group = {str(i): s for i, s in enumerate([default, *right[start : start + BATCH]])}
        several = [
            timing.Implementation(name, op, grads, functools.partial(under, setting))
            for name, setting in group.items()
        ]
        found = timing.measure(several, sets, ROUNDS)
        anchor = found["0"]
        if isinstance(anchor, str):
            return {}
        # What the clocks did between two groups shows in the default, which is in both.
        drift = anchor.p50 / measured.setdefault(default, anchor.p50)
        for name, timed in found.items():
            if not isinstance(timed, str):
                measured[group[name]] = timed.p50 / drift
    return measured


def _said(setting: Setting) -> str:
    return " ".join(f"{k}={v}" for k, v in vars(setting).items() if k != "why")


def write(
    folder: Path, arch: int, here: dict[str, Any], found: dict[str, list[Any]], **order: list[str]
) -> Path:
    """Writes sm_XX.json: entries of kernels, and the order of an op's implementations; others keep
    what the file said."""
    file = folder / f"sm_{arch}.json"
    said = json.loads(file.read_text()) if file.exists() else {"kernels": {}}
    kernels = said["kernels"]
    for kernel, entries in found.items():
        channels = {entry["channels"] for entry in entries}
        kept = [e for e in kernels.get(kernel, []) if e["channels"] not in channels]
        kernels[kernel] = sorted([*kept, *entries], key=lambda e: int(e["channels"]))
    with atomic(file) as part:
        said |= {"machine": here, "kernels": kernels, "impl": said.get("impl", {}) | order}
        part.write_text(json.dumps(said, indent=1) + "\n")
    return file


def run(
    device: torch.device, folder: Path, seconds: float, only: Sequence[str] = ()
) -> dict[str, list[Any]]:
    """Ranks implementations, searches kernel after kernel until `seconds` are over, and writes
    after each."""
    deadline = time.monotonic() + seconds
    gc.freeze()  # capturing a graph collects garbage first, hundreds of times here
    arch, here = launch.architecture(device), machine(device)
    found: dict[str, list[Any]] = {}
    for op in CONTESTS:
        if not only or op in only:
            order = rank(op, device)
            write(folder, arch, here, {}, **{op: order})
            print(f"{op}: {', '.join(order)}", flush=True)
    for search in searches(device):
        if only and search.kernel not in only:
            continue
        name = search.kernel + (f" at {search.channels} channels" * (search.channels > 1))
        if time.monotonic() > deadline:
            print(f"no time for {name}", flush=True)
            continue
        try:
            entry = tune(search, device, deadline)
            if entry:
                found.setdefault(search.kernel, []).append(entry)
                write(folder, arch, here, found)
            print(f"{name}: {entry or 'the default setting could not be timed'}", flush=True)
        except RuntimeError as error:
            print(f"{name}: {timing.reason(error)}", flush=True)
    return found


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench tune", description=__doc__)
    parser.add_argument("--seconds", type=float, default=240.0, help="in total")
    parser.add_argument("--out", type=Path, default=launch.TUNED, help="folder of sm_XX.json")
    parser.add_argument("--kernel", action="append", default=[], help="only this, or this op")
    chosen = parser.parse_args(arguments)
    names = *launch.DEFAULTS[90], *CONTESTS
    if unknown := set(chosen.kernel) - {*names}:
        raise ValueError(f"kernel {min(unknown)!r}: must be one of {', '.join(names)}")
    if not torch.cuda.is_available():
        raise ValueError("needs a GPU that PyTorch can use")
    run(torch.device("cuda"), chosen.out, chosen.seconds, chosen.kernel)
    return 0
