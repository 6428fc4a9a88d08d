"""The choice of implementation, made once per call and never silently, and the checks of arguments
that every op shares."""

from __future__ import annotations

import importlib
import os
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

IMPLS = ("auto", "triton", "cpp", "reference")

# What each device runs under "auto", best first; an op takes the first that has it.
_BY_DEVICE: dict[str, tuple[str, ...]] = {"cuda": ("triton", "reference")}
# Implementations beside the reference: the module with their launchers, and the ops they have.
_MODULES = {"triton": "sfkernels.gpu"}
_OPS = {"triton": frozenset({"norm", "rope_table", "qk_norm_rope", "sampler"})}
_KERNEL_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def choose(op: str, impl: str, device: torch.device, **tensors: Tensor | None) -> str:
    """The implementation that computes `op` for these tensors: `impl` itself, or under "auto" the
    best one for the device.

    Raises ValueError for a name that does not exist, an implementation that lacks the op, and
    tensors it cannot take: kernels want float32, bfloat16 or float16 on one device, with a
    contiguous last dimension."""
    if impl not in IMPLS:
        raise ValueError(f"impl={impl!r}: must be one of {', '.join(IMPLS)}")
    having = [name for name, ops in _OPS.items() if op in ops] + ["reference"]
    if impl == "auto":
        impl = next(
            name for name in (*_BY_DEVICE.get(device.type, ()), "reference") if name in having
        )
    if impl not in having:
        raise ValueError(f"impl={impl!r}: {op} has {', '.join(having)} (or 'auto')")
    if impl != "reference":
        _check_kernel_tensors(impl, device, tensors)
    return impl


def kernel(impl: str, launcher: str) -> Callable[..., Any]:
    """The launcher of an implementation other than the reference."""
    return getattr(importlib.import_module(_MODULES[impl]), launcher)


def _check_kernel_tensors(
    impl: str, device: torch.device, tensors: dict[str, Tensor | None]
) -> None:
    if impl == "triton" and device.type == "cpu" and os.environ.get("TRITON_INTERPRET") != "1":
        raise ValueError(
            "impl='triton' takes CUDA tensors; CPU tensors only under Triton's interpreter, with "
            "TRITON_INTERPRET=1 set before Python starts"
        )
    for name, t in tensors.items():
        if t is None:
            continue
        check_device(name, t, device)
        if t.dtype not in _KERNEL_DTYPES:
            raise ValueError(
                f"{name} is {t.dtype}: impl={impl!r} takes float32, bfloat16 and float16 "
                "(impl='reference' takes any)"
            )
        if t.dim() and t.shape[-1] > 1 and t.stride(-1) != 1:
            raise ValueError(
                f"{name} has stride {t.stride(-1)} in its last dimension: impl={impl!r} takes a "
                "contiguous one; call .contiguous()"
            )


def check_shape(name: str, tensor: Tensor, shape: tuple[int | str, ...]) -> None:
    """Raises ValueError unless `tensor` has `shape`, where a string stands for any size."""
    fits = tensor.dim() == len(shape) and all(
        isinstance(want, str) or got == want for got, want in zip(tensor.shape, shape, strict=True)
    )
    if not fits:
        wanted = ", ".join(str(s) for s in shape)
        raise ValueError(f"{name} has shape {[*tensor.shape]}: must be [{wanted}]")


def check_same(name: str, tensor: Tensor, like_name: str, like: Tensor) -> None:
    """Raises ValueError unless both tensors share a device and a dtype."""
    for what in ("device", "dtype"):
        got, want = getattr(tensor, what), getattr(like, what)
        if got != want:
            raise ValueError(f"{name} has {what} {got}: must be {want}, as {like_name}")


def check_device(name: str, tensor: Tensor, device: torch.device) -> None:
    """Raises ValueError unless `tensor` is on `device`."""
    if tensor.device != device:
        raise ValueError(f"{name} is on {tensor.device}: must be on {device}, as the others")


def contiguous_like(tensor: Tensor, *_: Any) -> Tensor:
    """An empty contiguous tensor of the same shape, dtype and device: what an op returns for it."""
    return torch.empty_like(tensor, memory_format=torch.contiguous_format)
