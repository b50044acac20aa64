"""Runs the PTX that nvcc writes for the CUDA kernels, on NumPy: a GPU is not needed.

The kernels also run as C++ on the host (csrc/testing/cuda_on_host.h). That leaves out what nvcc
does with them: other functions such as `expf`, contraction into fused operations, vectors, layout
of arguments. Here its result runs: `program` reads the text, `decode` makes functions of its
instructions with the arithmetic of `operations`, `memory` has the memory and its checks, `machine`
runs a launch, `device` takes the launches of the host module.

Every thread of a launch is a lane of NumPy arrays, with a program counter of its own. The lanes at
the lowest one run next, together, so that warps that part meet again. Faults that a GPU would
pass over in silence, or end a process for, are errors that name the kernel and the line:
misaligned accesses, reads of memory that nobody wrote, accesses outside of memory, masks
that name lanes which never come, barriers that part of a block never reaches, failed assertions.

It proves nothing about ptxas, the order of memory accesses, races or time. Approximate functions
of the hardware (`ex2`, `rcp`, `sqrt`) are exact here but for the last rounding, and a fused
multiply-add of float32 rounds twice in one case out of some 10^8.
"""
