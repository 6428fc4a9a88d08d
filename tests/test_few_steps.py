"""Students of one or two steps: trained at these, saved with them, streamed by them."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from sfmodel.cli import evaluate as evaluate_module
from sfmodel.cli import generate as generate_module
from sfmodel.cli.evaluate import evaluate
from sfmodel.cli.generate import generate
from sfmodel.cli.main import run_command
from sfmodel.config import PRESETS
from sfmodel.ranks import Ranks
from sfmodel.schedule import FlowSchedule
from sfmodel.stream import Stream
from sfmodel.train import objectives
from sfmodel.train.batch import Batch
from sfmodel.train.loop import Run, train
from sfmodel.train.objectives import Distillation
from sfmodel.train.rollout import Rollout
from sfmodel.weights import checkpoint
from sfmodel.weights.known import by_metadata
from sfmodel.weights.saving import save_tensors
from tests.tiny_runs import TINY, config, logged, tiny

ALONE = Ranks(0, 1, torch.device("cpu"))


@pytest.fixture(autouse=True)
def _tiny() -> Iterator[None]:
    with tiny():
        yield


@pytest.mark.parametrize("steps", [(1000,), (1000, 500)])
@pytest.mark.parametrize("recipe", ["ode", "tf+dmd", "df+sid", "sf+dmd", "sf+gan"])
def test_it_trains_at_its_own_steps(
    recipe: str, steps: tuple[int, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[tuple[int, ...]] = []

    class Watched(Rollout):
        def __init__(self, *arguments: Any, **more: Any) -> None:
            super().__init__(*arguments, **more)
            asked.append(tuple(self.steps))
            assert max(self.exit_steps) < len(steps)

    monkeypatch.setattr(objectives, "Rollout", Watched)
    settings = config(tmp_path / "run", recipe, denoising_steps=steps, steps=2)
    train(settings, device="cpu")
    assert all(line["loss"] and line["norm"] > 0 for line in logged(settings.output))
    assert {*asked} == ({steps} if recipe.startswith("sf") else set())


def test_what_is_drawn_stays_within_the_steps(tmp_path: Path) -> None:
    run = Run(config(tmp_path / "run", "tf+dmd", denoising_steps=(1000, 500)), ALONE)
    batches = [Batch.draw(run.context, step, "generator") for step in range(12)]
    assert {batch.exit_step for batch in batches} == {0, 1}
    t_S = FlowSchedule(TINY.shift).timesteps[[0, 500]]
    seen: set[float] = set()
    for batch in batches:
        t_BF, _ = batch.load(range(4)).at_few_steps(torch.zeros(4, 2, batch.frames, 4, 8, 8))
        seen |= {*t_BF.flatten().tolist()}
    assert seen == {*t_S.tolist()}


def test_one_step_is_noise_minus_flow(tmp_path: Path) -> None:
    """Of the first chunk, which sees nothing else."""
    run = Run(config(tmp_path / "run", "sf+dmd", denoising_steps=(1000,)), ALONE)
    part = Batch.draw(run.context, 0, "generator").load(range(4))
    assert isinstance(run.objective, Distillation)
    video, _ = run.objective.generate(part)
    first = slice(0, 1)
    noise = part.chunk_noise(first, 0)
    with torch.no_grad():
        flow = run.models.generator(noise, torch.tensor(1000.0), part.text_BTE)
    torch.testing.assert_close(video[:, first], noise - flow, rtol=1e-4, atol=1e-4)


def test_trajectories_are_kept_at_the_steps(tmp_path: Path) -> None:
    settings = config(tmp_path / "run", "ode", denoising_steps=(1000, 500), pairs=2)
    run = Run(settings, ALONE)
    run.prepare()
    points, _ = run.context.trajectories.draw([0, 1])
    assert points.shape[1] == 3
    whole = Run(replace(settings, output=tmp_path / "b", denoising_steps=None), ALONE)
    whole.prepare()
    other, _ = whole.context.trajectories.draw([0, 1])
    assert torch.equal(points[:, ::2], other[:, [0, -1]])  # the same noise and the same end
    with pytest.raises(ValueError, match="holds trajectories of other settings"):
        Run(replace(settings, denoising_steps=(1000,)), ALONE).prepare()


@pytest.mark.parametrize("bad", [(), (500, 1000), (1001,), (1000, 0)])
def test_steps_fall(bad: tuple[int, ...], tmp_path: Path) -> None:
    said = re.escape(f"denoising_steps={[*bad]}: must fall from at most 1000 to at least 1")
    with pytest.raises(ValueError, match=said):
        config(tmp_path / "run", denoising_steps=bad)


@pytest.fixture
def student(tmp_path: Path) -> Path:
    """Weights of a run whose every setting of a stream is another than the preset's."""
    settings = config(
        tmp_path / "run", "sf+dmd", denoising_steps=(1000, 500), steps=1, chunks=(3, 1),
        windows=(4,), sink=1,
    )  # fmt: skip
    return train(settings, device="cpu")


def test_weights_say_how_they_stream(student: Path, tmp_path: Path) -> None:
    metadata = checkpoint.read(student)[1]
    assert json.loads(metadata["preset"]) == "toy"
    assert json.loads(metadata["stream"]) == {
        "steps": [1000, 500], "warped": False, "shift": 6.0, "chunk": 1, "first": 1, "window": 4,
        "sink": 1, "positions": "absolute",
    }  # fmt: skip
    whole = train(config(tmp_path / "whole", "bidirectional", steps=1), device="cpu")
    assert "stream" not in checkpoint.read(whole)[1] and by_metadata(whole) is None


def streamed(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, *words: object
) -> tuple[tuple[int, ...], int, int, int]:
    """Steps, chunk, window and sink of the stream that `sfmodel generate` makes."""
    made: list[Any] = []

    class Spied(Stream):
        def __init__(self, model: Any, codec: Any, text: Any, preset: Any, **more: Any) -> None:
            made.append(preset)
            super().__init__(model, codec, text, preset, **more)

    monkeypatch.setattr(generate_module, "Stream", Spied)
    own = ["--frames", 1, "--output", tmp_path / "v.mp4"]
    commands = {"generate": generate, "other": generate}
    run_command("sfmodel", commands, [*map(str, ["generate", *words, *own])])
    return made[-1].steps, made[-1].chunk, made[-1].window, made[-1].sink


def test_generate_streams_them_so(
    student: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    of_student = "--checkpoint", student
    assert streamed(monkeypatch, tmp_path, *of_student) == ((1000, 500), 1, 4, 1)
    said = f"{student}: trained here, by its metadata: --steps 1000 500 --chunk 1 --window 4"
    assert said in capsys.readouterr().err
    words = "--steps", 1000, "--window", 3
    assert streamed(monkeypatch, tmp_path, *of_student, *words) == ((1000,), 1, 3, 1)


def test_evaluate_measures_them_so(
    student: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Found(Exception):
        pass

    def measured(_: Any, sampling: Any, *__: Any, **___: Any) -> None:
        raise Found(sampling.preset)

    monkeypatch.setattr(evaluate_module, "measure_model", measured)
    small: dict[str, Any] = {"frames": 4, "trained": 4, "videos": 16, "output": tmp_path / "e"}
    for more, want in (
        ({"checkpoint": student}, ((1000, 500), 1, 4, 1)),
        ({"checkpoint": student, "chunk": 3, "sink": 0}, ((1000, 500), 3, 4, 0)),
        ({"checkpoint": student.parents[1] / "init.safetensors"}, (TINY.steps, 3, 7, 0)),
    ):
        with pytest.raises(Found) as found:
            evaluate(**more, **small)
        preset = found.value.args[0]
        assert (preset.steps, preset.chunk, preset.window, preset.sink) == want


@pytest.mark.parametrize(
    "damage",
    [
        {"steps": [500, 1000]}, {"steps": ["a"]}, {"steps": [999.5]}, {"steps": 1000},
        {"chunk": 2.5}, {"window": "x"}, {"window": 0}, {"shift": -1.0}, {"shift": None},
        {"sink": 9},
    ],
)  # fmt: skip
def test_metadata_that_is_not_whole_tells_nothing(
    damage: dict[str, Any], student: Path, tmp_path: Path
) -> None:
    state, metadata = checkpoint.read(student)
    stream = json.loads(metadata["stream"])
    for name, changed in (
        ("changed", {**metadata, "stream": json.dumps({**stream, **damage})}),
        (
            "absent",
            {
                **metadata,
                "stream": json.dumps({k: stream[k] for k in stream.keys() - damage.keys()}),
            },
        ),
        ("no preset", {**metadata, "preset": '"huge"'}),
        ("no JSON", {**metadata, "stream": "{"}),
    ):
        path = tmp_path / f"{name}.safetensors"
        save_tensors(path, _copied(state), changed)
        assert by_metadata(path) is None, name
    assert by_metadata(student) is not None and PRESETS["toy"] is TINY


def _copied(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in state.items()}
