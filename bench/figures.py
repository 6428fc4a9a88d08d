"""Figures of what was measured. All need matplotlib, which is imported where one is drawn."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from bench.tables import Result, timed
from sfmodel.files import atomic
from sfmodel.machine import describe

BLUE, ORANGE, GREY, LIGHT = "#3b6ea5", "#e08a3c", "#888888", "#bbbbbb"
COLOURS = {
    "eager": "#cccccc", "reference": "#cccccc", "compile": ORANGE, "native": "#8aa86b",
    "cublaslt": "#8aa86b", "liger": "#c96a6a", "quack": "#a99bc7", "sdpa": "#8aa86b",
    "sdpa cudnn": "#4f7a3a", "sdpa cudnn split": "#2f5220", "sdpa flash": "#8aa86b",
    "sdpa efficient": "#c3d6a8", "sdpa math": "#dddddd", "sdpa varlen": "#a99bc7",
    "flash-attn": "#c96a6a", "flex": ORANGE, "flex flash": "#b8651f", "gluon": "#1f3f66",
    "gluon deterministic": "#5c7fa8", "triton": BLUE, "cpp": BLUE,
}  # fmt: skip
LABEL = {"facecolor": "white", "edgecolor": "none", "pad": 0.5}  # legible over a line


def new(title: str, width: float, height: float, rows: int = 1, columns: int = 1,
        **options: Any) -> tuple[Any, list[Any]]:  # fmt: skip
    """A figure of so many inches, and its axes row by row."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False, **options)
    figure.suptitle(title, fontsize=8)
    return figure, [*axes.flat]


def legend(figure: Any, colours: Mapping[str, str]) -> None:
    """Names colours, below the axes."""
    from matplotlib.patches import Patch

    patches = [Patch(color=colour, label=name) for name, colour in colours.items()]
    figure.legend(handles=patches, loc="outside lower center", ncols=len(patches), fontsize=8)


def save(figure: Any, file: Path) -> None:
    """Writes a PNG. Logarithmic heights are labelled in plain numbers."""
    from matplotlib.ticker import LogLocator, NullFormatter

    for axis in (ax.yaxis for ax in figure.axes if ax.get_yscale() == "log"):
        axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axis.set_major_formatter("{x:g}")
        axis.set_minor_formatter(NullFormatter())
    with atomic(file) as part:
        figure.savefig(part, format="png", dpi=110)


def race(
    name: str,
    result: Result,
    rows: Iterable[Result],
    bar: Callable[[Result, Result], tuple[float, str]],
    ceiling: float,
    label: str,
    colours: Mapping[str, str] = COLOURS,
) -> Iterator[tuple[str, Any]]:
    """The implementations of each row as bars beside a ceiling, in two columns: (name, figure), or
    nothing where none was timed. bar: length and text for a row's entry."""
    groups = [(row["case"], {n: bar(row, timed(row)[n]) for n in colours if n in timed(row)})
              for row in rows if timed(row)]  # fmt: skip
    if not groups:
        return
    lines = [len(bars) + 1 for _, bars in groups]
    first = sum(sum(lines[:i]) < sum(lines) / 2 for i in range(len(groups)))
    columns = [column for column in (groups[:first], groups[first:]) if column]
    tallest = max(sum(len(bars) + 1 for _, bars in column) for column in columns)
    size = 7 * len(columns), 1.4 + 0.135 * tallest
    figure, axes = new(describe(result["machine"]), *size, columns=len(columns))
    longest = max(length for _, bars in groups for length, _ in bars.values())
    for ax, column in zip(axes, columns, strict=True):
        at, ticks = 0, {}
        for case, bars in column:
            short = case.removeprefix("attention, ").replace(", ", "\n", 1)
            ticks[at + (len(bars) - 1) / 2] = short
            for one, (length, text) in bars.items():
                drawn = ax.barh(at, length, 0.9, color=colours[one])
                ax.bar_label(drawn, [text], fontsize=6, padding=2, bbox=LABEL)
                at += 1
            at += 1
        ax.axvline(ceiling, color=GREY, linewidth=0.8, linestyle="--", zorder=0)
        ax.set_yticks([*ticks], [*ticks.values()], fontsize=7)
        ax.tick_params(axis="x", labelsize=7)
        ax.set_xlabel(label, fontsize=8)
        ax.set_xlim(0, 1.25 * max(ceiling, longest))
        ax.set_ylim(tallest - 0.5, -1)
    present = {one for _, bars in groups for one in bars}
    legend(figure, {one: colour for one, colour in colours.items() if one in present})
    yield name, figure
