"""Runs a launch: all threads of a grid, in steps of those at the lowest program counter."""

import numpy as np

from .decode import ATOMIC, DONE, WARP
from .memory import Buffer, Fault
from .operations import UNSIGNED

LANES = 1 << 14
"""Threads that run at once, in whole blocks; more would not fit the caches."""
STAYS = -1
"""What a step returns whose lanes wait, or were told where to go."""


class Counts:
    """What a launch cost.

    Attributes:
        warps, lanes: For each instruction, how many warps issued it and how many threads took part.
        sectors: Pieces of 32 bytes that warps accessed in global memory, summed over accesses.
        read, written: Those bytes, each piece once.
        atomics: How many atomics changed the piece that most did.
    """

    def __init__(self, kernel):
        self.kernel = kernel
        self.warps, self.lanes = np.zeros((2, len(kernel.instructions)), np.int64)
        self.sectors = self.read = self.written = self.atomics = 0

    def by_line(self):
        """{line of the program: how many warps issued it}."""
        result = {}
        for instruction, warps in zip(self.kernel.instructions, self.warps, strict=True):
            result[instruction.line] = result.get(instruction.line, 0) + int(warps)
        return result


class Launch:
    """One launch of a kernel, to be `run`.

    Args:
        code: The kernel.
        grid, block: Blocks and threads of a block, along x, y, z.
        arguments: The bytes of each parameter.
        memory: Global memory.
        measure: Whether to count the use of memory, too, which takes longer.
    """

    def __init__(self, code, grid, block, arguments, memory, measure=False):
        self.code, self.memory, self.measure = code, memory, measure
        self.grid, self.block_shape = ((*sides, 1, 1)[:3] for sides in (grid, block))
        self.threads = int(np.prod(self.block_shape))
        self.blocks = int(np.prod(self.grid))
        self.pitch = -(-code.shared_bytes // 16) * 16
        self.local_pitch = -(-code.local_bytes // 16) * 16
        self.counts = Counts(code.kernel)
        parameters, arguments = code.kernel.parameters, list(arguments)
        sizes = [parameter.size for parameter in parameters]
        if [len(argument) for argument in arguments] != sizes:
            raise Fault(
                f"{code.kernel.name}: arguments must be of {sizes} bytes, "
                f"got {[len(argument) for argument in arguments]}"
            )
        self.parameters = Buffer.new(code.parameter_bytes, written=True)
        for parameter, argument in zip(parameters, arguments, strict=True):
            at = parameter.offset
            self.parameters.data[at : at + len(argument)] = np.frombuffer(argument, np.uint8)

    def run(self):
        """Runs all blocks, some at a time; returns what that cost."""
        for buffer in self.memory:
            buffer.forget()
        at_once = max(1, LANES // self.threads)
        with np.errstate(all="ignore"):
            for first in range(0, self.blocks, at_once):
                self._start(first, min(at_once, self.blocks - first))
                try:
                    self._go()
                except Fault as fault:
                    raise Fault(self._where(fault)) from fault
        for buffer in self.memory:
            self.counts.read += 32 * int(buffer.read.sum())
            self.counts.written += 32 * int(buffer.stored.sum())
            self.counts.atomics = max(self.counts.atomics, int(buffer.atomics.max()))
        return self.counts

    def _where(self, fault):
        i = self.code.kernel.instructions[self.at]
        return f"{self.code.kernel.name}, line {i.line}: {i.text}: {fault}"

    def _start(self, first, blocks):
        """Sets up the threads of some blocks."""
        n = blocks * self.threads
        index = np.arange(n)
        self.block, thread = index // self.threads, index % self.threads
        self.index = index
        warps_of_block = -(-self.threads // WARP)
        self.warp = self.block * warps_of_block + thread // WARP
        self.lane = (thread % WARP).astype(np.int32)
        self.warps = blocks * warps_of_block
        sides = {"tid": self._place(thread, self.block_shape)}
        sides["ctaid"] = self._place(self.block + first, self.grid)
        sides["ntid"] = [np.full(n, side) for side in self.block_shape]
        sides["nctaid"] = [np.full(n, side) for side in self.grid]
        self._special = {
            f"%{name}.{axis}": values.astype(np.uint32)
            for name, along in sides.items()
            for axis, values in zip("xyz", along, strict=True)
        }
        self._special["%laneid"] = self.lane.astype(np.uint32)
        self._special["%warpid"] = (thread // WARP).astype(np.uint32)
        self.undefined = {}  # register: in which lanes it depends on memory that nobody wrote
        self.registers = [np.zeros(n, UNSIGNED[bits]) for bits in self.code.bits]
        self.shared = Buffer.new(blocks * self.pitch)
        self.local = Buffer.new(n * self.local_pitch)
        self.pc = np.zeros(n, np.int64)
        self.waits = np.zeros(n, bool)
        self.at = 0

    @staticmethod
    def _place(index, sides):
        return index % sides[0], index // sides[0] % sides[1], index // (sides[0] * sides[1])

    def special(self, name):
        return self._special[name]

    def _go(self):
        while True:
            places = np.where(self.waits, DONE, self.pc)
            at = int(places.min())
            if at == DONE:
                break
            here = places == at
            if here.all():
                self._walk(at, slice(None), DONE)
            else:
                self._walk(at, np.flatnonzero(here), int(places[~here].min()))
        if self.waits.any():
            self._blame()

    def _walk(self, at, lanes, rest):
        """Runs some lanes until they part, or are no longer those at the lowest place."""
        steps, follow, counts = self.code.steps, self.code.follow, self.counts
        warps = self._warps_of(lanes)
        threads = len(self.pc) if isinstance(lanes, slice) else len(lanes)
        while at < rest:
            self.at = at
            counts.warps[at] += warps
            counts.lanes[at] += threads
            if self.undefined:
                follow[at](self, lanes)
            goes = steps[at](self, lanes)
            if goes is None:
                at += 1
            elif isinstance(goes, int):
                at = goes
            elif (goes == goes[0]).all() and len(goes):
                at = int(goes[0])
            else:
                self.pc[lanes] = goes
                return
            if at == STAYS:
                return
        self.pc[lanes] = at

    def _warps_of(self, lanes):
        if isinstance(lanes, slice):
            return self.warps
        return 1 + np.count_nonzero(np.diff(self.warp[lanes]))

    # ---- Values of memory that nobody wrote: compilers load them early, for nobody to use

    def lost(self, slots, lanes):
        """Which lanes have a value in one of these registers that depends on such memory."""
        marks = [self.undefined[slot][lanes] for slot in slots if slot in self.undefined]
        return np.logical_or.reduce(marks) if marks else np.zeros(self._number(lanes), bool)

    def lose(self, slots, lanes, lost):
        for slot in slots:
            if slot not in self.undefined:
                if not np.any(lost):
                    continue
                self.undefined[slot] = np.zeros(len(self.pc), bool)
            self.undefined[slot][lanes] = lost
            if not self.undefined[slot].any():
                del self.undefined[slot]

    def require(self, slots, lanes):
        """Raises Fault unless all values are known."""
        if self.lost(slots, lanes).any():
            raise Fault("depends on memory that nobody wrote")

    # ---- Threads that wait for one another

    def _arrive(self, lanes):
        """All lanes that wait at this instruction, these among them."""
        self.pc[lanes] = self.at
        self.waits[lanes] = True
        return np.flatnonzero(self.waits & (self.pc == self.at))

    def _release(self, lanes):
        self.pc[lanes] += 1
        self.waits[lanes] = False
        return STAYS

    def barrier(self, lanes):
        """Blocks go on once all their threads are here."""
        waiting = self._arrive(lanes)
        arrived = np.bincount(self.block[waiting], minlength=self.block[-1] + 1)
        return self._release(waiting[arrived[self.block[waiting]] == self.threads])

    def meet(self, lanes, named, work):
        """Does work for the lanes of each warp that a mask names, once all of them are here."""
        waiting = self._arrive(lanes)
        masks = np.broadcast_to(named(self, waiting), len(waiting))
        if (masks >> self.lane[waiting].astype(np.uint32) & 1 == 0).any():
            raise Fault("has a mask that does not name its own lane")
        whole = masks & ~self.masks(waiting)[self.warp[waiting]] == 0
        ready, masks = waiting[whole], masks[whole]
        while len(ready):  # those of each warp that have the mask of its first
            first = np.zeros(self.warps, np.uint32)
            first[self.warp[ready[::-1]]] = masks[::-1]
            group = masks == first[self.warp[ready]]
            work(self, ready[group])
            self._release(ready[group])
            ready, masks = ready[~group], masks[~group]
        return STAYS

    def masks(self, lanes):
        """The lanes of each warp that are among some, as bits."""
        if isinstance(lanes, slice):
            lanes = self.index
        result = np.zeros(self.warps, np.uint32)
        np.bitwise_or.at(result, self.warp[lanes], np.uint32(1) << self.lane[lanes].astype("u4"))
        return result

    def in_warps(self, lanes, values):
        """Values of lanes by warp and lane; 0 for those that are not among them."""
        result = np.zeros((self.warps, WARP), values.dtype)
        result[self.warp[lanes], self.lane[lanes]] = values
        return result

    def _blame(self):
        """Tells of threads that wait for ever."""
        at = int(self.pc[self.waits].min())
        lanes = np.flatnonzero(self.waits & (self.pc == at))
        self.at = at
        i = self.code.kernel.instructions[at]
        if i.opcode in ("bar", "barrier") and "warp" not in i.modifiers:
            count = int((self.block[lanes] == self.block[lanes[0]]).sum())
            raise Fault(f"is a barrier that {count} of {self.threads} threads of a block reach")
        raise Fault("has a mask that names lanes which are not there")

    # ---- Memory

    def device_address(self, variable):
        return self.memory.address_of(variable)

    def text_at(self, address):
        """What lies in memory up to the first zero."""
        _, buffer = next(self.memory.parts(address, 1))
        return buffer.data[int(address[0]) - buffer.base :].tobytes().split(b"\0")[0].decode()

    def _places(self, space, addresses, lanes, size):
        """Yields (which accesses, buffer, their offsets in it)."""
        if (addresses & (size - 1)).any():
            odd = int(addresses[np.flatnonzero(addresses & (size - 1))[0]])
            raise Fault(f"accesses {size} bytes at {odd:#x}, which is not a multiple of {size}")
        if space is None:
            yield from self._generic(addresses, lanes, size)
        elif space in ("global", "const"):
            for which, buffer in self.memory.parts(addresses, size):
                yield which, buffer, addresses[which] - buffer.base
        else:
            if space == "shared":
                buffer, used = self.shared, self.code.shared_bytes
                start = self.block[lanes] * self.pitch
            elif space == "local":
                buffer, used = self.local, self.code.local_bytes
                start = self.index[lanes] * self.local_pitch
            else:
                buffer, used, start = self.parameters, self.code.parameter_bytes, 0
            if ((addresses < 0) | (addresses + size > used)).any():
                raise Fault(f"is outside of the {used} bytes of {space} memory")
            yield slice(None), buffer, addresses + start

    def _generic(self, addresses, lanes, size):
        windows = {0: "global", 1: "shared", 2: "local", 3: "param"}
        addresses = np.broadcast_to(addresses, self._number(lanes))
        window = addresses >> 60
        for k in np.unique(window):
            some = np.flatnonzero(window == k)
            if int(k) not in windows:
                raise Fault(f"has an address in no space, {int(addresses[some[0]]):#x}")
            inner = some if isinstance(lanes, slice) else lanes[some]
            plain = addresses[some] & ((1 << 60) - 1)
            for which, buffer, offsets in self._places(windows[int(k)], plain, inner, size):
                yield some[which], buffer, offsets

    def _number(self, lanes):
        return len(self.pc) if isinstance(lanes, slice) else len(lanes)

    def load(self, space, addresses, lanes, dtype, count):
        """`count` adjacent values for each lane, or for all together if they have one address.

        Returns (values, for each which lanes lost it as nobody wrote it, or None).
        """
        size, n = np.dtype(dtype).itemsize, self._number(lanes)
        found = gone = None
        for which, buffer, offsets in self._places(space, addresses, lanes, size * count):
            self._note(buffer, offsets, which, lanes, buffer.read)
            parts = [buffer.load(offsets + k * size, dtype) for k in range(count)]
            if any(lost is not None for _, lost in parts):
                if buffer.base:
                    raise Fault("reads memory that nobody wrote")
                gone = gone or [np.zeros(n, bool) for _ in range(count)]
                for to, (_, lost) in zip(gone, parts, strict=True):
                    to[which] = lost is not None and lost
            if isinstance(which, slice):
                return [values for values, _ in parts], gone
            found = found or [np.zeros(n, dtype) for _ in range(count)]
            for to, (values, _) in zip(found, parts, strict=True):
                to[which] = values
        return found, gone

    def store(self, space, addresses, lanes, values, size, lost):
        """Of each lane adjacent values, of `size` bytes together; `lost`: which are, or None."""
        n = self._number(lanes)
        addresses = np.broadcast_to(addresses, n)
        for which, buffer, offsets in self._places(space, addresses, lanes, size):
            self._note(buffer, offsets, which, lanes, buffer.stored)
            for k, value in enumerate(values):
                value = np.broadcast_to(value, n)[which]
                gone = lost[k][which] if lost else None
                if buffer.base and gone is not None and gone.any():
                    raise Fault("stores a value of memory that nobody wrote")
                buffer.store(offsets + k * value.dtype.itemsize, value, gone)

    def atomic(self, space, addresses, lanes, dtype, name, values, unused):
        """Changes values one after the other, in the order of lanes; returns the old ones."""
        n, size = self._number(lanes), np.dtype(dtype).itemsize
        addresses = np.broadcast_to(addresses, n)
        values = [np.broadcast_to(value, n) for value in values]
        old = np.zeros(n, dtype)
        for which, buffer, offsets in self._places(space, addresses, lanes, size):
            self._note(buffer, offsets, which, lanes, buffer.stored)
            if self.measure:
                np.add.at(buffer.atomics, self._sectors(buffer, offsets), 1)
            if buffer.load(offsets, dtype)[1] is not None:
                raise Fault("changes memory that nobody wrote")
            memory, index = buffer.data.view(dtype), offsets // size
            of_buffer = [value[which] for value in values]
            if unused and name in ("add", "min", "max", "and", "or", "xor"):
                ATOMIC[name].at(memory, index, *of_buffer)
                continue
            mine = old[which]
            pending = np.arange(len(index))
            while len(pending):  # one of each address
                _, first = np.unique(index[pending], return_index=True)
                now = pending[first]
                mine[now] = memory[index[now]]
                if name == "cas":
                    expected, new = (value[now] for value in of_buffer)
                    memory[index[now]] = np.where(mine[now] == expected, new, mine[now])
                else:
                    memory[index[now]] = ATOMIC[name](mine[now], of_buffer[0][now])
                pending = np.delete(pending, first)
            old[which] = mine
        return old

    @staticmethod
    def _sectors(buffer, offsets):
        """Of 32 bytes, from the start of the buffer, which a GPU aligns."""
        return (offsets + buffer.base - buffer.start) >> 5

    def _note(self, buffer, offsets, which, lanes, used):
        """Counts the sectors that warps access, and marks them as used."""
        if not self.measure or buffer.base == 0:  # global memory only
            return
        sectors = self._sectors(buffer, offsets)
        used[sectors] = True
        warps = np.broadcast_to(self.warp[lanes], self._number(lanes))[which]
        self.counts.sectors += len(np.unique(warps * np.int64(1 << 32) + sectors))
