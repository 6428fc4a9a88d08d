"""The commands that measure, in what they have in common: options, the file of results, progress.

A part is a module with

    run(job) -> result        measures; calls job.save after each row
    tables(result)            what it found, as tables
    figures(result)           the same as (name, figure) pairs; needs matplotlib

Its result is a JSON object: {"part", "sizes", "machine", "before", "after", "ceilings", "seconds",
"rows", "no_time_for"}, where a row is {"case": str, "contestants": {name: entry}, …} and an entry
{"ms": p50, "p99_ms", "spread", …} or {"failed": why}. A row that could not be measured says
{"case", "failed"}. "no_time_for" names rows that --seconds, spent in their order, did not reach.
"""

from __future__ import annotations

import argparse
import gc
import importlib.util
import json
import math
import re
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from bench import PARTS, figures, timing
from bench.tables import Result, show, untimed
from sfmodel.files import atomic
from sfmodel.machine import machine, state
from sfmodel.terminal import plain_console

# Implementations: the reference that defines every op, ours, and of others' the first word.
EAGER, CPP = "eager", "cpp"
OURS = ("triton", "gluon", "gluon deterministic", CPP)
PEERS = ("compile", "native", "cublaslt", "liger", "quack", "sdpa", "flash", "flex", "diffusers",
         "public")  # fmt: skip
FULL_ON_CPU = ("cpu", "decode")  # at more than toy sizes


@dataclass
class Job:
    """One run of a part. tiny: sizes that a CPU runs in seconds. seconds: nothing is begun after
    them. only: a regular expression of which something in a row's name must match. public: a clone
    of other people's code (`bench.public`). save: called with the result so far. tick: called with
    what goes on."""

    device: torch.device
    tiny: bool = False
    seconds: float = math.inf
    only: str = ""
    public: Path | None = None
    rounds: int = timing.ROUNDS
    save: Callable[[Result], None] = lambda result: None
    tick: Callable[[str], None] = lambda text: None
    began: float = field(default_factory=time.monotonic)

    @property
    def left(self) -> float:
        return self.seconds - (time.monotonic() - self.began)

    @property
    def cuda(self) -> bool:
        return self.device.type == "cuda"

    def wants(self, name: str) -> bool:
        return re.search(self.only, name) is not None

    def begin(self, part: str, dtype: torch.dtype) -> Result:
        """A result without rows: the machine, its state and its ceilings in `dtype`."""
        self.tick("ceilings")
        return {
            "part": part,
            "sizes": "toy" if self.tiny else "Wan2.1 at 480×832",
            "machine": machine(self.device),
            "before": state(self.device),
            "ceilings": timing.ceilings(self.device, dtype, self.rounds),
            "rows": [],
            "no_time_for": [],
        }

    def add(
        self,
        result: Result,
        case: str,
        measure: Callable[[], Result],
        compiled: str = "",
        needs: float = 0.0,
    ) -> None:
        """Measures a row, unless nobody asked for it or less than `needs` seconds are left; one
        that fails says why. compiled: an implementation that a row that is there is measured with
        again; where that fails, the row stays."""
        label = f"{case} with {compiled}" if compiled else case
        if not self.wants(case):
            return
        if self.left <= needs:
            result["no_time_for"].append(label)
            return
        self.tick(label)
        rows = {row["case"]: row for row in result["rows"]}
        if compiled and "failed" in rows.get(case, {"failed": ""}):
            return
        try:
            rows[case] = {"case": case, **measure()}
        except Exception as error:  # the other rows still run
            failed = {"failed": timing.reason(error)}
            if compiled:
                rows[case]["contestants"][compiled] = failed
            else:
                rows[case] = {"case": case, **failed}
        result["rows"] = [*rows.values()]
        timing.free(self.device)
        self.save(result)

    def end(self, result: Result) -> Result:
        result["after"] = state(self.device)
        result["seconds"] = time.monotonic() - self.began
        self.save(result)
        return result


def write(file: Path, result: Result) -> None:
    with atomic(file) as part:
        part.write_text(json.dumps(result, indent=1))


def draw(part: Any, result: Result, folder: Path) -> str:
    """Saves a part's figures; says what became of them."""
    if not importlib.util.find_spec("matplotlib"):
        return "no figures, which need matplotlib"
    names = []
    for name, figure in part.figures(result):
        figures.save(figure, folder / f"{name}.png")
        names.append(f"{name}.png")
    return f"figures: {', '.join(names)}" if names else "no figures: nothing was timed"


def wrong(result: Result, of_peers: bool = False) -> list[str]:
    """Implementations of ours, also those in other people's models, or others', whose result was
    not right."""

    def is_peer(name: str) -> bool:
        return name.startswith(PEERS) and not name.endswith("patched")

    return [
        f"{case}: {name}"
        for case, name, why in untimed(result)
        if name and why.startswith(timing.WRONG) and is_peer(name) == of_peers
    ]


def command(name: str, arguments: Sequence[str]) -> int:
    """`python -m bench NAME` of a part. Exit code 0; 1 where one of ours was wrong; 130 after
    Ctrl-C, which keeps what was measured. Raises ValueError for a bad argument, OSError for a file
    that cannot be written."""
    part: Any = importlib.import_module(PARTS[name])
    parser = argparse.ArgumentParser(prog=f"python -m bench {name}", description=part.__doc__)
    parser.add_argument("--seconds", type=float, default=math.inf, help="begin nothing after this")
    parser.add_argument("--only", default="", help="rows in whose name this regex is found")
    parser.add_argument("--tiny", action="store_true", help="toy sizes, as on a CPU")
    parser.add_argument("--json-only", action="store_true", help="no tables and no figures")
    parser.add_argument("--out", type=Path, default=Path("out", name), help="results' folder")
    parser.set_defaults(public=None)
    if name == "stream":
        parser.add_argument("--public", type=Path, help="a clone of Self Forcing and its like")
    chosen = parser.parse_args(arguments)
    cuda = torch.cuda.is_available() and name != "cpu"
    file = chosen.out / f"{name}.json"
    console = plain_console()
    job = Job(
        torch.device("cuda" if cuda else "cpu"),
        tiny=chosen.tiny or not (cuda or name in FULL_ON_CPU),
        seconds=chosen.seconds,
        only=chosen.only,
        public=chosen.public,
        save=lambda result: write(file, result),
    )
    if job.tiny and not cuda:
        torch.set_num_threads(1)  # toy tensors: a second thread waits longer than it computes
    gc.freeze()  # what is imported stays: the many collections between cases take no time
    try:
        re.compile(chosen.only)
        with console.status("") as status:
            if console.is_terminal:
                job.tick = lambda text: status.update(text)
            else:
                job.tick = lambda text: print(text, flush=True)
            result = part.run(job)
        drawn = "no figures were asked for"
        if not chosen.json_only:
            for table in part.tables(result):
                show(table, console)
            drawn = draw(part, result, chosen.out)
    except re.error as error:
        raise ValueError(f"--only {chosen.only!r}: {error}") from error
    except KeyboardInterrupt:
        kept = f"what was measured is in {file}" if file.exists() else "nothing was measured yet"
        print(f"\npython -m bench {name}: stopped; {kept}", file=sys.stderr)
        return 130
    ours, peers = wrong(result), wrong(result, of_peers=True)
    for row in (*ours, *peers):
        print(f"python -m bench {name}: {row} is wrong and was not timed", file=sys.stderr)
    print(f"as JSON: {file}; {drawn}")
    return 1 if ours else 0
