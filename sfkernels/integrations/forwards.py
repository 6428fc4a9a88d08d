"""Forwards that modules of other people's models are given, and how they are taken away."""

from __future__ import annotations

import inspect
import types
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from torch import Tensor, nn

from sfkernels.norm import rms_norm


class Options(NamedTuple):
    """What `patch` was asked for: implementations of norms and RoPE, and of attention."""

    impl: str
    attention_impl: str


def give(module: nn.Module, name: str, forward: Callable[..., Any], options: Options) -> None:
    """Gives a module a forward, which finds the options as `self._sfkernels`. name: of the module,
    for the message of the ValueError that is raised where it has one of its own."""
    if "forward" in vars(module):
        raise ValueError(
            f"{name} has had its forward replaced already, as accelerate's hooks and other patches "
            "do: patch the model first"
        )
    module._sfkernels = options  # type: ignore[assignment]
    module.forward = types.MethodType(forward, module)


def restore(model: nn.Module) -> None:
    """Takes away what `give` and processors have given to the modules of a model."""
    for module in model.modules():
        if "_sfkernels" in vars(module):
            del module._sfkernels, module.forward
        processor = getattr(module, "processor", None)
        original = getattr(processor, "sfkernels_original", None)
        if original is not None:
            module.processor = original


def version_of(module: nn.Module, name: str, known: Mapping[str, set[str]]) -> str:
    """The known version whose forward takes what a module's does. Raises ValueError for others,
    which nobody has looked at."""
    found = {*inspect.signature(type(module).forward).parameters} - {"self"}
    for version, parameters in known.items():
        if found == parameters:
            return version
    raise ValueError(
        f"{name}, a {type(module).__name__}, takes ({', '.join(sorted(found))}): this version is "
        f"not known, which must be that of {' or '.join(known)}"
    )


def check_parts(module: nn.Module, name: str, *parts: str) -> None:
    """Raises ValueError unless a module has all these."""
    if missing := [part for part in parts if not hasattr(module, part)]:
        raise ValueError(
            f"{name}, a {type(module).__name__}, has no {', '.join(missing)}: this version is not "
            "known"
        )


def weight_of(norm: nn.Module) -> Tensor | None:
    """The weight of an RMSNorm; None of an Identity, which stands where a model has no norm."""
    return None if isinstance(norm, nn.Identity) else norm.weight  # type: ignore[return-value]


def eps_of(norm: nn.Module, dtype_eps: float = 1e-6) -> float:
    """The epsilon of a norm; any where there is none."""
    return float(getattr(norm, "eps", None) or dtype_eps)


def normed(norm: nn.Module, x_BLC: Tensor, impl: str) -> Tensor:
    """The RMSNorm of a model, or x where it has none."""
    weight = weight_of(norm)
    return x_BLC if weight is None else rms_norm(x_BLC, weight, eps=eps_of(norm), impl=impl)
