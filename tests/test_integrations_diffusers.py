"""The kernels in diffusers' Wan: equal to it in every form of a pass, cached rollouts beside a
cache written anew, and undone without a trace."""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from sfkernels.integrations import WanKVCache, patch, unpatch
from sfkernels.integrations.forwards import is_patched
from sfkernels.testing import close_as_eager

diffusers = pytest.importorskip("diffusers")
peft = pytest.importorskip("peft")

HEIGHT, WIDTH, CHANNELS, TEXT = 4, 6, 4, 5
Call = Callable[..., Tensor]


def model(**changes: Any) -> Any:
    torch.manual_seed(1)
    sizes = dict(
        num_attention_heads=2, attention_head_dim=24, in_channels=CHANNELS, out_channels=CHANNELS,
        text_dim=16, freq_dim=32, ffn_dim=64, num_layers=2, rope_max_seq_len=64,
    )  # fmt: skip
    made: Any = diffusers.WanTransformer3DModel(**(sizes | changes)).eval()
    for p in made.parameters():
        nn.init.normal_(p, std=0.15 if p.dim() > 1 else 0.5)
    return made


def inputs(frames: int = 3, batch: int = 2, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    draw = torch.Generator().manual_seed(seed)
    x = torch.randn(batch, CHANNELS, frames, HEIGHT, WIDTH, generator=draw)
    return x, 1000 * torch.rand(batch, generator=draw), torch.randn(batch, TEXT, 16, generator=draw)


def run(made: Any, *args: Tensor, **named: Any) -> Tensor:
    with torch.no_grad():
        out: Tensor = made(*args, **named).sample
    return out


def close(got: Tensor, want: Tensor) -> None:
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)


def each_token(x: Tensor, t: Tensor, text: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """As Wan2.2's image-to-video model has its timesteps."""
    tokens = x.shape[2] * HEIGHT * WIDTH // 4
    return x, t[:, None] * torch.linspace(0.1, 1, tokens), text


@pytest.mark.parametrize(
    ("changes", "form"),
    [
        ({}, lambda *args: args),
        ({}, each_token),
        (dict(cross_attn_norm=False), lambda *args: args),
        (dict(attention_head_dim=16, num_attention_heads=3, eps=1e-4), lambda *args: args),
    ],
)
def test_a_pass_is_diffusers(changes: dict[str, Any], form: Callable[..., Any]) -> None:
    made, args = model(**changes), form(*inputs())
    want, names, classes = run(made, *args), [*made.state_dict()], [*map(type, made.modules())]
    assert patch(made) is made
    assert names == [*made.state_dict()] and classes == [*map(type, made.modules())]
    close(run(made, *args), want)
    unpatch(made)
    assert torch.equal(run(made, *args), want)
    assert not any("forward" in vars(module) for module in made.modules())
    default = type(made.blocks[0].attn1.processor)
    assert default is diffusers.models.transformers.transformer_wan.WanAttnProcessor


def test_fused_projections_and_pipelines() -> None:
    made = model()
    want = run(made, *inputs())
    for block in made.blocks:
        block.attn1.fuse_projections()
        block.attn2.fuse_projections()

    class Pipeline:
        transformer, transformer_2 = made, model()

    patch(Pipeline)
    close(run(made, *inputs()), want)
    assert is_patched(Pipeline.transformer_2.rope)


def test_attention_to_an_image_stays_diffusers() -> None:
    """The first 257 tokens of the text are an image's."""
    made = model(added_kv_proj_dim=48, image_dim=8)
    x, t, _ = inputs()
    text, image = torch.randn(2, 512, 16), torch.randn(2, 3, 8)
    want = run(made, x, t, text, image)
    close(run(patch(made), x, t, text, image), want)


def test_bfloat16_and_gradients() -> None:
    made = model()

    def results(made: Any, dtype: torch.dtype) -> list[Tensor]:
        made = copy.deepcopy(made).to(dtype)
        x, t, text = (a.to(dtype) for a in inputs())
        out = made(x.requires_grad_(), t, text).sample
        weights = [made.blocks[0].attn1.to_q.weight, made.blocks[1].scale_shift_table]
        return [out.detach(), *torch.autograd.grad(out.square().mean(), [x, *weights])]

    exact, eager = results(made, torch.float64), results(made, torch.bfloat16)
    ours = results(patch(made), torch.bfloat16)
    for i, triple in enumerate(zip(ours, eager, exact, strict=True)):
        close_as_eager(f"result {i}", *triple)


def naive(made: Any, sizes: list[int], window: int, sink: int) -> list[Tensor]:
    """A rollout by processors that keep keys and values in lists, frame by frame."""

    class Cached:
        def __init__(self) -> None:
            self.frames: list[tuple[Tensor, Tensor]] = []

        def __call__(self, attn: Any, x: Tensor, _: Any = None, mask: Any = None,
                     rotary_emb: Any = None) -> Tensor:  # fmt: skip
            def rotated(t: Tensor) -> Tensor:
                pairs = torch.view_as_complex(t.unflatten(-1, (-1, 2)).double())
                turn = torch.complex(*(r[..., ::2].double() for r in rotary_emb))
                return torch.view_as_real(pairs * turn).flatten(-2).to(t.dtype)

            q, k, v = (layer(x) for layer in (attn.to_q, attn.to_k, attn.to_v))
            q, k, v = (
                t.unflatten(2, (attn.heads, -1)) for t in (attn.norm_q(q), attn.norm_k(k), v)
            )
            tokens = HEIGHT * WIDTH // 4
            del self.frames[place["start"] :]
            new = zip(rotated(k).split(tokens, 1), v.split(tokens, 1), strict=True)
            self.frames += new
            end, first = len(self.frames), min(sink, len(self.frames))
            seen = self.frames[:first] + self.frames[max(first, end - window + sink) :]
            k, v = (torch.cat(part, 1).transpose(1, 2) for part in zip(*seen, strict=True))
            o = nn.functional.scaled_dot_product_attention(rotated(q).transpose(1, 2), k, v)
            return attn.to_out[0](o.transpose(1, 2).flatten(2))

    made = copy.deepcopy(made)
    place = {"start": 0}
    for block in made.blocks:
        block.attn1.processor = Cached()
    ahead = type(made.rope).forward

    def rope(x: Tensor) -> Any:
        wide = x.new_zeros(*x.shape[:2], place["start"] + x.shape[2], *x.shape[3:])
        skipped = place["start"] * HEIGHT * WIDTH // 4
        return tuple(t[:, skipped:] for t in ahead(made.rope, wide))

    made.rope.forward = rope
    outs = []
    for chunk, frames in enumerate(sizes):
        for step in range(2):
            outs.append(run(made, *inputs(frames, seed=10 * chunk + step)))
        place["start"] += frames
    return outs


def cached(made: Any, cache: WanKVCache, sizes: list[int]) -> list[Tensor]:
    outs = []
    for chunk, frames in enumerate(sizes):
        with cache.append():
            outs.append(run(made, *inputs(frames, seed=10 * chunk)))
        with cache.overwrite():
            outs.append(run(made, *inputs(frames, seed=10 * chunk + 1)))
    return outs


def kv_cache(made: nn.Module, window: int = 5, **options: Any) -> WanKVCache:
    sizes: dict[str, Any] = dict(height=HEIGHT, width=WIDTH, batch=2) | options
    return WanKVCache(made, window=window, **sizes)


@pytest.mark.parametrize(
    ("window", "sink", "sizes"),
    [(5, 0, [1] * 8), (6, 0, [3] * 4), (6, 2, [2] * 6), (4, 1, [1, 3, 3, 3])],
)
def test_a_cached_rollout_past_the_window(window: int, sink: int, sizes: list[int]) -> None:
    made = model()
    want = naive(made, sizes, window, sink)
    cache = kv_cache(patch(made), window, sink=sink)
    for _ in range(2):
        for got, expected in zip(cached(made, cache, sizes), want, strict=True):
            close(got, expected)
        assert cache.frames == sum(sizes)
        cache.reset()
    close(run(made, *inputs()), run(unpatch(copy.deepcopy(made)), *inputs()))  # as ever, outside


def test_rollouts_in_threads() -> None:
    made = patch(model())
    want = [cached(made, kv_cache(made, window), [2] * 5) for window in (4, 6)]
    found: list[list[Tensor]] = [[], []]

    def work(i: int) -> None:
        found[i] = cached(made, kv_cache(made, (4, 6)[i]), [2] * 5)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for got, expected in zip(found, want, strict=True):
        assert all(map(torch.equal, got, expected))


def test_lora_after_patching_is_eagers() -> None:
    made = patch(model())
    plain = run(made, *inputs())
    torch.manual_seed(2)
    layers = ["to_q", "to_k", "to_v", "to_out.0", "net.0.proj"]
    made.add_adapter(
        peft.LoraConfig(r=4, target_modules=layers, init_lora_weights=False)
    )  # fmt: skip
    ours = run(made, *inputs())
    assert (ours - plain).abs().max() > 0.05
    close(ours, run(unpatch(made), *inputs()))
    made.disable_adapters()
    close(run(patch(made), *inputs()), plain)


def test_compiled_blocks_have_no_graph_break() -> None:
    """Nor one for each layer: more than eight would be too many."""
    made = patch(model(num_layers=10))
    want = run(made, *inputs())
    cache = kv_cache(made)
    rolled = cached(made, cache, [2] * 4)
    cache.reset()
    torch._dynamo.reset()
    made.compile_repeated_blocks(backend="aot_eager", fullgraph=True)
    close(run(made, *inputs()), want)
    for got, expected in zip(cached(made, cache, [2] * 4), rolled, strict=True):
        close(got, expected)


def test_under_autocast() -> None:
    made = model()
    want = run(made, *inputs())
    cache = kv_cache(patch(made))
    with torch.autocast("cpu", torch.bfloat16):
        got = [run(made, *inputs()), *cached(made, cache, [3])[:1]]
    assert all((one - want).abs().max() < 0.05 * want.abs().max() for one in got)


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (lambda made: kv_cache(unpatch(made)), "the model is not patched: call sfkernels.integ"),
        (lambda made: kv_cache(made, height=5), "latents of 5 × 6 in patches of 1 × 2 × 2: must"),
        (lambda made: kv_cache(made, sink=5), "sink"),
        (lambda made: cached(made, kv_cache(made), [6]), "window"),
        (
            lambda made: cached(made, kv_cache(made, height=6, width=4), [1]),
            r"latents of \[4, 6\]: ",
        ),
        (
            lambda made: cached(made, kv_cache(made, batch=1), [1]),
            "a batch of 2: the cache is",
        ),
    ],
)
def test_bad_input_says_what_is_wrong(call: Call, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        call(patch(model()))


def test_a_pass_that_was_cut_short_leaves_no_hole() -> None:
    made = patch(model())
    want, cache = cached(made, kv_cache(made), [2, 2]), kv_cache(made)

    def stop(*_: Any) -> None:
        raise KeyboardInterrupt

    for failing in (True, False):
        cache.reset()
        with cache.append():
            run(made, *inputs(2, seed=0))
        with cache.overwrite():
            run(made, *inputs(2, seed=1))
        if failing:
            hook = made.blocks[1].register_forward_pre_hook(stop)
            with pytest.raises(KeyboardInterrupt), cache.append():
                run(made, *inputs(2, seed=10))
            hook.remove()
            assert cache.frames == 2
            with pytest.raises(ValueError, match="no chunk to write again"), cache.overwrite():
                pass
        with cache.append():
            assert torch.equal(run(made, *inputs(2, seed=10)), want[2])


def test_a_shorter_chunk_would_see_the_one_that_failed() -> None:
    made = patch(model())
    cache = kv_cache(made, 4)
    cached(made, cache, [2, 2])
    with pytest.raises(RuntimeError, match="out of memory"), cache.append():
        run(made, *inputs(2))
        raise RuntimeError("out of memory")
    with pytest.raises(ValueError, match="1 frames in place of 2 whose pass failed"):
        cached(made, cache, [1])
    assert cached(made, cache, [2]) and cache.frames == 6


def test_a_cache_is_of_one_model() -> None:
    """Another one that runs inside is as ever, and frees nothing of it; a cache frees its rings."""
    made, other = patch(model()), patch(model())
    want, cache = run(other, *inputs()), kv_cache(made)
    with cache.append():
        assert torch.equal(run(other, *inputs()), want)
        run(made, *inputs(2))
    with pytest.raises(ValueError, match="no pass of the cache's model was made"), cache.append():
        run(other, *inputs())
    unpatch(made)
    with pytest.raises(ValueError, match="the model was unpatched"), cache.append():
        pass
    patch(made)
    rings, cache = made.blocks[0].attn1.processor.rings, kv_cache(made)
    second = kv_cache(made)
    assert [*rings] == [0, 1]
    del cache
    assert [*rings] == [1] and not copy.deepcopy(made).blocks[0].attn1.processor.rings
    del second


def test_places_of_passes() -> None:
    made = patch(model())
    cache = kv_cache(made)
    with pytest.raises(ValueError, match="there is no chunk to write again"), cache.overwrite():
        pass
    with cache.append(frame_offset=0):
        run(made, *inputs(2))
        with pytest.raises(ValueError, match="3 frames in place of 2: must be as many in all"):
            run(made, *inputs(3))
    with pytest.raises(ValueError, match="frame_offset=3: must be 2, where"), cache.append(3):
        pass
    with pytest.raises(ValueError, match="frame_offset=1: must be 0, where"), cache.overwrite(1):
        pass
    with cache.append(), pytest.raises(ValueError, match="qk_norm_rope_append has no gradient"):
        made(*inputs(2))
    made.set_attention_backend("native")
    with pytest.raises(ValueError, match=r"backend .* on a patched model: choose by"):
        run(made, *inputs())
