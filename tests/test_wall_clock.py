"""Quality by training time at the smallest size: a run that is measured on the way, what is kept of
it, and what is shown."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from bench.__main__ import main
from experiments import jobs, table2, wall_clock
from experiments.table2 import LONG
from experiments.wall_clock import COLOURS, Job
from sfmodel.toy import evaluate
from sfmodel.train import report
from sfmodel.weights import checkpoint

TINY = table2.Scale(updates=1, batch=2, seeds=1, videos=16)


@pytest.fixture
def _small(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Few updates of the critic, few real videos, no pictures, and jobs in this process."""
    few = (("critic_warmup", 0), ("critic_steps", 1))
    for name in COLOURS:
        row = table2.ROWS[name]
        monkeypatch.setitem(table2.ROWS, name, replace(row, change=(*row.change, *few)))

    def here(run: Callable[[Any], Any], planned: Sequence[Any], *_: object) -> list[Any]:
        return [run(job) for job in planned]

    monkeypatch.setattr(jobs, "run_all", here)
    monkeypatch.setattr(report, "plot", lambda *_: None)
    monkeypatch.setattr(report.Report, "sample", lambda _: None)
    monkeypatch.setattr(evaluate, "REAL", 64)
    table2.held_out.cache_clear()
    yield
    table2.held_out.cache_clear()


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return checkpoint.read(folder / "model.safetensors")[0]


@pytest.mark.usefixtures("_small")
def test_a_run_is_measured_on_the_way_and_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The command for no time at all, and for a little more than that took: the second measurement
    is of what a run without the first one learns, at the rate that does not fall."""
    options: dict[str, Any] = {"rows": ("TF + DMD",), "every": 1, "batch": 2, "videos": 16}
    wall_clock.wall_clock(tmp_path, seconds=1e-9, seeds=1, **options)
    first = json.loads((tmp_path / "results.json").read_text())
    (result,) = first["results"]
    assert [p["updates"] for p in result["points"]] == [1] and len(first["start"]) == LONG
    took = result["points"][0]["seconds"]
    assert (tmp_path / "wall-clock.png").read_bytes().startswith(b"\x89PNG")
    assert "TF + DMD" in capsys.readouterr().out

    job = Job("TF + DMD", "chunk-wise", 0, TINY, tmp_path, "test", 1.01 * took)
    points = wall_clock.run(job)["points"]
    assert points[0]["distance"] == pytest.approx(result["points"][0]["distance"], rel=1e-3)
    assert [p["updates"] for p in points] == [1, 2] and points[1]["seconds"] > 1.5 * took
    log = (tmp_path / job.name / "log.jsonl").read_text().splitlines()
    assert json.loads(log[-1])["seconds"] == points[1]["seconds"]  # measuring is not in it

    whole = replace(job.config(), output=tmp_path / "whole", steps=2, decay_fraction=0.0)
    jobs.trained(whole)
    mine, theirs = weights(tmp_path / job.name), weights(whole.output)
    assert all(torch.equal(mine[name], theirs[name]) for name in theirs)
    start = checkpoint.read(whole.init or Path())[0]
    assert any(not torch.equal(mine[name].to(start[name]), start[name]) for name in theirs)

    monkeypatch.setattr(table2, "measured", lambda *_: 1 / 0)  # nothing is done again
    assert wall_clock.run(job)["points"] == points
    with pytest.raises(ValueError, match="of other settings"):
        wall_clock.wall_clock(tmp_path, seconds=1.0, seeds=2, **options)


def point(updates: int, seconds: float, level: float) -> dict[str, Any]:
    distance = [level] * 7 + [2 * level] * (LONG - 7)
    return {"updates": updates, "seconds": seconds, "distance": distance}


def test_what_is_shown(tmp_path: Path) -> None:
    """Means over the measurements that all seeds have: at 10 s and 12 s, not the third of one."""
    first = [point(8, 10.0, 3.0), point(16, 20.0, 2.0), point(24, 30.0, 1.0)]
    second = [point(8, 12.0, 4.0), point(16, 24.0, 2.0)]
    summary = {
        "machine": {"device": "a machine", "torch": "2", "triton": "3"},
        "scale": vars(TINY) | {"seeds": 2},
        "references": {"real": {"distance": [0.25] * LONG}, "teacher": {"distance": [0.5] * 7}},
        "start": [9.0] * LONG,
        "results": [
            {"row": "DF + DMD (CausVid)", "seed": seed, "points": points}
            for seed, points in enumerate((first, second))
        ],
    }
    shown = wall_clock.table(summary)
    assert shown.columns[3:] == ["distance 3-6", "distance 14-27"]
    assert [*map(list, shown.rows)] == [
        ["DF + DMD (CausVid)", "0", "0", "9.00 ± 0.00", "9.00 ± 0.00"],
        ["", "8", "11", "3.50 ± 0.71", "7.00 ± 1.41"],
        ["", "16", "22", "2.00 ± 0.00", "4.00 ± 0.00"],
        ["real", "", "", "0.25", "0.25"],
        ["teacher", "", "", "0.50", ""],
    ]
    (ax, late), colour = wall_clock.draw(summary).axes, COLOURS["DF + DMD (CausVid)"]
    mean = next(line for line in ax.lines if line.get_label() == "DF + DMD (CausVid)")
    assert [*mean.get_xdata()] == [0, 11, 22] and [*mean.get_ydata()] == [9, 3.5, 2]
    assert mean.get_color() == colour and ax.get_xlabel() == "seconds of training"
    assert late.get_title() == "latent frames 14-27"


def test_all_rows_start_alike() -> None:
    configs = [Job(row, "chunk-wise", 1, TINY, Path("x"), "test").config() for row in COLOURS]
    assert {config.recipe for config in configs} == {"sf+dmd", "df+dmd", "tf+dmd"}
    for name in ("init", "teacher", "batch", "frames", "seed", "critic_steps", "critic_warmup"):
        assert len({getattr(config, name) for config in configs}) == 1, name


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--rows", "SF + GAN"], "rows='SF + GAN': must be of 'SF + DMD', "),
        (["--seconds", "0"], "seconds=0.0: must be positive"),
        (["--every", "0"], "every=0: must be positive"),
    ],
)
def test_bad_arguments(
    words: list[str], said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(["wall-clock", "--output", str(tmp_path / "out"), *words])
    assert stopped.value.code == 2
    assert said in re.sub(r"\s+", " ", capsys.readouterr().err)
    assert not (tmp_path / "out").exists()
