"""The counts of kernels: instructions weighed by lines, and what is told of growth."""

import csv
import shutil
import sys
from pathlib import Path

import pytest
from host import cuda_compiler

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))  # `benchmarks` takes it out again

from benchmarks import kernel_budget, report  # noqa: E402

DISASSEMBLY = """
	.section	.text._Z1kPf,"ax",@progbits
_Z1kPf:
	//## File ".nv_debug_ptx_txt", line 20
        /*0000*/                   LDC R1, c[0x0][0x28] ;
        /*0010*/               @P0 DADD R2, R2, R4 ;
.L_x_1:
	//## File ".nv_debug_ptx_txt", line 23
        /*0020*/                   F2F.F64.F32 R2, R3 ;
        /*0030*/                   F2I.TRUNC.NTZ R2, R3 ;
        /*0040*/                   NOP ;
	//## File ".nv_debug_ptx_txt", line 30
        /*0050*/              @!P1 BRA `(.L_x_1) ;
        /*0060*/                   MOV R10, 0xe0 ;
        /*0070*/                   CALL.REL.NOINC `($__internal_1_$__cuda_sm20_div_rn_f64_full) ;
        /*0080*/                   MOV R10, 0xe0 ;
        /*0090*/                   CALL.REL.NOINC `($__internal_0_$__cuda_sm20_div_s64) ;
        /*00a0*/                   EXIT ;
        .weak           $__internal_0_$__cuda_sm20_div_s64
$__internal_0_$__cuda_sm20_div_s64:
        /*00b0*/                   IMAD R1, R2, R3, R4 ;
.L_x_2:
        /*00c0*/                   RET.REL.NODEC R4 `(_Z1kPf) ;
        .weak           $__internal_1_$__cuda_sm20_div_rn_f64_full
$__internal_1_$__cuda_sm20_div_rn_f64_full:
        /*00d0*/                   DMUL R1, R2, R3 ;
"""


def test_instructions_count_as_often_as_their_lines_ran():
    kernels, subroutines = kernel_budget.blocks_of(DISASSEMBLY)
    assert set(kernels) == {"_Z1kPf"}
    lines = {20: 1, 23: 100, 29: 10}  # line 30 ran as often as the one before it
    found = kernel_budget.weigh("_Z1kPf", kernels["_Z1kPf"], subroutines, lines)
    # 2 at line 20, 2 at line 23; the jump, then the call of a division of integers and its parts.
    assert found == {
        "sass": 2 + 200 + 10 + 10 * (2 + 2) + 10,
        "fp64": 1,
        "conversions64": 100,
        "conversions": 100,
    }


def test_resources_are_read_from_what_ptxas_says():
    log = """ptxas info    : Compiling entry function '_Z1kPf' for 'sm_90'
ptxas info    : Function properties for _Z1kPf
    8 bytes stack frame, 4 bytes spill stores, 8 bytes spill loads
ptxas info    : Used 40 registers, used 1 barriers, 512 bytes smem
ptxas info    : Compiling entry function '_Z2k2v' for 'sm_90'
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 8 registers, used 0 barriers
"""
    assert kernel_budget.resources_of(log) == {"_Z1kPf": (40, 12, 512), "_Z2k2v": (8, 0, 0)}


def row(**changes):
    zeros = dict.fromkeys(kernel_budget.COSTS, "0")
    plain = {"case": "a", "pixels": "32", "architecture": "90", "kernel": "k", "ptxas": "13.0"}
    return {**plain, **zeros, "sass": "100", **changes}


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({}, []),
        ({"sass": "103"}, []),
        ({"sass": "104"}, ["a, sm_90, k: sass is 104, was 100"]),
        ({"fp64": "0.04"}, []),
        ({"spills": "8"}, ["a, sm_90, k: spills is 8, was 0"]),
        ({"sass": "50"}, []),
        ({"kernel": "other"}, ["a, sm_90, other: is not in the file"]),
    ],
)
def test_growth_by_more_than_three_percent_is_told(change, told):
    assert list(kernel_budget.grown([row()], [row(**change)])) == told


def check(monkeypatch, capsys, rows):
    """The exit code of a check, and what it says."""
    monkeypatch.setattr(sys, "argv", ["kernel_budget", "--check"])
    monkeypatch.setattr(kernel_budget, "rows", rows)
    with pytest.raises(SystemExit) as end:
        kernel_budget.main()
    return end.value.code, *capsys.readouterr()


def test_exit_codes(monkeypatch, capsys, tmp_path):
    file = tmp_path / "kernel_budget.csv"
    file.write_text(",".join(kernel_budget.COLUMNS) + "\n" + ",".join(row().values()) + "\n")
    monkeypatch.setattr(kernel_budget, "RESULTS", file)
    order = {c: row()[c] for c in kernel_budget.COLUMNS}
    file.write_text(",".join(order) + "\n" + ",".join(order.values()) + "\n")
    code, out, _ = check(monkeypatch, capsys, lambda: [row()])
    assert (code, out) == (0, "kernel_budget: none of 1 rows grew\n")
    code, out, _ = check(monkeypatch, capsys, lambda: [row(sass="200")])
    assert (code, out) == (1, "a, sm_90, k: sass is 200, was 100\n")
    code, _, error = check(monkeypatch, capsys, lambda: [row(ptxas="14.0")])
    assert code == 2
    assert error == ("kernel_budget: ptxas must be the one that made the file, 13.0, got 14.0\n")


def test_a_missing_tool_is_one_line(monkeypatch, capsys):
    rows = kernel_budget.rows
    monkeypatch.setattr(kernel_budget, "nvdisasm", lambda: None)
    monkeypatch.setattr(kernel_budget, "cuda_compiler", lambda: "nvcc")
    monkeypatch.setattr(shutil, "which", lambda name: name)
    code, _, error = check(monkeypatch, capsys, rows)
    message = "kernel_budget: needs nvdisasm: pip install nvidia-cuda-nvdisasm\n"
    assert (code, error) == (2, message)


def test_estimates_take_the_longest_time():
    """A million pixels of 100 instructions each 32, at 898 thousand million a second."""
    assert report.estimate([row()], "H200") == "3.48, issue"
    assert report.estimate([row(read="400")], "H200") == "98.8, memory"
    assert report.estimate([row(conversions64="100")], "H200") == "6.96, float64"
    assert report.estimate([row()], "T4") == "0, issue"  # of another architecture


def test_the_committed_counts_name_all_cases():
    with kernel_budget.RESULTS.open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert {row["case"] for row in rows} == set(kernel_budget.CASES)
    assert {row["architecture"] for row in rows} == set(kernel_budget.ARCHITECTURES)
    assert all(float(row["registers"]) > 0 for row in rows)


@pytest.mark.skipif(cuda_compiler() is None, reason="needs nvcc")
def test_names_can_be_read():
    mangled = "_ZN9unet_fast14elastic_deform7prepareILi2EEEvNS0_8MovementIXT_EEE"
    assert kernel_budget.readable(mangled) == "prepare<2>"
    assert kernel_budget.readable("_ZN9unet_fast5clearIyEEvPT_l") == "clear<unsigned long long>"
