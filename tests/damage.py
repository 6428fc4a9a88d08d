"""Damage to a checkpoint. Each changes `step-000004` of a run, which has `step-000002`
beside it. Code that would be run leaves a file `mark` in the run's folder."""

from __future__ import annotations

import io
import json
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch


def cut(path: Path) -> None:
    """Cuts a file to half its length."""
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


class Evil:
    """Makes a file where it is unpickled."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> Any:
        return Path.touch, (self.mark,)


def index(path: Path, change: Callable[[Any], None]) -> None:
    """Changes the index of a checkpoint."""
    table = path / ".metadata"
    content = pickle.loads(table.read_bytes())
    change(content)
    table.write_bytes(pickle.dumps(content))


def put(path: Path, value: Any) -> None:
    """Puts a value in the place of a setting of an optimiser."""
    content, data = io.BytesIO(), path / "__0_0.distcp"
    torch.save(value, content)
    begin = data.stat().st_size

    def change(table: Any) -> None:
        (info,) = (v for k, v in table.storage_data.items() if k.fqn.endswith("s.0.weight_decay"))
        info.offset, info.length = begin, len(content.getvalue())

    index(path, change)
    data.write_bytes(data.read_bytes() + content.getvalue())


def lead(path: Path, where: str) -> None:
    """Has the index name a file elsewhere."""

    def change(table: Any) -> None:
        for info in table.storage_data.values():
            info.relative_path = where

    index(path, change)


def link(path: Path, name: str) -> None:
    """Puts a link in the place of a file."""
    moved = (path / name).rename(path.parent.parent / name)
    (path / name).symlink_to(moved)


def state(path: Path, **change: Any) -> None:
    """Changes what is said of a checkpoint."""
    file = path / "run.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | change))


DAMAGE: dict[str, Callable[[Path], object]] = {
    "data cut": lambda path: cut(path / "__0_0.distcp"),
    "no data": lambda path: (path / "__0_0.distcp").unlink(),
    "table cut": lambda path: cut(path / ".metadata"),
    "no table": lambda path: (path / ".metadata").unlink(),
    "facts cut": lambda path: cut(path / "run.json"),
    "no facts": lambda path: (path / "run.json").unlink(),
    "code in the table": lambda path: (path / ".metadata").write_bytes(
        pickle.dumps(Evil(path.parent.parent / "mark"))
    ),
    "code below the table": lambda path: index(
        path, lambda table: setattr(table, "planner_data", Evil(path.parent.parent / "mark"))
    ),
    "code in a value": lambda path: put(path, Evil(path.parent.parent / "mark")),
    "a value of another type": lambda path: put(path, "0.1"),
    "a table of much": lambda path: (path / ".metadata").write_bytes(b"Nr\xff\xff\xff\x7f."),
    "no table of files": lambda path: index(path, lambda table: setattr(table, "storage_data", 1)),
    "data in the folder above": lambda path: lead(path, "../step-000002/__0_0.distcp"),
    "data of a whole path": lambda path: lead(path, str(path / "__0_0.distcp")),
    "data by a link": lambda path: link(path, "__0_0.distcp"),
    "table by a link": lambda path: link(path, ".metadata"),
    "facts by a link": lambda path: link(path, "run.json"),
    "facts of another step": lambda path: state(path, step=3),
    "facts without settings": lambda path: state(path, config=7),
    "facts without time": lambda path: state(path, seconds=None),
    "facts of no records": lambda path: state(path, recent=[[1]]),
    "facts in a depth": lambda path: (path / "run.json").write_text("[" * 100_000),
}
