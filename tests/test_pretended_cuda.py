"""The pretended CUDA device: what it shows and refuses, and what that makes of the rest."""

from __future__ import annotations

import contextlib
import gc
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import sfkernels as sf
from bench import timing
from bench.timing import Implementation
from sfkernels.gpu import norm_fwd
from sfkernels.gpu.tiles import tile_table
from sfmodel import graphs
from sfmodel.cli import main
from tests import pretended_cuda

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        not issubclass(torch.cuda.Stream, pretended_cuda.Stream),
        reason="python -m tests.pretended_cuda",
    ),
]
GPU = torch.device("cuda", 0)


@pytest.fixture
def x() -> Tensor:
    return torch.arange(6.0, device=GPU)


@contextlib.contextmanager
def captured(graph: torch.cuda.CUDAGraph) -> Iterator[None]:
    """A capture that fails leaves no trace in other tests."""
    with graphs.capture(graph):
        yield


def test_tensors_are_on_the_device(x: Tensor) -> None:
    assert x.device == GPU and x.is_cuda and type(x) is Tensor
    assert (x.view(2, 3) @ x.view(3, 2)).cpu().tolist() == [[10, 13], [28, 40]]
    x.view(2, 3)[1].mul_(2)
    assert x.tolist() == [0, 1, 2, 6, 8, 10]
    leaf = x.clone().requires_grad_()
    leaf.square().sum().backward()
    assert leaf.grad is not None and leaf.grad.device == GPU
    with pytest.raises(TypeError, match="convert cuda:0 device type tensor to numpy"):
        x.numpy()


@pytest.mark.parametrize(
    "op",
    [
        lambda x: x + torch.ones(6),
        lambda x: torch.cat([x, torch.ones(6)]),
        lambda x: torch.nn.functional.linear(x, torch.ones(2, 6)),
        lambda x: torch.mm(torch.ones(1, 6), x[:, None]),
        lambda x: x.normal_(generator=torch.Generator()),
    ],
)
def test_devices_do_not_mix(x: Tensor, op: Callable[[Tensor], Any]) -> None:
    with pytest.raises(RuntimeError, match=r"same device|generator"):
        op(x)


def test_triton_takes_no_cpu_tensor(x: Tensor) -> None:
    weight = torch.ones(1, 1, 3)
    with pytest.raises(ValueError, match="cannot be accessed from Triton"):
        norm_fwd(x.view(1, 2, 3), None, None, weight, None, 1e-6, False, False)


WAITS: dict[str, Callable[[Tensor], Any]] = {
    "item": lambda x: x.sum().item(),
    "branch": lambda x: bool(x[0] > 0),
    "mask": lambda x: x[x > 2],
    "nonzero": lambda x: x.nonzero(),
    "to the host": lambda x: x.cpu(),
    "from the host": lambda x: torch.tensor([1.0, 2.0], device=GPU),
    "not pinned": lambda x: x.copy_(torch.ones(6), non_blocking=True),
    "pinned, waits": lambda x: x.copy_(torch.ones(6).pin_memory()),
    "synchronize": lambda x: torch.cuda.synchronize(),
}


@pytest.mark.parametrize("wait", [name for name in WAITS if name != "synchronize"])
def test_waits_are_errors_in_debug_mode(x: Tensor, wait: str) -> None:
    torch.cuda.set_sync_debug_mode("error")
    try:
        with pytest.raises(RuntimeError, match="called a synchronizing CUDA operation"):
            WAITS[wait](x)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    WAITS[wait](x)


@pytest.mark.parametrize("wait", WAITS)
def test_a_capture_does_not_wait(x: Tensor, wait: str) -> None:
    """And after one that failed the next one succeeds, as memory can be given back."""
    stream = torch.cuda.current_stream()
    with (
        pytest.raises(RuntimeError, match="not permitted when stream is capturing"),
        captured(torch.cuda.CUDAGraph()),
    ):
        WAITS[wait](x)
    assert torch.cuda.current_stream() is stream
    torch.cuda.empty_cache()
    graph = torch.cuda.CUDAGraph()
    with captured(graph):
        y = x + 1
    graph.replay()
    assert y.tolist() == [1, 2, 3, 4, 5, 6]


def test_a_capture_runs_nothing_and_a_replay_all(x: Tensor) -> None:
    host, graph = torch.zeros(6, pin_memory=True), torch.cuda.CUDAGraph()
    with captured(graph):
        y = torch.cat([x[:3] * 2, x[3:]]).sort(descending=True).values
        x.add_(1)
        host.copy_(y, non_blocking=True)
    assert x.tolist() == [0, 1, 2, 3, 4, 5] and host.tolist() == [0] * 6
    graph.replay()
    graph.replay()
    assert x.tolist() == [2, 3, 4, 5, 6, 7] and host.tolist() == y.tolist() == [6, 6, 5, 4, 4, 2]


def test_a_replay_that_reads_freed_memory(x: Tensor) -> None:
    kept, graph = torch.ones(6, device=GPU), torch.cuda.CUDAGraph()
    with captured(graph):
        y = x + kept[::2].repeat(2)
    graph.replay()
    assert y.tolist() == [1, 2, 3, 4, 5, 6]
    del kept
    with pytest.raises(RuntimeError, match="memory that has been freed"):
        graph.replay()


def test_memory_is_counted() -> None:
    gc.collect()
    before = torch.cuda.memory_allocated()
    held = torch.empty(1000, device=GPU)
    assert torch.cuda.memory_allocated() - before == 4000
    with timing.peak_memory(GPU) as peak:
        del held
        void = torch.empty(3 * 2**18, device=GPU) + 1
    assert peak[0] == pytest.approx(6, abs=0.01) and void.is_cuda


def test_memory_in_cycles_is_given_back_before_a_peak_is_read() -> None:
    class Held:
        def __init__(self) -> None:
            self.me, self.memory = self, torch.empty(2**20, device=GPU)

    held = weakref.ref(Held())
    assert held() is not None
    with timing.peak_memory(GPU) as peak:
        assert held() is None
    assert peak[0] == 0


def attention(layout: sf.BlockLayout) -> Callable[[], Tensor]:
    q = torch.randn(1, layout.tokens, 1, 16, device=GPU, dtype=torch.float16)
    return lambda: sf.block_causal_attention(q, q, q, layout, impl="triton")


def test_tables_live_as_long_as_graphs() -> None:
    """However many other layouts come after; and each is there before a capture, or says so."""
    layout = sf.BlockLayout((1, 1), 3)
    run = attention(layout)
    first = pytest.raises(ValueError, match="make the same call once before the capture")
    with first, captured(torch.cuda.CUDAGraph()):
        run()
    with torch.inference_mode():
        want = run()
    assert not any(t.is_inference() for t in tile_table(layout.rows, (), 128, GPU))
    graph = torch.cuda.CUDAGraph()
    with captured(graph):
        got = run()
    for tokens in range(1, 100):
        tile_table((((0, tokens), ((0, tokens),)),), (), 128, GPU)
    gc.collect()
    graph.replay()
    torch.testing.assert_close(got, want)


def test_one_that_cannot_be_captured_leaves_the_others(x: Tensor) -> None:
    """It is launched instead and says why; one that fails altogether is named."""

    def waits(x: Tensor) -> Tensor:
        return x * x.sum().item()

    def fails(x: Tensor) -> Tensor:
        raise ValueError("")

    def backward(forward: Callable[[Tensor], Tensor]) -> Callable[[Tensor], tuple[Tensor]]:
        return lambda x: (forward(x),)

    for upstream in (None, [[x]] * 2):
        ops = {"waits": waits, "fails": fails, "runs": lambda x: x * 2}
        those = [
            Implementation(name, op if upstream is None else backward(op), upstream)
            for name, op in ops.items()
        ]
        timed = timing.measure(those, [[x]] * 2, rounds=2)
        assert timed["fails"] == "ValueError: "
        assert isinstance(timed["runs"], timing.Timing) and not timed["runs"].note
        assert isinstance(timed["waits"], timing.Timing)
        assert timed["waits"].note.startswith(
            "no CUDA graph, launches included: RuntimeError: CUDA"
        )


TOY = ["--preset", "toy"]


@pytest.fixture
def sfmodel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Runs a command in a folder of its own; commands share it within a test."""
    monkeypatch.chdir(tmp_path)

    def run(*arguments: str) -> None:
        monkeypatch.setattr("sys.argv", ["sfmodel", *arguments])
        with contextlib.suppress(SystemExit) as exit:
            main.main()
        assert exit is None

    return run
