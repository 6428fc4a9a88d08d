"""Runs an op on a kernel and on the reference, outputs and gradients, and compares them by the rule
of sfkernels/testing.py.

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

from bench.contest import interpreted
from sfkernels import cpp, launch
from sfkernels.testing import close_as_eager

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


Op = Callable[..., Any]  # (*tensors, impl=...) -> a tensor or a tuple of them


def rand(*shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    """Standard normal, in float64, on the device under test."""
    return torch.randn(*shape, dtype=torch.float64, device=DEVICE).to(dtype)


@contextlib.contextmanager
def setting(**settings: launch.Setting) -> Iterator[None]:
    """Other launch settings than those in use, by the kernel's name."""
    launch.overrides.update(settings)
    try:
        yield
    finally:
        launch.overrides.clear()


@contextlib.contextmanager
def nan_filled() -> Iterator[None]:
    """Uninitialised tensors are NaN, so that what a kernel does not write is seen."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    assert torch.empty(1).isnan().all()
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


@contextlib.contextmanager
def alone() -> Iterator[None]:
    """On a GPU one process at a time, which leaves no memory behind: the references of attention at
    real shapes take tens of gigabytes."""
    if DEVICE == "cpu":
        yield
        return
    with open(Path(tempfile.gettempdir(), f"sfkernels-tests-{os.getuid()}"), "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)  # until it is closed
        yield
        torch.cuda.empty_cache()


def narrowed(tensors: Sequence[Tensor], dtype: torch.dtype, wide: Sequence[int]) -> list[Tensor]:
    """What is float64 as `dtype`, or as float32 at the indices in `wide`; all else as it is."""
    return [t if t.dtype != torch.float64 else t.to(torch.float32 if i in wide else dtype)
            for i, t in enumerate(tensors)]  # fmt: skip


def results(
    op: Op, inputs: Sequence[Tensor], impl: str, *, gradients: bool, upstream: list[Tensor]
) -> list[Tensor]:
    """What an op returns and, if wanted, the gradients of its inputs by those of its outputs in
    `upstream`; if that is empty, random ones are put there."""
    leaves = [t.detach().requires_grad_(gradients and t.is_floating_point()) for t in inputs]
    out = op(*leaves, impl=impl)
    outs = [out] if isinstance(out, Tensor) else [*out]
    if not gradients:
        return outs
    if not upstream:
        # Without tails: the rounding of one large number would decide how far off a sum may be.
        upstream.extend(torch.randn_like(o).clamp(-2, 2) for o in outs)
    wanted = [t for t in leaves if t.requires_grad]
    grads = [u.to(o.dtype) for u, o in zip(upstream, outs, strict=True)]
    return [*(o.detach() for o in outs), *torch.autograd.grad(outs, wanted, grads)]


def check(
    op: Op,
    tensors: Sequence[Tensor],
    dtype: torch.dtype,
    *,
    wide: Sequence[int] = (),
    gradients: bool = True,
    impl: str = "triton",
) -> None:
    """Compares an op under `impl` with the reference by the rule.

    tensors: float64 arguments of `op`, in order; those at the indices in `wide` stay in float32
    where the others are cast to `dtype`. Other dtypes than float64 are handed on as they are."""
    narrow = narrowed(tensors, dtype, wide)
    upstream: list[Tensor] = []
    run = functools.partial(results, op, gradients=gradients, upstream=upstream)
    with alone():
        # The exact result is that of the inputs as rounded to `dtype`.
        exact = run([_double(t) for t in narrow], "reference")
        eager = run(narrow, "reference")
    with nan_filled():
        ours = run(narrow, impl)
    for i, (got, plain, want) in enumerate(zip(ours, eager, exact, strict=True)):
        close_as_eager(f"result {i}", got, plain, want)


def _double(t: Tensor) -> Tensor:
    return t.double() if t.is_floating_point() else t
