"""The generation loop on a GPU: in graphs as without, in several streams of the device at once."""

from __future__ import annotations

import gc
import weakref
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import sfkernels
from sfkernels import launch
from sfmodel import frames
from sfmodel.batching import StreamBatch
from sfmodel.dit import DiT
from sfmodel.saved_stream import fork, load_stream, save_stream
from sfmodel.stream import Stream
from sfmodel.toy.vae import ToyVAE
from tests.test_stream import SMALL, TEXT
from tests.test_stream import model as model

pytestmark = pytest.mark.gpu
HOPPER = torch.cuda.is_available() and launch.is_hopper(torch.device("cuda"))


@pytest.mark.parametrize("sink", [0, 2])
@torch.no_grad()
def test_captured_and_eager_agree_bit_for_bit(model: DiT, sink: int) -> None:
    """A replayed chunk is the next one of the stream, past the wrap of the ring."""
    device = torch.device("cuda")
    on_gpu = DiT(SMALL.dit).to(device).eval()
    on_gpu.load_state_dict(model.state_dict())
    codec, text = ToyVAE().to(device), TEXT[:1].to(device)
    preset = replace(SMALL, sink=sink)
    mine = Stream(on_gpu, codec, text, preset, graph=True)
    eager = Stream(on_gpu, codec, text, preset)
    assert not mine.notes
    for _ in range(7):
        assert torch.equal(mine.denoise(), eager.denoise())
        torch.testing.assert_close(mine.decode(), eager.decode(), rtol=1e-3, atol=1e-3)


@pytest.mark.skipif(not HOPPER, reason="needs a Hopper GPU")
@torch.no_grad()
def test_a_stream_by_the_kernels_in_gluon() -> None:
    """A whole model, its window past the wrap, in graphs: as near to one by eager attention in the
    same dtype as that is to float32."""
    torch.manual_seed(0)
    preset = replace(SMALL, dit=replace(SMALL.dit, dim=128, heads=2, layers=2))
    weights = {
        name: weight + 0.1 * torch.randn_like(weight) / max(weight.shape[-1], 1) ** 0.5
        for name, weight in DiT(preset.dit).state_dict().items()
    }
    videos = {}
    for impl, dtype in (("gluon", torch.bfloat16), ("reference", torch.bfloat16),
                        ("reference", torch.float32)):  # fmt: skip
        model = DiT(preset.dit, attention_impl=impl).to("cuda", dtype).eval()
        model.load_state_dict(weights)
        text = TEXT[:1].to("cuda", dtype)
        stream = Stream(model, ToyVAE().to("cuda"), text, preset, graph=True)
        videos[impl, dtype] = torch.cat([stream.denoise().float().clone() for _ in range(6)], 1)
    mine, eager, exact = videos.values()
    assert (eager - exact).norm() > 0
    assert (mine - exact).norm() < 2 * (eager - exact).norm() + 1e-3 * exact.norm()


@pytest.mark.parametrize("graph", [False, True])
@torch.no_grad()
def test_frames_are_handed_out_when_they_are_there(
    model: DiT, graph: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Copies that arrive as late as they may: when the host has asked for their event."""
    device, late = torch.device("cuda"), []
    on_gpu, codec = DiT(SMALL.dit).to(device).eval(), ToyVAE().to(device)
    on_gpu.load_state_dict(model.state_dict())
    query = torch.cuda.Event.query

    def to_host(x: Tensor) -> Tensor:
        late.append((torch.zeros(x.shape, dtype=x.dtype, pin_memory=True), x.clone()))
        return late[-1][0]

    def asked(event: Any) -> bool:
        while late:
            to, x = late.pop()
            to.copy_(x)
        return bool(query(event))

    made = Stream(on_gpu, codec, TEXT[:1].to(device), SMALL, graph=graph)
    want = next(made.frames(9)).clone()
    made.restart()
    monkeypatch.setattr(frames, "_to_host", to_host)
    monkeypatch.setattr(torch.cuda.Event, "query", asked)
    assert torch.equal(next(made.frames(9)), want)


@torch.no_grad()
def test_a_stream_that_is_dropped_is_freed(model: DiT) -> None:
    """At once: a full GPU does not make Python collect garbage."""
    on_gpu, codec = DiT(SMALL.dit).to("cuda").eval(), ToyVAE().to("cuda")
    text = TEXT[:1].to("cuda")
    gc.collect()
    gc.disable()
    try:
        made = Stream(on_gpu, codec, text, SMALL, graph=True)
        next(made.frames(9))
        seen = weakref.ref(made)
        del made
        assert seen() is None
    finally:
        gc.enable()
    with pytest.raises(ValueError, match="CUDA graphs call no function again"):
        Stream(on_gpu, None, text, SMALL, graph=True, noise=lambda i: torch.zeros(1))


@torch.no_grad()
def test_cudnn_takes_the_full_ring(model: DiT, monkeypatch: pytest.MonkeyPatch) -> None:
    """In graphs of their own, from the chunk on that fills the ring."""
    device, seen = torch.device("cuda"), []
    ring_attention = sfkernels.ring_attention

    def noted(*args: Any, full: bool, impl: str, **more: Any) -> Tensor:
        seen.append((full, impl))
        return ring_attention(*args, full=full, impl=impl, **more)

    monkeypatch.setattr(sfkernels, "ring_attention", noted)
    streams, preset = [], replace(SMALL, first=1, chunk=2, window=5)
    for attention, graph in (("cudnn", True), ("cudnn", False), ("sdpa", False)):
        on_gpu = DiT(SMALL.dit, attention_impl=attention)
        on_gpu.load_state_dict(model.state_dict())
        half, text = on_gpu.to(device, torch.bfloat16).eval(), TEXT[:1].to(device)
        streams.append(Stream(half, None, text, preset, graph=graph))
    assert not streams[0].notes
    seen.clear()
    full, filling = (True, "cudnn"), (False, "auto")

    def chunk() -> set[Any]:
        """What the eager stream has taken."""
        seen.clear()
        graphed, eager, want = (each.denoise() for each in streams)
        assert torch.equal(graphed, eager)
        torch.testing.assert_close(eager, want, rtol=0.1, atol=0.1)
        return {each for each in seen if each[1] != "sdpa"}

    # 1, 3 and 5 frames fill it; the first pass of the chunk that does is still behind 3.
    assert [chunk() for _ in range(5)] == [{filling}] * 2 + [{filling, full}] + [{full}] * 2
    for each in streams:
        each.restart()
    assert [chunk() for _ in range(2)] == [{filling}] * 2
    for each in streams:
        each.update(each.latents_BFCHW[2] + 1)
    assert chunk() == {full}  # of which no pass is merged


@pytest.mark.parametrize("low_latency", [False, True])
@torch.no_grad()
def test_a_hundred_chunks_without_a_wait(model: DiT, low_latency: bool) -> None:
    """The host waits for the frames that it hands out and for nothing else; memory stays; and what
    overlaps is what comes one after the other."""
    device = torch.device("cuda")
    on_gpu = DiT(SMALL.dit).to(device).eval()
    on_gpu.load_state_dict(model.state_dict())
    codec, text = ToyVAE().to(device), TEXT[:1].to(device)
    mine = Stream(on_gpu, codec, text, SMALL, graph=True, low_latency=low_latency)
    eager = Stream(on_gpu, codec, text, SMALL, low_latency=low_latency)
    assert not mine.notes
    pieces = mine.frames(1200)
    first = [next(pieces) for _ in range(12)]
    torch.cuda.set_sync_debug_mode("error")
    try:
        before = torch.cuda.memory_allocated()
        for _ in range(40):
            next(pieces)
        assert torch.cuda.memory_allocated() == before
        for _ in pieces:
            pass
    finally:
        torch.cuda.set_sync_debug_mode("default")
    for got, want in zip(first, eager.frames(), strict=False):
        assert (got.int() - want.int()).abs().max() <= 1


@pytest.mark.parametrize("sink", [0, 2])
@torch.no_grad()
def test_what_users_do_in_graphs(model: DiT, sink: int, tmp_path: Path) -> None:
    """Given latents, made anew or kept, prompts over time, a stream that is saved, loaded and
    forked: as without graphs."""
    device = torch.device("cuda")
    on_gpu = DiT(SMALL.dit).to(device).eval()
    on_gpu.load_state_dict(model.state_dict())
    codec, text, preset = ToyVAE().to(device), TEXT.to(device), replace(SMALL, sink=sink)
    mine, eager, other = (
        Stream(on_gpu, codec, text[:1], preset, seed=3, graph=graph)
        for graph in (True, False, True)
    )
    clip = torch.randn(1, 9, 4, 8, 8, device=device)
    for each in (mine, eager):
        each.give(clip[:, :6])
        each.give(clip[:, 6:], 0.5)
        each.set_prompt(text[1:], frame=15, over=2)

    def same(a: Stream, b: Stream, count: int) -> None:
        got, want = (torch.cat([*each.frames(count)], 1) for each in (a, b))
        assert (got.int() - want.int()).abs().max() <= 1

    same(mine, eager, 70)
    save_stream(mine, tmp_path / "mine")
    load_stream(other, tmp_path / "mine")
    same(other, eager, 30)
    fork(other, mine)
    forked = Stream(on_gpu, codec, text[:1], preset)
    fork(other, forked)
    same(mine, forked, 20)
    same(other, eager, 20)


@torch.no_grad()
def test_a_batch_of_streams_is_what_each_is_alone(model: DiT) -> None:
    """Bit for bit, one of them a chunk behind; one of them decodes at a time."""
    device = torch.device("cuda")
    on_gpu = DiT(SMALL.dit).to(device).eval()
    on_gpu.load_state_dict(model.state_dict())
    decoding, most = [0], [0]

    class Counted(ToyVAE):
        def decode_chunk(self, latents_BFCHW: Tensor, state: Any = None) -> tuple[Tensor, Any]:
            decoding[0] += 1
            most[0] = max(most[0], decoding[0])
            out = super().decode_chunk(latents_BFCHW, state)
            decoding[0] -= 1
            return out

    codec, text = Counted().to(device), TEXT[:1].to(device)
    alone = [Stream(on_gpu, codec, text, SMALL, seed=i) for i in range(3)]
    batch = StreamBatch(on_gpu)
    opened = [batch.open(codec, text, SMALL, seed=i) for i in range(3)]
    for i in range(6):
        running = opened[i == 0 :]
        found = batch.step(running)
        for stream, single in zip(opened, alone, strict=True):
            if stream in running:
                assert torch.equal(found[stream], next(single.frames()))
    assert most == [1]
