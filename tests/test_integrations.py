"""The kernels in the public causal Wan models: equal to what the models compute themselves, and
undone without a trace."""

from __future__ import annotations

import copy
import io
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from sfkernels.integrations import patch, unpatch
from sfkernels.integrations.forwards import is_patched
from sfkernels.testing import close_as_eager
from tests import public_wan
from tests.public_wan import DIM, TEXT, TOKENS, CausalWanModel, caches, pipeline

BLOCKS = {
    "self forcing": public_wan.CausalWanAttentionBlock,
    "causvid": public_wan.CausVidBlock,
    "longlive": public_wan.LongLiveBlock,
}
Pass = Callable[..., Tensor]


def model(version: str = "self forcing", **options: Any) -> CausalWanModel:
    torch.manual_seed(1)
    made = CausalWanModel(BLOCKS[version], **options).eval()
    for p in made.parameters():
        nn.init.normal_(p, std=0.2 if p.dim() > 1 else 1.0)
    return made


@torch.no_grad()
def video(made: CausalWanModel, sizes: list[int], window: int, batch: int = 1, seed: int = 0,
          held: dict[str, Any] | None = None, dtype: torch.dtype = torch.float32,
          ) -> list[Tensor]:  # fmt: skip
    """The outputs of two passes over each chunk, in caches as the public pipelines make them."""
    draw = torch.Generator().manual_seed(seed)

    def rand(*shape: int) -> Tensor:
        return torch.randn(shape, generator=draw).to(dtype)

    held = held or caches(made, batch, window, dtype)
    context, outs, start = rand(batch, TEXT, DIM), [], 0
    for frames in sizes:
        e, e_head = rand(batch, frames, 6, DIM), rand(batch, frames, 1, DIM)
        for _ in range(2):
            x = rand(batch, frames * TOKENS, DIM)
            outs.append(made(x, e, e_head, context, current_start=start * TOKENS, **held))
        start += frames
    return outs


def close(got: list[Tensor], want: list[Tensor]) -> None:
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("version", "window", "sink", "sizes"),
    [
        ("self forcing", 5, 0, [1] * 9),
        ("self forcing", 6, 0, [3] * 5),
        ("self forcing", 6, 1, [2] * 7),
        ("self forcing", 7, 3, [3] * 5),
        ("self forcing", 7, 2, [1, 3, 3, 3, 3]),
        ("longlive", 6, 3, [3] * 6),
        ("causvid", 9, 0, [3] * 3),
    ],
)
def test_past_the_window_as_the_model_itself(
    version: str, window: int, sink: int, sizes: list[int]
) -> None:
    made = model(version, window=window, sink=sink)
    want = video(made, sizes, window, batch=2)
    names, classes = [*made.state_dict()], [*map(type, made.modules())]
    assert patch(pipeline(made)).generator.model is made
    assert names == [*made.state_dict()] and classes == [*map(type, made.modules())]
    close(video(made, sizes, window, batch=2), want)
    unpatch(pipeline(made))
    assert not any("forward" in vars(module) for module in made.modules())
    assert all(map(torch.equal, video(made, sizes, window, batch=2), want))


def test_the_same_cache_serves_the_next_video() -> None:
    """The public pipelines keep their cache, and say where a video starts by its first frame."""
    made = patch(model(sink=1))
    held = caches(made, 1, 5, torch.float32)
    first = video(made, [2] * 6, 5, held=held)
    for layer in held["crossattn_cache"]:
        layer["is_init"] = False
    for layer in held["kv_cache"]:
        layer["global_end_index"] = layer["local_end_index"] = torch.tensor([0])
    assert all(map(torch.equal, video(made, [2] * 6, 5, held=held), first))


@pytest.mark.parametrize("missing", ["qk_norm", "text_norm"])
def test_models_without_some_norms(missing: str) -> None:
    options: Any = {missing: False}
    made = model(**options)
    want = video(made, [2] * 4, 5)
    close(video(patch(made), [2] * 4, 5), want)


def test_bfloat16_is_as_close_as_the_models() -> None:
    made = model(sink=1)
    exact = video(copy.deepcopy(made).double(), [2] * 5, 5, dtype=torch.float64)
    made = made.bfloat16()
    eager = video(made, [2] * 5, 5, dtype=torch.bfloat16)
    ours = video(patch(made), [2] * 5, 5, dtype=torch.bfloat16)
    close_as_eager("all passes", *(torch.stack(outs) for outs in (ours, eager, exact)))


def test_under_autocast_and_after_to() -> None:
    made = patch(model())
    want = video(unpatch(copy.deepcopy(made)), [2] * 4, 5)
    for dtype in (torch.bfloat16, torch.float32):  # of the cache
        with torch.autocast("cpu", torch.bfloat16):
            ours = video(made, [2] * 4, 5, held=caches(made, 1, 5, dtype))
        assert (ours[-1] - want[-1]).abs().max() < 0.05 * want[-1].abs().max()
    want = video(unpatch(copy.deepcopy(made)).double(), [2] * 4, 5, dtype=torch.float64)
    made.double()
    for a, b in zip(video(made, [2] * 4, 5, dtype=torch.float64), want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)


def test_what_has_a_gradient_goes_the_models_own_way() -> None:
    """Bit for bit, with and without a cache."""
    made = model()
    x, e = torch.randn(1, 2 * TOKENS, DIM), torch.randn(1, 2, 6, DIM)
    e_head, context = torch.randn(1, 2, 1, DIM), torch.randn(1, TEXT, DIM)

    def gradients(**held: Any) -> list[Tensor]:
        made.zero_grad()
        made(x, e, e_head, context, **held).square().mean().backward()
        return [p.grad for p in made.parameters() if p.grad is not None]

    want = gradients(), gradients(**caches(made, 1, 5, torch.float32))
    patch(made)
    assert all(map(torch.equal, gradients(), want[0]))
    assert all(map(torch.equal, gradients(**caches(made, 1, 5, torch.float32)), want[1]))
    with torch.no_grad():  # no cache: a bidirectional or a training pass
        plain = made(x, e, e_head, context)
        torch.testing.assert_close(plain, unpatch(made)(x, e, e_head, context))


def rollout(made: CausalWanModel, chunks: int) -> list[Tensor]:
    """As self forcing trains: each chunk without gradients, then with them, then the cache."""
    draw = torch.Generator().manual_seed(0)
    held, losses = caches(made, 1, 4, torch.float32), []
    context = torch.randn(1, TEXT, DIM, generator=draw)
    for chunk in range(chunks):
        x = torch.randn(1, 2 * TOKENS, DIM, generator=draw)
        e = torch.randn(1, 2, 6, DIM, generator=draw)
        for grad in (False, True, False):
            with torch.set_grad_enabled(grad):
                out = made(x, e, e[:, :, :1], context, current_start=2 * TOKENS * chunk, **held)
            losses += [out.square().mean()] * grad
            x = 0.5 * x + 0.1
    made.zero_grad()
    torch.stack(losses).sum().backward()
    return [p.grad for p in made.parameters() if p.grad is not None]


def test_a_rollout_with_gradients_over_the_same_cache() -> None:
    made = model(window=4)
    want = rollout(made, 2)
    close(rollout(patch(made), 2), want)
    with pytest.raises(ValueError, match="gradients up to frame 5 over a cache of 4 frames"):
        rollout(made, 3)


def test_lora_after_patching_is_eagers() -> None:
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=4, target_modules=["q", "k", "v", "o"], init_lora_weights=False)
    made = model(sink=1)
    plain = video(patch(made), [2] * 4, 5)
    torch.manual_seed(3)
    peft.inject_adapter_in_model(config, made)
    ours = video(made, [2] * 4, 5)
    assert (ours[-1] - plain[-1]).abs().max() > 0.1
    close(ours, video(unpatch(made), [2] * 4, 5))


def test_threads_do_not_disturb_each_other() -> None:
    """One model, two videos at once, while it is patched anew."""
    made = patch(model())
    want = [video(made, [2] * 6, 5, seed=seed) for seed in range(2)]
    found: list[list[Tensor]] = [[], []]

    def run(seed: int) -> None:
        for _ in range(3):
            found[seed] = video(made, [2] * 6, 5, seed=seed)

    threads = [threading.Thread(target=run, args=(seed,)) for seed in range(2)]
    for thread in threads:
        thread.start()
    while any(thread.is_alive() for thread in threads):
        patch(made)
    for got, expected in zip(found, want, strict=True):
        close(got, expected)


def test_a_copy_is_patched_by_itself() -> None:
    made = patch(model())
    other = copy.deepcopy(made)
    nn.init.zeros_(other.head.head.weight)
    nn.init.zeros_(other.head.head.bias)
    assert not video(other, [2], 5)[0].any() and video(made, [2], 5)[0].any()
    unpatch(other)
    assert is_patched(made.blocks[0])
    file = io.BytesIO()
    torch.save(made, file)
    file.seek(0)
    loaded = torch.load(file, weights_only=False)
    assert all(map(torch.equal, video(loaded, [2] * 4, 5), video(made, [2] * 4, 5)))


def test_hooks_that_came_afterwards_are_not_lost() -> None:
    """They are put around a forward as accelerate does it."""
    hooks = pytest.importorskip("accelerate.hooks")
    made = patch(model())
    want, block = video(made, [2] * 4, 5), made.blocks[0]
    hooks.add_hook_to_module(block, hooks.ModelHook())
    for change in (patch, unpatch):
        with pytest.raises(ValueError, match=r"blocks.0 has a hook that was added after"):
            change(made)
    assert all(map(torch.equal, video(made, [2] * 4, 5), want))
    hooks.remove_hook_from_module(block)
    unpatch(made)
    assert not any("forward" in vars(module) for module in made.modules())


def test_weights_that_are_not_there() -> None:
    made: Any = patch(model())
    made.blocks[1].cross_attn.norm_q.to("meta")
    with pytest.raises(ValueError, match="a norm is on meta, as accelerate's sequential"):
        video(made, [2], 5)


@pytest.mark.parametrize("impl", ["reference", "cpp"])
def test_the_implementation_may_be_named(impl: str) -> None:
    from sfkernels import cpp

    if impl == "cpp" and cpp.MISSING:
        pytest.skip(cpp.MISSING)
    made = model()
    want = video(made, [2] * 4, 5)
    patch(patch(made), impl=impl, attention_impl="reference")  # anew
    close(video(made, [2] * 4, 5), want)
    assert (impl, "reference") in vars(made.blocks[0])["forward"].args


class Other(nn.Module):
    pass


class NewBlock(public_wan.CausalWanAttentionBlock):
    def forward(self, x: Any, e: Any, latents: Any) -> Any:  # type: ignore[override]
        return x


def hooked() -> CausalWanModel:
    made = model()
    made.blocks[1].forward = lambda *args, **named: None
    return made


def without_weight() -> CausalWanModel:
    made: Any = model()
    made.blocks[0].self_attn.norm_q = nn.RMSNorm(DIM, elementwise_affine=False)
    return made


@pytest.mark.parametrize(
    ("target", "said"),
    [
        (
            Other,
            "Other is not known: must be one of CausalWanModel, WanTransformer3DModel",
        ),
        (lambda: pipeline(Other()), "SimpleNamespace is not known"),
        (lambda: None, "NoneType is not known"),
        (
            lambda: CausalWanModel(NewBlock),
            r"blocks.0, a NewBlock, takes \(e, latents, x\): this",
        ),
        (lambda: without_weight(), "self_attn.norm_q is a RMSNorm without weight or epsilon: this"),
        (hooked, "blocks.1 has had its forward replaced already, as accelerate's hooks"),
    ],
)
def test_what_is_not_known_is_refused(target: Callable[[], Any], said: str) -> None:
    """And left as it is."""
    made = target()
    with pytest.raises(ValueError, match=said):
        patch(made)
    if isinstance(made, nn.Module):
        assert not any(map(is_patched, made.modules()))
    unpatch(made)


def test_names_of_implementations() -> None:
    with pytest.raises(ValueError, match="attention_impl='cpp': must be 'auto' or one of triton,"):
        patch(model(), attention_impl="cpp")
    with pytest.raises(ValueError, match="impl='cuda': must be 'auto' or one of triton, cpp, ref"):
        patch(model(), impl="cuda")


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (dict(held=31), "a cache of 31 tokens and 12 tokens from 0 on: must be whole frames of 6"),
        (dict(start=7), "12 tokens from 7 on: must be whole frames"),
        (
            dict(start=6 * TOKENS),
            "frame 6 follows frame 3 in this cache: frames come in order",
        ),
        (
            dict(window=-1, start=4 * TOKENS),
            "frames 4 to 5 do not fit in a cache of 5: give the",
        ),
        (dict(start=0, frames=6), "window"),
        (dict(most=29), "max_attention_size is 29: must be 30 at least, the tokens of the cache"),
        (dict(sizes=[2, 2, 2], start=3 * TOKENS, frames=1), "frames 3 to 3 would see those after"),
    ],
)
def test_passes_that_a_ring_cannot_take(options: dict[str, Any], said: str) -> None:
    made = patch(model(window=options.get("window", 5)))
    held = caches(made, 1, 5, torch.float32)
    video(made, options.get("sizes", [2, 2]), 5, held=held)
    block: Any
    for block, layer in zip(made.blocks, held["kv_cache"], strict=True):
        block.self_attn.max_attention_size = options.get("most", 32760)
        if "held" in options:
            layer["k"] = layer["v"] = torch.zeros(1, options["held"], 2, DIM // 2)
    frames = options.get("frames", 2)
    x, e = torch.zeros(1, frames * TOKENS, DIM), torch.zeros(1, frames, 6, DIM)
    with torch.no_grad(), pytest.raises(ValueError, match=said):
        start = options.get("start", 0)
        made(x, e, e[:, :, :1], torch.zeros(1, TEXT, DIM), current_start=start, **held)
