"""What `python -m bench kernels` measures of norms, RoPE, the sampler and rows in 8 bits: ops whose
time is that of the bytes they read and write, at the shapes of Wan2.1 and of its video decoder."""

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
from bench import contest
from bench.contest import Inputs, Op, interpreted, sequence
from bench.timing import Contestant
from sfkernels import cpp, roofline
from sfkernels.testing import close_as_eager

GRID = (30, 52)  # tokens of a frame of Wan2.1 at 480×832
WINDOW = 21  # frames of a ring, and of a clip
COMPILE_SECONDS = 30.0  # what torch.compile may take for a case
EPS = 1e-6

LIGER = "liger_kernel.transformers.functional"
# Other libraries' kernels of an op: where they are imported from, and how they are called.
PEERS: dict[str, tuple[tuple[str, str, str, Callable[..., Any]], ...]] = {
    "rms_norm": (
        # In place, its backward pass would write over the gradient that it is given.
        ("liger", LIGER, "liger_rms_norm",
         lambda rms, x, w: rms(x, w, EPS, in_place=False)),
        ("quack", "quack", "rmsnorm", lambda rms, x, w: rms(x, w, eps=EPS)),
    ),
    "layer_norm": (
        ("liger", LIGER, "liger_layer_norm",
         lambda norm, x, w, b: norm(x, w, b, EPS)),
    ),
}  # fmt: skip


@dataclass(frozen=True)
class Case:
    """function: of (*tensors, impl=...). new: new tensors on a device. nbytes: every tensor that
    has to be read or written, once. native: PyTorch's own op of the same tensors."""

    op: str
    shape: str
    function: Callable[..., Any]
    new: Callable[[torch.device], list[Tensor]]
    flops: int
    nbytes: int
    native: Callable[..., Any] | None = None
    backward: bool = False
    compiled: bool = False

    @property
    def label(self) -> str:
        return f"{self.op}{' backward' * self.backward} {self.shape}"

    @property
    def compiler(self) -> tuple[str, float] | None:
        return ("compile", COMPILE_SECONDS) if self.compiled else None

    def make(self, device: torch.device) -> list[Tensor]:
        return self.new(device)

    def by(self, impl: str) -> Op:
        return functools.partial(sequence, functools.partial(self.function, impl=impl))

    def contestants(self, device: torch.device, compiled: bool) -> list[Contestant]:
        cuda = device.type == "cuda"
        found = [Contestant(contest.EAGER, self.by("reference"))]
        if cuda or interpreted():
            found.insert(0, Contestant("triton", self.by("triton")))
        if not cuda and not cpp.MISSING:
            found.insert(0, Contestant(contest.CPP, self.by("cpp")))
        if compiled:
            torch._dynamo.reset()  # one entry for each op, not a growing list of guards
            reference = functools.partial(self.function, impl="reference")
            mode = "max-autotune-no-cudagraphs" if cuda else None
            by_inductor = torch.compile(reference, mode=mode, dynamic=False)
            torch._functorch.config.donated_buffer = False  # a backward pass is run again
            found.append(Contestant("compile", functools.partial(sequence, by_inductor)))
        if self.native is not None:
            found.append(Contestant("native", functools.partial(sequence, self.native)))
        for name, module, function, call in PEERS.get(self.op, ()):
            if cuda and importlib.util.find_spec(module.partition(".")[0]):
                peer = functools.partial(_peer, module, function, call)
                found.append(Contestant(name, functools.partial(sequence, peer)))
        return found

    def upstream(self, inputs: Inputs) -> list[Tensor]:
        with torch.no_grad():
            return [torch.randn_like(o) for o in self.by("reference")(*contest.copies(inputs))]

    def results(self, op: Op, inputs: Inputs, upstream: Inputs) -> list[Tensor]:
        return contest.gradients_or_outputs(op, inputs, upstream)

    def judge(self, inputs: Inputs, upstream: Inputs) -> Callable[..., None]:
        reference = self.by("reference")
        eager = self.results(reference, inputs, upstream)
        exact = self.results(
            reference, [_double(t) for t in inputs], [u.double() for u in upstream]
        )

        def check(got: Inputs, slack: float = 1.0) -> None:
            for i, triple in enumerate(zip(got, eager, exact, strict=True)):
                close_as_eager(f"result {i}", *triple, slack=slack)

        return check


def _peer(module: str, function: str, call: Callable[..., Any], *tensors: Tensor) -> Any:
    return call(getattr(importlib.import_module(module), function), *tensors)


def _double(t: Tensor) -> Tensor:
    return t.double() if t.is_floating_point() else t


Shape = tuple[int, int, int, int]  # frames, tokens of a frame, channels, head dim
Level = tuple[int, int, int]  # of the video decoder: frames of a chunk, pixels of a frame, channels
LOOKS_BACK = 2  # frames that a convolution of the decoder sees before its own


@dataclass(frozen=True)
class Sizes:
    """What is run: the shapes, those that torch.compile and the backward pass get, the sampler's
    latents (channels, height, width), and levels of the video decoder, of which the first gets
    torch.compile and the last the backward pass."""

    shapes: tuple[Shape, ...]
    compiled: tuple[Shape, ...]
    latents: tuple[int, int, int]
    levels: tuple[Level, ...]
    dtype: torch.dtype


_N = GRID[0] * GRID[1]
_CHUNK, _CLIP = (3, _N, 1536, 128), (WINDOW, _N, 1536, 128)
FULL = Sizes(
    (
        _CHUNK, _CLIP, (1, _N, 1536, 128), (9, _N, 1536, 128),  # Wan2.1-1.3B
        *((frames, _N, 5120, 128) for frames in (3, 1, 9, WINDOW)),  # 14B
    ),
    (_CHUNK, _CLIP),
    (16, 60, 104),
    ((12, 480 * 832, 96), (12, 240 * 416, 192), (3, 60 * 104, 384)),
    torch.bfloat16,
)  # fmt: skip
TINY = Sizes(((3, 16, 96, 32),), ((3, 16, 96, 32),), (4, 6, 8), ((3, 16, 96),), torch.float32)


def cases(sizes: Sizes) -> Iterator[Case]:
    """The most telling first, so that a time limit cuts the rest."""
    for shape in sizes.shapes:
        for backward in (False, True) if shape in sizes.compiled else (False,):
            yield from _norm_cases(shape, sizes, backward)
            yield from _rope_cases(shape, sizes, backward)
        if shape == sizes.shapes[0]:
            yield from _quantised_cases(shape, sizes)
            yield from _sampler_cases(sizes)
            yield from _decoder_cases(sizes)


def _norm_cases(shape: Shape, sizes: Sizes, backward: bool) -> Iterator[Case]:
    frames, per_frame, channels, _ = shape
    tokens, size = frames * per_frame, sizes.dtype.itemsize

    def x(device: torch.device) -> Tensor:
        return torch.randn(1, tokens, channels, device=device).to(sizes.dtype)

    def weight(device: torch.device) -> Tensor:
        return torch.randn(channels, device=device).to(sizes.dtype)

    def modulation(device: torch.device) -> list[Tensor]:
        return [*torch.randn(1, frames, 3, channels, device=device).unbind(2)]

    def layer_norm(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return F.layer_norm(x, (channels,), weight, bias, EPS)

    def rms_norm(x: Tensor, weight: Tensor) -> Tensor:
        return F.rms_norm(x, (channels,), weight, EPS)

    # op, tensors, activations read and written forward and backward, PyTorch's own
    forms: list[tuple[Any, Callable[[torch.device], list[Tensor]], int, int, Any]] = [
        (sf.adaln, lambda d: [x(d), *modulation(d)[:2]], 2, 3, None),
        (sf.gated_adaln, lambda d: [x(d), x(d), *modulation(d)], 4, 6, None),
        (
            sf.gated_layer_norm,
            lambda d: [x(d), x(d), modulation(d)[0], weight(d), weight(d)],
            4,
            6,
            None,
        ),
        (sf.layer_norm, lambda d: [x(d), weight(d), weight(d)], 2, 3, layer_norm),
        (sf.rms_norm, lambda d: [x(d), weight(d)], 2, 3, rms_norm),
    ]
    for op, make, forward_rows, backward_rows, native in forms:
        moved = backward_rows if backward else forward_rows
        yield Case(
            op.__name__,
            f"{tokens} x {channels}",
            op,
            make,
            roofline.row_flops(op.__name__, tokens * channels, backward),
            roofline.norm_bytes(tokens, channels, moved, size),
            native,
            backward,
            shape in sizes.compiled,
        )


@dataclass(frozen=True)
class Quantised(Case):
    """Of rows in 8 bits: what they stand for is compared with the rows themselves."""

    def results(self, op: Op, inputs: Inputs, upstream: Inputs) -> list[Tensor]:
        q, scale = super().results(op, inputs, upstream)
        return [q.to(scale.dtype) * scale[..., None]]

    def judge(self, inputs: Inputs, upstream: Inputs) -> Callable[..., None]:
        (eager,) = self.results(self.by("reference"), inputs, upstream)
        exact = inputs[0].double()
        return lambda got, slack=1.0: close_as_eager("q · scale", got[0], eager, exact, slack=slack)


def _quantised_cases(shape: Shape, sizes: Sizes) -> Iterator[Case]:
    frames, per_frame, channels, _ = shape
    tokens = frames * per_frame

    def make(device: torch.device) -> list[Tensor]:
        return [torch.randn(1, tokens, channels, device=device).to(sizes.dtype)]

    for dtype, said in ((torch.int8, "int8"), (torch.float8_e4m3fn, "e4m3")):
        yield Quantised(
            f"quantize_rows, {said}",
            f"{tokens} x {channels}",
            functools.partial(sf.quantize_rows, dtype=dtype),
            make,
            roofline.row_flops("quantize_rows", tokens * channels),
            roofline.quantize_bytes(tokens, channels, sizes.dtype.itemsize),
            compiled=shape in sizes.compiled,
        )


def _append(*tensors: Tensor, impl: str) -> tuple[Tensor, ...]:
    """The rings are returned too, to be compared."""
    return sf.qk_norm_rope_append(*tensors, impl=impl), *tensors[4:6]


def _rope_cases(shape: Shape, sizes: Sizes, backward: bool) -> Iterator[Case]:
    frames, per_frame, channels, head_dim = shape
    tokens, heads = frames * per_frame, channels // head_dim
    compiled = shape in sizes.compiled

    def qkv(device: torch.device) -> list[Tensor]:
        made = torch.randn(1, tokens, 3 * channels, device=device).to(sizes.dtype)
        weights = torch.randn(2, channels, device=device).to(sizes.dtype)
        frame = torch.arange(frames, device=device)
        table = sf.rope_table(frame, (1, per_frame), head_dim, impl="reference")
        return [made, *weights, table]

    def with_ring(device: torch.device) -> list[Tensor]:
        ring = torch.zeros(2, 1, WINDOW * per_frame, heads, head_dim, device=device)
        return [*qkv(device), *ring.to(sizes.dtype), torch.arange(frames, device=device) + 2]

    def case(op: str, function: Callable[..., Any], make: Callable[..., list[Tensor]]) -> Case:
        return Case(
            op,
            f"{tokens} x {channels}",
            function,
            make,
            roofline.row_flops("qk_norm_rope", tokens * channels, backward),
            roofline.qk_norm_rope_bytes(tokens, channels, head_dim, sizes.dtype.itemsize, backward),
            None,
            backward,
            compiled,
        )

    if not backward and frames < WINDOW:
        yield case("qk_norm_rope_append", _append, with_ring)
    if compiled:
        yield case("qk_norm_rope", _of_trained if backward else sf.qk_norm_rope, qkv)


def _of_trained(qkv: Tensor, q_weight: Tensor, k_weight: Tensor, table: Tensor, impl: str) -> Any:
    """The table is no leaf of the backward pass."""
    return sf.qk_norm_rope(qkv, q_weight, k_weight, table.detach(), impl=impl)


def _sampler_cases(sizes: Sizes) -> Iterator[Case]:
    chunk, clip = (1, 3, *sizes.latents), (1, WINDOW, *sizes.latents)

    def latents(device: torch.device, count: int, shape: Sequence[int] = chunk) -> list[Tensor]:
        return [*torch.randn(count, *shape, device=device)]

    def sigmas(device: torch.device) -> list[Tensor]:
        return [torch.tensor(0.9, device=device), torch.tensor(0.6, device=device)]

    def drawn(
        x: Tensor, flow: Tensor, sigma: Tensor, after: Tensor, seed: Tensor, frame: Tensor,
        impl: str,
    ) -> Any:  # fmt: skip
        return sf.sampler_step(x, flow, sigma, after, sf.Noise(seed, frame, 1), impl=impl)

    def given(
        x: Tensor, flow: Tensor, noise: Tensor, sigma: Tensor, after: Tensor, impl: str
    ) -> Any:
        return sf.sampler_step(x, flow, sigma, after, noise, impl=impl)

    def make_drawn(device: torch.device) -> list[Tensor]:
        seed = torch.tensor([7], device=device)
        return [*latents(device, 2), *sigmas(device), seed, torch.arange(3, device=device)]

    def frames_only(device: torch.device) -> list[Tensor]:
        return [torch.arange(3, device=device) + 100]

    def table(frame: Tensor, impl: str) -> Tensor:
        return sf.rope_table(frame, GRID if sizes is FULL else (2, 3), 128, impl=impl)

    def case(
        op: str,
        kind: str,
        shape: Sequence[int],
        function: Callable[..., Any],
        make: Callable[[torch.device], list[Tensor]],
        tensors: int,
        compiled: bool = False,
    ) -> Case:
        elements = torch.Size(shape).numel()
        return Case(
            op + kind,
            "x".join(map(str, shape[1:])),
            function,
            make,
            roofline.row_flops(op, elements),
            roofline.sampler_bytes(elements, tensors),
            compiled=compiled,
        )

    yield case("sampler_step", ", given noise", chunk, given,
               lambda d: [*latents(d, 3), *sigmas(d)], 5, compiled=True)  # fmt: skip
    yield case("sampler_step", ", drawn noise", chunk, drawn, make_drawn, 4)
    yield case(
        "dmd_gradient", "", clip, sf.dmd_gradient, lambda d: latents(d, 3, clip), 4, compiled=True
    )
    tokens = 3 * (_N if sizes is FULL else 6)
    flops, nbytes = (
        roofline.row_flops("rope_table", tokens * 128),
        roofline.rope_table_bytes(tokens, 128),
    )
    yield Case("rope_table", f"{tokens} x 128", table, frames_only, flops, nbytes)


def _norm_silu(
    x: Tensor, weight: Tensor, y: Tensor, before: Tensor, bias: Tensor | None = None, *, impl: str
) -> Any:
    return sf.rms_norm_silu(x, weight, y, bias_C=bias, before_BPC=before, impl=impl)


def _decoder_cases(sizes: Sizes) -> Iterator[Case]:
    """What precedes a convolution: a residual before it, the frames before in front of it, and
    forward the bias of the convolution before."""

    def make(level: Level, backward: bool, device: torch.device) -> list[Tensor]:
        frames, pixels, channels = level
        x, y, before, affine = (
            torch.randn(1, rows, channels, device=device).to(sizes.dtype)
            for rows in (frames * pixels, frames * pixels, LOOKS_BACK * pixels, 2)
        )
        weight, bias = affine[0]
        return [x, weight, y, before, *([] if backward else [bias])]

    for level in sizes.levels:
        frames, pixels, channels = level
        tokens, before, size = frames * pixels, LOOKS_BACK * pixels, sizes.dtype.itemsize
        for backward in (False, True) if level == sizes.levels[-1] else (False,):
            yield Case(
                "rms_norm_silu",
                f"{tokens} x {channels}",
                _norm_silu,
                functools.partial(make, level, backward),
                roofline.row_flops("rms_norm_silu", tokens * channels, backward),
                roofline.norm_silu_bytes(tokens, before, channels, size, backward),
                None,
                backward,
                level == sizes.levels[0],
            )
