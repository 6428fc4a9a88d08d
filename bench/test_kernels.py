"""The cases of `python -m bench kernels` for pytest-benchmark, which saves runs and compares them:

    pytest bench --benchmark-only --benchmark-autosave
    pytest bench --benchmark-only --benchmark-compare -k "gated_adaln and triton"

A time is that of all sets of inputs in turn, as many calls as its extra_info says; one that
is not right fails and is not timed.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from bench import timing
from bench.ops import kernels, measure
from sfkernels.cases import Case
from sfmodel.machine import machine

pytest.importorskip("pytest_benchmark")

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
ENTRIES = [
    pytest.param(case, one, id=f"{case.label}-{one.name}")
    for case, _ in kernels.rows(tiny=DEVICE.type == "cpu")
    for one in measure.implementations(case, DEVICE, compiled=False)
]


class Prepared(NamedTuple):
    case: Case
    inputs: list[Tensor]
    judge: Any


@pytest.fixture(scope="module")
def prepared(request: pytest.FixtureRequest) -> Iterator[Prepared]:
    """The exact results of a case, once for all its implementations."""
    case: Case = request.param
    torch.manual_seed(0)
    inputs = case.make(DEVICE)
    yield Prepared(case, inputs, measure.judge(case, inputs))
    timing.free(DEVICE)


@pytest.mark.parametrize(("prepared", "one"), ENTRIES, indirect=["prepared"])
def test_kernel(prepared: Prepared, one: timing.Implementation, benchmark: Any) -> None:
    case, inputs, judge = prepared
    with one.context():
        judge(one.forward)
        count = timing.count_sets(case.nbytes, DEVICE)
        sets = [inputs, *(case.make(DEVICE) for _ in range(count - 1))]
        one.upstream = [judge.upstream] * count if case.backward else None
        ready = timing.prepare(one, sets)

        def run() -> None:
            ready.run()
            timing.wait(DEVICE)

        benchmark.extra_info.update(
            calls=count, flops=case.flops, bytes=case.nbytes, note=ready.note, **machine(DEVICE)
        )
        benchmark.pedantic(run, rounds=timing.ROUNDS, warmup_rounds=1)
