"""Triton's interpreter, several times as fast, for the tests: what it computes and refuses stays.

Most of its time goes into four functions, which work on whole tiles here or once instead of often.
"""

from __future__ import annotations

import functools
import types
from typing import Any

import numpy as np
import triton
import triton.language as tl
from triton.language.semantic import TritonSemantic
from triton.runtime import interpreter

IN_NUMPY = {"add": np.add, "sub": np.subtract, "mul": np.multiply}


def quicken() -> None:
    """Changes the interpreter of this process, if it is of the version that this is written for;
    others run at their own pace."""
    if not triton.__version__.startswith("3.7."):
        return
    dtype_of, prepare = functools.cache(interpreter._get_np_dtype), interpreter._patch_lang
    language = types.SimpleNamespace(__globals__={"tl": tl, "core": tl.core})

    def np_dtype(of: Any) -> Any:
        """NumPy's type for one of Triton's, without a new table of all types at every call."""
        of = of.element_ty if isinstance(of, tl.block_type) else of
        return np.dtype(np.uint64) if isinstance(of, tl.pointer_type) else dtype_of(of)

    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        """A function that a kernel calls, whose language is prepared with the kernel's."""
        return self.rewrite()(*args, **kwargs)

    interpreter._get_np_dtype = np_dtype
    interpreter._patch_lang = lambda _: prepare(language)
    interpreter.InterpretedFunction.__call__ = call
    interpreter.ReduceOps.generic_reduce = reduce
    TritonSemantic.binary_op_sanitize_overflow_impl = check_overflow


def check_overflow(self: Any, a: Any, b: Any, op: Any) -> None:
    """Raises AssertionError where a sum, difference or product of integers does not fit."""
    of = a.type.scalar
    if of.int_bitwidth < 64:
        out = IN_NUMPY[op.__name__](a.handle.data, b.handle.data, dtype=np.int64)
        fits = of.get_int_min_value() <= out.min() and out.max() <= of.get_int_max_value()
        assert fits, f"int{of.int_bitwidth} overflow detected for operation {op.__name__}"


def reduce(self: Any, inputs: tuple[Any, ...]) -> list[Any]:
    """Combines one half of the tensors with the other until one element is left along the axis, as
    a GPU does, where the interpreter goes from element to element."""
    tensors, axis = self.unravel(inputs, self.axis)
    dtypes, arrays = [t.dtype for t in tensors], [t.handle.data for t in tensors]
    while arrays[0].shape[axis] > 1:  # a power of two
        halves = zip(*(np.split(array, 2, axis) for array in arrays), strict=True)
        args = [self.to_tensor(*of) for half in halves for of in zip(half, dtypes, strict=True)]
        out = self.combine_fn.fn(*args)
        arrays = [t.handle.data for t in (out if isinstance(out, tuple) else (out,))]
    if not self.keep_dims:
        arrays = [array.squeeze(axis) for array in arrays]
    return [self.to_tensor(*of) for of in zip(arrays, dtypes, strict=True)]
