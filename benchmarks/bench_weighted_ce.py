"""weighted_ce, forward and backward, against its reference, PyTorch and MONAI."""

import functools

import pytest
import torch
import torch.nn.functional as F

from unet_fast import reference, weighted_ce

from .interleave import Case, Rival, optional

CASES = {  # name: shape of the logits
    "one tile of the paper, 2 classes, 388 x 388": (1, 2, 388, 388),
    "8 x 2 classes, 512 x 512": (8, 2, 512, 512),
    "20 classes, 388 x 388": (1, 20, 388, 388),
}
CUDA_CASES = {"32 x 2 classes, 512 x 512": (32, 2, 512, 512)}


def eager(logits, target, weight):
    loss = F.cross_entropy(logits, target, reduction="none") * weight
    return loss.sum() / weight.sum()


def compiled(device):
    """The eager one, compiled anew: for one shape each. A graph would copy its inputs first."""
    torch.compiler.reset()
    return torch.compile(
        eager, mode="max-autotune-no-cudagraphs" if device.type == "cuda" else None
    )


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
    results = [step(function, *inputs) for function in (weighted_ce, rival)]
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.filterwarnings("ignore:.*torch.jit")  # raised by torch.compile itself
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("name", ["unet_fast", "reference", "torch.compile"])
def bench_weighted_ce(benchmark, device, timed, case, name):
    inputs = problem(CASES[case], device)
    function = {"unet_fast": weighted_ce, "reference": reference.weighted_ce}.get(name)
    function = function or compiled(device)
    check(function, inputs)
    benchmark.group = f"weighted_ce, {case}, {device}"
    timed(lambda: step(function, *inputs))


def size(*tensors):
    """In bytes."""
    return sum(x.numel() * x.element_size() for x in tensors)


def moved(inputs):
    """Bytes that forward and backward read and write: all inputs twice, the gradient once."""
    return 2 * size(*inputs) + size(inputs[0])


def cases(device, peers):
    for name, shape in (CASES | (CUDA_CASES if device.type == "cuda" else {})).items():
        inputs = problem(shape, device)
        functions = {
            "reference": reference.weighted_ce,
            "PyTorch, eager": eager,
            "PyTorch, torch.compile": compiled(device),
        }
        rivals = [
            Rival(
                rival,
                functools.partial(step, function, *inputs),
                check=functools.partial(check, function, inputs),
            )
            for rival, function in functions.items()
        ]
        if peers:
            rivals.append(dice_ce(inputs))
        parts = [x.detach() for x in inputs]
        run = functools.partial(step, weighted_ce, *inputs)
        yield Case(name, "weighted_ce", run, rivals, moved=moved(inputs), memory=True)
        # The operators without autograd, whose bookkeeping takes longer than small cases.
        operators = torch.ops.unet_fast
        _, normaliser = operators.weighted_ce(*parts, 3, -100)
        grad = torch.ones((), device=device)
        forward = functools.partial(operators.weighted_ce, *parts, 3, -100)
        backward = functools.partial(
            operators.weighted_ce_backward, grad, *parts, normaliser, 3, -100
        )
        yield Case(name, "forward kernel", forward, moved=size(*parts))
        yield Case(name, "backward kernel", backward, moved=size(*parts, parts[0]))


def dice_ce(inputs):
    """Another loss, which takes no weights of pixels: what it needs, not what it says."""
    name = "MONAI DiceCELoss, another loss"
    losses = optional("monai.losses")
    if losses is None:
        return Rival(name, None, "monai")
    loss = losses.DiceCELoss(to_onehot_y=True, softmax=True)
    return Rival(name, lambda: step(lambda x, t, w: loss(x, t[:, None]), *inputs), "monai")


def growth(device, peers):
    """Against classes, pixels and batch."""
    series = {
        "classes": [(c, (1, c, 256, 256)) for c in (2, 4, 8, 16, 32, 64)],
        "pixels": [(s * s, (1, 2, s, s)) for s in (256, 512, 1024, 2048, 4096)],
        "batch": [(n, (n, 2, 256, 256)) for n in (1, 2, 4, 8, 16, 32)],
    }
    for axis, points in series.items():
        for x, shape in points:
            inputs = problem(shape, device)
            runs = [functools.partial(step, f, *inputs) for f in (weighted_ce, eager)]
            name = "x".join(map(str, shape))
            rivals = [Rival("PyTorch, eager", runs[1])]
            yield Case(name, "weighted_ce", runs[0], rivals, moved=moved(inputs), axis=axis, x=x)
