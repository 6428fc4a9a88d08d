"""Recordings of the public implementation through the kernels in Gluon, in the emulator of Hopper:
chunks over a ring past its wrap, training passes under a mask, rollouts and their gradients. Heads
of the recorded model are of 32; zeros make them 64, which changes no score and no output."""

from __future__ import annotations

import contextlib
import io
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import sfkernels as sf
from sfkernels import dispatch, launch
from sfkernels.launch import Tile
from tests.hopper_emulator import emulate
from tests.parity.__main__ import main

FOLDER = Path(__file__).parent / "parity" / "wan_d64"
SMALL = {name: Tile(128, 32, 4, 2) for name in ("hopper_fwd", "hopper_dkdv", "hopper_dq")}


def wide(x_BLHD: Tensor) -> Tensor:
    return F.pad(x_BLHD, (0, 64 - x_BLHD.shape[-1])).half()


@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.is_available(), reason="for CPU tensors")
def test_recordings_by_gluon(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: dict[str, int] = {}

    def by_gluon(name: str) -> Any:
        function = getattr(sf, name)

        def call(q: Tensor, k: Tensor, v: Tensor, *rest: Any, prefix: Any = None, **_: Any) -> Any:
            more: dict[str, Any] = {"scale": q.shape[-1] ** -0.5, "impl": "gluon"}
            if prefix is not None:
                more["prefix"] = sf.Prefix(wide(prefix[0]), wide(prefix[1]), prefix.spans)
            calls[name] = calls.get(name, 0) + 1
            out = function(*map(wide, (q, k, v)), *rest, **more)
            return out[..., : q.shape[-1]].to(q.dtype)

        return call

    for name in ("ring_attention", "block_causal_attention", "cross_attention"):
        monkeypatch.setattr(sf, name, by_gluon(name))
    here = dispatch.IMPLEMENTATIONS["gluon"]._replace(refusal=lambda _: "")
    monkeypatch.setitem(dispatch.IMPLEMENTATIONS, "gluon", here)
    launches: list[str] = []
    said = io.StringIO()
    with launch.using(**SMALL), emulate(0, launches), contextlib.redirect_stdout(said):
        code = main([str(FOLDER), "--dtype", "bfloat16"])
    assert code == 0, said.getvalue()
    assert set(calls) == {"ring_attention", "block_causal_attention", "cross_attention"}, calls
    assert {"_hopper_fwd_kernel", "_hopper_dkdv_kernel", "_hopper_dq_kernel"} <= {*launches}
