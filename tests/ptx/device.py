"""Takes the launches of the host module, as a GPU would."""

from .decode import Code
from .machine import Launch
from .memory import Memory
from .program import Program


class Device:
    """Runs the kernels of csrc/testing/module.cpp from now on.

    Args:
        module: The Python module.
        text: PTX of its kernels.
        measure: Whether to count the use of memory, too, which takes longer.

    Attributes:
        counts: Of each launch so far, if `measure`.
    """

    def __init__(self, module, text, measure=False):
        self.program, self.memory, self.measure = Program(text), Memory(), measure
        self._codes = {}
        self.counts = []
        module.use_interpreter(self.memory.add, self.memory.remove, self._launch)

    def _launch(self, name, grid, block, arguments):
        if name not in self._codes:
            self._codes[name] = Code(self.program, self.program.kernel(name))
        launch = Launch(
            self._codes[name], grid, block, map(bytes, arguments), self.memory, self.measure
        )
        counts = launch.run()
        if self.measure:
            self.counts.append(counts)
