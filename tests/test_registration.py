"""The ops as PyTorch sees them: schema, fake, autograd; a DiT block without graph breaks."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

import sfkernels as sf
from sfkernels import attention, convolution, norm, rope
from sfkernels.linear import _linear
from sfmodel.blocks import Block, Context, Place, TextKeys
from sfmodel.config import DiTConfig
from sfmodel.dit import DiT
from tests.oracle import DEVICE, each, each_and_reference

B, F, GRID, HEADS, D = 2, 2, (2, 3), 2, 8
TOKENS, C = F * GRID[0] * GRID[1], HEADS * D


def rand(*shape: int) -> Tensor:
    return torch.randn(*shape, device=DEVICE)


def table() -> Tensor:
    return sf.rope_table(torch.arange(F, device=DEVICE), GRID, D, impl="reference")


@each
@pytest.mark.parametrize("grad", [False, True])
def test_opcheck(grad: bool, impl: str) -> None:
    def leaf(*shape: int) -> Tensor:
        return rand(*shape).requires_grad_(grad)

    x, y, scale, shift = leaf(B, TOKENS, C), leaf(B, TOKENS, C), leaf(1, F, C), leaf(1, 1, C)
    weight, qkv = leaf(1, 1, C), leaf(B, TOKENS, 3 * C)
    q_weight, k_weight = leaf(C), leaf(C)
    x_args, rope_args = (x, scale, shift), (qkv, None, None, q_weight, k_weight, table())
    heads, past = leaf(3, B, TOKENS, HEADS, D).unbind(), rand(2, B, 4, HEADS, D).unbind()
    rows = (0, 8, 1, 0, 8, 8, TOKENS, 2, 0, 5, 8, TOKENS)
    calls: list[tuple[Any, tuple[Any, ...]]] = [
        (norm._norm, (*x_args, 1e-6, True, True, impl)),
        (norm._norm, (x, weight, None, 1e-6, False, False, impl)),
        (norm._residual_norm, (x, y, scale, scale, shift, 1e-6, True, impl)),
        (norm._residual_norm, (x, y, None, weight, shift, 1e-6, False, impl)),
        (norm._rms_norm_silu, (x, q_weight, None, None, None, 1e-6, impl)),
        (
            norm._rms_norm_silu,
            (x, q_weight, y, k_weight, qkv[..., :C].contiguous(), 1e-6, impl),
        ),
        (rope._rope_table, (torch.arange(F, device=DEVICE), *GRID, D, 1e4, impl)),
        (rope._qk_norm_rope, (*rope_args, 1e-6, impl)),
        (rope._qk_norm_rope, (x, x, x, q_weight[:D], k_weight[:D], rope_args[-1], 1e-6, impl)),
        (rope._qk_norm_rope, (x, x, x, None, None, rope_args[-1], 1e-6, impl)),
    ]
    if impl == "triton":  # C++ has no attention
        calls += [
            (attention._attention, (*heads, None, None, rows, (), 0.3, True, impl)),
            (attention._attention, (*heads, *past, rows, (0, 1, 2, 4), 0.3, True, impl)),
        ]
    if not grad:  # without a derivative of their own
        rings = rand(2, B, 2 * TOKENS, HEADS, D).unbind()
        slots = torch.tensor([3, 1], dtype=torch.int32, device=DEVICE)
        dq, dk, dv = rand(3, B, TOKENS, HEADS, D)
        stats = rand(B, TOKENS, 2)
        calls += [
            (norm._norm_bwd, (y, *x_args, stats, True, True, impl)),
            (norm._norm_bwd, (y, x, weight, None, stats, False, False, impl)),
            (norm._residual_norm_bwd, (x, y, x, y, scale, scale, shift, stats, True, impl)),
            (norm._residual_norm_bwd, (x, y, x, None, None, scale, shift, stats, True, impl)),
            (norm._rms_norm_silu_bwd, (None, y, x, q_weight, stats, impl)),
            (norm._rms_norm_silu_bwd, (x, y, x, q_weight, stats, impl)),
            (rope._qk_norm_rope_bwd, (dq, dk, dv, *rope_args, stats, impl)),
            (rope._qk_norm_rope_append, (*rope_args, *rings, slots, 1e-6, True, impl)),
        ]
        if impl == "triton":
            counters = torch.zeros(B * TOKENS * HEADS, dtype=torch.int32, device=DEVICE)
            k_table = rand(2 * TOKENS, D // 2, 2)
            by_table = dq, *rings, slots[0], k_table, counters, False, 0.3, impl
            lse = rand(B, HEADS, TOKENS)
            layer = x.half(), rand(5, C).half()
            conv = rand(4, 8, 3, 3, 3).contiguous(memory_format=torch.channels_last_3d)
            calls += [
                (_linear, (*layer, rand(5).half(), True, impl)),
                (_linear, (*layer, None, False, impl)),
                (convolution._causal_conv3d, (rand(B, 4, 2, 3, 8), conv, rand(4), impl)),
                (
                    convolution._upsampled_conv2d,
                    (rand(B, 1, 2, 3, 8), rand(2, 2, 4, 2, 2, 8).movedim(-1, 3), None, impl),
                ),
                (attention._ring_attention, (dq, *rings, slots[0], None, None, False, 0.3, impl)),
                (attention._ring_attention, by_table),
                (rope._rotate_keys, (dq, rand(TOKENS, D // 2, 2), slots[0], rings[0], impl)),
                (
                    attention._attention_bwd,
                    (dq, *heads, dk, lse, None, None, rows, (), 0.3, True, impl),
                ),
            ]
    for op, args in calls:
        torch.library.opcheck(op.registered, args)


def block_and_inputs(impl: str) -> tuple[Block, Callable[..., Context], list[Tensor]]:
    torch.manual_seed(0)
    config = DiTConfig(C, 4 * C, HEADS, 1, text_dim=8, text_len=5)
    model = DiT(config, impl, "auto" if impl == "cpp" else impl).to(DEVICE)
    (block,) = model.blocks
    assert isinstance(block, Block)
    modulation = model.modulation(rand(1, F)).blocks[0].detach().unbind(2)
    cache = model.new_cache(B, F + 2, GRID)
    model.set_text(cache, rand(1, 5, 8))
    keys = TextKeys(cache.text_k, cache.text_v)

    def context(cached: bool) -> Context:
        if cached:
            return Context(keys, cache=cache, places=[Place(cache.chunk(F), table())])
        return Context(rand(B, 5, C), table(), sf.BlockLayout((1, 1), TOKENS // F))

    return block, context, [rand(B, TOKENS, C), rand(B, TOKENS, C), *modulation]


@each_and_reference
@pytest.mark.parametrize("cached", [True, False])
def test_a_dit_block_compiles_without_graph_breaks(impl: str, cached: bool) -> None:
    block, contexts, (x, h, *modulation) = block_and_inputs(impl)
    context = contexts(cached)

    def run(x: Tensor, h: Tensor, *modulation: Tensor) -> tuple[Tensor, Tensor]:
        return block(x, h, modulation, context)

    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    if cached:
        with torch.no_grad():
            results: list[tuple[Tensor, ...]] = [fn(x, h, *modulation) for fn in (compiled, run)]
    else:
        leaves = [t.detach().requires_grad_() for t in (x, h, *modulation)]
        # The first norm's shift and scale and the last gate are the caller's.
        wanted = [*leaves[:2], *leaves[4:7], block.self_attn.qkv.weight, block.norm3.weight]
        outs = [torch.stack(fn(*leaves)) for fn in (compiled, run)]
        upstream = torch.randn_like(outs[0])
        results = [(out, *torch.autograd.grad(out, wanted, upstream)) for out in outs]
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


@each
def test_second_derivatives_are_those_of_the_reference(impl: str) -> None:
    """Through each op that has a gradient, some inputs being computed from others."""

    def leaf(*shape: int) -> Tensor:
        return rand(*shape).requires_grad_()

    x, y, scale, shift = leaf(B, TOKENS, C), leaf(B, TOKENS, C), leaf(1, F, C), leaf(B, 1, C)
    weight, bias, qkv = leaf(C), leaf(C), leaf(B, TOKENS, 3 * C)
    leaves, before = (x, y, scale, shift, weight, bias, qkv), qkv[..., :C].contiguous()
    full = functools.partial(sf.rms_norm_silu, bias_C=bias, before_BPC=before)
    ops: list[tuple[Callable[..., Any], tuple[Any, ...]]] = [
        (sf.rms_norm, (x, weight)),
        (sf.layer_norm, (x, weight, bias)),
        (sf.adaln, (x, shift, scale)),
        (sf.gated_adaln, (x, y * weight, scale, shift, scale)),
        (sf.gated_layer_norm, (x, x * weight, None, weight, bias)),
        (full, (x, weight, y)),
        (lambda *given, impl: sf.rms_norm_silu(*given, bias_C=bias, impl=impl)[1], (x, weight)),
        (sf.qk_norm_rope, (qkv, weight, bias, table())),
    ]
    for op, args in ops:
        results = []
        for one in (impl, "reference"):
            outs = op(*args, impl=one)
            outs = [outs] if isinstance(outs, Tensor) else [*outs]
            loss = torch.stack([out.square().sum() for out in outs]).sum()
            first = torch.autograd.grad(loss, leaves, create_graph=True, allow_unused=True)
            penalty = torch.stack([g.square().sum() for g in first if g is not None]).sum()
            options: Any = {"retain_graph": True, "allow_unused": True}
            results.append(torch.autograd.grad(penalty, leaves, **options))
        assert any(g is not None for g in results[0])
        for got, want in zip(*results, strict=True):
            assert (got is None) == (want is None)
            torch.testing.assert_close(got, want, rtol=1e-3, atol=1e-3)


def test_attention_names_what_has_a_second_derivative() -> None:
    q, k, v = (rand(1, 4, 1, 8).requires_grad_() for _ in range(3))
    out = sf.block_causal_attention(q, k, v, sf.BlockLayout((2,), 2), impl="triton")
    (dq,) = torch.autograd.grad(out.sum(), q, create_graph=True)
    with pytest.raises(RuntimeError, match="second derivative: take it with impl='reference'"):
        dq.sum().backward()


@pytest.mark.parametrize("fake_first", [True, False])
def test_what_is_cached_belongs_to_no_mode(fake_first: bool) -> None:
    """The reference of attention, called under FakeTensorMode, in inference mode and then for a
    gradient, of a layout that none of them has met before."""
    layout = sf.BlockLayout((2, 3 + fake_first), 2)
    qkv = rand(3, 1, layout.tokens, HEADS, D)

    def attend(qkv: Tensor) -> Tensor:
        q, k, v = qkv.unbind()
        return sf.block_causal_attention(q, k, v, layout, impl="reference")

    def fake() -> None:
        with FakeTensorMode() as mode:
            assert attend(mode.from_tensor(qkv)).shape == qkv.shape[1:]

    if fake_first:
        fake()
    with torch.inference_mode():
        want = attend(qkv)
    fake()
    with torch.device("meta"):  # a default device
        out = attend(qkv.requires_grad_())
    torch.testing.assert_close(out, want)
    out.sum().backward()


def test_an_exported_model_goes_on_in_eager_mode() -> None:
    config = DiTConfig(C, 4 * C, HEADS, 1, channels=4, text_dim=8, text_len=5)
    model = DiT(config, "reference").to(DEVICE)
    args = rand(1, 7, 4, 6, 4), torch.full((), 500.0, device=DEVICE), rand(1, 5, 8)
    exported = torch.export.export(model, args, strict=False).module()
    out = model(*args)
    assert type(out) is Tensor
    torch.testing.assert_close(out, exported(*args))


@each
def test_forward_mode_is_refused_where_there_is_none(impl: str) -> None:
    x, weight = rand(1, TOKENS, C), rand(C)
    with pytest.raises(RuntimeError, match="no forward-mode derivative: impl='reference' has one"):
        torch.func.jvp(lambda x: sf.rms_norm(x, weight, impl=impl), (x,), (x,))
    tangent = torch.func.jvp(lambda x: sf.rms_norm(x, weight, impl="reference"), (x,), (x,))[1]
    assert tangent.abs().max() < 1e-4  # along x the norm does not change
