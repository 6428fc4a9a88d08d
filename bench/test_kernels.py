"""The cases of `python -m bench kernels` as entries of pytest-benchmark, which saves runs and
compares them:

    pytest bench --benchmark-only --benchmark-autosave
    pytest bench --benchmark-only --benchmark-compare -k "gated_adaln and triton"

A time is that of all sets of inputs in turn, as many calls as its extra_info says; a contestant
that is not right fails and is not timed.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import pytest
import torch

from bench import kernels, timing
from bench.contest import Case, Inputs
from bench.timing import Contestant
from sfmodel.machine import machine

pytest.importorskip("pytest_benchmark")

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
ENTRIES = [
    pytest.param(case, contestant.name, id=f"{case.label}-{contestant.name}")
    for case in kernels.cases(tiny=DEVICE.type == "cpu")
    for contestant in case.contestants(DEVICE, compiled=False)
]


class Prepared(NamedTuple):
    case: Case
    inputs: Inputs
    upstream: Inputs
    judge: Any


@pytest.fixture(scope="module")
def prepared(request: pytest.FixtureRequest) -> Iterator[Prepared]:
    """The exact results of a case, once for all its contestants."""
    case: Case = request.param
    torch.manual_seed(0)
    inputs = case.make(DEVICE)
    upstream = case.upstream(inputs) if case.backward else []
    yield Prepared(case, inputs, upstream, case.judge(inputs, upstream))
    timing.free(DEVICE)


def contestant_of(case: Case, name: str) -> Contestant:
    return next(c for c in case.contestants(DEVICE, compiled=False) if c.name == name)


@pytest.mark.parametrize(("prepared", "name"), ENTRIES, indirect=["prepared"])
def test_kernel(prepared: Prepared, name: str, benchmark: Any) -> None:
    case, inputs, upstream, judge = prepared
    contestant = contestant_of(case, name)
    with contestant.around():
        judge(case.results(contestant.forward, inputs, upstream))
        count = timing.count_sets(case.nbytes, DEVICE)
        sets = [inputs, *(case.make(DEVICE) for _ in range(count - 1))]
        contestant.upstream = [upstream] * count if case.backward else None
        ready = timing.prepare(contestant, sets)

        def run() -> None:
            ready.run()
            timing.wait(DEVICE)

        benchmark.extra_info.update(
            calls=count, flops=case.flops, bytes=case.nbytes, note=ready.note, **machine(DEVICE)
        )
        benchmark.pedantic(run, rounds=timing.ROUNDS, warmup_rounds=1)
