"""Attention by other libraries' kernels: FlexAttention as PyTorch defines it, flash-attn by a
stand-in for the library."""

from __future__ import annotations

import dataclasses
import functools
import sys
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

import sfkernels as sf
from sfkernels import dispatch, library_attention, reference
from sfkernels.layout import BlockLayout, Span
from tests.oracle import DEVICE, rand
from tests.test_attention import LAYOUTS, Prefix, attend, ring_attention

pytestmark = pytest.mark.usefixtures("fresh_seed")


@pytest.mark.skipif(DEVICE == "cuda", reason="as PyTorch defines it, without compiling it")
@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS.keys())
@pytest.mark.parametrize("spans", [(), ((1, 3), (4, 200))])
def test_flex_attention(layout: BlockLayout, spans: tuple[Span, ...]) -> None:
    """At sizes where blocks are seen whole, in part and not at all."""
    layout = dataclasses.replace(layout, frame_tokens=61)
    prefix = Prefix(*rand(2, 1, 200, 1, 8), spans) if spans else None
    q, k, v = rand(3, 1, layout.tokens, 1, 8, dtype=torch.float32)
    if prefix:
        prefix = Prefix(*(t.float() for t in prefix[:2]), spans)
    got = attend(layout, q, k, v, impl="flex", prefix=prefix)
    want = attend(layout, q, k, v, impl="reference", prefix=prefix)
    torch.testing.assert_close(got, want)
    past = sum(hi - lo for lo, hi in spans)
    keys = past + layout.tokens
    mask = library_attention.flex_mask(layout.rows, past, keys, q.device)
    shown = torch.nn.functional.pad(layout.dense_mask(), (past, 0), value=True)
    blocks = torch.nn.functional.pad(shown, (0, -keys % 128, 0, -layout.tokens % 128))
    blocks = blocks.unflatten(0, (-1, 128)).unflatten(2, (-1, 128)).any(3).any(1)
    assert mask is None if shown.all() else torch.equal(mask.to_dense()[0, 0].bool(), blocks)


@pytest.mark.skipif(DEVICE == "cuda", reason="as PyTorch defines it, without compiling it")
@pytest.mark.parametrize("valid", [1, 127, 128, 300])
def test_flex_attention_over_a_ring(valid: int) -> None:
    q, k, v = rand(3, 2, 300, 1, 8, dtype=torch.float32)
    options: Any = q[:, :140], k, v, torch.tensor(valid)
    got, want = (ring_attention(*options, impl=impl) for impl in ("flex", "reference"))
    torch.testing.assert_close(got, want)
    with pytest.raises(ValueError, match="impl='flex' has no gradient on a CPU"):
        sf.cross_attention(q.requires_grad_(), k, v, impl="flex")


def test_flex_attention_by_flash_attn(monkeypatch: pytest.MonkeyPatch) -> None:
    """Says what it lacks; given that, FlexAttention is told what computes it."""
    q, k, v = rand(3, 2, 30, 1, 8)
    if DEVICE == "cpu":
        with pytest.raises(ValueError, match="impl='flex_flash' takes CUDA tensors: use 'flex'"):
            sf.cross_attention(q, k, v, impl="flex_flash")
    refusal = dispatch.IMPLEMENTATIONS["flex_flash"].refusal
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (8, 0))
    assert "runs on Hopper and newer GPUs" in refusal(torch.device("cuda"))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (9, 0))
    monkeypatch.setattr(dispatch, "find_spec", lambda name: None)
    assert "needs flash-attn 4" in refusal(torch.device("cuda"))
    monkeypatch.setattr(dispatch, "find_spec", lambda name: name)
    assert not refusal(torch.device("cuda"))

    told: list[Any] = []

    def compiled(*tensors: Tensor, **options: Any) -> Tensor:
        told.append(options["kernel_options"])
        return tensors[0]

    monkeypatch.setattr(library_attention, "_compiled_flex", lambda: compiled)
    for impl in library_attention.FLEX:
        library_attention.attention(q.to("meta"), k.to("meta"), v.to("meta"), 0.25, impl)
    assert told == [{"BACKEND": "TRITON"}, {"BACKEND": "FLASH"}]


@pytest.mark.parametrize("module", ["flash_attn_interface", "flash_attn.cute", "flash_attn"])
def test_flash_attn_gets_what_it_takes(module: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a stand-in for the library, whose signature is that of versions 3, 4 and 2."""
    stand_in = ModuleType(module)

    def of_version_2(q: Tensor, k: Tensor, v: Tensor, softmax_scale: float) -> Any:
        return reference.attention(q, k, v, softmax_scale)

    def flash_attn_func(
        q: Tensor, k: Tensor, v: Tensor, softmax_scale: float, num_splits: int = 1
    ) -> Any:
        assert num_splits == 0  # as many as fill the GPU
        out = reference.attention(q, k, v, softmax_scale)
        return (out, None) if module == "flash_attn.cute" else out

    def flash_attn_with_kvcache(
        q: Tensor, k_cache: Tensor, v_cache: Tensor, cache_seqlens: Tensor, softmax_scale: float
    ) -> Tensor:
        assert cache_seqlens.dtype == torch.int32 and len(cache_seqlens) == len(q)
        length = int(cache_seqlens[0])
        return reference.attention(q, k_cache[:, :length], v_cache[:, :length], softmax_scale)

    function = of_version_2 if module == "flash_attn" else flash_attn_func
    stand_in.flash_attn_func = function  # type: ignore[attr-defined]
    if module != "flash_attn.cute":
        stand_in.flash_attn_with_kvcache = flash_attn_with_kvcache  # type: ignore[attr-defined]
    for name in ("flash_attn_interface", "flash_attn.cute", "flash_attn"):
        monkeypatch.setitem(sys.modules, name, None)  # not installed
    monkeypatch.setitem(sys.modules, module, stand_in)
    if module == "flash_attn.cute":
        monkeypatch.setitem(sys.modules, "flash_attn", ModuleType("flash_attn"))
    library_attention._flash.cache_clear()
    try:
        layout = LAYOUTS["teacher forcing"]
        q, k, v = rand(3, 2, layout.tokens, 2, 16, dtype=torch.float32)
        rest = layout.rows, 0.25, None, None, (), "flash"
        got = library_attention.block_causal_attention(q, k, v, *rest)
        want = reference.block_causal_attention(q, k, v, layout, 0.25)
        torch.testing.assert_close(got, want)
        ring = functools.partial(
            library_attention.ring_attention, q, k, v, torch.tensor(20, device=DEVICE)
        )
        if module == "flash_attn.cute":
            with pytest.raises(ValueError, match="only version 4 is installed"):
                ring(0.25, "flash")
        else:
            want = reference.attention(q, k[:, :20], v[:, :20], 0.25)
            torch.testing.assert_close(ring(0.25, "flash"), want)
    finally:
        library_attention._flash.cache_clear()
