"""Forwards that modules of other people's models are given, and how they are taken away."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from torch import Tensor, nn

from sfkernels.norm import rms_norm


class Options(NamedTuple):
    """What `patch` was asked for: implementations of norms and RoPE, and of attention."""

    impl: str
    attention_impl: str


def give(module: nn.Module, name: str, forward: Callable[..., Any], options: Options) -> None:
    """Gives a module a forward, which is called with the module and the options first: bound by
    `partial`, so that copies and pickles of the module have it too. One given before is replaced at
    once, while others may be running it. name: of the module, for the message of the ValueError
    that is raised where it has a forward of its own."""
    if "forward" in vars(module) and not is_patched(module):
        raise ValueError(
            f"{name} has had its forward replaced already, as accelerate's hooks and other patches "
            "do: patch the model first"
        )
    module.forward = functools.partial(forward, module, options)


def is_given(forward: Any) -> bool:
    """Tells whether it is a forward that `give` has given."""
    return isinstance(forward, functools.partial) and any(
        isinstance(value, Options) for value in forward.args
    )


def is_patched(module: nn.Module) -> bool:
    return is_given(vars(module).get("forward"))


def check_hooks(model: nn.Module) -> None:
    """Raises ValueError where accelerate's hooks have been put around a forward that was given."""
    for name, module in model.named_modules():
        if is_given(vars(module).get("_old_forward")):
            raise ValueError(
                f"{name} has a hook that was added after the patch: remove it first "
                "(accelerate.hooks.remove_hook_from_module)"
            )


def restore(model: nn.Module) -> None:
    """Takes away what `give` and processors have given to the modules of a model. Raises
    ValueError, changing nothing, as `check_hooks` does."""
    check_hooks(model)
    for module in model.modules():
        if is_patched(module):
            del module.forward
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
    """The weight of an RMSNorm; None of an Identity, which stands where a model has no norm. Raises
    ValueError for one that is not in memory."""
    if isinstance(norm, nn.Identity):
        return None
    weight: Tensor = norm.weight  # type: ignore[assignment]
    if weight.is_meta:
        raise ValueError(
            "the weight of a norm is on meta, as accelerate's sequential offloading leaves it: "
            "offload whole models or groups of blocks, or unpatch the model"
        )
    return weight


def check_norms(module: nn.Module, name: str, *norms: str) -> None:
    """Raises ValueError unless all these are RMSNorms with a weight and an epsilon, or Identity."""
    for norm in norms:
        found = getattr(module, norm)
        known = getattr(found, "weight", None) is not None and eps_of(found) > 0
        if not isinstance(found, nn.Identity) and not known:
            raise ValueError(
                f"{name}.{norm} is a {type(found).__name__} without weight or epsilon: this "
                "version is not known"
            )


def eps_of(norm: nn.Module) -> float:
    """The epsilon of a norm; 1 where there is none, as of an Identity, which needs none."""
    return float(getattr(norm, "eps", 1.0) or 0.0)


def normed(norm: nn.Module, x_BLC: Tensor, impl: str) -> Tensor:
    """The RMSNorm of a model, or x where it has none."""
    weight = weight_of(norm)
    return x_BLC if weight is None else rms_norm(x_BLC, weight, eps=eps_of(norm), impl=impl)
