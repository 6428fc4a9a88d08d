"""The Gluon kernels of attention's backward pass in the emulator of Hopper: parity of gradients
with float64, and that the emulator sees what is wrong with mutants of the kernels."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

from sfkernels import BlockLayout, launch
from sfkernels.gpu.attention_backward import row_delta
from sfkernels.gpu.hopper import attention_backward as hopper_bwd
from sfkernels.gpu.hopper import backward_loading, fused_backward
from sfkernels.gpu.tiles import Pattern
from sfkernels.launch import Tile
from sfkernels.layout import Span
from sfkernels.testing import close_as_eager, nan_filled
from tests.hopper_cases import BF16, FP16, LAYOUTS, TILES, attend, mutant, new, rows_of
from tests.hopper_emulator import emulate

pytestmark = [
    pytest.mark.usefixtures("fresh_seed"),
    pytest.mark.skipif(torch.cuda.is_available(), reason="for CPU tensors"),
]


def settings(tile: Tile) -> dict[str, Tile]:
    return {"hopper_dkdv": tile, "hopper_dq": tile}


def check_bwd(
    tensors: tuple[Tensor, ...],
    rows: Pattern,
    prefix: tuple[Span, ...] = (),
    do: Tensor | None = None,
    module: ModuleType = hopper_bwd,
    seed: int | None = None,
    deterministic: bool = True,
    launches: list[str] | None = None,
) -> tuple[Tensor, ...]:
    """tensors: q, k, v and, with a prefix, its k and v. module: of kernels, all of them or the
    fused one. launches: gets the names of the kernels."""
    own, past = tensors[:3], tensors[3:]
    before = past[0].shape[1] if past else 0
    seen_LS = torch.zeros(own[0].shape[1], before + own[1].shape[1], dtype=torch.bool)
    for (start, end), spans in rows:
        for lo, hi in (*prefix, *((before + lo, before + hi) for lo, hi in spans)):
            seen_LS[start:end, lo:hi] = True
    sees_L = seen_LS.any(1)
    scale = 0.7 * own[0].shape[-1] ** -0.5
    do = torch.randn(own[0].shape).to(own[0].dtype) if do is None else do

    def run(dtype: torch.dtype) -> tuple[Tensor, Tensor, tuple[Tensor, ...]]:
        q, k, v = (t.detach().to(dtype).requires_grad_() for t in own)
        k_all, v_all = k, v
        if past:
            k_all = torch.cat((past[0].to(dtype), k), 1)
            v_all = torch.cat((past[1].to(dtype), v), 1)
        o, lse = attend(q, k_all, v_all, seen_LS, scale)
        grads = torch.autograd.grad(o[:, sees_L], (q, k, v), do[:, sees_L].to(dtype))
        return o.detach(), lse, grads

    o, lse, exact = run(torch.float64)
    _, _, eager = run(own[0].dtype)
    o, lse = o.to(own[0].dtype).contiguous(), lse.float().contiguous()
    seed = random.randrange(1000) if seed is None else seed
    with nan_filled(), emulate(seed, launches):
        if module is hopper_bwd or hasattr(module, "attention_bwd"):
            past_or_none = past or (None, None)
            got = module.attention_bwd(
                do, *own, o, lse, rows, *past_or_none, prefix, scale, deterministic
            )
        else:
            got = module.fused_backward(do, *own, lse, row_delta(do, o), rows, scale)
    for name, *three in zip(("dq", "dk", "dv"), got, eager, exact, strict=True):
        close_as_eager(f"{name} (emulator's seed {seed})", *three)
    return got


@pytest.mark.parametrize("name", LAYOUTS)
def test_every_pattern(name: str) -> None:
    sizes = [(1, 1, 128, BF16), (2, 1, 64, FP16), (1, 2, 64, BF16)]
    random.shuffle(sizes)
    for tile, size in zip(TILES, sizes, strict=True):
        with launch.using(**settings(tile)):
            check_bwd(new(LAYOUTS[name], *size), rows_of(LAYOUTS[name]))


@pytest.mark.parametrize("dtype", [BF16, FP16])
@pytest.mark.parametrize("head_dim", [64, 128])
def test_default_settings(head_dim: int, dtype: torch.dtype) -> None:
    layout = BlockLayout.causal(2, 1, 131)
    check_bwd(new(layout, 1, 2, head_dim, dtype), rows_of(layout))


@pytest.mark.parametrize("spans", [((0, 90),), ((0, 31), (64, 65), (70, 90))], ids=str)
@pytest.mark.parametrize("tile", TILES, ids=str)
def test_prefix(tile: Tile, spans: tuple[Span, ...]) -> None:
    layout = BlockLayout.causal(3, 1, 50)
    past = tuple(torch.randn(2, 90, 2, 64).half() for _ in range(2))
    with launch.using(**settings(tile)):
        check_bwd((*new(layout, 2, 2, 64, FP16), *past), rows_of(layout), spans)


@pytest.mark.parametrize("tile", TILES, ids=str)
def test_unseen_keys_and_blind_queries(tile: Tile) -> None:
    """Keys that nobody sees get zeros, as do queries that see nothing. Those have an lse of -inf
    and a delta of NaN, which lie beside the ones that a tile visits."""
    rows = (((0, 70), ((5, 40), (77, 150))), ((70, 90), ()), ((90, 140), ((0, 5), (77, 80))))
    q = torch.randn(2, 140, 2, 64).half()
    k, v = (torch.randn(2, 230, 2, 64).half() for _ in range(2))
    with launch.using(**settings(tile)):
        dq, dk, dv = check_bwd((q, k, v), rows)
    assert not dq[:, 70:90].any()
    for grad in (dk, dv):
        assert not grad[:, 40:77].any() and not grad[:, 150:].any()


def test_strided_tensors() -> None:
    """q, k, v as thirds of a projection, some heads of several, do as autograd may give it."""
    layout = BlockLayout.causal(2, 1, 70)
    rows = rows_of(layout)
    with launch.using(**settings(TILES[1])):
        q, k, v = torch.randn(2, layout.tokens, 3, 2, 64).half().unbind(2)
        check_bwd((q, k, v), rows)
        check_bwd((q, k, v), rows, do=torch.randn(2, 2, layout.tokens, 64).half().transpose(1, 2))
        check_bwd((q, k, v), rows, do=torch.ones((), dtype=FP16).expand(q.shape))
        check_bwd((q[:, :, 1:], k[:, :, 1:], v[:1, :, 1:].expand(2, -1, -1, -1)), rows)


def test_same_bits_in_any_order_of_events() -> None:
    layout = BlockLayout.causal(3, 1, 75)
    tensors = new(layout, 1, 1, 64, FP16)
    do = torch.randn(tensors[0].shape).half()
    with launch.using(**settings(TILES[0])):
        first, second = (check_bwd(tensors, rows_of(layout), do=do, seed=seed) for seed in (0, 1))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("deterministic", [False, True])
def test_memory_between_samples_may_hold_anything(deterministic: bool) -> None:
    longer = torch.full((3, 2, 160, 1, 128), torch.nan).half()
    longer[:, :, :100] = torch.randn(100, 1, 128)
    do = torch.full((2, 160, 1, 128), torch.nan).half()
    do[:, :100] = torch.randn(100, 1, 128)
    layout = BlockLayout.causal(2, 1, 50)
    own = tuple(longer[:, :, :100])
    check_bwd(own, rows_of(layout), do=do[:, :100], deterministic=deterministic)


FUSED = Tile(128, 64, 4, 2)


def check_fused(tensors: tuple[Tensor, ...], rows: Pattern, **more: Any) -> tuple[Tensor, ...]:
    launches: list[str] = []
    with launch.using(hopper_bwd=FUSED):
        got = check_bwd(tensors, rows, deterministic=False, launches=launches, **more)
    assert launches[-1] == "_hopper_bwd_kernel"
    return got


@pytest.mark.parametrize("name", LAYOUTS)
def test_fused_every_pattern(name: str) -> None:
    layout = LAYOUTS[name]
    check_fused(new(layout, *random.choice([(1, 2), (2, 1)]), 128, BF16), rows_of(layout))


def test_fused_in_float16() -> None:
    layout = BlockLayout.causal(2, 1, 131)
    check_fused(new(layout, 2, 2, 128, FP16), rows_of(layout))


def test_fused_strided_tensors() -> None:
    """q, k, v as thirds of a projection, do as autograd may give it."""
    layout = BlockLayout.causal(2, 1, 70)
    rows = rows_of(layout)
    q, k, v = torch.randn(2, layout.tokens, 3, 2, 128).half().unbind(2)
    check_fused((q, k, v), rows)
    check_fused((q, k, v), rows, do=torch.randn(2, 2, layout.tokens, 128).half().transpose(1, 2))
    check_fused((q[:, :, 1:], k[:, :, 1:], v[:1, :, 1:].expand(2, -1, -1, -1)), rows)


def test_fused_unseen_keys_and_blind_queries() -> None:
    rows = (((0, 70), ((5, 40), (77, 150))), ((70, 90), ()), ((90, 140), ((0, 5), (77, 80))))
    q = torch.randn(2, 140, 2, 128).half()
    k, v = (torch.randn(2, 230, 2, 128).half() for _ in range(2))
    dq, dk, dv = check_fused((q, k, v), rows)
    assert not dq[:, 70:90].any()
    for grad in (dk, dv):
        assert not grad[:, 40:77].any() and not grad[:, 150:].any()


def test_who_computes_what() -> None:
    """One kernel where no bits, no prefix and no short heads stand against it."""
    layout = BlockLayout.causal(2, 1, 20)
    past = tuple(torch.randn(1, 9, 1, 128).half() for _ in range(2))
    for head_dim, deterministic, prefix, fused in (
        (128, False, (), True), (128, True, (), False), (64, False, (), False),
        (128, False, past, False),
    ):  # fmt: skip
        launches: list[str] = []
        tensors = (*new(layout, 1, 1, head_dim, FP16), *prefix)
        spans = ((0, 9),) if prefix else ()
        check_bwd(tensors, rows_of(layout), spans, deterministic=deterministic, launches=launches)
        assert ("_hopper_bwd_kernel" in launches) == fused, launches


def test_what_tma_cannot_read_is_named() -> None:
    rows = rows_of(BlockLayout.causal(2, 1, 4))
    good = torch.zeros(2, 8, 2, 64, dtype=BF16)
    apart = torch.zeros(2, 2, 8, 64, dtype=BF16).transpose(1, 2)
    lse = torch.zeros(2, 2, 8)
    calls: dict[str, Callable[[], object]] = {
        "q has strides": lambda: hopper_bwd.attention_bwd(
            good, apart, good, good, good, lse, rows, None, None, (), 0.1, True
        ),
        "v has strides": lambda: hopper_bwd.attention_bwd(
            good, good, good, apart, good, lse, rows, None, None, (), 0.1, True
        ),
        "prefix k has strides": lambda: hopper_bwd.attention_bwd(
            good, good, good, good, good, lse, rows, apart, good, ((0, 8),), 0.1, True
        ),
    }
    for message, call in calls.items():
        with pytest.raises(ValueError, match=f"^{message} .* impl='gluon'"), emulate():
            call()


# Mutants of the kernels: pieces of their text, and what replaces each.
# fmt: off
# Queries are visited:
KV_FULL = "    mbarrier.wait(full.index(slot), t // STAGES & 1)\n    s_MN"
KV_WAIT_S = "    s_MN = warpgroup_mma_wait(1, deps=[s_MN])\n"
KV_WAIT_DP = "    dp_MN = warpgroup_mma_wait(1, deps=[dp_MN])\n    delta_N"
KV_WAIT = "            dk_MD, dv_MD = warpgroup_mma_wait(0, deps=[dk_MD, dv_MD])\n"
KV_DONE = "            hardware.arrive(FREE + slot, 4, ALL)\n"
KV_KEPT_DONE = "        mbarrier.arrive(kept_empty.index(c), count=1)\n        done += count\n"
KV_LOOP = "        for t in range(done, done + count):\n"
KV_KEPT = ("        mbarrier.wait(kept_full.index(c), (item - begin) & 1)\n" + KV_LOOP, KV_LOOP)
# Keys are visited:
Q_FULL = "                mbarrier.wait(full.index(slot), t // STAGES & 1)\n                k_DN"
Q_WAIT_S = "                s_MN = warpgroup_mma_wait(2, deps=[s_MN])\n"
Q_WAIT_DP = "                dp_MN = warpgroup_mma_wait(1, deps=[dp_MN])\n"
Q_WAIT = "                dq_MD, dp_MN = warpgroup_mma_wait(0, deps=[dq_MD, dp_MN])\n"
Q_OPERAND = """\
                # Into the registers that the product has read.
                ds_MN = operand(dp_MN, q_s.dtype, D)
"""
Q_DONE = """\
                if t > began:
                    hardware.arrive(FREE + before, 4, ALL)
"""
Q_KEPT_DONE = "        mbarrier.arrive(kept_empty.index(c), count=1)\n        if t"
Q_BEGAN = "        began = t\n"
Q_LOAD = "        q_MD = q_s"
Q_KEPT = ("        mbarrier.wait(kept_full.index(c), (item - begin) & 1)\n" + Q_LOAD, Q_LOAD)
Q_LAST_WAIT = "            dq_MD = warpgroup_mma_wait(0, deps=[dq_MD])\n            h"
Q_LAST_DONE = "            hardware.arrive(FREE + last, 4, ALL)\n"
# The loading warp:
FREE = "            hardware.meet(FREE + slot, 1, ALL)\n"
KEPT_FREE = "            mbarrier.wait(kept_empty.index(c), turn ^ 1)\n"
STATS = ("            lse_s.index(slot).store(lse_N)\n"
         "            delta_s.index(slot).store(delta_N)\n")
STATS_DONE = "            mbarrier.arrive(full.index(slot), count=1)\n"
MUTANTS = {
    "Q and dO released early": {KV_WAIT + KV_DONE: KV_DONE + KV_WAIT},
    "Q and dO never released": {KV_DONE: ""},
    "Q and dO released twice": {KV_DONE: KV_DONE + KV_DONE},
    "K and V released early": {KV_KEPT_DONE: "        done += count\n",
                               KV_LOOP: KV_KEPT_DONE.split("\n")[0] + "\n" + KV_LOOP},
    "wrong phase of Q and dO": {KV_FULL: KV_FULL.replace("& 1", "& 1 ^ 1")},
    "no wait for Q and dO": {KV_FULL: "    s_MN"},
    "no wait for K and V": {KV_KEPT[0]: KV_KEPT[1]},
    "no wait for S by queries": {KV_WAIT_S: ""},
    "too few waited for at S by queries": {KV_WAIT_S: KV_WAIT_S.replace("1", "2")},
    "no wait for dP by queries": {KV_WAIT_DP: "    delta_N"},
    "too few waited for at dP by queries": {KV_WAIT_DP: KV_WAIT_DP.replace("1", "2")},
    "dK still in flight": {KV_WAIT: KV_WAIT.replace("0", "1")},
    "K released early": {Q_WAIT + Q_OPERAND + Q_DONE: Q_DONE + Q_WAIT + Q_OPERAND},
    "K and V never released": {Q_DONE: ""},
    "this K released, not the one before": {Q_DONE: Q_DONE.replace("before", "slot")},
    "the first K released twice": {Q_DONE: Q_DONE.replace("t > began", "True")},
    "the last K not released": {Q_LAST_DONE: ""},
    "the last K released early": {
        Q_LAST_WAIT: Q_LAST_DONE + "            dq_MD = warpgroup_mma_wait(0, deps=[dq_MD])\n#"},
    "Q released early": {Q_KEPT_DONE: "        if t", Q_BEGAN: Q_BEGAN + Q_KEPT_DONE[:-12] + "\n"},
    "no wait for Q": {Q_KEPT[0]: Q_KEPT[1]},
    "wrong phase of K": {Q_FULL: Q_FULL.replace("& 1", "& 1 ^ 1")},
    "no wait for K": {Q_FULL: "                k_DN"},
    "no wait for S by keys": {Q_WAIT_S: ""},
    "too few waited for at S by keys": {Q_WAIT_S: Q_WAIT_S.replace("2", "3")},
    "too few waited for at dP by keys": {Q_WAIT_DP: Q_WAIT_DP.replace("1", "2")},
    "dQ still in flight": {Q_WAIT: Q_WAIT.replace("0", "1")},
    "no mask of keys": {"if start + N > hi:": "if False:"},
    "no mask of queries": {'at_N < hi, float("inf"))': "at_N < hi, 0.0)"},
    "no wait for a free buffer": {FREE: "            pass\n"},
    "a wait for another buffer": {FREE: FREE.replace("slot", "(slot + 1) % STAGES")},
    "no wait for a free kept tile": {KEPT_FREE: ""},
    "the same phase in every turn": {KEPT_FREE: KEPT_FREE.replace("turn", "0")},
    "lse and delta stored late": {STATS + STATS_DONE: STATS_DONE + STATS},
    "lse and delta not awaited": {"count=2 if HAS_STATS else 1": "count=1", STATS_DONE: ""},
    "one consumer awaited": {FREE: FREE.replace("ALL", "160")},
    "the last buffers are left": {"range(gl.maximum(t - STAGES, 0), t)": "range(0)"},
    "fewer bytes expected than come": {"nbytes + y_desc.block_type.nbytes)": "nbytes)"},
    "rows beyond the tile written": {"dq_MD * scale, first, past": "dq_MD * scale, first, queries"},
}
# fmt: on


def mutant_of(kernels: ModuleType, changes: Mapping[str, str], folder: Path) -> ModuleType:
    """A module of kernels with changes to its text, or to that of what the kernels share."""
    shared = Path(backward_loading.__file__).read_text()
    if all(piece in shared for piece in changes):
        return mutant(backward_loading, changes, folder, kernels)
    return mutant(kernels, changes, folder)


@pytest.mark.parametrize("name", MUTANTS)
def test_emulator_catches(name: str, tmp_path: Path) -> None:
    module = mutant_of(hopper_bwd, MUTANTS[name], tmp_path)
    layout = BlockLayout.causal(2, 1, 150)
    tensors = new(layout, 2, 1, 64, FP16)
    with launch.using(**settings(Tile(128, 32, 4, 2))):
        with pytest.raises(Exception) as caught:  # an error of the hardware, NaN, or other numbers
            for seed in range(5):
                check_bwd(tensors, rows_of(layout), module=module, seed=seed)
        print(f"{name}: {caught.type.__name__}: {caught.value}")


# fmt: off
F_FULL = "    mbarrier.wait(full.index(slot), t // STAGES & 1)\n"
F_WAIT_S = "    s_MN = warpgroup_mma_wait(1, deps=[s_MN])\n"
F_WAIT_DP = "    dp_MN = warpgroup_mma_wait(1, deps=[dp_MN])\n"
F_STORE = "            ds_s.index(t % 2 * CONSUMERS + c).store(ds_MN)\n"
F_FENCE = "            fence_async_shared()\n            hardware.meet(MET"
F_MEET = "            hardware.meet(MET, 4, BOTH)\n"
F_WAIT = "            dv_MD, dq_NE = warpgroup_mma_wait(1, deps=[dv_MD, dq_NE])\n"
F_READ = "            if t > 0:\n                hardware.meet(READ + c, 4, PAIR)\n"
F_OUT = "            dq_s.index(c).store(dq_NE)\n"
F_OUT_FENCE = "            fence_async_shared()\n            hardware.arrive(SUMMED"
F_SUMMED = "            hardware.arrive(SUMMED + c, 4, PAIR)\n"
F_LAST = "            dk_MD = warpgroup_mma_wait(0, deps=[dk_MD])\n"
F_DONE = "            hardware.arrive(FREE + slot, 4, ALL)\n"
F_KEPT = "        mbarrier.wait(kept_full.index(c), (item - begin) & 1)\n"
F_KEPT_DONE = "        for other in gl.static_range(CONSUMERS):  # both have read both tiles of K\n"
F_END = "    if done > 0:\n        hardware.meet(READ + c, 4, PAIR)\n"
F_ADDED = "                    tma.store_wait(CONSUMERS - 1 - c)\n"
F_COME = "                    hardware.meet(SUMMED + c, 1, PAIR)\n"
FUSED_MUTANTS = {
    "no wait for Q and dO": {F_FULL: ""},
    "wrong phase of Q and dO": {F_FULL: F_FULL.replace("& 1", "& 1 ^ 1")},
    "no wait for S": {F_WAIT_S: ""},
    "too few waited for at dP": {F_WAIT_DP: F_WAIT_DP.replace("1", "2")},
    "nobody meets": {F_MEET: ""},
    "they meet before they store": {F_MEET: "", F_STORE: F_MEET + F_STORE},
    "one tile of dS": {F_STORE: F_STORE.replace("t % 2 * CONSUMERS + ", ""),
                       "ds_s.index(t % 2 * CONSUMERS + other)": "ds_s.index(other)"},
    "no fence after dS": {F_FENCE: "            hardware.meet(MET"},
    "no fence after dQ": {F_OUT_FENCE: "            hardware.arrive(SUMMED"},
    "dQ overwritten before it is read": {F_READ: "", F_END: ""},
    "the first dQ waited for": {F_READ: "            hardware.meet(READ + c, 4, PAIR)\n"},
    "the last dQ is left": {F_END: ""},
    "the other consumer's dQ waited for": {F_READ: F_READ.replace("+ c", "+ 1 - c")},
    "dQ said to be there too early": {F_SUMMED: "", F_OUT: F_SUMMED + F_OUT},
    "dQ not waited for": {F_COME: ""},
    "dQ said to be read too early": {F_ADDED: ""},
    "too few tiles of dQ waited for": {F_ADDED: F_ADDED.replace("- 1 - c", "- c")},
    "dQ still in flight": {F_WAIT: F_WAIT.replace("wait(1", "wait(2")},
    "dK still in flight": {F_LAST: F_LAST.replace("0", "1")},
    "Q released early": {F_LAST + F_DONE: F_DONE + F_LAST},
    "Q never released": {F_DONE: ""},
    "no wait for K and V": {F_KEPT: ""},
    "K released by one": {F_KEPT_DONE: "        for other in (c, c):\n"},
    "keys of others in dQ": {"if rest < M:": "if False:"},
    "the other half of dQ": {"col + c * (D // 2)": "col + (1 - c) * (D // 2)"},
    "the other half of K": {"slice(c * HALF": "slice((1 - c) * HALF"},
    "dQ of one consumer's keys": {"use_acc=other > 0": "use_acc=False"},
}
# fmt: on


@pytest.mark.parametrize("name", FUSED_MUTANTS)
def test_emulator_catches_in_the_fused_kernel(name: str, tmp_path: Path) -> None:
    module = mutant_of(fused_backward, FUSED_MUTANTS[name], tmp_path)
    layout = BlockLayout.causal(2, 1, 150)
    tensors, rows = new(layout, 2, 1, 128, FP16), rows_of(layout)
    with launch.using(hopper_bwd=FUSED):
        with pytest.raises(Exception) as caught:  # an error of the hardware, NaN, or other numbers
            for seed in range(5):
                check_bwd(tensors, rows, module=module, seed=seed)
        print(f"{name}: {caught.type.__name__}: {caught.value}")
        check_bwd(tensors, rows, seed=0, deterministic=False)
