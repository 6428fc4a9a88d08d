"""A run that is stopped, killed or broken goes on bit for bit, and nothing of it is lost."""

from __future__ import annotations

import json
import math
import random
import resource
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from sfmodel import process
from sfmodel.files import alone
from sfmodel.ranks import Ranks
from sfmodel.train import loop, parallel, report
from sfmodel.train.batch import MicroBatch
from sfmodel.train.config import RECIPES
from sfmodel.train.loop import train
from sfmodel.weights import checkpoint
from tests.damage import DAMAGE
from tests.tiny_runs import config, draw_pictures, logged, saved, steps, tiny

Whole = Callable[..., Path]
RESUMED = [("tf", "muon"), ("sf+dmd", "adamw"), ("sf+gan", "muon")]


@pytest.fixture(autouse=True)
def _tiny() -> Iterator[None]:
    with tiny():
        yield


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Whole:
    """The folder of an uninterrupted run."""
    folder = tmp_path_factory.mktemp("whole")

    def run(recipe: str, optimizer: str, **change: Any) -> Path:
        path = folder / " ".join([recipe, optimizer, *change])
        if not path.exists():
            with tiny():
                train(config(path, recipe, optimizer=optimizer, **change), device="cpu")
        return path

    return run


def assert_same(one: Path, other: Path) -> None:
    """Bit for bit: everything in the last checkpoints, the averaged weights, the log."""
    a, b = (saved(folder / "checkpoints" / "step-000004") for folder in (one, other))
    assert a.keys() == b.keys()
    for name, value in a.items():
        same = torch.equal(value, b[name]) if isinstance(value, torch.Tensor) else value == b[name]
        assert same, name
    assert any("exp_avg" in name for name in a) and any("/average/" in name for name in a)
    first, second = (checkpoint.read(folder / "model.safetensors")[0] for folder in (one, other))
    assert first.keys() == second.keys() and all(torch.equal(first[k], second[k]) for k in first)
    lines = [[{k: v for k, v in r.items() if "seconds" not in k} for r in logged(folder)]
             for folder in (one, other)]  # fmt: skip
    assert lines[0] == lines[1]
    for name in ("model.safetensors", "checkpoints/step-000004/__0_0.distcp"):
        assert (one / name).read_bytes() == (other / name).read_bytes(), name


def stir() -> None:
    """Nothing may hang on the global generators."""
    random.seed()
    torch.seed()


@pytest.fixture
def hangup() -> Iterator[None]:
    """SIGHUP is heeded, also where the tests run under nohup."""
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)
    yield
    signal.signal(signal.SIGHUP, before)


@pytest.mark.usefixtures("hangup")
@pytest.mark.parametrize(
    ("recipe", "optimizer", "number", "call", "step", "of_critic"),
    [
        ("tf", "muon", signal.SIGINT, 5, 2, 0),  # in the third update
        ("sf+dmd", "adamw", signal.SIGTERM, 3, 0, 1),  # after one of the critic's first updates
        ("sf+dmd", "adamw", signal.SIGUSR1, 8, 1, 1),  # the critic of the second is done
        ("sf+gan", "muon", signal.SIGHUP, 9, 1, 1),
    ],
)
def test_a_stop_in_an_update_goes_on_as_if_there_was_none(
    recipe: str,
    optimizer: str,
    number: signal.Signals,
    call: int,
    step: int,
    of_critic: int,
    tmp_path: Path,
    whole: Whole,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """An update has two micro-batches of each learner; the signal comes in the `call`-th of all."""
    change = {"micro_batch": 2, "log_every": 2}
    folder, calls = tmp_path / "parts", []
    settings = config(folder, recipe, optimizer=optimizer, save_every=4, **change)
    with monkeypatch.context() as patch:
        for name in ("learn", "learn_critic"):
            learn = getattr(RECIPES[recipe], name)

            def stopped(batch: MicroBatch, share: float, learn: Any = learn) -> float:
                calls.append(share)
                if len(calls) == call:
                    signal.raise_signal(number)
                return learn(batch, share)

            patch.setattr(RECIPES[recipe], name, stopped)
        stir()
        before = signal.getsignal(number)
        with pytest.raises(KeyboardInterrupt):
            train(settings, device="cpu")
    assert len(calls) == call and signal.getsignal(number) is before
    assert f"stopped at update {step}" in capsys.readouterr().out
    assert steps(folder) == [f"step-{step:06d}"]
    facts = parallel.facts(folder / "checkpoints" / f"step-{step:06d}")
    assert len(facts["critic"]) == of_critic and len(facts["recent"]) == step % 2
    stir()
    train(settings, resume=True, device="cpu")
    assert steps(folder) == [f"step-{step:06d}", "step-000004"]
    assert_same(folder, whole(recipe, optimizer, **change))


def test_a_stop_before_anything_was_learned_leaves_no_checkpoint(
    tmp_path: Path, whole: Whole, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "run"
    with monkeypatch.context() as patch:
        patch.setattr(loop.Run, "prepare", lambda *_: signal.raise_signal(signal.SIGTERM))
        with pytest.raises(KeyboardInterrupt):
            train(config(folder, optimizer="muon"), device="cpu")
    assert not (folder / "checkpoints").exists()
    train(config(folder, optimizer="muon"), resume=True, device="cpu")  # as if it was the start
    assert_same(folder, whole("tf", "muon"))


def test_ignored_signals_stop_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As nohup and a shell's & have it."""
    step = loop.Run.train_step

    def signalled(self: loop.Run) -> report.Record:
        for number in process.STOPS:
            signal.raise_signal(number)
        return step(self)

    monkeypatch.setattr(loop.Run, "train_step", signalled)
    before = {number: signal.signal(number, signal.SIG_IGN) for number in process.STOPS}
    try:
        train(config(tmp_path / "run", steps=1), device="cpu")
        assert all(signal.getsignal(number) is signal.SIG_IGN for number in process.STOPS)
    finally:
        for number, was in before.items():
            signal.signal(number, was)
    assert steps(tmp_path / "run") == ["step-000001"]


@pytest.mark.parametrize(("recipe", "optimizer"), RESUMED)
def test_a_run_that_ended_goes_on_to_more_steps(
    recipe: str, optimizer: str, tmp_path: Path, whole: Whole
) -> None:
    """With what changes nothing changed on the way."""
    stir()
    short = config(tmp_path / "run", recipe, optimizer=optimizer, steps=1)
    train(short, device="cpu")
    stir()
    more = config(tmp_path / "run", recipe, optimizer=optimizer, micro_batch=4, save_every=1)
    train(more, resume=True, device="cpu")
    assert_same(tmp_path / "run", whole(recipe, optimizer))
    kept = (tmp_path / "run" / "config.json").read_text()
    with pytest.raises(ValueError, match="000004: has 4 updates already: steps=3 must be at least"):
        train(replace(more, steps=3), resume=True, device="cpu")
    assert (tmp_path / "run" / "config.json").read_text() == kept


def test_a_second_interrupt_stops_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the last checkpoint as it is."""
    step = loop.Run.train_step

    def interrupted(self: loop.Run) -> report.Record:
        if self.step == 3:
            signal.raise_signal(signal.SIGINT)
            signal.raise_signal(signal.SIGINT)
        return step(self)

    monkeypatch.setattr(loop.Run, "train_step", interrupted)
    monkeypatch.setattr(process, "TOGETHER", 0.0)
    with pytest.raises(KeyboardInterrupt):
        train(config(tmp_path / "run"), device="cpu")
    assert steps(tmp_path / "run") == ["step-000002"]


KILLED = """
import os, signal, sys
from pathlib import Path
import torch
from sfmodel.train import parallel
from sfmodel.train.loop import train
from tests.tiny_runs import config, tiny

torch.set_num_threads(1)
folder, moment = Path(sys.argv[1]), sys.argv[2]
write, replace = parallel.write, os.replace

def die(*_, **__):
    os.kill(os.getpid(), signal.SIGKILL)

def half(state, checkpoint_id, **more):
    if "4" not in checkpoint_id.name:
        return write(state, checkpoint_id=checkpoint_id, **more)
    (checkpoint_id / "__0_0.distcp").write_bytes(b"half")
    die()

if moment == "in the data":
    parallel.write = half
else:
    parallel.os.replace = lambda a, b: die() if "step-000004" in str(a) else replace(a, b)
with tiny():
    train(config(folder, optimizer="muon"), device="cpu")
"""


@pytest.mark.parametrize("moment", ["in the data", "before the name"])
def test_a_run_killed_while_it_saves_goes_on(moment: str, tmp_path: Path, whole: Whole) -> None:
    script, folder = tmp_path / "killed.py", tmp_path / "run"
    script.write_text(KILLED)
    words = [sys.executable, str(script), str(folder), moment]
    root = str(Path(__file__).parent.parent)
    ended = subprocess.run(words, capture_output=True, text=True, env={"PYTHONPATH": root})
    assert ended.returncode == -signal.SIGKILL, ended.stderr
    half = {"in the data": {"__0_0.distcp"}, "before the name": {"__0_0.distcp", ".metadata",
            "run.json"}}[moment]  # fmt: skip
    assert steps(folder) == [".step-000004.part", "step-000002"]
    part = folder / "checkpoints" / ".step-000004.part"
    assert {path.name for path in part.iterdir()} == half
    assert [path.name for path in parallel.checkpoints(folder / "checkpoints")] == ["step-000002"]
    # Another that is never saved again.
    shutil.copytree(part, part.with_name(".step-000003.part"))
    shutil.copytree(part, part.with_name(".mine.part"))
    train(config(folder, optimizer="muon"), resume=True, device="cpu")
    assert steps(folder) == [".mine.part", "step-000002", "step-000004"]
    assert_same(folder, whole("tf", "muon"))


@pytest.mark.parametrize("update", [2, 4])
def test_a_run_killed_before_it_wrote_its_weights_writes_them(
    update: int, tmp_path: Path, whole: Whole, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, settings = tmp_path / "run", config(tmp_path / "run", optimizer="muon")
    save = loop.Run._save_weights

    def killed(self: loop.Run) -> None:
        if self.step == update:
            raise KeyboardInterrupt
        save(self)

    with monkeypatch.context() as patch:
        patch.setattr(loop.Run, "_save_weights", killed)
        with pytest.raises(KeyboardInterrupt):
            train(settings, device="cpu")
    assert (folder / "model.safetensors").exists() == (update == 4)  # of update 2
    draw_pictures(monkeypatch)
    train(settings, resume=True, device="cpu")
    assert_same(folder, whole("tf", "muon"))
    assert (folder / "samples" / "update-000004.png").exists()
    assert (folder / "curves.png").exists()


def test_a_log_that_cannot_be_written_ends_the_run_with_what_it_learned(
    tmp_path: Path, whole: Whole, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, settings = tmp_path / "run", config(tmp_path / "run", optimizer="muon", save_every=4)
    update = loop.Run.train_step
    log = folder / "log.jsonl"

    def full(self: loop.Run) -> report.Record:
        record = update(self)
        if self.step == 3:
            log.rename(folder / "kept")
            log.symlink_to("/dev/full")
        return record

    with monkeypatch.context() as patch:
        patch.setattr(loop.Run, "train_step", full)
        with pytest.raises(OSError, match=r"^cannot write .*log.jsonl: No space left on device$"):
            train(settings, device="cpu")
    assert steps(folder) == ["step-000003"]
    log.unlink()
    (folder / "kept").rename(log)
    train(settings, resume=True, device="cpu")
    assert [line["step"] for line in logged(folder)] == [1, 2, 4]


def test_a_full_disk_keeps_the_last_checkpoint(
    tmp_path: Path, whole: Whole, monkeypatch: pytest.MonkeyPatch
) -> None:
    draw_pictures(monkeypatch)
    folder = tmp_path / "run"
    train(config(folder, optimizer="muon", steps=2), device="cpu")
    before = {p: p.read_bytes() for p in folder.rglob("*") if "step-" in str(p) and p.is_file()}
    averaged = (folder / "model.safetensors").read_bytes()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, limits[1]))  # of a file: no curves either
    try:
        with pytest.raises(OSError, match=r"^cannot write .*step-000004: File too large$"):
            train(config(folder, optimizer="muon"), resume=True, device="cpu")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert steps(folder) == ["step-000002"] and all(p.read_bytes() == b for p, b in before.items())
    assert (folder / "model.safetensors").read_bytes() == averaged
    assert not [path for path in folder.rglob("*.part")]
    train(config(folder, optimizer="muon"), resume=True, device="cpu")
    assert_same(folder, whole("tf", "muon"))


@pytest.fixture
def ended(tmp_path: Path, whole: Whole) -> Path:
    """A copy of a run with checkpoints of updates 2 and 4."""
    run = whole("tf", "muon")
    return Path(shutil.copytree(run, run.with_name(tmp_path.name)))


@pytest.mark.parametrize("kind", DAMAGE)
def test_a_damaged_checkpoint_is_named_with_the_one_before(
    kind: str, tmp_path: Path, ended: Path, whole: Whole
) -> None:
    newest = ended / "checkpoints" / "step-000004"
    DAMAGE[kind](newest)
    files = {path: path.stat().st_mtime_ns for path in ended.rglob("*")}
    settings = config(ended, optimizer="muon")
    with pytest.raises(ValueError) as raised:
        train(settings, resume=True, device="cpu")
    assert not (ended / "mark").exists()
    said = str(raised.value)
    assert said.startswith(f"{newest}: not a whole checkpoint (") and "\n" not in said
    assert said.endswith("; without it the run goes on from step-000002")
    assert files == {path: path.stat().st_mtime_ns for path in ended.rglob("*")}
    if kind == "data cut":
        shutil.rmtree(newest)
        train(settings, resume=True, device="cpu")
        assert_same(ended, whole("tf", "muon"))


@pytest.mark.parametrize("resume", [False, True])
def test_an_interrupt_in_a_checkpoint_is_one(
    resume: bool, tmp_path: Path, ended: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The library makes it an error of its own."""

    def interrupted(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(parallel._Planner, "load_bytes", interrupted)
    monkeypatch.setattr(parallel._Writer, "write_data", interrupted)
    with pytest.raises(KeyboardInterrupt):
        train(
            config(ended if resume else tmp_path / "new", optimizer="muon"),
            resume=resume,
            device="cpu",
        )
    assert not [*tmp_path.rglob("*.part")]


def as_saved_by_version_0_1(folder: Path) -> None:
    """Its settings `fall`, `fade` and `guidance` are called otherwise now, and there are more."""
    path = folder / "checkpoints" / "step-000002" / parallel.FACTS
    facts = json.loads(path.read_text())
    was = facts["config"]
    assert (was["decay_fraction"], was["darken"], was["guidance_scale"]) == (0.5, 0.5, 1.5)
    was |= {"fall": was.pop("decay_fraction"), "fade": was.pop("darken"), "guidance": 0.5}
    for name in ("guidance_scale", "ts_schedule", "betas_critic", "rollouts", "image"):
        del was[name]
    path.write_text(json.dumps(facts))


@pytest.mark.parametrize("ema", [0.0, 0.9])
def test_a_run_of_version_0_1_goes_on_unless_it_computed_otherwise(
    ema: float, tmp_path: Path
) -> None:
    folder = tmp_path / "run"
    settings = config(folder, decay_fraction=0.5, darken=0.5, guidance_scale=1.5, ema=ema)
    train(replace(settings, steps=2), device="cpu")
    as_saved_by_version_0_1(folder)
    with pytest.raises(ValueError, match=r"is of a run with darken=0\.5: resume with the same set"):
        train(replace(settings, darken=0.1), resume=True, device="cpu")
    with pytest.raises(ValueError, match=r"is of a run with image=False: resume with"):
        train(replace(settings, image=True), resume=True, device="cpu")
    if ema:
        said = r"000002: is of an earlier version \(its average began with smaller decays\): resume"
        with pytest.raises(ValueError, match=said):
            train(settings, resume=True, device="cpu")
    else:
        train(settings, resume=True, device="cpu")
    assert steps(folder) == ["step-000002", "step-000004"][: 1 if ema else 2]


def test_folders_of_other_runs_are_left_alone(tmp_path: Path, ended: Path) -> None:
    with alone(ended), pytest.raises(ValueError, match="another process writes there"):
        train(config(ended, optimizer="muon"), resume=True, device="cpu")
    files = {path: path.stat().st_mtime_ns for path in ended.rglob("*")}
    with pytest.raises(ValueError, match=f"{ended.name}: holds a run already"):
        train(config(ended, optimizer="muon", steps=9), device="cpu")
    for change, said in (
        (dict(lr=2e-3), r"lr=0\.001"),
        (dict(seed=1, batch=8), "batch=4, seed=0"),
        (dict(frames=(4, 1)), r"frames=\[4\]"),
    ):
        with pytest.raises(ValueError, match=f"step-000004: is of a run with {said}: resume with"):
            train(config(ended, optimizer="muon", **change), resume=True, device="cpu")
    assert files == {path: path.stat().st_mtime_ns for path in ended.rglob("*")}


@pytest.mark.parametrize(
    ("recipe", "which", "loss", "gradient"),
    [("tf", "generator", math.nan, 1.0), ("sf+dmd", "critic", 1.0, math.inf)],
)
def test_a_loss_that_is_not_finite_stops_the_run_at_once(
    recipe: str,
    which: str,
    loss: float,
    gradient: float,
    tmp_path: Path,
    whole: Whole,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    name = "learn" if which == "generator" else "learn_critic"
    learn = getattr(RECIPES[recipe], name)

    def exploding(batch: MicroBatch, share: float) -> float:
        value = learn(batch, share)
        if batch.batch.step < 2:
            return value
        model = getattr(batch.context.models, which)
        for parameter in model.parameters():
            assert parameter.grad is not None
            parameter.grad *= gradient
        return value * loss

    folder = tmp_path / "run"
    failed = folder / "checkpoints" / "failed-step-000002"
    failed.mkdir(parents=True)  # of another run, which its state takes the place of
    (failed / "left").touch()
    with monkeypatch.context() as patch:
        patch.setattr(RECIPES[recipe], name, exploding)
        with pytest.raises(FloatingPointError) as raised:
            train(config(folder, recipe), device="cpu")
    assert not (failed / "left").exists()
    said = str(raised.value)
    assert said.startswith(f"{which}: loss is ") and said.endswith(f"before it is in {failed}")
    assert "in update 3;" in said
    assert [path.name for path in parallel.checkpoints(failed.parent)] == ["step-000002"]
    before, after = saved(failed), saved(failed.with_name("step-000002"))
    assert before.keys() == after.keys()
    for key, value in before.items():
        assert not isinstance(value, torch.Tensor) or torch.equal(value, after[key]), key
    assert [line["step"] for line in logged(folder)] == [1, 2]
    train(config(folder, recipe), resume=True, device="cpu")  # the fault does not come again
    assert_same(folder, whole(recipe, "adamw"))


def test_checkpoints_are_in_the_order_of_updates_and_only_a_runs_own(tmp_path: Path) -> None:
    ranks = Ranks(0, 1, torch.device("cpu"))

    def save(step: int) -> None:
        parallel.save(tmp_path, step, {"a": torch.ones(2)}, {}, ranks)

    save(4)
    own = tmp_path / "step-000004"
    others = ["step-000004-best", "step-4", "step-0000005", "best", ".mine.part", "failed-step-x"]
    for name in others:
        shutil.copytree(own, tmp_path / name)
    (tmp_path / "step-000009").touch()  # a file
    for step in (999_998, 999_999, 1_000_000, 1_000_001):
        save(step)
    found = [path.name for path in parallel.checkpoints(tmp_path)]
    assert found == ["step-1000000", "step-1000001"]
    assert {path.name for path in tmp_path.iterdir()} == {*found, *others, "step-000009"}
