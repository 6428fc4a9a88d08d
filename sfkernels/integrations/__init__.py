"""The kernels in models that people run already: `patch(model)` gives the blocks of a model
forwards that use them, `unpatch(model)` takes these away again.

    from sfkernels.integrations import patch

    patch(pipeline)  # or the model alone; one line, anywhere between loading and the first pass

Parameters, their names and classes stay as they are, so that checkpoints, `.to()`, autocast and
LoRA by PEFT work as before; nothing is copied or fused. Known are

- `CausalWanModel` of Self Forcing, CausVid, LongLive and Rolling Forcing (`causal_wan.py`);
- diffusers' `WanTransformer3DModel` (`diffusers_wan.py`), with `WanKVCache` for cached rollouts.

A model is recognised by the name of its class and the parameters of its blocks' forward; neither
library is imported.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from typing import Any, TypeVar

from torch import nn

from sfkernels.dispatch import ATTENTION, IMPLS, implementations
from sfkernels.integrations import causal_wan, diffusers_wan
from sfkernels.integrations.diffusers_wan import WanKVCache
from sfkernels.integrations.forwards import Options, check_hooks, restore

T = TypeVar("T")
KNOWN = {
    "CausalWanModel": causal_wan.patch,
    "WanTransformer3DModel": diffusers_wan.patch,
}
# Where wrappers and pipelines keep their models.
_PLACES = ("_orig_mod", "module", "model", "generator", "transformer", "transformer_2")
_LOCK = threading.Lock()


def patch(target: T, *, impl: str = "auto", attention_impl: str = "auto") -> T:
    """Gives the blocks of a model forwards that use the kernels; returns `target`.

    target: the model, or a wrapper or pipeline that has one, or two. impl: of norms and RoPE;
    attention_impl: of attention. Both as everywhere ("triton", "reference", …). A patched model is
    patched anew with these. Patch between videos: a cache that is half full is in another order.

    Raises ValueError, changing nothing, for models that are not known, for blocks that are not as
    expected, and for modules whose forward somebody else has replaced (accelerate's hooks: add
    those afterwards)."""
    _check_impl("impl", impl, ("norm",))
    _check_impl("attention_impl", attention_impl, ATTENTION)
    with _LOCK:
        found = [*_models(target)]
        if not found:
            raise ValueError(
                f"{type(target).__name__} is not known: must be one of {', '.join(KNOWN)}, or have "
                f"one as {', '.join(_PLACES[2:])} (patched blocks belong to a known model)"
            )
        for model in found:
            check_hooks(model)
        try:
            for model in found:
                KNOWN[_class_of(model)](model, Options(impl, attention_impl))
        except ValueError:
            for model in found:
                restore(model)
            raise
    return target


def _check_impl(name: str, impl: str, ops: Sequence[str]) -> None:
    taken = [one for one in IMPLS[1:] if all(one in implementations(op) for op in ops)]
    if impl not in ("auto", *taken):
        raise ValueError(f"{name}={impl!r}: must be 'auto' or one of {', '.join(taken)}")


def unpatch(target: T) -> T:
    """Takes all forwards away that `patch` gave; returns `target`. Without any nothing happens. A
    cache that was filled meanwhile is of no use to the model afterwards: begin a video anew."""
    with _LOCK:
        for model in _models(target):
            restore(model)
    return target


def _class_of(model: Any) -> str:
    """The known class of a model, which may be a base of its own; empty if there is none."""
    return next((base.__name__ for base in type(model).__mro__ if base.__name__ in KNOWN), "")


def _models(target: Any, depth: int = 4) -> Iterator[nn.Module]:
    """The known models in a target, each once."""
    if isinstance(target, nn.Module) and _class_of(target):
        yield target
    elif depth:
        seen: set[int] = set()
        for place in _PLACES:
            # Not by hasattr: a pipeline may compute what it does not have.
            inner = getattr(target, place, None)
            for model in _models(inner, depth - 1) if inner is not None else ():
                if id(model) not in seen:
                    seen.add(id(model))
                    yield model


__all__ = ["WanKVCache", "patch", "unpatch"]
