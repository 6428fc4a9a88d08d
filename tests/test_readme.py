"""The code of the README and of the documentation runs; the README's tree exists, and it stays
readable in one go."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
# Pages whose code is parts of what a user writes; of the first the whole example runs below.
PARTS = ("models", "streams", "kernels-hub", "serve")
CODE = {
    page.stem: "".join(found)
    for page in sorted((ROOT / "docs").rglob("*.md"))
    if (found := re.findall(r"```python\n(.*?)```", page.read_text(), re.S))
    and page.stem not in PARTS
}


def test_the_example_runs() -> None:
    (code,) = re.findall(r"```python\n(.*?)```", README, re.S)
    names: dict[str, torch.Tensor] = {}
    exec(code, names)
    assert names["out"].shape == (1, 4680, 12, 128) and names["out"].isfinite().all()


def test_the_example_of_a_stream_runs() -> None:
    """That of docs/models.md, with the toy."""
    code = re.findall(r"```python\n(.*?)```", (ROOT / "docs/models.md").read_text(), re.S)[0]
    names: dict[str, torch.Tensor] = {}
    exec(code, names)
    assert names["frames"].shape == (1, 11, 64, 64, 3)  # 1 + 12 + 12 + 12 + 11


@pytest.mark.parametrize("page", CODE)
def test_the_code_of_a_page_runs(page: str) -> None:
    """From top to bottom; what it says of its results it asserts."""
    exec(CODE[page], {})


def test_what_it_names_exists() -> None:
    tree = README.split("## The tree")[1]
    for line in re.findall(r"^(\w+)/ +(.*(?:\n +.*)*)", tree, re.M):
        folder, text = line
        assert (ROOT / folder).is_dir()
        for name in re.findall(r"\b\w+\.py\b", text):
            assert list((ROOT / folder).rglob(name)), f"{folder}/{name}"
    for picture in re.findall(r"!\[.*?\]\((.*?)\)", README):
        assert (ROOT / picture).is_file(), picture
    assert README.count("\n") < 150
