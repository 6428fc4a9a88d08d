"""What holds for every test."""

from __future__ import annotations

import pytest
import torch

# The tensors here are small: on a busy machine a second thread waits longer than it computes.
torch.set_num_threads(1)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests marked `gpu` are skipped, with the reason, where PyTorch sees none."""
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="needs a GPU that PyTorch can use"))
