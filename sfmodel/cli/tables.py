"""Tables of the command line: drawn in a terminal, the same without colours elsewhere."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from sfmodel.extras import needed

with needed():
    from rich.console import Console
    from rich.table import Table


def show(out: Console, title: str, columns: str, rows: Iterable[Sequence[Any]]) -> None:
    """Prints a table. columns: their heads, with | between them."""
    made = Table()
    for i, column in enumerate(columns.split("|")):
        made.add_column(column, justify="right" if i else "left")
    for row in rows:
        made.add_row(*(_said(cell) for cell in row))
    out.print(title, made, sep="\n")


def _said(cell: Any) -> str:
    return f"{cell:.{1 if cell >= 10 else 2}f}" if isinstance(cell, float) else str(cell)
