"""The Gluon kernels of attention's backward pass in the emulator of Hopper: parity of gradients
with float64, and that the emulator sees what is wrong with mutants of the kernels."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch import Tensor

from sfkernels import BlockLayout, launch
from sfkernels.gpu.hopper import attention_backward as hopper_bwd
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
) -> tuple[Tensor, ...]:
    """tensors: q, k, v and, with a prefix, its k and v."""
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
    with nan_filled(), emulate(seed):
        got = module.attention_bwd(do, *own, o, lse, rows, *(past or (None, None)), prefix, scale)
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


def test_what_tma_cannot_read_is_named() -> None:
    rows = rows_of(BlockLayout.causal(2, 1, 4))
    good = torch.zeros(2, 8, 2, 64, dtype=BF16)
    apart = torch.zeros(2, 2, 8, 64, dtype=BF16).transpose(1, 2)
    lse = torch.zeros(2, 2, 8)
    calls: dict[str, Callable[[], object]] = {
        "q has strides": lambda: hopper_bwd.attention_bwd(
            good, apart, good, good, good, lse, rows, None, None, (), 0.1
        ),
        "v has strides": lambda: hopper_bwd.attention_bwd(
            good, good, good, apart, good, lse, rows, None, None, (), 0.1
        ),
        "prefix k has strides": lambda: hopper_bwd.attention_bwd(
            good, good, good, good, good, lse, rows, apart, good, ((0, 8),), 0.1
        ),
    }
    for message, call in calls.items():
        with pytest.raises(ValueError, match=f"^{message} .* impl='gluon'"), emulate():
            call()


# Mutants of the kernels: pieces of their text, and what replaces each.
# fmt: off
# Queries are visited:
KV_FULL = "            mbarrier.wait(full.index(slot), t // STAGES & 1)\n            s_MN"
KV_WAIT_S = "            s_MN = warpgroup_mma_wait(1, deps=[s_MN])\n"
KV_WAIT_DP = "            dp_MN = warpgroup_mma_wait(1, deps=[dp_MN])\n            delta_N"
KV_WAIT = "            dk_MD, dv_MD = warpgroup_mma_wait(0, deps=[dk_MD, dv_MD])\n"
KV_DONE = "            mbarrier.arrive(empty.index(slot), count=1)\n"
KV_KEPT_DONE = "        mbarrier.arrive(kept_empty.index(c), count=1)\n        done += count\n"
KV_LOOP = "        for t in range(done, done + count):\n"
KV_KEPT = ("        mbarrier.wait(kept_full.index(c), (item - begin) & 1)\n" + KV_LOOP, KV_LOOP)
# Keys are visited:
Q_FULL = "                mbarrier.wait(full.index(slot), t // STAGES & 1)\n                k_DN"
Q_WAIT_S = "                s_MN = warpgroup_mma_wait(2, deps=[s_MN])\n"
Q_WAIT_DP = "                dp_MN = warpgroup_mma_wait(1, deps=[dp_MN])\n"
Q_WAIT = "                dq_MD = warpgroup_mma_wait(0, deps=[dq_MD])\n"
Q_DONE = "                mbarrier.arrive(empty.index(before), count=1, pred=t > began)\n"
Q_KEPT_DONE = "        mbarrier.arrive(kept_empty.index(c), count=1)\n        if t"
Q_BEGAN = "        began = t\n"
Q_LOAD = "        q_MD = q_s"
Q_KEPT = ("        mbarrier.wait(kept_full.index(c), (item - begin) & 1)\n" + Q_LOAD, Q_LOAD)
Q_LAST_WAIT = "            dq_MD = warpgroup_mma_wait(0, deps=[dq_MD])\n            mb"
Q_LAST_DONE = "            mbarrier.arrive(empty.index(last), count=1)\n"
# The loading warp:
FREE = "        mbarrier.wait(empty.index(slot), t // STAGES & 1 ^ 1)\n"
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
    "no wait for Q and dO": {KV_FULL: "            s_MN"},
    "no wait for K and V": {KV_KEPT[0]: KV_KEPT[1]},
    "no wait for S by queries": {KV_WAIT_S: ""},
    "too few waited for at S by queries": {KV_WAIT_S: KV_WAIT_S.replace("1", "2")},
    "no wait for dP by queries": {KV_WAIT_DP: "            delta_N"},
    "too few waited for at dP by queries": {KV_WAIT_DP: KV_WAIT_DP.replace("1", "2")},
    "dK still in flight": {KV_WAIT: KV_WAIT.replace("0", "1")},
    "K released early": {Q_WAIT + Q_DONE: Q_DONE + Q_WAIT},
    "K and V never released": {Q_DONE: ""},
    "this K released, not the one before": {Q_DONE: Q_DONE.replace("before", "slot")},
    "the first K released twice": {Q_DONE: Q_DONE.replace(", pred=t > began", "")},
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
    "dQ still in flight": {Q_WAIT + Q_DONE: Q_WAIT.replace("0", "1") + Q_DONE},
    "no mask of keys": {"if start + N > hi:": "if False:"},
    "no mask of queries": {'at_N < hi, float("inf"))': "at_N < hi, 0.0)"},
    "no wait for a free buffer": {FREE: ""},
    "wrong phase of a free buffer": {FREE: FREE.replace(" ^ 1", "")},
    "no wait for a free kept tile": {KEPT_FREE: ""},
    "the same phase in every turn": {KEPT_FREE: KEPT_FREE.replace("turn", "0")},
    "lse and delta stored late": {STATS + STATS_DONE: STATS_DONE + STATS},
    "lse and delta not awaited": {"count=2 if HAS_STATS else 1": "count=1", STATS_DONE: ""},
    "one consumer awaited": {"(empty.index(i), count=CONSUMERS)": "(empty.index(i), count=1)"},
    "fewer bytes expected than come": {"nbytes + y_desc.block_type.nbytes)": "nbytes)"},
    "rows beyond the tile written": {"dq_MD * scale, first, past": "dq_MD * scale, first, queries"},
}
# fmt: on


@pytest.mark.parametrize("name", MUTANTS)
def test_emulator_catches(name: str, tmp_path: Path) -> None:
    module = mutant(hopper_bwd, MUTANTS[name], tmp_path)
    layout = BlockLayout.causal(2, 1, 150)
    tensors = new(layout, 2, 1, 64, FP16)
    with launch.using(**settings(Tile(128, 32, 4, 2))):
        with pytest.raises(Exception) as caught:  # an error of the hardware, NaN, or other numbers
            for seed in range(5):
                check_bwd(tensors, rows_of(layout), module=module, seed=seed)
        print(f"{name}: {caught.type.__name__}: {caught.value}")
