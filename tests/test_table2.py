"""The experiment at the smallest size: a job, what is kept of it, and what is shown."""

from __future__ import annotations

import json
import re
import signal
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch

from docs import readme
from experiments import table2
from experiments.table2 import FRAMES, LONG, ROWS, WAYS, Job, Scale
from sfmodel.toy import evaluate
from sfmodel.toy.evaluate import bands
from sfmodel.train.config import RECIPES
from sfmodel.train.loop import Run

TINY = Scale(updates=1, batch=2, seeds=1, videos=16)
NAMES = ("distance", "radius", "brightness", "colour", "impossible", "unclean")


def result(row: str, way: str, seed: int, level: float) -> dict[str, Any]:
    each: dict[str, Any] = {name: [level] * LONG for name in NAMES}
    each |= {"own": [level] * FRAMES, "real": [level / 2] * FRAMES, "gap": level / 2}
    return {**each, "row": row, "way": way, "seed": seed, "seconds": {"train": 1.0}}


@pytest.fixture
def summary() -> dict[str, Any]:
    results = [
        result(row, way, seed, i + 1.0 + seed)
        for i, row in enumerate(ROWS)
        for way in WAYS
        for seed in (0, 1)
    ]
    machine = {"device": "a machine", "torch": "2", "triton": "3"}
    floor = {name: [0.25] * LONG for name in NAMES}
    teacher = {name: [0.5] * FRAMES for name in NAMES}
    return {
        "machine": machine,
        "scale": vars(TINY) | {"seeds": 2},
        "seconds": 60.0,
        "references": {"real": floor, "teacher": teacher},
        "results": results,
    }


def test_every_row_is_a_recipe_from_one_start_and_as_many_updates(tmp_path: Path) -> None:
    configs = [Job(row, way, 1, TINY, tmp_path, "test").config() for row in ROWS for way in WAYS]
    assert len({config.output for config in configs}) == len(configs)
    for name in ("init", "steps", "batch", "frames", "windows", "seed"):
        assert len({getattr(config, name) for config in configs}) == 1, name
    distilled = {config.recipe for config in configs if RECIPES[config.recipe].needs_critic}
    assert distilled == {"tf+dmd", "df+dmd", "sf+dmd", "sf+sid", "sf+gan"}
    assert {config.chunks for config in configs} == {(1,), (3,)}
    for setting in ("critic_steps", "critic_warmup", "lr_critic", "guidance_scale", "ema"):
        values = {getattr(c, setting) for c in configs if RECIPES[c.recipe].needs_critic}
        assert len(values) == 1, setting


def test_the_command_and_what_it_keeps(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """One row, one seed, in a process of its own; the second time nothing is trained."""
    options: dict[str, Any] = {"rows": ("SF + DMD",), "ways": ("chunk-wise",), "workers": 1}
    sizes = {key: value for key, value in vars(TINY).items()}
    table2.experiment(tmp_path, **options, **sizes)
    said = capsys.readouterr().out
    assert "1/1  chunk-wise-sf---dmd-0" in said and "SF + DMD" in said
    written = json.loads((tmp_path / "results.json").read_text())
    assert len(written["results"]) == 1 and len(written["results"][0]["distance"]) == LONG
    assert written["scale"] == sizes
    floor, teacher = written["references"].values()
    assert len(floor["distance"]) == LONG and len(teacher["distance"]) == FRAMES
    for name in ("distance.png", "gap.png", "sheet-chunk-wise.png"):
        assert (tmp_path / name).read_bytes().startswith(b"\x89PNG")
    weights = tmp_path / "chunk-wise-sf---dmd-0" / "model.safetensors"
    before = weights.stat().st_mtime_ns
    drawn = {name: mock.DEFAULT for name in ("references", "draw", "sheets", "tables")}
    with mock.patch.multiple(table2, **drawn) as mocks:
        mocks["references"].return_value = {}
        table2.experiment(tmp_path, **options, **sizes)
    assert weights.stat().st_mtime_ns == before
    again = json.loads((tmp_path / "results.json").read_text())
    assert again["results"] == written["results"]
    with pytest.raises(ValueError, match="of other settings"):
        table2.experiment(tmp_path, **options, **sizes | {"updates": 2})


def test_a_job_that_was_stopped_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    job = Job("TF", "frame-wise", 0, TINY, tmp_path, "test")
    monkeypatch.setattr(evaluate, "evaluate", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        table2.run(job)
    weights = tmp_path / job.name / "model.safetensors"
    before = weights.stat().st_mtime_ns
    monkeypatch.setattr(evaluate, "evaluate", lambda *_: {"distance": [1.0]})
    assert table2.run(job)["distance"] == [1.0] and weights.stat().st_mtime_ns == before
    assert torch.get_num_threads() == 1


def test_interrupted_training_is_not_taken_for_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What Ctrl-C leaves are a checkpoint and weights of fewer updates."""
    job = Job("TF", "frame-wise", 0, replace(TINY, updates=2), tmp_path, "test")
    update, calls = Run.train_step, []

    def interrupted(self: Run) -> dict[str, float]:
        calls.append(self.step)
        if len(calls) == 2:
            signal.raise_signal(signal.SIGINT)
        return update(self)

    monkeypatch.setattr(Run, "train_step", interrupted)
    monkeypatch.setattr(evaluate, "evaluate", lambda *_: {"distance": [1.0]})
    with pytest.raises(KeyboardInterrupt):
        table2.run(job)
    assert (tmp_path / job.name / "model.safetensors").exists()
    table2.run(job)
    assert calls == [0, 1, 1]


def test_tables_are_means_and_deviations_over_seeds(summary: dict[str, Any]) -> None:
    columns, rows = table2.cells(summary, "chunk-wise")
    assert columns[1:4] == [f"distance {a}-{b - 1}" for a, b in bands(LONG, FRAMES)]
    assert [row[0] for row in rows] == ["real", "teacher", *ROWS]
    assert rows[0][1:4] == ["0.25"] * 3 and rows[1][1:4] == ["0.50", "", ""]
    assert rows[2][1] == "1.50 ± 0.71" and rows[2][4] == "0.75 ± 0.35"
    assert all(len(row) == len(columns) for row in rows)
    assert len([*table2.tables(summary)]) == 2


def test_figures(summary: dict[str, Any], tmp_path: Path) -> None:
    table2.draw(summary, tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"distance.png", "gap.png"}


def test_readme_shows_it(summary: dict[str, Any], tmp_path: Path) -> None:
    assert "The experiment is not measured yet" in readme.block(tmp_path)
    (tmp_path / readme.EXPERIMENT).write_text(json.dumps(summary))
    block = readme.block(tmp_path)
    assert "| TF | 1.50 ± 0.71 | 1.50 ± 0.71 | 1.50 ± 0.71 | 0.75 ± 0.35 |" in block
    assert "real and teacher have 0.25 and 0.50 at 3-6." in " ".join(block.split())
    assert "| SF + GAN |" in block and "hidden" not in block and "| real |" not in block


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--rows", "XX"], "rows='XX': must be of 'TF', 'DF'"),
        (["--ways", "sideways"], "ways='sideways'"),
        (["--updates", "0"], "updates=0"),
    ],
)
def test_bad_arguments(
    arguments: list[str], said: str, tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    from sfmodel.cli.main import run_command

    words = ["experiment", "--output", str(tmp_path / "out"), *arguments]
    with pytest.raises(SystemExit) as stopped:
        run_command("python -m bench", {"experiment": table2.experiment}, words)
    assert stopped.value.code == 2
    assert said in re.sub(r"\s+", " ", capsys.readouterr().err)
    assert not (tmp_path / "out").exists()
