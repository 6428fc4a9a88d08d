"""`python -m bench attention`: attention of streaming and of training beside what else computes it,
at the shapes of Wan2.1, as a share of what a matrix product reaches.

Every contestant is compared with float64 first (see `check`); one that is wrong is reported and not
timed. Shapes: B batch (1 here), L queries, S keys, H heads, D head dim.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import importlib.util
import json
import os
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

import sfkernels as sf
from bench import kernels, timing
from bench.attention_cases import FULL, TINY, Case, Inputs, Sizes, cases, exact, plainly
from bench.machine import machine, said
from bench.parity import close_as_eager
from sfmodel.files import atomic

MATMUL = 8192  # rows and columns of the product that is the ceiling
ENOUGH = 7.5e13  # operations after which a contestant is timed well: about a quarter of a second
FEWEST = 6  # rounds of the longest cases
COMPILING = 60.0  # seconds that compiling FlexAttention for a case may take: not begun with less

OURS = ("triton", "gluon")
SDPA = {
    "sdpa cudnn": SDPBackend.CUDNN_ATTENTION,
    "sdpa flash": SDPBackend.FLASH_ATTENTION,
    "sdpa efficient": SDPBackend.EFFICIENT_ATTENTION,
}
FLASH_ATTN = ("flash_attn_interface", "flash_attn")  # version 3; 2 and 4


def contestants(case: Case, device: torch.device, compiled: bool) -> list[timing.Contestant]:
    """Ours first."""
    found: list[timing.Contestant] = []

    def enter(name: str, op: Callable[..., Any], around: Any = contextlib.nullcontext) -> None:
        found.append(timing.Contestant(name, functools.partial(kernels.sequence, op), None, around))

    on_gpu = device.type == "cuda"
    if on_gpu or interpreted():
        enter("triton", functools.partial(case.ours, impl="triton"))
    if not on_gpu:
        enter("reference", functools.partial(case.ours, impl="reference"))
        enter("sdpa", functools.partial(plainly, case, "sdpa"))
        return found
    if torch.cuda.get_device_capability(device)[0] == 9:
        enter("gluon", functools.partial(case.ours, impl="gluon"))
    for name, backend in SDPA.items():
        enter(
            name, functools.partial(plainly, case, "sdpa"), functools.partial(sdpa_kernel, backend)
        )
    if case.ours is sf.ring_attention:  # the length read on the device, as ours
        enter("sdpa varlen", functools.partial(case.ours, impl="sdpa"))
    if any(importlib.util.find_spec(name) for name in FLASH_ATTN):
        enter("flash-attn", functools.partial(plainly, case, "flash"))
    if compiled:
        enter("flex", flex(case, device))
    return found


def interpreted() -> bool:
    return os.environ.get("TRITON_INTERPRET") == "1"


def flex(case: Case, device: torch.device) -> Callable[..., Tensor]:
    """FlexAttention, tuned. It masks only those blocks that are seen in part."""
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    torch._dynamo.reset()  # one entry for each case, not a growing list of guards
    attend = torch.compile(flex_attention, mode="max-autotune-no-cudagraphs", dynamic=False)
    mask = None
    if case.layout is not None and case.layout.pairs < case.layout.tokens**2:
        length = case.layout.tokens
        mask = create_block_mask(visible(case.layout), None, None, length, length, device)

    def run(*tensors: Tensor) -> Tensor:
        q, k, v = (t.transpose(1, 2) for t in case.plain(*tensors))
        return attend(q, k, v, block_mask=mask).transpose(1, 2)

    return run


def visible(layout: sf.BlockLayout) -> Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]:
    """A layout of equal chunks as FlexAttention's mask_mod."""
    (size,) = set(layout.chunks)
    assert not layout.hide_first
    tokens, frames, sink = layout.frame_tokens, layout.frames, layout.sink
    newest = frames if layout.window is None else layout.window - sink

    def mask_mod(batch: Tensor, head: Tensor, q: Tensor, k: Tensor) -> Tensor:
        q_frame, k_frame = q // tokens, k // tokens
        q_chunk = q_frame % frames // size
        own = q_frame // size == k_frame // size
        past = (k_frame < frames) & (k_frame // size < q_chunk)
        return own | past & ((k_frame >= (q_chunk + 1) * size - newest) | (k_frame < sink))

    return mask_mod


def results(case: Case, op: Callable[..., Any], inputs: Inputs, upstream: Inputs) -> list[Tensor]:
    """o, or the gradients of q and of the keys and values that take one."""
    first, *rest = kernels.results(op, inputs, upstream)
    return [first, *(t[:, -case.own :] for t in rest)]


def check(got: Inputs, eager: Inputs, want: Inputs, head: int) -> None:
    """Raises AssertionError unless one head, drawn at random, obeys the rule of parity.py at every
    token, and all heads are as close to eager PyTorch as two that obey it: float64 of all heads
    would cost more than what is timed."""
    one = slice(head, head + 1)
    names = ("o",) if len(got) == 1 else ("dq", "dk", "dv")
    for name, ours, theirs, exactly in zip(names, got, eager, want, strict=True):
        close_as_eager(f"{name} of head {head}", ours[:, :, one], theirs[:, :, one], exactly)
        eager_error = float((theirs[:, :, one] - exactly).abs().max())
        eps = torch.finfo(theirs.dtype).eps
        allowed = 4 * (eager_error + eps * float(exactly.abs().max()))
        worst = float((ours.float() - theirs.float()).abs().max())
        assert worst <= allowed, (  # NaN fails too
            f"{name} is {worst:.2e} from eager PyTorch in some head, allowed {allowed:.2e}"
        )


def run_case(
    case: Case, device: torch.device, rounds: int = timing.ROUNDS, compiled: bool = False
) -> dict[str, Any]:
    """Checks all contestants of a case and times those that are right."""
    torch.manual_seed(0)
    inputs = case.make(device)
    upstream = [torch.randn_like(inputs[0])] if case.backward else []
    head = int(torch.randint(inputs[0].shape[2], ()))
    want = exact(case, inputs, upstream, head)
    by_reference = functools.partial(plainly, case, "reference")
    eager = results(case, functools.partial(kernels.sequence, by_reference), inputs, upstream)
    failed: dict[str, str] = {}
    right: list[timing.Contestant] = []
    for contestant in contestants(case, device, compiled):
        try:
            with contestant.around():
                got = results(case, contestant.forward, inputs, upstream)
            check(got, eager, want, head)
            right.append(contestant)
        except Exception as error:
            wrong = "wrong, not timed: " * isinstance(error, AssertionError)
            failed[contestant.name] = wrong + timing.reason(error)
        got = []
    del want, eager

    count = timing.count_sets(case.nbytes, device)
    sets = [inputs, *(case.make(device) for _ in range(count - 1))]
    for contestant in right:
        contestant.upstream = [upstream] * count if case.backward else None
    rounds = min(rounds, max(FEWEST, int(ENOUGH / (case.flops * count))))
    times = timing.measure(right, sets, rounds)
    row: dict[str, Any] = {"case": case.label, "flops": case.flops, "sets": count}
    row |= {"rounds": rounds, "contestants": {}}
    for contestant in right:
        row["contestants"][contestant.name] = entry(case.flops, times[contestant.name])
    row["contestants"] |= {name: {"failed": why} for name, why in failed.items()}
    return row | best(row["contestants"])


def entry(flops: int, time_of: timing.Timing | str) -> dict[str, Any]:
    if isinstance(time_of, str):
        return {"failed": time_of}
    return {
        "us": 1e3 * time_of.p50,
        "p99_us": 1e3 * time_of.p99,
        "tflops": flops / time_of.p50 / 1e9,
        **({"note": time_of.note} if time_of.note else {}),
    }


def best(entries: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """The fastest of ours and of the others, and the time of the one as a multiple of the
    other's: above 1, ours is faster. Where no kernel of ours is timed, the reference stands in."""
    timed = {name: e["us"] for name, e in entries.items() if "us" in e}
    ours = [name for name in OURS if name in timed] or [n for n in ("reference",) if n in timed]
    peers = [name for name in timed if name not in (*OURS, *ours)]
    out: dict[str, Any] = {
        "best_ours": min(ours, key=lambda n: timed[n], default=None),
        "best_peer": min(peers, key=lambda n: timed[n], default=None),
    }
    if ours and peers:
        out["peer_over_ours"] = timed[out["best_peer"]] / timed[out["best_ours"]]
    return out


def matmul_tflops(device: torch.device, size: int, dtype: torch.dtype, rounds: int) -> float:
    """Of a square matrix product by PyTorch, timed as any contestant."""
    sets = [[torch.randn(size, size, device=device).to(dtype) for _ in range(2)] for _ in range(2)]
    timed = timing.measure([timing.Contestant("matmul", torch.matmul)], sets, rounds)["matmul"]
    if isinstance(timed, str):
        raise RuntimeError(f"the matrix product could not be timed: {timed}")
    return 2 * size**3 / timed.p50 / 1e9


def run(
    device: torch.device,
    sizes: Sizes,
    seconds: float = 600.0,
    rounds: int = timing.ROUNDS,
    progress: Callable[[dict[str, Any]], None] = lambda _: None,
    only: str = "",
) -> dict[str, Any]:
    """All cases whose label contains `only`, until `seconds` are over. progress: called with the
    result so far after each. Cases that found no time are listed."""
    began = time.monotonic()
    on_gpu = device.type == "cuda"
    result: dict[str, Any] = {
        "machine": machine(device),
        "matmul_tflops": matmul_tflops(device, MATMUL if on_gpu else 256, sizes.dtype, rounds),
        "rows": [],
        "no_time_for": [],
    }
    rows: dict[str, dict[str, Any]] = {}
    chosen = [case for case in cases(sizes) if only in case.label]
    # Compiling takes most of the time: first all cases without FlexAttention, then what is left of
    # it again with, and first those patterns that it is made for.
    again = [case for case in chosen if case.compiled and on_gpu]
    again.sort(key=lambda case: (case.layout is None, not case.backward))
    for case, compiled in [*((c, False) for c in chosen), *((c, True) for c in again)]:
        if time.monotonic() - began > seconds - COMPILING * compiled:
            result["no_time_for"].append(case.label + " with FlexAttention" * compiled)
            continue
        try:
            rows[case.label] = run_case(case, device, rounds, compiled)
        except Exception as error:  # the other cases still run
            failed = {"failed": timing.reason(error)}
            if compiled and "contestants" in rows[case.label]:
                rows[case.label]["contestants"]["flex"] = failed
            else:
                rows[case.label] = {"case": case.label, **failed}
        result["rows"] = [*rows.values()]
        if on_gpu:
            torch.cuda.empty_cache()
        progress(result)
    result["seconds"] = time.monotonic() - began
    return result


def report(result: dict[str, Any], console: Console) -> None:
    ceiling = result["matmul_tflops"]
    title = f"{said(result['machine'])}; a matrix product: {ceiling:.3g} TFLOP/s"
    table = Table("case", "", "us", "p99", "TFLOP/s", "% of product", "time / ours",
                  "peer / ours", title=title)  # fmt: skip
    for row in result["rows"]:
        if "failed" in row:
            table.add_row(row["case"], f"failed: {row['failed']}")
            continue
        entries = row["contestants"]
        ours = entries[row["best_ours"]]["us"] if row["best_ours"] else None
        ratio = f"{row['peer_over_ours']:.2f}" if "peer_over_ours" in row else ""
        for i, (name, e) in enumerate(entries.items()):
            label, ratio = (row["case"], ratio) if i == 0 else ("", "")
            if "failed" in e:
                table.add_row(label, f"{name}: {e['failed']}", *[""] * 5, ratio)
                continue
            table.add_row(
                label,
                name + (" *" if "note" in e else ""),
                f"{e['us']:.1f}",
                f"{e['p99_us']:.1f}",
                f"{e['tflops']:.3g}",
                f"{100 * e['tflops'] / ceiling:.0f}",
                f"{e['us'] / ours:.2f}" if ours else "",
                ratio,
            )
    console.print(table)
    every = [e for row in result["rows"] for e in row.get("contestants", {}).values()]
    for note in sorted({e["note"] for e in every if "note" in e}):
        console.print(f"* {note}")
    if result["no_time_for"]:
        console.print(f"no time for: {', '.join(result['no_time_for'])}")


COLOURS = {
    "reference": "#cccccc",
    "sdpa": "#8aa86b",
    "sdpa cudnn": "#4f7a3a",
    "sdpa flash": "#8aa86b",
    "sdpa efficient": "#c3d6a8",
    "sdpa varlen": "#a99bc7",
    "flash-attn": "#c96a6a",
    "flex": "#e08a3c",
    "gluon": "#1f3f66",
    "triton": "#3b6ea5",
}


LABEL = {"facecolor": "white", "edgecolor": "none", "pad": 0.5}  # legible over a line


def plot(result: dict[str, Any], path: Path) -> None:
    """TFLOP/s of every contestant in two columns, beside those of a matrix product."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    groups = []
    for row in result["rows"]:
        timed = {n: e for n, e in row.get("contestants", {}).items() if "tflops" in e}
        groups.append((row["case"], [(n, timed[n]) for n in COLOURS if n in timed]))
    groups = [(case, bars) for case, bars in groups if bars]
    lines = [len(bars) + 1 for _, bars in groups]
    first = sum(sum(lines[:i]) < sum(lines) / 2 for i in range(len(groups)))
    columns = [groups[:first], groups[first:]]
    tallest = max((sum(len(bars) + 1 for _, bars in column) for column in columns), default=1)
    figure, axes = pyplot.subplots(1, 2, figsize=(14, 1.2 + 0.125 * tallest), layout="constrained")
    ceiling = result["matmul_tflops"]
    fastest = max((e["tflops"] for _, bars in groups for _, e in bars), default=0.0)
    for ax, column in zip(axes, columns, strict=True):
        at, ticks = 0, []
        for case, bars in column:
            ticks.append((at + (len(bars) - 1) / 2, case.replace(", ", "\n", 1)))
            for name, e in bars:
                bar = ax.barh(at, e["tflops"], 0.9, color=COLOURS[name])
                text = f"{e['tflops']:.3g}  ({e['us']:.0f} µs)"
                ax.bar_label(bar, [text], fontsize=6, padding=2, bbox=LABEL)
                at += 1
            at += 1
        ax.axvline(ceiling, color="#888888", linewidth=0.8, linestyle="--", zorder=0)
        ax.set_yticks([y for y, _ in ticks], [case for _, case in ticks], fontsize=7)
        ax.tick_params(axis="x", labelsize=7)
        ax.set_xlabel("TFLOP/s (dashed: a matrix product)", fontsize=8)
        ax.set_xlim(0, 1.25 * max(ceiling, fastest))
        ax.set_ylim(tallest - 0.5, -1)
    present = {name for _, bars in groups for name, _ in bars}
    patches = [
        matplotlib.patches.Patch(color=c, label=n) for n, c in COLOURS.items() if n in present
    ]
    if patches:
        figure.legend(handles=patches, loc="outside lower center", ncols=len(patches), fontsize=8)
    figure.suptitle(said(result["machine"]), fontsize=8)
    with atomic(path) as part:
        figure.savefig(part, format="png", dpi=110)
    pyplot.close(figure)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench attention", description=__doc__)
    parser.add_argument("--seconds", type=float, default=600.0, help="start no case after this")
    parser.add_argument("--only", default="", help="cases whose name contains this")
    parser.add_argument(
        "--out", type=Path, default=Path("out/attention"), help="folder of the JSON"
    )
    chosen = parser.parse_args(arguments)
    cuda = torch.cuda.is_available()
    file, figure = chosen.out / "attention.json", chosen.out / "attention.png"

    def save(result: dict[str, Any]) -> None:
        with atomic(file) as part:
            part.write_text(json.dumps(result, indent=1))

    sizes = FULL if cuda else TINY
    rounds = timing.ROUNDS if cuda or not interpreted() else 1  # its times say nothing
    try:
        device = torch.device("cuda" if cuda else "cpu")
        result = run(device, sizes, chosen.seconds, rounds, save, chosen.only)
        save(result)
        report(result, kernels.plain_console())
        if importlib.util.find_spec("matplotlib"):
            plot(result, figure)
            drawn = f"as a figure: {figure}"
        else:
            drawn = "no figure, which needs matplotlib"
    except (ValueError, OSError) as error:
        print(f"python -m bench attention: {error}", file=sys.stderr)
        return 2
    print(f"as JSON: {file}; {drawn}")
    return 0
