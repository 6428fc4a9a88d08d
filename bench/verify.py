"""The parts of `python -m bench --verify` and `--full`: is what a GPU computes right? Tests,
ahead-of-time checks and compute-sanitizer, each in processes of its own."""

from __future__ import annotations

import functools
import importlib.util
import json
import os
import shutil
import sys
import time
import xml.etree.ElementTree as ElementTree
from pathlib import Path
from typing import Any

import torch

import sfkernels as sf
from bench import attention_cases, contest, rows
from bench.process import ROOT, command
from sfkernels import dispatch, launch

TESTS = ("norm", "rope", "sampler", "quant", "attention", "registration", "gpu", "bench_stream",
         "bench_decode")  # fmt: skip
MEMORY = 5 * 2**30  # bytes of a GPU that a process of the tests may take, its references apart
SANITIZER = ("compute-sanitizer", "/usr/local/cuda/bin/compute-sanitizer")
RUNS = ("natively", "memcheck", "racecheck")
ITSELF = (sys.executable, "-m", "bench.verify")


def tests(folder: Path, seconds: float) -> dict[str, Any]:
    """Parity of every kernel, compiled for this GPU, and the tests marked `gpu`."""
    files = [f"tests/test_{name}.py" for name in TESTS]
    files = [file for file in files if (ROOT / file).exists()]
    if not files:
        return {"skipped": "the tests are not installed; run from a checkout of the repository"}
    xml = folder / "tests.xml"
    xml.unlink(missing_ok=True)
    options = ["-q", "-p", "no:cacheprovider", "--tb=short", f"--junitxml={xml}"]
    if importlib.util.find_spec("xdist"):
        memory = torch.cuda.get_device_properties("cuda").total_memory
        processes = max(min(os.cpu_count() or 1, 16, memory // MEMORY), 1)
        options += ["-n", str(processes)]  # most of the time goes into compiling
    out = command([sys.executable, "-m", "pytest", *options, *files], seconds)
    out |= read_junit(xml) if xml.exists() else {"counts": {}, "failures": []}
    return out


def read_junit(xml: Path) -> dict[str, Any]:
    """Counts, and the first lines of each failure."""
    counts = {"passed": 0, "failed": 0, "skipped": 0}
    failures = []
    for case in ElementTree.parse(xml).iter("testcase"):
        bad = [child for child in case if child.tag in ("failure", "error")]
        if bad:
            counts["failed"] += 1
            name = f"{case.get('classname')}::{case.get('name')}"
            failures.append({"test": name, "said": (bad[0].get("message") or "")[:500]})
        elif case.find("skipped") is not None:
            counts["skipped"] += 1
        else:
            counts["passed"] += 1
    return {"counts": counts, "failures": failures}


def check(folder: Path, seconds: float) -> dict[str, Any]:
    """The ahead-of-time check with this machine's Triton."""
    arch = launch.architecture(torch.device("cuda"))
    file = folder / "check.json"
    arguments = ["--arch", str(arch), "--json", str(file)]
    out = command([sys.executable, "-m", "sfkernels.check", *arguments], seconds)
    if file.exists():
        found = json.loads(file.read_text())
        out["compiled"] = len(found)
        out["broken"] = [f"{r['kernel']} {r['case']}: {b}" for r in found for b in r["broken"]]
    return out


def sanitizer(folder: Path, seconds: float) -> dict[str, Any]:
    """compute-sanitizer over one launch of every kernel at odd sizes. Natively first, which says
    whether they run at all, and leaves what is compiled in Triton's cache."""
    tool = next((found for name in SANITIZER if (found := shutil.which(name))), None)
    if tool is None:
        return {"skipped": "compute-sanitizer is not on this machine"}
    out: dict[str, Any] = {}
    began = time.monotonic()
    for i, name in enumerate(RUNS):
        left = (seconds - (time.monotonic() - began)) / (len(RUNS) - i)
        options = ["--tool", name, "--error-exitcode", "9", "--launch-timeout", "0"]
        before = [tool, *options] if i else []
        # Without PyTorch's cache of memory every tensor ends where its allocation does.
        out[name] = command([*before, *ITSELF], left, PYTORCH_NO_CUDA_MEMORY_CACHING="1")
    out["ok"] = all(out[name]["ok"] for name in RUNS)
    return out


def launch_every_kernel() -> None:
    """Each op forward and backward, at sizes where every tile has an end outside its tensor."""
    torch.manual_seed(0)
    device = torch.device("cuda")
    shapes, levels = ((3, 5, 96, 32),), ((3, 35, 96), (2, 15, 192), (1, 7, 384))
    odd = rows.Sizes(shapes, shapes, (3, 5, 7), levels, torch.bfloat16)
    for case in rows.cases(odd):
        inputs, op = case.make(device), case.by("triton")
        outs = contest.gradients_or_outputs(op, inputs, [])
        if case.backward:
            contest.gradients_or_outputs(op, inputs, [torch.randn_like(o) for o in outs])
        torch.cuda.synchronize()
        print(case.label, flush=True)
    # Two that the table has no row for.
    noise = sf.Noise(torch.tensor([7], device=device), torch.arange(3, device=device), 0)
    x = sf.normal(noise, (1, 3, 3, 5, 7), impl="triton")
    sigma, after = torch.tensor(0.9, device=device), torch.tensor(0.6, device=device)
    sf.euler_step(x, x, sigma, after, uncond_flow=x, guidance=5.0, impl="triton")
    torch.cuda.synchronize()
    launch_attention(device)


def launch_attention(device: torch.device) -> None:
    """Every pattern by every implementation of ours, with tiles that end inside a frame."""
    # The head dim of the part before, so that most of these kernels are compiled already.
    odd = attention_cases.Sizes(37, 2, 0, 128, 77, (6, 3), (6,), 5, 1, torch.bfloat16)
    hopper = torch.cuda.get_device_capability(device)[0] == 9
    has = dispatch.implementations("ring_attention")
    ours = [name for name in contest.OURS if name in has and (hopper or name != "gluon")]
    for case in attention_cases.cases(odd):
        inputs = case.make(device)
        for impl in ours:
            op = functools.partial(contest.sequence, functools.partial(case.ours, impl=impl))
            upstream = case.upstream(inputs) if case.backward else []
            case.results(op, inputs, upstream)
            torch.cuda.synchronize()
            print(f"{case.label}, {impl}", flush=True)
    q, k, v, valid = next(attention_cases.cases(odd)).make(device)
    table = torch.randn(k.shape[1], q.shape[3] // 2, 2, device=device)
    sf.ring_attention(q, k, v, valid, k_table_SP2=table, impl="triton")
    torch.cuda.synchronize()


if __name__ == "__main__":
    launch_every_kernel()
