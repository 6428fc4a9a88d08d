"""Videos that a run shows of what it has learned, in the toy world and with small public files."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from sfmodel.config import PRESETS
from sfmodel.dit import DiT
from sfmodel.ranks import Ranks
from sfmodel.stream import Stream
from sfmodel.train import loop, report
from sfmodel.train.config import TrainConfig
from sfmodel.train.loop import train
from sfmodel.vae.taehv import TinyVAE
from sfmodel.weights import checkpoint
from tests.clips import read_video
from tests.tiny_runs import TINY, config, draw_pictures, tiny

SIZES = replace(TINY.dit, channels=16, prediction="flow")
SMALL = replace(TINY, dit=SIZES, height=4, width=4)
TEXT = torch.randn(4, 3, 32, generator=torch.Generator().manual_seed(0)).bfloat16()
SAID = ["a cat", "", "many words " * 30, "never shown"]


@pytest.fixture(autouse=True)
def _small(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Wan2.1 is small; its tiny VAE, of random weights, lies in `models`."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("SFMODEL_MODELS", "models")
    monkeypatch.setitem(PRESETS, "wan-1.3b", SMALL)
    Path("models").mkdir()
    torch.manual_seed(0)
    codec = TinyVAE()
    for weight in codec.parameters():
        nn.init.normal_(weight, std=(2 / weight[0].numel()) ** 0.5)  # or all frames are grey
    torch.save(codec.state_dict(), "models/taew2_1.pth")
    latents = torch.randn(4, 2, 16, 4, 4)
    save_file({"latents": latents, "text": TEXT}, "d.safetensors", {"prompts": json.dumps(SAID)})
    with tiny():
        draw_pictures(monkeypatch)
        yield


def settings(**change: Any) -> TrainConfig:
    base: dict[str, Any] = dict(
        preset="wan-1.3b", data=Path("d.safetensors"), init=None, steps=2, frames=(2,),
        chunks=(1,), windows=(2,),
    )  # fmt: skip
    return config(Path.cwd() / "run", **{**base, **change})


def samples() -> list[str]:
    return sorted(path.name for path in Path("run/samples").glob("*"))


def names(*updates: int) -> list[str]:
    """Of the samples of some updates."""
    ends = (*(f"-{i}.mp4" for i in range(3)), ".png")
    return [f"update-{update:06d}{end}" for update in updates for end in ends]


def test_samples_are_streams_of_the_average_with_the_first_prompts_of_the_data() -> None:
    benchmark = torch.backends.cudnn.benchmark
    path = train(settings(sample_every=1, steps=1), device="cpu")
    assert samples() == names(1) and torch.backends.cudnn.benchmark == benchmark
    whole: dict[str, Any] = {"device": torch.device("cpu"), "dtype": torch.float32}
    model = checkpoint.load_model(lambda: DiT(SIZES), path, **whole).eval()
    codec = TinyVAE()
    codec.load_state_dict(torch.load("models/taew2_1.pth"))
    preset, shown, made = replace(SMALL, chunk=1, window=2), [], []
    for i in range(3):
        stream = Stream(model, codec.eval(), TEXT[i : i + 1].float(), preset, seed=i)
        made.append(torch.cat([*stream.video(13)], 1)[0].clamp(-1, 1))
        frames, fps = read_video(f"run/samples/update-000001-{i}.mp4")
        scale = frames.shape[-1] // 32  # enlarged, as players would blur it
        shown.append(frames[..., ::scale, ::scale])
        assert frames.shape[0] == 13 and fps == 16
    apart = [[(one - other).abs().mean() for other in made] for one in shown]
    for i, row in enumerate(apart):
        assert row[i] < 0.05 and sorted(row)[:1] == [row[i]] and sorted(row)[1] > 2 * row[i], apart


def test_a_resumed_run_draws_what_is_missing_alone(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    train(settings(sample_every=1), device="cpu")
    before = Path("run/samples/update-000001.png").stat().st_mtime_ns
    Path("run/samples/update-000002.png").unlink()
    train(settings(sample_every=1), resume=True, device="cpu")
    assert samples() == names(1, 2)
    assert Path("run/samples/update-000001.png").stat().st_mtime_ns == before


def test_where_samples_cannot_be_drawn_a_line_says_why_and_it_trains(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def full(*_: Any, **__: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate\nmore")

    with monkeypatch.context() as patch:
        patch.setattr("sfmodel.train.samples.Stream", full)
        train(settings(), device="cpu")
    said = capsys.readouterr().out.splitlines()
    assert "no sample of update 2: CUDA out of memory. Tried to allocate" in said
    shutil.rmtree("run")
    Path("models/taew2_1.pth").unlink()
    train(settings(sample_every=1), device="cpu")
    said = [line for line in capsys.readouterr().out.splitlines() if "sample" in line]
    assert len(said) == 1 and said[0].startswith(
        "no samples are drawn: models: holds no tiny video VAE, optional for wan-1.3b (https://git"
    )
    assert samples() == []


def test_a_run_that_is_to_stop_does_not_wait_for_its_samples(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """It is asked after each chunk."""
    chunks: list[int] = []

    def going(self: report.Report, more: bool) -> bool:
        chunks.append(more)
        return len(chunks) < 2

    monkeypatch.setattr(report.Report, "_goes_on", going)
    train(settings(), device="cpu")
    assert chunks == [True, True] and "update-000002.png" not in samples()


def test_a_first_rank_that_draws_is_not_waited_for_longer_than_a_chunk(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """What the first one tells the others after each of the 4 chunks of 3 videos: that it goes on;
    at last that it does not."""
    told: list[bool] = []

    def tell(self: Ranks, flag: bool) -> bool:
        told.append(flag)
        return flag

    monkeypatch.setattr(Ranks, "any", tell)
    run = loop.Run(settings(), Ranks(0, 1, torch.device("cpu")))
    run.step = 2
    with report.Report(run) as shown:
        shown.sample()
    assert told == [True] + [True] * 12 + [False] and samples() == names(2)
