"""`python -m bench kernels`: every kernel beside eager PyTorch, torch.compile of the same reference
and PyTorch's own fused op, at the shapes of Wan2.1, as a share of what a copy reaches.

A contestant is compared with the float64 reference by the rule of parity.py first; one that
is wrong is reported and not timed.
"""

from __future__ import annotations

import argparse
import functools
import json
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table
from torch import Tensor

import sfkernels as sf
from bench import timing
from bench.machine import machine, said
from bench.parity import close_as_eager
from sfmodel.files import atomic

LARGE_COPY = 2**31  # bytes read and written
GRID = (30, 52)  # tokens of a frame of Wan2.1 at 480×832
WINDOW = 21  # frames of a ring, and of a clip


@dataclass
class Case:
    """op: an sf function of (*tensors, impl=...). make: new tensors on a device. nbytes: every
    tensor that has to be read or written, once. native: PyTorch's own op of the same tensors."""

    name: str
    shape: str
    op: Callable[..., Any]
    make: Callable[[torch.device], list[Tensor]]
    nbytes: int
    native: Callable[..., Any] | None = None
    backward: bool = False
    compiled: bool = False

    @property
    def label(self) -> str:
        return f"{self.name}{' backward' if self.backward else ''} {self.shape}"


@dataclass(frozen=True)
class Sizes:
    """What is run: (frames, tokens of a frame, channels, head dim) of each shape, those that
    torch.compile and the backward pass get, and the sampler's latents."""

    shapes: tuple[tuple[int, int, int, int], ...]
    compiled: tuple[tuple[int, int, int, int], ...]
    latents: tuple[int, ...]
    dtype: torch.dtype


_N = GRID[0] * GRID[1]
CHUNK, ONE, CLIP = (3, _N, 1536, 128), (1, _N, 1536, 128), (WINDOW, _N, 1536, 128)
FULL = Sizes((CHUNK, CLIP, ONE, (3, _N, 5120, 128)), (CHUNK, CLIP), (16, 60, 104), torch.bfloat16)
TINY = Sizes(((3, 16, 96, 32),), ((3, 16, 96, 32),), (4, 6, 8), torch.float32)


def norm_bytes(rows: int, channels: int, tensors: int, size: int) -> int:
    """Of `tensors` activations [rows, channels] with elements of `size` bytes. Modulations and
    weights are a thousandth of that and left out."""
    return rows * channels * tensors * size


def cases(sizes: Sizes) -> Iterator[Case]:
    """The most telling first, so that a time limit cuts the rest."""
    for shape in sizes.shapes:
        for backward in (False, True) if shape in sizes.compiled else (False,):
            yield from _norm_cases(shape, sizes, backward)
            yield from _rope_cases(shape, sizes, backward)
        if shape == sizes.shapes[0]:
            yield from _sampler_cases(sizes)


def _norm_cases(shape: tuple[int, int, int, int], sizes: Sizes, backward: bool) -> Iterator[Case]:
    frames, per_frame, channels, _ = shape
    tokens, size = frames * per_frame, sizes.dtype.itemsize

    def x(device: torch.device) -> Tensor:
        return torch.randn(1, tokens, channels, device=device).to(sizes.dtype)

    def weight(device: torch.device) -> Tensor:
        return torch.randn(channels, device=device).to(sizes.dtype)

    def modulation(device: torch.device) -> list[Tensor]:
        return [*torch.randn(1, frames, 3, channels, device=device).unbind(2)]

    native_layer_norm = functools.partial(_layer_norm, channels)
    native_rms_norm = functools.partial(_rms_norm, channels)
    # op, tensors, activations read and written forward and backward, PyTorch's own
    forms: list[tuple[Any, Callable[[torch.device], list[Tensor]], int, int, Any]] = [
        (sf.adaln, lambda d: [x(d), *modulation(d)[:2]], 2, 3, None),
        (sf.gated_adaln, lambda d: [x(d), x(d), *modulation(d)], 4, 6, None),
        (
            sf.gated_layer_norm,
            lambda d: [x(d), x(d), modulation(d)[0], weight(d), weight(d)],
            4,
            6,
            None,
        ),
        (sf.layer_norm, lambda d: [x(d), weight(d), weight(d)], 2, 3, native_layer_norm),
        (sf.rms_norm, lambda d: [x(d), weight(d)], 2, 3, native_rms_norm),
    ]
    for op, make, forward_rows, backward_rows, native in forms:
        yield Case(
            op.__name__,
            f"{tokens} x {channels}",
            op,
            make,
            norm_bytes(tokens, channels, backward_rows if backward else forward_rows, size),
            native,
            backward,
            shape in sizes.compiled,
        )


def _layer_norm(channels: int, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return F.layer_norm(x, (channels,), weight, bias, 1e-6)


def _rms_norm(channels: int, x: Tensor, weight: Tensor) -> Tensor:
    return F.rms_norm(x, (channels,), weight, 1e-6)


def _append(*tensors: Tensor, impl: str) -> tuple[Tensor, ...]:
    """The rings are returned too, to be compared."""
    return sf.qk_norm_rope_append(*tensors, impl=impl), *tensors[4:6]


def _rope_cases(shape: tuple[int, int, int, int], sizes: Sizes, backward: bool) -> Iterator[Case]:
    frames, per_frame, channels, head_dim = shape
    tokens, heads, size = frames * per_frame, channels // head_dim, sizes.dtype.itemsize
    grid = (1, per_frame)
    compiled = shape in sizes.compiled
    table_bytes = tokens * head_dim * 4

    def qkv(device: torch.device) -> list[Tensor]:
        made = torch.randn(1, tokens, 3 * channels, device=device).to(sizes.dtype)
        weights = torch.randn(2, channels, device=device).to(sizes.dtype)
        frame = torch.arange(frames, device=device)
        table = sf.rope_table(frame, grid, head_dim, impl="reference")
        return [made, *weights, table]

    def with_ring(device: torch.device) -> list[Tensor]:
        ring = torch.zeros(2, 1, WINDOW * per_frame, heads, head_dim, device=device)
        return [*qkv(device), *ring.to(sizes.dtype), torch.arange(frames, device=device) + 2]

    said_shape = f"{tokens} x {channels}"
    if backward:
        nbytes = 8 * tokens * channels * size + table_bytes  # dq, dk, dv, q, k; dqkv
        yield Case("qk_norm_rope", said_shape, _of_trained, qkv, nbytes, None, True, compiled)
        return
    nbytes = 6 * tokens * channels * size + table_bytes
    if frames < WINDOW:
        yield Case("qk_norm_rope_append", said_shape, _append, with_ring, nbytes, None, False,
                   compiled)  # fmt: skip
    if compiled:
        yield Case("qk_norm_rope", said_shape, sf.qk_norm_rope, qkv, nbytes, None, False, True)


def _of_trained(qkv: Tensor, q_weight: Tensor, k_weight: Tensor, table: Tensor, impl: str) -> Any:
    """The table is no leaf of the backward pass."""
    return sf.qk_norm_rope(qkv, q_weight, k_weight, table.detach(), impl=impl)


def _sampler_cases(sizes: Sizes) -> Iterator[Case]:
    chunk, clip = (1, 3, *sizes.latents), (1, WINDOW, *sizes.latents)

    def latents(device: torch.device, count: int, shape: Sequence[int] = chunk) -> list[Tensor]:
        return [*torch.randn(count, *shape, device=device)]

    def sigmas(device: torch.device) -> list[Tensor]:
        return [torch.tensor(0.9, device=device), torch.tensor(0.6, device=device)]

    def drawn(
        x: Tensor, flow: Tensor, sigma: Tensor, after: Tensor, seed: Tensor, frame: Tensor,
        impl: str,
    ) -> Any:  # fmt: skip
        return sf.sampler_step(x, flow, sigma, after, sf.Noise(seed, frame, 1), impl=impl)

    def given(
        x: Tensor, flow: Tensor, noise: Tensor, sigma: Tensor, after: Tensor, impl: str
    ) -> Any:
        return sf.sampler_step(x, flow, sigma, after, noise, impl=impl)

    def make_drawn(device: torch.device) -> list[Tensor]:
        seed = torch.tensor([7], device=device)
        return [*latents(device, 2), *sigmas(device), seed, torch.arange(3, device=device)]

    def frames_only(device: torch.device) -> list[Tensor]:
        return [torch.arange(3, device=device) + 100]

    def table(frame: Tensor, impl: str) -> Tensor:
        return sf.rope_table(frame, GRID if sizes is FULL else (2, 3), 128, impl=impl)

    elements, every = torch.Size(chunk).numel(), torch.Size(clip).numel()
    shape = "x".join(map(str, chunk[1:]))
    yield Case("sampler_step, given noise", shape, given,
               lambda d: [*latents(d, 3), *sigmas(d)], 5 * 4 * elements, compiled=True)  # fmt: skip
    yield Case("sampler_step, drawn noise", shape, drawn, make_drawn, 4 * 4 * elements)
    yield Case("dmd_gradient", "x".join(map(str, clip[1:])), sf.dmd_gradient,
               lambda d: latents(d, 3, clip), 4 * 4 * every, compiled=True)  # fmt: skip
    tokens = 3 * (_N if sizes is FULL else 6)
    yield Case("rope_table", f"{tokens} x 128", table, frames_only, tokens * 128 * 4)


def run(
    device: torch.device,
    sizes: Sizes,
    seconds: float = 300.0,
    rounds: int = timing.ROUNDS,
    progress: Callable[[dict[str, Any]], None] = lambda _: None,
    only: str = "",
) -> dict[str, Any]:
    """All cases whose label contains `only`, until `seconds` are over. progress: called with the
    result so far after each. Cases that found no time are listed."""
    began = time.monotonic()
    large = LARGE_COPY if device.type == "cuda" else 2**22
    result: dict[str, Any] = {
        "machine": machine(device),
        "copy_gbps": timing.copy_bandwidth(device, large, rounds),
        "rows": [],
        "no_time_for": [],
    }
    copies: dict[int, float] = {}
    rows: dict[str, dict[str, Any]] = {}
    chosen = [case for case in cases(sizes) if only in case.label]
    # Compiling takes most of the time: first all cases without, then what is left of it again with.
    again = [case for case in chosen if case.compiled and device.type == "cuda"]
    for case, compiled in [*((c, False) for c in chosen), *((c, True) for c in again)]:
        if time.monotonic() - began > seconds:
            result["no_time_for"].append(case.label + " with torch.compile" * compiled)
            continue
        try:
            if case.nbytes not in copies:
                copies[case.nbytes] = timing.copy_bandwidth(device, case.nbytes, rounds)
            row = run_case(case, device, rounds, compiled)
            row["same_size_copy_gbps"] = copies[case.nbytes]
        except Exception as error:  # the other cases still run
            row = {"case": case.label, "failed": timing.reason(error)}
        rows[case.label] = row
        result["rows"] = [*rows.values()]
        if device.type == "cuda":
            torch.cuda.empty_cache()
        progress(result)
    result["seconds"] = time.monotonic() - began
    return result


def run_case(
    case: Case, device: torch.device, rounds: int = timing.ROUNDS, compiled: bool = False
) -> dict[str, Any]:
    """Checks all contestants of a case and times those that are right."""
    torch.manual_seed(0)
    inputs = case.make(device)
    functions: dict[str, Callable[..., Any]] = {}
    if device.type == "cuda":
        functions["triton"] = functools.partial(case.op, impl="triton")
    functions["eager"] = functools.partial(case.op, impl="reference")
    if compiled and device.type == "cuda":
        torch._dynamo.reset()  # one entry for each op, not a growing list of guards
        functions["compile"] = torch.compile(
            functools.partial(case.op, impl="reference"),
            mode="max-autotune-no-cudagraphs",
            dynamic=False,
        )
    if case.native is not None:
        functions["native"] = case.native
    functions = {name: functools.partial(sequence, f) for name, f in functions.items()}

    with torch.no_grad():
        outs = sequence(functools.partial(case.op, impl="reference"), *_copies(inputs))
    upstream = [torch.randn_like(o) for o in outs] if case.backward else []
    exact = results(functools.partial(sequence, functools.partial(case.op, impl="reference")),
                    [_double(t) for t in inputs], [u.double() for u in upstream])  # fmt: skip
    eager = results(functions["eager"], inputs, upstream)
    failed: dict[str, str] = {}
    for name, function in functions.items():
        try:
            ours = results(function, inputs, upstream)
            for i, triple in enumerate(zip(ours, eager, exact, strict=True)):
                close_as_eager(f"result {i}", *triple)
        except Exception as error:
            failed[name] = f"wrong, not timed: {timing.reason(error)}"
    del exact, eager, outs

    sets = [inputs] + [case.make(device) for _ in range(timing.count_sets(case.nbytes, device) - 1)]
    right = [
        timing.Contestant(name, function, [upstream] * len(sets) if case.backward else None)
        for name, function in functions.items()
        if name not in failed
    ]
    times = timing.measure(right, sets, rounds)
    row: dict[str, Any] = {"case": case.label, "bytes": case.nbytes, "sets": len(sets)}
    row["contestants"] = {name: {"failed": said} for name, said in failed.items()}
    for name, time_of in times.items():
        row["contestants"][name] = (
            {"failed": time_of}
            if isinstance(time_of, str)
            else {
                "us": 1e3 * time_of.p50,
                "p99_us": 1e3 * time_of.p99,
                "gbps": timing.gbps(case.nbytes, time_of.p50),
                **({"note": time_of.note} if time_of.note else {}),
            }
        )
    return row


def results(
    function: Callable[..., Sequence[Tensor]], inputs: Sequence[Tensor], upstream: Sequence[Tensor]
) -> list[Tensor]:
    """Outputs without `upstream`, else the gradients of all inputs that have one."""
    leaves = _copies(inputs)
    if not upstream:
        with torch.no_grad():
            return [*function(*leaves)]
    for leaf in leaves:
        leaf.requires_grad_(leaf.is_floating_point())
    wanted = [leaf for leaf in leaves if leaf.requires_grad]
    grads = torch.autograd.grad(function(*leaves), wanted, upstream, allow_unused=True)
    return [g for g in grads if g is not None]


def sequence(function: Callable[..., Any], *tensors: Tensor) -> tuple[Tensor, ...]:
    out = function(*tensors)
    return (out,) if isinstance(out, Tensor) else (*out,)


def _copies(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Ops that write into their arguments must not see what another one wrote."""
    return [t.detach().clone() for t in tensors]


def _double(t: Tensor) -> Tensor:
    return t.double() if t.is_floating_point() else t


def report(result: dict[str, Any], console: Console) -> None:
    title = f"{said(result['machine'])}; a large copy: {result['copy_gbps']:.0f} GB/s"
    table = Table("case", "", "us", "p99", "GB/s", "% of large copy", "% of same-size copy",
                  "time / ours", title=title)  # fmt: skip
    for row in result["rows"]:
        if "failed" in row:
            table.add_row(row["case"], f"failed: {row['failed']}")
            continue
        contestants = row["contestants"]
        ours = contestants.get("triton", contestants["eager"]).get("us")
        for i, (name, c) in enumerate(contestants.items()):
            label = row["case"] if i == 0 else ""
            if "failed" in c:
                table.add_row(label, f"{name}: {c['failed']}")
                continue
            table.add_row(
                label,
                name + (" *" if "note" in c else ""),
                f"{c['us']:.1f}",
                f"{c['p99_us']:.1f}",
                f"{c['gbps']:.0f}",
                f"{100 * c['gbps'] / result['copy_gbps']:.0f}",
                f"{100 * c['gbps'] / row['same_size_copy_gbps']:.0f}",
                f"{c['us'] / ours:.2f}" if ours else "",
            )
    console.print(table)
    notes = {c["note"] for row in result["rows"] for c in row.get("contestants", {}).values()
             if "note" in c}  # fmt: skip
    for note in sorted(notes):
        console.print(f"* {note}")
    if result["no_time_for"]:
        console.print(f"no time for: {', '.join(result['no_time_for'])}")


COLOURS = {"eager": "#cccccc", "compile": "#e08a3c", "native": "#8aa86b", "triton": "#3b6ea5"}


def plot(result: dict[str, Any], path: Path) -> None:
    """Bandwidth of every contestant beside that of a copy of as many bytes."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    rows = [r for r in reversed(result["rows"]) if "contestants" in r]
    figure, ax = pyplot.subplots(figsize=(9, 1.2 + 0.42 * len(rows)), layout="constrained")
    for y, row in enumerate(rows):
        timed = {n: c for n, c in row["contestants"].items() if "gbps" in c}
        names = [n for n in COLOURS if n in timed]
        for i, name in enumerate(names):
            share = 100 * timed[name]["gbps"] / row["same_size_copy_gbps"]
            height = 0.8 / len(names)
            bar = ax.barh(y + 0.4 - (i + 0.5) * height, share, height, color=COLOURS[name])
            ax.bar_label(bar, [f"{timed[name]['us']:.0f} µs"], fontsize=6, padding=2)
    ax.axvline(100, color="#888888", linewidth=0.8, linestyle="--")
    ax.set_yticks(range(len(rows)), [row["case"] for row in rows], fontsize=8)
    ax.set_xlabel("% of the bandwidth of a copy of as many bytes", fontsize=8)
    ax.set_ylim(-0.6, len(rows) - 0.4)
    patches = [matplotlib.patches.Patch(color=c, label=n) for n, c in COLOURS.items()]
    figure.legend(handles=patches, loc="outside upper center", ncols=len(patches), fontsize=8)
    ax.set_title(said(result["machine"]), fontsize=8)
    with atomic(path) as part:
        figure.savefig(part, format="png", dpi=110)
    pyplot.close(figure)


def plain_console() -> Console:
    console = Console()
    if not console.is_terminal:
        console.width = 140
    return console


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench kernels", description=__doc__)
    parser.add_argument("--seconds", type=float, default=300.0, help="start no case after this")
    parser.add_argument("--only", default="", help="cases whose name contains this")
    parser.add_argument("--out", type=Path, default=Path("out/kernels"), help="folder of the JSON")
    chosen = parser.parse_args(arguments)
    cuda = torch.cuda.is_available()
    file = chosen.out / "kernels.json"

    def save(result: dict[str, Any]) -> None:
        with atomic(file) as part:
            part.write_text(json.dumps(result, indent=1))

    try:
        device = torch.device("cuda" if cuda else "cpu")
        result = run(
            device, FULL if cuda else TINY, chosen.seconds, progress=save, only=chosen.only
        )
        save(result)
    except (ValueError, OSError) as error:
        print(f"python -m bench kernels: {error}", file=sys.stderr)
        return 2
    report(result, plain_console())
    plot(result, chosen.out / "kernels.png")
    print(f"as JSON: {file}; as a figure: {chosen.out / 'kernels.png'}")
    return 0
