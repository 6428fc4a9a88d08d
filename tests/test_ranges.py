"""Phases: what a profiler is shown and what a clock adds up."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from types import SimpleNamespace

import pytest
import torch

from sfmodel import ranges
from sfmodel.ranges import phase, timed

CPU = torch.device("cpu")


def test_phases_of_a_name_are_added_up_in_the_order_of_their_ends() -> None:
    with timed(CPU) as ms:
        for _ in range(2):
            with phase("outer"), phase("inner"):
                time.sleep(0.01)
        with contextlib.suppress(KeyError), phase("raised"):
            raise KeyError
        with phase("last"):
            pass
    with phase("after"):
        pass
    assert [*ms] == ["inner", "outer", "last"]
    assert ms["outer"] > ms["inner"] >= 20 > ms["last"] >= 0


def test_clocks_within_each_other_are_apart() -> None:
    with timed(CPU) as outer:
        with phase("a"):
            pass
        with timed(CPU) as inner, phase("b"):
            pass
        with phase("c"):
            pass
    assert [*outer] == ["a", "c"] and [*inner] == ["b"]


def test_a_profiler_sees_ranges_of_one_domain(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[str, str, str]] = []

    @contextlib.contextmanager
    def annotate(name: str, *, color: str, domain: str) -> Iterator[None]:
        yield
        seen.append((name, color, domain))

    monkeypatch.setattr(ranges, "_nvtx", SimpleNamespace(annotate=annotate))
    with phase("backward"), phase("unheard of"):
        pass
    assert seen == [("unheard of", ranges.OTHER, "sfkernels"), ("backward", "orange", "sfkernels")]


def test_nvtx_itself_takes_every_phase(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ranges, "_nvtx", pytest.importorskip("nvtx"))
    for name in (*ranges.COLOURS, "unheard of"):
        with phase(name):
            pass


@pytest.mark.gpu
def test_phases_on_a_gpu_take_the_time_of_their_kernels() -> None:
    x = torch.randn(1024, 1024, device="cuda")
    with timed(x.device) as ms:
        with phase("one"):
            x @ x
        with phase("many"):
            for _ in range(50):
                x @ x
    assert ms["many"] > ms["one"] > 0
