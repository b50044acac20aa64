"""Times weighted_ce, forward and backward, against eager and compiled PyTorch and a plain copy.

`pytest benchmarks` shows all with pytest-benchmark. `python benchmarks/bench_weighted_ce.py` runs
ours and each rival in turn (A B A B), prints a table of medians, medians of the ratios and peak
memory, and with `--csv FILE` keeps it. Against a copy of as many bytes as the operator reads and
writes, the ratio is the share of the copy's bandwidth that it reaches.
"""

import interleave
import pytest
import torch
import torch.nn.functional as F

import unet_fast

CASES = {  # name: shape of the logits
    "one tile, paper": (1, 2, 388, 388),
    "batch of 8": (8, 2, 512, 512),
    "20 classes": (1, 20, 388, 388),
}
CUDA_CASES = {"batch of 32": (32, 2, 512, 512)}


def eager(logits, target, weight):
    loss = F.cross_entropy(logits, target, reduction="none") * weight
    return loss.sum() / weight.sum()


def rivals(device):
    mode = "max-autotune" if device.type == "cuda" else None
    return {"eager": eager, "compiled eager": torch.compile(eager, mode=mode)}


def problem(shape, device):
    generator = torch.Generator().manual_seed(0)
    pixels = (shape[0], *shape[2:])
    logits = torch.randn(shape, generator=generator).to(device).requires_grad_()
    target = torch.randint(0, shape[1], pixels, generator=generator).to(device)
    weight = (torch.rand(pixels, generator=generator) + 0.1).to(device)
    return logits, target, weight


def step(function, logits, target, weight):
    """Forward and backward."""
    loss = function(logits, target, weight)
    loss.backward()
    grad, logits.grad = logits.grad, None
    return loss.detach(), grad


def check(rival, inputs):
    results = [step(function, *inputs) for function in (unet_fast.weighted_ce, rival)]
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.filterwarnings("ignore:.*torch.jit")  # raised by torch.compile itself
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("name", ["unet_fast", "eager", "compiled eager"])
def bench_weighted_ce(benchmark, device, case, name):
    inputs = problem(CASES[case], device)
    function = unet_fast.weighted_ce if name == "unet_fast" else rivals(device)[name]
    check(function, inputs)

    def run():
        step(function, *inputs)
        if device.type == "cuda":
            torch.cuda.synchronize()

    benchmark.group = f"weighted_ce, {case}, {device}"
    benchmark(run)


def copy_of(n, device):
    """A copy that reads and writes n bytes in all."""
    source = torch.ones(n // 8, device=device)
    destination = torch.empty_like(source)
    return lambda: destination.copy_(source)


def direct(shape, device):
    """The operators without autograd, each with a copy of as many bytes."""
    logits, target, weight = problem(shape, device)
    logits = logits.detach()
    operators = torch.ops.unet_fast
    _, normaliser = operators.weighted_ce(logits, target, weight, 3, -100)
    grad = torch.ones((), device=device)
    read = sum(x.numel() * x.element_size() for x in (logits, target, weight))
    written = logits.numel() * logits.element_size()
    yield (
        "forward",
        lambda: operators.weighted_ce(logits, target, weight, 3, -100),
        copy_of(read, device),
    )
    yield (
        "backward",
        lambda: operators.weighted_ce_backward(grad, logits, target, weight, normaliser, 3, -100),
        copy_of(read + written, device),
    )


def measure(case, shape, device, rounds):
    """Rows of one case: ours against each rival, and the operators against copies."""
    start = {
        **interleave.header("weighted_ce", device),
        "case": case,
        "shape": "x".join(map(str, shape)),
    }
    for name, rival in rivals(device).items():
        inputs = problem(shape, device)
        check(rival, inputs)
        ours, theirs = (
            lambda f=f, inputs=inputs: step(f, *inputs) for f in (unet_fast.weighted_ce, rival)
        )
        yield {
            **start,
            "ours": "forward + backward",
            "rival": name,
            **interleave.compare(ours, theirs, device, rounds),
            "ours peak MB": f"{interleave.peak_megabytes(ours, device):.1f}",
            "rival peak MB": f"{interleave.peak_megabytes(theirs, device):.1f}",
        }
    with torch.no_grad():
        for name, operator, copy in direct(shape, device):
            yield {
                **start,
                "ours": name,
                "rival": "copy",
                **interleave.compare(operator, copy, device, rounds),
                "ours peak MB": f"{interleave.peak_megabytes(operator, device):.1f}",
                "rival peak MB": "",
            }


def main():
    arguments = interleave.arguments_of(__doc__)
    device = arguments.device
    rows = []
    for case, shape in (CASES | (CUDA_CASES if device.type == "cuda" else {})).items():
        rows += measure(case, shape, device, arguments.rounds)
    columns = ["shape", "ours", "rival", "ours ms", "rival ms"]
    columns += ["ratio p20", "ratio p50", "ratio p80", "ours peak MB", "rival peak MB"]
    interleave.print_table(rows, columns)
    if arguments.csv:
        interleave.write_csv(arguments.csv, rows)


if __name__ == "__main__":
    main()
