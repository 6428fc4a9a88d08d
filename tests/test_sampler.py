"""The sampler's kernels against the reference, and the noise they draw against its definition."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import triton
import triton.language as tl
from torch import Tensor

import sfkernels as sf
from sfkernels import launch, reference, sampler
from sfkernels.launch import Flat
from tests.oracle import CPP_DTYPES, DEVICE, check, each, each_and_reference, each_size, rand

pytestmark = pytest.mark.usefixtures("fresh_seed")

# (elements of a program, batch, frames, shape of a frame): frames that are no multiple of a program
# or of the four normals of one draw, and of a single element.
SIZES: list[tuple[int, int, int, tuple[int, ...]]] = [
    (64, 2, 3, (4, 5, 7)),
    (256, 1, 2, (3, 85)),
    (128, 61, 1, (1,)),
    (1024, 2, 2, (2, 8, 8)),
]
OF_CPP = [(1024, 1, 2, (7, 151))]  # of C++: blocks of a frame, the last of them cut
each_shape = pytest.mark.parametrize("shape", [*SIZES, *OF_CPP], ids=str, indirect=True)
each_shape_and_dtype = each_size(SIZES, OF_CPP, "shape")


@pytest.fixture
def shape(request: pytest.FixtureRequest) -> Iterator[tuple[int, ...]]:
    """[B, F, ...], under a setting with so many elements a program."""
    block, batch, frames, inner = request.param
    with launch.using(sampler=Flat(block, 1)):
        yield (batch, frames, *inner)


def noise_of(shape: tuple[int, ...], seed: int = 5, start: int = 0, draw: int = 0) -> sf.Noise:
    seed_B = torch.arange(seed, seed + shape[0], device=DEVICE)
    frame_F = torch.arange(start, start + shape[1], dtype=torch.int32, device=DEVICE)
    return sf.Noise(seed_B, frame_F, draw)


@each_shape_and_dtype
@pytest.mark.parametrize("dims", [0, 1, 2])
def test_steps_and_their_gradients(
    shape: tuple[int, ...], dims: int, impl: str, dtype: torch.dtype
) -> None:
    """For noise levels of shape [], [B] and [B, F], views of something larger."""
    sigma, following = torch.rand(*shape[:dims], 2, device=DEVICE).unbind(-1)
    noise = rand(*shape).to(dtype)

    def guided(x: Tensor, flow: Tensor, uncond: Tensor, **more: Any) -> Any:
        options = dict(uncond_flow=uncond, guidance=3.5, **more)
        return (
            *sf.sampler_step(x, flow, sigma, following, noise, **options),
            sf.euler_step(x, flow, sigma, following, **options),
        )

    def plain(x: Tensor, flow: Tensor, **more: Any) -> Any:
        return (
            *sf.sampler_step(x, flow, sigma, following, noise, **more),
            sf.sampler_step(x, flow, sigma, **more)[0],
            sf.euler_step(x, flow, sigma, following, **more),
        )

    check(guided, [*rand(3, *shape)], dtype, impl=impl)
    check(plain, [*rand(2, *shape)], dtype, wide=[0], impl=impl)


@each
@each_shape
def test_a_step_draws_what_it_would_be_given(shape: tuple[int, ...], impl: str) -> None:
    """Bit for bit, gradients included."""
    x, flow = rand(2, *shape, dtype=torch.float32).requires_grad_()
    sigma, following = torch.rand(2, *shape[:2], device=DEVICE)
    noise = noise_of(shape, draw=3)
    results = []
    for given in (noise, sf.normal(noise, shape, impl=impl)):
        out = sf.sampler_step(x, flow, sigma, following, given, impl=impl)
        results.append((*out, *torch.autograd.grad(out[0].sum() + out[1].sum(), (x, flow))))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@each_and_reference
def test_the_last_step_returns_x0_twice(impl: str) -> None:
    x, flow = rand(2, 1, 2, 5, dtype=torch.float32)
    x0, same = sf.sampler_step(x, flow, torch.tensor(0.5, device=DEVICE), impl=impl)
    assert torch.equal(x0, same)


@each
@pytest.mark.parametrize(
    "of",
    [
        lambda t: t[1:, 1:3],
        lambda t: t.transpose(0, 1),
        lambda t: t[:, :, 1:].expand(3, -1, -1, -1, -1),
        lambda t: t.transpose(2, 3),  # not dense within a frame: a copy
        lambda t: t[..., :1],
    ],
)
def test_inputs_may_be_views(of: Callable[[Tensor], Tensor], impl: str) -> None:
    sizes = (1, 4, 3, 2, 8) if of(torch.empty(1, 4, 3, 2, 8)).shape[0] == 3 else (3, 4, 3, 2, 8)

    def of_views(x: Tensor, flow: Tensor, noise: Tensor, **more: Any) -> Any:
        sigma = torch.tensor([0.3, 0.7], device=DEVICE)
        views = of(x), of(flow), of(noise.detach())
        stepped = sf.sampler_step(*views[:2], sigma[1], sigma[0], views[2], **more)
        return (*stepped, noise.sum())

    check(of_views, [*rand(3, *sizes)], torch.float32, impl=impl)
    dmd = functools.partial(_dmd_of_views, of)
    check(dmd, [*rand(3, *sizes)], torch.float32, gradients=False, impl=impl)


def _dmd_of_views(of: Callable[[Tensor], Tensor], *tensors: Tensor, impl: str) -> Tensor:
    x, real, fake = map(of, tensors)
    return sf.dmd_gradient(x, real, fake, impl=impl)


@pytest.mark.parametrize("impl", ["reference", "triton"])
def test_philox_is_that_of_its_authors(impl: str) -> None:
    """The known answers that come with Random123, for philox4x32-10."""
    for counter, key, want in (
        (["00000000"] * 4, ["00000000"] * 2, "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
        (["ffffffff"] * 4, ["ffffffff"] * 2, "408f276d 41c83b0e a20bc7c6 6d5451fd"),
        (
            ["243f6a88", "85a308d3", "13198a2e", "03707344"],
            ["a4093822", "299f31d0"],
            "d16cfe09 94fdcceb 5001e420 24126ea1",
        ),
    ):
        words = torch.tensor([int(word, 16) for word in (*counter, *key)], device=DEVICE)
        if impl == "reference":
            pairs = words.view(3, 2, 1)  # counter words 0 1, 2 3 and the key
            even, odd = reference.philox(pairs[:2, 0], pairs[:2, 1], pairs[2])
            got = torch.stack((even, odd), 1).flatten()
        else:
            got = torch.empty(4, dtype=torch.int64, device=DEVICE)
            _philox_kernel[(1,)](words, got)
        assert [f"{int(word):08x}" for word in got] == want.split()


@triton.jit
def _philox_kernel(words_ptr, out_ptr):  # type: ignore[no-untyped-def]
    seed = tl.load(words_ptr + 4) | (tl.load(words_ptr + 5) << 32)
    c0, c1 = tl.load(words_ptr).to(tl.int32), tl.load(words_ptr + 1).to(tl.int32)
    c2, c3 = tl.load(words_ptr + 2).to(tl.int32), tl.load(words_ptr + 3).to(tl.int32)
    w0, w1, w2, w3 = tl.philox(seed, c0, c1, c2, c3)
    tl.store(out_ptr, w0.to(tl.int64))
    tl.store(out_ptr + 1, w1.to(tl.int64))
    tl.store(out_ptr + 2, w2.to(tl.int64))
    tl.store(out_ptr + 3, w3.to(tl.int64))


@each_and_reference
def test_normals_are_box_muller_of_philox(impl: str) -> None:
    """Element by element from the definition, in Python's own arithmetic."""
    seed, frame, draw = -(2**62) - 12345, 3_000_000_000, 2
    seed_B, frame_F = torch.tensor([[seed], [frame]], device=DEVICE)
    noise = sf.Noise(seed_B, frame_F, draw)
    got = sf.normal(noise, (1, 1, 3, 7), impl=impl)
    for element, value in enumerate(got.flatten().tolist()):
        key = [[seed & 0xFFFFFFFF], [seed >> 32 & 0xFFFFFFFF]]
        even, odd = reference.philox(
            *map(torch.tensor, ([[element // 4], [draw]], [[frame], [0]], key))
        )
        pair = element % 4 // 2
        u, turn = (((int(w[pair]) >> 9) + 0.5) / 2**23 for w in (even, odd))
        trigonometry = (math.cos, math.sin)[element % 2]
        want = math.sqrt(-2 * math.log(u)) * trigonometry(2 * math.pi * turn)
        assert value == pytest.approx(want, abs=2e-6)


@each
@each_shape
@pytest.mark.parametrize("draw", [0, 1, 16, 2**31 - 1])
def test_kernels_draw_what_the_reference_draws(
    shape: tuple[int, ...], draw: int, impl: str
) -> None:
    noise = noise_of(shape, seed=2**40 - 1, start=-1, draw=draw)
    want, got = (sf.normal(noise, shape, impl=name) for name in ("reference", impl))
    assert want.dtype == got.dtype == torch.float32 and want.shape == got.shape == shape
    torch.testing.assert_close(got, want, rtol=0, atol=1e-5)
    # At σ = 1 a step leaves nothing but the noise it draws.
    one, zeros = torch.ones((), device=DEVICE), torch.zeros(shape, device=DEVICE)
    stepped = sf.sampler_step(zeros, zeros, one, one, noise, impl=impl)[1]
    torch.testing.assert_close(stepped, want, rtol=0, atol=1e-5)


def test_noise_depends_on_neither_batch_nor_chunk() -> None:
    inner = (3, 5)
    whole = sf.normal(noise_of((3, 6)), (3, 6, *inner))
    for b, lo, hi in ((0, 0, 6), (1, 2, 5), (2, 5, 6)):
        part = sf.normal(noise_of((1, hi - lo), seed=5 + b, start=lo), (1, hi - lo, *inner))
        assert torch.equal(part, whole[b : b + 1, lo:hi])


def test_normals_are_normal_and_independent() -> None:
    """Fixed seeds: the bounds are four to five standard errors of 100,000 numbers."""
    n = 100_000
    draws = (
        torch.stack(
            [
                sf.normal(noise_of((1, 2), seed, start, draw), (1, 2, n // 2)).flatten()
                for seed, start, draw in ((0, 0, 0), (1, 0, 0), (0, 2, 0), (0, 0, 1), (2**32, 0, 0))
            ]
        )
        .double()
        .cpu()
    )
    close = functools.partial(torch.testing.assert_close, rtol=0)
    for order, want in enumerate((0, 1, 0, 3, 0, 15), 1):
        error = 4.5 * math.sqrt(math.prod(range(1, 2 * order, 2)) / n)
        close((draws**order).mean(1), torch.full((5,), float(want), dtype=draws.dtype), atol=error)
    close(draws.corrcoef(), torch.eye(5, dtype=draws.dtype), atol=4.5 / math.sqrt(n))
    for lag in (1, 2, 3, 4, n // 2):  # neighbours of a group, groups, frames
        assert abs(float((draws[:, lag:] * draws[:, :-lag]).mean())) < 4.5 / math.sqrt(n)
    ordered = draws[0].sort().values
    cdf = 0.5 * (1 + torch.erf(ordered / math.sqrt(2)))
    steps = torch.arange(n, dtype=draws.dtype) / n
    assert float((cdf - steps).abs().max()) < 1.63 / math.sqrt(n)  # Kolmogorov–Smirnov at 1%


@each_shape_and_dtype
def test_dmd_gradient(shape: tuple[int, ...], impl: str, dtype: torch.dtype) -> None:
    check(sf.dmd_gradient, [*rand(3, *shape)], dtype, gradients=False, impl=impl)


@each
def test_dmd_gradient_is_deterministic_and_has_no_graph(
    impl: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sfkernels.gpu.sampler._PARTS", 4)  # each of them of many blocks
    x, real, fake = rand(3, 2, 150, dtype=torch.float32)
    with launch.using(sampler=Flat(4, 1)):
        check(sf.dmd_gradient, [*rand(3, 2, 150)], torch.float32, gradients=False, impl=impl)
        first, again = (sf.dmd_gradient(x.requires_grad_(), real, fake, impl=impl)
                        for _ in range(2))  # fmt: skip
    assert torch.equal(first, again) and not first.requires_grad
    assert not sf.dmd_gradient(x, real, fake).requires_grad


@pytest.mark.parametrize("dtype", CPP_DTYPES)
@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # the interpreter's, of a division by 0
@each_and_reference
def test_dmd_gradient_without_a_difference(dtype: torch.dtype, impl: str) -> None:
    """Where x is what the teacher sees in it, the mean is 0: 0 / 0 and ±1 / 0."""
    x = rand(2, 3, dtype=dtype)
    fake = x.clone()
    fake[0] += torch.tensor([0, 1, -1], device=DEVICE)
    largest = torch.finfo(dtype).max
    want = torch.tensor([[0, largest, -largest], [0, 0, 0]], dtype=dtype, device=DEVICE)
    assert torch.equal(sf.dmd_gradient(x, x, fake, impl=impl), want)


@each
def test_ops_are_known_to_pytorch(impl: str) -> None:
    """Schemas, fake tensors, autograd and torch.compile's tracing."""
    shape = (2, 3, 5)
    x, flow, uncond, noise = (rand(*shape, dtype=torch.float32).requires_grad_() for _ in range(4))
    noise = noise.detach()
    sigma, following = torch.rand(2, 2, 3, device=DEVICE)
    drawn = noise_of(shape)
    for args in (
        (x, flow, uncond, sigma, following, noise, None, None, 0, 3.0),
        (x, flow, None, sigma, following, None, *drawn, 1.0),
        (x, flow, None, sigma[0, 0], None, None, None, None, 0, 1.0),
    ):
        torch.library.opcheck(sampler._sampler_step.registered, (*args, impl))
    euler = sampler._euler_step.registered
    torch.library.opcheck(euler, (x, flow, uncond, sigma, following, 3.0, impl))
    torch.library.opcheck(sampler._normal.registered, (*drawn, shape, impl))
    detached = (t.detach() for t in (x, flow, uncond))
    torch.library.opcheck(sampler._dmd_gradient.registered, (*detached, impl))


X = torch.zeros(2, 3, 8, device=DEVICE)
S = torch.zeros((), device=DEVICE)
NOISE = noise_of((2, 3))


@each_and_reference
@pytest.mark.parametrize(
    ("call", "said"),
    [
        (lambda impl: sf.sampler_step(X, X, S, S, impl=impl), "belong together"),
        (lambda impl: sf.sampler_step(X, X, S, None, NOISE, impl=impl), "belong together"),
        (lambda impl: sf.sampler_step(X, X, S, S, X[:1], impl=impl), "noise has shape"),
        (lambda impl: sf.sampler_step(X, X, S, S[None], X, impl=impl), r"next_sigma has shape \[1"),
        (lambda impl: sf.sampler_step(X, X, S.int(), impl=impl), "torch.int32: must be"),
        (lambda impl: sf.sampler_step(X, X, S.to("meta"), impl=impl), "sigma is on meta"),
        (lambda impl: sf.sampler_step(X[0, 0], X[0, 0], S, impl=impl), r"must be \[B, F, ...\]"),
        (lambda impl: sf.euler_step(X, X[:, :1], S, S, impl=impl), "flow has shape"),
        (lambda impl: sf.euler_step(X, X, S, S, uncond_flow=X[0], impl=impl), "uncond_flow has"),
        (
            lambda impl: sf.sampler_step(X, X, S, S, noise_of((1, 3)), impl=impl),
            r"seed_B is torch.int64 \[1\]: must be torch.int64 \[2\]",
        ),
        (
            lambda impl: sf.normal(NOISE._replace(seed_B=NOISE.seed_B.int()), X.shape, impl=impl),
            "seed_B is torch.int32",
        ),
        (lambda impl: sf.normal(NOISE, (2, 4, 8), impl=impl), r"frame_F is torch.int32 \[3\]"),
        (
            lambda impl: sf.normal(NOISE._replace(frame_F=X[0, :, 0]), X.shape, impl=impl),
            "frame_F is torch.float32",
        ),
        (
            lambda impl: sf.normal(NOISE._replace(frame_F=NOISE[1].to("meta")), X.shape, impl=impl),
            "frame_F is on meta",
        ),
        (lambda impl: sf.normal(NOISE._replace(draw=-1), X.shape, impl=impl), "draw=-1"),
        (lambda impl: sf.normal(NOISE, (2,), impl=impl), r"shape is \(2,\)"),
        (lambda impl: sf.dmd_gradient(X, X[:1], X, impl=impl), "real_x0 has shape"),
        (lambda impl: sf.dmd_gradient(X[0, 0], X[0, 0], X[0, 0], impl=impl), r"must be \[B, ...\]"),
    ],
)
def test_bad_input_says_what_is_wrong(call: Callable[[str], Any], said: str, impl: str) -> None:
    with pytest.raises(ValueError, match=said):
        call(impl)


@each
def test_kernels_take_no_float64(impl: str) -> None:
    with pytest.raises(ValueError, match=f"x is torch.float64: impl={impl!r}"):
        sf.sampler_step(X.double(), X.double(), S, impl=impl)
