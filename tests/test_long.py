"""Streams of 30 times the training length at the smallest size: jobs, rows, what is shown."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from bench import figures
from experiments import jobs, long
from experiments.long import TRAININGS, Job
from experiments.table2 import Scale
from sfmodel.toy import evaluate

TINY = Scale(updates=1, batch=2, seeds=1, videos=4)


def result(training: str, seed: int, level: float) -> dict[str, Any]:
    frames = torch.arange(long.frames()) + level
    names = Job(training, seed, TINY, Path(), "test").samplings()
    scores = {what: frames.tolist() for what in ("distance", "radius", "colour", "impossible")}
    return {"training": training, "seed": seed, "scores": dict.fromkeys(names, scores)}


def test_trainings_differ_in_what_their_names_say(tmp_path: Path) -> None:
    planned = {name: Job(name, 2, TINY, tmp_path, "test") for name in TRAININGS}
    configs = {name: job.config() for name, job in planned.items()}
    assert len({config.output for config in configs.values()}) == len(configs)
    for name, config in configs.items():
        assert (config.rollouts != ()) == name.startswith("long")
        assert (config.init, config.steps, config.seed) == (configs["SF"].init, 1, 2)
        for row, sampling in planned[name].samplings().items():
            assert sampling.preset.window == max(config.windows) == 7
            for kind in ("absolute", "relative"):
                assert (kind in row) == (sampling.preset.sink == 1 and
                                         sampling.preset.positions == kind)  # fmt: skip
            if "sampled" not in row and config.sink:
                assert sampling.preset.positions == config.positions
    assert [*planned["SF"].samplings()] == [
        "SF", "SF, sampled with sink, absolute", "SF, sampled with sink, relative",
    ]  # fmt: skip


def test_the_table_has_the_end_of_each_length(tmp_path: Path) -> None:
    results = [result(name, seed, seed) for name in TRAININGS for seed in (0, 2)]
    real = {what: [0.25] * long.frames() for what in long.MEASURED}
    machine = {"device": "a machine", "torch": "2", "triton": "3"}
    summary = {"machine": machine, "scale": vars(TINY) | {"seeds": 2}, "real": real}
    shown = long.table(summary | {"results": results})
    assert shown.rows[0][:3] == ["real, other videos", "0.25", "0.25"]
    # The means of frames 3 to 6, 24 to 27, 66 to 69 and 206 to 209, and of the seeds.
    assert shown.rows[1][1:5] == ["5.50 ± 1.41", "26.50 ± 1.41", "68.50 ± 1.41", "208.50 ± 1.41"]
    assert len(shown.rows) == 1 + sum(len(Job(n, 0, TINY, tmp_path, "").samplings())
                                      for n in TRAININGS)  # fmt: skip
    figures.save(long.draw(summary | {"results": results}), tmp_path / "long.png")
    assert (tmp_path / "long.png").stat().st_size > 10_000


def test_the_command_and_what_it_keeps(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """One training, one seed, in this process; videos of twice the training length."""
    monkeypatch.setattr(long, "LENGTHS", (1, 2))
    monkeypatch.setattr(evaluate, "REAL", 64)
    monkeypatch.setattr(jobs, "run_all", lambda run, planned, *_: [*map(run, planned)])
    long.held_out.cache_clear()
    options: dict[str, Any] = {"trainings": ("long SF, sink relative",)}
    long.long(tmp_path, **options, **vars(TINY))
    assert "long SF, sink relative" in capsys.readouterr().out
    written = json.loads((tmp_path / "results.json").read_text())
    (scores,) = written["results"][0]["scores"].values()
    assert len(scores["distance"]) == long.frames()
    for name in ("long.png", "sheet.png"):
        assert (tmp_path / name).read_bytes().startswith(b"\x89PNG")
    monkeypatch.setattr(long, "load", lambda _: 1 / 0)
    job = Job("long SF, sink relative", 0, TINY, tmp_path, "test")
    assert [*long.run(job)["scores"]] == ["long SF, sink relative"]  # kept
    with pytest.raises(ValueError, match="of other settings"):
        long.long(tmp_path, **options, **vars(TINY) | {"updates": 2})
    long.held_out.cache_clear()
