"""The experiment on positions of a sink, at a small size."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from experiments import positions


def test_what_it_writes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(positions, "TIMES", (1, 2, 3))
    monkeypatch.setattr(
        positions, "SETTINGS", {k: positions.SETTINGS[k] for k in [*positions.SETTINGS][:3]}
    )
    positions.positions(videos=16, output=tmp_path)
    result = json.loads((tmp_path / "positions.json").read_text())
    assert [*result["distance"]][1:] == [*positions.SETTINGS]
    assert all(len(each) == 21 and min(each) > 0 for each in result["distance"].values())
    assert (tmp_path / "positions.png").stat().st_size > 10_000
    assert "14-20" in capsys.readouterr().out
    with pytest.raises(ValueError, match="videos=3: must be at least 16"):
        positions.positions(videos=3, output=tmp_path)
