"""What is read from Hopper's machine code: main loops and what they ask for, products whose
registers are touched, registers that warps do not have."""

from __future__ import annotations

import pytest

from sfkernels.bounds import MainLoop
from sfkernels.check import Compiled, judge, loop_table
from sfkernels.machine_code import beyond, hazards, highest, load_of, main_loops, parse

SENT = "HGMMA.64x128x16.F32.BF16 R24, gdesc[UR8], RZ, !UPT"
SENT_TOO = "HGMMA.64x128x16.F32.BF16 R88, R152, gdesc[UR12].tnspB, R88, gsb0"
# A loop of two products, with a softmax beside the second.
TURN = [
    "BAR.SYNC.DEFER_BLOCKING 0x5, 0x100",
    "WARPGROUP.ARRIVE",
    f"{SENT}, gsb0",
    "WARPGROUP.ARRIVE",
    SENT_TOO,
    "BAR.ARV R4, 0x120",
    "WARPGROUP.DEPBAR.LE gsb0, 0x1",
    "BAR.SYNC.DEFER_BLOCKING 0x2, 0x80",
    "FMUL R25, R24, R3",
    "SHFL.BFLY PT, R2, R3, 0x2, 0x1f",
    "MUFU.EX2 R26, R25",
    "MOV R5, R26",
    "IMAD.MOV.U32 R6, RZ, RZ, R5",
    "IMAD R7, R6, R5, RZ",
    "LDS.64 R8, [R9]",
    "WARPGROUP.DEPBAR.LE gsb0, 0x0",
    "F2FP.BF16.F32.PACK_AB R152, R26, R25",
    "FMUL R88, R88, R3",
    "@P0 BRA 0x0",
]


def listing(*code: str) -> str:
    lines = []
    for n, text in enumerate(code):
        when, rest = text.split(" ", 1) if text.startswith("@") else ("", text)
        lines.append(f"        /*{16 * n:04x}*/ {when:>18} {rest} ;   /* 0x0000000000007918 */")
    return "\n".join(lines)


def test_instructions_are_parsed() -> None:
    first, second, third = parse(listing("@!P0 BRA 0x20", "IMAD.MOV.U32 R6, RZ, RZ, R5", SENT_TOO))
    assert (first.when, first.target, first.conditional) == ("!P0", 0x20, True)
    assert second.moves and not second.conditional and second.target is None
    assert (third.at, third.columns, third.multiplies) == (0x20, 128, True)
    assert str(third) == SENT_TOO
    (branch,) = parse(listing("BRA.U UP1, 0x10"))
    assert branch.conditional and branch.target == 0x10


def test_a_wait_that_is_tried_again_ends_no_main_loop() -> None:
    """It goes on from behind the code, back into the loop."""
    wait = "SYNCS.PHASECHK.TRANS64.TRYWAIT P0, [UR4], R2"
    code = [wait, "@!P0 BRA 0x60", SENT, "BRA.U UP0, 0x0", "EXIT", "NOP",
            wait, "@!P0 BRA 0x60", "BRA 0x20"]  # fmt: skip
    assert [(turn[0].at, turn[-1].at) for turn in main_loops(parse(listing(*code)))] == [(0, 0x30)]
    code[3] = "BRA 0x0"
    assert [(turn[0].at, turn[-1].at) for turn in main_loops(parse(listing(*code)))] == [(0, 0x30)]


def test_what_a_main_loop_asks_for() -> None:
    load = load_of(parse(listing(*TURN)), copied=1024)
    assert load is not None
    # Operands: 64 x 16 and 128 x 16 from shared memory, and 128 x 16; a load, one clock a warp.
    shared = (2048 + 4096 + 4096 + 4 * 128 + 1024) / 128
    assert load.clocks == {
        "tensor": 128, "shared": shared, "issue": len(TURN), "fma": 6, "alu": 2, "exp": 8,
    }  # fmt: skip
    assert (load.barriers, load.shuffles, load.moves) == (1, 1, 2)
    assert (load.binds, load.ceiling) == ("tensor", 790)
    bound = load_of(parse(listing(*TURN)), copied=128 * 256 - int(128 * shared) + 1024)
    assert bound is not None and (bound.binds, bound.ceiling) == ("shared", 395)
    assert load_of(parse(listing("FADD R1, R1, R1", "@P0 BRA 0x0")), 0) is None


def test_registers_of_products_under_way() -> None:
    assert hazards(parse(listing(*TURN, "EXIT"))) == []
    for change, said in (
        (("WARPGROUP.DEPBAR.LE gsb0, 0x1", "NOP"), "reads the sums of a product under way"),
        (("WARPGROUP.DEPBAR.LE gsb0, 0x0", "NOP"), "writes registers of a product under way"),
        (("DEPBAR.LE gsb0, 0x0", "DEPBAR.LE gsb0, 0x1"), "writes registers of a product"),
        (("MOV R5, R26", "MOV R5, R100"), "reads the sums of a product under way"),
        (("MUFU.EX2 R26", "MUFU.EX2 R154"), "writes registers of a product under way"),
        (("SHFL.BFLY PT, R2,", "SHFL.BFLY PT, R154,"), "writes registers of a product under way"),
        ((SENT_TOO, SENT_TOO.replace("R152", "R28")), "its left operand is a sum under way"),
    ):
        old, new = change
        text = listing(*TURN, "EXIT").replace(old, new)
        found = hazards(parse(text))
        assert found and any(said in one for one in found), (change, found)


def test_a_hazard_on_one_way_alone() -> None:
    """Where a branch leads past the wait."""
    code = [f"{SENT}, gsb0", "@P0 BRA 0x30", "WARPGROUP.DEPBAR.LE gsb0, 0x0", "FADD R1, R24, R2",
            "EXIT"]  # fmt: skip
    assert len(hazards(parse(listing(*code)))) == 1
    assert hazards(parse(listing(code[0], "NOP", *code[2:]))) == []


def test_products_that_pile_up() -> None:
    """A loop without a wait ends the search, too."""
    (found,) = hazards(parse(listing(f"{SENT}, gsb0", "@P0 BRA 0x0", "EXIT")))
    assert "products pile up that nobody waits for" in found


def test_code_that_no_way_leads_to() -> None:
    code = ["EXIT", "USETMAXREG.TRY_ALLOC.CTAPOOL UP0, 0xf0", SENT, "EXIT"]
    assert hazards(parse(listing(*code))) == []  # jumped to by a table
    (found,) = hazards(parse(listing("EXIT", "NOP", *code[2:])))
    assert "no way leads there" in found


def test_registers_that_warps_do_not_have() -> None:
    code = parse(
        listing(
            "USETMAXREG.DEALLOC.CTAPOOL 0x18", "LDG.E.64 R22, [R4]",
            "USETMAXREG.TRY_ALLOC.CTAPOOL UP0, 0xf0", SENT_TOO.replace("R88", "R176"),
        )
    )  # fmt: skip
    assert beyond(code) == [] and highest(code) == {24: 24, 240: 240}
    # Where a wait is tried again, behind all code, too.
    code = parse(
        listing(
            "USETMAXREG.DEALLOC.CTAPOOL 0x18", "@!P0 BRA 0x40",
            "USETMAXREG.TRY_ALLOC.CTAPOOL UP0, 0xf0", "EXIT", "MOV R100, R101", "BRA 0x20",
        )
    )  # fmt: skip
    assert beyond(code) == ["MOV R100, R101 at 0x40 is of warps that have 24 registers"]
    code = parse(listing("USETMAXREG.DEALLOC.CTAPOOL 0x18", "LDG.E.64 R23, [R4]"))
    assert beyond(code) == ["LDG.E.64 R23, [R4] at 0x10 is of warps that have 24 registers"]


@pytest.mark.parametrize(
    ("most", "said"),
    [
        (MainLoop(790, 1, 1, 2), ""),
        (MainLoop(791, 1, 1, 2), "at most 790 TFLOP/s, for tensor binds; must be 791 at least"),
        (MainLoop(1, 0, 1, 2), "1 barriers, at most 0 allowed"),
        (MainLoop(1, 1, 0, 2), "1 shuffles, at most 0 allowed"),
        (MainLoop(1, 1, 1, 1), "2 moves, at most 1 allowed"),
    ],
)
def test_bounds_of_a_main_loop(most: MainLoop, said: str) -> None:
    out = Compiled("hopper_fwd", "a case", "hopper.attention_fwd", 90, gluon=True, tensor_core=2,
                   beside=1, waits={1: 1}, sets_registers=True)  # fmt: skip
    assert "no loop multiplies matrices" in judge(out, 0, loop=most)
    out.load = load_of(parse(listing(*TURN)), 1024)
    found = [clause for clause in judge(out, 0, loop=most) if clause.startswith("main loop")]
    assert [f"main loop: {said}"] * bool(said) == found
    out.hazards = ["FADD R1, R24 at 0x30: reads the sums of a product under way"]
    assert out.hazards[0] in judge(out, 0)
    assert "a case" in loop_table([out]) and " tensor " in loop_table([out])
