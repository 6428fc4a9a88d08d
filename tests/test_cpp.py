"""What only C++ has: when it is chosen, threads, instruction sets, large outputs, hard input."""

from __future__ import annotations

import functools
import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

import sfkernels as sf
from sfkernels import cpp
from sfkernels.dispatch import choose
from sfkernels.testing import Op, results
from tests.oracle import CPP_DTYPES, check, narrowed

pytestmark = [
    pytest.mark.usefixtures("fresh_seed"),
    pytest.mark.skipif(bool(cpp.MISSING), reason=cpp.MISSING),
]
each_dtype = pytest.mark.parametrize("dtype", CPP_DTYPES)

# Called with unpacked tensors, which mypy takes for arguments without end.
qk_norm_rope: Any = sf.qk_norm_rope
qk_norm_rope_append: Any = sf.qk_norm_rope_append

CPU = torch.device("cpu")
# Those with a library of their own; a processor that has one has those before it.
CAPABILITIES = ["default", "avx2", "avx512"]


def rand(*shape: int) -> Tensor:
    """Standard normal, in float64; on the CPU where there is a GPU too."""
    return torch.randn(*shape, dtype=torch.float64)


def norms(x: Tensor, weight: Tensor, bias: Tensor, *, impl: str) -> tuple[Tensor, Tensor]:
    return sf.layer_norm(x, weight, bias, impl=impl), sf.rms_norm(x, weight, impl=impl)


def silu(x: Tensor, weight: Tensor, y: Tensor, bias: Tensor, old: Tensor, *, impl: str) -> Any:
    return sf.rms_norm_silu(x, weight, y, bias_C=bias, before_BPC=old, impl=impl)


class Case(NamedTuple):
    """An op with arguments for `check`, and which of them stay in float32."""

    op: Op
    tensors: list[Tensor]
    wide: tuple[int, ...] = ()
    gradients: bool = True

    def check(self, dtype: torch.dtype) -> None:
        check(self.op, self.tensors, dtype, wide=self.wide, gradients=self.gradients, impl="cpp")


def norm_cases(batch: int, frames: int, tokens: int, channels: int) -> list[Case]:
    x, y = rand(2, batch, frames * tokens, channels)
    shift, scale, gate = rand(batch, frames, 3, channels).unbind(2)
    weight, bias = rand(2, channels)

    def ungated(x: Tensor, y: Tensor, *affine: Tensor, impl: str) -> tuple[Tensor, Tensor]:
        return sf.gated_layer_norm(x, y, None, *affine, impl=impl)

    return [
        Case(norms, [x, weight, bias], (1, 2)),
        Case(sf.adaln, [x, shift[:1], scale[:, :1]], (1, 2)),
        Case(sf.gated_adaln, [x, y, gate, shift, scale], (2, 3, 4)),
        Case(ungated, [x, y, weight, bias]),
        Case(silu, [x, weight, y, bias, rand(batch, 9, channels)], (1,)),
    ]


def rope_cases(batch: int, frames: int, grid: tuple[int, int], heads: int, dim: int) -> list[Case]:
    table = sf.rope_table(torch.arange(7, 7 + frames), grid, dim, impl="reference")
    slots = torch.randperm(frames + 1)[:frames]

    def rope(qkv: Tensor, *weights: Tensor, impl: str) -> tuple[Tensor, Tensor, Tensor]:
        return qk_norm_rope(qkv, *weights, table, impl=impl)

    def append(qkv: Tensor, *weights: Tensor, impl: str) -> tuple[Tensor, Tensor, Tensor]:
        k, v = qkv.new_zeros(2, batch, (frames + 1) * grid[0] * grid[1], heads, dim)
        return qk_norm_rope_append(qkv, *weights, table, k, v, slots, impl=impl), k, v

    args = [rand(batch, len(table), 3 * heads * dim), *rand(2, heads * dim)]
    return [Case(rope, args), Case(append, args, gradients=False)]


def sampler_cases(*shape: int) -> list[Case]:
    noise, (sigma, following) = rand(*shape).float(), torch.rand(2, *shape[:2])

    def steps(x: Tensor, flow: Tensor, uncond: Tensor, *, impl: str) -> tuple[Tensor, ...]:
        more: dict[str, Any] = dict(uncond_flow=uncond, guidance=3.5, impl=impl)
        stepped = sf.sampler_step(x, flow, sigma, following, noise, **more)
        return *stepped, sf.euler_step(x, flow, sigma, following, **more)

    tensors = [*rand(3, *shape)]
    return [Case(steps, tensors), Case(sf.dmd_gradient, tensors, gradients=False)]


def every_case() -> list[Case]:
    """Work for three threads, in rows that end inside a vector."""
    sizes = norm_cases(2, 3, 200, 102), rope_cases(2, 3, (10, 20), 3, 34)
    return [case for cases in (*sizes, sampler_cases(2, 3, 200, 102)) for case in cases]


def noise_and_table(impl: str) -> tuple[Tensor, Tensor]:
    noise = sf.Noise(torch.tensor([2**40 + 5, -7]), torch.tensor([3, -1, 2**31 - 1]), 2)
    return (
        sf.normal(noise, (2, 3, 200, 303), impl=impl),
        sf.rope_table(torch.tensor([0, 9, 100_000]), (40, 50), 34, impl=impl),
    )


def outputs(case: Case, dtype: torch.dtype, impl: str = "cpp") -> list[Tensor]:
    return results(by(case.op, impl), narrowed(case.tensors, dtype, case.wide))


def by(op: Op, impl: str = "cpp") -> Op:
    return functools.partial(op, impl=impl)


def upstream_of(case: Case, inputs: Sequence[Tensor]) -> list[Tensor]:
    """Random gradients of the outputs, where there are any."""
    return [torch.randn_like(out) for out in results(by(case.op), inputs)] if case.gradients else []


@pytest.fixture
def threads() -> Iterator[None]:
    """Puts the number of threads back."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("threads")
def test_results_do_not_depend_on_the_number_of_threads() -> None:
    """Bit for bit, gradients included."""
    cases = every_case()
    upstream = [
        upstream_of(case, narrowed(case.tensors, torch.float32, case.wide)) for case in cases
    ]
    seen = []
    for count in (1, 2, 3):
        torch.set_num_threads(count)
        seen.append([*noise_and_table("cpp")])
        for dtype in (torch.float32, torch.bfloat16):
            for case, up in zip(cases, upstream, strict=True):
                inputs = narrowed(case.tensors, dtype, case.wide)
                outs = results(by(case.op), inputs) if up else []
                grads = [u.to(out.dtype) for u, out in zip(up, outs, strict=True)]
                seen[-1] += results(by(case.op), inputs, grads)
    for one, *others in zip(*seen, strict=True):
        assert all(torch.equal(one, other) for other in others)


def check_every_op() -> None:
    """Under the instruction set of this process."""
    for case in every_case():
        for dtype in CPP_DTYPES:
            case.check(dtype)
    noise, table = zip(*map(noise_and_table, ("cpp", "reference")), strict=True)
    torch.testing.assert_close(*noise, rtol=0, atol=1e-5)
    torch.testing.assert_close(*table, rtol=0, atol=2.5e-7)


@pytest.mark.parametrize("capability", CAPABILITIES)
def test_every_instruction_set(capability: str) -> None:
    here = torch.backends.cpu.get_cpu_capability().lower()
    last = CAPABILITIES.index(here) if here in CAPABILITIES else 0
    if capability not in CAPABILITIES[: last + 1]:
        pytest.skip(f"PyTorch uses {here} here")
    found = [*Path(cpp.__file__).parent.glob(f"_cpp_{capability}.*")]
    if not found:
        pytest.skip(f"_cpp_{capability} is not built")
    code = (
        "import torch; from tests.test_cpp import check_every_op; torch.manual_seed(0); "
        "check_every_op(); print(*torch.ops.loaded_libraries)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=Path(__file__).parents[1],
        env={**os.environ, "ATEN_CPU_CAPABILITY": capability, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert f"/_cpp_{capability}." in done.stdout and done.stdout.count("/_cpp_") == 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("heads", [64, 3, 6])
def test_large_outputs_equal_those_of_their_halves(heads: int, dtype: torch.dtype) -> None:
    """Bit for bit: from 8 MiB on what is whole cache lines is written past the caches."""
    channels = 16 * heads
    tokens = 64 * ((8 << 20) // (64 * channels * dtype.itemsize) + 1)  # halves of whole strips
    modulation = torch.randn(3, 1, 1, channels).unbind()
    weight, table = torch.randn(channels, dtype=dtype), torch.randn(1, 8, 2).repeat(tokens, 1, 1)

    def norm(x: Tensor, y: Tensor, *, impl: str) -> Any:
        return sf.gated_adaln(x, y, *modulation, impl=impl)

    def rope(qkv: Tensor, *, impl: str) -> Any:
        return qk_norm_rope(qkv, weight, weight, table[: qkv.shape[1]], impl=impl)

    def append(qkv: Tensor, *, impl: str) -> Any:
        rings = torch.zeros(2, 1, qkv.shape[1], heads, 16, dtype=dtype).unbind()
        args = qkv, weight, weight, table[: qkv.shape[1]], *rings, torch.zeros(1, dtype=torch.int32)
        return qk_norm_rope_append(*args, impl=impl), *rings

    x = torch.randn(4, 1, tokens, channels, dtype=dtype)
    compare_halves(norm, [*x[:2]], [*x[2:]])
    qkv = x[:3].permute(1, 2, 0, 3).flatten(2)
    compare_halves(append, [qkv])
    third = 64 * (tokens // 192 + 1)  # of qkv, whose gradient is one tensor
    compare_halves(rope, [qkv[:, :third]], [*x[:3, :, :third].unflatten(-1, (heads, 16))])


def compare_halves(op: Op, inputs: Sequence[Tensor], upstream: Sequence[Tensor] = ()) -> None:
    """An op of tensors [1, L, ...], outputs and by `upstream` gradients."""
    half = inputs[0].shape[1] // 2
    whole, low, high = (
        results(by(op), [t[:, part] for t in inputs], [t[:, part] for t in upstream])
        for part in (slice(None), slice(half), slice(half, None))
    )
    for got, *parts in zip(whole, low, high, strict=True):
        assert torch.equal(got, torch.cat(parts, 1))


def test_sums_over_many_rows() -> None:
    """As exact as PyTorch's, which are not taken one after the other."""
    tokens, channels = 40_000, 16
    x, y = rand(2, 1, tokens, channels)
    check(sf.gated_adaln, [x, y, *rand(3, 1, 1, channels).unbind()], torch.float32, impl="cpp")
    rope_cases(1, 1, (1, tokens), 1, channels)[0].check(torch.float32)


@each_dtype
@pytest.mark.parametrize("channels", [1, 2, 3, 5, 7, 8])
def test_rows_shorter_than_a_vector(channels: int, dtype: torch.dtype) -> None:
    """To so many roundings: of so few numbers PyTorch may happen to be exact."""
    for case in norm_cases(2, 3, 33, channels) + rope_cases(2, 2, (1, 3), channels, 2):
        for t in case.tensors:
            t.clamp_(-2, 2)
        x = case.tensors[0]
        x += 8 * (-1) ** torch.arange(x.shape[2])  # no row is almost constant, y · gate added
        inputs = narrowed(case.tensors, dtype, case.wide)
        # Positive, so that no sum over rows is small beside what was added up.
        upstream = [torch.rand_like(u) for u in upstream_of(case, inputs)]
        got = results(by(case.op), inputs, upstream)
        exactly = [t.double() for t in inputs], [u.double() for u in upstream]
        want = results(by(case.op, "reference"), *exactly)
        for a, b in zip(got, want, strict=True):
            atol = 16 * torch.finfo(dtype).eps * (1 + float(b.abs().max()))
            torch.testing.assert_close(a.double(), b, rtol=0, atol=atol)


@pytest.mark.parametrize("sizes", [(0, 4), (2, 0)])
def test_nothing_comes_of_nothing(sizes: tuple[int, int]) -> None:
    """A batch or a chunk without tokens: empty results, and gradients of 0 for what is there."""
    batch, tokens = sizes
    cases = norm_cases(batch, 1, tokens, 24) + sampler_cases(batch, tokens, 3)
    for case in cases + (rope_cases(batch, 1, (1, tokens), 2, 4) if tokens else []):
        inputs = narrowed(case.tensors, torch.float32, case.wide)
        upstream = upstream_of(case, inputs)
        got, want = (results(by(case.op, impl), inputs, upstream) for impl in ("cpp", "reference"))
        for a, b in zip(got, want, strict=True):
            assert torch.equal(a, b)


@each_dtype
def test_what_is_not_finite_passes_through(dtype: torch.dtype) -> None:
    """To where the reference lets it: NaN to the whole row, an infinity as far as the norm goes."""
    for channels in (7, 102):
        for case in norm_cases(1, 2, 6, channels):
            x = case.tensors[0]
            x[0, 1, 5] = torch.nan
            x[0, 4, 0] = torch.inf
            x[0, 9, -1] = -torch.inf
            for got, want in zip(
                outputs(case, dtype), outputs(case, dtype, "reference"), strict=True
            ):
                assert got.isnan().any()
                torch.testing.assert_close(got, want, equal_nan=True)


@pytest.mark.parametrize("channels", [17, 200, 1536])
@pytest.mark.parametrize("outlier", [True, False])
def test_layer_norm_of_a_large_mean(outlier: bool, channels: int) -> None:
    """Or of one large channel: squares are not to be summed as they are."""
    x, weight, bias = rand(2, 40, channels), rand(channels), rand(channels)
    if outlier:
        x[..., 0] = 1e4
    else:
        x = 1e4 + x / 10
    check(sf.layer_norm, [x, weight, bias], torch.float32, gradients=False, impl="cpp")


def test_results_are_the_same_without_gradients() -> None:
    for case in every_case():
        inputs = narrowed(case.tensors, torch.float32, case.wide)
        with torch.no_grad():
            plain = outputs(case, torch.float32)
        with torch.inference_mode():
            inferred = outputs(case, torch.float32)
        recorded = results(by(case.op), inputs, upstream_of(case, inputs))
        for a, b, c in zip(plain, inferred, recorded[: len(plain)], strict=True):
            assert torch.equal(a, b) and torch.equal(a, c)


QKV, W = torch.ones(1, 6, 3 * 8), torch.ones(8)
TABLE = torch.ones(6, 2, 2)


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
@pytest.mark.parametrize("wrong", [-1, 3, 2**31 - 1])
def test_a_slot_that_is_not_there(wrong: int, dtype: torch.dtype) -> None:
    """Nothing is written, to the slots that are there neither."""
    rings = torch.zeros(2, 1, 9, 2, 4)
    slots = torch.tensor([0, wrong], dtype=dtype)
    with pytest.raises(ValueError, match=f"slot_F has {wrong}: the ring's slots are 0 to 2"):
        qk_norm_rope_append(QKV, W, W, TABLE, *rings, slots, impl="cpp")
    assert not rings.any()


@torch.no_grad()
def test_an_append_counts_as_a_change() -> None:
    """Autograd refuses to go back through what has been overwritten."""
    rings = torch.zeros(2, 1, 6, 2, 4).unbind()
    before = [ring._version for ring in rings]
    slots = torch.zeros(1, dtype=torch.int32)
    qk_norm_rope_append(QKV, W, W, TABLE, *rings, slots, impl="cpp")
    assert all(ring._version > count for ring, count in zip(rings, before, strict=True))


X, V = torch.zeros(2, 6, 8), torch.zeros(8)


def test_auto_takes_what_it_can() -> None:
    for dtype in CPP_DTYPES:
        assert choose("norm", "auto", CPU, x=X.to(dtype), weight=V) == "cpp"
        assert choose("sampler_step", "auto", CPU, x=X.to(dtype), flow=None) == "cpp"
    for op in ("rope_table", "qk_norm_rope"):
        assert choose(op, "auto", CPU) == "cpp"
    for x in (X.double(), X.mT):
        assert choose("norm", "auto", CPU, x=x, weight=V) == "reference"
    assert choose("cross_attention", "auto", CPU, q=X) == "reference"
    assert choose("norm", "auto", torch.device("meta"), x=X.to("meta")) == "reference"


def test_auto_does_without(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpp, "MISSING", "no compiler")
    assert choose("norm", "auto", CPU, x=X, weight=V) == "reference"
    sf.layer_norm(X, V, V)
    with pytest.raises(ValueError, match="impl='cpp' has no kernels here: no compiler"):
        sf.layer_norm(X, V, V, impl="cpp")


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (
            lambda: sf.layer_norm(X.double(), V, V, impl="cpp"),
            r"x is torch.float64: impl='cpp' takes float32, bfloat16, float16",
        ),
        (
            lambda: sf.layer_norm(X.to("meta"), V.to("meta"), V.to("meta"), impl="cpp"),
            "impl='cpp' takes CPU tensors, not meta",
        ),
        (
            lambda: choose("sampler_step", "cpp", torch.device("cuda")),
            "takes CPU tensors, not cuda",
        ),
        (
            lambda: choose("ring_attention", "cpp", CPU, q=X),
            "impl='cpp': ring_attention has triton, .*reference",
        ),
    ],
)
def test_what_it_does_not_take(call: Callable[[], Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        call()
