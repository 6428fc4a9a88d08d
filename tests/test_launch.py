"""Which launch setting a kernel gets."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from sfkernels import launch
from sfkernels.launch import RowTile

META, CUDA = torch.device("meta"), torch.device("cuda", 0)


@pytest.fixture
def tuned(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """An empty folder in place of the shipped settings."""
    monkeypatch.setattr(launch, "TUNED", tmp_path)
    for cached in (launch.tuned, launch._setting, launch._capability):
        cached.cache_clear()
    yield tmp_path
    for cached in (launch.tuned, launch._setting, launch._capability):
        cached.cache_clear()


@pytest.mark.parametrize(
    ("capability", "arch"), [((7, 5), 80), ((8, 6), 80), ((8, 9), 89), ((9, 0), 90), ((12, 0), 100)]
)
def test_a_gpu_takes_the_settings_of_the_newest_it_can(
    capability: tuple[int, int], arch: int, tuned: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: capability)
    entry = {"channels": 1536, "rows": 2, "per_thread": 8, "why": "for the test"}
    for other in launch.ARCHITECTURES:
        entry["per_sm"] = other
        text = json.dumps({"machine": {}, "kernels": {"norm_fwd": [entry]}})
        (tuned / f"sm_{other}.json").write_text(text)
    assert launch.rows("norm_fwd", CUDA, 1536).per_sm == arch


def test_the_nearest_number_of_channels_counts_and_overrides_come_first(tuned: Path) -> None:
    narrow, wide = (launch.DEFAULTS[90]["norm_bwd"][n] for n in (1536, 5120))
    assert launch.rows("norm_bwd", META, 64) == launch.rows("norm_bwd", META, 2048) == narrow
    assert launch.rows("norm_bwd", META, 4096) == wide
    with launch.using(norm_bwd=RowTile(3, 4)):
        assert launch.rows("norm_bwd", META, 4096) == RowTile(3, 4)
    with pytest.raises(ValueError, match="at most 16384"):
        launch.rows("norm_bwd", META, 20_000)


def test_programs_that_loop_share_the_tiles() -> None:
    cpu, parts = torch.device("cpu"), 3  # two multiprocessors, as the interpreter has
    assert launch.strips(RowTile(1, 8), cpu, 100, parts) == 100  # one program a tile
    assert launch.strips(RowTile(1, 8, per_sm=6), cpu, 100, parts) == 4
    assert launch.strips(RowTile(1, 8, per_sm=6), cpu, 2, parts) == 2


def test_every_setting_says_why() -> None:
    for arch in launch.ARCHITECTURES:
        assert launch.DEFAULTS[arch].keys() == launch.DEFAULTS[90].keys()
        assert all(s.why for by_channels in launch.DEFAULTS[arch].values()
                   for s in by_channels.values())  # fmt: skip
        for kernel, entries in launch.tuned(arch).items():
            assert kernel in launch.DEFAULTS[arch] and all(entry["why"] for entry in entries)
