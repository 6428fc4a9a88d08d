"""On a GPU: kernels at real shapes, the same video as on the CPU, and CUDA graphs."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from torch import Tensor

import sfkernels as sf
from sfkernels import reference
from sfkernels.kv_cache import semaphores_needed
from sfkernels.testing import close_as_eager, interpreted
from sfmodel.config import VAEConfig
from sfmodel.vae.wan import WanVAE
from tests.oracle import DTYPES, check, rand
from tests.test_dit import GRID, latents, make

pytestmark = pytest.mark.gpu

# Called with unpacked tensors, which mypy takes for arguments without end.
Prefix: Any = sf.Prefix
ring_attention: Any = sf.ring_attention
block_causal_attention: Any = sf.block_causal_attention

# Wan2.1-1.3B at 480×832: 12 heads of 128, 30×52 tokens a latent frame, clips of 21; 14B: 40 heads.
WAN_HEADS, WAN_DIM, WAN_GRID, CLIP, WIDE = 12, 128, (30, 52), 21, 40
CALLS = 50
if interpreted():  # not the real shapes, which take hours there
    WAN_HEADS, WAN_DIM, WAN_GRID, CLIP, WIDE = 2, 64, (1, 2), 4, 3
    CALLS = 2
WAN_TOKENS = math.prod(WAN_GRID)
# (latent frames, heads)
SIZES = [
    *((frames, WAN_HEADS, dtype) for frames in (1, 3) for dtype in DTYPES),
    *((frames, heads, DTYPES[-1]) for frames, heads in ((CLIP, WAN_HEADS), (3, WIDE))),
]


@pytest.mark.usefixtures("fresh_seed")
@pytest.mark.parametrize(("frames", "heads", "dtype"), SIZES)
def test_norms_at_real_shapes(frames: int, heads: int, dtype: torch.dtype) -> None:
    channels = heads * WAN_DIM
    x, y = rand(2, 1, frames * WAN_TOKENS, channels)
    shift, scale, gate = rand(1, frames, 6, channels).unbind(2)[:3]
    weight, bias = rand(2, channels)
    check(sf.adaln, (x, shift, scale), dtype, wide=[1, 2])
    check(sf.gated_adaln, (x, y, gate, shift, scale), dtype, wide=[2, 3, 4])
    check(sf.gated_layer_norm, (x, y, gate, weight, bias), dtype, wide=[2])
    check(sf.rms_norm, (x, weight), dtype)


@pytest.mark.usefixtures("fresh_seed")
@pytest.mark.parametrize(("frames", "heads", "dtype"), SIZES)
def test_qk_norm_rope_at_real_shapes(frames: int, heads: int, dtype: torch.dtype) -> None:
    frame_F = torch.arange(frames, device="cuda") + 100_000
    table = sf.rope_table(frame_F, WAN_GRID, WAN_DIM, impl="reference")
    torch.testing.assert_close(
        sf.rope_table(frame_F, WAN_GRID, WAN_DIM, impl="triton"), table, rtol=0, atol=2.5e-7
    )
    tokens, channels = frames * WAN_TOKENS, heads * WAN_DIM
    qkv, weights = rand(1, tokens, 3 * channels), rand(2, channels)

    def op(qkv: Tensor, q_weight: Tensor, k_weight: Tensor, *, impl: str) -> tuple[Tensor, ...]:
        return sf.qk_norm_rope(qkv, q_weight, k_weight, table, impl=impl)

    check(op, (qkv, *weights), dtype)
    slots = torch.randperm(frames + 2, device="cuda")[:frames].int()
    results = []
    for impl, kind in (("triton", dtype), ("reference", dtype), ("reference", torch.float64)):
        rings = rand(2, 1, (frames + 2) * WAN_TOKENS, heads, WAN_DIM).fill_(0).to(kind)
        args = qkv.to(dtype).to(kind), *weights.to(dtype).to(kind), table, *rings, slots
        results.append((sf.qk_norm_rope_append(*args, impl=impl), *rings))
    for name, got, eager, exact in zip("qkv", *results, strict=True):
        close_as_eager(name, got, eager, exact)


# Frames, height and width, channels of each level of the decoder of Wan2.1's VAE at 480×832.
@pytest.mark.usefixtures("fresh_seed")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("level", [(3, 60 * 104, 384), (6, 120 * 208, 192), (4, 480 * 832, 96)])
def test_rms_norm_silu_at_real_shapes(level: tuple[int, int, int], dtype: torch.dtype) -> None:
    frames, size, channels = level
    size = 7 if interpreted() else size
    x, y = rand(2, 1, frames * size, channels)
    weight, bias, before = rand(channels), rand(channels), rand(1, 2 * size, channels)

    def op(x: Tensor, weight: Tensor, y: Tensor, b: Tensor, before: Tensor, *, impl: str) -> Any:
        return sf.rms_norm_silu(x, weight, y, bias_C=b, before_BPC=before, impl=impl)

    check(op, (x, weight, y, bias, before), dtype, gradients=channels == 384)


def test_the_vae_decodes_in_a_cuda_graph() -> None:
    """Chunk after chunk by replays of one graph, which hands its state on to itself."""
    torch.manual_seed(0)
    dim, height, width = (8, 1, 1) if interpreted() else (32, 8, 12)
    vae = WanVAE(VAEConfig(dim=dim)).requires_grad_(False)
    latents = torch.randn(1, 9, 16, height, width)
    want, _ = vae.decode_chunk(latents)
    on_gpu = copy.deepcopy(vae).cuda()
    first, *others = latents.cuda().split(3, 1)
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
        pixels, state = on_gpu.decode_chunk(first)
        static = torch.zeros_like(first)
        side = torch.cuda.Stream()
        with torch.cuda.stream(side):  # warms up what cuDNN chooses and what is compiled
            on_gpu.decode_chunk(static, state)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=side):
            out, after = on_gpu.decode_chunk(static, state)
            for kept, new in zip(state.before, after.before, strict=True):
                kept.copy_(new)
        video = [pixels]
        for chunk in others:
            static.copy_(chunk)
            graph.replay()
            video.append(out.clone())
    torch.testing.assert_close(torch.cat(video, 1).cpu(), want, rtol=1e-3, atol=1e-3)


HOPPER = torch.cuda.is_available() and torch.cuda.get_device_capability()[0] == 9
IMPLS = [
    "triton",
    pytest.param("gluon", marks=pytest.mark.skipif(not HOPPER, reason="needs a Hopper GPU")),
    "sdpa",
]
# (heads, head dim, dtype)
HEADS = [
    *((WAN_HEADS, WAN_DIM, dtype) for dtype in DTYPES[1:]),
    (WAN_HEADS // 2, 64, DTYPES[-1]),
]


@pytest.mark.usefixtures("fresh_seed")
@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize(("heads", "head_dim", "dtype"), HEADS)
@pytest.mark.parametrize("teacher_forcing", [False, True])
def test_block_causal_attention_at_real_shapes(
    teacher_forcing: bool, heads: int, head_dim: int, dtype: torch.dtype, impl: str
) -> None:
    layout = sf.BlockLayout.causal(
        4, 2, WAN_TOKENS, window=3, sink=1, teacher_forcing=teacher_forcing
    )

    def op(*tensors: Tensor, impl: str) -> Tensor:
        prefix = Prefix(*(t.detach() for t in tensors[3:]), ((0, 100), (777, 2000)))
        out = block_causal_attention(*tensors[:3], layout, prefix=prefix, impl=impl)
        return out + 0 * sum(t.sum() for t in tensors[3:])

    own, past = rand(3, 1, layout.tokens, heads, head_dim), rand(2, 1, 2100, heads, head_dim)
    check(op, [*own, *past], dtype, impl=impl)


@pytest.mark.usefixtures("fresh_seed")
@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("dtype", DTYPES[1:])
@pytest.mark.parametrize("deterministic", [False, True])
def test_gradients_in_one_kernel_or_two(deterministic: bool, dtype: torch.dtype, impl: str) -> None:
    """Without a prefix, where "gluon" has two ways; of the one gradients are the same bits."""
    layout = sf.BlockLayout.causal(3, 1, WAN_TOKENS, teacher_forcing=True)

    def op(*tensors: Tensor, impl: str) -> Tensor:
        return block_causal_attention(*tensors, layout, deterministic=deterministic, impl=impl)

    tensors = rand(3, 2, layout.tokens, 2, 128)
    check(op, [*tensors], dtype, impl=impl)
    if deterministic and impl != "sdpa":
        leaves = [t.to(dtype).requires_grad_() for t in tensors]
        do = torch.randn_like(leaves[0])
        first, second = (torch.autograd.grad(op(*leaves, impl=impl), leaves, do) for _ in range(2))
        assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.usefixtures("fresh_seed")
@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize(("heads", "head_dim", "dtype"), HEADS)
@pytest.mark.parametrize("frames", [1, 3])
def test_ring_attention_at_real_shapes(
    frames: int, heads: int, head_dim: int, dtype: torch.dtype, impl: str
) -> None:
    """A layer's part of a cache of 9 frames: full, one frame only, and odd lengths."""
    queries = rand(1, frames * WAN_TOKENS, heads, head_dim)
    rings = rand(2, 1, 2, 9 * WAN_TOKENS, heads, head_dim)
    slots = 9 * WAN_TOKENS
    for tokens in (slots, frames * WAN_TOKENS, min(4 * WAN_TOKENS + 77, slots - 1), 1):
        valid = torch.tensor(tokens, dtype=torch.int32, device="cuda")

        def op(q: Tensor, *rings: Tensor, impl: str, valid: Tensor = valid) -> Tensor:
            return ring_attention(q, rings[0][:, 1], rings[1][:, 1], valid, impl=impl)

        check(op, [queries, *rings], dtype, impl=impl, gradients=False)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("frames", [1, 3])
def test_whoever_joins_the_parts(frames: int, impl: str) -> None:
    """The same numbers, call after call, which the order in which programs end does not change; and
    the semaphores as they were."""
    q = rand(1, frames * WAN_TOKENS, WAN_HEADS, WAN_DIM).bfloat16()
    k, v = rand(2, 1, 9 * WAN_TOKENS, WAN_HEADS, WAN_DIM).bfloat16().unbind()
    needed = semaphores_needed(1, q.shape[1], WAN_HEADS)
    semaphores = torch.zeros(needed, dtype=torch.int32, device="cuda")
    valid = torch.tensor(9 * WAN_TOKENS - 5, dtype=torch.int32, device="cuda")
    outs = [ring_attention(q, k, v, valid, semaphores=semaphores, impl=impl) for _ in range(CALLS)]
    assert not semaphores.any() and all(torch.equal(out, outs[0]) for out in outs)


@pytest.mark.usefixtures("fresh_seed")
@pytest.mark.parametrize(("frames", "batch"), [(1, 1), (3, 1), (3, 2)])
@pytest.mark.parametrize("dtype", DTYPES[1:])
def test_cudnn_over_a_full_ring(dtype: torch.dtype, frames: int, batch: int) -> None:
    """Split by view, in a graph too."""
    slots = 9 * WAN_TOKENS
    valid = torch.tensor(slots, dtype=torch.int32, device="cuda")

    def op(q: Tensor, k: Tensor, v: Tensor, impl: str) -> Tensor:
        return ring_attention(q, k[1], v[1], valid, full=True, impl=impl)

    queries = rand(batch, frames * WAN_TOKENS, WAN_HEADS, WAN_DIM)
    rings = rand(2, 2, batch, slots, WAN_HEADS, WAN_DIM)
    check(op, [queries, *rings], dtype, impl="cudnn", gradients=False)
    q, k, v = queries.to(dtype), *rings.to(dtype)
    want = op(q, k, v, "cudnn")
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = op(q, k, v, "cudnn")
    graph.replay()
    torch.testing.assert_close(got, want, rtol=0, atol=0)


@pytest.mark.usefixtures("fresh_seed")
@pytest.mark.parametrize("impl", ["cudnn", "sdpa_flash"])
def test_backends_to_text(impl: str) -> None:
    tensors = rand(2, WAN_TOKENS, WAN_HEADS, WAN_DIM), *rand(2, 2, 512, WAN_HEADS, WAN_DIM)
    check(sf.cross_attention, tensors, DTYPES[-1], gradients=False, impl=impl)


@pytest.mark.parametrize("impl", IMPLS)
def test_ring_attention_replays_past_the_wrap(impl: str) -> None:
    """The length and the slots are read when the graph runs; nothing waits for the host."""
    frames, tokens, heads, head_dim = 3, 130, 2, 64
    cache = sf.RingKVCache(
        layers=1, batch=1, window=7, sink=1, frame_tokens=tokens, heads=heads, head_dim=head_dim,
        dtype=torch.bfloat16, device="cuda",
    )  # fmt: skip
    weight = torch.ones(heads * head_dim, dtype=torch.bfloat16, device="cuda")
    qkv = rand(1, frames * tokens, 3 * heads * head_dim, dtype=torch.bfloat16)

    def step() -> Tensor:
        at = cache.chunk(frames)
        ring = cache.k[0], cache.v[0]
        table = sf.rope_table(at.frame_F, (10, 13), head_dim)
        q = sf.qk_norm_rope_append(qkv, weight, weight, table, *ring, at.slot_F)
        return ring_attention(q, *ring, at.valid, semaphores=cache.semaphores, impl=impl)

    step()  # compiles
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = step()
        cache.commit(frames)
    for i in range(6):
        qkv.normal_()
        state = copy.deepcopy(cache.state_dict())
        graph.replay()
        replayed, cache_after = got.clone(), cache.k.clone()
        cache.load_state_dict(state)
        want = step()
        cache.commit(frames)
        assert int(cache.start) == frames * (i + 1)
        torch.testing.assert_close(cache.k, cache_after, rtol=0, atol=0)
        torch.testing.assert_close(replayed, want, rtol=0, atol=0)
    table = sf.rope_table(cache.chunk(frames).frame_F - frames, (10, 13), head_dim)
    q = sf.qk_norm_rope(qkv, weight, weight, table)[0]
    ring = cache.k[0].double(), cache.v[0].double()
    exact = reference.attention(q.double(), *ring, head_dim**-0.5)
    torch.testing.assert_close(replayed.double(), exact, rtol=2e-2, atol=2e-2)


def test_kernels_replay_in_a_graph() -> None:
    """Slots and frame indices are read when the graph runs, not when it is captured."""
    frames, tokens = 2, 2 * math.prod(GRID)
    qkv, weight = rand(1, tokens, 3 * 32, dtype=torch.float32), rand(32, dtype=torch.float32)
    rings = rand(2, 1, 2 * tokens, 2, 16, dtype=torch.float32)
    frame_F = torch.arange(frames, dtype=torch.int32, device="cuda")
    slot_F = torch.arange(frames, dtype=torch.int32, device="cuda")

    def run(impl: str, k_ring: Tensor, v_ring: Tensor) -> Tensor:
        table = sf.rope_table(frame_F, GRID, 16, impl=impl)
        return sf.qk_norm_rope_append(qkv, weight, weight, table, k_ring, v_ring, slot_F, impl=impl)

    run("triton", *rings)  # compiles
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = run("triton", *rings)
    for start in (5, 1000):
        qkv.normal_()
        frame_F.add_(start)
        slot_F.copy_(torch.randperm(4, device="cuda")[:frames])
        wanted = rings.clone()
        graph.replay()
        want = run("reference", *wanted)
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(rings, wanted, rtol=1e-5, atol=1e-5)


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
