"""`python -m bench --quick | --gpu | --full | --verify`: many parts in one run, one report.

quick   all that is timed, at toy sizes: under two minutes on two idle cores, at most five
gpu     all that is timed, at real size on one GPU: within eight minutes, nothing is downloaded
full    the same with time for every row and every peer, after --verify: an hour and more
verify  tests, ahead-of-time checks and compute-sanitizer on a GPU: within nine minutes

Only quick has run as it stands: the others are not measured on a GPU yet, and those times are where
they are cut. Parts run one after the other in processes of their own, each with a time limit; one
that fails or is cut is reported and the rest still runs. The JSON is written after every part.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from rich.text import Text

from bench import harness, public, report, tables, timing, verify
from sfmodel.machine import describe, machine
from sfmodel.terminal import plain_console


class Step(NamedTuple):
    """run: called with a folder and its seconds, returns what came out. limit: the most of them."""

    name: str
    run: Callable[[Path, float], dict[str, Any]]
    limit: float


class Preset(NamedTuple):
    """total: seconds, of which each step takes at most its limit and what is left."""

    total: float
    steps: Sequence[Step]


# The share of its time in which a part begins a row: the rest is for the row that is under way.
BEGIN = 0.75
# Attention apart from the other kernels: a fault of the one leaves the GPU to the other.
COMMANDS = {
    "attention": ("kernels", "--only", "^attention"),
    "kernels": ("kernels", "--only", "^(?!attention)"),
}


def step(name: str, limit: float, *command: str) -> Step:
    """`python -m bench COMMAND` in a folder of the step's."""

    def run(folder: Path, seconds: float) -> dict[str, Any]:
        file = folder / f"{command[0]}.json"
        file.unlink(missing_ok=True)
        options = ["--json-only", "--seconds", str(BEGIN * seconds), "--out", str(folder)]
        begun = [sys.executable, "-m", "bench", *command, *options]
        with plain_console().status("") as status:
            out = verify.command(begun, seconds, lambda line: status.update(Text(line)))
        return out | ({"result": json.loads(file.read_text())} if file.exists() else {})

    return Step(name, run, limit)


def steps(**limits: float) -> list[Step]:
    """Parts in their order, and the seconds of each."""
    return [step(name, limit, *COMMANDS.get(name, [name])) for name, limit in limits.items()]


QUICK = ("kernels", "stream", "decode", "extrapolate", "train")
VERIFY = (
    Step("tests", verify.tests, 240),
    Step("check", verify.check, 45),
    Step("sanitizer", verify.sanitizer, 230),
)
PRESETS = {
    "quick": Preset(300, [step(name, 90, name, "--tiny") for name in QUICK]),
    "gpu": Preset(470, steps(attention=110, stream=85, decode=60, train=90, extrapolate=50,
                             kernels=240)),
    "full": Preset(7200, [*VERIFY, *steps(attention=2400, stream=1200, decode=600, train=900,
                                          extrapolate=600, kernels=1800)]),
    "verify": Preset(520, VERIFY),
}  # fmt: skip


def with_public(preset: Preset, clone: Path, tiny: bool) -> Preset:
    """The preset with a clone in its stream. Raises ValueError for a clone that cannot be measured
    and for a preset without a stream."""
    if all(one.name != "stream" for one in preset.steps):
        raise ValueError("--public goes with --quick, --gpu or --full, which measure a stream")
    public.load(clone, half=not tiny)
    command = "stream", "--public", str(clone), *["--tiny"] * tiny
    return preset._replace(steps=[
        step("stream", one.limit, *command) if one.name == "stream" else one
        for one in preset.steps
    ])  # fmt: skip


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
        say(f"{one.name}: {report.verdict(out)}")
        if not out.get("ok", True):
            print(out.get("tail", "")[-2000:], flush=True)
    return result


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit code 1 where a part failed, 130 after Ctrl-C. Raises ValueError without a needed GPU."""
    plain = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser("python -m bench", None, __doc__, formatter_class=plain)
    parser.add_argument("preset", choices=PRESETS)
    parser.add_argument("--out", type=Path, help="folder of the results, else out/PRESET")
    parser.add_argument("--public", type=Path, help="a clone that `bench stream --public` measures")
    chosen = parser.parse_args(arguments)
    name, preset = chosen.preset, PRESETS[chosen.preset]
    if name != "quick" and not torch.cuda.is_available():
        try:
            torch.cuda.init()  # says why, such as that the driver is too old
        except (RuntimeError, AssertionError) as error:
            why = str(error).splitlines()[0]
            raise ValueError(f"needs a GPU that PyTorch can use: {why}") from error
    if chosen.public:
        preset = with_public(preset, chosen.public, name == "quick")
    folder = (chosen.out or Path("out") / name).resolve()
    folder.mkdir(parents=True, exist_ok=True)
    try:
        result = run(name, preset, folder)
        console = plain_console()
        page = report.write(folder, result, console)
        overview = report.overview(result)._replace(
            title=f"--{name}: {describe(result['machine'])}"
        )
        tables.show(overview, console)
    except KeyboardInterrupt:
        kept = f"what was measured is in {folder}"
        print(f"\npython -m bench --{name}: stopped; {kept}", file=sys.stderr)
        return 130
    print(f"as JSON: {folder}/results.json; to look at: {page}")
    return 0 if all(out.get("ok", True) for out in result["parts"].values()) else 1
