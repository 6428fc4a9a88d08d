"""Runs an op on a kernel and on the reference, outputs and gradients, and compares them by the rule
of bench/parity.py.

Kernels run natively where there is a GPU and in Triton's interpreter on CPU tensors elsewhere, with
every uninitialised tensor filled with NaN.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from bench.parity import close_as_eager
from sfkernels import launch

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# The interpreter truncates to bfloat16 where a GPU rounds.
DTYPES = (torch.float32, torch.float16) + (torch.bfloat16,) * (DEVICE == "cuda")

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
    narrow = [t if t.dtype != torch.float64 else t.to(torch.float32 if i in wide else dtype)
              for i, t in enumerate(tensors)]  # fmt: skip
    upstream: list[Tensor] = []

    def run(impl: str, inputs: Sequence[Tensor]) -> list[Tensor]:
        leaves = [t.detach().requires_grad_(gradients and t.is_floating_point()) for t in inputs]
        out = op(*leaves, impl=impl)
        outs = [out] if isinstance(out, Tensor) else [*out]
        if not gradients:
            return outs
        if not upstream:
            upstream.extend(torch.randn_like(o) for o in outs)
        wanted = [t for t in leaves if t.requires_grad]
        grads = [u.to(o.dtype) for u, o in zip(upstream, outs, strict=True)]
        return [*(o.detach() for o in outs), *torch.autograd.grad(outs, wanted, grads)]

    # The exact result is that of the inputs as rounded to `dtype`.
    exact = run("reference", [_double(t) for t in narrow])
    eager = run("reference", narrow)
    with nan_filled():
        ours = run(impl, narrow)
    for i, (got, plain, want) in enumerate(zip(ours, eager, exact, strict=True)):
        close_as_eager(f"result {i}", got, plain, want)


def _double(t: Tensor) -> Tensor:
    return t.double() if t.is_floating_point() else t
