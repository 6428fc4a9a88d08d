"""Imports point down (CONTRIBUTING.md draws it), and files stay short: read, never imported."""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).parent.parent
FOLDERS = ("sfkernels", "sfmodel", "bench", "experiments", "tests")  # each may import those before
LINES = 500
FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef)

# What `sfkernels` may import beside the standard library, and what only inside a function.
PACKAGES = {"torch", "triton", "numpy"}
LAZY = {("sfkernels.layout", "matplotlib")}


class Import(NamedTuple):
    by: str  # a module
    of: str  # a module, or a name in one
    lazy: bool  # inside a function


def files() -> Iterator[Path]:
    yield from ROOT.glob("*.py")
    for folder in (*FOLDERS, "docs", "examples", "integrations", "tools"):
        yield from sorted((ROOT / folder).rglob("*.py"))


def read(node: ast.AST, by: str, lazy: bool = False) -> Iterator[Import]:
    """All but those that only a type checker sees."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.Import):
            yield from (Import(by, name.name, lazy) for name in child.names)
        elif isinstance(child, ast.ImportFrom):
            assert child.module and not child.level, f"{by} imports relative to itself"
            yield from (Import(by, f"{child.module}.{name.name}", lazy) for name in child.names)
        elif isinstance(child, ast.If) and ast.unparse(child.test) == "TYPE_CHECKING":
            for other in child.orelse:
                yield from read(other, by, lazy)
        else:
            yield from read(child, by, lazy or isinstance(child, FUNCTIONS))


def imports() -> Iterator[Import]:
    for file in files():
        by = ".".join(file.relative_to(ROOT).with_suffix("").parts)
        yield from read(ast.parse(file.read_text()), by.removesuffix(".__init__"))


def under(name: str, folders: Iterable[str]) -> bool:
    return any(f"{name}.".startswith(f"{folder}.") for folder in folders)


def refusal(found: Import) -> str:
    """Why a module may not import what it does; nothing if it may."""
    by, of, lazy = found
    own, other = by.partition(".")[0], of.partition(".")[0]
    if own in FOLDERS and other in FOLDERS[FOLDERS.index(own) + 1 :]:
        return f"{own} is below {other}: move what both need down, or name the module as a string"
    if under(by, ["sfkernels.gpu", "sfkernels.cpp"]) and under(of, ["sfkernels.reference"]):
        return "a kernel that used the reference could not be compared with it"
    if own == "sfmodel" and not under(by, ["sfmodel.train", "sfmodel.cli"]):
        if under(of, ["sfmodel.train"]):
            return "inference must not import training"
        if under(of, ["sfmodel.cli"]) and by != "sfmodel.__main__":
            return "only a command needs commands"
    outside = own != "tests" and not under(by, ["sfmodel.serve"])
    if under(of, ["sfmodel.serve"]) and outside and not lazy:
        return "what the server needs may be missing: import it in the function that needs it"
    if own == "sfkernels" and other not in {own, *PACKAGES, *sys.stdlib_module_names}:
        if (by, other) not in LAZY:
            return f"sfkernels needs {', '.join(sorted(PACKAGES))} and no other package"
        if not lazy:
            return f"{other} may be missing: import it in the function that needs it"
    return ""


def test_imports_point_down() -> None:
    found = {
        (i.by, i.of): f"{i.by} imports {i.of}: {why}" for i in imports() if (why := refusal(i))
    }
    assert not found, "\n".join(found.values())


def test_files_are_short() -> None:
    lines = {str(f.relative_to(ROOT)): len(f.read_text().splitlines()) for f in files()}
    long = [f"{f} has {n} lines, at most {LINES}: split it" for f, n in lines.items() if n > LINES]
    assert not long, "\n".join(long)


@pytest.mark.parametrize(
    ("by", "code", "said"),
    [
        ("sfkernels.norm", "def f():\n import sfmodel.dit", "sfkernels is below sfmodel"),
        ("sfmodel.dit", "from bench import timing", "sfmodel is below bench"),
        ("sfkernels.gpu.norm", "from sfkernels import reference", "could not be compared with it"),
        ("sfmodel.stream", "from sfmodel.train.loop import Run", "must not import training"),
        ("sfmodel.stream", "import sfmodel.cli.main", "only a command needs commands"),
        ("sfmodel.cli.serve", "from sfmodel.serve.app import create_app", "may be missing"),
        ("sfmodel.cli.serve", "def f():\n from sfmodel.serve.app import create_app", ""),
        ("sfkernels.check", "import rich.console", "no other package"),
        ("sfkernels.layout", "from matplotlib import pyplot", "import it in the function"),
        ("sfmodel.cli.main", "from sfmodel.train.loop import train", ""),
        ("sfkernels.norm", "if TYPE_CHECKING:\n import matplotlib", ""),
    ],
)
def test_what_is_refused(by: str, code: str, said: str) -> None:
    refused = [why for found in read(ast.parse(code), by) if (why := refusal(found))]
    assert len(refused) == bool(said) and all(said in why for why in refused)
