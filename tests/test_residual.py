"""The gated residual on its own against the reference: frames, gradients, gates of all forms."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

import sfkernels as sf
from sfkernels import launch, residual
from sfkernels.launch import RowTile
from tests.oracle import DEVICE, check, each, each_size, rand

pytestmark = pytest.mark.usefixtures("fresh_seed")

X = torch.zeros(2, 6, 8, device=DEVICE)


# (rows of a program, samples and frames of the gate, tokens of a frame, channels)
SIZES = [(1, 2, 3, 7, 77), (4, 1, 3, 5, 16), (4, 2, 1, 41, 1), (2, 1, 1, 3, 130)]


@pytest.fixture
def size(request: pytest.FixtureRequest) -> Iterator[tuple[int, ...]]:
    """Samples, frames, tokens, channels, under a setting with so many rows a program."""
    rows, *sizes = request.param
    setting = RowTile(rows, 8, per_sm=2)
    with launch.using(adaln_fwd=setting, residual_norm_bwd=setting):
        yield tuple(sizes)


@each_size(SIZES, [(1, 1, 1, 3, 20_000)])
def test_against_the_reference(size: tuple, impl: str, dtype: torch.dtype) -> None:
    samples, frames, tokens, channels = size
    x, y = rand(2, 2, frames * tokens, channels)
    check(sf.gated_residual, [x, y, rand(samples, frames, channels)], dtype, wide=[2], impl=impl)


@each
def test_views_and_a_gate_with_a_dimension_for_tokens(impl: str) -> None:
    wide, gate = rand(2, 12, 40), rand(2, 3, 1, 24)

    def op(wide: torch.Tensor, gate: torch.Tensor, impl: str) -> torch.Tensor:
        x, y = wide[:, :6, 3:27], wide[:, 6:, 3:27]
        return sf.gated_residual(x, y, gate, impl=impl).transpose(1, 2).contiguous()

    check(op, [wide, gate], torch.float32, impl=impl)


@each
@pytest.mark.parametrize("grad", [False, True])
def test_opcheck(grad: bool, impl: str) -> None:
    x, y, gate = (torch.randn(2, n, 8, device=DEVICE, requires_grad=grad) for n in (6, 6, 3))
    torch.library.opcheck(residual._gated_residual.registered, (x, y, gate, impl))
    if not grad:
        torch.library.opcheck(residual._gated_residual_bwd.registered, (x, y, gate, impl))


def test_second_derivatives_are_the_references() -> None:
    x, y, gate = (torch.randn(1, n, 8, device=DEVICE, requires_grad=True) for n in (6, 6, 3))
    found = []
    for impl in ("triton", "reference"):
        out = sf.gated_residual(x, y, gate, impl=impl)
        (dy,) = torch.autograd.grad(out.square().sum(), y, create_graph=True)
        found.append(torch.autograd.grad(dy.square().sum(), gate)[0])
    torch.testing.assert_close(*found)


@pytest.mark.parametrize(
    ("args", "said"),
    [
        ((X, X[:, 1:], X[:, :1]), r"y has shape \[2, 5, 8\]: must be \[2, 6, 8\]"),
        ((X, X.half(), X[:, :1]), "y has dtype torch.float16"),
        ((X, X, X[:, :4]), "gate has shape"),
        ((X, X, None), "gate is None: must be a tensor"),
        ((X, (X,), X[:, :1]), "y is a tuple: must be a tensor"),
    ],
)
def test_bad_input_says_what_is_wrong(args: tuple, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        sf.gated_residual(*args)
