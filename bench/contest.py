"""One case of several contestants: first who is right, then who is fast.

A contestant is compared with the float64 reference by the rule of parity.py, others than ours with
some slack; one that is wrong is reported and not timed.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from bench import timing
from bench.timing import Contestant

CPP = "cpp"  # on a CPU
OURS = ("triton", "gluon", CPP)
# How many times as far off as ours another's may be: sums of many rows in a plainer order are.
SLACK = 8.0
EAGER = "eager"  # the reference that defines every op
ENOUGH = 7.5e13  # operations after which a contestant is timed well: about a quarter of a second
FEWEST = 6  # rounds of the longest cases

Inputs = Sequence[Tensor]
Op = Callable[..., Sequence[Tensor]]


class Case(Protocol):
    """flops, nbytes: that the op needs, whoever computes it. backward: its backward pass is timed.
    compiler: of the contestants that compile for it, the slowest, and the seconds that may take;
    none if empty."""

    @property
    def label(self) -> str: ...
    @property
    def flops(self) -> int: ...
    @property
    def nbytes(self) -> int: ...
    @property
    def backward(self) -> bool: ...
    @property
    def compiler(self) -> tuple[str, float] | None: ...

    def make(self, device: torch.device) -> list[Tensor]:
        """New inputs."""
        ...

    def contestants(self, device: torch.device, compiled: bool) -> list[Contestant]:
        """Ours first. compiled: also those that compile for each case."""
        ...

    def upstream(self, inputs: Inputs) -> list[Tensor]:
        """Gradients of the outputs."""
        ...

    def results(self, op: Op, inputs: Inputs, upstream: Inputs) -> list[Tensor]:
        """What is compared: outputs, or where there is an `upstream`, gradients."""
        ...

    def judge(self, inputs: Inputs, upstream: Inputs) -> Callable[..., None]:
        """What raises AssertionError for results that are not right: of (results, slack=1.0)."""
        ...


def run_case(
    case: Case,
    device: torch.device,
    ceilings: dict[str, Any],
    rounds: int = timing.ROUNDS,
    compiled: bool = False,
) -> dict[str, Any]:
    """Checks all contestants of a case and times those that are right: a row of the result."""
    torch.manual_seed(0)
    inputs = case.make(device)
    upstream = case.upstream(inputs) if case.backward else []
    judge = case.judge(inputs, upstream)
    entries: dict[str, dict[str, Any]] = {}
    right: list[Contestant] = []
    for contestant in case.contestants(device, compiled):
        entries[contestant.name] = {}  # in this order in every table
        try:
            with contestant.around():
                got = case.results(contestant.forward, inputs, upstream)
            judge(got, slack=SLACK if contestant.name not in OURS else 1.0)
            right.append(contestant)
        except Exception as error:
            wrong = f"{timing.WRONG}: " * isinstance(error, AssertionError)
            entries[contestant.name] = {"failed": wrong + timing.reason(error)}
        got = []
    del judge

    count = timing.count_sets(case.nbytes, device)
    sets = [inputs, *(case.make(device) for _ in range(count - 1))]
    for contestant in right:
        contestant.upstream = [upstream] * count if case.backward else None
    if case.flops:
        rounds = min(rounds, max(FEWEST, int(ENOUGH / (case.flops * count))))
    for name, timed in timing.measure(right, sets, rounds).items():
        entries[name] = timing.entry(timed, **rates(case, timed))
        if name == "triton" and device.type == "cpu":
            entries[name]["note"] = "in Triton's interpreter: right, and its time says nothing"
    floor = timing.floor_ms(case.flops, case.nbytes, ceilings)
    row = {"case": case.label, "flops": case.flops, "bytes": case.nbytes, "floor_ms": floor}
    row |= {"sets": count, "rounds": rounds, "contestants": entries}
    return row | best(entries)


def rates(case: Case, timed: timing.Timing | str) -> dict[str, float]:
    if isinstance(timed, str):
        return {}
    return {
        "gbps": timing.gbps(case.nbytes, timed.p50),
        "tflops": case.flops / timed.p50 / 1e9,
    }


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


def gradients_or_outputs(op: Op, inputs: Inputs, upstream: Inputs) -> list[Tensor]:
    """Outputs without `upstream`, else the gradients of all inputs that have one."""
    leaves = copies(inputs)
    if not upstream:
        with torch.no_grad():
            return [*op(*leaves)]
    for leaf in leaves:
        leaf.requires_grad_(leaf.is_floating_point())
    wanted = [leaf for leaf in leaves if leaf.requires_grad]
    grads = torch.autograd.grad(op(*leaves), wanted, upstream, allow_unused=True)
    return [g for g in grads if g is not None]


def sequence(function: Callable[..., Any], *tensors: Tensor) -> tuple[Tensor, ...]:
    out = function(*tensors)
    return (out,) if isinstance(out, Tensor) else (*out,)


def copies(tensors: Inputs) -> list[Tensor]:
    """Ops that write into their arguments must not see what another one wrote."""
    return [t.detach().clone() for t in tensors]


def interpreted() -> bool:
    """Whether Triton's kernels run on a CPU: right, and of no speed."""
    return os.environ.get("TRITON_INTERPRET") == "1"
