"""`python -m bench report FILE`: a file of results as one HTML page, which needs no network, no
server and no script, with its figures beside it; and as tables in the terminal."""

from __future__ import annotations

import argparse
import base64
import functools
import importlib.util
import io
import re
from collections.abc import Callable, Sequence
from html import escape
from pathlib import Path
from typing import Any

from rich.console import Console

from bench import PARTS, compare, timing
from bench.tables import Result, Table, failures, left_out, show
from sfmodel.files import atomic
from sfmodel.machine import describe_state
from sfmodel.terminal import plain_console

NUMBER = re.compile(r"[-+−±]?\d[\d,]*(\.\d+)?(e[-+]?\d+)?\s?[%×]?")  # is set to the right
TAIL = 3000  # characters of what a failed command said last

# By part: (name, PNG) of its figures, and why there are no more.
Pictures = dict[str, tuple[list[tuple[str, bytes]], str]]

STYLE = """
:root { color-scheme: light dark }
body { font: 15px/1.5 system-ui, sans-serif; max-width: 75rem; margin: 2rem auto; padding: 0 1rem }
h2 { margin-top: 2.5rem; border-bottom: 1px solid #8888 }
nav ul { display: flex; flex-wrap: wrap; gap: 0 1.5rem; list-style: none; padding: 0 }
.wide { overflow-x: auto }
table { border-collapse: collapse; margin: 1rem 0; font-size: 13px }
caption { text-align: left; font-weight: 600; padding: .3rem .6rem }
th, td { border-bottom: 1px solid #8884; padding: .1rem .6rem; text-align: left }
td.number { text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap }
tr.new td { border-top: 1px solid #888 }
figure { margin: 1rem 0; break-inside: avoid }
img { max-width: 100%; background: #fff }
figcaption, .note { font-size: 13px; opacity: .8 }
.bad { color: #c0392b }
pre { overflow-x: auto; font-size: 12px; border-left: 3px solid #c0392b; padding-left: .6rem }
@media print { body { max-width: none; margin: 0 } .wide { overflow: visible } tr { break-inside: avoid } }
"""  # noqa: E501


def verdict(out: Result) -> str:
    """One line for a part of a run."""
    if "skipped" in out:
        return f"skipped: {out['skipped']}"
    words = ["ok" if out.get("ok", True) else f"FAILED ({out.get('end', 'no reason given')})"]
    if out.get("counts"):
        words.append(", ".join(f"{n} {what}" for what, n in out["counts"].items()))
    words += [str(failure.get("test")) for failure in out.get("failures", ())[:10]]
    words += map(str, out.get("broken", ())[:10])
    if result := out.get("result"):
        words += [f"{len(result['rows'])} rows", *failures(result)[:10]]
        if missing := result.get("no_time_for"):
            words.append(f"no time for {len(missing)} more")
    for tool in ("memcheck", "racecheck"):
        if tool in out:
            words.append(f"{tool}: {out[tool].get('skipped') or out[tool].get('end')}")
    return "; ".join(words)


def overview(content: Result) -> Table:
    """Table of the parts of a run: seconds, and how each ended."""
    rows = [
        [name, f"{out['seconds']:.0f}" if "seconds" in out else "", verdict(out)]
        for name, out in compare.parts(content).items()
    ]
    if "preset" in content:
        rows.append(["all", f"{content.get('seconds', 0):.0f}", f"preset {content['preset']}"])
    return Table("parts", ("part", "seconds", ""), rows)


def collected(
    result: Result, what: str, make: Callable[[Any], Any] = lambda one: one
) -> tuple[list[Any], str]:
    """All tables or figures of a part that could be made, and why there are no more."""
    found: list[Any] = []
    try:
        if result["part"] not in PARTS:
            raise ValueError(f"part {result['part']!r} is none of {', '.join(PARTS)}")
        module = importlib.import_module(PARTS[result["part"]])
        for one in getattr(module, what)(result):
            found.append(make(one))
    except Exception as error:
        return found, f"no {'more ' * bool(found)}{what}: {timing.reason(error)}"
    return found, ""


def png(part: str, named: tuple[str, Any]) -> tuple[str, bytes]:
    name, figure = named
    file = io.BytesIO()
    figure.savefig(file, format="png", dpi=110)
    return name if name == part else f"{part}-{name}", file.getvalue()


def pictures(content: Result) -> Pictures:
    """All figures, drawn."""
    found = compare.results(content)
    if not importlib.util.find_spec("matplotlib"):
        return dict.fromkeys(found, ([], "no figures, which need matplotlib"))
    return {n: collected(r, "figures", functools.partial(png, n)) for n, r in found.items()}


def page(content: Result, against: Result | None = None, drawn: Pictures | None = None) -> str:
    """A file of results, in the form that compare.read gives, as HTML. against: an older one.
    drawn: its pictures, where they are there already."""
    drawn = pictures(content) if drawn is None else drawn
    machine, parts = content["machine"], compare.parts(content)
    what = content.get("preset") or " ".join(parts)
    heading = f"{what} on {machine.get('device')}"
    facts = Table("machine", ("", ""), [[key, str(value)] for key, value in machine.items()])
    sections = [("summary", f"{_html(facts)}\n{_html(overview(content))}")]
    if against is not None:
        found, older = compare.compare(against, content), against["machine"]
        said = f"the older: {older.get('commit') or 'no commit'}, {older.get('date') or 'no date'}"
        body = [*map(_paragraph, (said, *found.lines)), *map(_html, found.tables)]
        sections.append(("against an older file", "\n".join(body)))
    sections += [(name, _part(out, *drawn.get(name, ([], "")))) for name, out in parts.items()]
    links = (f'<li><a href="#s{i}">{escape(name)}</a></li>' for i, (name, _) in enumerate(sections))
    bodies = (
        f'<section id="s{i}"><h2>{escape(name)}</h2>\n{text}\n</section>\n'
        for i, (name, text) in enumerate(sections)
    )
    return f"""<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8"><title>{escape(heading)}</title>
<meta name="viewport" content="width=device-width, initial-scale=1"><style>{STYLE}</style></head>
<body><h1>{escape(heading)}</h1><nav><ul>{"".join(links)}</ul></nav>
{"".join(bodies)}
</body></html>
"""


def _part(out: Result, drawn: list[tuple[str, bytes]], why: str) -> str:
    body = [_paragraph(verdict(out), "note" if out.get("ok", True) else "bad")]
    failed = [f"{f.get('test')}: {f.get('said')}" for f in out.get("failures", ())]
    failed += map(str, out.get("broken", ()))
    if result := out.get("result"):
        body.append(_paragraph(_circumstances(result)))
        for name, png in drawn:
            data = base64.b64encode(png).decode()
            body.append(f'<figure><img alt="{escape(name)}" src="data:image/png;base64,{data}">')
            body.append(f"<figcaption>{escape(name)}</figcaption></figure>")
        found, no_tables = collected(result, "tables")
        body += [*map(_html, found), *map(_paragraph, filter(None, (why, no_tables)))]
        told = [note for table in found for note in table.notes]
        if result.get("no_time_for") and not any("no time for" in note for note in told):
            body += map(_paragraph, left_out(result))
        failed += failures(result)
    if failed:
        items = "".join(f"<li>{escape(text)}</li>" for text in failed)
        body.append(f'<p class="bad">failed, or was not timed:</p><ul class="bad">{items}</ul>')
    if out.get("tail"):
        body.append(f"<pre>{escape(str(out['tail'])[-TAIL:])}</pre>")
    return "\n".join(body)


def _circumstances(result: Result) -> str:
    said = [str(result[key]) for key in ("sizes", "note") if key in result]
    ceilings = dict(result.get("ceilings") or {})
    dtype = ceilings.pop("dtype", "")
    if ceilings:
        values = ", ".join(f"{value:.4g} {key}" for key, value in ceilings.items())
        said.append(f"ceilings measured: {values} {dtype}".strip())
    if state := describe_state(result.get("before", {}), result.get("after", {})):
        said.append(f"before → after: {state}")
    return "; ".join(said)


def _paragraph(text: str, kind: str = "note") -> str:
    return f'<p class="{kind}">{escape(text)}</p>'


def _html(table: Table) -> str:
    rows = []
    for row in table.rows:
        cells = [*row]
        while len(cells) > 1 and not cells[-1]:
            cells.pop()
        rest = len(table.columns) - len(cells)
        if rest > 0 and not NUMBER.fullmatch(cells[-1]):  # such as why a contestant failed
            last = f'<td colspan="{rest + 1}">{escape(cells.pop())}</td>'
        else:
            last = "<td></td>" * rest
        kind = ' class="new"' if row[0] else ""
        rows.append(f"<tr{kind}>{''.join(map(_cell, cells))}{last}</tr>\n")
    head = "".join(f"<th>{escape(column)}</th>" for column in table.columns)
    notes = "\n".join(map(_paragraph, table.notes))
    return f"""<div class="wide"><table><caption>{escape(table.title)}</caption>
<thead><tr>{head}</tr></thead><tbody>
{"".join(rows)}</tbody></table></div>
{notes}"""


def _cell(text: str) -> str:
    return f"<td{' class=number' * bool(NUMBER.fullmatch(text))}>{escape(text)}</td>"


def write(folder: Path, content: Result, console: Console, against: Result | None = None) -> Path:
    """Shows the tables, and writes figures and report.html, which is returned. Raises OSError."""
    for result in compare.results(content).values():
        found, why = collected(result, "tables")
        for table in found:
            show(table, console)
        if why:
            console.print(f"{result['part']}: {why}", markup=False, highlight=False)
    if against is not None:
        compare.show(compare.compare(against, content), console)
    drawn = pictures(content)
    files = {f"{name}.png": png for figures, _ in drawn.values() for name, png in figures}
    files["report.html"] = page(content, against, drawn).encode()
    for name, data in files.items():
        with atomic(folder / name) as file:
            file.write_bytes(data)
    return folder / "report.html"


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench report", description=__doc__)
    parser.add_argument("file", metavar="FILE", type=Path, help="of a part or of a whole run")
    parser.add_argument("--against", metavar="OLDER", type=Path, help="a file to compare with")
    parser.add_argument("--out", type=Path, default=Path("out/report"), help="folder of the page")
    chosen = parser.parse_args(arguments)
    content = compare.read(chosen.file)
    against = compare.read(chosen.against) if chosen.against else None
    print(f"to look at: {write(chosen.out, content, plain_console(), against)}")
    return 0
