"""One case by several implementations: first who is right, then who is fast.

An implementation is compared with the float64 reference by the rule of sfkernels.testing, others
than ours with some slack; one that is wrong is reported and not timed.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from bench import timing
from bench.harness import EAGER, OURS
from bench.ops import attention, memory_bound
from bench.timing import Implementation
from sfkernels.cases import AttentionCase, Case

# How many times as far off as ours another's may be: sums of many rows in a plainer order are.
SLACK = 8.0
ENOUGH = 7.5e13  # operations after which one is timed well: about a quarter of a second
FEWEST = 6  # rounds of the longest cases


def implementations(case: Case, device: torch.device, compiled: bool) -> list[Implementation]:
    """Ours first. compiled: also those that compile for each case."""
    if isinstance(case, AttentionCase):
        return attention.implementations(case, device, compiled)
    return memory_bound.implementations(case, device, compiled)


def judge(case: Case, inputs: Sequence[Tensor]) -> attention.Judge | memory_bound.Judge:
    """The check that an op of this case must pass."""
    if isinstance(case, AttentionCase):
        return attention.Judge(case, inputs)
    return memory_bound.Judge(case, inputs)


def run_case(
    case: Case,
    device: torch.device,
    ceilings: dict[str, Any],
    rounds: int = timing.ROUNDS,
    compiled: bool = False,
    known: Sequence[Implementation] = (),
) -> dict[str, Any]:
    """Checks all implementations of a case, or those `known`, and times those that are right: a row
    of the result."""
    torch.manual_seed(0)
    inputs = case.make(device)
    check = judge(case, inputs)
    upstream = check.upstream

    known = known or implementations(case, device, compiled)
    entries: dict[str, dict[str, Any]] = {one.name: {} for one in known}  # so ordered in tables
    checks = {one.name: functools.partial(_checked, one, check) for one in known}
    right = [*timing.right(checks, entries).values()]
    del check, checks

    count = timing.count_sets(case.nbytes, device)
    sets = [inputs, *(case.make(device) for _ in range(count - 1))]
    for one in right:
        one.upstream = [upstream] * count if case.backward else None
    if case.flops:
        rounds = min(rounds, max(FEWEST, int(ENOUGH / (case.flops * count))))
    for name, timed in timing.measure(right, sets, rounds).items():
        entries[name] = timing.entry(timed, **rates(case, timed))
        if name == "triton" and device.type == "cpu":
            entries[name]["note"] = "in Triton's interpreter: right, and its time says nothing"
    floor = timing.floor_ms(case.flops, case.nbytes, ceilings)
    row = {"case": case.label, "flops": case.flops, "bytes": case.nbytes, "floor_ms": floor}
    return row | {"sets": count, "rounds": rounds, "contestants": entries} | best(entries)


def _checked(one: Implementation, check: Callable[..., None]) -> Implementation:
    with one.context():
        check(one.forward, slack=1.0 if one.name in OURS else SLACK)
    return one


def rates(case: Case, timed: timing.Timing | str) -> dict[str, float]:
    per_ms = {"gbps": case.nbytes / 1e6, "tflops": case.flops / 1e9}
    return {} if isinstance(timed, str) else {k: v / timed.p50 for k, v in per_ms.items()}


def best(entries: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """The fastest of ours and of the others, and the time of the one as a multiple of the
    other's: above 1, ours is faster. Where no kernel of ours is timed, the reference stands in."""
    timed = {name: e["ms"] for name, e in entries.items() if "ms" in e}
    ours = [name for name in OURS if name in timed] or [n for n in (EAGER,) if n in timed]
    peers = [name for name in timed if name not in (*OURS, *ours)]
    out: dict[str, Any] = {
        "best_ours": min(ours, key=lambda n: timed[n], default=None),
        "best_peer": min(peers, key=lambda n: timed[n], default=None),
    }
    if ours and peers:
        out["peer_over_ours"] = timed[out["best_peer"]] / timed[out["best_ours"]]
    return out
