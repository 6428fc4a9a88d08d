"""Training: every recipe runs and learns, and what does not fit is refused."""

from __future__ import annotations

import json
import math
import re
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from sfmodel.cli import main
from sfmodel.dit import DiT
from sfmodel.ranks import Ranks, started
from sfmodel.train import loop
from sfmodel.train.config import RECIPES
from sfmodel.train.defaults import defaults
from sfmodel.train.loop import reproducible, train
from sfmodel.train.models import Models
from sfmodel.weights import checkpoint
from tests.tiny_runs import TINY, config, draw_pictures, logged, steps, tiny, weights


@pytest.fixture(autouse=True)
def _tiny() -> Iterator[None]:
    with tiny():
        yield


@pytest.fixture
def pictures(_tiny: None, monkeypatch: pytest.MonkeyPatch) -> None:
    draw_pictures(monkeypatch)


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


@pytest.fixture
def ended(tmp_path: Path) -> Path:
    """The folder of a run that is over."""
    train(config(tmp_path / "ended", steps=1), device="cpu")
    return tmp_path / "ended"


def is_file(model: nn.Module, path: Path) -> dict[str, bool]:
    """Whether each tensor is as in the file."""
    return are(model.state_dict(), checkpoint.matching(model, path)[0])


def are(some: dict[str, Tensor], others: dict[str, Tensor]) -> dict[str, bool]:
    return {name: torch.equal(value, others[name]) for name, value in some.items()}


@pytest.mark.usefixtures("pictures")
@pytest.mark.parametrize("recipe", RECIPES)
def test_every_recipe_trains_from_the_command_line(
    recipe: str,
    tmp_path: Path,
    runs: list[loop.Run],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    folder, objective = tmp_path / "run", RECIPES[recipe]
    init = weights(tmp_path / "init.safetensors", 1)
    teacher = weights(tmp_path / "teacher.safetensors", 2)
    words = ["--recipe", recipe, "--init", init, "--frames", 4, "--windows", 3, 4, "--steps", 2]
    words += ["--batch", 2, "--chunks", 1, 3, "--log-every", 1, "--threads", 1, "--pairs", 2]
    if objective.needs_critic or objective.needs_teacher:
        words += ["--teacher", teacher, "--critic-steps", 1, "--critic-warmup", 0]
    words += ["--output", folder]
    monkeypatch.setattr(sys, "argv", ["sfmodel", "train", *map(str, words)])
    main.main()
    assert f"weights: {folder / 'model.safetensors'}" in capsys.readouterr().out

    assert json.loads((folder / "config.json").read_text())["recipe"] == recipe
    lines = logged(folder)
    assert [line["step"] for line in lines] == [1, 2]
    critics = {"critic_loss", "critic_norm"} if objective.needs_critic else set()
    for line in lines:
        assert {"loss", "norm"} | critics == {name for name in line if re.search("loss|norm", name)}
        assert all(map(math.isfinite, line.values())) and line["norm"] > 0
    assert (folder / "curves.png").stat().st_size > 1000
    sampled = sorted(path.name for path in (folder / "samples").glob("*"))
    names = [*(f"update-000002-{i}.mp4" for i in range(3)), "update-000002.png"]
    assert sampled == ([] if objective.context == "whole" else names)
    assert steps(folder) == ["step-000002"]
    assert (folder / "trajectories").exists() == objective.needs_trajectories

    (run,) = runs
    assert not any(is_file(run.models.generator, init).values())
    state, metadata = checkpoint.read(folder / "model.safetensors")
    assert "blocks.0.self_attn.q.weight" in state
    assert json.loads(metadata["step"]) == 2 and json.loads(metadata["recipe"]) == recipe
    assert all(are(run.average, checkpoint.from_official(state)).values())
    assert run.average.keys() == run.models.generator.state_dict().keys()
    assert (run.models.critic is not None) == objective.needs_critic
    if run.models.critic is not None:
        kept = {name for name, same in is_file(run.models.critic, teacher).items() if same}
        unread = {"head.head.weight", "head.head.bias", "head.modulation"}  # by the discriminator
        assert kept == (unread if objective.needs_discriminator else set())
    assert (run.models.real is not None) == objective.needs_teacher
    if run.models.real is not None:
        assert all(is_file(run.models.real, teacher).values())
        assert not any(p.requires_grad for p in run.models.real.parameters())
    assert (run.models.discriminator is not None) == objective.needs_discriminator
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


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (
            dict(recipe="sf"),
            "recipe='sf': must be one of bidirectional, tf, df, ode, consistency, tf",
        ),
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
        config(tmp_path / "run", **{"recipe": "tf", **change}).check_files()


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (dict(init=Path("none.pt")), "none.pt: there is no such checkpoint file"),
        (dict(batch=3, micro_batch=2), "an update of 3 clips: must divide into 1 ranks and micro"),
        (dict(batch=3, micro_batch=2, frames=(4, 1)), "an update of 3 clips: must divide"),
        (dict(data=Path("none.txt")), "none.txt: no such file or folder"),
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


def test_models_and_data_may_be_ready_ones(tmp_path: Path) -> None:
    """They are learned as those that the settings name."""
    settings = config(tmp_path / "run", "sf+dmd")
    ranks = Ranks(0, 1, torch.device("cpu"))
    named, ready = loop.Run(settings, ranks), Models.load(settings, ranks)
    bare = replace(settings, init=None, teacher=None, output=Path("/proc/none"))
    given = loop.Run(bare, ranks, source=named.source, models=ready)
    assert named.train_step() == given.train_step() and given.models is ready
    for models, recipe in ((ready, "tf"), (Models(ready.generator), "sf+dmd")):
        with pytest.raises(ValueError, match=f"models: recipe='{re.escape(recipe)}' learns with a"):
            loop.Run(replace(bare, recipe=recipe), ranks, models=models)


def test_without_an_average_the_generator_itself_is_saved(tmp_path: Path, runs: list[Any]) -> None:
    path = train(config(tmp_path / "run", steps=2, ema=0.0), device="cpu")
    assert all(is_file(runs[0].models.generator, path).values())
    train(config(tmp_path / "run", steps=4, ema=0.0), device="cpu", resume=True)
    assert steps(tmp_path / "run") == ["step-000002", "step-000004"]


def test_runs_on_a_gpu_take_deterministic_kernels() -> None:
    """And leave PyTorch's settings as they were; on a CPU there is nothing to set."""
    settings: Any = torch.utils.deterministic
    filled = settings.fill_uninitialized_memory
    for device, wanted, expected in (("cuda", True, True), ("cuda", False, False),
                                     ("cpu", True, False)):  # fmt: skip
        with reproducible(torch.device(device), wanted):
            assert torch.are_deterministic_algorithms_enabled() == expected
            assert torch.is_deterministic_algorithms_warn_only_enabled() == expected
            assert settings.fill_uninitialized_memory == (filled and not expected)
        assert not torch.are_deterministic_algorithms_enabled()
        assert settings.fill_uninitialized_memory == filled


def test_a_rate_warms_up_and_falls(tmp_path: Path) -> None:
    settings = config(tmp_path / "run", steps=10, warmup=4, decay_fraction=0.5)
    rates = [loop._rate(step, settings) for step in range(10)]
    assert rates[:3] == pytest.approx([0.25, 0.5, 0.75]) and rates[3:6] == [1.0] * 3
    assert rates[6:] == pytest.approx([0.02 + 0.98 * left / 5 for left in (4, 3, 2, 1)])


def said_by(
    words: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> tuple[int, str, str]:
    monkeypatch.setattr(sys, "argv", ["sfmodel", *words.split()])
    with pytest.raises(SystemExit) as ended:
        main.main()
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
        assert code == 0 and f"(+dmd …) (default: {recipe})" in out
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
    assert TINY.dit.layers == 1 and defaults().model.dit is TINY.dit


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
    with tiny(), started(device="cpu") as ranks:
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
        with tiny(), started(device=device) as ranks:
            run = loop.Run(config(tmp_path / device, recipe), ranks)
            losses[device] = [run.train_step() for _ in range(2)]
    for cpu, cuda in zip(losses["cpu"], losses["cuda"], strict=True):
        assert cuda == pytest.approx(cpu, rel=2e-2)
