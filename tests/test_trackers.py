"""Trackers of a run: stand-ins for their libraries, and TensorBoard itself where it is there."""

from __future__ import annotations

import importlib.machinery
import sys
import types
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from sfmodel.train import loop, report
from sfmodel.train.config import TrainConfig
from sfmodel.train.loop import train
from tests.tiny_runs import SAMPLE, config, logged, tiny


@pytest.fixture(autouse=True)
def _tiny(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.chdir(tmp_path)
    with tiny():
        yield


def stand_in(monkeypatch: pytest.MonkeyPatch, name: str, **content: Any) -> None:
    module: Any = types.ModuleType(name)
    module.__spec__ = importlib.machinery.ModuleSpec(name, None)
    vars(module).update(content)
    monkeypatch.setitem(sys.modules, name, module)


class WandBRuns(dict[str, "WandBRun"]):
    """Runs that a server has, by id."""

    def init(self, **given: Any) -> WandBRun:
        run = self.setdefault(given["id"], WandBRun()) if given["resume"] == "allow" else WandBRun()
        run.given.append(given)
        return run


class WandBRun:
    """What it was begun with each time, and what it was told, by step."""

    def __init__(self) -> None:
        self.given: list[dict[str, Any]] = []
        self.history: dict[int, dict[str, Any]] = {}
        self.finished = 0

    def log(self, values: Mapping[str, Any], step: int) -> None:
        """Merges what is of one step, and refuses one before the last, as the library does."""
        assert step >= max(self.history, default=0), "steps must not go back"
        self.history.setdefault(step, {}).update(values)

    def finish(self) -> None:
        self.finished += 1


@pytest.fixture
def wandb(monkeypatch: pytest.MonkeyPatch) -> WandBRuns:
    runs = WandBRuns()
    stand_in(monkeypatch, "wandb", init=runs.init, Image=lambda path: ("image", path))
    monkeypatch.delenv("WANDB_PROJECT", raising=False)
    return runs


class Events(dict[str, list[tuple[str, int, Any]]]):
    """Those of each folder of TensorBoard, and how often a writer was closed."""

    closed = 0

    def writer(self, folder: str, purge_step: int) -> Any:
        mine = self.setdefault(folder, [])
        mine[:] = [event for event in mine if event[1] < purge_step]
        return Writer(self, mine)


class Writer:
    def __init__(self, events: Events, mine: list[tuple[str, int, Any]]) -> None:
        self.events, self.mine, self.file_writer = events, mine, self

    def add_summary(self, summary: Any) -> None:
        self.mine.append(("summary", -1, summary))

    def add_scalar(self, name: str, value: float, step: int) -> None:
        self.mine.append((name, step, value))

    def add_image(self, name: str, pixels: Any, step: int, dataformats: str) -> None:
        assert dataformats == "HWC" and pixels.dtype == np.uint8
        self.mine.append((name, step, pixels))

    def flush(self) -> None: ...

    def close(self) -> None:
        self.events.closed += 1


@pytest.fixture
def events(monkeypatch: pytest.MonkeyPatch) -> Events:
    found = Events()
    stand_in(monkeypatch, "tensorboard")
    stand_in(monkeypatch, "torch.utils.tensorboard", SummaryWriter=found.writer)
    hparams = {"hparams": lambda plain, metrics: [plain]}
    stand_in(monkeypatch, "torch.utils.tensorboard.summary", **hparams)
    return found


def settings(**change: Any) -> TrainConfig:
    return config(Path.cwd() / "run", **{"steps": 3, "save_every": 2, **change})


def draw_dots(monkeypatch: pytest.MonkeyPatch) -> None:
    """Samples that are a red dot, the brighter the later."""

    def draw(run: loop.Run, weights: Any, codec: Any, path: Path) -> Iterator[None]:
        path.parent.mkdir(exist_ok=True)
        Image.new("RGB", (4, 2), (run.step, 0, 0)).save(path)
        yield

    monkeypatch.setattr(report.Report, "sample", SAMPLE)
    monkeypatch.setattr(report, "write_samples", draw)


def kill_at(monkeypatch: pytest.MonkeyPatch, step: int) -> None:
    """Ends the next run in the update after `step`, which is not saved."""
    update = loop.Run.train_step

    def killed(self: loop.Run) -> dict[str, float]:
        if self.step == step:
            raise KeyboardInterrupt
        return update(self)

    monkeypatch.setattr(loop.Run, "train_step", killed)


def numbers(line: Mapping[str, Any]) -> dict[str, Any]:
    """What follows from the settings, and not from the clock."""
    return {name: line[name] for name in ("loss", "norm")}


def test_weights_and_biases_has_each_update_once_in_one_run(
    wandb: WandBRuns, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed after update 3, of which 2 are saved: the third comes again and is not told again."""
    draw_dots(monkeypatch)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        kill_at(patch, 3)
        train(settings(tracker="wandb", steps=4, sample_every=2), device="cpu")
    train(settings(tracker="wandb", steps=4, sample_every=2), device="cpu", resume=True)
    ((name, run),) = wandb.items()
    assert Path("run/wandb-id").read_text() == name
    assert run.finished == 2 and len(run.given) == 2
    for given in run.given:
        assert given["project"] == "sfmodel" and given["name"] == "run"
        assert given["dir"] == str(Path.cwd() / "run")
        assert given["config"]["lr"] == 1e-3 and given["config"]["frames"] == [4]
    lines = {int(line["step"]): numbers(line) for line in logged(Path("run"))}
    assert {step: numbers(told) for step, told in run.history.items()} == lines
    assert [*lines] == [1, 2, 3, 4] and all("seconds" in told for told in run.history.values())
    pictures = {step: told["sample"] for step, told in run.history.items() if "sample" in told}
    samples = Path.cwd() / "run" / "samples"
    assert pictures == {step: ("image", str(samples / f"update-{step:06d}.png")) for step in (2, 4)}
    # A new run in that folder is another one.
    for each in Path("run/checkpoints").iterdir():
        each.rename(f"run/{each.name}")
    monkeypatch.setenv("WANDB_PROJECT", "mine")
    train(settings(tracker="wandb", steps=1), device="cpu")
    assert len(wandb) == 2
    assert wandb[Path("run/wandb-id").read_text()].given[0]["project"] == "mine"


def test_tensorboard_has_each_update_once_in_one_folder(
    events: Events, monkeypatch: pytest.MonkeyPatch
) -> None:
    draw_dots(monkeypatch)
    given = dict(tracker="tensorboard", steps=4, sample_every=3)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        kill_at(patch, 3)
        train(settings(**given), device="cpu")
    train(settings(**given), device="cpu", resume=True)
    ((folder, found),) = events.items()
    assert folder == str(Path.cwd() / "run" / "tensorboard") and events.closed == 2
    for name in ("loss", "norm"):
        told = {step: value for tag, step, value in found if tag == name}
        assert told == {line["step"]: line[name] for line in logged(Path("run"))}
        assert [step for tag, step, _ in found if tag == name] == [1, 2, 3, 4]
    # The sample of update 3 was there when that update came again.
    pictures = [(step, pixels) for tag, step, pixels in found if tag == "sample"]
    assert [step for step, _ in pictures] == [3, 4]
    assert pictures[0][1].tolist() == [[[3, 0, 0]] * 4] * 2
    plain = [value for tag, _, value in found if tag == "summary"]
    assert plain and plain[0]["lr"] == 1e-3 and plain[0]["frames"] == "[4]"


@pytest.mark.parametrize("when", ["init", "log", "finish"])
def test_a_tracker_that_fails_stops_nothing(
    when: str, wandb: WandBRuns, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fails(*_: Any, **__: Any) -> None:
        raise RuntimeError("no route to host\nTraceback …")

    where: Any = sys.modules["wandb"] if when == "init" else WandBRun
    monkeypatch.setattr(where, when, fails)
    train(settings(tracker="wandb"), device="cpu")
    said = [line for line in capsys.readouterr().out.splitlines() if "tracker" in line]
    assert said == ["tracker wandb failed, the run goes on without it: no route to host"]
    assert [line["step"] for line in logged(Path("run"))] == [1, 2, 3]


@pytest.mark.parametrize("name", ["wandb", "tensorboard"])
def test_a_tracker_that_is_not_installed_is_one_sentence(
    name: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sfmodel.extras.find_spec", lambda name: None)
    said = rf"^tracker='{name}': needs {name}, not installed: pip install 'sfkernels\[trackers\]'$"
    with pytest.raises(ValueError, match=said):
        train(settings(tracker=name), device="cpu")
    assert not Path("run").exists()


def test_a_tracker_may_change_when_a_run_is_resumed(events: Events) -> None:
    train(settings(steps=2), device="cpu")
    train(settings(steps=3, tracker="tensorboard"), device="cpu", resume=True)
    (found,) = events.values()
    assert {step for _, step, _ in found} == {-1, 3}


def test_tensorboard_reads_what_is_written(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    draw_dots(monkeypatch)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        kill_at(patch, 3)
        train(settings(tracker="tensorboard", steps=4), device="cpu")
    train(settings(tracker="tensorboard", steps=4), device="cpu", resume=True)
    read = EventAccumulator("run/tensorboard")
    read.Reload()
    told = {event.step: event.value for event in read.Scalars("loss")}
    want = {int(line["step"]): line["loss"] for line in logged(Path("run"))}
    assert len(read.Scalars("loss")) == 4 and told == pytest.approx(want, rel=1e-6)
    assert [event.step for event in read.Images("sample")] == [4]
