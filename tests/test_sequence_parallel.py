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

from sfmodel.config import PRESETS, Preset
from sfmodel.ranks import Ranks
from sfmodel.sequence_parallel import HeadRanks, Team, chunks_of
from sfmodel.stream import Stream
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


def test_ranks_must_be_given_the_same(tmp_path: Path) -> None:
    """Said by all of them, and once more at the end of torchrun's own report."""
    command = f"{sys.executable} -m sfmodel generate --seed $RANK"
    ended = torchrun(2, "--no-python", "bash", "-c", command, cwd=tmp_path)
    said = "rank 1 has seed=1 and rank 0 seed=0: all ranks must be given the same"
    assert ended.returncode and said in ended.stderr[-500:]


def test_who_does_what(monkeypatch: pytest.MonkeyPatch) -> None:
    """Wan2.1-1.3B has 12 heads and 1560 tokens a frame, 14B 40 heads."""
    wan, cpu = PRESETS["wan-1.3b"], torch.device("cpu")
    with pytest.raises(ValueError, match=r"9 ranks cannot .*: start 2, 3, 4, 5, 6, 7, 12, 13$"):
        Team.of(Ranks(0, 9, cpu), wan)
    assert Team.of(Ranks(0, 1, cpu), wan) == Team(None, True, True, 0)
    monkeypatch.setattr(torch.distributed, "new_group", lambda ranks: ranks)
    monkeypatch.setattr("sfmodel.sequence_parallel.HeadRanks", lambda ranks, *_: len(ranks))

    def parts(world: int, preset: Preset = wan, **options: str) -> list[tuple[object, int]]:
        teams = [Team.of(Ranks(rank, world, cpu), preset, **options) for rank in range(world)]
        assert [team.decodes for team in teams].index(True) == teams[0].decoder
        assert all(team.runs or team.decodes for team in teams)
        return [(team.heads, team.decoder) for team in teams]

    assert parts(2) == [(2, 0)] * 2
    assert parts(4) == [(3, 3)] * 3 + [(None, 3)]
    assert parts(4, decoder="taehv") == [(4, 0)] * 4
    assert parts(6) == [(6, 0)] * 6
    frame_by_frame = replace(PRESETS["wan-14b"], chunk=1)
    assert parts(5, frame_by_frame) == [(5, 0)] * 5


@pytest.mark.parametrize("first", [None, 1, 3])
@pytest.mark.parametrize("frames", [1, 2, 9, 10, 21, 22, 33])
def test_chunks_of_so_many_frames(first: int | None, frames: int) -> None:
    preset = replace(SMALL, first=first)
    pieces = [*Stream(model(), ToyVAE(), torch.zeros(1, 1, 8), preset).video(frames)]
    assert len(pieces) == chunks_of(preset, frames)


def test_a_number_of_ranks_that_does_not_divide(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.distributed, "get_rank", lambda _: 0)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda _: 4)
    with pytest.raises(ValueError, match="4 ranks must divide the 6 heads of the model and the 6"):
        HeadRanks(None, 6, 6)  # type: ignore[arg-type]
