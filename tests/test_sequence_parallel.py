"""One stream on several ranks is the stream of one."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from sfmodel.config import PRESETS
from sfmodel.ranks import Ranks
from sfmodel.sequence_parallel import HeadRanks, Team, chunks_of
from sfmodel.stream import stream
from sfmodel.toy.vae import ToyVAE
from tests.clips import read_video
from tests.stream_ranks import CASES, SMALL, model, streamed
from tests.torchrun import ROOT, torchrun

pytestmark = pytest.mark.skipif(
    not torch.distributed.is_available(), reason="PyTorch is built without torch.distributed"
)


@pytest.fixture(scope="module")
def on_ranks(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Tensor]:
    file = tmp_path_factory.mktemp("ranks") / "found.pt"
    ended = torchrun(3, "-m", "tests.stream_ranks", file)
    assert ended.returncode == 0, ended.stderr
    found: dict[str, Tensor] = torch.load(file)
    return found


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("size", [2, 3])
def test_ranks_stream_what_one_does(on_ranks: dict[str, Tensor], size: int, case: str) -> None:
    want = streamed(model(), case)
    scale = float(want.abs().max())
    torch.testing.assert_close(on_ranks[f"{size} {case}"], want, rtol=1e-5, atol=1e-6 * scale)


@pytest.mark.parametrize("count", [2, 3])
def test_generate_on_ranks(count: int, tmp_path: Path) -> None:
    """Two share the passes, and the first of them or a third decodes: the video of one process."""
    arguments = ["-m", "sfmodel", "generate", "--frames", "21", "--seed", "4"]
    ended = torchrun(count, *arguments, "--output", "many.mp4", cwd=tmp_path)
    assert ended.returncode == 0, ended.stderr
    assert "21 frames in" in ended.stdout and f"{count} ranks, cpu" in ended.stdout
    one = subprocess.run([sys.executable, *arguments, "--output", "one.mp4"], cwd=tmp_path,
                         env=os.environ | {"PYTHONPATH": str(ROOT)}, timeout=100)  # fmt: skip
    assert one.returncode == 0
    many, alone = (read_video(str(tmp_path / name))[0].float() for name in ("many.mp4", "one.mp4"))
    assert many.shape == alone.shape and (many - alone).abs().max() <= 1
    assert (tmp_path / "many.png").exists()


def test_who_does_what() -> None:
    """Wan2.1-1.3B has 12 heads and 1560 tokens a frame, 14B 40 heads."""
    with pytest.raises(ValueError, match=r"9 ranks: must be 1, 2, 3, 4, 5, 6, 7, 12, 13, so that"):
        Team.of(Ranks(0, 9, torch.device("cpu")), PRESETS["wan-1.3b"])
    alone = Team.of(Ranks(0, 1, torch.device("cpu")), PRESETS["wan-1.3b"])
    assert alone == Team(None, True, True, 0)


@pytest.mark.parametrize("first", [None, 1, 3])
@pytest.mark.parametrize("frames", [1, 2, 9, 10, 21, 22, 33])
def test_chunks_of_so_many_frames(first: int | None, frames: int) -> None:
    preset = replace(SMALL, first=first)
    pieces = [*stream(model(), ToyVAE(), torch.zeros(1, 1, 8), preset, frames=frames)]
    assert len(pieces) == chunks_of(preset, frames)


def test_a_number_of_ranks_that_does_not_divide(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.distributed, "get_rank", lambda _: 0)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda _: 4)
    with pytest.raises(ValueError, match="4 ranks must divide the 6 heads of the model and the 6"):
        HeadRanks(None, 6, 6)  # type: ignore[arg-type]
