"""Makes a kernel's instructions functions of NumPy arrays, one value for each thread."""

import re
import struct
from collections import Counter

import numpy as np

from .memory import Fault
from .operations import UNSIGNED, bits_of, dtype_of, is_type, operation
from .program import bytes_of, place, split

WARP = 32
DONE = 1 << 30
# Where shared, local and parameter memory lie in the generic address space.
WINDOWS = {"shared": 1 << 60, "local": 2 << 60, "param": 3 << 60}
NUMBER = re.compile(r"(-?)(0[fF][0-9a-fA-F]{8}|0[dD][0-9a-fA-F]{16}|(?:0[xX])?[0-9a-fA-F]+)U?")
ADDRESS = re.compile(r"\[\s*([%$\w.]+)\s*(?:\+\s*(-?\w+))?\s*\]")
SPECIAL = re.compile(r"%(tid|ntid|ctaid|nctaid)\.([xyz])|%laneid|%warpid")
ATOMIC = {"add": np.add, "min": np.minimum, "max": np.maximum, "and": np.bitwise_and}
ATOMIC |= {"or": np.bitwise_or, "xor": np.bitwise_xor, "exch": lambda old, new: new}
ATOMIC |= {"inc": lambda old, most: np.where(old >= most, 0, old + 1).astype(old.dtype)}
NO_EFFECT = {"pragma", "membar", "fence", "prefetch", "prefetchu", "griddepcontrol", "nanosleep"}
"""Of instructions that matter for time or order only."""


def immediate(text, kind):
    """A number as an array of one value."""
    match = NUMBER.fullmatch(text)
    if match is None:
        return None
    sign, digits = match.groups()
    bits = bits_of(kind)
    if digits[:2] in ("0f", "0F"):
        value = int(digits[2:], 16)
        if kind == "f64":
            return np.array(struct.unpack("f", struct.pack("I", value)), np.float64)
    elif digits[:2] in ("0d", "0D"):
        value = int(digits[2:], 16)
    else:
        value = int(digits, 0)
    value = (-value if sign else value) & ((1 << bits) - 1)
    return np.array([value], UNSIGNED[bits]).view(dtype_of(kind))


class Code:
    """A kernel, each of its instructions made a function of a launch and its lanes."""

    def __init__(self, program, kernel):
        self.kernel = kernel
        self.slots = {}  # register: its number
        self.bits = []  # of each
        self.offsets = {p.name: p.offset for p in kernel.parameters}
        self.parameter_bytes = place(kernel.parameters)
        own = [v for v in kernel.variables if v.space == "shared"]
        known = {v.name for v in own}
        used = " ".join(operand for i in kernel.instructions for operand in i.operands)
        for variable in program.variables:
            name = rf"(?<![\w$.]){re.escape(variable.name)}(?![\w$])"
            new = variable.space == "shared" and variable.name not in known
            if new and re.search(name, used):
                own.append(variable)
        self.shared = own
        self.shared_bytes = place(self.shared)
        local = [v for v in kernel.variables if v.space == "local"]
        self.local_bytes = place(local)
        self.offsets.update((v.name, v.offset) for v in (*self.shared, *local))
        self.program = program
        uses = Counter(re.findall(r"%\w+", used))
        self.read_once = {name for name, count in uses.items() if count == 1}
        self.steps = [self._step(i) for i in kernel.instructions]
        self.follow = [self._follow(i) for i in kernel.instructions]

    # ---- Operands

    def slot(self, name, bits=None):
        """The number of a register. Parameters of functions are registers, too."""
        if name not in self.slots:
            if bits is None:
                declared = self.kernel.registers
                plain = re.sub(r"(__\d+)+$", "", name)
                kind = declared.get(plain) or declared.get(re.sub(r"\d+$", "", plain))
                if kind is None:
                    raise Fault(f"names register {name}, which is not declared")
                bits = bits_of(kind)
            self.slots[name] = len(self.bits)
            self.bits.append(bits)
        return self.slots[name]

    def source(self, text, kind):
        """A function of a launch and lanes: the values of an operand."""
        dtype = dtype_of(kind)
        if text.startswith("!"):
            inner = self.source(text[1:], kind)
            return lambda run, lanes: ~inner(run, lanes)
        if text.startswith("{"):
            return self._joined(split(text[1:-1]), kind)
        if SPECIAL.fullmatch(text):
            return lambda run, lanes: run.special(text)[lanes].astype(dtype)
        if text == "WARP_SZ":
            text = str(WARP)
        if text.startswith("%"):
            slot, bits = self.slot(text), bits_of(kind)
            if self.bits[slot] == bits:
                return lambda run, lanes: run.registers[slot][lanes].view(dtype)
            if self.bits[slot] < bits:
                raise Fault(f"reads {bits} bits of {text}, which has {self.bits[slot]}")
            low = UNSIGNED[bits]
            return lambda run, lanes: run.registers[slot][lanes].astype(low).view(dtype)
        value = immediate(text, kind)
        if value is None:
            return self._address_of(text, kind)
        return lambda run, lanes: value

    def _joined(self, parts, kind):
        """A value of parts in registers, the lowest first."""
        bits = bits_of(kind) // len(parts)
        wide = UNSIGNED[bits_of(kind)]
        sources = [self.source(part, f"b{bits}") for part in parts]

        def read(run, lanes):
            result = sources[0](run, lanes).astype(wide)
            for k, source in enumerate(sources[1:], 1):
                result = result | source(run, lanes).astype(wide) << wide(k * bits)
            return result.view(dtype_of(kind))

        return read

    def _address_of(self, text, kind):
        """That of a variable; of shared, local and parameter memory, from the start of it."""
        name, _, more = text.partition("+")
        name, more = name.strip(), int(more or 0)
        dtype = dtype_of(kind)
        if name in self.offsets:
            value = np.array([self.offsets[name] + more], dtype)
            return lambda run, lanes: value
        variable = next((v for v in self.program.variables if v.name == name), None)
        if variable is None:
            raise Fault(f"names {text}, which is not known")
        return lambda run, lanes: np.array([run.device_address(variable) + more], dtype)

    def target(self, text, kind):
        """A function of a launch, lanes and values: sets a register."""
        if text == "_":
            return lambda run, lanes, values: None
        if text.startswith("{"):
            return self._parted(split(text[1:-1]), kind)
        slot = self.slot(text)
        bits, own = bits_of(kind), self.bits[slot]
        raw = UNSIGNED[bits]
        if bits == own:

            def write(run, lanes, values):
                run.registers[slot][lanes] = values.view(raw)

        elif bits < own:  # extended as its type says
            wide = np.dtype(f"{'i' if kind[0] == 's' else 'u'}{own // 8}")

            def write(run, lanes, values):
                run.registers[slot][lanes] = values.astype(wide).view(UNSIGNED[own])

        else:
            raise Fault(f"writes {bits} bits to {text}, which has {own}")
        return write

    def _parted(self, names, kind):
        bits = bits_of(kind) // len(names)
        targets = [self.target(name, f"b{bits}") for name in names]
        wide, narrow = UNSIGNED[bits_of(kind)], UNSIGNED[bits]

        def write(run, lanes, values):
            values = values.view(wide)
            for k, target in enumerate(targets):
                target(run, lanes, (values >> wide(k * bits)).astype(narrow))

        return write

    def address(self, text):
        """A function of a launch and lanes: addresses in brackets, and the space they name."""
        base, offset = ADDRESS.fullmatch(text).groups()
        offset = int(offset or 0, 0) if isinstance(offset, str) else 0
        if base.startswith("%"):
            slot = self.slot(base)
            if self.bits[slot] == 32:  # wraps around in 32 bits
                offset = np.uint32(offset & 0xFFFFFFFF)
                return lambda run, lanes: (run.registers[slot][lanes] + offset).astype(np.int64)
            return lambda run, lanes: run.registers[slot][lanes].view(np.int64) + offset
        source = self.source(base, "b64")
        return lambda run, lanes: source(run, lanes).view(np.int64) + offset

    # ---- Instructions

    def _step(self, i):
        """What an instruction does: a function of a launch and lanes.

        It returns None to go on behind it, or where the lanes go: one number, or one for each.
        """
        try:
            made = self._make(i)
            guard = i.guard and self.source(("!" if i.unless else "") + i.guard, "pred")
        except (Fault, ValueError, KeyError, AttributeError) as error:
            return unknown(i, str(error))
        if made is None:
            return unknown(i, "does not know this instruction")
        if not guard:
            return made
        if i.opcode in ("bar", "barrier", "shfl", "vote", "redux", "match"):
            return unknown(i, "does not know this instruction under a condition")
        if i.opcode in ("bra", "ret", "exit"):
            return lambda run, lanes: np.where(guard(run, lanes), made(run, lanes), run.at + 1)

        def guarded(run, lanes):
            some = guard(run, lanes)
            chosen = np.flatnonzero(some) if isinstance(lanes, slice) else lanes[some]
            if len(chosen):
                made(run, chosen)

        return guarded

    def _slots(self, text):
        """The registers that an operand names."""
        return [self.slots[name] for name in re.findall(r"%\w+", text) if name in self.slots]

    def _follow(self, i):
        """What an instruction does to values of memory that nobody wrote.

        Arithmetic hands them on, loads and stores too; all else must not depend on them.
        """
        known = operation(i.opcode, i.modifiers) if i.opcode != "cvta" else None
        has_result = known or i.opcode in ("ld", "cvta", "atom", "shfl", "vote", "redux", "match")
        results = self._slots(i.operands[0]) if has_result else []
        operands = [self._slots(x) for x in i.operands[bool(has_result) :]]
        stores = i.opcode == "st" and "param" not in i.modifiers
        needed = operands[:1] if stores else [] if known else operands
        needed = [slot for some in [*needed, self._slots(i.guard)] for slot in some]
        guard = i.guard and self.source(("!" if i.unless else "") + i.guard, "pred")
        handed = [slot for some in operands for slot in some] if known else []
        lost_by = self._lost_by_choice(i, operands)

        def follow(run, lanes):
            run.require(needed, lanes)
            if guard:
                some = guard(run, lanes)
                lanes = np.flatnonzero(some) if isinstance(lanes, slice) else lanes[some]
            lost = any(slot in run.undefined for slot in handed)
            if lost:
                lost = lost_by(run, lanes) if lost_by else run.lost(handed, lanes)
            run.lose(results, lanes, lost)

        return follow

    def _lost_by_choice(self, i, operands):
        """For selections: what is not chosen does not matter."""
        logic = i.modifiers[-1:] == ["pred"] and i.opcode in ("and", "or")
        if i.opcode == "selp":
            choice = self.source(i.operands[3], "pred")
            return lambda run, lanes: (
                run.lost(operands[2], lanes)
                | np.where(
                    choice(run, lanes), run.lost(operands[0], lanes), run.lost(operands[1], lanes)
                )
            )
        if not logic:
            return None
        a, b = (self.source(x, "pred") for x in i.operands[1:])
        decides = i.opcode == "or"

        def lost(run, lanes):
            lost_a, lost_b = (run.lost(some, lanes) for some in operands)
            known_a = ~lost_a & (a(run, lanes) == decides)
            known_b = ~lost_b & (b(run, lanes) == decides)
            return (lost_a | lost_b) & ~known_a & ~known_b

        return lost

    def _make(self, i):
        maker = getattr(self, f"_make_{i.opcode}", None)
        if i.opcode in NO_EFFECT:
            return lambda run, lanes: None
        if i.opcode in ("bar", "barrier"):
            return self._make_barrier(i)
        if maker is not None:
            found = maker(i)
            if found is not None:
                return found
        return self._make_arithmetic(i)

    def _make_arithmetic(self, i):
        known = operation(i.opcode, i.modifiers)
        if known is None:
            return None
        kind, kinds, function = known
        name, _, second = i.operands[0].partition("|")
        if second and len(kinds) > 2:  # the opposite of a comparison alone
            return None
        sources = [self.source(x, k) for x, k in zip(i.operands[1:], kinds, strict=True)]
        target, dtype = self.target(name, kind), dtype_of(kind)
        opposite = self.target(second, kind) if second else None

        def step(run, lanes):
            values = function(*(source(run, lanes) for source in sources))
            values = values.astype(dtype, copy=False)
            target(run, lanes, values)
            if opposite:
                opposite(run, lanes, ~values)

        return step

    def _make_cvta(self, i):
        space = next((m for m in i.modifiers if m in WINDOWS), None)
        if space is None:
            return None
        window = np.uint64(WINDOWS[space])
        source, target = self.source(i.operands[1], "u64"), self.target(i.operands[0], "u64")
        if "to" in i.modifiers:
            return lambda run, lanes: target(run, lanes, source(run, lanes) - window)
        return lambda run, lanes: target(run, lanes, source(run, lanes) + window)

    # Jumps.

    def _make_bra(self, i):
        place = self.kernel.labels[i.operands[0]]
        return lambda run, lanes: place

    def _make_brx(self, i):
        table = np.array([self.kernel.labels[x] for x in self.kernel.tables[i.operands[1]]])
        choice = self.source(i.operands[0], "u32")
        return lambda run, lanes: table[choice(run, lanes)]

    def _make_ret(self, i):
        return lambda run, lanes: DONE

    _make_exit = _make_ret

    def _make_trap(self, i):
        def step(run, lanes):
            raise Fault("is a trap")

        return step

    _make_brkpt = _make_trap

    def _make_call(self, i):
        """Only that of assert(), whose first parameter is the text of the condition."""
        if i.operands[0] != "__assertfail":
            return None
        message = self.source(self._as_register(i.operands[1], 64), "u64")

        def step(run, lanes):
            at = message(run, lanes)[:1].view(np.int64)
            raise Fault(f"assertion failed: {run.text_at(at)}")

        return step

    # Memory.

    def _as_register(self, name, bits):
        """The register that stands for a parameter of a function."""
        name = f"%param {name} {bits}"
        self.slot(name, bits)
        return name

    def _memory(self, i):
        """(space, element type, number of elements) of a memory instruction."""
        spaces = "global", "shared", "local", "param", "const"
        space = next((s for s in spaces if any(m.split("::")[0] == s for m in i.modifiers)), None)
        kind = [m for m in i.modifiers if is_type(m)][-1]
        count = next((int(m[1:]) for m in i.modifiers if m in ("v2", "v4", "v8")), 1)
        return space, kind, count

    def _make_ld(self, i):
        space, kind, count = self._memory(i)
        base = ADDRESS.fullmatch(i.operands[1])[1]
        if space == "param" and base not in self.offsets and not base.startswith("%"):
            source = self.source(self._as_register(base, bits_of(kind)), kind)
            target = self.target(i.operands[0], kind)
            return lambda run, lanes: target(run, lanes, source(run, lanes))
        address = self.address(i.operands[1])
        names = split(i.operands[0][1:-1]) if count > 1 else i.operands[:1]
        targets = [self.target(name, kind) for name in names]
        dtype = dtype_of(kind)

        slots = [self._slots(name) for name in names]

        def step(run, lanes):
            values, lost = run.load(space, address(run, lanes), lanes, dtype, count)
            for k, target in enumerate(targets):
                target(run, lanes, values[k])
                if lost:
                    run.lose(slots[k], lanes, lost[k])

        return step

    _make_ldu = _make_ld

    def _make_st(self, i):
        space, kind, count = self._memory(i)
        values = split(i.operands[1][1:-1]) if count > 1 else i.operands[1:2]
        raw = f"b{bits_of(kind)}"
        sources = [self.source(value, raw) for value in values]
        if space == "param":
            base = ADDRESS.fullmatch(i.operands[0])[1]
            target = self.target(self._as_register(base, bits_of(kind)), raw)
            return lambda run, lanes: target(run, lanes, sources[0](run, lanes))
        address, size = self.address(i.operands[0]), bytes_of(raw) * count
        slots = [self._slots(value) for value in values]

        def step(run, lanes):
            stored = [source(run, lanes) for source in sources]
            lost = [run.lost(some, lanes) for some in slots] if run.undefined else None
            run.store(space, address(run, lanes), lanes, stored, size, lost)

        return step

    def _make_atom(self, i):
        target = self.target(i.operands[0], self._memory(i)[1])
        used = i.operands[0] not in self.read_once and i.operands[0] != "_"
        return self._atomic(i, i.operands[1:], target if used else None)

    def _make_red(self, i):
        return self._atomic(i, i.operands, None)

    def _atomic(self, i, operands, target):
        space, kind, count = self._memory(i)
        if count > 1:
            return None
        names = {*ATOMIC, "cas"}
        name = next(m for m in i.modifiers if m in names)
        address = self.address(operands[0])
        dtype = dtype_of(kind)
        sources = [self.source(operand, kind) for operand in operands[1:]]

        def step(run, lanes):
            values = [source(run, lanes) for source in sources]
            old = run.atomic(space, address(run, lanes), lanes, dtype, name, values, target is None)
            if target is not None:
                target(run, lanes, old)

        return step

    # Threads that wait for one another.

    def _make_barrier(self, i):
        if "warp" in i.modifiers:
            return self._together(i.operands[0], lambda run, lanes: None)
        if i.operands not in (["0"], []) or "arrive" in i.modifiers or "red" in i.modifiers:
            return None
        return lambda run, lanes: run.barrier(lanes)

    def _together(self, mask, work):
        """Work of the lanes of each warp that a mask names, once all of them are here."""
        named = self.source(mask, "u32")
        return lambda run, lanes: run.meet(lanes, named, work)

    def _make_shfl(self, i):
        name, _, flag = i.operands[0].partition("|")
        target, inside = self.target(name, "b32"), self.target(flag or "_", "pred")
        value, by, bounds = (
            self.source(x, k) for x, k in zip(i.operands[1:4], ("b32", "s32", "s32"), strict=True)
        )
        mode = next(m for m in i.modifiers if m in ("up", "down", "bfly", "idx"))

        def work(run, lanes):
            lane = run.lane[lanes]
            shift, limits = by(run, lanes), bounds(run, lanes)
            group, clamp = limits >> 8 & 31, limits & 31
            last = (lane & group) | (clamp & ~group)
            moves = {"up": lane - shift, "down": lane + shift, "bfly": lane ^ shift}
            other = moves[mode] if mode in moves else (lane & group) | (shift & ~group)
            fits = other >= last if mode == "up" else other <= last
            other = np.where(fits, other, lane)
            values = run.in_warps(lanes, value(run, lanes))
            here = run.in_warps(lanes, np.ones(len(lanes), bool))
            if not here[run.warp[lanes], other].all():
                raise Fault("reads from a lane that takes no part")
            target(run, lanes, values[run.warp[lanes], other])
            inside(run, lanes, fits)

        return self._together(i.operands[4], work)

    def _make_vote(self, i):
        mode = next(m for m in i.modifiers if m in ("ballot", "any", "all", "uni"))
        source = self.source(i.operands[1], "pred")
        target = self.target(i.operands[0], "b32" if mode == "ballot" else "pred")

        def work(run, lanes):
            here = run.in_warps(lanes, np.ones(len(lanes), bool))
            true = run.in_warps(lanes, np.broadcast_to(source(run, lanes), len(lanes)))
            if mode == "ballot":
                bits = (true.astype(np.uint64) << np.arange(WARP, dtype=np.uint64)).sum(1)
                result = bits.astype(np.uint32)
            elif mode == "uni":
                result = (true == here).all(1) | ~true.any(1)
            else:
                result = true.any(1) if mode == "any" else (true == here).all(1)
            target(run, lanes, result[run.warp[lanes]])

        return self._together(i.operands[2], work)

    def _make_redux(self, i):
        kind = i.modifiers[-1]
        name = next(m for m in i.modifiers if m in ATOMIC)
        source, target = self.source(i.operands[1], kind), self.target(i.operands[0], kind)

        def work(run, lanes):
            values = np.broadcast_to(source(run, lanes), len(lanes))
            result = np.empty(run.warps, values.dtype)
            result[run.warp[lanes]] = values  # any of each warp, to begin with
            if name in ("add", "xor"):
                result[:] = 0
            ATOMIC[name].at(result, run.warp[lanes], values)
            target(run, lanes, result[run.warp[lanes]])

        return self._together(i.operands[2], work)

    def _make_match(self, i):
        if "any" not in i.modifiers:
            return None
        kind = i.modifiers[-1]
        source, target = self.source(i.operands[1], kind), self.target(i.operands[0], "b32")

        def work(run, lanes):
            values = run.in_warps(lanes, np.broadcast_to(source(run, lanes), len(lanes)))
            here = run.in_warps(lanes, np.ones(len(lanes), bool))[run.warp[lanes]]
            same = (values[run.warp[lanes]] == source(run, lanes)[..., None]) & here
            bits = (same.astype(np.uint64) << np.arange(WARP, dtype=np.uint64)).sum(1)
            target(run, lanes, bits.astype(np.uint32))

        return self._together(i.operands[2], work)

    def _make_activemask(self, i):
        target = self.target(i.operands[0], "b32")
        return lambda run, lanes: target(run, lanes, run.masks(lanes)[run.warp[lanes]])


def unknown(i, why):
    """A step that refuses an instruction, if it runs."""

    def refuse(run, lanes):
        raise Fault(why)

    return refuse
