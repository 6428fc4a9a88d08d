"""Reads in Hopper's machine code, without running it, what each main loop of a kernel asks of a
multiprocessor, hence the most it can reach; products whose registers are touched while they are
under way; and registers beyond those that warps have taken.

Rates are those of the H100 and the H200 (NVIDIA H100 white paper; CUDA C++ Programming Guide,
throughput of native arithmetic instructions), a multiprocessor having four schedulers. They tell
what binds, not how long a loop takes: latencies, and what waits for what, are not in them.
"""

from __future__ import annotations

import itertools
import os
import re
import struct
import subprocess
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

# Of a large product of matrices, measured on an H200: what tensor cores that never wait reach.
PRODUCT_TFLOPS = 790
SHARED_BYTES = 128  # a clock
_ALU = ("FMNMX", "FSEL", "FSETP", "F2FP", "ISETP", "IADD3", "LOP3", "SHF", "LEA", "VIADD", "SEL")
# The unit that executes an instruction of a warp, and how many clocks of a scheduler it takes.
_UNIT = {
    **dict.fromkeys(("FFMA", "FMUL", "FADD"), ("fma", 1)),
    "IMAD": ("fma", 2),
    **dict.fromkeys((*_ALU, "PRMT"), ("alu", 2)),
    "MUFU": ("exp", 8),
}
UNITS = ("tensor", "shared", "issue", "fma", "alu", "exp")

_LINE = re.compile(r"^\s+/\*([0-9a-f]{4,})\*/\s+(?:@(!?U?P\w+)\s+)?([A-Z]\w*)((?:\.\w+)*)\s*(.*?);")


class Instruction(NamedTuple):
    """An instruction of SASS. when: the predicate it depends on, empty if none."""

    at: int
    when: str
    name: str
    suffixes: str
    operands: str

    @property
    def target(self) -> int | None:
        """Where a branch goes."""
        found = re.search(r"0x([0-9a-f]+)", self.operands) if self.name == "BRA" else None
        return int(found[1], 16) if found else None

    @property
    def conditional(self) -> bool:
        """Tells whether a branch may be passed by."""
        return bool(self.when or re.search(r"\bU?P\d", self.operands))

    @property
    def columns(self) -> int:
        """Columns of a wgmma of 64 rows."""
        found = re.search(r"\.64x(\d+)x", self.suffixes)
        return int(found[1]) if found and self.name == "HGMMA" else 0

    @property
    def multiplies(self) -> bool:
        """Tells whether tensor cores execute it, not in float64."""
        return "MMA" in self.name and not self.name.startswith("DMMA")

    @property
    def moves(self) -> bool:
        """Tells whether it copies a register."""
        return self.name == "MOV" or (self.name == "IMAD" and self.suffixes.startswith(".MOV"))

    def __str__(self) -> str:
        return f"{self.name}{self.suffixes} {self.operands}".strip()


def parse(sass: str) -> list[Instruction]:
    """The instructions of a listing by nvdisasm or cuobjdump."""
    found = (_LINE.match(line) for line in sass.splitlines())
    return [Instruction(int(m[1], 16), m[2] or "", m[3], m[4], m[5].strip()) for m in found if m]


def loops(code: Sequence[Instruction]) -> list[list[Instruction]]:
    """The code from where a branch goes back to, up to that branch. None is from where a wait for
    an mbarrier goes on that did not pass at once: it is tried there again, behind all other."""
    back = {(i.target, i.at) for i in code if i.target is not None and i.target < i.at}
    for wait, again, on in zip(code, code[1:], code[2:], strict=False):
        if wait.name == "SYNCS" and again.target == wait.at:
            back.discard((on.target, on.at))
    return [[i for i in code if lo <= i.at <= hi] for lo, hi in sorted(back)]


def main_loops(code: Sequence[Instruction]) -> list[list[Instruction]]:
    """The innermost loops that multiply matrices."""
    busy = [turn for turn in loops(code) if any(i.multiplies for i in turn)]
    spans = [(turn[0].at, turn[-1].at) for turn in busy]
    return [
        turn
        for turn, a in zip(busy, spans, strict=True)
        if not any(a != b and a[0] <= b[0] and b[1] <= a[1] for b in spans)
    ]


@dataclass(frozen=True)
class Load:
    """Demand of one turn of the main loops of a kernel with specialised warps on a multiprocessor,
    both consumers together, in clocks of what is asked: tensor cores, shared memory, slots to issue
    instructions, units for products and sums, for comparisons and conversions, for exponentials.
    Each is that of all instructions there, those that a branch leaves out of most turns included.

    barriers, shuffles, moves: instructions of a consumer's turn, the larger number: meetings of all
    warps of a consumer, exchanges between threads, copies of registers."""

    clocks: dict[str, float]
    barriers: int
    shuffles: int
    moves: int

    @property
    def binds(self) -> str:
        return max(self.clocks, key=lambda unit: self.clocks[unit])

    @property
    def ceiling(self) -> float:
        """TFLOP/s of the products at most, on an H200."""
        return PRODUCT_TFLOPS * self.clocks["tensor"] / max(self.clocks.values())


def load_of(code: Sequence[Instruction], copied: int) -> Load | None:
    """The load of the main loops, of a kernel whose consumers have one each. copied: bytes that
    TMA moves to and from shared memory in a turn. None for a kernel without such loops."""
    turns = main_loops(code)
    if not any(i.columns for turn in turns for i in turn):
        return None
    # A product of 64 x N x 16 takes N / 2 clocks.
    clocks = {"tensor": float(sum(i.columns for turn in turns for i in turn)) / 2}
    clocks["shared"] = (copied + sum(_shared(i) for turn in turns for i in turn)) / SHARED_BYTES
    clocks["issue"] = float(sum(map(len, turns)))  # each scheduler has a warp of each consumer
    clocks |= dict.fromkeys(UNITS[3:], 0.0)
    for unit, each in (_UNIT[i.name] for turn in turns for i in turn if i.name in _UNIT):
        clocks[unit] += each
    return Load(
        clocks,
        max(sum(i.name == "BAR" and i.operands.endswith(", 0x80") for i in t) for t in turns),
        max(sum(i.name == "SHFL" for i in turn) for turn in turns),
        max(sum(i.moves for i in turn) for turn in turns),
    )


def _shared(i: Instruction) -> int:
    """Bytes that an instruction of a consumer's four warps moves in shared memory, at least: its
    threads may load the same ones."""
    if i.columns:
        left = 0 if re.match(r"R\d+, R\d+", i.operands) else 64 * 16 * 2
        return left + i.columns * 16 * 2
    if i.name in ("LDSM", "STSM"):
        return 128 * 4 * int((re.search(r"\.(\d)$", i.suffixes) or "01")[1])
    if i.name == "STS":
        return 128 * int((re.search(r"\.(64|128)\b", i.suffixes) or (0, 32))[1]) // 8
    return 4 * SHARED_BYTES if i.name == "LDS" else 0


# Groups of products that a kernel sends before it waits for one, at most.
UNDER_WAY = 8
# Instructions that write no register, or none that a product can have.
_NO_RESULT = frozenset((
    "ST", "STG", "STS", "STL", "STSM", "RED", "ATOM", "UTMALDG", "UTMAREDG", "SYNCS", "BAR",
    "MEMBAR", "FENCE", "ERRBAR", "CCTL", "BRA", "EXIT", "NOP", "BSYNC", "BSSY", "WARPSYNC",
    "WARPGROUP", "ISETP", "FSETP", "PLOP3", "UISETP", "R2UR", "S2UR", "VOTEU", "ELECT",
    "USETMAXREG",
))  # fmt: skip


def _touched(i: Instruction) -> tuple[set[int], set[int]]:
    """Registers that an instruction other than a product writes, and that it reads."""
    operands = [o.strip() for o in i.operands.split(",")] if i.operands else []
    while operands and re.fullmatch(r"U?P[T\d]", operands[0]):  # predicates that it writes
        operands = operands[1:]
    width = 4 if ".128" in i.suffixes else 2 if ".64" in i.suffixes or i.name == "CS2R" else 1
    if i.name == "LDSM":
        width = int((re.search(r"\.(\d)$", i.suffixes) or "01")[1])
    written: set[int] = set()
    read: set[int] = set()
    if i.name not in _NO_RESULT and operands and (found := re.match(r"R(\d+)", operands[0])):
        written = {int(found[1]) + k for k in range(width)}
        operands = operands[1:]
    for operand in operands:
        for found in re.finditer(r"\bR(\d+)(\.64)?", operand):
            wide = 2 if found[2] else 1
            if i.name in ("STG", "STS", "STSM") and operand is operands[-1]:
                wide = 4 if i.suffixes.endswith(".4") else width
            read |= {int(found[1]) + k for k in range(wide)}
    return written, read


class _Group(NamedTuple):
    """Products under way that are waited for together: their sums' registers and those of their
    left operands. open: more may join it."""

    sums: frozenset[int]
    left: frozenset[int]
    open: bool


def hazards(code: Sequence[Instruction]) -> list[str]:
    """Instructions that write what a wgmma under way reads or writes, or read its sums, on some way
    through the code."""
    index = {i.at: n for n, i in enumerate(code)}
    found: dict[int, str] = {}
    seen: set[tuple[int, tuple[_Group, ...]]] = set()
    ways: list[tuple[int, tuple[_Group, ...]]] = [(n, ()) for n in _entries(code)]
    while ways:
        n, groups = ways.pop()
        if n >= len(code) or (n, groups) in seen:
            continue
        seen.add((n, groups))
        i = code[n]
        if i.columns:
            groups, wrong = _sent(i, groups)
        else:
            groups, wrong = _waited(i, groups), _meets(i, groups)
        if len(groups) > UNDER_WAY:
            wrong, groups = "products pile up that nobody waits for", ()
        if wrong:
            found[i.at] = f"{i} at {i.at:#x}: {wrong}"
        ways += [(m, groups) for m in _after(code, n, index)]
    reached = {n for n, _ in seen}
    for n, i in enumerate(code):
        if i.columns and n not in reached:
            found[i.at] = f"{i} at {i.at:#x}: no way leads there"
    return [found[at] for at in sorted(found)]


def _entries(code: Sequence[Instruction]) -> list[int]:
    """Where the code begins, and where a partition does, which is jumped to by a table."""
    return [0, *(n for n, i in enumerate(code) if i.name == "USETMAXREG")]


def _after(code: Sequence[Instruction], n: int, index: Mapping[int, int]) -> list[int]:
    """What may come after an instruction; index: of instructions by address."""
    i = code[n]
    if i.name == "EXIT" and not i.when:
        return []
    if i.target is None:
        return [n + 1]
    there = [index[i.target]] if i.target in index else []
    return [*there, n + 1] if i.conditional else there


def _sent(i: Instruction, groups: tuple[_Group, ...]) -> tuple[tuple[_Group, ...], str]:
    """The groups with a product more, and what is wrong with it."""
    sums = int((re.match(r"R(\d+)", i.operands) or "00")[1])
    mine = frozenset(range(sums, sums + i.columns // 2))
    operand = re.match(r"R\d+, R(\d+)", i.operands)
    left = frozenset(range(int(operand[1]), int(operand[1]) + 4)) if operand else frozenset()
    before = groups[:-1] if groups and groups[-1].open else groups
    last = groups[-1] if groups and groups[-1].open else _Group(frozenset(), frozenset(), True)
    wrong = ""
    for group in before:
        if left & group.sums:
            wrong = "its left operand is a sum under way"
        if mine & group.left:
            wrong = "its sums are a left operand under way"
    joined = _Group(last.sums | mine, last.left | left, "gsb0" not in i.operands)
    return (*before, joined), wrong


def _waited(i: Instruction, groups: tuple[_Group, ...]) -> tuple[_Group, ...]:
    if i.name != "WARPGROUP" or not i.suffixes.startswith(".DEPBAR"):
        return groups
    left = int(i.operands.split(",")[1], 16)
    closed = [group for group in groups if not group.open]
    kept = closed[len(closed) - left :] if left else []
    return (*kept, *(group for group in groups if group.open))


def _meets(i: Instruction, groups: Iterable[_Group]) -> str:
    written, read = _touched(i)
    for group in groups:
        if written & (group.sums | group.left):
            return "writes registers of a product under way"
        if read & group.sums:
            return "reads the sums of a product under way"
    return ""


def beyond(code: Sequence[Instruction]) -> list[str]:
    """Instructions that use more registers than their warps have taken (setmaxnreg)."""
    return [
        f"{i} at {i.at:#x} is of warps that have {most} registers"
        for most, part in _by_registers(code)
        for i in part
        if _highest(i) >= most
    ]


def highest(code: Sequence[Instruction]) -> dict[int, int]:
    """The highest register that is used of each number that warps take, counted from 1."""
    found: dict[int, int] = {}
    for most, part in _by_registers(code):
        found[most] = max(found.get(most, 0), *(1 + _highest(i) for i in part))
    return found


def _by_registers(code: Sequence[Instruction]) -> Iterator[tuple[int, list[Instruction]]]:
    """What may come after a setmaxnreg, before the next, with what the first gives."""
    index = {i.at: n for n, i in enumerate(code)}
    for begin in _entries(code)[1:]:
        seen: set[int] = set()
        ways = [begin]
        while ways:
            n = ways.pop()
            if n < len(code) and n not in seen and (n == begin or code[n].name != "USETMAXREG"):
                seen.add(n)
                ways += _after(code, n, index)
        yield int(code[begin].operands.split(",")[-1], 16), [code[n] for n in sorted(seen)]


def _highest(i: Instruction) -> int:
    if i.columns:
        sums = int((re.match(r"R(\d+)", i.operands) or "00")[1])
        return sums + i.columns // 2 - 1
    written, read = _touched(i)
    return max(written | read, default=-1)


def disassemble(cubins: Sequence[bytes], arch: int) -> list[str]:
    """The SASS of each, by one start of nvdisasm, which alone takes longer than most kernels."""
    codes = [_code(cubin) for cubin in cubins]
    target = f"SM{arch}a" if arch >= 90 else f"SM{arch}"
    said = run_tool("nvdisasm", b"".join(codes), "-ndf", "-b", target) if codes else ""
    lines = iter([line for line in said.splitlines() if line.lstrip().startswith("/*")])
    # An instruction has 16 bytes. Jumps are relative, so that loops stay loops at other addresses.
    return ["\n".join(itertools.islice(lines, len(code) // 16)) for code in codes]


def _code(cubin: bytes) -> bytes:
    """The instructions of an ELF file for a GPU."""
    (table,) = struct.unpack_from("<Q", cubin, 40)
    size, count, names = struct.unpack_from("<3H", cubin, 58)
    heads = [struct.unpack_from("<IIQQQQ", cubin, table + i * size) for i in range(count)]
    at = heads[names][4]
    return b"".join(
        cubin[start : start + length]
        for name, _, _, _, start, length in heads
        if cubin[at + name :].startswith(b".text.")
    )


def run_tool(name: str, content: bytes, *options: str) -> str:
    """Output of one of NVIDIA's tools that come with Triton for a file with this content."""
    with tempfile.NamedTemporaryFile() as file:
        file.write(content)
        file.flush()
        command = [str(tool(name)), *options, file.name]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def tool(name: str) -> Path:
    """Path of one of NVIDIA's tools that come with Triton."""
    import triton

    return Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name


def warnings_of(ptx: str, arch: int) -> list[str]:
    """Warnings of ptxas on products that it serialises (C75xx), which Triton does not pass on."""
    with tempfile.NamedTemporaryFile("w", suffix=".ptx") as file:
        file.write(ptx)
        file.flush()
        command = [str(tool("ptxas")), "-v", f"--gpu-name=sm_{arch}a", file.name, "-o", os.devnull]
        done = subprocess.run(command, capture_output=True, text=True)
    return sorted(set(re.findall(r"\(C75\d\d\)[^\n]*", done.stdout + done.stderr)))
