"""Fixtures and marks of all tests."""

from __future__ import annotations

import os
import signal

import pytest
import torch

# Without a GPU the Triton kernels run in Triton's interpreter, on CPU tensors. It is chosen when
# kernels are defined, so before any of them is imported.
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"
if os.environ.get("TRITON_INTERPRET") == "1":
    from tests.interpreter import quicken

    quicken()

# A shell starts what runs in the background with Ctrl-C ignored, and its children inherit that.
signal.signal(signal.SIGINT, signal.default_int_handler)

# The tensors here are small: on a busy machine a second thread waits longer than it computes.
torch.set_num_threads(1)


@pytest.fixture
def fresh_seed() -> int:
    """Seeds other random data in every run; pytest shows the seed of a test that fails."""
    seed = int.from_bytes(os.urandom(4), "little")
    print(f"seed {seed}: torch.manual_seed({seed}) makes the same data")
    torch.manual_seed(seed)
    return seed


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skips tests marked `gpu`, with the reason, where PyTorch sees none."""
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="needs a GPU that PyTorch can use"))
