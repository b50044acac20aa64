"""Reads PTX: a program of kernels, each a list of instructions."""

import bisect
import re
from dataclasses import dataclass, field, replace

COMMENT = re.compile(r"//[^\n]*|/\*.*?\*/", re.DOTALL)
# Directives that end with their line rather than with a semicolon.
DIRECTIVE = re.compile(r"^[ \t]*\.(loc|file|version|target|address_size)\b[^\n]*", re.MULTILINE)
FUNCTION = re.compile(
    r"\.(entry|func)\s*(?:\(([^)]*)\)\s*)?([\w$]+)\s*(?:\(([^)]*)\))?[^{;]*?([{;])"
)
PARAMETER = re.compile(r"\.param\s+(?:\.align\s+(\d+)\s+)?\.(\w+)[^,]*?([\w$]+)(?:\[(\d+)\])?\s*$")
VARIABLE = re.compile(
    r"\.(global|const|shared|local)\s+(?:\.align\s+(\d+)\s+)?\.(\w+)\s+([\w$]+)"
    r"(?:\[(\d*)\])?(?:\s*=\s*\{?([^;}]*)\}?)?\s*$"
)
LABEL = re.compile(r"([$\w]+):(?!:)")
GUARDED = re.compile(r"@(!?)(%\w+)\s+(.*)", re.DOTALL)
CALL = re.compile(r"(?:\(\s*([^)]*?)\s*\)\s*,\s*)?([\w$]+)\s*(?:,\s*\(([^)]*)\))?", re.DOTALL)
NAMES = re.compile(r"%[a-zA-Z_]\w*\b(?!\.)|\$[\w$]+")  # registers and labels


def bytes_of(kind):
    """Of a value of type b8, s64, f32, ..."""
    return int(re.sub(r"\D", "", kind)) // 8


@dataclass
class Variable:
    """Memory that a program declares: global, const, shared, local or a parameter."""

    name: str
    space: str
    size: int  # bytes
    align: int
    offset: int = 0  # from the start of its space
    values: list = field(default_factory=list)  # initial ones, integers of `item` bytes
    item: int = 1


@dataclass
class Instruction:
    """`@guard opcode.modifier.modifier operand, operand;`."""

    opcode: str
    modifiers: list
    operands: list
    line: int  # in the text of the program, from 1
    text: str
    guard: str = ""  # register that says which lanes take part; "" for all
    unless: bool = False  # those take part for which it is false


@dataclass
class Kernel:
    """An `.entry`, or a `.func`, whose instructions are put where it is called."""

    name: str
    parameters: list
    results: list = field(default_factory=list)
    instructions: list = field(default_factory=list)
    labels: dict = field(default_factory=dict)  # name: index of the instruction behind it
    tables: dict = field(default_factory=dict)  # name: labels that `brx.idx` chooses from
    registers: dict = field(default_factory=dict)  # name, or name before a number: type
    variables: list = field(default_factory=list)  # shared and local


def place(variables):
    """Sets the offsets of variables that lie one behind the other; returns the bytes of all."""
    end = 0
    for variable in variables:
        variable.offset = -(-end // variable.align) * variable.align
        end = variable.offset + variable.size
    return end


def split(text):
    """The operands of a list, in which vectors and addresses have brackets."""
    parts = re.findall(r"(?:\{[^}]*\}|\[[^\]]*\]|[^,\[{])+", text)
    return [part.strip() for part in parts if part.strip()]


def parameters_of(text):
    found = []
    for part in split(text or ""):
        # What is known of a pointer ("64 .ptr .align 1") says nothing about the parameter.
        match = PARAMETER.search(re.sub(r"\.ptr\b.*(?=\s[\w$]+$)", "", part))
        align, kind, name, count = match.groups()
        size = bytes_of(kind)
        found.append(Variable(name, "param", size * int(count or 1), int(align or size)))
    place(found)
    return found


def variable_of(text):
    """The variable that a statement declares, or None."""
    match = VARIABLE.search(text)
    if match is None:
        return None
    space, align, kind, name, count, values = match.groups()
    item = bytes_of(kind)
    values = [int(value, 0) for value in split(values or "")]
    size = item * (0 if count == "" else int(count or 1))
    return Variable(name, space, size, int(align or item), 0, values, item)


class Program:
    """A module in PTX. Kernels are read when they are first asked for."""

    def __init__(self, text):
        def blank(match):  # lines keep their numbers
            return re.sub(r"[^\n]", " ", match[0])

        self.text = DIRECTIVE.sub(blank, COMMENT.sub(blank, text))
        self._line_ends = [match.start() for match in re.finditer("\n", text)]
        self._found = {}  # name: (kind, results, parameters, start and end of the body)
        self._read = {}
        self.variables = []
        at = 0
        while match := FUNCTION.search(self.text, at):
            self._declare(self.text[at : match.start()])
            kind, results, name, parameters, opening = match.groups()
            at = match.end()
            if opening == "{":
                at = self._end_of_block(at)
                self._found[name] = kind, results, parameters, match.end(), at - 1
        end = self.text.find(".section", at)  # of debug information, behind all functions
        self._declare(self.text[at : None if end < 0 else end])

    def _declare(self, text):
        found = (variable_of(statement) for statement in text.split(";"))
        self.variables += [variable for variable in found if variable]

    def _end_of_block(self, at):
        depth = 1
        for match in re.compile(r"[{}]").finditer(self.text, at):
            depth += 1 if match[0] == "{" else -1
            if depth == 0:
                return match.end()
        raise ValueError("ptx: a block must end, got the end of the text")

    @property
    def kernels(self):
        """Names of all kernels."""
        return [name for name, found in self._found.items() if found[0] == "entry"]

    def kernel(self, name):
        """A kernel by its name, as the compiler mangled it."""
        if name not in self._read:
            if name not in self._found:
                raise KeyError(f"ptx: kernel must be one of the program, got {name}")
            _, results, parameters, start, end = self._found[name]
            kernel = Kernel(name, parameters_of(parameters), parameters_of(results))
            self._read_body(kernel, start, end)
            self._read[name] = kernel
        return self._read[name]

    def _read_body(self, kernel, at, end):
        text, label = self.text, ""
        while at < end:
            if text[at].isspace() or text[at] in "{};":  # scopes have no meaning of their own
                at += 1
            elif match := LABEL.match(text, at):
                label, at = match[1], match.end()
                kernel.labels[label] = len(kernel.instructions)
            else:
                stop = text.index(";", at)
                line = bisect.bisect_left(self._line_ends, at) + 1
                self._read_statement(kernel, " ".join(text[at:stop].split()), line, label)
                at = stop + 1

    def _read_statement(self, kernel, text, line, label):
        if text.startswith(".reg"):
            kind, names = re.match(r"\.reg\s+\.(\w+)\s+(.*)", text).groups()
            for name in split(names):
                kernel.registers[re.sub(r"<\d+>", "", name)] = kind
        elif variable := variable_of(text):
            kernel.variables.append(variable)
        elif text.startswith(".branchtargets"):
            kernel.tables[label] = split(text.partition(" ")[2])
        elif not text.startswith("."):
            instruction = self._instruction(text, line)
            if instruction.opcode == "call":
                self._put_in(kernel, instruction)
            else:
                kernel.instructions.append(instruction)

    def _instruction(self, text, line):
        guard, unless, rest = "", False, text
        if match := GUARDED.match(text):
            unless, guard, rest = match[1] == "!", match[2], match[3]
        word, _, operands = rest.partition(" ")
        opcode, *modifiers = word.split(".")
        operands = [operands] if opcode == "call" else split(operands)
        return Instruction(opcode, modifiers, operands, line, text, guard, unless)

    def _put_in(self, kernel, call):
        """Puts a function's instructions where it is called, with names of their own."""
        results, name, arguments = CALL.match(call.operands[0]).groups()
        if name not in self._found:  # a system call
            call.operands = [name, *split(arguments or "")]
            kernel.instructions.append(call)
            return
        function = self.kernel(name)
        if call.guard or function.variables or function.tables:
            raise ValueError(f"ptx: a function must be plain and called by all, got {call.text}")
        start = len(kernel.instructions)
        end = f"$end__{start}"

        def renamed(match):
            mine = match[0].startswith("%") or match[0] in function.labels
            return f"{match[0]}__{start}" if mine else match[0]

        def own(text):
            return NAMES.sub(renamed, text)

        passed = split(arguments or "") + split(results or "")
        names = [variable.name for variable in function.parameters + function.results]
        for inside in function.instructions:
            operands = [own(operand) for operand in inside.operands]
            for name, value in zip(names, passed, strict=True):
                operands = [re.sub(rf"\[{re.escape(name)}\b", f"[{value}", x) for x in operands]
            copy = replace(inside, operands=operands, guard=own(inside.guard))
            if inside.opcode == "ret":
                copy.opcode, copy.operands = "bra", [end]
            kernel.instructions.append(copy)
        for label, index in function.labels.items():
            kernel.labels[own(label)] = start + index
        kernel.registers.update(function.registers)
        kernel.labels[end] = len(kernel.instructions)
