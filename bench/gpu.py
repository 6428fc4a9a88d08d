"""`python -m bench gpu`: everything that needs a GPU, in one run of less than nine minutes.

Parts run one after the other, each with a time limit; one that fails or is cut is reported and the
rest still runs. The JSON is written after every part.
"""

from __future__ import annotations

import argparse
import functools
import importlib.util
import json
import os
import shutil
import signal
import subprocess
import sys
import time
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from rich.table import Table

import sfkernels as sf
from bench import attention, attention_cases, kernels, timing
from bench.machine import machine, said
from sfkernels import launch
from sfmodel.files import atomic

ROOT = Path(__file__).parent.parent
TOTAL = 530.0  # seconds
TESTS = ("norm", "rope", "sampler", "attention", "registration", "gpu")
SANITIZER = ("compute-sanitizer", "/usr/local/cuda/bin/compute-sanitizer")

ITSELF = (sys.executable, "-m", "bench.gpu")

Part = Callable[[Path, float], dict[str, Any]]  # (folder, seconds left to it) -> what came out


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
        processes = min(os.cpu_count() or 1, 16)
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
        rows = json.loads(file.read_text())
        out["compiled"] = len(rows)
        out["broken"] = [f"{r['kernel']} {r['case']}: {b}" for r in rows for b in r["broken"]]
    return out


def sanitizer(folder: Path, seconds: float) -> dict[str, Any]:
    """compute-sanitizer over one launch of every kernel at odd sizes."""
    tool = next((found for name in SANITIZER if (found := shutil.which(name))), None)
    if tool is None:
        return {"skipped": "compute-sanitizer is not on this machine"}
    out: dict[str, Any] = {}
    began = time.monotonic()
    for name in ("memcheck", "racecheck"):
        left = seconds - (time.monotonic() - began)
        if left < 20:
            out[name] = {"skipped": "no time left"}
            continue
        options = ["--tool", name, "--error-exitcode", "9", "--launch-timeout", "0"]
        program = [*ITSELF, "--launch-every-kernel"]
        # Without PyTorch's cache of memory every tensor ends where its allocation does.
        out[name] = command([tool, *options, *program], left, PYTORCH_NO_CUDA_MEMORY_CACHING="1")
    out["ok"] = all(out[name].get("ok", True) for name in ("memcheck", "racecheck"))
    return out


def launch_every_kernel() -> None:
    """Each op forward and backward, at sizes where every tile has an end outside its tensor."""
    torch.manual_seed(0)
    device = torch.device("cuda")
    odd = kernels.Sizes(((3, 5, 96, 32),), ((3, 5, 96, 32),), (3, 5, 7), torch.bfloat16)
    for case in kernels.cases(odd):
        inputs = case.make(device)
        op = functools.partial(kernels.sequence, functools.partial(case.op, impl="triton"))
        outs = kernels.results(op, inputs, [])
        if case.backward:
            kernels.results(op, inputs, [torch.randn_like(o) for o in outs])
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
    for case in attention_cases.cases(odd):
        inputs = case.make(device)
        for impl in attention.OURS if hopper else ("triton",):
            op = functools.partial(kernels.sequence, functools.partial(case.ours, impl=impl))
            upstream = [torch.randn_like(inputs[0])] if case.backward else []
            kernels.results(op, inputs, upstream)
            torch.cuda.synchronize()
            print(f"{case.label}, {impl}", flush=True)
    q, k, v, valid = next(attention_cases.cases(odd)).make(device)
    table = torch.randn(k.shape[1], q.shape[3] // 2, 2, device=device)
    sf.ring_attention(q, k, v, valid, k_table_SP2=table, impl="triton")
    torch.cuda.synchronize()


def times(command_name: str, tail: float, folder: Path, seconds: float) -> dict[str, Any]:
    """`bench kernels` or `bench attention`. In a process of its own, so that a fault there ends
    nothing else. tail: seconds that a case may take which has begun, as none is cut."""
    limit = ["--seconds", str(max(seconds - tail, 10)), "--out", str(folder)]
    file = folder / f"{command_name}.json"
    file.unlink(missing_ok=True)
    out = command([sys.executable, "-m", "bench", command_name, *limit], seconds)
    if file.exists():
        result = out[command_name] = json.loads(file.read_text())
        wrong = [
            f"{row['case']}: {name}: {c['failed']}"
            for row in result["rows"]
            for name, c in row.get("contestants", {}).items()
            if "failed" in c
        ]
        wrong += [f"{r['case']}: {r['failed']}" for r in result["rows"] if "failed" in r]
        out["failed"] = wrong
    return out


def streaming(folder: Path, seconds: float) -> dict[str, Any]:
    """`bench stream`, in a process of its own."""
    file = folder / "stream.json"
    file.unlink(missing_ok=True)
    out = command([sys.executable, "-m", "bench", "stream", "--out", str(folder)], seconds)
    if file.exists():
        out["stream"] = json.loads(file.read_text())
    return out


# Name, function, and the most seconds it may take. The last takes what the others leave of TOTAL,
# at least 40 s; its largest case takes about half a minute under torch.compile.
PARTS: tuple[tuple[str, Part, float], ...] = (
    ("tests", tests, 230.0),
    ("check", check, 45.0),
    ("attention", functools.partial(times, "attention", 15.0), 120.0),
    ("sanitizer", sanitizer, 45.0),
    ("streaming", streaming, 50.0),
    ("kernels", functools.partial(times, "kernels", 30.0), 240.0),
)


def command(arguments: Sequence[str], seconds: float, **environment: str) -> dict[str, Any]:
    """Runs a command in the repository for at most so long. ok, and the end of what it said."""
    kept = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    process = subprocess.Popen(
        arguments,
        cwd=ROOT,
        env={**kept, **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        start_new_session=True,
    )
    try:
        text, _ = process.communicate(timeout=max(seconds, 1))
        end = f"exit code {process.returncode}"
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)  # with whatever it started
        text, _ = process.communicate()
        end = f"cut after {seconds:.0f} s"
    ok = process.returncode == 0
    return {"ok": ok, "end": end, **({} if ok else {"tail": text[-6000:]})}


def run(
    folder: Path, parts: Sequence[tuple[str, Part, float]] = PARTS, total: float = TOTAL
) -> dict[str, Any]:
    began = time.monotonic()
    file = folder / "gpu.json"
    result: dict[str, Any] = {"machine": machine("cuda"), "parts": {}}

    def say(text: str) -> None:
        print(f"[{time.monotonic() - began:5.0f} s] {text}", flush=True)

    say(said(result["machine"]))
    for name, part, limit in parts:
        seconds = min(limit, total - (time.monotonic() - began))
        start = time.monotonic()
        if seconds < 5:
            out: dict[str, Any] = {"skipped": "no time left"}
        else:
            say(f"{name}, at most {seconds:.0f} s")
            try:
                out = part(folder, seconds)
            except Exception as error:  # the other parts still run
                out = {"ok": False, "end": timing.reason(error)}
        out["seconds"] = time.monotonic() - start
        result["parts"][name] = out
        with atomic(file) as temporary:
            temporary.write_text(json.dumps(result, indent=1))
        say(f"{name}: {verdict(out)}")
        if not out.get("ok", True):
            print(out.get("tail", "")[-2000:], flush=True)
    result["seconds"] = time.monotonic() - began
    with atomic(file) as temporary:
        temporary.write_text(json.dumps(result, indent=1))
    return result


def verdict(out: dict[str, Any]) -> str:
    """One line for a part."""
    if "skipped" in out:
        return f"skipped: {out['skipped']}"
    said = ["ok" if out.get("ok", True) else f"FAILED ({out.get('end', '')})"]
    if "counts" in out:
        said.append(", ".join(f"{n} {what}" for what, n in out["counts"].items()))
        said += [f["test"] for f in out["failures"][:10]]
    said += out.get("broken", [])[:10] + out.get("failed", [])[:10]
    for tool in ("memcheck", "racecheck"):
        if tool in out:
            said.append(f"{tool}: {out[tool].get('skipped') or out[tool]['end']}")
    return "; ".join(said)


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit code 1 where a part failed, 2 without a GPU."""
    parser = argparse.ArgumentParser(prog="python -m bench gpu", description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("out/gpu"), help="folder of the results")
    parser.add_argument("--launch-every-kernel", action="store_true", help=argparse.SUPPRESS)
    chosen = parser.parse_args(arguments)
    if not torch.cuda.is_available():
        print("python -m bench gpu: needs a GPU that PyTorch can use", file=sys.stderr)
        return 2
    if chosen.launch_every_kernel:
        launch_every_kernel()
        return 0
    try:
        folder = chosen.out.resolve()
        folder.mkdir(parents=True, exist_ok=True)
        result = run(folder)
    except (ValueError, OSError) as error:
        print(f"python -m bench gpu: {error}", file=sys.stderr)
        return 2
    console = kernels.plain_console()
    for name, report in (("kernels", kernels.report), ("attention", attention.report)):
        if name in result["parts"].get(name, {}):
            report(result["parts"][name][name], console)
    table = Table("part", "seconds", "", title=said(result["machine"]))
    for name, out in result["parts"].items():
        table.add_row(name, f"{out['seconds']:.0f}", verdict(out))
    console.print(table)
    print(f"as JSON: {folder}/gpu.json")
    return 0 if all(out.get("ok", True) for out in result["parts"].values()) else 1


if __name__ == "__main__":
    sys.exit(main())
