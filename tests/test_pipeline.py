"""The pipeline: stages follow from one another, it goes on bit for bit, a bad one ends it."""

from __future__ import annotations

import functools
import json
import math
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from safetensors.torch import load_file

from sfmodel.cli import main
from sfmodel.cli.pipeline import for_stages, pipeline_stages
from sfmodel.config import PRESETS
from sfmodel.dit import DiT
from sfmodel.toy import evaluate
from sfmodel.toy.vae import ToyVAE
from sfmodel.train import checks, loop, pipeline
from sfmodel.train.checks import Measure
from sfmodel.train.config import TrainConfig
from sfmodel.train.defaults import defaults
from sfmodel.train.loop import train
from sfmodel.train.pipeline import run_pipeline, stages
from sfmodel.weights import checkpoint
from sfmodel.weights.saving import save_tensors
from tests.tiny_runs import TINY, config, draw_pictures, logged, tiny

NAMES, RUN = ["1-teacher", "2-init", "3-self-forcing"], Path("run")
LENIENT: dict[str, Any] = {"WHOLE": math.inf, "REAL": math.inf, "OWN": math.inf, "VIDEOS": 16}


HELD_OUT = functools.cache(evaluate.held_out)  # which takes as long as a stage
CODEC = functools.cache(ToyVAE.from_pretrained)


@contextmanager
def cheap() -> Iterator[None]:
    """Context in which models that learn nothing in two updates pass, and are measured at once."""
    codec = mock.patch.object(ToyVAE, "from_pretrained", CODEC)
    held_out = mock.patch.object(checks, "held_out", HELD_OUT)
    few, lenient = mock.patch.object(evaluate, "REAL", 128), mock.patch.multiple(checks, **LENIENT)
    with tiny(), codec, held_out, few, lenient, mock.patch.object(pipeline, "sheet"):
        yield


@pytest.fixture(autouse=True)
def _cheap(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """In a folder of its own, so that settings that name files in it are the same everywhere."""
    monkeypatch.chdir(tmp_path)
    with cheap():
        yield


def small(init_by: Any = "ode", **change: Any) -> dict[str, TrainConfig]:
    """Stages of two updates in the folder `run`."""
    each = config(RUN / "none", steps=2, save_every=1, pairs=2, **change)
    return {
        name: replace(each, recipe=of.recipe, output=of.output, init=of.init, teacher=of.teacher)
        for name, of in stages(output=RUN, init_by=init_by).items()
    }


Whole = Callable[[str], Path]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Whole:
    """The folder of a pipeline that was never stopped."""
    folder = tmp_path_factory.mktemp("whole")

    def run(init_by: str) -> Path:
        if not (folder / init_by).exists():
            run_pipeline(small(init_by), RUN, device="cpu")
            RUN.rename(folder / init_by)
        return folder / init_by

    return run


def assert_same(want: Path, count: int = 3) -> None:
    """Bit for bit: the weights, the losses and the check of the first stages."""
    for name in NAMES[:count]:
        a, b = RUN / name, want / name
        for file in ("model.safetensors", "check.json", "check.safetensors"):
            assert (a / file).read_bytes() == (b / file).read_bytes()
        losses = [[line["loss"] for line in logged(folder)] for folder in (a, b)]
        assert losses[0] == losses[1] and len(losses[0]) == 2


@pytest.mark.parametrize("init_by", ["ode", "consistency"])
def test_every_stage_begins_from_the_ones_before(init_by: str, whole: Whole) -> None:
    folder = whole(init_by)
    settings = [json.loads((folder / name / "config.json").read_text()) for name in NAMES]
    assert [each["recipe"] for each in settings] == ["bidirectional", init_by, "sf+dmd"]
    weights = [str(RUN / name / "model.safetensors") for name in NAMES]
    assert [each["init"] for each in settings] == [None, weights[0], weights[1]]
    assert [each["teacher"] for each in settings[1:]] == [weights[0]] * 2
    assert (folder / "2-init" / "trajectories").exists() == (init_by == "ode")
    for name, recipe in zip(NAMES, ("bidirectional", init_by, "sf+dmd"), strict=True):
        assert len(logged(folder / name)) == 2
        metadata = checkpoint.read(folder / name / "model.safetensors")[1]
        assert json.loads(metadata["recipe"]) == recipe
        facts = json.loads((folder / name / "check.json").read_text())
        assert facts["step"] == 2 and len(facts["measures"]) == 1
        clips = load_file(folder / name / "check.safetensors")
        assert clips["latents"].shape == clips["real"].shape == (2, 4, 4, 8, 8)
    assert torch.equal(clips["real"], load_file(folder / NAMES[0] / "check.safetensors")["real"])


def test_a_stage_is_an_ordinary_run(whole: Whole) -> None:
    """Alone, with its settings, it learns the same."""
    folder = shutil.copytree(whole("ode"), RUN)
    alone = train(replace(small()["self-forcing"], output=Path("alone")), device="cpu")
    assert alone.read_bytes() == (folder / NAMES[2] / "model.safetensors").read_bytes()


class Killed(BaseException):
    """What nothing catches."""


@pytest.mark.parametrize(
    ("where", "name", "call", "stage"),
    [
        (loop.Run, "train_step", 2, 0),
        (checks, "sample", 1, 0),
        (loop.Run, "_solve", 1, 1),  # a trajectory
        (loop.Run, "_save_weights", 2, 1),
        (checks, "save_tensors", 1, 1),
        (checks, "atomic", 1, 1),  # check.json
        (pipeline, "train", 1, 2),
        (loop.Run, "update", 4, 2),  # of the critic
        (pipeline, "draw", 1, 3),
    ],
)
def test_it_goes_on_from_wherever_it_was_stopped(
    where: Any, name: str, call: int, stage: int, whole: Whole
) -> None:
    """In updates, trajectories and checks, and between stages. Stages before are over, and those
    after, which begin from the same weights, are left out."""
    want, original, calls = whole("ode"), getattr(where, name), 0
    some = dict([*small().items()][: stage + 1])
    for each in NAMES[:stage]:
        shutil.copytree(want / each, RUN / each)

    def stopped(*arguments: Any, **named: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == call:
            raise Killed
        return original(*arguments, **named)

    with mock.patch.object(where, name, stopped), pytest.raises(Killed):
        run_pipeline(some, RUN, resume=True, device="cpu")
    torch.seed()
    run_pipeline(some, RUN, resume=True, device="cpu")
    assert_same(want, len(some))


KILLED = """
import os, signal
import torch
from sfmodel.train import loop
from sfmodel.train.pipeline import run_pipeline
from tests.test_pipeline import RUN, cheap, small

torch.set_num_threads(1)
step = loop.Run.train_step

def dying(self):
    record = step(self)
    if self.config.recipe == "sf+dmd":
        os.kill(os.getpid(), signal.SIGKILL)
    return record

loop.Run.train_step = dying
with cheap():
    run_pipeline(small(), RUN, resume=True, device="cpu")
"""


def test_a_killed_process_goes_on(whole: Whole, tmp_path: Path) -> None:
    """SIGKILL within self forcing."""
    want, script = whole("ode"), tmp_path / "killed.py"
    for name in NAMES[:2]:
        shutil.copytree(want / name, RUN / name)
    script.write_text(KILLED)
    root = str(Path(__file__).parent.parent)
    words = [sys.executable, str(script)]
    ended = subprocess.run(words, capture_output=True, text=True, env={"PYTHONPATH": root})
    assert ended.returncode == -signal.SIGKILL, ended.stderr
    assert (RUN / NAMES[2] / "config.json").exists()
    assert not (RUN / NAMES[2] / "model.safetensors").exists()
    run_pipeline(small(), RUN, resume=True, device="cpu")
    assert_same(want)


def test_what_is_over_is_not_done_again(whole: Whole) -> None:
    shutil.copytree(whole("ode"), RUN)
    made = small()
    with mock.patch.object(pipeline, "train") as trained, mock.patch.object(checks, "check") as new:
        run_pipeline(made, RUN, resume=True, device="cpu")
        assert not trained.called and not new.called
        with pytest.raises(
            ValueError, match=r"1-teacher/check.json: is of a run with lr=0\.001: re"
        ):
            changed = {**made, "teacher": replace(made["teacher"], lr=2e-3)}
            run_pipeline(changed, RUN, resume=True, device="cpu")
        with pytest.raises(
            ValueError, match=r"2-init: began from \S*1-teacher as it was, which wo"
        ):
            longer = {**made, "teacher": replace(made["teacher"], steps=3)}
            run_pipeline(longer, RUN, resume=True, device="cpu")
        (made["init"].output / "check.json").write_text("{")
        with pytest.raises(
            ValueError, match=r"check.json: is no check: remove it, and the stage i"
        ):
            run_pipeline(made, RUN, resume=True, device="cpu")


def test_a_bad_stage_ends_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """In one sentence, and again when it is resumed, unless it is accepted or learns further."""
    made = small()
    monkeypatch.setattr(checks, "WHOLE", 0.1)
    said = (
        r"1-teacher: stage teacher has not passed its check: Fréchet distance at frames 2-3 "
        r"[0-9.]+ \(must be at most 0\.1\): give it more updates \(--resume --teacher.steps"
    )
    with pytest.raises(ValueError, match=said):
        run_pipeline(made, RUN, device="cpu")
    assert not made["init"].output.exists()
    calls: list[str] = []
    check = checks.check

    def checking(stage: TrainConfig, device: torch.device) -> list[Measure]:
        calls.append(stage.output.name)
        return check(stage, device)

    monkeypatch.setattr(checks, "check", checking)
    with pytest.raises(ValueError, match=said):
        run_pipeline(made, RUN, resume=True, device="cpu")
    assert not calls
    monkeypatch.setattr(checks, "WHOLE", math.inf)
    longer = {**made, "teacher": replace(made["teacher"], steps=3)}
    monkeypatch.setattr(checks, "OWN", 0.1)
    with pytest.raises(ValueError, match="3-self-forcing: stage self-forcing has not passed its c"):
        run_pipeline(longer, RUN, resume=True, device="cpu")
    assert calls == NAMES and len(logged(RUN / NAMES[0])) == 3
    weights = run_pipeline(longer, RUN, resume=True, accept=True, device="cpu")
    assert weights == RUN / NAMES[2] / "model.safetensors" and calls == NAMES


def run(monkeypatch: pytest.MonkeyPatch, *words: object) -> None:
    monkeypatch.setattr(sys, "argv", ["sfmodel", *map(str, words)])
    main.main()


WORDS = (
    "train --pipeline self-forcing --scale 0.001 --batch 2 --frames 4 --windows 4 --pairs 2 "
    "--critic-steps 1 --critic-warmup 0 --threads 1 --seed 3 --init.batch 4 --chunks 1"
)


def test_the_command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """With settings of all stages and of one; a bad stage is exit code 2."""
    draw_pictures(monkeypatch)
    monkeypatch.setattr(pipeline, "sheet", SHEET)
    folder = tmp_path / "out"
    monkeypatch.setattr(checks, "REAL", 0.1)
    with pytest.raises(SystemExit) as ended:
        run(monkeypatch, *WORDS.split(), "--output", folder)
    assert ended.value.code == 2
    out, err = capsys.readouterr()
    assert err.startswith("sfmodel: ") and "2-init: stage init has not passed its check" in err
    assert err.count("\n") == 1 and "2 trajectories, ode" in out
    with pytest.raises(SystemExit):
        run(monkeypatch, *WORDS.split(), "--output", folder)
    assert "holds a run already" in capsys.readouterr().err
    run(monkeypatch, *WORDS.split(), "--output", folder, "--resume", "--accept")
    out = capsys.readouterr().out
    assert f"weights: {folder / NAMES[2]}/model.safetensors" in out
    assert "accepted" in out and "failed: " in out
    settings = [json.loads((folder / name / "config.json").read_text()) for name in NAMES]
    assert [each["batch"] for each in settings] == [2, 4, 2]
    assert [each["seed"] for each in settings] == [3, 3, 3]
    assert [each["steps"] for each in settings] == [2, 1, 1]
    for name in ("curves.png", "samples.png"):
        assert (folder / name).read_bytes().startswith(b"\x89PNG")
    (folder / NAMES[1] / "log.jsonl").unlink()  # what is lost is left out of the pictures
    (folder / NAMES[1] / "check.safetensors").write_bytes(b"x")
    run(monkeypatch, *WORDS.split(), "--output", folder, "--resume", "--accept")
    # One step of the trainer's own command goes on with a stage.
    words = ["--output", folder / NAMES[0], "--resume", "--recipe", "bidirectional"]
    words += ["--threads", 1, "--batch", 2, "--frames", 4, "--windows", 4, "--seed", 3]
    words += ["--steps", 3, "--ema-start", 1]
    words += ["--warmup", 1, "--pairs", 2, "--critic-steps", 1, "--chunks", 1]
    run(monkeypatch, "train", *words)
    assert json.loads(checkpoint.read(folder / NAMES[0] / "model.safetensors")[1]["step"]) == 3


SHEET = pipeline.sheet


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--scale", "0"], "scale=0.0: must be more than 0 and at most 1000"),
        (["--steps", "0"], "stage teacher: steps=0: must be at least 1"),
        (["--teacher", "none.pt"], "none.pt: there is no such checkpoint file"),
        (["--init.denoising-steps", "1", "2"], r"stage init: denoising_steps=\[1, 2\]: must fall"),
        (["--data", "none.txt"], "none.txt: no such file or folder"),
    ],
)
def test_bad_settings_are_one_sentence(
    words: list[str], said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    with pytest.raises(SystemExit) as ended:
        run(monkeypatch, *WORDS.split(), "--output", tmp_path / "out", *words)
    assert ended.value.code == 2
    err = capsys.readouterr().err
    assert re.match(f"sfmodel: .*{said}", err) and err.count("\n") == 1


def test_help_shows_the_defaults_of_the_stages(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        run(
            monkeypatch, "train", "--pipeline", "self-forcing", "--init-by", "consistency", "--help"
        )
    out = " ".join(re.sub("[│╭╮╰╯─]", " ", capsys.readouterr().out).split())
    assert ended.value.code == 0
    for name, recipe in (("teacher", "bidirectional"), ("init", "consistency"),
                         ("self-forcing", "sf+dmd")):  # fmt: skip
        steps = defaults("toy", recipe).steps
        assert f"--{name}.steps INT updates of the generator (default: {steps})" in out


def test_settings_of_all_stages_come_before_those_of_one() -> None:
    words = "train --pipeline self-forcing --init.steps 7 --steps=3 --no-bf16 --output o --resume"
    said = for_stages(words.split())
    assert said[0] == "train" and said[-5:] == ["--init.steps", "7", "--output", "o", "--resume"]
    for stage in ("teacher", "init", "self-forcing"):
        assert f"--{stage}.steps=3" in said and f"--{stage}.no-bf16" in said
    plain = ["train", "--recipe", "tf", "--steps", "3"]
    assert for_stages(plain) == plain
    with_teacher = for_stages(["train", "--pipeline", "self-forcing", "--teacher", "t.pt"])
    assert "--init.teacher" in with_teacher and "--teacher.teacher" not in with_teacher


def test_a_scale_is_of_updates_and_trajectories() -> None:
    plain, tenth = stages(), stages(scale=0.1)
    for name, config_ in plain.items():
        assert tenth[name].steps == round(config_.steps / 10)
        assert tenth[name].warmup == max(1, round(config_.warmup / 10))
        assert tenth[name].lr == config_.lr
    assert tenth["init"].pairs == round(plain["init"].pairs / 10)


def test_the_teacher_of_the_full_size_model_is_public(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SFMODEL_MODELS", str(tmp_path / "none"))
    made = stages("wan-1.3b")
    official = tmp_path / "none" / "Wan2.1-T2V-1.3B" / "diffusion_pytorch_model.safetensors"
    assert [*made] == ["init", "self-forcing"] and made["init"].output.name == "2-init"
    assert made["init"].init == made["init"].teacher == official == made["self-forcing"].critic
    assert made["self-forcing"].teacher_preset == "wan-14b" and made["init"].pairs == 16_000
    name = "Wan2.1-T2V-14B/diffusion_pytorch_model.safetensors.index.json"
    assert made["self-forcing"].teacher == tmp_path / "none" / name
    small = stages("wan-1.3b", variant="one-node")
    assert small["init"].teacher == official == small["self-forcing"].teacher
    assert small["self-forcing"].critic is None and small["init"].pairs == 1_500
    folder = tmp_path / "models" / "Wan2.1-T2V-1.3B"
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps({"dim": 1536, "in_dim": 16, "out_dim": 16}))
    weights = folder / "diffusion_pytorch_model.safetensors"
    weights.touch()
    monkeypatch.setenv("SFMODEL_MODELS", str(tmp_path / "models"))
    assert stages("wan-1.3b", variant="one-node")["self-forcing"].teacher == weights
    assert stages("wan-1.3b")["self-forcing"].critic == weights
    mine = stages("wan-1.3b", teacher=Path("mine.pt"))
    assert mine["init"].init == mine["init"].teacher == Path("mine.pt")
    large = stages("wan-1.3b", teacher=Path("14b.pt"), teacher_preset="wan-14b")
    assert large["init"].teacher_preset == large["self-forcing"].teacher_preset == "wan-14b"
    assert (large["init"].init, large["init"].teacher) == (weights, Path("14b.pt"))
    assert large["self-forcing"].critic == weights
    words = "train --pipeline self-forcing --teacher y --preset wan-1.3b --teacher x --output o"
    named = pipeline_stages(words.split())
    assert named["init"].output == Path("o/2-init") and named["init"].teacher == Path("x")


def test_the_full_size_model_is_measured_by_its_latents(tmp_path: Path) -> None:
    """By its preset's name alone it is another model than the toy."""
    dit = replace(TINY.dit, channels=16)
    with mock.patch.dict(PRESETS, {"wan-1.3b": replace(TINY, dit=dit, first=None)}):
        weights = tmp_path / "teacher.safetensors"
        checkpoint.save(DiT(dit), weights, dit)
        text, said = torch.randn(3, 4, dit.text_dim), {"prompts": json.dumps(["a", "b", "c"])}
        save_tensors(tmp_path / "prompts.safetensors", {"text": text}, said)
        made = stages("wan-1.3b", tmp_path / "run", teacher=weights)
        sizes: dict[str, Any] = {"frames": (3,), "chunks": (3,), "windows": (3,), "steps": 2}
        sizes |= {"pairs": 2, "guidance_scale": 1.0}  # no negative prompt
        each = config(tmp_path / "run" / "x", preset="wan-1.3b", **sizes)
        made = {
            name: replace(
                each, recipe=of.recipe, output=of.output, init=of.init, teacher=weights,
                data=tmp_path / "prompts.safetensors",
            )
            for name, of in made.items()
        }  # fmt: skip
        run_pipeline(made, tmp_path / "run", accept=True, device="cpu")
        for name, count in (("2-init", 5), ("3-self-forcing", 4)):
            facts = json.loads((tmp_path / "run" / name / "check.json").read_text())
            assert len(facts["measures"]) == count
            clips = load_file(tmp_path / "run" / name / "check.safetensors")
            assert {*clips} == {"latents"} and clips["latents"].shape == (2, 3, 16, 8, 8)
        pipeline.sheet.assert_not_called()  # type: ignore[attr-defined]
        prompts = tmp_path / "prompts.txt"
        prompts.write_text("a\nb\n")
        embed = mock.Mock(return_value=torch.zeros(1, 4, dit.text_dim))
        with mock.patch.object(checks, "text_encoder", return_value=embed):
            checks.check(replace(made["init"], data=prompts), torch.device("cpu"))
        assert {*embed.call_args.args[0]} <= {"a", "b"}


def test_latents_of_other_statistics_do_not_pass() -> None:
    """Smooth ones do; noise, a channel off its mean, one that is flat and one that is saturated do
    not."""
    torch.manual_seed(0)
    noise = torch.randn(2, 5, 16, 32, 32)
    smooth = torch.nn.functional.avg_pool2d(noise.flatten(0, 1), 5, 1, 2).unflatten(0, (2, 5))
    smooth = (smooth - smooth.mean()) / smooth.std()
    assert all(each.passed for each in checks.spread(smooth))
    edge = torch.zeros(16).index_fill(0, torch.tensor([7]), 1.0)[:, None, None]
    for bad, count in (
        (noise, 1), (smooth + 2 * edge, 1), (smooth * (1 - 0.9 * edge), 1),
        (smooth * (1 + 2 * edge), 1), (smooth * math.nan, 4),
    ):  # fmt: skip
        assert sum(not each.passed for each in checks.spread(bad)) == count
    by_hand = {each.what: each.value for each in checks.spread(smooth)}
    channel = [smooth[:, :, c].double() for c in range(16)]
    means = [float(x.mean()) for x in channel]
    assert by_hand["mean of the outermost channel"] == pytest.approx(max(means, key=abs))
    widths = [float(x.std()) for x in channel]
    assert by_hand["deviation of the narrowest channel"] == pytest.approx(min(widths))
    assert by_hand["deviation of the widest channel"] == pytest.approx(max(widths))
    pairs = [torch.stack([x[..., 1:].flatten(), x[..., :-1].flatten()]) for x in channel]
    least = min(float(torch.corrcoef(pair)[0, 1]) for pair in pairs)
    told = by_hand["correlation of neighbours in the noisiest channel"]
    assert told == pytest.approx(least, rel=0.02)


def test_a_loss_must_not_grow(tmp_path: Path) -> None:
    settings = config(tmp_path / "run", "ode", steps=20)
    (tmp_path / "run").mkdir()
    losses = [4.0, 2.0, *[9.0] * 16, 1.0, 2.0]
    said = {"norm": 1.0, "seconds": 1.0, "seconds_per_step": 1.0}
    lines = [{"step": i + 1, "loss": loss, **said} for i, loss in enumerate(losses)]
    (tmp_path / "run" / "log.jsonl").write_text("\n".join(map(json.dumps, lines)))
    (measure,) = checks.learning(settings)
    assert measure.value == pytest.approx(1.5 / 3) and measure.passed
    assert not checks.learning(replace(settings, recipe="sf+dmd"))
    assert not checks.learning(replace(settings, recipe="consistency"))
    assert not measure._replace(value=1.01).passed and not measure._replace(value=math.nan).passed


def test_a_distance_is_of_the_second_half(tmp_path: Path) -> None:
    codec = ToyVAE.from_pretrained()
    held = evaluate.held_out(codec, 4, 16, "validation")
    for context, recipe in ((checks.WHOLE, "bidirectional"), (checks.REAL, "ode")):
        measure = checks.distance(held.latents_BFCHW, held, codec, config(tmp_path / "a", recipe))
        by_frame = evaluate.score(evaluate.seen_in(codec, held.latents_BFCHW), held.real_NFD)
        assert measure.value == pytest.approx(sum(by_frame["distance"][2:]) / 2)
        assert measure.high == context
    said = Measure("a", 1.234, 0.0, 2.0).said, Measure("b", 3.0, -1.0, 2.0).said
    assert said == ("a 1.23 (must be at most 2)", "b 3 (must be -1 to 2)")
