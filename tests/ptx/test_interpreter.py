"""The interpreter itself: what instructions do, what they count, and that planted faults show."""

import math
import struct
from fractions import Fraction

import numpy as np
import pytest
import torch

from ptx.decode import Code
from ptx.machine import Launch
from ptx.memory import Fault, Memory
from ptx.program import Program

HEAD = """
.version 9.0
.target sm_90
.address_size 64
.extern .func __assertfail(.param .b64 a, .param .b64 b, .param .b32 c, .param .b64 d,
  .param .b64 e);
.global .align 1 .b8 message[7] = {120, 32, 62, 32, 48, 0, 0};
.func (.param .b32 twice_result) twice(.param .b32 twice_x)
{
  .reg .pred %p<2>; .reg .b32 %r<4>;
  ld.param.u32 %r1, [twice_x];
  setp.gt.u32 %p1, %r1, 6;
  @%p1 bra $large;
  shl.b32 %r1, %r1, 1;
$large:
  st.param.b32 [twice_result+0], %r1;
  ret;
}
"""
REGISTERS = """
  .reg .pred %p<9>; .reg .b16 %rs<9>; .reg .b32 %r<40>; .reg .b64 %rd<40>;
  .reg .f32 %f<20>; .reg .f64 %fd<20>;
"""


def kernel(body, parameters=0, declared=""):
    """A kernel of pointers %rd1, %rd2, ..; %r0 is the index of the thread, %rd0 four times it."""
    names = [f".param .u64 k_{k}" for k in range(1, parameters + 1)]
    loads = "".join(f"ld.param.u64 %rd{k}, [k_{k}];\n" for k in range(1, parameters + 1))
    index = """mov.u32 %r0, %tid.x; mov.u32 %r1, %ctaid.x; mov.u32 %r2, %ntid.x;
      mad.lo.s32 %r0, %r1, %r2, %r0; mul.wide.s32 %rd0, %r0, 4;"""
    start = f"{HEAD}\n.visible .entry k({', '.join(names)})\n{{\n{REGISTERS}{declared}\n"
    return Program(f"{start}{loads}{index}\n{body}\n ret;\n}}")


def launch(body, *arrays, grid=1, block=32, declared="", results=(), measure=False):
    """Runs it on arrays; those at `results` nobody wrote yet."""
    program, memory = kernel(body, len(arrays), declared), Memory()
    for k, array in enumerate(arrays):
        memory.add(array.ctypes.data, array.nbytes, k not in results)
    arguments = [struct.pack("Q", array.ctypes.data) for array in arrays]
    code = Code(program, program.kernel("k"))
    return Launch(code, (grid,), (block,), arguments, memory, measure=measure).run()


def mapped(instructions, x, kind="u32", out=np.uint32, **options):
    """What instructions make of %r4 (or %f4, %rd4, %fd4), an element of `x` for each thread."""
    register = {"u32": "%r", "f32": "%f", "u64": "%rd", "f64": "%fd"}
    size, result = x.dtype.itemsize, np.zeros(len(x), out)
    to = {4: "%f5" if out == np.float32 else "%r5", 8: "%fd5" if out == np.float64 else "%rd5"}
    body = f"""
      mul.wide.s32 %rd30, %r0, {size}; add.s64 %rd30, %rd1, %rd30;
      ld.global.{kind} {register[kind]}4, [%rd30];
      {instructions}
      mul.wide.s32 %rd31, %r0, {result.itemsize}; add.s64 %rd31, %rd2, %rd31;
      st.global.b{8 * result.itemsize} [%rd31], {to[result.itemsize]};"""
    launch(body, x, result, block=len(x), results=[1], **options)
    return result


LANES = np.arange(32, dtype=np.uint32)
INTEGERS = np.array([0, 1, 2, 7, 31, 33, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF, 12345678], np.uint32)


@pytest.mark.parametrize(
    ("instruction", "expected"),
    [
        ("add.s32 %r5, %r4, -3", lambda x: x - 3),
        ("sub.u32 %r5, 5, %r4", lambda x: 5 - x),
        ("mul.lo.s32 %r5, %r4, %r4", lambda x: x * x),
        ("mul.hi.u32 %r5, %r4, %r4", lambda x: x * x >> 32),
        ("mul.hi.s32 %r5, %r4, 70000", lambda x: signed(x) * 70000 >> 32),
        ("mad.lo.s32 %r5, %r4, 3, 4", lambda x: 3 * x + 4),
        ("div.s32 %r5, %r4, -7", lambda x: int(signed(x) / -7)),
        ("div.u32 %r5, %r4, 7", lambda x: x // 7),
        ("rem.s32 %r5, %r4, 7", lambda x: int(math.fmod(signed(x), 7))),
        ("max.s32 %r5, %r4, 5", lambda x: max(signed(x), 5)),
        ("min.u32 %r5, %r4, 5", lambda x: min(x, 5)),
        ("abs.s32 %r5, %r4", lambda x: abs(signed(x))),
        ("neg.s32 %r5, %r4", lambda x: -x),
        ("sad.u32 %r5, %r4, 9, 1", lambda x: abs(x - 9) + 1),
        ("shl.b32 %r5, 3, %r4", lambda x: 3 << x if x < 32 else 0),
        ("shr.u32 %r5, %r4, 4", lambda x: x >> 4),
        ("shr.s32 %r5, %r4, 40", lambda x: signed(x) >> 31),
        ("shf.l.wrap.b32 %r5, 9, %r4, 33", lambda x: x << 1),
        ("shf.r.clamp.b32 %r5, %r4, 3, 8", lambda x: (3 << 32 | x) >> 8),
        ("bfe.u32 %r5, %r4, 4, 8", lambda x: x >> 4 & 255),
        ("bfe.s32 %r5, %r4, 28, 9", lambda x: signed(x) >> 28),
        ("bfi.b32 %r5, %r4, 0x11111111, 8, 8", lambda x: 0x11110011 | (x & 255) << 8),
        ("brev.b32 %r5, %r4", lambda x: int(f"{x:032b}"[::-1], 2)),
        ("popc.b32 %r5, %r4", lambda x: x.bit_count()),
        ("clz.b32 %r5, %r4", lambda x: 32 - x.bit_length()),
        ("bfind.u32 %r5, %r4", lambda x: x.bit_length() - 1),
        ("prmt.b32 %r5, %r4, 0xAABBCCDD, 0x5410", lambda x: 0xCCDD0000 | x & 0xFFFF),
        ("lop3.b32 %r5, %r4, 12, 10, 0xE8", lambda x: x & 12 | x & 10 | 8),
        ("not.b32 %r5, %r4", lambda x: ~x),
        ("and.b32 %r5, %r4, 6; or.b32 %r5, %r5, 8; xor.b32 %r5, %r5, 1", lambda x: x & 6 | 8 ^ 1),
        ("cvt.s32.s8 %r5, %r4", lambda x: (x & 255) - 256 * (x >> 7 & 1)),
        ("setp.lt.s32 %p1|%p2, %r4, 2; selp.u32 %r5, 1, 2, %p2", lambda x: 1 + (signed(x) < 2)),
        ("setp.hi.and.u32 %p1, %r4, 9, !%p2; selp.u32 %r5, 1, 0, %p1", lambda x: x > 9),
        ("mov.b64 %rd5, {%r4, 7}; mov.b64 {_, %r5}, %rd5", lambda x: 7),
        ("mul.wide.u32 %rd5, %r4, %r4; shr.u64 %rd5, %rd5, 8; cvt.u32.u64 %r5, %rd5",
         lambda x: x * x >> 8),
        ("cvt.s64.s32 %rd5, %r4; mul.hi.s64 %rd5, %rd5, 0x4000000000000001; cvt.u32.u64 %r5, %rd5",
         lambda x: signed(x) * 0x4000000000000001 >> 64),
        ("st.param.b32 [p0+0], %r4; call.uni (r0), twice, (p0); ld.param.b32 %r5, [r0+0]",
         lambda x: x if x > 6 else 2 * x),
        ("st.local.u32 [room+4], %r4; ld.local.u32 %r5, [room+4]", lambda x: x),
        ("@%p1 bra $a; setp.ne.u32 %p3, %r4, 7; @%p3 mov.u32 %r5, 1; @!%p3 mov.u32 %r5, 2; $a:",
         lambda x: 1 + (x == 7)),
        ("min.u32 %r6, %r4, 2; ts: .branchtargets $x, $y, $x; brx.idx %r6, ts;"
         " $x: mov.u32 %r5, 5; bra $z; $y: mov.u32 %r5, 6; $z:", lambda x: 5 + (x == 1)),
    ],
    ids=lambda x: x.split()[0] if isinstance(x, str) else "",
)  # fmt: skip
def test_integers(instruction, expected):
    declared = ".local .align 4 .b8 room[8];"
    result = mapped(f"{instruction};", INTEGERS, declared=declared)
    assert [int(x) for x in result] == [int(expected(int(x))) % 2**32 for x in INTEGERS]


def signed(x):
    return x - (x >> 31 << 32)


FLOATS = np.array([0, -0.0, 1.5, -2.5, 1e-40, 3e38, np.inf, np.nan, 0.1, 1e10], np.float32)


@pytest.mark.parametrize(
    ("instruction", "expected"),
    [
        ("add.f32 %f5, %f4, 0f3DCCCCCD", lambda x: x + np.float32(0.1)),
        ("mul.ftz.f32 %f5, %f4, 0f3F800000", lambda x: np.where(abs(x) < 1e-38, 0 * x, x)),
        ("fma.rn.f32 %f5, %f4, %f4, 0f3F800000",
         lambda x: (x.astype(float) ** 2 + 1).astype(np.float32)),
        ("div.rn.f32 %f5, 0f3F800000, %f4", lambda x: 1 / x),
        ("sqrt.rn.f32 %f5, %f4", np.sqrt),
        ("ex2.approx.ftz.f32 %f5, %f4", lambda x: np.exp2(x.astype(float)).astype(np.float32)),
        ("max.f32 %f5, %f4, 0f3F800000", lambda x: np.fmax(x, 1)),
        ("neg.f32 %f5, %f4; abs.f32 %f5, %f5", np.abs),
        ("cvt.sat.f32.f32 %f5, %f4", lambda x: np.clip(np.nan_to_num(x), 0, 1)),
        ("cvt.rmi.f32.f32 %f5, %f4", np.floor),
        ("copysign.f32 %f5, %f4, 0f40000000", lambda x: np.copysign(np.float32(2), x)),
        ("cvt.rn.bf16.f32 %rs1, %f4; cvt.f32.bf16 %f5, %rs1", lambda x: bfloat16(x)),
        ("cvt.rn.f16.f32 %rs1, %f4; cvt.f32.f16 %f5, %rs1",
         lambda x: x.astype(np.float16).astype(np.float32)),
        ("cvt.f64.f32 %fd5, %f4; cvt.rz.f32.f64 %f5, %fd5", lambda x: x),
        ("setp.geu.f32 %p1, %f4, 0f40000000; selp.f32 %f5, 0f3F800000, 0f00000000, %p1",
         lambda x: (~(x < 2)).astype(np.float32)),
    ],
    ids=lambda x: x.split()[0] if isinstance(x, str) else "",
)  # fmt: skip
def test_floats(instruction, expected):
    result = mapped(f"{instruction};", FLOATS, "f32", np.float32)
    with np.errstate(all="ignore"):
        np.testing.assert_array_equal(bits(result), bits(expected(FLOATS)))


def bits(x):
    """With the one NaN that NumPy makes."""
    x = np.asarray(x, np.float32)
    return np.where(np.isnan(x), np.float32(np.nan), x).view(np.uint32)


def bfloat16(x):
    return torch.from_numpy(x).bfloat16().float().numpy()


def test_rounding_directions():
    tenth = np.array([0.1, -0.1, 1 / 3])
    near = tenth.astype(np.float32)
    for mode, away in (("rm", -np.inf), ("rp", np.inf), ("rz", 0)):
        result = mapped(f"cvt.{mode}.f32.f64 %f5, %fd4;", tenth, "f64", np.float32)
        past = near > tenth if mode == "rm" else near < tenth
        past = np.abs(near) > np.abs(tenth) if mode == "rz" else past
        np.testing.assert_array_equal(result, np.where(past, np.nextafter(near, away), near))


def test_fused_multiply_add_of_doubles():
    """Rounded once: its error is what the product lost."""
    x = np.random.default_rng(0).normal(size=100)
    instructions = (
        "mul.f64 %fd6, %fd4, %fd4; neg.f64 %fd6, %fd6; fma.rn.f64 %fd5, %fd4, %fd4, %fd6;"
    )
    result = mapped(instructions, x, "f64", np.float64)
    exact = [float(Fraction(a) * Fraction(a) - Fraction(a * a)) for a in x.tolist()]
    np.testing.assert_array_equal(result, exact)


def test_conversions_to_integers():
    x = np.array([2.5, -2.5, 1e30, -1e30, np.nan, 3.99])
    result = mapped("cvt.rni.s32.f64 %r5, %fd4;", x, "f64")
    assert result.view(np.int32).tolist() == [2, -2, 2**31 - 1, -(2**31), 0, 4]
    result = mapped("cvt.rzi.s64.f64 %rd5, %fd4;", x, "f64", np.uint64)
    assert result.view(np.int64).tolist() == [2, -2, 2**63 - 1, -(2**63), -(2**63), 3]


@pytest.mark.parametrize(
    ("instruction", "expected"),
    [
        ("shfl.sync.down.b32 %r5|%p1, %r4, 4, 31, -1", [*range(4, 32), *range(28, 32)]),
        ("shfl.sync.up.b32 %r5, %r4, 1, 0, -1", [0, *range(31)]),
        ("shfl.sync.bfly.b32 %r5, %r4, 3, 31, -1", [x ^ 3 for x in range(32)]),
        ("shfl.sync.idx.b32 %r5, %r4, 2, 6175, -1", [x // 8 * 8 + 2 for x in range(32)]),
        ("setp.lt.u32 %p1, %r4, 5; vote.sync.ballot.b32 %r5, %p1, -1", [31] * 32),
        ("setp.lt.u32 %p1, %r4, 5; vote.sync.any.pred %p2, %p1, -1; selp.u32 %r5, 1, 0, %p2",
         [1] * 32),
        ("setp.lt.u32 %p1, %r4, 5; vote.sync.all.pred %p2, %p1, -1; selp.u32 %r5, 1, 0, %p2",
         [0] * 32),
        ("redux.sync.add.s32 %r5, %r4, -1", [496] * 32),
        ("redux.sync.min.s32 %r5, %r4, -1", [0] * 32),
        ("and.b32 %r6, %r4, 1; match.any.sync.b32 %r5, %r6, -1", [0x55555555, 0xAAAAAAAA] * 16),
        ("activemask.b32 %r5", [2**32 - 1] * 32),
        # The halves of a warp, one after the other.
        ("setp.lt.u32 %p1, %r4, 16; @%p1 bra $low;"
         " shfl.sync.bfly.b32 %r5, %r4, 1, 31, 0xFFFF0000; bra $end;"
         " $low: shfl.sync.bfly.b32 %r5, %r4, 2, 31, 0xFFFF; $end:",
         [x ^ (2 if x < 16 else 1) for x in range(32)]),
        # Lanes 0 to 15 come later, from a place behind the others'.
        ("setp.lt.u32 %p1, %r4, 16; @%p1 bra $cold;"
         " $join: vote.sync.ballot.b32 %r5, %p1, -1; bra $end; $cold: bra $join; $end:",
         [0xFFFF] * 32),
    ],
    ids=lambda x: x.split()[0] if isinstance(x, str) else "",
)  # fmt: skip
def test_warps(instruction, expected):
    assert mapped(f"{instruction};", LANES).tolist() == expected


def test_blocks_share_memory_and_wait():
    """Each block of 48 threads reverses its part, by a barrier; a dynamic array lies behind."""
    body = """
      mov.u32 %r3, %tid.x; add.s64 %rd5, %rd1, %rd0; ld.global.u32 %r5, [%rd5];
      mov.u32 %r6, room; shl.b32 %r7, %r3, 2; add.s32 %r8, %r6, %r7; st.shared.u32 [%r8], %r5;
      bar.sync 0;
      sub.s32 %r9, 188, %r7; cvt.u64.u32 %rd6, %r9; mov.u64 %rd7, room; cvta.shared.u64 %rd7, %rd7;
      add.s64 %rd7, %rd7, %rd6; ld.u32 %r10, [%rd7];
      add.s64 %rd8, %rd2, %rd0; st.u32 [%rd8], %r10;"""
    x, y = np.arange(96, dtype=np.uint32), np.zeros(96, np.uint32)
    room = ".shared .align 4 .b8 room[192];"
    counts = launch(body, x, y, grid=2, block=48, declared=room, results=[1], measure=True)
    assert y.tolist() == [*range(47, -1, -1), *range(95, 47, -1)]
    assert counts.warps[-1] == 4  # two in each block, the second half empty
    assert counts.lanes[-1] == 96


def test_atomics_and_counts():
    """Thread i adds i + 1 to one of two sums; a loop runs i % 4 + 1 times."""
    body = """
      and.b32 %r3, %r0, 1; mul.wide.u32 %rd3, %r3, 4; add.s64 %rd4, %rd1, %rd3;
      add.s32 %r4, %r0, 1; atom.global.add.u32 %r5, [%rd4], %r4;
      add.s64 %rd5, %rd2, %rd0; st.global.u32 [%rd5], %r5;
      red.global.max.u32 [%rd1+8], %r4;
      and.b32 %r6, %r0, 3; mov.u32 %r7, 0;
    $loop:
      add.s32 %r7, %r7, 1; setp.le.u32 %p1, %r7, %r6; @%p1 bra $loop;
      atom.global.cas.b32 %r8, [%rd1+12], 0, %r4;"""
    sums, old = np.zeros(4, np.uint32), np.zeros(64, np.uint32)
    counts = launch(body, sums, old, grid=2, results=[1], measure=True)
    steps = np.arange(64) + 1
    assert sums.tolist() == [sum(steps[::2]), sum(steps[1::2]), 64, 1]
    assert old[::2].tolist() == (np.cumsum(steps[::2]) - steps[::2]).tolist()
    step = [i.text for i in counts.kernel.instructions].index("add.s32 %r7, %r7, 1")
    assert counts.warps[step] == 2 * 4
    assert counts.lanes[step] == 64 * 2.5
    assert counts.sectors == 8 + 3 * 2  # of `old`, and of `sums` by each of three instructions
    assert (counts.read, counts.written) == (0, 256 + 32)
    assert counts.atomics == 3 * 64
    assert sum(counts.by_line().values()) == counts.warps.sum()


HALF_LEAVES = "setp.gt.u32 %p1, %r0, 15; @%p1 bra $end;"
PLANTED = {
    "misaligned": ("add.s64 %rd3, %rd1, 4; ld.global.v2.u32 {%r5, %r6}, [%rd3];",
                   "accesses 8 bytes at 0x.*, which is not a multiple of 8"),
    "unwritten": ("add.s64 %rd3, %rd2, %rd0; ld.global.u32 %r5, [%rd3];",
                  "reads memory that nobody wrote"),
    "half written": ("st.global.u16 [%rd2], 1; ld.global.u32 %r5, [%rd2];",
                     "reads memory that nobody wrote"),
    "unwritten sum": ("red.global.add.u32 [%rd2], 1;", "changes memory that nobody wrote"),
    "behind": ("add.s64 %rd3, %rd1, %rd0; ld.global.u32 %r5, [%rd3+4];",
               "outside of all memory, 4 bytes behind"),
    "before": ("ld.global.u8 %r5, [%rd1+-1];", "outside of all memory"),
    "store behind": ("add.s64 %rd3, %rd2, %rd0; st.global.u32 [%rd3+4], 1;",
                     "outside of all memory, 4 bytes behind"),
    "null": ("mov.u64 %rd3, 0; ld.u8 %r5, [%rd3];", "outside of all memory"),
    "shared": ("st.shared.u8 [room+16], 1;", "outside of the 16 bytes of shared memory"),
    "unwritten decides": ("ld.shared.u8 %r5, [room]; setp.eq.u32 %p1, %r5, 0; @%p1 bra $end; $end:",
                          "depends on memory that nobody wrote"),
    "unwritten guards": ("ld.shared.u8 %r5, [room]; setp.eq.u32 %p1, %r5, 0; @%p1 mov.u32 %r6, 1;",
                         "depends on memory that nobody wrote"),
    "unwritten stored": ("ld.local.u8 %r5, [own+3]; add.u32 %r6, %r5, %r0;"
                         " add.s64 %rd3, %rd2, %rd0; st.global.u32 [%rd3], %r6;",
                         "stores a value of memory that nobody wrote"),
    "unwritten address": ("ld.local.u32 %r5, [own]; cvt.u64.u32 %rd5, %r5; ld.u8 %r6, [%rd5];",
                          "depends on memory that nobody wrote"),
    "unwritten exchanged": ("ld.local.u32 %r5, [own]; shfl.sync.down.b32 %r5, %r5, 1, 31, -1;",
                            "depends on memory that nobody wrote"),
    "unwritten copy": ("ld.local.u32 %r5, [own]; st.shared.u32 [room], %r5;"
                       " ld.shared.u32 %r5, [room]; st.global.u32 [%rd2], %r5;",
                       "stores a value of memory that nobody wrote"),
    "absent lanes": (f"{HALF_LEAVES} shfl.sync.down.b32 %r5, %r0, 1, 31, -1; $end:",
                     "has a mask that names lanes which are not there"),
    "absent lanes at __syncwarp": (f"{HALF_LEAVES} bar.warp.sync -1; $end:",
                                   "has a mask that names lanes which are not there"),
    "mask without its lane": ("vote.sync.any.pred %p1, %p2, 0xFFFF;",
                              "has a mask that does not name its own lane"),
    "source not in the mask": (f"{HALF_LEAVES} shfl.sync.bfly.b32 %r5, %r0, 16, 31, 0xFFFF; $end:",
                               "reads from a lane that takes no part"),
    "barrier of a part": (f"{HALF_LEAVES} bar.sync 0; $end:",
                          "is a barrier that 16 of 32 threads of a block reach"),
    "two barriers": ("setp.gt.u32 %p1, %r0, 15; @%p1 bra $other; bar.sync 0; bra $end;"
                     " $other: bar.sync 0; $end:",
                     "is a barrier that 16 of 32 threads of a block reach"),
    "division": ("div.s32 %r5, 1, %r0;", "divides an integer by zero"),
    "unknown": ("wmma.load %r5, [%rd1];", "does not know this instruction"),
    "unknown rounding": ("add.rz.f64 %fd1, %fd1, %fd1;", "does not know this instruction"),
    "barrier of some": ("bar.sync 1, 32;", "does not know this instruction"),
    "width": ("mov.u64 %rd5, %r4;", "reads 64 bits of %r4, which has 32"),
    "trap": ("setp.eq.u32 %p1, %r0, 3; @%p1 trap;", "is a trap"),
    "assertion": ("mov.u64 %rd3, message; cvta.global.u64 %rd3, %rd3; st.param.b64 [p0+0], %rd3;"
                  " call.uni __assertfail, (p0, p1, p2, p3, p4);", "assertion failed: x > 0"),
}  # fmt: skip


@pytest.mark.parametrize("fault", PLANTED)
def test_planted_faults_show(fault):
    body, message = PLANTED[fault]
    declared = ".shared .align 4 .b8 room[16]; .local .align 4 .b8 own[4];"
    given, fresh = np.zeros(32, np.uint32), np.zeros(32, np.uint32)
    with pytest.raises(Fault, match=f"^k, line .*{message}") as error:
        launch(body, given, fresh, declared=declared, results=[1])
    assert "\n" not in str(error.value)


def test_memory_that_nobody_wrote_may_be_loaded_if_nobody_uses_it():
    """As compilers do, who load early what one of two paths needs."""
    body = """
      setp.lt.u32 %p1, %r0, 16; @%p1 st.local.u32 [own], 7;
      ld.local.u32 %r5, [own]; add.u32 %r6, %r5, 1; setp.eq.u32 %p2, %r6, 8;
      and.pred %p3, %p1, %p2; @%p3 mov.u32 %r7, 1;
      not.pred %p4, %p1; not.pred %p5, %p2; or.pred %p4, %p5, %p4; @%p4 mov.u32 %r7, 2;
      selp.u32 %r8, %r6, %r7, %p1;
      add.s64 %rd3, %rd1, %rd0; st.global.u32 [%rd3], %r8;
      mov.u32 %r5, 3; st.global.u32 [%rd3+128], %r5;"""
    result = np.zeros(64, np.uint32)
    launch(body, result, declared=".local .align 4 .b8 own[4];", results=[0])
    assert result.tolist() == [8] * 16 + [2] * 16 + [3] * 32


def test_an_unknown_instruction_that_never_runs_is_no_fault():
    launch("bra $end; wmma.load %r5, [%rd1]; $end:")


def test_arguments_must_have_the_bytes_of_the_parameters():
    program = kernel("", 2)
    code = Code(program, program.kernel("k"))
    with pytest.raises(Fault, match=r"k: arguments must be of \[8, 8\] bytes, got \[8, 4\]"):
        Launch(code, (1,), (1,), [b"\0" * 8, b"\0" * 4], Memory())


def test_kernels_are_known_by_name():
    assert kernel("").kernels == ["k"]
    with pytest.raises(KeyError, match="kernel must be one of the program, got other"):
        kernel("").kernel("other")
