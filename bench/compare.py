"""`python -m bench compare OLD NEW`: what got faster, slower or broken from one file of results to
another, beyond noise.

Contestants that are not ours tell what the machine did: their code is the same in both. Its drift
is the median of their new over old times. A contestant is slower or faster where its own ratio,
divided by the drift, is off 1 by more than its noise, the largest of three standard errors of a
ratio of medians; three standard deviations of those others' ratios (from their median deviation);
and 5%: the same code was 4.4% apart in two runs on one H200. Where the second is the largest, the
machine was shared, and its moods last for a row: there a contestant must also be off the others of
its row by that much, with which it was timed in turn.
"""

from __future__ import annotations

import argparse
import json
import math
import re
import statistics
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from rich.console import Console

from bench import tables, timing
from bench.tables import Result, Table
from sfmodel.terminal import plain_console

OURS = ("triton", "gluon", "cpp", "wan", "tiny")
REFERENCE = ("eager", "reference")
VERSIONS = ("device", "driver", "python", "torch", "triton", "sfkernels")
LEAST = 0.05  # noise
DRIFT = 0.02  # is worth a line above this
DEVIATION = 1.48  # standard deviation / median absolute deviation, of a normal distribution
MEDIAN = 0.93  # standard error of a median of n normal values, times √n / interquartile range
LISTED = 20


class Key(NamedTuple):
    """contestant: empty for a row that failed as a whole, case too for a part that did."""

    part: str
    case: str
    contestant: str


class Change(NamedTuple):
    """times: new over old time, without the drift. failed: why; it was timed before."""

    key: Key
    old_ms: float | None
    new_ms: float = math.nan
    times: float = math.inf
    noise: float = 0.0
    failed: str = ""


class Comparison(NamedTuple):
    """lines: what there is to say beside the table. changes: the worst first."""

    lines: list[str]
    changes: list[Change]
    compared: int

    @property
    def code(self) -> int:
        """The command's: 1 where something got slower or failed, 2 where nothing was compared."""
        return int(any(change.times > 1 for change in self.changes)) if self.compared else 2

    @property
    def tables(self) -> list[Table]:
        """One of what changed, if anything did."""
        rows = []
        for key, old, new, times, noise, failed in self.changes:
            found = [f"{new:.4g}", f"{100 * (times - 1):+.1f}%", f"±{100 * noise:.1f}%"]
            last = [f"FAILED: {failed}"] if failed else found
            rows.append([*key, f"{old:.4g}" if old else "", *last])
        columns = ("part", "case", "contestant", "old ms", "new ms", "time without drift", "noise")
        return [Table("what changed", columns, rows)] if rows else []


def read(path: Path) -> Result:
    """A file of results: of one part, or of a whole run, {"machine", "preset", "parts": {name:
    {"ok", "end", "seconds", "result"?, "skipped"?, …}}}. Raises ValueError with one sentence for
    anything else."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ValueError(f"cannot read {path}: {error.strerror}") from error
    except (ValueError, RecursionError) as error:  # also of text that is not UTF-8
        raise ValueError(f"{path} is not JSON: {error}") from error
    try:
        compare(content, content)  # has whatever is looked for
    except (LookupError, TypeError, AttributeError) as error:
        raise ValueError(f"{path} is not a file of results as `python -m bench` writes") from error
    return dict(content)


def parts(content: Result) -> dict[str, Result]:
    """The parts of a run, by name; a part's own file is a run of that part."""
    found: dict[str, Result] = content.get("parts", {})
    return found if "parts" in content else {content["part"]: {"result": content}}


def results(content: Result) -> dict[str, Result]:
    return {name: out["result"] for name, out in parts(content).items() if "result" in out}


def is_by(implementations: Iterable[str], contestant: str) -> bool:
    """True where `contestant` is one of them, such as "triton, graph" of "triton"."""
    return re.split(r"\W", contestant)[0] in implementations


def _steady(key: Key) -> bool:
    """True where our kernels have no part in it. Models run by them, but the reference's."""
    if key.part in ("kernels", "decode", "cpu"):
        return not is_by(OURS, key.contestant)
    return is_by(REFERENCE, key.contestant)


def milliseconds(entry: Result) -> float | None:
    """None where it was not timed."""
    ms = entry.get("ms")
    usable = isinstance(ms, (int, float)) and 0 < ms < math.inf and "failed" not in entry
    return ms if usable else None


def compare(old: Result, new: Result) -> Comparison:
    before, after = dict(_entries(old)), dict(_entries(new))
    changes: list[Change] = []
    for name, was in parts(old).items():
        now = parts(new).get(name, {})
        if was.get("ok", True) and not now.get("ok", True):
            changes.append(Change(Key(name, "", ""), None, failed=now.get("end", "no reason")))
    pairs: dict[Key, tuple[float, float]] = {}
    for key, entry in before.items():
        ms, found = milliseconds(entry), after.get(key, after.get(key._replace(contestant="")))
        if ms is None or found is None:
            continue
        if new_ms := milliseconds(found):
            pairs[key] = ms, new_ms
        else:
            changes.append(Change(key, ms, failed=found.get("failed", "not timed")))
    compared = len(pairs) + len(changes)

    others = [math.log(b / a) for key, (a, b) in pairs.items() if _steady(key)]
    others = others or [math.log(b / a) for a, b in pairs.values()] or [0.0]
    drift = math.exp(middle := statistics.median(others))
    moods = 3 * DEVIATION * statistics.median(abs(one - middle) for one in others)
    for key, (a, b) in pairs.items():
        times, noise = b / a / drift, max(LEAST, moods, _noise(before[key], after[key]))
        beside = _beside(key, pairs) if moods > LEAST else None
        if abs(times - 1) > noise and (beside is None or abs(b / a / beside - 1) > noise):
            changes.append(Change(key, a, b, times, noise))
    changes.sort(key=lambda change: -change.times)

    # What one file does not say is no difference.
    said = [(name, old["machine"].get(name), new["machine"].get(name)) for name in VERSIONS]
    sizes = {name: result.get("sizes") for name, result in results(new).items()}
    said += [(f"sizes of {k}", r.get("sizes"), sizes.get(k)) for k, r in results(old).items()]
    differ = [f"{name} {a} → {b}" for name, a, b in said if a != b and None not in (a, b)]
    lines = [f"not the same: {'; '.join(differ)}"] if differ else []
    if abs(drift - 1) > DRIFT:
        way = "slower" if drift > 1 else "faster"
        by = f"{abs(drift - 1):.1%} {way} by the median of what is not ours"
        lines.append(f"the machine is {by}, which the comparison leaves out")
    if moods > LEAST:
        lines.append(f"the machine had moods of ±{moods:.0%}, which hide what is smaller")
    if not compared:
        lines.append("nothing to compare: no contestant was timed in both")
    elif not changes:
        lines.append(f"no change ({compared} compared)")
    else:
        kinds = ["failed" if c.failed else "slower" if c.times > 1 else "faster" for c in changes]
        counts = ", ".join(f"{kinds.count(kind)} {kind}" for kind in dict.fromkeys(kinds))
        lines.append(f"{counts} of {compared} compared")
    for which, names in (("old", _only(before, after)), ("new", _only(after, before))):
        if names:
            more = f" and {len(names) - LISTED} more" if len(names) > LISTED else ""
            lines.append(f"only in the {which} file: {'; '.join(names[:LISTED])}{more}")
    return Comparison(lines, changes, compared)


def _entries(content: Result) -> Iterator[tuple[Key, Result]]:
    """With the number of rounds."""
    for result in results(content).values():
        for row in result["rows"]:
            if "failed" in row:
                yield Key(result["part"], row["case"], ""), {"failed": row["failed"]}
            for name, entry in row.get("contestants", {}).items():
                rounds = row.get("rounds") or len(entry.get("steady_ms", ())) or timing.ROUNDS
                yield Key(result["part"], row["case"], name), {"rounds": rounds, **entry}


def _beside(key: Key, pairs: dict[Key, tuple[float, float]]) -> float | None:
    """The median ratio of the others of a row: of those that are not ours, if there are any."""
    row = {one: b / a for one, (a, b) in pairs.items() if one[:2] == key[:2] and one != key}
    ratios = [ratio for one, ratio in row.items() if _steady(one)] or [*row.values()]
    return statistics.median(ratios) if ratios else None


def _noise(*entries: Result) -> float:
    """The 99th percentile's distance, which is more, stands for a spread that is not there."""
    errors = []
    for entry in entries:
        spread = entry.get("spread", entry.get("p99_ms", entry["ms"]) / entry["ms"] - 1)
        errors.append(MEDIAN * spread / math.sqrt(max(entry["rounds"], 1)))
    return 3 * math.hypot(*errors)


def _only(here: Iterable[Key], there: Iterable[Key]) -> list[str]:
    """Rows, or where a row is in both, contestants. All are in one that failed as a whole."""
    rows = {key[:2] for key in there}
    whole = {key[:2] for key in (*here, *there) if not key.contestant}
    missing = [key for key in here if key not in there and key[:2] not in rows & whole]
    return [*dict.fromkeys(": ".join(key if key[:2] in rows else key[:2]) for key in missing)]


def show(found: Comparison, console: Console) -> None:
    for line in found.lines:
        console.print(line, markup=False, highlight=False)
    for table in found.tables:
        tables.show(table, console)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench compare", description=__doc__)
    parser.add_argument("old", metavar="OLD", type=Path, help="a file of results")
    parser.add_argument("new", metavar="NEW", type=Path, help="another of the same parts")
    chosen = parser.parse_args(arguments)
    found = compare(read(chosen.old), read(chosen.new))
    show(found, plain_console())
    return found.code
