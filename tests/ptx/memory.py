"""Memory that kernels may use: where it is, and which of its bytes were written."""

import ctypes

import numpy as np

ALIGNMENT = 16
"""Bytes of the widest access."""


class Fault(Exception):
    """What a kernel must not do."""


class Buffer:
    """One piece of memory.

    Args:
        data: uint8 array that begins at a multiple of 16 bytes of its address space and whose size
            is one.
        base: Address of its first byte.
        start, stop: Addresses that may be used.
        written: Whether its bytes have values; otherwise a byte has one once a kernel wrote it.
    """

    def __init__(self, data, base, start, stop, written):
        self.data, self.base, self.start, self.stop = data, base, start, stop
        self.written = None if written else np.zeros(len(data), np.uint8)
        self.forget()

    def forget(self):
        """Begins to note anew which sectors of 32 bytes are used, and by how many atomics."""
        sectors = (self.stop - self.start) // 32 + 1
        self.read, self.stored = np.zeros((2, sectors), bool)
        self.atomics = np.zeros(sectors, np.int64)

    @classmethod
    def of_process(cls, address, size, written):
        """Memory of this process. The bytes around it, up to multiples of 16, are not used."""
        base = address // ALIGNMENT * ALIGNMENT
        length = -(-(address + size) // ALIGNMENT) * ALIGNMENT - base
        data = np.ctypeslib.as_array((ctypes.c_uint8 * length).from_address(base))
        if not written:  # that nobody takes it for zeros
            data[address - base : address - base + size] = 0xA5
        return cls(data, base, address, address + size, written)

    @classmethod
    def new(cls, size, written=False):
        """New memory, at addresses from 0."""
        data = np.zeros(-(-size // ALIGNMENT) * ALIGNMENT, np.uint8)
        return cls(data, 0, 0, size, written)

    def load(self, offsets, kind):
        """(values of a dtype at offsets from the base, which of them nobody wrote or None)."""
        size = np.dtype(kind).itemsize
        index, lost = offsets // size, None
        if self.written is not None:
            lost = self.written.view(f"u{size}")[index] != int.from_bytes(b"\1" * size)
            lost = lost if lost.any() else None
        return self.data.view(kind)[index], lost

    def store(self, offsets, values, lost=None):
        """Sets values; those that are `lost` count as if nobody wrote them."""
        size = values.dtype.itemsize
        index = offsets // size
        self.data.view(values.dtype)[index] = values
        if self.written is not None:
            ones = int.from_bytes(b"\1" * size)
            self.written.view(f"u{size}")[index] = ones if lost is None else np.where(lost, 0, ones)


class Memory:
    """Global memory: the buffers that a process told of, by address."""

    def __init__(self):
        self._variables = {}
        self._set({})

    def add(self, address, size, written):
        """Tells of memory of this process."""
        if size > 0:
            self._set({**self._buffers, address: Buffer.of_process(address, size, written)})

    def address_of(self, variable):
        """Of a variable of a program, made when it is first asked for."""
        if variable.name not in self._variables:
            data = np.zeros(variable.size // variable.item, f"u{variable.item}")
            data[: len(variable.values)] = variable.values
            self._variables[variable.name] = data
            self.add(data.ctypes.data, data.nbytes, written=True)
        return self._variables[variable.name].ctypes.data

    def remove(self, address):
        self._set({at: buffer for at, buffer in self._buffers.items() if at != address})

    def wrote(self, address, size):
        """Tells that the process itself wrote a part of it."""
        (_, buffer) = next(self.parts(np.array([address], np.int64), size))
        if buffer.written is not None:
            buffer.written[address - buffer.base : address - buffer.base + size] = 1

    def _set(self, buffers):
        self._buffers = dict(sorted(buffers.items()))
        self._starts = np.array(list(self._buffers), np.int64)
        self._in_order = list(self._buffers.values())

    def __iter__(self):
        return iter(self._buffers.values())

    def parts(self, addresses, size):
        """Yields (which, buffer): which of the accesses, of so many bytes, lie in a buffer.

        Raises:
            Fault: If one lies in none.
        """
        index = np.searchsorted(self._starts, (addresses.min(), addresses.max()), "right") - 1
        if index[0] == index[1]:
            which = [(slice(None), index[0])]
        else:
            index = np.searchsorted(self._starts, addresses, "right") - 1
            which = ((np.flatnonzero(index == k), k) for k in np.unique(index))
        for lanes, k in which:
            of_buffer = addresses[lanes]
            buffer = self._in_order[k] if k >= 0 else None
            if buffer is None or of_buffer.max() + size > buffer.stop:
                end = buffer.stop if buffer else 0
                over = int(of_buffer.max()) + size - end
                raise Fault(f"is outside of all memory, {over} bytes behind the nearest before it")
            yield lanes, buffer
