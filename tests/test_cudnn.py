"""cuDNN's attention, over a ring split by view, with its arithmetic emulated on a CPU; and what a
file of measured settings lets "auto" choose."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses import FakeTensorMode

import sfkernels as sf
from sfkernels import dispatch, launch
from sfkernels.dispatch import choose
from sfkernels.gpu.tiles import key_splits
from tests.oracle import DEVICE, check, rand
from tests.pretended_cuda import OPS, cudnn_attention

pytestmark = pytest.mark.skipif(
    DEVICE == "cuda", reason="emulates a GPU; test_gpu.py has a real one"
)

# Called with unpacked tensors, which mypy takes for arguments without end.
ring_attention: Any = functools.partial(sf.ring_attention, full=True)
block_causal_attention: Any = sf.block_causal_attention
Prefix: Any = sf.Prefix
CUDA = torch.device("cuda", 0)
HALF = torch.float16, torch.bfloat16
seen: list[Any] = []  # by cuDNN


def recorded(*args: Any, **options: Any) -> Any:
    seen.append(args)
    return cudnn_attention(*args, **options)


if DEVICE == "cpu":
    OPS.impl("_scaled_dot_product_cudnn_attention", recorded, "CPU")


@pytest.fixture
def card(fresh_seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Lets a CPU stand for the card. The op stays PyTorch's own, which checks its arguments."""
    one = dispatch.IMPLEMENTATIONS["cudnn"]._replace(refusal=lambda _: "")
    monkeypatch.setitem(dispatch.IMPLEMENTATIONS, "cudnn", one)
    seen.clear()


def split(monkeypatch: pytest.MonkeyPatch, parts: int) -> None:
    monkeypatch.setattr("sfkernels.gpu.cudnn.key_splits", lambda *_: parts)


@pytest.mark.usefixtures("card")
@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize(("batch", "parts"), [(1, 1), (1, 2), (1, 5), (2, 1), (2, 2), (3, 10)])
def test_parts_are_views_and_obey_the_rule(
    batch: int, parts: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A layer of a ring, keys of very unequal weight by part, and the partial results rounded to
    the dtype of the queries."""
    split(monkeypatch, parts)
    valid = torch.tensor(70, dtype=torch.int32)

    def op(q: Tensor, k: Tensor, v: Tensor, impl: str) -> Tensor:
        return ring_attention(q, k[1], v[1], valid, scale=0.6, impl=impl)

    rings = rand(2, 2, batch, 70, 3, 16)
    rings[0, :, :, :35] *= 2
    check(op, [rand(batch, 37, 3, 16), *rings], dtype, gradients=False, impl="cudnn")
    q, k, v, _, sums = seen[-1]
    assert q.shape == (batch * parts, 3, 37, 16) and sums == (parts > 1)
    assert k.shape == v.shape == (batch * parts, 3, 70 // parts, 16)
    assert k.stride() == (70 // parts * 48, 16, 48, 1)  # not copied
    assert batch > 1 or parts == 1 or q.stride(0) == 0


@pytest.mark.usefixtures("card")
def test_a_window_that_moved_and_keys_rotated_when_read(monkeypatch: pytest.MonkeyPatch) -> None:
    """Behind the wrap, where slots are in no order, with a sink: as the reference reads it."""
    split(monkeypatch, 5)
    tokens, window, chunk = 6, 5, 2
    cache = sf.RingKVCache(
        layers=1, batch=1, window=window, sink=1, frame_tokens=tokens, heads=2, head_dim=16,
        dtype=torch.float16,
    )  # fmt: skip
    for _ in range(4):
        at = cache.chunk(chunk)
        for ring in (cache.k[0], cache.v[0]):
            by_frame = ring.unflatten(1, (window, tokens))
            by_frame[:, at.slot_F.long()] = rand(1, chunk, tokens, 2, 16, dtype=torch.float16)
        cache.commit(chunk)
    q, rings = rand(1, 12, 2, 16, dtype=torch.float16), (cache.k[0], cache.v[0])
    table = sf.rope_table(torch.arange(window), (2, 3), 16, impl="reference")
    for k_table in (None, table):
        options: Any = dict(k_table_SP2=k_table)
        got, want = (
            ring_attention(q, *rings, at.valid, impl=impl, **options)
            for impl in ("cudnn", "reference")
        )
        torch.testing.assert_close(got, want, rtol=2e-3, atol=2e-3)


def test_parts_divide_the_ring_and_fill_the_card() -> None:
    """On 132 multiprocessors: a chunk of Wan2.1-1.3B in two parts, a frame in five; where these
    leave a rest, the next best that do not."""
    keys = 32_760
    assert key_splits(37 * 12, 132, 256, keys) == 2
    assert key_splits(13 * 12, 132, 256, keys) == 5
    assert key_splits(13 * 12, 132, 256, 32_758) == 11  # 2 · 11 · 1489
    assert key_splits(13 * 12, 132, 256, 32_749) == 1  # a prime


@pytest.mark.usefixtures("card")
def test_text_and_patterns() -> None:
    """Text that a batch shares, a stride of zero; a pattern by its rows, behind a prefix. Sums are
    asked for where a gradient is wanted, and only there."""

    def text(q: Tensor, k: Tensor, v: Tensor, impl: str) -> Tensor:
        return sf.cross_attention(q, k.expand(2, -1, -1, -1), v.expand(2, -1, -1, -1), impl=impl)

    layout = sf.BlockLayout.causal(4, 2, 5)

    def pattern(q: Tensor, k: Tensor, v: Tensor, *past: Tensor, impl: str) -> Tensor:
        prefix = Prefix(*past, ((1, 4), (6, 9)))
        return block_causal_attention(q, k, v, layout, prefix=prefix, impl=impl)

    for dtype in HALF:
        tensors = rand(2, 37, 2, 16), *rand(2, 1, 21, 2, 16)
        check(text, tensors, dtype, gradients=False, impl="cudnn")
        tensors = *rand(3, 1, 20, 2, 16), *rand(2, 1, 9, 2, 16)
        check(pattern, tensors, dtype, gradients=False, impl="cudnn")
    assert not any(call[4] for call in seen)
    q, k, v = rand(3, 1, 8, 1, 16, dtype=torch.float16)
    sf.cross_attention(q.requires_grad_(), k, v, impl="cudnn")
    assert seen[-1][4]
    with torch.no_grad():
        sf.cross_attention(q, k, v, impl="cudnn")
    assert not seen[-1][4]


X = torch.zeros(1, 12, 2, 16, dtype=torch.float16)
ALL, SOME = torch.tensor(12), torch.tensor(5)


@pytest.mark.usefixtures("card")
@pytest.mark.parametrize(
    ("call", "said"),
    [
        (lambda: sf.ring_attention(X, X, X, ALL, impl="cudnn"), "pass full=True once all are val"),
        (lambda: ring_attention(X, X, X, SOME), "full=True: valid is 5, must be 12"),
        (lambda: ring_attention(*[X.float()] * 3, ALL, impl="cudnn"), "takes bfloat16, float16"),
        (
            lambda: ring_attention(*[X[..., :12]] * 3, ALL, impl="cudnn"),
            "heads of 12: .* steps of 8",
        ),
        (lambda: sf.cross_attention(X, X, X, impl="sdpa_flash"), "'sdpa_flash' takes CUDA tensors"),
        (lambda: sf.ring_attention(X, X, X, ALL, impl="sdpa_flash"), "ring_attention has triton"),
    ],
)
def test_bad_input_says_what_is_wrong(call: Callable[[], Tensor], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        call()


@pytest.mark.usefixtures("card")
@pytest.mark.parametrize("parts", [1, 2])
def test_a_ring_says_how_to_train(parts: int, monkeypatch: pytest.MonkeyPatch) -> None:
    split(monkeypatch, parts)
    out = ring_attention(X.clone().requires_grad_(), X, X, ALL, impl="cudnn")
    with pytest.raises(RuntimeError, match="to train, pass the past as block_causal_attention"):
        out.sum().backward()


def test_cards_that_are_too_old_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (7, 5))
    with pytest.raises(ValueError, match=r"impl='cudnn' runs on .* 8.0 and later; cuda:0 has 7.5"):
        choose("cross_attention", "cudnn", CUDA)


@pytest.fixture
def file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """That of measured settings, for a pretended H200."""
    caches = dispatch._rankings, launch.ranking, launch._capability
    monkeypatch.setattr(launch, "TUNED", tmp_path)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (9, 0))
    for cached in caches:
        cached.cache_clear()
    yield tmp_path / "sm_90.json"
    for cached in caches:
        cached.cache_clear()


def test_auto_takes_the_fastest_that_takes_the_tensors(file: Path) -> None:
    ranked = {"ring_attention": ["cudnn", "gluon", "triton"], "cross_attention": ["sdpa_flash"]}
    file.write_text(json.dumps({"machine": {}, "kernels": {}, "impl": ranked}))

    def auto(op: str, heads: int = 128, without: str = "") -> str:
        with FakeTensorMode():
            q = torch.empty(1, 1, 1, heads, dtype=torch.bfloat16, device=CUDA)
            return choose(op, "auto", CUDA, "", without, q=q)

    assert auto("ring_attention") == "cudnn" and auto("cross_attention") == "sdpa_flash"
    assert auto("ring_attention", without="cudnn") == "gluon"  # not known to be full
    assert auto("ring_attention", 96, "cudnn") == auto("ring_attention", 12) == "triton"
    assert auto("cross_attention", 12) == "sdpa"
    assert auto("attention") == auto("norm") == "triton"  # was not timed
    assert choose("ring_attention", "auto", torch.device("cpu")) == "reference"


@pytest.mark.parametrize(
    ("ranked", "said"),
    [
        ({"cross_attention": "cudnn"}, "cross_attention is 'cudnn': must be a list of triton, glu"),
        ({"ring_attention": ["cudnn", "flash"]}, r"\['cudnn', 'flash'\]: must be a list of triton"),
        ({"ring_attention": ["sdpa_flash"]}, "must be a list of triton, gluon, cudnn, sdpa$"),
        (
            {"norm": ["triton"]},
            "impl of norm .* must be by op, of attention, ring_attention, cross",
        ),
    ],
)
def test_a_file_that_ranks_nonsense_says_so(file: Path, ranked: Any, said: str) -> None:
    file.write_text(json.dumps({"machine": {}, "kernels": {}, "impl": ranked}))
    with pytest.raises(ValueError, match=r"sm_90\.json: impl of") as raised:
        choose("cross_attention", "auto", CUDA)
    assert raised.match(said)


def test_what_is_ranked_is_a_constant_to_the_compiler(
    file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file.write_text(json.dumps({"machine": {}, "kernels": {}, "impl": {"attention": ["cudnn"]}}))
    choose("attention", "auto", CUDA)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)  # the compiler's own question

    @torch.compile(backend="eager", fullgraph=True)
    def chosen(x: Tensor) -> Tensor:
        return x + (choose("attention", "auto", CUDA) == "cudnn")

    assert chosen(torch.zeros(())) == 1


def test_shipped_files_rank_what_there_is() -> None:
    for arch in launch.ARCHITECTURES:
        for op, names in launch.ranking(arch).items():
            assert {*names} <= {*dispatch.RANKED} & {*dispatch.implementations(op)}
