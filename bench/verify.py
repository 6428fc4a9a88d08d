"""The parts of `python -m bench --verify` and `--full`: is what a GPU computes right? Tests,
ahead-of-time checks and compute-sanitizer, each in processes of its own."""

from __future__ import annotations

import collections
import importlib.util
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from bench.ops import attention, memory_bound
from sfkernels import cases, launch
from sfkernels.cases import AttentionCase, Heads

ROOT = Path(__file__).parent.parent
TESTS = ("linear", "causal_conv3d", "norm", "rope", "sampler", "quant", "attention", "registration",
         "gpu", "launches", "stream", "stream_gpu", "bench_stream", "bench_decode")  # fmt: skip
MEMORY = 5 * 2**30  # bytes of a GPU that a process of the tests may take, its references apart
SANITIZER = ("compute-sanitizer", "/usr/local/cuda/bin/compute-sanitizer")
RUNS = ("natively", "memcheck", "racecheck")
TAIL = 200  # lines kept of what a command that failed said


def command(
    arguments: Sequence[str],
    seconds: float,
    tick: Callable[[str], None] = lambda _: None,
    **environment: str,
) -> dict[str, Any]:
    """Runs a command in the repository for at most so long, in a process of its own: a fault, a
    leak or a hang there ends nothing else. Native even where tests use Triton's interpreter.
    tick: called with each line it says. Returns ok, how it ended, and where it did not end well
    the last lines it said. Ctrl-C here ends it too."""
    kept = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    lines: collections.deque[str] = collections.deque(maxlen=TAIL)
    cut = threading.Event()
    with subprocess.Popen(
        arguments, cwd=ROOT, env={**kept, **environment}, stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT, text=True, errors="replace", start_new_session=True,
    ) as process:  # fmt: skip

        def end() -> None:
            cut.set()
            os.killpg(process.pid, signal.SIGKILL)  # with whatever it started

        timer = threading.Timer(max(seconds, 1), end)
        timer.start()
        assert process.stdout is not None
        try:
            for line in process.stdout:
                lines.append(line)
                tick(line.rstrip())
            process.wait()
        except BaseException:
            end()
            raise
        finally:
            timer.cancel()
    ok = process.returncode == 0
    how = f"cut after {seconds:.0f} s" if cut.is_set() else f"exit code {process.returncode}"
    return {"ok": ok, "end": how, **({} if ok else {"tail": "".join(lines)[-6000:]})}


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
    return out | (read_junit(xml) if xml.exists() else {"counts": {}, "failures": []})


def read_junit(xml: Path) -> dict[str, Any]:
    """Counts, and the first lines of each failure."""
    counts = {"passed": 0, "failed": 0, "skipped": 0}
    failures = []
    for case in ElementTree.parse(xml).iter("testcase"):
        bad = [child for child in case if child.tag in ("failure", "error")]
        skipped = case.find("skipped") is not None
        counts["failed" if bad else "skipped" if skipped else "passed"] += 1
        if bad:
            name = f"{case.get('classname')}::{case.get('name')}"
            failures.append({"test": name, "said": (bad[0].get("message") or "")[:500]})
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
        options = [tool, "--tool", name, "--error-exitcode", "9", "--launch-timeout", "0"]
        launches = [*(options if i else []), sys.executable, "-m", "bench.verify"]
        # Without PyTorch's cache of memory every tensor ends where its allocation does.
        out[name] = command(launches, left, PYTORCH_NO_CUDA_MEMORY_CACHING="1")
    out["ok"] = all(out[name]["ok"] for name in RUNS)
    return out


def launch_every_kernel() -> None:
    """Each op forward and backward by every implementation of ours, at sizes where every tile has
    an end outside its tensor, or inside a frame."""
    torch.manual_seed(0)
    device = torch.device("cuda")
    shapes, levels = ((3, 5, 96),), ((3, 35, 96), (2, 15, 192), (1, 7, 384))
    latents = 3, 5, 7
    layers = (37, 96, 200, True), (400, 200, 1100, False)
    rows = memory_bound.Sizes(shapes, shapes, levels, torch.bfloat16, 32, latents, (2, 3), layers)
    # The head dim of the part before, so that most of these kernels are compiled already.
    heads = Heads(37, 2, 128, torch.bfloat16)
    patterns = attention.Sizes(heads, 1, 77, (6, 3), (6,), 5, 1, (5, 130), 300, 2)
    odd = [
        *(case for case, _ in (*memory_bound.rows(rows), *attention.rows(patterns))),
        # Four that no list has.
        cases.training(heads, 6, backward=True, deterministic=True),
        cases.normal(latents=latents),
        cases.sampler_step("euler, guided", latents=latents),
        cases.ring_attention(heads, 3, 6, table=True),
    ]
    gluon = ["gluon"] if launch.is_hopper(device) else []
    for case in odd:
        for impl in ["triton", *(gluon if isinstance(case, AttentionCase) else [])]:
            case.launch(impl, device)
            torch.cuda.synchronize()
            print(f"{case.label}, {impl}", flush=True)


if __name__ == "__main__":
    launch_every_kernel()
