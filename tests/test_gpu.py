"""The stream on a GPU: the same video as on the CPU, and one CUDA graph that goes on rolling."""

from __future__ import annotations

import math

import pytest
import torch

from tests.test_dit import GRID, latents, make

pytestmark = pytest.mark.gpu


@torch.no_grad()
@pytest.mark.parametrize(("window", "sink"), [(4, 0), (7, 3)])
def test_cached_chunks_equal_those_of_the_cpu(window: int, sink: int) -> None:
    x, text = latents(2, 12), torch.randn(2, 5, 8)
    out = []
    for device in ("cpu", "cuda"):
        model = make().to(device)
        cache = model.new_cache(2, window, GRID, sink)
        model.set_text(cache, text.to(device))
        flows = []
        for chunk in x.to(device).split(3, 1):
            flows.append(model(chunk, torch.tensor(500.0, device=device), None, cache=cache).cpu())
            cache.commit(3)
        out.append(torch.cat(flows, 1))
    torch.testing.assert_close(out[0], out[1], rtol=1e-3, atol=1e-3 * float(out[0].std()))


@torch.no_grad()
def test_a_captured_graph_replays_past_the_wrap() -> None:
    """What moves from chunk to chunk lives in device tensors: no replay knows it is a replay."""
    model = make().cuda()
    text, x = torch.randn(1, 5, 8, device="cuda"), latents(1, 30).cuda()
    t = model.modulation(torch.tensor(500.0, device="cuda"))
    caches = [model.new_cache(1, 7, GRID, sink=1) for _ in range(2)]
    for cache in caches:
        model.set_text(cache, text)
    eager, graphed = caches
    static = x[:, :3].clone()

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):  # warm-up on a side stream, as capture asks for
        for _ in range(3):
            model(static, t, None, cache=graphed)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        flow = model(static, t, None, cache=graphed)
        graphed.commit(3)

    assert int(graphed.start) == 0  # capturing runs nothing
    for chunk in x.split(3, 1):
        want = model(chunk, t, None, cache=eager)
        eager.commit(3)
        static.copy_(chunk)
        graph.replay()
        torch.testing.assert_close(flow, want, rtol=1e-5, atol=1e-5)
    assert int(graphed.start) == 30
    assert graphed.k.shape[2] == 7 * math.prod(GRID)
