"""The Gluon kernel of attention's forward pass in the emulator of Hopper: parity with float64, and
that the emulator sees what is wrong with mutants of the kernel."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

from sfkernels import BlockLayout, RingKVCache, launch
from sfkernels.gpu.hopper import attention as hopper
from sfkernels.gpu.hopper import work
from sfkernels.gpu.tiles import visits
from sfkernels.kv_cache import semaphores_needed
from sfkernels.launch import Tile
from sfkernels.layout import Span
from sfkernels.testing import close_as_eager, nan_filled
from tests.hopper_cases import BF16, FP16, LAYOUTS, TILES, attend, mutant, new, rows_of
from tests.hopper_emulator import emulate
from tests.hopper_machine import Copy, HopperError

pytestmark = [
    pytest.mark.usefixtures("fresh_seed"),
    pytest.mark.skipif(torch.cuda.is_available(), reason="for CPU tensors"),
]


def check_fwd(
    tensors: tuple[Tensor, ...],
    layout: BlockLayout,
    prefix: tuple[Span, ...] = (),
    module: ModuleType = hopper,
    seed: int | None = None,
) -> None:
    """tensors: q, k, v and, with a prefix, its k and v."""
    q, k, v, *past = tensors
    scale = 0.7 * q.shape[-1] ** -0.5
    seed = random.randrange(1000) if seed is None else seed
    with nan_filled(), emulate(seed):
        o, lse = module.attention_fwd(
            q, k, v, rows_of(layout), *(past or (None, None)), prefix, scale
        )
    seen = layout.dense_mask()
    if past:
        k, v = torch.cat((past[0], k), 1), torch.cat((past[1], v), 1)
        seen_prefix = torch.zeros(layout.tokens, past[0].shape[1], dtype=torch.bool)
        for lo, hi in prefix:
            seen_prefix[:, lo:hi] = True
        seen = torch.cat((seen_prefix, seen), 1)
    eager, _ = attend(q, k, v, seen, scale)
    exact, exact_lse = attend(q.double(), k.double(), v.double(), seen, scale)
    close_as_eager(f"o (emulator's seed {seed})", o, eager, exact)
    assert (lse - exact_lse).abs().max() < 1e-5


@pytest.mark.parametrize("name", LAYOUTS)
def test_every_pattern(name: str) -> None:
    sizes = [(1, 1, 128, BF16), (2, 1, 64, FP16), (1, 2, 64, BF16)]
    random.shuffle(sizes)
    for tile, size in zip(TILES, sizes, strict=True):
        with launch.using(hopper_fwd=tile):
            check_fwd(new(LAYOUTS[name], *size), LAYOUTS[name])


@pytest.mark.parametrize("dtype", [BF16, FP16])
@pytest.mark.parametrize("head_dim", [64, 128])
def test_default_settings(head_dim: int, dtype: torch.dtype) -> None:
    layout = BlockLayout.causal(3, 1, 131)
    check_fwd(new(layout, 1, 2, head_dim, dtype), layout)


@pytest.mark.parametrize("spans", [((0, 90),), ((0, 31), (64, 65), (70, 90))], ids=str)
@pytest.mark.parametrize("tile", TILES, ids=str)
def test_prefix(tile: Tile, spans: tuple[Span, ...]) -> None:
    layout = BlockLayout.causal(3, 1, 50)
    past = tuple(torch.randn(2, 90, 2, 64).half() for _ in range(2))
    with launch.using(hopper_fwd=tile):
        check_fwd((*new(layout, 2, 2, 64, FP16), *past), layout, spans)


def test_strided_tensors() -> None:
    """q, k, v as thirds of a projection, k as a slice of a longer tensor, one head of several."""
    layout = BlockLayout.causal(2, 1, 70)
    with launch.using(hopper_fwd=TILES[0]):
        q, k, v = torch.randn(2, layout.tokens, 3, 2, 64).to(BF16).unbind(2)
        check_fwd((q, k, v), layout)
        longer = torch.randn(2, 2 * layout.tokens, 2, 64).to(BF16)[:, layout.tokens :]
        check_fwd((q, longer, v), layout)
        check_fwd((q[:, :, 1:], k[:, :, 1:], v[:1, :, 1:].expand(2, -1, -1, -1)), layout)


def check_ring(
    programs: int,
    valid: int,
    dtype: torch.dtype,
    monkeypatch: pytest.MonkeyPatch,
    module: ModuleType = hopper,
    queries: int = 150,
) -> None:
    """programs: that share the ring's tiles, four where there are 150 queries."""
    batch, heads, head_dim, slots = 2, 1, 64, 250
    q = torch.randn(batch, queries, heads, head_dim).to(dtype)
    k, v = torch.randn(2, batch, slots, heads, head_dim).to(dtype).unbind()
    near = min(max(valid, 1), slots)
    k[:, near:], v[:, near:] = 1000.0, 1000.0  # finite, and never to be seen
    length = torch.tensor(valid, dtype=random.choice([torch.int32, torch.int64]))
    shared_by(programs, monkeypatch)
    launches: list[str] = []
    seed = random.randrange(1000)
    semaphores = torch.zeros(semaphores_needed(batch, queries, heads), dtype=torch.int32)
    with nan_filled(), emulate(seed, launches):
        o = module.ring_attention(q, k, v, length, semaphores, 0.1)
    assert len(launches) == 1 and not semaphores.any()
    seen = (torch.arange(slots) < near).expand(queries, slots)
    eager, _ = attend(q, k, v, seen, 0.1)
    exact, _ = attend(q.double(), k.double(), v.double(), seen, 0.1)
    close_as_eager(f"o of {valid} by {programs} (emulator's seed {seed})", o, eager, exact)


def shared_by(programs: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Lets tiles be cut between so many programs, however short the parts are."""
    monkeypatch.setattr(launch, "multiprocessors", lambda _: programs)
    monkeypatch.setattr(work, "JOIN", 0)


@pytest.mark.parametrize("programs", [1, 3, 8, 13])
def test_ring_of_any_length(programs: int, monkeypatch: pytest.MonkeyPatch) -> None:
    for valid in (1, 31, 32, 33, 64, 65, random.randint(66, 249), 250):
        with launch.using(hopper_fwd=random.choice(TILES)):
            check_ring(programs, valid, FP16, monkeypatch)


@pytest.mark.parametrize("queries", [1, 16, 17, 64, 65, 128])
def test_few_queries(queries: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """As many semaphores as a cache has are enough."""
    with launch.using(hopper_fwd=TILES[0]):
        check_ring(7, 250, FP16, monkeypatch, queries=queries)


@pytest.mark.parametrize(("programs", "valid"), [(1, -3), (9, 0), (1, 251), (9, 2**31 - 1)])
def test_a_length_out_of_range(programs: int, valid: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Counts as the nearest in range."""
    with launch.using(hopper_fwd=TILES[0]):
        check_ring(programs, valid, FP16, monkeypatch)


@pytest.mark.parametrize("programs", [1, 9])
def test_ring_in_bfloat16(programs: int, monkeypatch: pytest.MonkeyPatch) -> None:
    with launch.using(hopper_fwd=TILES[0]):
        check_ring(programs, 77, BF16, monkeypatch)


def test_samples_at_different_lengths(monkeypatch: pytest.MonkeyPatch) -> None:
    shared_by(7, monkeypatch)
    q, k, v = torch.randn(3, 3, 160, 2, 64).half().unbind()
    valid = torch.tensor([1, 160, 70], dtype=torch.int32)
    with launch.using(hopper_fwd=TILES[0]), nan_filled(), emulate(random.randrange(1000)):
        o = hopper.ring_attention(q, k, v, valid, None, 0.1)
    for sample, count in enumerate(valid.tolist()):
        each = slice(sample, sample + 1)
        seen = (torch.arange(160) < count).expand(160, 160)
        eager, _ = attend(q[each], k[each], v[each], seen, 0.1)
        exact, _ = attend(q[each].double(), k[each].double(), v[each].double(), seen, 0.1)
        close_as_eager(f"o of sample {sample}", o[each], eager, exact)


def test_parts_are_joined_in_one_order(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever ends last: the same numbers, bit for bit, in a stream and when it is run again."""
    shared_by(11, monkeypatch)
    q, k, v = torch.randn(3, 1, 160, 2, 64).half().unbind()
    outs = []
    for seed in range(4):
        with launch.using(hopper_fwd=TILES[0]), nan_filled(), emulate(seed):
            outs.append(hopper.ring_attention(q, k, v, torch.tensor(160), None, 0.1))
    assert all(torch.equal(o, outs[0]) for o in outs)


@pytest.mark.parametrize("name", LAYOUTS)
def test_tiles_of_a_pattern_are_shared(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    shared_by(random.choice([5, 7, 23]), monkeypatch)
    with launch.using(hopper_fwd=TILES[0]):
        check_fwd(new(LAYOUTS[name], 1, 2, 64, FP16), LAYOUTS[name])


def test_tiles_with_a_prefix_are_shared(monkeypatch: pytest.MonkeyPatch) -> None:
    shared_by(7, monkeypatch)
    layout = BlockLayout.causal(3, 1, 50)
    past = tuple(torch.randn(2, 90, 2, 64).half() for _ in range(2))
    with launch.using(hopper_fwd=TILES[0]):
        check_fwd((*new(layout, 2, 2, 64, FP16), *past), layout, ((0, 31), (64, 65), (70, 90)))


def test_streaming_equals_one_pass() -> None:
    """Chunk by chunk through a ring with a sink, past the wrap; its length is read on the device,
    and what its slots hold from chunk to chunk is another thing each time."""
    chunk, tokens, window, sink = 2, 35, 5, 1
    layout = BlockLayout.causal(10, chunk, tokens, window=window, sink=sink)
    q, k, v = new(layout, 1, 1, 64, FP16)
    cache = RingKVCache(layers=1, batch=1, window=window, sink=sink, frame_tokens=tokens, heads=1,
                        head_dim=64, dtype=FP16)  # fmt: skip
    eager, _ = attend(q, k, v, layout.dense_mask(), 0.1)
    exact, _ = attend(q.double(), k.double(), v.double(), layout.dense_mask(), 0.1)
    outs = []
    for part in torch.arange(layout.tokens).split(chunk * tokens):
        at = cache.chunk(chunk)
        for ring, source in ((cache.k[0], k), (cache.v[0], v)):
            by_frame = ring.unflatten(1, (window, tokens))
            by_frame[:, at.slot_F.long()] = source[:, part].unflatten(1, (chunk, tokens))
        with launch.using(hopper_fwd=TILES[0]), nan_filled(), emulate(random.randrange(1000)):
            by_chunk = cache.k[0], cache.v[0], at.valid, cache.semaphores
            outs.append(hopper.ring_attention(q[:, part], *by_chunk, 0.1))
        cache.commit(chunk)
    close_as_eager("o of a stream", torch.cat(outs, 1), eager, exact)


@pytest.mark.parametrize("batch", [1, 2])
def test_memory_that_is_not_attended_to_may_hold_anything(batch: int) -> None:
    """Between samples, and behind what is seen of a prefix."""
    layout = BlockLayout.causal(2, 1, 50)
    longer = torch.full((3, batch, 160, 1, 64), torch.nan).half()
    longer[:, :, :100] = torch.randn(3, batch, 100, 1, 64)
    q, k, v = longer[:, :, :100]
    past = torch.full((2, batch, 200, 1, 64), torch.nan).half()
    past[:, :, :90] = torch.randn(2, batch, 90, 1, 64)
    with launch.using(hopper_fwd=TILES[1]):
        check_fwd((q, k, v), layout)
        check_fwd((q, k, v, *past[:, :, :90]), layout, ((0, 90),))
        outs = []
        for k_past, v_past in (past, past.nan_to_num(7.0)):
            with nan_filled(), emulate(0):
                seen = k_past, v_past, ((0, 90),)
                outs.append(hopper.attention_fwd(q, k, v, rows_of(layout), *seen, 0.1)[0])
    assert torch.equal(*outs) and outs[0].isfinite().all()


def test_a_stream_that_went_nan_ends_with_a_reset() -> None:
    """The last tile reads slots that are not valid yet, times zero."""
    cache = RingKVCache(layers=1, batch=2, window=3, frame_tokens=35, heads=1, head_dim=64,
                        dtype=FP16)  # fmt: skip
    for ring in (cache.k, cache.v):
        ring.fill_(torch.nan)
    cache.commit(3)
    cache.reset()
    cache.k[0, :, :35], cache.v[0, :, :35] = torch.randn(2, 2, 35, 1, 64).half()
    q, valid = torch.randn(2, 35, 1, 64).half(), cache.chunk(1).valid
    with launch.using(hopper_fwd=TILES[0]), nan_filled(), emulate(random.randrange(1000)):
        o = hopper.ring_attention(q, cache.k[0], cache.v[0], valid, cache.semaphores, 0.1)
    want, _ = attend(q, cache.k[0, :, :35], cache.v[0, :, :35], torch.ones(35, 35).bool(), 0.1)
    torch.testing.assert_close(o, want, rtol=2e-2, atol=2e-3)


@pytest.mark.parametrize("name", LAYOUTS)
def test_no_loads_of_tiles_that_see_nothing(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    loads: list[object] = []

    def counting(*args: Any) -> Any:
        loads.append(args)
        return Copy(*args)

    monkeypatch.setattr("tests.hopper_emulator.Copy", counting)
    layout = LAYOUTS[name]
    with launch.using(hopper_fwd=TILES[1]):
        check_fwd(new(layout, 1, 2, 64, FP16), layout)
    tiles = sum(-(-(end - start) // 128) for (start, end), _ in layout.rows)
    # Q in two boxes, and of each tile of keys K and V.
    assert len(loads) == 2 * (2 * tiles + 2 * visits(rows_of(layout), (), 128, 64))


def test_what_tma_cannot_read_is_named() -> None:
    good = torch.zeros(2, 8, 2, 64, dtype=BF16)
    bad: dict[str, Callable[[], Tensor]] = {
        "heads apart": lambda: torch.zeros(2, 2, 8, 64, dtype=BF16).transpose(1, 2),
        "columns apart": lambda: torch.zeros(2, 8, 2, 128, dtype=BF16)[..., ::2],
        "start": lambda: torch.zeros(2 * 8 * 2 * 64 + 1, dtype=BF16)[1:].view(2, 8, 2, 64),
        "tokens": lambda: torch.zeros(2, 8, 132, dtype=BF16)[..., :128].view(2, 8, 2, 64),
        "samples": lambda: torch.zeros(3000, dtype=BF16).as_strided(
            (2, 8, 2, 64), (8 * 128 + 8, 128, 64, 1)
        ),
    }
    layout = BlockLayout.causal(2, 1, 4)
    for name, make in bad.items():
        with pytest.raises(ValueError, match=r"k has strides .* impl='gluon'"), emulate():
            hopper.attention_fwd(good, make(), good, rows_of(layout), None, None, (), 0.1)
            pytest.fail(name)
    with pytest.raises(ValueError, match="float32: impl='gluon' takes"), emulate():
        hopper.attention_fwd(good, good, good.float(), rows_of(layout), None, None, (), 0.1)


# Mutants of the kernel: pieces of its text, and what replaces each.
TAKE_TURN = "    hardware.meet(TURN + C, 4, BOTH)\n"
GIVE_TURN = "    hardware.arrive(TURN + 1 - C, 4, BOTH)\n"
WAIT_S = "    s_MN = warpgroup_mma_wait(1, deps=[s_MN])\n"
WAIT_O = "    acc_MD, p_MN = warpgroup_mma_wait(0, deps=[acc_MD, p_MN])\n"
DONE_K = "    hardware.arrive(FREE + 2 * at, 4, ALL)\n"
DONE_V = "    hardware.arrive(FREE + 2 * before + 1, 4, ALL)\n"
OPERAND = "    p_MN = operand(p_MN, q.dtype, D)\n"
DONE_Q = "            mbarrier.arrive(q_empty.index(C))\n"
NEXT_K = "    mbarrier.wait(k_full.index(after), ((n + 1) // STAGES) & 1, pred=n < last)\n    if"
WAIT_V = "    mbarrier.wait(v_full.index(at), (n // STAGES) & 1)\n    acc"
WAIT_Q = "            mbarrier.wait(q_full.index(C), turn & 1)\n"
FREE_K = "                hardware.meet(FREE + 2 * at, 1, ALL)\n"
FREE_V = "                hardware.meet(FREE + 2 * at + 1, 1, ALL)\n"
FREE_Q = "                mbarrier.wait(q_empty.index(c), (turn & 1) ^ 1)\n"
STEPS = "            skip = N\n"
END = "    if C == 0:\n        hardware.meet(TURN, 4, BOTH)\n"
MUTANTS = {
    "K released early": {WAIT_S + DONE_K: DONE_K + WAIT_S},
    "V released early": {WAIT_O + OPERAND + DONE_V: DONE_V + WAIT_O + OPERAND},
    "Q released early": {DONE_Q: "", STEPS: DONE_Q + STEPS},
    "K never released": {DONE_K: ""},
    "K released twice": {DONE_K: DONE_K + DONE_K},
    "another buffer released": {DONE_V: DONE_V.replace("before", "at")},
    "V released in the place of K": {DONE_K: DONE_K.replace("at,", "at + 1,")},
    "wrong phase of K": {NEXT_K: NEXT_K.replace("n + 1", "n")},
    "wrong phase of V": {WAIT_V: WAIT_V.replace("n //", "(n + 1) //")},
    "wrong phase of Q": {WAIT_Q: WAIT_Q.replace("turn & 1", "0")},
    "no wait for K": {NEXT_K: "    if"},
    "no wait for V": {WAIT_V: "    acc"},
    "no wait for Q": {WAIT_Q: ""},
    "no wait for a free K": {FREE_K: "                pass\n"},
    "no wait for a free V": {FREE_V: "                pass\n"},
    "no wait for a free Q": {FREE_Q: ""},
    "no wait for S": {WAIT_S: ""},
    "too few waited for at S": {WAIT_S: WAIT_S.replace("1", "2")},
    "too few waited for at O": {WAIT_O: WAIT_O.replace("0", "1")},
    "more bytes expected than come": {"at), k_desc.block_type": "at), 2 * k_desc.block_type"},
    "one consumer awaited": {FREE_K: FREE_K.replace("ALL", "160")},
    "turns never given": {GIVE_TURN: ""},
    "turns given to oneself": {GIVE_TURN: GIVE_TURN.replace("1 - C", "C")},
    "nobody begins": {"    if C == 1:\n        hardware.arrive(TURN, 4, BOTH)\n": ""},
    "the last turn is left": {END: ""},
    "the last buffers are left": {"range(gl.maximum(n - STAGES, 0), n)": "range(0)"},
    "turns taken out of order": {TAKE_TURN: TAKE_TURN.replace("+ C", "+ 1 - C")},
    "no mask": {"    if left < N:": "    if False:"},
    "rows beyond the tile written": {"start, end, H * D": "start, queries, H * D"},
}  # fmt: skip


PARTS = """    for part in range(joined, parts_end):
        at_R = part * (CONSUMERS * M) + row + row_R
"""
SUMMED = "        lse_R"
RING_MUTANTS = {
    "not all threads have stored": {"                thread_barrier()\n": ""},
    "what was stored is not released": {'sem="acq_rel", scope="gpu"': 'sem="relaxed", scope="gpu"'},
    "the first to end joins": {"if counted == parts_end - joined - 1:": "if counted == 0:"},
    "nobody joins": {"if counted == parts_end - joined - 1:": "if counted == parts_end - joined:"},
    "parts without keys are as they were": {"if first == past:": "if False:"},
    "the semaphores are left": {"gl.store(semaphore_ptr, 0)": "pass"},
    "both consumers share a semaphore": {"semaphores_ptr + C * shared +": "semaphores_ptr +"},
    "tiles share a semaphore": {" + gl.load(item_ptr + 8)": ""},
    "the last part is left out": {PARTS + SUMMED: PARTS.replace("end", "end - 1") + SUMMED},
    "a part has the keys of another": {"lo, hi = lo * visits": "lo, hi = 0 * visits"},
}  # fmt: skip


@pytest.mark.parametrize("name", RING_MUTANTS)
def test_emulator_catches_in_a_ring(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = mutant(hopper, RING_MUTANTS[name], tmp_path)
    with launch.using(hopper_fwd=Tile(128, 32, 4, 2)):
        with pytest.raises((HopperError, AssertionError)) as caught:
            for _ in range(5):
                check_ring(13, 33, FP16, monkeypatch, module)
        print(f"{name}: {caught.type.__name__}: {caught.value}")
        check_ring(13, 33, FP16, monkeypatch)


@pytest.mark.parametrize("name", MUTANTS)
def test_emulator_catches(name: str, tmp_path: Path) -> None:
    module = mutant(hopper, MUTANTS[name], tmp_path)
    layout = BlockLayout.causal(3, 1, 150)
    tensors = new(layout, 1, 2, 64, FP16)
    with launch.using(hopper_fwd=Tile(128, 32, 4, 2)):
        with pytest.raises((HopperError, AssertionError)) as caught:
            for seed in range(5):
                check_fwd(tensors, layout, module=module, seed=seed)
        print(f"{name}: {caught.type.__name__}: {caught.value}")
        check_fwd(tensors, layout, seed=0)
