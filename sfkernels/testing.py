"""The rule by which a kernel is right, for the tests and before anything is timed: it may be as far
from float64 as eager PyTorch in the same dtype is, twice, plus rounding.

max |kernel − exact| ≤ 2 · (max |eager − exact| + ε · max |exact|), where ε is the dtype's.
"""

from __future__ import annotations

import torch
from torch import Tensor


def close_as_eager(
    name: str, got: Tensor, eager: Tensor, exact: Tensor, *, slack: float = 1.0
) -> None:
    """Raises AssertionError unless `got` obeys the rule above, or is at most `slack` times as far
    off as that allows."""
    assert (got.shape, got.dtype) == (eager.shape, eager.dtype), (
        f"{name} is {got.dtype} {[*got.shape]}, eager {eager.dtype} {[*eager.shape]}"
    )
    eager_error = float((eager - exact).abs().max())
    allowed = 2 * (eager_error + torch.finfo(eager.dtype).eps * float(exact.abs().max()))
    allowed *= slack
    error = (got - exact).abs()
    worst = float(error.max())
    assert worst <= allowed, (  # NaN fails too
        f"{name}: off by {worst:.2e} at {_where(error)}, allowed {allowed:.2e} (eager is off by "
        f"{eager_error:.2e})"
    )


def _where(error: Tensor) -> list[int]:
    at = error.nan_to_num(nan=float("inf")).argmax()
    return [int(i) for i in torch.unravel_index(at, error.shape)]
