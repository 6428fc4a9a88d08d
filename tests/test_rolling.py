"""Past the window: the three ways are compared before they are timed, and what is made of it."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from bench import harness, timing
from experiments import rolling
from sfmodel.config import PRESETS
from sfmodel.cost import rolling_flops
from sfmodel.dit import DiT

TOY = PRESETS["toy"]
SMALL = replace(TOY, dit=replace(TOY.dit, dim=64, heads=1, ffn_dim=96, layers=2), window=6)
WAYS = ["recompute window", "recompute cache", "ring cache"]
CPU = torch.device("cpu")


def small_model() -> DiT:
    torch.manual_seed(0)
    model = DiT(SMALL.dit).eval()
    torch.nn.init.normal_(model.head.head.weight, std=0.1)
    return model


@pytest.fixture
def model() -> DiT:
    return small_model()


@pytest.fixture
def _small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(PRESETS, "toy", SMALL)
    monkeypatch.setattr(rolling, "TINY_WINDOWS", (9, 6, 18))
    monkeypatch.setattr(rolling, "TINY_CHUNKS", 2)


def test_the_three_ways_are_compared(model: DiT) -> None:
    result = rolling.compare(model, SMALL, torch.zeros(1, 1, 32), batch=2, chunks=2)
    assert result["relative_difference_in_first_window"] < 1e-5
    assert [*result["ways"]] == WAYS
    for way in result["ways"].values():
        assert len(way["all_seconds"]) == 2 and way["seconds_per_chunk"] > 0
        assert way["by_chunk"][1:] == way["all_seconds"]  # the first chunk of a window of two
    assert result["ways"]["ring cache"]["times_the_ring"] == 1
    with pytest.raises(ValueError, match="two or more chunks of 3"):
        rolling.compare(model, replace(SMALL, window=7), torch.zeros(1, 1, 32))


def test_a_window_filled_with_latents_is_compared_too(model: DiT) -> None:
    wide = replace(SMALL, window=12)
    result = rolling.compare(model, wide, torch.zeros(1, 1, 32), chunks=2, filled=True)
    assert 0 < result["relative_difference_in_first_window"] < 1e-5  # the ring has seen it all
    assert all(len(way["by_chunk"]) == 2 for way in result["ways"].values())


def test_time_cuts_the_chunks_past_the_window_only(model: DiT) -> None:
    text, small = torch.zeros(1, 1, 32), replace(SMALL, window=9)
    result = rolling.compare(model, small, text, chunks=9, seconds=0)
    assert [len(way["by_chunk"]) for way in result["ways"].values()] == [3, 3, 3]


@pytest.mark.parametrize("way", ["recompute_window", "recompute_cache"])
@pytest.mark.parametrize("filled", [False, True])
def test_nothing_is_timed_when_they_differ(
    model: DiT, way: str, filled: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    right = getattr(rolling.Ways, way)
    monkeypatch.setattr(rolling.Ways, way, lambda *a: 1.01 * right(*a))
    with pytest.raises(AssertionError, match="nothing is timed"):
        rolling.compare(model, SMALL, torch.zeros(1, 1, 32), chunks=1, filled=filled)


@pytest.mark.usefixtures("_small")
def test_every_window_is_measured_and_one_is_followed(tmp_path: Path) -> None:
    saved: list[str] = []
    job = harness.Job(CPU, tiny=True, rounds=1, save=lambda r: saved.append(json.dumps(r)))
    result = rolling.run(job)
    assert (
        saved[-1] == json.dumps(result) and len(saved) > 4
    )  # whatever ends it, what is done stays
    *rows, at_once = result["rows"]
    assert [row["window"] for row in rows] == [9, 6, 18]
    for row in rows:
        assert row["relative_difference"] < 1e-5 and row["timed_chunks"] == row["planned_chunks"]
        flops = rolling_flops(SMALL.dit, 4, row["window"], 3, 4)
        for name, entry in row["contestants"].items():
            assert entry["ms"] > 0 and entry["flops"] == flops[name]
            assert entry["theory"] == pytest.approx(flops[name] / flops["ring cache"])
    assert all("by_chunk" not in row for row in rows[1:])
    for way in WAYS:  # to the end of three windows of three chunks
        assert len(rows[0]["by_chunk"][way]) == 9
        assert rows[0]["cumulative"][way][-1] == pytest.approx(sum(rows[0]["by_chunk"][way]))
    assert [*at_once["contestants"]] == ["9 frames", "18 frames", "27 frames"]
    assert at_once["flops_by_chunk"][2::3] == [
        entry["flops"] for entry in at_once["contestants"].values()
    ]

    tables = rolling.tables(result)
    assert len(tables) == 3 and len(tables[0].rows) == 12
    assert all(len(row) == len(t.columns) for t in tables for row in t.rows)
    assert harness.draw(rolling, result, tmp_path) == "figures: extrapolate.png"


@pytest.mark.usefixtures("_small")
def test_what_is_not_wanted_wrong_or_too_late(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    one = rolling.run(harness.Job(CPU, tiny=True, rounds=1, only="of 6$"))
    assert [row["case"] for row in one["rows"]] == ["window of 6"] and not one["exponents"]
    assert len(rolling.tables(one)) == 1
    assert harness.draw(rolling, one, tmp_path).endswith(".png")

    late = rolling.run(harness.Job(CPU, tiny=True, rounds=1, seconds=0))
    assert late["rows"][0]["contestants"] == {} and len(late["no_time_for"]) == 6
    assert harness.draw(rolling, late, tmp_path).startswith("no figures")

    right = rolling.Ways.recompute_cache
    monkeypatch.setattr(rolling.Ways, "recompute_cache", lambda *a: 2 * right(*a))
    wrong = rolling.run(harness.Job(CPU, tiny=True, rounds=1, only="of 6$"))
    assert harness.wrong(wrong) == [f"window of 6: {way}" for way in WAYS]
    assert timing.WRONG in str(rolling.tables(wrong)[0].rows)


def test_exponents_are_slopes_between_logarithms() -> None:
    def entry(window: int) -> dict[str, float]:
        return {"ms": 0.5 * window**2, "flops": 7 * math.sqrt(window)}

    rows: list[dict[str, Any]] = [
        {"window": w, "contestants": {"ring cache": entry(w)}} for w in (6, 12, 84)
    ]
    rows.append({"window": 100, "contestants": {"ring cache": {"failed": "no memory"}}})
    ((way, powers),) = rolling.exponents(rows).items()
    assert way == "ring cache"
    assert powers == pytest.approx({"measured": 2.0, "theory": 0.5})
