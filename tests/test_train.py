"""Training: every recipe runs, a stopped run goes on bit for bit, a broken one loses nothing."""

from __future__ import annotations

import json
import math
import random
import re
import resource
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from sfmodel import checkpoint, cli
from sfmodel.dit import DiT
from sfmodel.train import loop, parallel, recipes, report
from sfmodel.train.config import RECIPES, defaults
from sfmodel.train.loop import train
from tests.tiny_runs import TINY, config, saved, tiny, weights

PLOT, SAMPLE = report.plot, report.Report.sample
RESUMED = [("tf", "muon"), ("sf+dmd", "adamw"), ("sf+gan", "muon")]


@pytest.fixture(autouse=True)
def _tiny() -> Iterator[None]:
    with tiny():
        yield


@pytest.fixture
def pictures(_tiny: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """They are drawn after all."""
    monkeypatch.setattr(report, "plot", PLOT)
    monkeypatch.setattr(report.Report, "sample", SAMPLE)


@pytest.fixture
def runs(monkeypatch: pytest.MonkeyPatch) -> list[loop.Run]:
    """Those that are made."""
    made: list[loop.Run] = []
    init = loop.Run.__init__

    def recording(self: loop.Run, *arguments: Any) -> None:
        init(self, *arguments)
        made.append(self)

    monkeypatch.setattr(loop.Run, "__init__", recording)
    return made


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, str], Path]:
    """The folder of an uninterrupted run."""
    folder = tmp_path_factory.mktemp("whole")

    def run(recipe: str, optimizer: str) -> Path:
        path = folder / f"{recipe} {optimizer}"
        if not path.exists():
            with tiny():
                train(config(path, recipe, optimizer=optimizer), device="cpu")
        return path

    return run


def steps(folder: Path) -> list[str]:
    """The names of all that lies among a run's checkpoints."""
    return sorted(path.name for path in (folder / "checkpoints").iterdir())


def logged(folder: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


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


def stir() -> None:
    """Nothing may hang on the global generators."""
    random.seed()
    torch.seed()


def is_file(model: nn.Module, path: Path) -> dict[str, bool]:
    """Whether each tensor is as in the file."""
    state, _ = checkpoint.matching(model, path)
    return {name: torch.equal(value.cpu(), state[name]) for name, value in
            model.state_dict().items()}  # fmt: skip


@pytest.mark.usefixtures("pictures")
@pytest.mark.parametrize("recipe", RECIPES)
def test_every_recipe_trains_from_the_command_line(
    recipe: str,
    tmp_path: Path,
    runs: list[loop.Run],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    folder, kind = tmp_path / "run", RECIPES[recipe]
    init = weights(tmp_path / "init.safetensors", 1)
    teacher = weights(tmp_path / "teacher.safetensors", 2)
    words = ["--recipe", recipe, "--init", init, "--frames", 4, "--windows", 3, 4, "--steps", 2]
    words += ["--batch", 2, "--chunks", 1, 3, "--log-every", 1, "--threads", 1, "--pairs", 2]
    if kind.distils or kind.objective == "ode":
        words += ["--teacher", teacher, "--critic-steps", 1, "--critic-warmup", 0]
    words += ["--output", folder]
    monkeypatch.setattr(sys, "argv", ["sfmodel", "train", *map(str, words)])
    cli.main()
    assert f"weights: {folder / 'model.safetensors'}" in capsys.readouterr().out

    assert json.loads((folder / "config.json").read_text())["recipe"] == recipe
    lines = logged(folder)
    assert [line["step"] for line in lines] == [1, 2]
    losses = {"loss", "norm"} | ({"critic_loss", "critic_norm"} if kind.distils else set())
    for line in lines:
        assert losses == {name for name in line if re.search("loss|norm", name)}
        assert all(map(math.isfinite, line.values())) and line["norm"] > 0
    assert (folder / "curves.png").stat().st_size > 1000
    sampled = [path.name for path in (folder / "samples").glob("*")]
    assert sampled == ([] if kind.context == "whole" else ["update-000002.png"])
    assert steps(folder) == ["step-000002"]
    assert (folder / "trajectories").exists() == (kind.objective == "ode")

    (run,) = runs
    assert not any(is_file(run.models.generator, init).values())
    state, metadata = checkpoint.read(folder / "model.safetensors")
    assert "blocks.0.self_attn.q.weight" in state
    assert json.loads(metadata["step"]) == 2 and json.loads(metadata["recipe"]) == recipe
    averaged = is_file(run.average, folder / "model.safetensors")
    assert all(averaged.values())
    assert (run.models.critic is not None) == kind.distils
    if run.models.critic is not None:
        kept = {name for name, same in is_file(run.models.critic, teacher).items() if same}
        unread = {"head.head.weight", "head.head.bias", "head.modulation"}  # by the discriminator
        assert kept == (unread if kind.objective == "gan" else set())
    assert (run.models.real is not None) == (kind.objective in ("ode", "dmd", "sid"))
    if run.models.real is not None:
        assert all(is_file(run.models.real, teacher).values())
        assert not any(p.requires_grad for p in run.models.real.parameters())
    assert (run.models.discriminator is not None) == (kind.objective == "gan")
    if run.models.discriminator is not None:
        assert run.models.discriminator.logit.weight.abs().min() > 0  # it is zero at first


def test_training_learns(tmp_path: Path) -> None:
    settings = config(
        tmp_path / "run", steps=60, batch=16, chunks=(3,), windows=(4,), lr=5e-3, init=None,
        log_every=10, save_every=60,
    )  # fmt: skip
    train(settings, device="cpu")
    losses = [line["loss"] for line in logged(tmp_path / "run")]
    assert len(losses) == 6 and losses[-1] < 0.7 * losses[0]


@pytest.mark.parametrize(("recipe", "optimizer"), RESUMED)
def test_an_interrupt_ends_the_update_and_the_run_goes_on_as_if_there_was_none(
    recipe: str,
    optimizer: str,
    tmp_path: Path,
    whole: Callable[[str, str], Path],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Ctrl-C in the middle of the third update: between the update of some weights and that of the
    others."""
    settings = config(tmp_path / "parts", recipe, optimizer=optimizer)
    with monkeypatch.context() as patch:
        update = torch.optim.AdamW.step

        def interrupted(self: torch.optim.AdamW) -> None:
            update(self)
            calls.append(1)
            if len(calls) == (6 if RECIPES[recipe].distils else 3):  # the critic has one more
                signal.raise_signal(signal.SIGINT)

        calls: list[int] = []
        patch.setattr(torch.optim.AdamW, "step", interrupted)
        stir()
        with pytest.raises(KeyboardInterrupt):
            train(settings, device="cpu")
    assert "stopped at update 3" in capsys.readouterr().out
    assert steps(tmp_path / "parts") == ["step-000002", "step-000003"]
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    stir()
    train(settings, resume=True, device="cpu")
    assert steps(tmp_path / "parts") == ["step-000003", "step-000004"]
    assert_same(tmp_path / "parts", whole(recipe, optimizer))


@pytest.mark.parametrize(("recipe", "optimizer"), RESUMED)
def test_a_run_that_ended_goes_on_to_more_steps(
    recipe: str, optimizer: str, tmp_path: Path, whole: Callable[[str, str], Path]
) -> None:
    """With what changes nothing changed on the way."""
    stir()
    short = config(tmp_path / "run", recipe, optimizer=optimizer, steps=1)
    train(short, device="cpu")
    stir()
    more = config(tmp_path / "run", recipe, optimizer=optimizer, micro_batch=4, save_every=1)
    train(more, resume=True, device="cpu")
    assert_same(tmp_path / "run", whole(recipe, optimizer))


def test_a_second_interrupt_stops_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the last checkpoint as it is."""
    step = loop.Run.train_step

    def interrupted(self: loop.Run) -> report.Record:
        if self.step == 3:
            signal.raise_signal(signal.SIGINT)
            signal.raise_signal(signal.SIGINT)
        return step(self)

    monkeypatch.setattr(loop.Run, "train_step", interrupted)
    with pytest.raises(KeyboardInterrupt):
        train(config(tmp_path / "run"), device="cpu")
    assert steps(tmp_path / "run") == ["step-000002"]
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


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
def test_a_run_killed_while_it_saves_goes_on(
    moment: str, tmp_path: Path, whole: Callable[[str, str], Path]
) -> None:
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
    train(config(folder, optimizer="muon"), resume=True, device="cpu")
    assert steps(folder) == ["step-000002", "step-000004"]
    assert_same(folder, whole("tf", "muon"))


@pytest.mark.usefixtures("pictures")
def test_a_full_disk_keeps_the_last_checkpoint(
    tmp_path: Path, whole: Callable[[str, str], Path], capsys: pytest.CaptureFixture[str]
) -> None:
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
def ended(tmp_path: Path, whole: Callable[[str, str], Path]) -> Path:
    """A copy of a run with checkpoints of updates 2 and 4."""
    run = whole("tf", "muon")
    return Path(shutil.copytree(run, run.with_name(tmp_path.name)))


def cut(path: Path) -> None:
    """At half its length."""
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


DAMAGE: dict[str, Callable[[Path], None]] = {
    "data cut": lambda path: cut(path / "__0_0.distcp"),
    "no data": lambda path: (path / "__0_0.distcp").unlink(),
    "table cut": lambda path: cut(path / ".metadata"),
    "no table": lambda path: (path / ".metadata").unlink(),
    "facts cut": lambda path: cut(path / "run.json"),
    "no facts": lambda path: (path / "run.json").unlink(),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_a_damaged_checkpoint_is_named_with_the_one_before(
    kind: str, tmp_path: Path, ended: Path, whole: Callable[[str, str], Path]
) -> None:
    newest = ended / "checkpoints" / "step-000004"
    DAMAGE[kind](newest)
    files = {path: path.stat().st_mtime_ns for path in ended.rglob("*")}
    settings = config(ended, optimizer="muon")
    with pytest.raises(ValueError) as raised:
        train(settings, resume=True, device="cpu")
    said = str(raised.value)
    assert said.startswith(f"{newest}: not a whole checkpoint (") and "\n" not in said
    assert said.endswith("; without it the run goes on from step-000002")
    assert files == {path: path.stat().st_mtime_ns for path in ended.rglob("*")}
    if kind == "data cut":
        shutil.rmtree(newest)
        train(settings, resume=True, device="cpu")
        assert_same(ended, whole("tf", "muon"))


def test_folders_of_other_runs_are_left_alone(tmp_path: Path, ended: Path) -> None:
    with pytest.raises(ValueError, match="none: holds no run to resume"):
        train(config(tmp_path / "none"), resume=True, device="cpu")
    assert not (tmp_path / "none").exists()
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
    whole: Callable[[str, str], Path],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    name = "learn" if which == "generator" else "learn_critic"
    learn = getattr(recipes.Part, name)

    def exploding(self: recipes.Part, share: float) -> float:
        value = learn(self, share)
        if self.update.step < 2:
            return value
        model = self.models.generator if which == "generator" else self.models.critic
        assert model is not None
        for parameter in model.parameters():
            assert parameter.grad is not None
            parameter.grad *= gradient
        return value * loss

    folder = tmp_path / "run"
    with monkeypatch.context() as patch:
        patch.setattr(recipes.Part, name, exploding)
        with pytest.raises(FloatingPointError) as raised:
            train(config(folder, recipe), device="cpu")
    failed = folder / "checkpoints" / "failed-step-000002"
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


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (dict(recipe="sf"), "recipe='sf': must be one of bidirectional, tf, df, ode, tf"),
        (dict(preset="huge"), "preset='huge': must be one of toy"),
        (dict(teacher_preset="huge"), "teacher_preset='huge': must be one of toy"),
        (dict(steps=0), "steps=0: must be at least 1"),
        (dict(batch=0), "batch=0: must be at least 1"),
        (dict(log_every=0), "log_every=0: must be at least 1"),
        (dict(save_every=-1), "save_every=-1: must be at least 1"),
        (dict(pairs=0), "pairs=0: must be at least 1"),
        (dict(teacher_steps=0), "teacher_steps=0: must be at least 1"),
        (dict(frames=(6,)), "must be 1 plus a multiple"),
        (dict(windows=(4, 2)), "smaller than a chunk"),
        (dict(sink=4), "sink=4 must be smaller than window"),
        (dict(recipe="ode", teacher=None), "recipe='ode' learns from a teacher: give its weights"),
        (dict(recipe="tf+dmd", teacher=None), r"recipe='tf\+dmd' learns from a teacher"),
        (dict(recipe="sf+dmd", teacher_preset="wan-14b"), "of 'wan-14b': give critic"),
        (dict(recipe="sf+gan", teacher=None), "teacher=None of 'toy': give critic"),
        (dict(recipe="bidirectional", hide_first=True), "a bidirectional model has no first chunk"),
    ],
)
def test_bad_settings(tmp_path: Path, change: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        config(tmp_path / "run", **{"recipe": "tf", **change})


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (dict(init=Path("none.pt")), "none.pt: there is no such checkpoint file"),
        (dict(batch=3, micro_batch=2), "an update of 3 clips: must divide into 1 ranks and micro"),
        (dict(batch=3, micro_batch=2, frames=(4, 1)), "an update of 3 clips: must divide"),
        (dict(data=Path("none.txt")), "none.txt: no such file or folder"),
        (dict(recipe="ode", teacher_steps=7), "teacher_steps=7: 1000 · k/7 must hit"),
    ],
)
def test_settings_that_do_not_fit_what_there_is(
    tmp_path: Path, change: dict[str, Any], said: str
) -> None:
    with pytest.raises(ValueError, match=said):
        train(config(tmp_path / "run", **{"recipe": "tf", **change}), device="cpu")
    assert not (tmp_path / "run" / "checkpoints").exists()


def test_prompts_are_enough_without_clips(tmp_path: Path) -> None:
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a red ball\na ball moves up\n")
    with pytest.raises(ValueError, match=r"'tf' learns from clips: .*prompts.txt holds prompts"):
        train(config(tmp_path / "a", data=prompts), device="cpu")
    train(config(tmp_path / "b", "sf+dmd", data=prompts, steps=1), device="cpu")
    assert logged(tmp_path / "b")[0]["loss"] > 0


def test_a_rate_warms_up_and_falls(tmp_path: Path) -> None:
    settings = config(tmp_path / "run", steps=10, warmup=4, fall=0.5)
    rates = [loop._rate(step, settings) for step in range(10)]
    assert rates[:3] == pytest.approx([0.25, 0.5, 0.75]) and rates[3:6] == [1.0] * 3
    assert rates[6:] == pytest.approx([0.02 + 0.98 * left / 5 for left in (4, 3, 2, 1)])


def said_by(
    words: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> tuple[int, str, str]:
    monkeypatch.setattr(sys, "argv", ["sfmodel", *words.split()])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    code = ended.value.code
    assert isinstance(code, int)
    out, err = capsys.readouterr()
    return code, " ".join(re.sub("[│╭╮╰╯─]", " ", out).split()), err.strip()


def test_help_shows_the_defaults_of_the_recipe(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for words, preset, recipe in (
        ("--recipe sf+dmd", "toy", "sf+dmd"),
        ("--recipe=bidirectional", "toy", "bidirectional"),
        ("", "toy", "tf"),
        ("--recipe sf+sid --preset wan-1.3b", "wan-1.3b", "sf+sid"),
    ):
        code, out, _ = said_by(f"train {words} --help", monkeypatch, capsys)
        want = defaults(preset, recipe)
        assert code == 0 and f"RECIPES (default: {recipe})" in out
        assert f"--steps INT updates of the generator (default: {want.steps})" in out
        assert f"shorter ones of `frames` come in proportion (default: {want.batch})" in out
        assert f"rate of the generator (default: {want.lr})" in out
        assert f"before each one of the generator (default: {want.critic_steps})" in out
    assert defaults("toy", "sf+dmd").steps != defaults("toy", "tf").steps


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("--recipe nonsense", "recipe='nonsense': must be one of bidirectional, tf"),
        ("--preset huge", "preset='huge': must be one of toy"),
        ("--recipe sf+dmd --steps 0", "steps=0: must be at least 1"),
        ("--init none.pt", "none.pt: there is no such checkpoint file"),
        ("--output {run}", "holds a run already"),
        ("--output {run} --resume", "is of a run with"),
    ],
)
def test_bad_settings_are_one_sentence(
    words: str,
    said: str,
    ended: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    code, _, err = said_by(f"train {words.format(run=ended)}", monkeypatch, capsys)
    assert code == 2 and said in err and err.startswith("sfmodel: ") and "\n" not in err


def test_a_tiny_model_is_meant() -> None:
    """What all of the above trains."""
    assert TINY.dit.layers == 1 and defaults().model is TINY


@pytest.mark.parametrize(
    ("recipe", "names"),
    [("tf", {"generator"}), ("tf+dmd", {"generator", "real", "critic"}),
     ("sf+dmd", {"real", "critic"})],
)  # fmt: skip
def test_what_sees_whole_clips_is_compiled(
    recipe: str, names: set[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not a generator that rolls out: each of its chunks would be a graph of its own."""
    compiled: list[DiT] = []
    monkeypatch.setattr(DiT, "compile", lambda self: compiled.append(self))
    with tiny(), parallel.started(device="cpu") as ranks:
        run = loop.Run(config(tmp_path / "run", recipe, compile=True), ranks)
    models = run.models._asdict()
    assert {id(model) for model in compiled} == {id(models[name]) for name in names}


def test_a_clip_found_bad_while_training_is_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its file looks whole when it is opened."""
    (tmp_path / "data").mkdir()
    latents = torch.zeros(2, 4, 4, 8, 8)
    latents[1] = math.nan
    prompts = {"prompts": json.dumps(["", ""])}
    save_file({"latents": latents}, tmp_path / "data" / "shard.safetensors", prompts)
    with tiny():
        train(config(tmp_path / "run", data=tmp_path / "data", steps=1), device="cpu")
    said = capsys.readouterr().out.splitlines()
    assert sum("1 file skipped: shard.safetensors (" in line for line in said) == 1


@pytest.mark.gpu
@pytest.mark.parametrize("recipe", ["tf", "sf+dmd", "sf+gan"])
def test_a_gpu_trains_as_the_cpu(recipe: str, tmp_path: Path) -> None:
    """The losses of the first two updates, with the kernels, forward and backward."""
    losses = {}
    for device in ("cpu", "cuda"):
        with tiny(), parallel.started(device=device) as ranks:
            run = loop.Run(config(tmp_path / device, recipe), ranks)
            losses[device] = [run.train_step() for _ in range(2)]
    for cpu, cuda in zip(losses["cpu"], losses["cuda"], strict=True):
        assert cuda == pytest.approx(cpu, rel=2e-2)
