"""Kernels are compiled once for all lengths: what changes from call to call is no constant."""

from __future__ import annotations

import itertools
import json
import os
import subprocess
import sys

import torch

import sfkernels as sf
from sfkernels import BlockLayout, Prefix, launch
from tests.hopper_cases import LAYOUTS


def kinds() -> dict[str, list[str]]:
    """Of each kernel with each set of constants, all that Triton would compile for attention in
    clips and streams of many lengths."""
    from sfkernels.check import use_driver

    found: dict[str, set[str]] = {}

    def record(kernel, grid, args, *, num_warps, **meta):  # type: ignore[no-untyped-def]
        caches = kernel.device_caches[90]
        _, special, _ = caches[-1](*args, num_warps=num_warps, debug=False, **meta)
        flags = {k: v for k, v in meta.items() if k.isupper()}
        found.setdefault(f"{kernel.__name__} {flags}", set()).add(str(special))

    launch.recorder, launch.target = record, 90
    use_driver(90)
    layouts = [*LAYOUTS.values(), BlockLayout.causal(1, 1, 1), BlockLayout.causal(2, 1, 16)]

    def new(*size: int) -> torch.Tensor:
        return torch.empty(*size, dtype=torch.bfloat16, device="meta", requires_grad=True)

    for impl, layout, batch in itertools.product(("triton", "gluon"), layouts, (1, 2, 16)):
        q, k, v = (new(batch, layout.tokens, 2, 128) for _ in range(3))
        for past in (0, 1, 16, 50):
            with torch.no_grad():
                one = new(batch, past, 2, 128)
                prefix = Prefix(one, one) if past else None
            o = sf.block_causal_attention(q, k, v, layout, prefix=prefix, impl=impl)
            torch.autograd.grad(o, (q, k, v), torch.empty_like(o))
        with torch.no_grad():
            for slots, valids in itertools.product((1, 16, 250, 33_000), ((), (batch,))):
                ring = new(batch, slots, 2, 128)
                valid = torch.empty(valids, dtype=torch.int32, device="meta")
                sf.ring_attention(q, ring, ring, valid, impl=impl)
    return {name: sorted(kinds) for name, kinds in found.items()}


def test_attention_is_compiled_once() -> None:
    code = "import json; from tests.test_compilations import kinds; print(json.dumps(kinds()))"
    env = {**os.environ, "TRITON_INTERPRET": "0"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env)
    assert done.returncode == 0, done.stderr
    found: dict[str, list[str]] = json.loads(done.stdout.splitlines()[-1])
    assert {name.split()[0].strip("_").removesuffix("_kernel") for name in found} >= {
        "attention_fwd", "hopper_fwd", "hopper_dkdv", "hopper_dq",
    }  # fmt: skip
    for name, kinds in found.items():
        assert len(kinds) == 1, f"{name}: {len(kinds)} kinds, as {kinds[:3]}"
