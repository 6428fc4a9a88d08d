"""`python -m bench --quick | --gpu | --full | --verify`: many parts in one run, one report.

quick   all that is timed, on a CPU at sizes that it runs in under two minutes
gpu     all that is timed, at real size on one GPU: within eight minutes, nothing is downloaded
full    the same with time for every row and every peer, after --verify: an hour and more
verify  tests, ahead-of-time checks and compute-sanitizer on a GPU: within nine minutes

Only quick has run as it stands: the others are not measured on a GPU yet, and those times are where
they are cut. Parts run one after the other in processes of their own, each with a time limit; one
that fails or is cut is reported and the rest still runs. The JSON is written after every part.
"""

from __future__ import annotations

import argparse
import functools
import json
import sys
import time
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from rich.console import Console

from bench import harness, process, report, timing, verify
from bench.harness import Table
from bench.report import verdict
from sfmodel.machine import describe, machine

# (folder, seconds left to it) -> what came out
Run = Callable[[Path, float], dict[str, Any]]


class Step(NamedTuple):
    """limit: the most seconds it may take."""

    name: str
    run: Run
    limit: float


class Preset(NamedTuple):
    """total: seconds, of which each step takes at most its limit and what is left."""

    total: float
    steps: tuple[Step, ...]
    needs_gpu: bool = True


def measured(name: str, arguments: Sequence[str], folder: Path, seconds: float) -> dict[str, Any]:
    """`python -m bench NAME` in a folder of the step's."""
    limit = ["--seconds", str(BEGIN * seconds), "--out", str(folder)]
    file = folder / f"{name}.json"
    file.unlink(missing_ok=True)
    console = harness.plain_console()
    with console.status("") as status:
        show = status.update if console.is_terminal else harness.nothing
        begun = [sys.executable, "-m", "bench", name, "--json-only", *limit, *arguments]
        out = process.command(begun, seconds, show)
    if file.exists():
        out["result"] = json.loads(file.read_text())
    return out


def step(name: str, limit: float, *arguments: str, command: str = "") -> Step:
    return Step(name, functools.partial(measured, command or name, arguments), limit)


# The share of its time in which a part begins a row: the rest is for the row that is under way.
BEGIN = 0.75
ATTENTION, OTHERS = ("--only", "^attention"), ("--only", "^(?!attention)")
VERIFY = (
    Step("tests", verify.tests, 240.0),
    Step("check", verify.check, 45.0),
    Step("sanitizer", verify.sanitizer, 230.0),
)
PRESETS = {
    "quick": Preset(
        115.0,
        (
            step("kernels", 60.0, "--tiny"),
            step("stream", 40.0, "--tiny"),
            step("decode", 35.0, "--tiny"),
            step("extrapolate", 40.0, "--tiny"),
            step("train", 50.0, "--tiny"),
        ),
        needs_gpu=False,
    ),
    # Attention apart from the other kernels: a fault of the one leaves the GPU to the other.
    "gpu": Preset(
        470.0,
        (
            step("attention", 110.0, *ATTENTION, command="kernels"),
            step("stream", 85.0),
            step("decode", 60.0),
            step("train", 90.0),
            step("extrapolate", 50.0),
            step("kernels", 240.0, *OTHERS),
        ),
    ),
    "full": Preset(
        7200.0,
        (
            *VERIFY,
            step("attention", 2400.0, *ATTENTION, command="kernels"),
            step("stream", 1200.0),
            step("decode", 600.0),
            step("train", 900.0),
            step("extrapolate", 600.0),
            step("kernels", 1800.0, *OTHERS),
        ),
    ),
    "verify": Preset(520.0, VERIFY),
}


def run(name: str, preset: Preset, folder: Path) -> dict[str, Any]:
    began = time.monotonic()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if device.type == "cpu":
        torch.set_num_threads(1)  # as its parts do
    result: dict[str, Any] = {"preset": name, "machine": machine(device), "parts": {}}

    def say(text: str) -> None:
        print(f"[{time.monotonic() - began:5.0f} s] {text}", flush=True)

    say(describe(result["machine"]))
    for one in preset.steps:
        seconds = min(one.limit, preset.total - (time.monotonic() - began))
        start = time.monotonic()
        if seconds < 5:
            out: dict[str, Any] = {"skipped": "no time left"}
        else:
            say(f"{one.name}, at most {seconds:.0f} s")
            try:
                out = one.run(folder / one.name, seconds)
            except Exception as error:  # the others still run
                out = {"ok": False, "end": timing.reason(error)}
        out["seconds"] = time.monotonic() - start
        result["parts"][one.name] = out
        result["seconds"] = time.monotonic() - began
        harness.write(folder / "results.json", result)
        say(f"{one.name}: {verdict(out)}")
        if not out.get("ok", True):
            print(out.get("tail", "")[-2000:], flush=True)
    return result


def overview(result: dict[str, Any]) -> Table:
    rows = [(name, f"{out['seconds']:.0f}", verdict(out)) for name, out in result["parts"].items()]
    return Table(
        f"--{result['preset']}: {describe(result['machine'])}", ("part", "seconds", ""), rows
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit code 1 where a part failed, 2 without the GPU that it needs, 130 after Ctrl-C."""
    parser = argparse.ArgumentParser(
        prog="python -m bench",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("preset", choices=PRESETS)
    parser.add_argument("--out", type=Path, help="folder of the results, else out/PRESET")
    chosen = parser.parse_args(arguments)
    name, preset = chosen.preset, PRESETS[chosen.preset]
    if preset.needs_gpu and not torch.cuda.is_available():
        print(f"python -m bench --{name}: needs a GPU that PyTorch can use{why()}", file=sys.stderr)
        return 2
    folder = (chosen.out or Path("out") / name).resolve()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        result = run(name, preset, folder)
        console: Console = harness.plain_console()
        page = report.write(folder, result, console)
        harness.show(overview(result), console)
    except KeyboardInterrupt:
        kept = f"stopped; what was measured is in {folder}"
        print(f"\npython -m bench --{name}: {kept}", file=sys.stderr)
        return 130
    except (ValueError, OSError) as error:
        print(f"python -m bench --{name}: {error}", file=sys.stderr)
        return 2
    print(f"as JSON: {folder}/results.json; to look at: {page}")
    return 0 if all(out.get("ok", True) for out in result["parts"].values()) else 1


def why() -> str:
    """What PyTorch says of a GPU that it cannot use, such as one with too old a driver."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            torch.cuda.init()
        except (RuntimeError, AssertionError) as error:
            return f": {str(error).splitlines()[0]}"
    return f": {caught[0].message}" if caught else ""
