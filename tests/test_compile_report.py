"""compile_report: what it reads out of machine code, what its clocks are, and what it says when it cannot compile."""

import re
from dataclasses import replace

import pytest

from pallas_kernels import _machine_code, compile_report
from pallas_kernels.workloads import WORKLOADS
from paro_jax.__main__ import main

# Two loops, as nvdisasm prints them: a wait without tensor instructions, and the main one.
SASS = """
        /*0000*/                   MOV R1, c[0x0][0x28] ;
.L_x_0:
        /*0010*/              @!P0 SYNCS.PHASECHK.TRANS64.TRYWAIT P1, [R4], R5 ;
        /*0020*/              @!P1 BRA `(.L_x_0) ;
.L_x_1:
        /*0030*/                   IGMMA.64x128x32.S8.S8 R24, gdesc[UR4], R24 ;
        /*0040*/                   IGMMA.64x128x32.S8.S8 R24, gdesc[UR8], R24, gsb0 ;
        /*0050*/                   FMNMX R3, R24, R25, !PT ;
        /*0060*/                   FFMA R5, R24, R6, R7 ;
        /*0070*/                   MUFU.EX2 R5, R5 ;
        /*0080*/                   I2FP.F32.S32 R9, R24 ;
        /*0090*/               @P0 BRA `(.L_x_1) ;
        /*00a0*/                   EXIT ;
"""


def test_the_main_loop_is_the_one_with_tensor_instructions():
    loop = _machine_code.main_loop(SASS)
    assert len(loop.instructions) == 7 and loop.every == loop.instructions
    assert _machine_code.tensor(loop.instructions) == ["IGMMA.64x128x32.S8.S8"] * 2
    assert _machine_code.opcodes(loop.instructions)["MUFU"] == 1
    with pytest.raises(RuntimeError, match="no loop with tensor instructions"):
        _machine_code.main_loop(SASS.replace("IGMMA", "IADD3"))


def test_what_most_steps_jump_over_is_counted_apart():
    """A branch over two instructions, one to code behind the loop that comes back, and a wait inside."""
    jumps = """
        /*0060*/              @P1 BRA `(.L_x_2) ;
        /*0070*/                   FMUL R5, R24, R6 ;
        /*0080*/                   FMUL R5, R24, R6 ;
.L_x_2:
        /*0090*/              @!P2 BRA `(.L_x_4) ;
.L_x_3:
        /*00a0*/                   FADD R9, R24, R25 ;
.L_x_5:
        /*00b0*/                   SYNCS.PHASECHK.TRANS64.TRYWAIT P1, [R4], R5 ;
        /*00c0*/              @!P1 BRA `(.L_x_5) ;
        /*00d0*/             @P0 BRA `(.L_x_1) ;
        /*00e0*/                   EXIT ;
.L_x_4:
        /*00f0*/                   I2FP.F32.S32 R9, R24 ;
        /*0100*/                   BRA `(.L_x_3) ;
"""
    loop = _machine_code.main_loop(SASS[: SASS.index("        /*0060*/")] + jumps)
    usual, every = (_machine_code.opcodes(ops) for ops in loop)
    assert usual == {"BRA": 4, "IGMMA": 2, "FMNMX": 1, "FADD": 1, "SYNCS": 1}
    assert every == usual | {"BRA": 5, "FMUL": 2, "I2FP": 1}


def test_clocks_are_instructions_over_rates():
    # One pass does 64 x 128 scores, so 128 x 128 take two, each in 4 warps.
    instructions, clocks = compile_report.per_block(_machine_code.main_loop(SASS).instructions, 64 * 128)
    assert instructions["ex2"] == instructions["fp32"] == instructions["integer"] == instructions["pack"] == 8
    assert instructions["tensor"] == 16 and instructions["all"] == 56 and instructions["conversion"] == 0
    assert clocks["ex2"] == 16 and clocks["fp32"] == 2 and clocks["integer"] == 4 and clocks["issue"] == 14
    # facts: 1024 clocks for both int8 products of 128 x 128 scores at 128 channels, of which this is a quarter.
    assert clocks["tensor"] == 1024 / 4


@pytest.mark.parametrize(
    ("kind", "clocks"), [("IGMMA.64x128x32", 256), ("QGMMA.64x128x32", 256), ("HGMMA.64x128x32", 512)]
)
def test_each_kind_of_tensor_instruction_has_its_rate(kind, clocks):
    loop = _machine_code.main_loop(SASS.replace("IGMMA.64x128x32.S8.S8", kind))
    assert compile_report.per_block(loop.instructions, 64 * 128)[1]["tensor"] == clocks


def test_what_the_compiler_says():
    text = """ptxas info    : Compiling entry function 'k' for 'sm_90a'
    0 bytes stack frame, 24 bytes spill stores, 16 bytes spill loads
ptxas info    : Used 168 registers, used 9 barriers, 1024 bytes smem"""
    facts = {"registers": 168, "spills": 24, "barriers": 9, "reallocates": True}
    assert compile_report.compiler_facts(text) == facts
    ignored = "ptxas info : (C7504) Potential Performance Loss: 'setmaxnreg' ignored to maintain compatibility\n"
    assert compile_report.compiler_facts(ignored + text) == facts | {"reallocates": False}
    for missing in (text.replace("spill stores", "stores"), text.replace("registers", "regs")):
        with pytest.raises(ValueError, match="expected the number of (spills|registers), found"):
            compile_report.compiler_facts(missing)


def test_every_named_workload_is_there_at_every_width():
    rows = dict(compile_report.kernels("sm_90a"))
    assert rows["flux_1024 arrange v int8"].role == "v" and rows["flux_1024 arrange v int8"].op == "arrange"
    kinds = compile_report.TARGETS["sm_90a"].kinds
    assert len(rows) == len(compile_report.WORKLOADS) * (len(kinds) * len(compile_report.SHAPES) + 3 + 2)
    assert rows["flux_1024 projection k int8"].role == "k" and rows["flux_1024 projection k int8"].qk == "int8"
    assert rows["flux_1024 int8/int8 64x64 running"].p_scale == "running"
    assert rows["wan_14b_720p int8/int8 128x128"] == replace(
        WORKLOADS["wan_14b_720p"], block=(128, 128), qk="int8", pv="int8", device="sm_90"
    )


@pytest.mark.parametrize(
    ("target", "op", "clocks"),
    [
        ("sm_80", "HMMA.16816.F32.BF16", 2), ("sm_80", "IMMA.16832.S8.S8.SAT", 2), ("sm_80", "IMMA.16864.U4.S4", 2),
        ("sm_86", "IMMA.16832.S8.S8", 4), ("sm_89", "IMMA.16864.S4.S4", 4), ("sm_89", "HMMA.16816.F32.BF16", 4),
    ],
)  # fmt: skip
def test_mma_has_the_rate_of_its_gpu_and_its_widths(target, op, clocks):
    """16 x 8 x 16, 32 or 64 multiply-adds: an A100 does 1024, 2048 or 4096 a clock and SM, an A10 half of it."""
    assert compile_report.per_block([op], 4 * 128 * 128, target)[1]["tensor"] == clocks


def test_units_have_the_rates_of_their_gpu():
    ops = ["FADD", "LDSM.16.M88.4", "LDSM.16.MT88.2", "LDS.64", "LDS"]
    (_, a100), (counts, l40s) = (compile_report.per_block(ops, 4 * 128 * 128, target) for target in ("sm_80", "sm_89"))
    assert (a100["fp32"], l40s["fp32"]) == (0.5, 0.25)
    assert counts["shared"] == 4 and a100["shared"] == l40s["shared"] == 4 + 2 + 2 + 1  # 128 bytes a clock


def test_ampere_targets_have_rows_at_every_width():
    for target in ("sm_80", "sm_86", "sm_89"):
        rows = dict(compile_report.kernels(target))
        assert {(r.qk, r.pv) for r in rows.values() if r.op == "block_attention"} == {
            ("bf16", "bf16"), ("int8", "int8"), ("int4", "int8"), ("int4", "int4")
        }  # fmt: skip
        assert {r.device for r in rows.values()} == {target}
        arranged = {(r.role, r.qk) for r in rows.values() if r.op == "arrange" and r.layout == "ampere"}
        assert arranged == {(role, width) for role in "qkv" for width in ("int8", "int4")}


@pytest.mark.parametrize("target", ["sm_75", "sm_100", "gpu"])
def test_a_target_without_kernels_is_a_mistake_that_says_why(target, capsys):
    assert main(["compile-report", "--target", target]) == 2
    said = capsys.readouterr().err
    assert re.search(
        rf"target: expected one of sm_90a, .*got '{target}'.*hopper: device {target} is not .*ampere: device {target}",
        said,
    )


@pytest.mark.skipif(compile_report.missing() is None, reason="the compiler is here")
def test_without_the_compiler_it_says_how_to_get_it(capsys):
    assert main(["compile-report"]) == 2
    said = capsys.readouterr().err
    assert "the CUDA compiler packages are missing: jax-cuda13-plugin" in said and "make compile-report" in said
