"""The arithmetic of PTX: what an instruction makes of the values of its operands."""

import numpy as np

from .memory import Fault

UNSIGNED = {1: np.dtype(bool), 8: np.uint8, 16: np.uint16, 32: np.uint32, 64: np.uint64}
SIGNED = {8: np.int8, 16: np.int16, 32: np.int32, 64: np.int64}
FLOATS = {16: np.float16, 32: np.float32, 64: np.float64}


def bits_of(kind):
    """Bits of a type: 32 of `s32`, `f16x2`; 1 of `pred`."""
    if kind in ("f16x2", "bf16x2"):
        return 32
    return 1 if kind == "pred" else int(kind.lstrip("bfsu"))


def dtype_of(kind):
    """In which NumPy computes on values of a type. bfloat16 values are bits only."""
    of_kind = FLOATS if kind[0] == "f" else SIGNED if kind[0] == "s" else UNSIGNED
    return np.dtype(of_kind.get(bits_of(kind)) or UNSIGNED[bits_of(kind)])


def is_type(modifier):
    names = {"pred", "bf16", "f16x2", "bf16x2"}
    return modifier in names or (modifier[0] in "busf" and modifier[1:] in ("8", "16", "32", "64"))


# --- Rounding -----------------------------------------------------------------------------------


def rounded(exact, kind, mode):
    """A float64 result as float32, rounded down (rm), up (rp), to zero (rz) or to nearest."""
    near = exact.astype(kind)
    if mode == "rn" or near.dtype == exact.dtype:
        return near
    down = (mode == "rm") | ((mode == "rz") & (exact > 0))
    over = (near.astype(exact.dtype) > exact) & down
    up = (mode == "rp") | ((mode == "rz") & (exact < 0))
    under = (near.astype(exact.dtype) < exact) & up
    near = np.where(over, np.nextafter(near, near.dtype.type(-np.inf)), near)
    return np.where(under, np.nextafter(near, near.dtype.type(np.inf)), near)


def fused(a, b, c):
    """a b + c of float64, rounded once: the errors of product and sum are added at the end."""
    product = a * b
    # Halves of 26 bits, whose products are exact.
    high_a, high_b = (x * 134217729.0 - (x * 134217729.0 - x) for x in (a, b))
    low_a, low_b = a - high_a, b - high_b
    lost = ((high_a * high_b - product) + high_a * low_b + low_a * high_b) + low_a * low_b
    total = product + c
    behind = total - product
    lost_too = (product - (total - behind)) + (c - behind)
    result = total + (lost + lost_too)
    splits = np.isfinite(result) & (np.abs(a) < 1e150) & (np.abs(b) < 1e150)
    return np.where(splits & (np.abs(product) > 1e-250), result, total)


def to_integer(values, mode, kind):
    """Floats as integers: rounded, out of range to the nearest in range, NaN to 0.

    NaN becomes 2^63 in 64 bits, as on the hardware.
    """
    whole = {"rni": np.rint, "rzi": np.trunc, "rmi": np.floor, "rpi": np.ceil}[mode](values)
    limits = np.iinfo(kind)
    low, high = float(limits.min), float(limits.max)
    fits = (whole >= low) & (whole < high if limits.bits == 64 else whole <= high)
    result = np.where(fits, whole, 0).astype(kind)
    result = np.where(whole < low, limits.min, np.where(whole >= high, limits.max, result))
    lost = 0 if limits.bits < 64 else limits.min or 1 << 63
    return np.where(np.isnan(values), np.array(lost, kind), result).astype(kind)


# --- Integers -----------------------------------------------------------------------------------


def quotient(a, b):
    if (b == 0).any():
        raise Fault("divides an integer by zero")
    if a.dtype.kind == "u":
        return a // b
    floor = a // b
    return floor + ((a - floor * b != 0) & ((a < 0) != (b < 0)))


def remainder(a, b):
    if (b == 0).any():
        raise Fault("divides an integer by zero")
    return np.fmod(a, b)


def high_half(a, b):
    """The upper half of a product."""
    bits = 8 * a.dtype.itemsize
    if bits < 64:
        wide = np.int64 if a.dtype.kind == "i" else np.uint64
        return ((a.astype(wide) * b.astype(wide)) >> wide(bits)).astype(a.dtype)
    x, y = a.view(np.uint64), b.view(np.uint64)
    low, half = np.uint64(0xFFFFFFFF), np.uint64(32)
    x0, x1, y0, y1 = x & low, x >> half, y & low, y >> half
    middle = (x0 * y0 >> half) + (x0 * y1 & low) + (x1 * y0 & low)
    result = x1 * y1 + (x0 * y1 >> half) + (x1 * y0 >> half) + (middle >> half)
    if a.dtype.kind == "i":
        result = result - np.where(a < 0, y, 0) - np.where(b < 0, x, 0)
    return result.view(a.dtype)


def shifted_left(a, by):
    bits = 8 * a.dtype.itemsize
    by = by.astype(np.uint64)
    shifted = a.astype(np.uint64) << np.minimum(by, np.uint64(63))
    return np.where(by < bits, shifted, 0).astype(a.dtype)


def shifted_right(a, by):
    bits = 8 * a.dtype.itemsize
    if a.dtype.kind == "i":
        return a >> np.minimum(by, bits - 1).astype(a.dtype)
    return np.where(by < bits, a >> np.minimum(by, bits - 1).astype(a.dtype), 0).astype(a.dtype)


def funnel(low, high, by, left, wrap):
    """32 bits out of 64, `by` from their upper (left) or lower end."""
    by = (by & 31 if wrap else np.minimum(by, 32)).astype(np.uint64)
    both = low.astype(np.uint64) | high.astype(np.uint64) << np.uint64(32)
    return ((both << by) >> np.uint64(32) if left else both >> by).astype(np.uint32)


def extracted(a, first, count):
    """bfe: `count` bits from bit `first` on; a signed type repeats the last of them upwards."""
    bits, signed = 8 * a.dtype.itemsize, a.dtype.kind == "i"
    first, count = np.minimum(first & 255, 64), np.minimum(count & 255, bits)
    wide = a.astype(np.int64 if signed else np.uint64)
    mask = shifted_left(np.ones_like(wide, np.uint64), count) - np.uint64(1)
    field = shifted_right(wide, first).view(np.uint64) & mask
    if signed:
        last = shifted_right(wide, np.minimum(first + count - np.uint32(1), bits - 1)) & 1
        field = np.where((last == 1) & (count > 0), field | ~mask, field)
    return field.astype(f"u{bits // 8}").view(a.dtype)


def inserted(a, into, first, count):
    """bfi: the `count` low bits of `a` put into `into`, from bit `first` on."""
    ones = shifted_left(np.ones_like(into, np.uint64), count & 255) - np.uint64(1)
    mask = shifted_left(ones, first & 255).astype(into.dtype)
    return (into & ~mask) | (shifted_left(a, first & 255) & mask)


def table(a, b, c, code):
    """lop3: bit k of `code` is the result where the bits of a, b, c are those of k."""
    result = np.zeros_like(a | b | c)
    for k in range(8):
        if int(code[0]) >> k & 1:
            result |= (a if k & 4 else ~a) & (b if k & 2 else ~b) & (c if k & 1 else ~c)
    return result


def permuted(a, b, selector):
    """prmt: four bytes out of eight; bit 3 of a selection repeats the byte's sign."""
    both = a.astype(np.uint64) | b.astype(np.uint64) << np.uint64(32)
    result = np.zeros(np.broadcast(a, b, selector).shape, np.uint32)
    for k in range(4):
        choice = (selector >> np.uint32(4 * k)).astype(np.uint64)
        byte = (both >> (choice & np.uint64(7)) * np.uint64(8)) & np.uint64(255)
        sign = np.where(byte & np.uint64(128), np.uint64(255), np.uint64(0))
        byte = np.where(choice & np.uint64(8), sign, byte)
        result |= byte.astype(np.uint32) << np.uint32(8 * k)
    return result


def reversed_bits(a):
    size = a.dtype.itemsize
    result = np.unpackbits(a.view(np.uint8).reshape(-1, size), axis=1, bitorder="little")
    return np.packbits(result[:, ::-1], axis=1, bitorder="little").view(a.dtype).reshape(a.shape)


def highest_bit(a):
    """Its position; -1 of 0, and for signed types of -1."""
    value = np.where(a < 0, ~a, a).astype(np.uint64)
    result = np.full(a.shape, -1, np.int32)
    for bit in range(8 * a.dtype.itemsize):
        result[value >> np.uint64(bit) > 0] = bit
    return result


# --- Comparisons --------------------------------------------------------------------------------

COMPARISONS = {"eq": np.equal, "ne": np.not_equal, "lt": np.less, "le": np.less_equal}
COMPARISONS |= {"gt": np.greater, "ge": np.greater_equal}
COMPARISONS |= {"lo": np.less, "ls": np.less_equal, "hi": np.greater, "hs": np.greater_equal}
LOGIC = {"and": np.logical_and, "or": np.logical_or, "xor": np.logical_xor}


def compared(a, b, name):
    """A name that ends with u (`ltu`) also holds if a value is NaN, others do not."""
    if a.dtype.kind != "f":
        return COMPARISONS[name](a, b)
    no_number = np.isnan(a) | np.isnan(b)
    if name in ("num", "nan"):
        return no_number == (name == "nan")
    if name.endswith("u"):
        return COMPARISONS[name[:-1]](a, b) | no_number
    return COMPARISONS[name](a, b) & ~no_number


# --- Floats -------------------------------------------------------------------------------------


def flushed(x):
    """Numbers below the least normal one as zeros."""
    return np.where(np.abs(x) < np.finfo(x.dtype).tiny, np.copysign(x.dtype.type(0), x), x)


def bfloat16(x):
    """The bits of a float32 as a bfloat16, rounded to the nearest, halves to even."""
    bits = x.astype(np.float32).view(np.uint32)
    near = (bits + np.uint32(0x7FFF) + (bits >> np.uint32(16) & np.uint32(1))) >> np.uint32(16)
    return np.where(np.isnan(x), 0x7FFF, near).astype(np.uint16)


def float16(x):
    """The bits of a float32 as a float16."""
    return x.astype(np.float16).view(np.uint16)


def joined(high, low):
    """Two times 16 bits as 32."""
    return high.astype(np.uint32) << np.uint32(16) | low


def widened(x):
    """The bits of a bfloat16 as a float32."""
    return (x.astype(np.uint32) << np.uint32(16)).view(np.float32)


def converted(modifiers):
    """cvt: (result type, operand types, function)."""
    to, *sources = [m for m in modifiers if is_type(m)]
    source = sources[0]
    mode = next((m for m in modifiers if m[0] == "r" and m[:2] in ("rn", "rz", "rm", "rp")), "rn")
    if to in ("f16x2", "bf16x2"):
        half = bfloat16 if to[0] == "b" else float16
        return to, ["f32", "f32"], lambda high, low: joined(half(high), half(low))
    saturates = "sat" in modifiers
    if mode in ("rz", "rm", "rp") and source != "f64":
        return None

    def convert(x):
        if source == "bf16":
            x = widened(x)
        if to == "bf16":
            return bfloat16(x)
        kind = dtype_of(to)
        if to[0] != "f" and source[0] in "fb" and x.dtype.kind == "f":
            return to_integer(x, mode, kind)
        if to[0] != "f":
            if saturates:
                x = np.clip(x, max(np.iinfo(kind).min, np.iinfo(x.dtype).min), np.iinfo(kind).max)
            return x.astype(kind)
        if mode in ("rni", "rzi", "rmi", "rpi"):
            x = {"rni": np.rint, "rzi": np.trunc, "rmi": np.floor, "rpi": np.ceil}[mode](x)
        x = rounded(x, kind, mode) if mode in ("rz", "rm", "rp") else x.astype(kind)
        if "ftz" in modifiers:
            x = flushed(x)
        return np.clip(np.nan_to_num(x), 0, 1).astype(kind) if saturates else x

    return to, [source], convert


def once(function, mode="rn"):
    """A function of float32 values in float64, rounded once."""
    return lambda *x: rounded(function(*(y.astype(np.float64) for y in x)), x[0].dtype, mode)


def coarse(function):
    """Only the upper half of a float64, as of rcp.approx.ftz.f64."""
    return lambda x: (function(x).view(np.uint64) & np.uint64(0xFFFFFFFF00000000)).view(np.float64)


def flushing(function):
    """ftz: operands and result."""
    return lambda *x: flushed(function(*map(flushed, x)))


def saturating(function):
    """sat: results in [0, 1], NaN as 0."""
    return lambda *x: np.clip(np.nan_to_num(function(*x), nan=0.0), 0, 1)


UNARY = {"abs": np.abs, "neg": np.negative, "sqrt": np.sqrt, "rcp": np.reciprocal}
UNARY |= {"rsqrt": lambda x: 1 / np.sqrt(x), "ex2": np.exp2, "lg2": np.log2}
UNARY |= {"sin": np.sin, "cos": np.cos, "tanh": np.tanh}
BINARY = {"add": np.add, "sub": np.subtract, "mul": np.multiply, "div": np.divide}
BINARY |= {"copysign": lambda sign, x: np.copysign(x, sign)}


def of_floats(opcode, modifiers, kind):
    """(number of operands, function), or None."""
    mode = next((m for m in modifiers if m in ("rz", "rm", "rp")), "rn")
    double = kind == "f64"
    if double and mode != "rn":
        return None
    if opcode in ("min", "max"):
        names = {"min": (np.fmin, np.minimum), "max": (np.fmax, np.maximum)}
        count, function = 2, names[opcode]["NaN" in modifiers]
    elif opcode in ("fma", "mad"):
        count, function = 3, fused if double else once(lambda a, b, c: a * b + c, mode)
    elif opcode in BINARY:
        count, function = 2, BINARY[opcode]
        function = function if mode == "rn" else once(function, mode)
    elif opcode in UNARY:
        count, function = 1, UNARY[opcode]
        if double:
            function = coarse(function) if "approx" in modifiers else function
        elif opcode not in ("abs", "neg"):
            function = once(function, mode)
    else:
        return None
    function = flushing(function) if "ftz" in modifiers else function
    return count, saturating(function) if "sat" in modifiers else function


def operation(opcode, modifiers):
    """(result type, operand types, function) of an instruction without memory or jumps.

    Returns None of one that is not known.
    """
    types = [m for m in modifiers if is_type(m)]
    if opcode == "cvt" and len(types) > 1:
        return converted(modifiers)
    if not types:
        return None
    kind = types[-1]
    if opcode == "setp" and len(types) == 1:
        name = modifiers[0]
        logic = next((LOGIC[m] for m in modifiers if m in LOGIC), None)
        if logic is None:
            return "pred", [kind, kind], lambda a, b: compared(a, b, name)
        return "pred", [kind, kind, "pred"], lambda a, b, c: logic(compared(a, b, name), c)
    if opcode == "selp":
        return kind, [kind, kind, "pred"], lambda a, b, p: np.where(p, a, b)
    if opcode == "mov":
        return kind, [kind], lambda a: a
    if kind[0] == "f" and kind != "f16x2":
        found = of_floats(opcode, modifiers, kind)
        if found is None:
            return None
        count, function = found
        return kind, [kind] * count, function
    if kind == "pred":
        return of_predicates(opcode)
    return of_integers(opcode, modifiers, kind)


def of_predicates(opcode):
    if opcode == "not":
        return "pred", ["pred"], np.logical_not
    return ("pred", ["pred", "pred"], LOGIC[opcode]) if opcode in LOGIC else None


def of_integers(opcode, modifiers, kind):
    wide = kind[0] + str(2 * bits_of(kind))
    times = high_half if "hi" in modifiers else np.multiply
    if opcode in ("mul", "mad") and "wide" in modifiers:
        long = dtype_of(wide)
        if opcode == "mul":
            return wide, [kind, kind], lambda a, b: a.astype(long) * b.astype(long)
        return wide, [kind, kind, wide], lambda a, b, c: a.astype(long) * b.astype(long) + c
    two, three = [kind, kind], [kind, kind, kind]
    with_sign = "s" + str(bits_of(kind))
    known = {
        "add": (kind, two, np.add),
        "sub": (kind, two, np.subtract),
        "mul": (kind, two, times),
        "mad": (kind, three, lambda a, b, c: times(a, b) + c),
        "div": (kind, two, quotient),
        "rem": (kind, two, remainder),
        "min": (kind, two, np.minimum),
        "max": (kind, two, np.maximum),
        "and": (kind, two, np.bitwise_and),
        "or": (kind, two, np.bitwise_or),
        "xor": (kind, two, np.bitwise_xor),
        "not": (kind, [kind], np.invert),
        "neg": (with_sign, [with_sign], np.negative),
        "abs": (with_sign, [with_sign], np.abs),
        "sad": (kind, three, lambda a, b, c: c + np.where(a < b, b - a, a - b)),
        "shl": (kind, [kind, "u32"], shifted_left),
        "shr": (kind, [kind, "u32"], shifted_right),
        "bfe": (kind, [kind, "u32", "u32"], extracted),
        "bfi": (kind, [kind, kind, "u32", "u32"], inserted),
        "brev": (kind, [kind], reversed_bits),
        "popc": ("u32", [kind], lambda a: np.bitwise_count(a).astype(np.uint32)),
        "clz": ("u32", [kind], lambda a: (bits_of(kind) - 1 - highest_bit(a)).astype(np.uint32)),
        "bfind": ("u32", [kind], lambda a: highest_bit(a).view(np.uint32)),
        "lop3": (kind, [*three, "u32"], table),
        "prmt": (kind, three, permuted),
        "shf": (
            kind,
            [kind, kind, "u32"],
            lambda a, b, by: funnel(a, b, by, "l" in modifiers, "wrap" in modifiers),
        ),
    }
    known["cvta"] = (kind, [kind], lambda a: a)  # of global memory; the machine has the others
    return known.get(opcode)
