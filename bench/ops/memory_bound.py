"""Cases of `python -m bench kernels` for norms, RoPE, the sampler and rows in 8 bits: ops whose
time is that of the bytes they read and write, at the shapes of Wan2.1 and of its video decoder. And
for linear layers and that decoder's convolutions, whose time is that of their products."""

from __future__ import annotations

import functools
import importlib
import importlib.util
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import sfkernels as sf
from bench import codecs
from bench.harness import CPP, EAGER
from bench.timing import Implementation
from sfkernels import cases, cpp, testing
from sfkernels.cases import CHUNK, FRAME, GRID, LATENTS, WINDOW, Case
from sfkernels.dispatch import CONVOLUTION
from sfkernels.testing import Op, interpreted

EPS = 1e-6
LIGER = "liger_kernel.transformers.functional"
# Other libraries' kernels of an op: where they are imported from, and how they are called.
PEERS: dict[str, tuple[tuple[str, str, Callable[..., Any]], ...]] = {
    "rms_norm": (
        # In place, its backward pass would write over the gradient that it is given.
        ("liger", LIGER, lambda liger, x, w: liger.liger_rms_norm(x, w, EPS, in_place=False)),
        ("quack", "quack", lambda quack, x, w: quack.rmsnorm(x, w, eps=EPS)),
    ),
    "layer_norm": (("liger", LIGER, lambda liger, *xwb: liger.liger_layer_norm(*xwb, EPS)),),
}
# PyTorch's own op of the same tensors.
NATIVE: dict[str, Op] = {
    "rms_norm": lambda x, w: F.rms_norm(x, w.shape, w, EPS),
    "layer_norm": lambda x, w, b: F.layer_norm(x, w.shape, w, b, EPS),
    **{op: functools.partial(getattr(sf, op), impl="torch") for op in CONVOLUTION},
}

Shape = tuple[int, int, int]  # frames, tokens of a frame, channels
Layer = tuple[int, int, int, bool]  # tokens, channels, outputs, GELU


@dataclass(frozen=True)
class Sizes:
    """Sizes that are run: shapes, those that the backward pass and torch.compile get, the sampler's
    latents (channels, height, width) and its table's grid of tokens, levels of the video decoder,
    of which the first gets torch.compile and the last the backward pass, and linear layers."""

    shapes: tuple[Shape, ...]
    compiled: tuple[Shape, ...]
    levels: tuple[Shape, ...]
    dtype: torch.dtype
    head_dim: int = 128
    latents: tuple[int, int, int] = LATENTS
    grid: tuple[int, int] = GRID
    layers: tuple[Layer, ...] = ()


LEVELS = ((12, 480 * 832, 96), (12, 240 * 416, 192), (3, 60 * 104, 384))
_CHUNK, _CLIP = (CHUNK, FRAME, 1536), (WINDOW, FRAME, 1536)
_NARROW = _CHUNK, _CLIP, (1, FRAME, 1536), (9, FRAME, 1536)  # Wan2.1-1.3B
_WIDE = tuple((frames, FRAME, 5120) for frames in (3, 1, 9, WINDOW))  # 14B
_LAYERS = (1536, 8960, True), (8960, 1536, False), (1536, 1536, False), (1536, 4608, False)
FULL = Sizes(
    _NARROW + _WIDE, (_CHUNK, _CLIP), LEVELS, torch.bfloat16,
    layers=tuple((n * FRAME, *layer) for n in (CHUNK, 2 * CHUNK, 1) for layer in _LAYERS),
)  # fmt: skip
# A frame: large enough for the C++ to show, on two cores in seconds.
SMALL = Sizes(((1, FRAME, 1536),), ((1, FRAME, 1536),), ((1, 60 * 104, 384),), torch.float32)
_TOY = ((3, 16, 96),)
TINY = Sizes(_TOY, _TOY, _TOY, torch.float32, 32, (4, 6, 8), (2, 3), ((48, 96, 200, True),))


def rows(sizes: Sizes) -> Iterator[tuple[Case, bool]]:
    """The cases, the most telling first, and whether torch.compile takes part."""
    dtype = sizes.dtype
    for shape in sizes.shapes:
        compiled = shape in sizes.compiled
        for backward in (False, True) if compiled else (False,):
            for op in cases.NORMS:
                yield cases.normalisation(op, *shape, dtype, backward), compiled
            rope = functools.partial(cases.qk_norm_rope, *shape, sizes.head_dim, dtype)
            if not backward and shape[0] < WINDOW:
                yield rope(append=WINDOW), compiled
            if compiled:
                yield rope(backward=backward), compiled
        if shape != sizes.shapes[0]:
            continue
        for layer in sizes.layers:
            half = torch.bfloat16 if dtype.itemsize == 2 else torch.float16
            yield cases.linear(*layer, half), False
        for into in (torch.int8, torch.float8_e4m3fn):
            yield cases.quantize_rows(shape[0] * shape[1], shape[2], dtype, into), compiled
        yield cases.sampler_step("given noise", latents=sizes.latents), True
        yield cases.sampler_step("drawn noise", latents=sizes.latents), False
        yield cases.dmd_gradient(latents=sizes.latents), True
        yield cases.rope_table(grid=sizes.grid), False
        for level in sizes.levels:
            for backward in (False, True) if level == sizes.levels[-1] else (False,):
                yield cases.rms_norm_silu(*level, dtype, backward), level == sizes.levels[0]


def convolutions(tiny: bool) -> Iterator[tuple[Case, bool]]:
    """The heaviest of the video decoder, whose time is that of their products."""
    for size in [(1, 3, 4, 8, 8, (3, 3, 3))] if tiny else cases.CONVOLUTIONS[:4]:
        yield cases.causal_conv3d(*size, torch.float32 if tiny else torch.bfloat16), False
    for large in [(1, 3, 4, 8, 8)] if tiny else cases.UPSAMPLED[2:]:
        yield cases.upsampled_conv2d(*large, torch.float32 if tiny else torch.bfloat16), False


def implementations(case: Case, device: torch.device, compiled: bool) -> list[Implementation]:
    """Ours first. compiled: torch.compile takes part."""
    cuda, layer = device.type == "cuda", case.op.startswith("linear")
    by_product = layer or case.op in CONVOLUTION
    impls = [] if cuda or cpp.MISSING or by_product else [CPP]
    impls += ["triton"] if cuda or interpreted() else []
    found = [Implementation(impl, case.by(impl)) for impl in impls]
    found.append(Implementation(EAGER, case.by("reference")))
    if compiled:
        torch._dynamo.reset()  # one entry for each op, not a growing list of guards
        torch._functorch.config.donated_buffer = False  # a backward pass is run again
        mode = "max-autotune-no-cudagraphs" if cuda else None
        by_inductor = torch.compile(case.by("reference"), mode=mode, dynamic=False)
        found.append(Implementation("compile", by_inductor))
    if layer:
        found.append(Implementation("cublaslt", case.by("torch")))
    if case.op in NATIVE:
        native = functools.partial(_as_list, NATIVE[case.op])
        found.append(Implementation("native", native, context=codecs.searched))
    for name, module, call in PEERS.get(case.op, ()):
        if cuda and importlib.util.find_spec(module.partition(".")[0]):
            peer = functools.partial(_peer, module, call)
            found.append(Implementation(name, functools.partial(_as_list, peer)))
    return found


def _as_list(op: Op, *tensors: Tensor) -> list[Tensor]:
    return [op(*tensors)]


def _peer(module: str, call: Callable[..., Any], *tensors: Tensor) -> Any:
    return call(importlib.import_module(module), *tensors)


class Judge:
    """Check that raises AssertionError for an op that breaks the rule of sfkernels.testing.
    upstream: the gradients of its outputs, of a backward pass."""

    def __init__(self, case: Case, inputs: Sequence[Tensor]) -> None:
        self.inputs = inputs
        self.quantised = case.op.startswith("quantize_rows")
        reference = self._compared(case.by("reference"))
        self.oracle = testing.Oracle(reference, inputs, gradients=case.backward)
        self.upstream = self.oracle.upstream
        if self.quantised:
            self.oracle.exact = [inputs[0].double()]

    def __call__(self, op: Op, slack: float = 1.0) -> None:
        copies = [t.clone() for t in self.inputs]  # an op may write into its arguments
        with torch.set_grad_enabled(bool(self.upstream)):
            got = testing.results(self._compared(op), copies, self.upstream)
        self.oracle.check(got, slack=slack)

    def _compared(self, op: Op) -> Op:
        """The op, or for rows in 8 bits what they stand for, which is compared with the rows."""
        if not self.quantised:
            return op

        def restored(x: Tensor) -> Tensor:
            q, scale = op(x)
            return torch.mul(q.to(scale.dtype), scale[..., None])

        return restored
