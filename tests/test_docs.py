"""The documentation builds as a site whose links lead somewhere, with nothing from elsewhere."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest

import sfkernels
from docs import hooks
from sfkernels.cases import Heads

ROOT = Path(__file__).parent.parent


class Page(HTMLParser):
    """links: where a page leads; loaded: what it needs to be shown; anchors: what others may lead
    to."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.links: list[str] = []
        self.loaded: list[str] = []
        self.anchors: set[str] = set()
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = {name: value for name, value in attrs if value}
        if "id" in given:
            self.anchors.add(given["id"])
        if tag == "a" and "href" in given:
            self.links.append(given["href"])
        elif tag == "link" and "href" in given:
            self.loaded.append(given["href"])
        elif "src" in given:
            self.loaded.append(given["src"])


def broken(site: Path) -> Iterator[str]:
    """A line for each link of a site that leads nowhere, and for what is loaded from elsewhere."""
    pages = {file.resolve(): Page(file.read_text()) for file in site.rglob("*.html")}
    for file, page in pages.items():
        name = file.relative_to(site.resolve())
        for target in (*page.links, *page.loaded):
            parts = urlsplit(target)
            if parts.scheme or parts.netloc:
                if target in page.loaded:
                    yield f"{name} loads {target}"
                elif parts.scheme not in ("http", "https") or "." not in parts.netloc:
                    yield f"{name}: {target} is no address"
                continue
            path = unquote(parts.path)  # "/" begins those of the page for what is not there
            there = (site / path[1:] if path.startswith("/") else file.parent / path).resolve()
            there = file if not path else there / "index.html" if there.is_dir() else there
            if not there.is_file():
                yield f"{name}: there is no {target}"
            elif parts.fragment and unquote(parts.fragment) not in pages[there].anchors:
                yield f"{name}: there is no anchor {target}"


def test_the_site(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "mkdocs", "build", "--strict"]
    built = subprocess.run(
        [*command, "--site-dir", tmp_path], cwd=ROOT, capture_output=True, text=True,
        env=os.environ | {"NO_MKDOCS_2_WARNING": "1"},
    )  # fmt: skip
    assert not built.returncode, built.stderr
    assert not [*broken(tmp_path)]
    api = Page((tmp_path / "api/sfkernels.html").read_text()).anchors
    assert {f"sfkernels.{name}" for name in sfkernels.__all__} <= api
    tables = [file.name for file in tmp_path.rglob("*.html") if "<table" in file.read_text()]
    assert {"kernels.html", "hardware.html"} <= {*tables}
    assert not [*tmp_path.rglob("*.py")]


@pytest.mark.parametrize(
    ("link", "said"),
    [
        ('<a href="b.html#there">', ""),
        ('<a href="https://example.org/x">', ""),
        ('<a href="#mine"><p id="mine">', ""),
        ('<a href="c.html">', "a.html: there is no c.html"),
        ('<a href="b.html#gone">', "a.html: there is no anchor b.html#gone"),
        ('<a href="#gone">', "a.html: there is no anchor #gone"),
        ('<a href="https://nowhere/">', "a.html: https://nowhere/ is no address"),
        ('<img src="gone.png">', "a.html: there is no gone.png"),
        ('<script src="//cdn.example.org/a.js">', "a.html loads //cdn.example.org/a.js"),
    ],
)
def test_what_is_broken(link: str, said: str, tmp_path: Path) -> None:
    (tmp_path / "a.html").write_text(link)
    (tmp_path / "b.html").write_text('<h1 id="there">')
    assert [*broken(tmp_path)] == [said] * bool(said)


def test_floors_are_those_of_an_h200() -> None:
    """Of four activations of 4680 × 1536 in bfloat16 at 4.3 TB/s, and of a chunk over a ring of 21
    frames at 790 TFLOP/s: 4·D·H for each of its pairs."""
    by_bytes, by_products = ("\n".join(hooks.floors(of)) for of in (True, False))
    moved = 4 * 4680 * 1536 * 2
    assert f"| gated_adaln 4680 × 1536 | {moved / 1e6:.3g} |" in by_bytes
    assert f"| {moved / 4.3e12 * 1e6:.3g} |" in by_bytes
    flops = 4 * 128 * 12 * 4680 * 7 * 4680
    row = f"| attention, 4680 queries, ring of 21 frames | 230 | {flops / 1e9:.0f} |"
    assert f"{row} {flops / 790e12 * 1e6:.0f} |" in by_products
    assert Heads().flops(4680 * 7 * 4680) == flops


def test_measured_is_what_results_say() -> None:
    on, times = hooks.measured()
    assert on.startswith("NVIDIA H200, PyTorch ") and "bench/results/" in on
    assert set(times) & {case.label for case in hooks.cases()}
    shown = {case.label for case in hooks.cases() if case.label in times}
    rows = "\n".join((*hooks.floors(True), *hooks.floors(False)))
    assert rows.count(hooks.NOT_MEASURED) == len([*hooks.cases()]) - len(shown)


def test_an_argument_keeps_its_line() -> None:
    lines = hooks.in_lines("What it is.\n\na, b [B, L]: first.\nc_d: second, of\nmany: not so.")
    assert lines.split("  \n") == [
        "What it is.\n\na, b [B, L]: first.",
        "c_d: second, of\nmany: not so.",
    ]


def test_training_beside_figure_6() -> None:
    """TF + DMD: published 18.29 s where SF-1 takes 12.19; 5341 TFLOP with a real score of 14B and
    2550 with one of 1.3B, where SF-1 has 4559 and 1768 (tests/test_training_cost.py)."""
    rows = "\n".join(hooks.training())
    of = [18.29, 18.29 / 12.19, 5341 / 790, 5341 / 4559, 2550 / 790, 2550 / 1768]
    assert f"| TF + DMD | {' | '.join(f'{x:.2f}' for x in of)} |" in rows
    assert rows.count(" + DMD") == 12 and "| SF-1 + DMD critic | 4.72 | 1.00 |" in rows


def test_the_page_of_the_server_is_up_to_date() -> None:
    """Its table is that of the newest result, its code the example's: python -m docs.serve_page."""
    serve_page = pytest.importorskip("docs.serve_page", reason="needs playwright")
    page = serve_page.PAGE.read_text()
    assert serve_page.written(page) == page
    assert "| served |" in page and 'send("start"' in page
