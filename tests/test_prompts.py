"""Prompts in files: a line is a line, and no file takes memory or time without bound."""

from __future__ import annotations

import itertools
import os
import threading
from pathlib import Path

import pytest

from sfmodel import prompts
from sfmodel.files import within
from sfmodel.prompts import prompt_beside, prompts_in, read_prompts


def test_a_line_ends_at_a_newline_and_nowhere_else(tmp_path: Path) -> None:
    path = tmp_path / "p.txt"
    inside = ["a\x0bb", "a\x0cb", "a\x1cb\x1db\x1eb", "a\x85b", "a\u2028b\u2029b", "a\rb"]
    path.write_bytes("\r\n".join(inside).encode())
    assert read_prompts(path) == inside
    path.write_bytes("\ufeff one \n\x0c\n\n\t\n two".encode())
    assert read_prompts(path) == ["one", "two"]
    path.write_bytes("a\u2028b\r\nc\n".encode())
    assert prompt_beside(tmp_path / "p.mp4") == "a\u2028b c"
    assert prompt_beside(tmp_path / "q.mp4") == ""


def said(path: Path) -> str:
    with pytest.raises(ValueError) as raised:
        read_prompts(path)
    assert str(raised.value).startswith(f"prompt file {path}: ") and len(str(raised.value)) < 300
    return str(raised.value).removeprefix(f"prompt file {path}: ")


def test_no_file_takes_memory_or_time_without_bound(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "p.txt"
    with open(path, "wb") as file:
        file.truncate(2**40)
    assert said(path) == said(Path("/dev/zero")) == "not a text file"
    path.write_text("a" * 70_000)
    assert said(path) == "line 1 has more than 65,536 bytes: must be one prompt"
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)
    assert said(fifo) == "has no prompt, must have one a line"
    monkeypatch.setattr(prompts, "MOST", 3)
    path.write_text("a\n" * 3)
    assert len(read_prompts(path)) == 3
    path.write_text("a\n" * 4)
    assert said(path) == "too long: must have at most 3 prompts and 268,435,456 characters"
    assert [*itertools.islice(prompts_in(path), 2)] == ["a", "a"]
    (tmp_path / "v.txt").write_text(("a" * 1000 + "\n") * 2)
    monkeypatch.setattr(prompts, "LONGEST", 1500)
    with pytest.raises(ValueError, match="at most 3 prompts and 1,500 characters"):
        prompt_beside(tmp_path / "v.mp4")
    (tmp_path / "w.txt").symlink_to("nowhere")
    with pytest.raises(ValueError, match=r"w.txt: No such file"):
        prompt_beside(tmp_path / "w.mp4")


def test_prompts_come_through_a_pipe(tmp_path: Path) -> None:
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)
    reader = os.open(fifo, os.O_RDONLY | os.O_NONBLOCK)  # so that the writer need not wait
    writer = os.open(fifo, os.O_WRONLY)
    timer = threading.Timer(0.2, os.write, (writer, b"one\ntwo"))
    timer.start()
    assert next(prompts_in(fifo)) == "one"
    timer.join()
    for each in (reader, writer):
        os.close(each)


def test_what_is_in_a_folder(tmp_path: Path) -> None:
    names = ["b.mp4", "a/c.MP4", "a/b/d.mkv", ".e.mp4", ".f/g.mp4", "h.txt", "i.mp4/j.mp4"]
    for name in names:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    (tmp_path / "a" / "loop").symlink_to(tmp_path)
    (tmp_path / "z.mp4").symlink_to("nowhere")
    found = [str(p.relative_to(tmp_path)) for p in within(tmp_path, (".mp4", ".mkv"))]
    assert found == ["a/b/d.mkv", "a/c.MP4", "b.mp4", "i.mp4/j.mp4", "z.mp4"]
    assert within(tmp_path / "b.mp4", (".mp4",)) == [tmp_path / "b.mp4"]
