"""The choice of implementation, made once per call and never silently."""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType
from typing import Any

from torch import Tensor

from sfkernels import reference

IMPLS = ("auto", "triton", "cpp", "reference")

# What each device runs under "auto", best first; an op takes the first that has it.
_BY_DEVICE: dict[str, tuple[str, ...]] = {"cuda": ("reference",), "cpu": ("reference",)}
_MODULES: dict[str, ModuleType] = {"reference": reference}


def implementation(op: str, impl: str, tensor: Tensor) -> Callable[..., Any]:
    """The function that computes `op` under `impl` for tensors on the device of `tensor`. Raises
    ValueError for a name that does not exist or an implementation that lacks the op."""
    if impl not in IMPLS:
        raise ValueError(f"impl={impl!r}: must be one of {', '.join(IMPLS)}")
    having = [name for name, module in _MODULES.items() if hasattr(module, op)]
    if impl == "auto":
        order = _BY_DEVICE.get(tensor.device.type, ("reference",))
        impl = next(name for name in order if name in having)
    if impl not in having:
        raise ValueError(f"impl={impl!r}: {op} has {', '.join(having)} (or 'auto')")
    return getattr(_MODULES[impl], op)


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
