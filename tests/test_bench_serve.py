"""The bench of the server: frames are compared before they are timed, and clients are counted."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from bench import figures, harness, serve
from sfmodel.batching import StreamBatch


@pytest.fixture(autouse=True)
def _short(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(serve, "COUNTS", (2,))
    monkeypatch.setattr(serve, "ROUNDS", 3)
    monkeypatch.setattr(serve, "WATCHED", 0.5)


def job(**options: Any) -> harness.Job:
    return harness.Job(torch.device("cpu"), tiny=True, rounds=2, **options)


def test_all_are_timed(tmp_path: Path) -> None:
    result = serve.run(job())
    json.dumps(result)
    (row,) = result["rows"]
    assert row["streams"] == 2 and [*row["contestants"]] == [*serve.COLOURS]
    for entry in row["contestants"].values():
        assert entry["ms"] > 0 and entry["frames"] == 24
    (table,) = serve.tables(result)
    assert [line[1] for line in table.rows] == [*serve.COLOURS]
    assert table.rows[0][-1] == "1.00" and table.rows[0][2].isdecimal()
    ((name, figure),) = serve.figures(result)
    figures.save(figure, tmp_path / f"{name}.png")
    assert not harness.wrong(result)


def test_frames_that_are_wrong_are_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    step = StreamBatch.step

    def brighter(self: StreamBatch, *arguments: Any) -> Any:
        return {stream: frames + 1 for stream, frames in step(self, *arguments).items()}

    monkeypatch.setattr(StreamBatch, "step", brighter)

    def refused(*_: Any) -> float:
        raise ValueError("no server here")

    monkeypatch.setattr(serve, "served", refused)
    (row,) = serve.run(job())["rows"]
    assert row["contestants"][serve.BATCHED] == {
        "failed": "wrong, not timed: not the frames of single runs"
    }
    assert "no server here" in row["contestants"][serve.SERVED]["failed"]
