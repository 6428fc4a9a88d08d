"""The rule of sfkernels.testing for ops of this package, outputs and gradients.

Triton kernels run natively where there is a GPU and in Triton's interpreter on CPU tensors
elsewhere, C++ on CPU tensors, all with every uninitialised tensor filled with NaN.
"""

from __future__ import annotations

import contextlib
import fcntl
import functools
import os
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from sfkernels import cpp
from sfkernels.testing import Op, Oracle, close_as_eager, interpreted, nan_filled, results

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# The interpreter truncates to bfloat16 where a GPU rounds.
DTYPES = (torch.float32, torch.float16) + (torch.bfloat16,) * (not interpreted())
CPP_DTYPES = (torch.float32, torch.float16, torch.bfloat16)

# For parametrize: what has norms, RoPE and the sampler.
_NO_CPP = "C++ takes CPU tensors" if DEVICE == "cuda" else cpp.MISSING
CPP = pytest.param("cpp", marks=pytest.mark.skipif(bool(_NO_CPP), reason=_NO_CPP))
each = pytest.mark.parametrize("impl", ["triton", CPP])
each_and_reference = pytest.mark.parametrize("impl", ["reference", "triton", CPP])
_PAIRS = [*(("triton", dtype, ()) for dtype in DTYPES),
          *(("cpp", dtype, CPP.marks) for dtype in CPP_DTYPES)]  # fmt: skip


def each_size(
    sizes: Sequence[Any], of_cpp: Sequence[Any] = (), fixture: str = "size"
) -> pytest.MarkDecorator:
    """Implementations, dtypes and sizes, these by a fixture; C++ with those of its own too."""
    return pytest.mark.parametrize(
        ("impl", "dtype", fixture),
        [
            pytest.param(impl, dtype, size, marks=marks, id=f"{impl}-{dtype}-{size}")
            for impl, dtype, marks in _PAIRS
            for size in (*sizes, *(of_cpp if impl == "cpp" else ()))
        ],
        indirect=[fixture],
    )


def rand(*shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    """Standard normal numbers in float64 on the device under test."""
    return torch.randn(*shape, dtype=torch.float64, device=DEVICE).to(dtype)


@contextlib.contextmanager
def alone() -> Iterator[None]:
    """Lets one process at a time run on a GPU, which leaves no memory behind: the references of
    attention at real shapes take tens of gigabytes."""
    if DEVICE == "cpu":
        yield
        return
    with open(Path(tempfile.gettempdir(), f"sfkernels-tests-{os.getuid()}"), "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)  # until it is closed
        yield
        torch.cuda.empty_cache()


def narrowed(tensors: Sequence[Tensor], dtype: torch.dtype, wide: Sequence[int]) -> list[Tensor]:
    """Arguments with float64 as `dtype`, or as float32 at the indices in `wide`; all else as it
    is."""
    return [t if t.dtype != torch.float64 else t.to(torch.float32 if i in wide else dtype)
            for i, t in enumerate(tensors)]  # fmt: skip


def check(
    op: Op,
    tensors: Sequence[Tensor],
    dtype: torch.dtype,
    *,
    wide: Sequence[int] = (),
    gradients: bool = True,
    impl: str = "triton",
) -> None:
    """Checks, as `sfkernels.testing.check`, an op under `impl` and the reference.

    tensors: float64 arguments of `op`, in order; those at the indices in `wide` stay in float32
    where the others are cast to `dtype`. Other dtypes than float64 are handed on as they are."""

    def draw(tensors: Sequence[Any]) -> Triples:
        narrow = narrowed(tensors, dtype, wide)
        with alone():
            oracle = Oracle(functools.partial(op, impl="reference"), narrow, gradients=gradients)
        with nan_filled():
            ours = results(functools.partial(op, impl=impl), narrow, oracle.upstream)
        return [*zip(ours, oracle.eager, oracle.exact, strict=True)]

    judge(draw, tensors)


Triples = list[tuple[Tensor, Tensor, Tensor]]  # each result of a kernel, of eager and exactly


def judge(draw: Callable[[Sequence[Any]], Triples], tensors: Sequence[Any]) -> None:
    """Raises AssertionError unless what `draw` gives for `tensors` obeys the rule.

    The largest of few errors is a matter of luck, the kernel's as well as eager's: a kernel as
    exact as eager fails on one of some hundred draws of a thousand numbers. So small tensors that
    fail are shuffled and drawn 32 times more, and the rule holds for all draws as one: a
    kernel that is less exact fails on those as well."""
    draws = [draw(tensors)]
    if sum(t.numel() for t in tensors if isinstance(t, Tensor)) < 1_000_000:
        try:
            _judge(draws)
        except AssertionError:
            draws += [draw([*map(_shuffled, tensors)]) for _ in range(32)]
    _judge(draws)


def _judge(draws: Sequence[Triples]) -> None:
    for i, triples in enumerate(zip(*draws, strict=True)):
        ours, eager, exact = (torch.stack(same) for same in zip(*triples, strict=True))
        close_as_eager(f"result {i}", ours, eager, exact)


def _shuffled(t: Any) -> Any:
    if not isinstance(t, Tensor) or t.dtype != torch.float64:
        return t
    return t.flatten()[torch.randperm(t.numel(), device=t.device)].view(t.shape)
