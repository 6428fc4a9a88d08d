"""Tables of what was measured: a column is a heading and what it shows of an entry."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import rich.table
from rich.console import Console
from rich.text import Text

Result = dict[str, Any]
Cell = Callable[[Result, Result], str]  # of a row and one of its entries


class Table(NamedTuple):
    """Cells are text; the first column names the row. notes: lines under the table."""

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]
    notes: Sequence[str] = ()


def show(table: Table, console: Console) -> None:
    """Texts are shown as they are: brackets are no markup."""
    shown = rich.table.Table(title=Text(table.title))
    for column in table.columns:
        shown.add_column(Text(column))
    for row in table.rows:
        shown.add_row(*map(Text, row))
    console.print(shown)
    for note in table.notes:
        console.print(note, markup=False, highlight=False)


def timed(row: Result) -> dict[str, Result]:
    """The entries of a row that have a time."""
    return {name: e for name, e in row.get("contestants", {}).items() if "ms" in e}


def untimed(result: Result) -> list[tuple[str, str, str]]:
    """(case, implementation, why) of all that failed; empty for the name of one that is a row."""
    whole = [(row["case"], "", row["failed"]) for row in result["rows"] if "failed" in row]
    return whole + [
        (row["case"], name, entry["failed"])
        for row in result["rows"]
        for name, entry in row.get("contestants", {}).items()
        if "failed" in entry
    ]


def failures(result: Result) -> list[str]:
    """Lines on all that failed, and why."""
    return [": ".join(filter(None, each)) for each in untimed(result)]


def number(value: float) -> str:
    """Three digits, and all before the point."""
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"


def microseconds(ms: float) -> str:
    return f"{1e3 * ms:.1f}" if ms < 1 else f"{1e3 * ms:.0f}"


def percent(of: float, ceiling: float | None) -> str:
    return f"{100 * of / ceiling:.0f}" if ceiling else ""


def product_unit(ceilings: Result) -> tuple[str, float]:
    """The unit of matrix products on this machine, and how many of it make a TFLOP/s."""
    return ("GFLOP/s", 1e3) if ceilings.get("matmul_tflops", 1.0) < 1 else ("TFLOP/s", 1.0)


def value(key: str, show: Callable[[float], str] = number, scale: float = 1.0) -> Cell:
    """A figure of an entry, empty where it has none."""
    return lambda _, entry: show(scale * entry[key]) if key in entry else ""


def share(key: str, ceiling: float | None) -> Cell:
    """A figure of an entry in percent of a ceiling."""
    return value(key, lambda figure: percent(figure, ceiling))


PEAK_MIB = value("peak_mib", "{:.0f}".format)


def of_entries(
    title: str, rows: Iterable[Result], columns: Mapping[str, Cell], notes: Iterable[str] = ()
) -> Table:
    """A line for each implementation of each row, or why it was not timed; a note is a star."""
    lines, starred = [], set()
    for row in rows:
        if "failed" in row:
            lines.append([row["case"], f"failed: {row['failed']}"])
        label = row["case"]
        for name, entry in row.get("contestants", {}).items():
            cells = [f"{name}: {entry['failed']}"] if "failed" in entry else [name]
            if "note" in entry:
                starred.add(f"* {entry['note']}")
                cells = [f"{name} *"]
            if "ms" in entry:
                cells += [cell(row, entry) for cell in columns.values()]
            lines.append([label, *cells])
            label = ""
    heads = "case", "", *columns
    full = [[*line, *[""] * (len(heads) - len(line))] for line in lines]
    return Table(title, heads, full, [*notes, *sorted(starred)])


def left_out(result: Result) -> list[str]:
    """A line on what there was no time for, if there is any."""
    names = result["no_time_for"]
    return [f"no time for: {', '.join(names)}"] if names else []
