"""The noise schedule against recorded tables of the public implementation."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from sfmodel.schedule import FlowSchedule, add_noise

TABLES = Path(__file__).parent / "parity" / "scheduler_shift5.safetensors"


def test_tables_are_the_public_ones() -> None:
    recorded, schedule = load_file(TABLES), FlowSchedule(5.0)
    assert torch.equal(schedule.sigmas, recorded["sigmas"])
    assert torch.equal(schedule.timesteps, recorded["timesteps"])
    torch.testing.assert_close(schedule.flow_weights(), recorded["weights"])
    assert torch.equal(schedule.warp([1000, 750, 500, 250]), recorded["warped_steps"])


def test_sigma_is_the_nearest_entry() -> None:
    schedule = FlowSchedule(5.0)
    assert schedule.sigma(torch.tensor(0.0)) == schedule.sigmas[-1]  # t = 0 is not σ = 0
    t = schedule.timesteps[[3, 500, 999]].reshape(3, 1)
    assert torch.equal(schedule.sigma(t), schedule.sigmas[[3, 500, 999]].reshape(3, 1))
    assert torch.equal(schedule.sigma(t + 0.01), schedule.sigma(t))


def test_add_noise() -> None:
    x0, noise = torch.randn(2, 2, 3, 4, 4, 4)
    sigma = torch.rand(2, 3)
    s = sigma[:, :, None, None, None]
    torch.testing.assert_close(add_noise(x0, noise, sigma), (1 - s) * x0 + s * noise)


@pytest.mark.parametrize("steps", [[], [500, 500], [250, 500], [1001], [10, 0]])
def test_bad_steps(steps: list[int]) -> None:
    with pytest.raises(ValueError, match="must fall from at most 1000"):
        FlowSchedule().warp(steps)
