"""`python -m sfkernels.check`: compiles every kernel ahead of time, without a GPU, and reads what
the compiler made of it.

Each case calls a public function with tensors of a real shape on the meta device. `launch.run`
hands its launches to `launch.recorder`, which compiles for the architecture in `launch.target` with
the setting that a GPU of it would get. Nothing here repeats a kernel's signature.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import json
import multiprocessing
import os
import re
import sys
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from sfkernels import launch
from sfkernels.bounds import LOOPS, MainLoop, ahead_of_time
from sfkernels.machine_code import (
    UNITS,
    Instruction,
    Load,
    beyond,
    disassemble,
    hazards,
    highest,
    load_of,
    loops,
    main_loops,
    parse,
    run_tool,
    warnings_of,
)

# A loop may park values outside it, where they cost nothing: ptxas does so to reach the next level
# of occupancy. One instruction to store and one to load each.
PARKED = 16
# Cases that a process compiles before it looks at them.
TOGETHER = 8


@dataclass(frozen=True)
class Limits:
    """Limits of an architecture: shared memory of a program and of a multiprocessor in KiB, and
    threads of a multiprocessor. All have 65,536 registers and 32 programs at most (CUDA C++
    Programming Guide, technical specifications per compute capability)."""

    program_kib: int
    shared_kib: int
    threads: int
    programs: int = 32
    registers: int = 65536


LIMITS = {
    80: Limits(163, 164, 2048),
    89: Limits(99, 100, 1536, programs=24),
    90: Limits(227, 228, 2048),
    100: Limits(227, 228, 2048),
}

# Kernels that are slow unless the softmax runs beside the products of matrices.
OVERLAPPING = ("attention_fwd", "hopper_fwd", "hopper_dq", "hopper_dkdv", "hopper_bwd")
# Kernels that are a product of matrices and little else.
PRODUCTS = ("linear",)
# Kernels over so few bytes that the width of their loads does not matter.
SMALL = ("rope_table", "sum_partials", "dmd_sum", "normal", "row_delta")


@dataclass
class Compiled:
    """Properties of one compiled kernel. loads, stores: instructions on global memory by bits.
    local: loads and stores of local memory, and looped: those of them inside a loop, which of loops
    that multiply matrices must be an innermost one, where their time goes. beside: exponentials
    that are computed while a product of matrices is under way on Hopper. tma: loads by TMA, which
    are not among the others. For what TMA feeds on Hopper, warned: what ptxas says of products that
    it serialises. For kernels in Gluon, and in Hopper's linear layers, waits: how many waits leave
    so many products under way; sets_registers: whether warps take registers from each other."""

    kernel: str
    case: str
    launcher: str
    arch: int
    warps: int = 0
    registers: int = 0
    stack: int = 0
    local: int = 0
    looped: int = 0
    shared: int = 0
    loads: dict[int, int] = dataclasses.field(default_factory=dict)
    stores: dict[int, int] = dataclasses.field(default_factory=dict)
    tensor_core: int = 0
    tma: int = 0
    fp64: int = 0
    beside: int = 0
    gluon: bool = False
    waits: dict[int, int] = dataclasses.field(default_factory=dict)
    load: Load | None = None
    used: dict[int, int] = dataclasses.field(default_factory=dict)
    hazards: list[str] = dataclasses.field(default_factory=list)
    warned: list[str] = dataclasses.field(default_factory=list)
    sets_registers: bool = False
    broken: list[str] = dataclasses.field(default_factory=list)

    @property
    def resident(self) -> int:
        """Warps of this kernel that a multiprocessor holds at once."""
        limits, threads = LIMITS[self.arch], 32 * self.warps
        per_thread = max(-(-self.registers // 8) * 8, 16)
        programs = min(
            limits.programs,
            limits.threads // threads,
            limits.registers // (per_thread * threads),
            limits.shared_kib * 1024 // (self.shared + 1024),  # 1 KiB a program is the system's
        )
        return programs * self.warps


def read_usage(text: str, out: Compiled) -> None:
    """Fills in registers and stack from the text of `cuobjdump -res-usage`."""
    usage = {name: int(value) for name, value in re.findall(r"\b([A-Z]+):(\d+)", text)}
    out.registers, out.stack = usage["REG"], usage["STACK"] + usage["LOCAL"]


def read_sass(sass: str, out: Compiled) -> list[Instruction]:
    """Fills in the counts of instructions from the text of `cuobjdump -sass`, and returns these."""
    code = parse(sass)
    loads: Counter[int] = Counter()
    stores: Counter[int] = Counter()
    under_way = False
    for i in code:
        if i.name in ("LDG", "LDGSTS"):
            loads[_bits(i.suffixes)] += 1
        elif i.name == "UTMALDG":
            out.tma += 1
        elif i.name == "STG":
            stores[_bits(i.suffixes)] += 1
        elif i.multiplies:
            out.tensor_core += 1
            under_way = i.name == "HGMMA"
        elif i.name == "WARPGROUP" and i.suffixes == ".DEPBAR.LE":
            under_way = not i.operands.endswith(", 0x0")
        elif i.name == "MUFU" and i.suffixes == ".EX2":
            out.beside += under_way
        if re.fullmatch(r"D(ADD|MUL|FMA|SETP|MMA|MNMX)", i.name) or re.search(
            r"\.(F64|\w+64H)\b", i.suffixes
        ):
            out.fp64 += 1
    out.loads, out.stores = dict(loads), dict(stores)
    out.local = sum(i.name in ("LDL", "STL") for i in code)
    around = main_loops(code) or loops(code)
    out.looped = len({i.at for turn in around for i in turn if i.name in ("LDL", "STL")})
    return code


def _bits(suffixes: str) -> int:
    """Bits that LDG.E.128, LDG.E.U16 or LDG.E.ENL2.256 moves; 32 where it names no width."""
    widths = [int(w) for w in re.findall(r"\.[US]?(8|16|32|64|128|256)\b", suffixes)]
    return widths[-1] if widths else 32


def judge(
    out: Compiled,
    narrow: int,
    may_spill: bool = False,
    may_serialise: bool = False,
    loop: MainLoop | None = None,
) -> list[str]:
    """Clauses, one for every bound that is broken; narrow, may_spill and may_serialise as in
    Bounded. loop: bounds of the main loops, at the settings that ship."""
    limits = LIMITS[out.arch]
    broken = []
    if not may_spill and (out.looped or out.local > PARKED):
        broken.append(
            f"spills: {out.local} loads and stores of local memory, {out.looped} of them in a loop "
            f"(stack of {out.stack} bytes); allowed are {PARKED} outside of loops"
        )
    if out.fp64:
        broken.append(f"{out.fp64} instructions in float64, must be none")
    if out.shared > limits.program_kib * 1024:
        broken.append(f"{out.shared} bytes of shared memory, at most {limits.program_kib} KiB fit")
    if out.registers * out.warps * 32 > limits.registers:
        broken.append(
            f"{out.registers} registers x {32 * out.warps} threads, at most {limits.registers} fit"
        )
    overlaps = out.arch == 90 and out.kernel in OVERLAPPING and out.tensor_core > 0
    if overlaps and not (out.beside or may_serialise):
        broken.append("no exponential is computed while a product is under way")
    if out.warned:
        broken.append(f"ptxas warns: {'; '.join(out.warned)}")
    if out.kernel in PRODUCTS and not out.tensor_core:
        broken.append("no tensor core multiplies")
    if _overlaps_products(out) and not any(out.waits):
        broken.append("every wait is for all products, so that none overlap")
    if out.gluon and not out.sets_registers:
        broken.append("the loading warp keeps its registers")
    broken += out.hazards
    if loop is not None:
        broken += _judge_loop(out.load, loop)
    # In Gluon loads go by TMA, and results leave in the tensor cores' layout, once a tile.
    if out.kernel not in SMALL and not out.gluon:
        for what, widths in (("loads", out.loads), ("stores", out.stores)):
            count = sum(n for bits, n in widths.items() if bits < 128)
            if count > narrow:
                broken.append(
                    f"{count} global {what} of less than 128 bits ({_counts(widths)}), at most "
                    f"{narrow} allowed"
                )
            by_tma = out.tma and (what == "loads" or not widths)
            if not by_tma and not any(bits >= 128 for bits in widths):
                broken.append(f"no global {what} of 128 bits ({_counts(widths) or 'none at all'})")
    return broken


def _judge_loop(load: Load | None, most: MainLoop) -> list[str]:
    if load is None:
        return ["no loop multiplies matrices"]
    broken = []
    if load.ceiling < most.ceiling:
        broken.append(
            f"main loop: at most {load.ceiling:.0f} TFLOP/s, for {load.binds} binds; must be "
            f"{most.ceiling} at least"
        )
    for what in ("barriers", "shuffles", "moves"):
        count, allowed = getattr(load, what), getattr(most, what)
        if count > allowed:
            broken.append(f"main loop: {count} {what}, at most {allowed} allowed")
    return broken


def _overlaps_products(out: Compiled) -> bool:
    """Tells whether it starts a product of matrices before it waits for the one before."""
    return out.gluon or (out.kernel in PRODUCTS and out.arch == 90)


def kernel_name(kernel: Any) -> str:
    return str(kernel.__name__).strip("_").removesuffix("_kernel")


def examine(
    kernel: Any, binary: Any, sass: str, out: Compiled, constants: Mapping[str, Any]
) -> None:
    """Fills in what a compiled kernel needs and is made of. sass: as `disassemble` gives it.
    constants: that it was compiled with."""
    out.gluon = getattr(kernel, "is_gluon", bool)()
    out.shared = binary.metadata.shared
    read_usage(run_tool("cuobjdump", binary.asm["cubin"], "-res-usage"), out)
    code = read_sass(sass, out)
    ptx = binary.asm["ptx"]
    out.fp64 = out.fp64 or len(re.findall(r"\.f64\b", ptx))
    if _overlaps_products(out):
        out.warps = binary.metadata.num_warps  # of all partitions
        read_ptx(ptx, out)
    if out.gluon:
        out.load = load_of(code, _copied(out.kernel, constants))
        out.used, out.hazards = highest(code), [*hazards(code), *beyond(code)]
    if out.tma and out.arch == 90:
        out.warned = warnings_of(ptx, out.arch)


def _copied(kernel: str, constants: Mapping[str, Any]) -> int:
    """Bytes that TMA moves to and from shared memory for a tile: two of 16 bits; and of dQ one of
    32."""
    elements: int = constants["N"] * constants["D"]
    return 4 * elements * (2 if kernel == "hopper_bwd" else 1)


def compile_cases(indices: Sequence[int], arch: int) -> list[tuple[int, Compiled]]:
    """Compiles what these cases launch, for one architecture, and judges it. Returns each with the
    index of its case."""
    every = ahead_of_time()
    built: list[tuple[int, Compiled, Any, Any, Mapping[str, Any]]] = []

    def record(
        kernel: Any, grid: Sequence[int], args: Sequence[Any], *, num_warps: int, **meta: Any
    ) -> None:
        out = Compiled(kernel_name(kernel), entry.name, entry.launcher, arch, warps=num_warps)
        binary = None
        try:
            binary = kernel.warmup(*args, grid=(1,), num_warps=num_warps, **meta)
        except Exception as error:  # the compiler's; whatever it is, the other cases go on
            out.broken.append(f"does not compile: {_first_line(error)}")
        built.append((index, out, kernel, binary, meta))

    launch.target, launch.recorder = arch, record
    use_driver(arch)
    for index in indices:
        entry = every[index]
        entry.case.launch(entry.impl, torch.device("meta"))
    binaries = {binary.hash: binary for *_, binary, _ in built if binary}
    cubins = [binary.asm["cubin"] for binary in binaries.values()]
    sass = dict(zip(binaries, disassemble(cubins, arch), strict=True))
    for index, out, kernel, binary, meta in built:
        if binary:
            entry = every[index]
            examine(kernel, binary, sass[binary.hash], out, meta)
            loop = LOOPS.get((out.kernel, meta.get("D", 0)))
            out.broken += judge(out, entry.narrow, entry.may_spill, entry.may_serialise, loop)
    return [(index, out) for index, out, *_ in built]


def read_ptx(ptx: str, out: Compiled) -> None:
    """Fills in what the text of a kernel says of waits for products and of registers."""
    waits = re.findall(r"wgmma\.wait_group\.sync\.aligned (\d+)", ptx)
    out.waits = dict(Counter(map(int, waits)))
    out.sets_registers = "setmaxnreg.dec" in ptx and "setmaxnreg.inc" in ptx


class _Driver:
    """Driver with what Triton needs to compile: the target, and a device to cache kernels by."""

    def __init__(self, arch: int) -> None:
        self.arch = arch

    def get_current_target(self) -> Any:
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", self.arch, 32)

    def get_current_device(self) -> int:
        return self.arch  # one cache of kernels for each architecture

    def get_current_stream(self, device: int) -> int:
        return 0


def use_driver(arch: int) -> None:
    """Lets Triton compile for an architecture where there is no GPU of it."""
    from triton.runtime import driver

    driver.set_active(_Driver(arch))


def _first_line(error: Exception) -> str:
    lines = [line for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0] if lines else ''}"


def _prepare(tuned: Path) -> None:
    """Prepares a process: real compilation, no GPU, settings from `tuned`."""
    # The interpreter is chosen when kernels are defined, which is after this.
    os.environ.pop("TRITON_INTERPRET", None)
    os.environ["TRITON_DISABLE_LINE_INFO"] = "1"  # compiles sooner, to the same code
    launch.TUNED = tuned
    launch.tuned.cache_clear()
    launch._setting.cache_clear()
    torch.set_num_threads(1)


def check(
    kernels: Sequence[str] | None = None,
    archs: Sequence[int] | None = None,
    tuned: Path = launch.TUNED,
) -> list[Compiled]:
    """Compiles and judges every case of the kernels (None: all) for the architectures (None: all),
    in as many processes as there are cores. Raises ValueError for unknown names."""
    every = ahead_of_time()
    known = list(dict.fromkeys(case.launcher for case in every))
    for name in kernels or ():
        if name not in known:
            raise ValueError(f"kernel {name!r}: must be one of {', '.join(known)}")
    for arch in archs or ():
        if arch not in LIMITS:
            raise ValueError(f"arch {arch}: must be one of {', '.join(map(str, LIMITS))}")
    chosen = [i for i, case in enumerate(every) if not kernels or case.launcher in kernels]
    work: list[tuple[list[int], int]] = []
    for arch in archs or LIMITS:
        indices = [i for i in chosen if arch in every[i].archs]
        work += [(indices[at : at + TOGETHER], arch) for at in range(0, len(indices), TOGETHER)]
    # Fresh processes: a forked one may inherit a lock that a thread of the parent held.
    context = multiprocessing.get_context("spawn")
    workers = max(min(os.cpu_count() or 1, len(work)), 1)
    with ProcessPoolExecutor(workers, context, _prepare, (tuned,)) as pool:
        done = [*itertools.chain(*pool.map(compile_cases, *zip(*work, strict=True)))]
    return [out for _, out in sorted(done, key=lambda pair: pair[0])]


def _counts(widths: dict[int, int]) -> str:
    return " ".join(f"{n}x{bits}" for bits, n in sorted(widths.items(), reverse=True))


def table(results: Iterable[Compiled]) -> str:
    """Results as plain text: this package needs neither a terminal nor rich."""
    head = "kernel|case|sm|warps|regs|regs x threads|warps an SM|stack|local|shared"
    rows = [(*head.split("|"), "loads", "stores", "mma", "beside", "fp64", "")]
    for r in results:
        numbers = (r.arch, r.warps, r.registers, r.registers * r.warps * 32)
        more = (r.resident if r.registers else 0, r.stack, r.local, r.shared)
        rows.append(
            (
                *(r.kernel, r.case, *map(str, numbers + more), _counts(r.loads), _counts(r.stores)),
                *(str(r.tensor_core), str(r.beside), str(r.fp64)),
                "BROKEN" if r.broken else "ok",
            )
        )
    return _aligned(rows, (0, 1, 10, 11, 15))


MAIN_LOOPS = """\
Main loops of kernels with specialised warps: clocks of a multiprocessor for a tile that both
consumers visit, what binds and what it leaves of the 790 TFLOP/s at which an H200 multiplies
matrices; a consumer's barriers, shuffles and moves; registers used of those that warps have."""


def loop_table(results: Iterable[Compiled]) -> str:
    """The loads of main loops, as plain text."""
    head = "kernel", "case", *UNITS, "binds", "TFLOP/s", "barriers", "shuffles", "moves", "used"
    rows: list[tuple[str, ...]] = [head]
    for r in results:
        if r.load:
            clocks = (f"{r.load.clocks[unit]:.0f}" for unit in UNITS)
            counted = map(str, (r.load.barriers, r.load.shuffles, r.load.moves))
            used = " ".join(f"{n}/{most}" for most, n in sorted(r.used.items()))
            ceiling = f"{r.load.ceiling:.0f}"
            rows.append((r.kernel, r.case, *clocks, r.load.binds, ceiling, *counted, used))
    return _aligned(rows, (0, 1, 2 + len(UNITS), len(rows[0]) - 1))


def _aligned(rows: Sequence[Sequence[str]], left: Sequence[int]) -> str:
    """Rows as text; columns are flush right but those named."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return "\n".join(
        "  ".join(
            cell.ljust(width) if i in left else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    )


def _tuned_folder(path: Path) -> tuple[Path, int | None]:
    """The folder to read settings from and, for a file sm_XX.json, its architecture."""
    if path.is_dir():
        return path, None
    named = re.fullmatch(r"sm_(\d+)\.json", path.name)
    if not named:
        raise ValueError(f"--tuned {path}: must be a folder or a file named sm_XX.json")
    if not path.is_file():
        raise ValueError(f"--tuned {path}: no such file or folder")
    return path.parent, int(named[1])


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line. Exit code 1 where a bound is broken, 2 with one sentence for bad input."""
    parser = argparse.ArgumentParser(
        prog="python -m sfkernels.check", description="Compile every kernel ahead of time."
    )
    parser.add_argument("--kernel", action="append", metavar="NAME", help="only this launcher")
    parser.add_argument("--arch", action="append", type=int, metavar="XX", help="only sm_XX")
    parser.add_argument(
        "--tuned",
        type=Path,
        default=launch.TUNED,
        metavar="PATH",
        help="a folder of settings, or one file sm_XX.json, instead of the shipped ones",
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the table here too")
    chosen = parser.parse_args(arguments)
    try:
        folder, arch = _tuned_folder(chosen.tuned)
        archs = chosen.arch or ([arch] if arch else None)
        results = check(chosen.kernel, archs, folder)
        if chosen.json:
            rows = [dataclasses.asdict(r) for r in results]
            chosen.json.write_text(json.dumps(rows, indent=1))
    except (ValueError, OSError) as error:
        print(f"python -m sfkernels.check: {error}", file=sys.stderr)
        return 2
    print(table(results))
    if any(r.load for r in results):
        print(f"\n{MAIN_LOOPS}\n{loop_table(results)}")
    broken = [
        f"{r.kernel}, {r.case}, sm_{r.arch}, {r.warps} warps: {clause}"
        for r in results
        for clause in r.broken
    ]
    print(f"\n{len(results)} kernels compiled, {len(broken)} bounds broken", *broken, sep="\n")
    return 1 if broken else 0


if __name__ == "__main__":
    sys.exit(main())
