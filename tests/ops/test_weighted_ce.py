import functools

import numpy as np
import pytest
import torch
from accuracy import assert_as_accurate

import unet_fast
from unet_fast import reference, weighted_ce

REDUCTIONS = ["weighted_mean", "mean", "sum", "none"]
_REDUCTION = {"none": 0, "sum": 1, "mean": 2, "weighted_mean": 3}  # codes of the operators
# 0 to 3 spatial axes; one pixel; sizes around the block (256), the chunk (4096) and C of all kinds.
SHAPES = [
    (3, 4),
    (1, 2, 1, 1),
    (2, 1, 5),
    (2, 2, 31, 17),
    (2, 3, 24, 16),
    (1, 3, 2, 5, 7),
    (2, 2, 91, 91),
    (1, 20, 16, 17),
    (1, 3000, 3),
]


def case(shape, device="cpu", dtype=torch.float32, target_dtype=torch.int64):
    g = torch.Generator().manual_seed(1)
    pixels = (shape[0], *shape[2:])
    logits = (3 * torch.randn(shape, generator=g)).to(dtype)
    target = torch.randint(0, min(shape[1], 120), pixels, generator=g)
    weight = torch.rand(pixels, generator=g) + 0.1
    return logits.to(device), target.to(device, target_dtype), weight.to(device)


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_matches_reference(device, dtype, shape, reduction):
    logits, target, weight = case(shape, device, dtype)
    op = functools.partial(weighted_ce, reduction=reduction)
    ref = functools.partial(reference.weighted_ce, reduction=reduction)
    assert op(logits, target, weight).dtype == (
        torch.float64 if dtype == torch.float64 else torch.float32
    )
    assert_as_accurate(op, ref, logits, target, weight)
    assert_as_accurate(op, ref, logits, target)

    def gradient(function, x, t, w):
        x = x.clone().requires_grad_()
        loss = function(x, t, w)
        return torch.autograd.grad(loss, x, torch.ones_like(loss))[0]

    assert_as_accurate(
        functools.partial(gradient, op), functools.partial(gradient, ref), logits, target, weight
    )


@pytest.mark.parametrize("target_dtype", [torch.uint8, torch.int16, torch.int32, torch.int64])
def test_target_dtypes_and_ignored_pixels(device, target_dtype):
    logits, target, weight = case((2, 3, 40, 50), device, target_dtype=target_dtype)
    target[0, :7] = 120
    for reduction in REDUCTIONS:
        options = {"ignore_index": 120, "reduction": reduction}
        torch.testing.assert_close(
            weighted_ce(logits, target, weight, **options),
            reference.weighted_ce(logits, target, weight, **options),
        )


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_weight_dtypes(device, dtype):
    logits, target, weight = case((2, 3, 8, 9), device)
    w = weight.to(dtype).requires_grad_()
    loss = weighted_ce(logits, target, w)
    torch.testing.assert_close(loss, weighted_ce(logits, target, w.detach().float()))
    assert torch.autograd.grad(loss, w)[0].dtype == dtype


@pytest.mark.parametrize("classes", [2, 3, 6])
def test_confident_pixels_keep_their_digits(device, classes):
    """ce = log(1 + r), gradients r / (1 + r): here r is far below the rounding of 1 + r."""
    gap = torch.tensor([5.0, 20.0, 40.0, 80.0], device=device)
    logits = torch.zeros(1, classes, 4, device=device)
    logits[0, 1] = gap
    target = torch.ones(1, 4, dtype=torch.long, device=device)
    x = logits.clone().requires_grad_()
    loss = weighted_ce(x, target, reduction="none")
    r = (classes - 1) * torch.exp(-gap.double())
    torch.testing.assert_close(loss[0].double(), torch.log1p(r), rtol=1e-6, atol=0)
    grad = torch.autograd.grad(loss.sum(), x)[0][0]
    torch.testing.assert_close(grad[1].double(), -r / (1 + r), rtol=1e-6, atol=0)


@pytest.mark.parametrize("reduction", ["weighted_mean", "mean"])
def test_finite_where_the_loss_is(device, reduction):
    """The sum of w ce, one w ce and one ce exceed float32; the result does not."""
    logits = torch.zeros(1, 2, 600, device=device)
    logits[0, 0, 0], logits[0, 1, 0] = 3e38, -3e38  # ce = 6e38
    target = torch.ones(1, 600, dtype=torch.long, device=device)
    weight = torch.full((1, 600), 1e30, device=device)
    weight[0, 0] = 1e-30
    weight[0, 1:9] = 3e38
    x = logits.clone().requires_grad_()
    loss = weighted_ce(x, target, weight, reduction=reduction)
    truth = reference.weighted_ce(logits.double(), target, weight.double(), reduction=reduction)
    torch.testing.assert_close(loss.double(), truth, rtol=1e-6, atol=0)
    y = logits.double().requires_grad_()
    reference.weighted_ce(y, target, weight.double(), reduction=reduction).backward()
    loss.backward()
    torch.testing.assert_close(x.grad.double(), y.grad, rtol=1e-5, atol=1e-37)


def test_ignore_index_outside_the_dtype_of_the_target(device):
    """156 is -100 in eight bits."""
    logits = torch.randn(1, 200, 4, device=device)
    target = torch.tensor([[156, 1, 2, 156]], dtype=torch.uint8, device=device)
    weight = torch.ones(1, 4, device=device, requires_grad=True)
    expected = torch.nn.functional.cross_entropy(logits, target.long())
    torch.testing.assert_close(reference.weighted_ce(logits, target, weight), expected)
    loss = weighted_ce(logits, target, weight)
    torch.testing.assert_close(loss, expected)
    assert torch.autograd.grad(loss, weight)[0].sum().abs() < 1e-5  # scaling all weights is nothing


def test_no_nan_in_derivatives_where_nothing_counts(device):
    logits = torch.tensor([[[-torch.inf, 1.0], [0.0, 2.0]]], device=device).double()
    target = torch.tensor([[0, 1]], device=device)
    weight = torch.zeros(1, 2, device=device).double()
    x, w = logits.requires_grad_(), weight.requires_grad_()
    grads = torch.autograd.grad(weighted_ce(x, target, w), (x, w), create_graph=True)
    assert all((g == 0).all() for g in grads)
    for second in torch.autograd.grad(sum(g.sum() for g in grads), (x, w), allow_unused=True):
        assert second is None or second.isfinite().all()


def strided(logits):
    """The same values in other memory layouts."""
    if logits.dim() == 4:
        yield logits.contiguous(memory_format=torch.channels_last)
    yield torch.stack([logits, logits], 1)[:, 1]  # a slice of a larger tensor
    yield torch.stack([logits, logits], -1)[..., 1]  # every second element
    yield logits.transpose(2, 3).contiguous().transpose(2, 3)  # spatial axes exchanged


def test_any_strides(device):
    logits, target, weight = case((2, 3, 20, 30), device)
    expected = weighted_ce(logits, target, weight)
    leaf = logits.clone().requires_grad_()
    expected_grad = torch.autograd.grad(weighted_ce(leaf, target, weight), leaf)[0]
    for x in strided(logits):
        x = x.detach().requires_grad_()
        loss = weighted_ce(x, target, weight)
        assert torch.equal(loss, expected)
        grad = torch.autograd.grad(loss, x)[0]
        # Kernels of other layouts may fuse other multiplications and additions on CUDA.
        rtol = 3e-7 if device.type == "cuda" else 0
        torch.testing.assert_close(grad, expected_grad, rtol=rtol, atol=0)
        assert grad.stride() == torch.empty_like(x).stride()


def test_golden_values(device):
    # Two classes, equal logits: ce = ln 2 whatever the class; w = 1, 3.
    logits = torch.zeros(1, 2, 2, device=device)
    target = torch.tensor([[0, 1]], device=device)
    weight = torch.tensor([[1.0, 3.0]], device=device)
    ln2 = torch.tensor(2.0, device=device).log()
    for reduction, expected in [("weighted_mean", 1), ("mean", 2), ("sum", 4)]:
        loss = weighted_ce(logits, target, weight, reduction=reduction)
        torch.testing.assert_close(loss, expected * ln2)
    x = logits.clone().requires_grad_()
    weighted_ce(x, target, weight).backward()
    expected = torch.tensor([[[-0.5, 1.5], [0.5, -1.5]]], device=device) / 4
    torch.testing.assert_close(x.grad, expected)


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_nothing_counts(device, reduction):
    logits, target, weight = case((1, 2, 5, 5), device)
    x = logits.clone().requires_grad_()
    zero = weighted_ce(x, target, torch.zeros_like(weight), reduction=reduction)
    assert (zero == 0).all()
    assert (torch.autograd.grad(zero.sum(), x)[0] == 0).all()
    ignored = weighted_ce(x, torch.full_like(target, 9), ignore_index=9, reduction=reduction)
    assert (ignored == 0).all()
    assert (torch.autograd.grad(ignored.sum(), x)[0] == 0).all()


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_empty(device, reduction):
    for shape in [(0, 2, 4, 4), (1, 2, 0, 4), (1, 2, 4, 0), (3, 5, 4, 5, 0)]:
        x = torch.zeros(shape, device=device, requires_grad=True)
        target = torch.zeros((shape[0], *shape[2:]), dtype=torch.long, device=device)
        loss = weighted_ce(x, target, reduction=reduction)
        assert (loss == 0).all()
        assert torch.autograd.grad(loss.sum(), x)[0].shape == shape


def test_extreme_logits(device):
    logits = torch.tensor([[[1e4, -1e4], [-1e4, 1e4], [-torch.inf, 0.0]]], device=device)
    target = torch.tensor([[1, 1]], device=device)
    x = logits.clone().requires_grad_()
    loss = weighted_ce(x, target, reduction="none")
    torch.testing.assert_close(loss, torch.tensor([[2e4, 0.0]], device=device))
    grad = torch.autograd.grad(loss.sum(), x)[0]
    expected = torch.tensor([[[1.0, 0.0], [-1.0, 0.0], [0.0, 0.0]]], device=device)
    torch.testing.assert_close(grad, expected)


def test_impossible_classes(device):
    inf = torch.inf
    logits = torch.tensor([[[-inf, 1.0, -inf], [2.0, -inf, -inf], [0.5, 0.5, -inf]]], device=device)
    target = torch.tensor([[1, 2, 1]], device=device)
    for x in (logits, logits[:, :2], logits.flip(1), logits.repeat(1, 3, 1)):
        t = target.clamp(max=x.shape[1] - 1)
        loss = weighted_ce(x, t, reduction="none")
        expected = torch.nn.functional.cross_entropy(x, t, reduction="none")
        expected[0, 2] = inf  # of three impossible classes; NaN in torch
        torch.testing.assert_close(loss, expected)
        leaf = x.clone().requires_grad_()
        grad = torch.autograd.grad(weighted_ce(leaf, t, reduction="none").sum(), leaf)[0]
        assert grad.isfinite().all()
        assert (grad[..., :2][x[..., :2] == -inf] <= 0).all()  # only towards an impossible target


def test_impossible_and_undefined_pixels_count_nothing_at_weight_zero(device):
    inf, nan = torch.inf, torch.nan
    logits = torch.tensor([[[-inf, nan, 0.0], [0.0, nan, 0.0]]], device=device, requires_grad=True)
    target = torch.tensor([[0, 0, 0]], device=device)
    weight = torch.tensor([[0.0, 0.0, 1.0]], device=device)
    loss = weighted_ce(logits, target, weight)
    torch.testing.assert_close(loss, torch.tensor(2.0, device=device).log())
    grad = torch.autograd.grad(loss, logits)[0]
    assert (grad[..., :2] == 0).all()
    # NaN that counts stays visible; a target of probability 0 costs infinity.
    assert weighted_ce(logits.detach(), target).isnan()
    assert weighted_ce(logits.detach()[..., :1], target[..., :1]) == inf


def undefined_case(classes, bad, dtype=torch.float32):
    """`bad` once for each class and target, in all classes, and beside -inf; then the same pixels
    ignored, of weight 0, and without `bad`. Also where PyTorch's gradient is NaN."""
    logits = torch.zeros(1, classes, classes, classes)  # (1, C, bad class, target)
    logits[0, range(classes), range(classes)] = bad
    target = torch.arange(classes).expand(1, classes, classes)
    impossible = torch.where(logits == 0, -torch.inf, logits)
    logits = torch.cat([logits, impossible, torch.full_like(logits, bad)], 2).flatten(2)
    logits, target = logits.to(dtype), target.repeat(1, 3, 1).flatten(1)
    x = logits.clone().requires_grad_()
    torch.nn.functional.cross_entropy(x, target, reduction="sum").backward()
    none = torch.zeros_like(target, dtype=torch.bool)
    return (
        torch.cat([logits, logits, logits, torch.ones_like(logits)], 2),
        torch.cat([target, torch.full_like(target, -100), target, target], 1),
        torch.cat([~none, ~none, none, ~none], 1).float(),
        torch.cat([x.grad.isnan(), none.expand_as(x).repeat(1, 1, 3)], 2),
    )


@pytest.mark.parametrize("reduction", ["none", "sum", "mean", "weighted_mean"])
def test_no_upstream_gradient_of_an_infinite_loss(device, reduction):
    logits = torch.tensor([[[-torch.inf, 0.0], [0.0, 2.0]]], device=device, requires_grad=True)
    weight = torch.ones(1, 2, device=device, requires_grad=True)
    loss = weighted_ce(logits, torch.zeros(1, 2).long().to(device), weight, reduction=reduction)
    for grad in torch.autograd.grad(loss, (logits, weight), torch.zeros_like(loss)):
        assert (grad == 0).all()


UNDEFINED = pytest.mark.parametrize("bad", [torch.nan, torch.inf])


@UNDEFINED
@pytest.mark.parametrize("classes", [1, 2, 3, 6])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_undefined_pixels_are_nan(device, dtype, classes, bad):
    """In the loss and the gradient: a scaler of gradients sees no loss."""
    case = undefined_case(classes, bad, dtype)
    logits, target, weight, undefined = (x.to(device) for x in case)
    assert undefined.any(1).equal(undefined.all(1))
    for x in (logits, logits.transpose(1, 2).contiguous().transpose(1, 2)):
        for reduction in REDUCTIONS:
            x = x.detach().requires_grad_()
            loss = weighted_ce(x, target, weight, reduction=reduction)
            grad = torch.autograd.grad(loss.sum(), x)[0]
            assert grad.isnan().equal(undefined)
            assert (grad[..., weight[0] * (target[0] >= 0) == 0] == 0).all()
            assert loss.isnan().equal(
                undefined[:, 0] if reduction == "none" else undefined[0, 0, 0]
            )


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_gradients_that_vanish_are_still_nan(device, reduction):
    """u w is 0 in float32."""
    x = torch.tensor([[[torch.inf], [0.0]]], device=device, requires_grad=True)
    target = torch.zeros(1, 1, dtype=torch.long, device=device)
    weight = torch.full((1, 1), 1e-30, device=device)
    loss = weighted_ce(x, target, weight, reduction=reduction)
    assert torch.autograd.grad(loss, x, torch.full_like(loss, 1e-30))[0].isnan().all()


TINY_WEIGHTS = [[1e-45, 0.0], [1e-45] * 300, [0.0] * 299 + [3e-45], [1e-30, 1e-39, 0.0]]


def tiny_weights_case(weights, gap):
    """Also the loss and its gradient. `gap`: of the logits, about; with 60 the losses are 1e-26."""
    logits, target, _ = case((1, 2, len(weights)))
    logits.scatter_add_(1, target[:, None], torch.full_like(logits[:, :1], gap))
    weight = torch.tensor([weights])
    x, w = logits.double().requires_grad_(), weight.double()
    right, wrong = (x.gather(1, t[:, None])[:, 0] for t in (target, 1 - target))
    truth = (w * torch.log1p(torch.exp(wrong - right))).sum() / w.sum()
    return logits, target, weight, truth.detach(), torch.autograd.grad(truth, x)[0]


@pytest.mark.parametrize(
    ("op", "gap", "rtol"),
    [(weighted_ce, 0.0, 1e-6), (weighted_ce, 60.0, 1e-5), (reference.weighted_ce, 0.0, 5e-3)],
)
@pytest.mark.parametrize("weights", TINY_WEIGHTS, ids=len)
def test_weighted_mean_of_tiny_weights(device, op, weights, gap, rtol):
    """The products w ce are 0 in float32, their mean is not."""
    tiny = tiny_weights_case(weights, gap)
    logits, target, weight, truth, truth_grad = (x.to(device) for x in tiny)
    x = logits.requires_grad_()
    loss = op(x, target, weight)
    torch.testing.assert_close(loss.double(), truth, rtol=rtol, atol=0)
    grad = torch.autograd.grad(loss, x)[0]
    torch.testing.assert_close(grad.double(), truth_grad, rtol=rtol, atol=1e-37)


def test_derivatives_at_tiny_weights(device):
    """Of weights they are (ce - loss) / sum(w); second ones against float64."""
    tiny = tiny_weights_case([1e-45, 0.0], 0.0)
    logits, target, weight = (x.to(device) for x in tiny[:3])
    seconds = []
    for dtype in (torch.float32, torch.float64):
        x, w = logits.to(dtype).requires_grad_(), weight.to(dtype).requires_grad_()
        gx, gw = torch.autograd.grad(weighted_ce(x, target, w), (x, w), create_graph=True)
        seconds.append(torch.autograd.grad(gx[0, 0, 0], x)[0])
        if dtype == torch.float32:
            assert gw[0, 0] == 0
            assert gw[0, 1].isinf()
    torch.testing.assert_close(seconds[0].double(), seconds[1], rtol=1e-5, atol=0)


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_gradients(device, reduction):
    logits, target, weight = case((2, 3, 4), device, torch.float64)
    target[0, 0] = -100
    inputs = (logits.requires_grad_(), weight.double().requires_grad_())
    op = lambda x, w: weighted_ce(x, target, w, reduction=reduction)  # noqa: E731
    assert torch.autograd.gradcheck(op, inputs)
    assert torch.autograd.gradgradcheck(op, inputs)
    unweighted = lambda x: weighted_ce(x, target, reduction=reduction)  # noqa: E731
    assert torch.autograd.gradcheck(unweighted, inputs[:1])
    assert torch.autograd.gradgradcheck(unweighted, inputs[:1])


def test_registration(device):
    logits, target, weight = case((2, 3, 5, 4), device)
    operators = torch.ops.unet_fast
    x = logits.requires_grad_()
    torch.library.opcheck(operators.weighted_ce.default, (x, target, weight, 3, -100))
    torch.library.opcheck(operators.weighted_ce.default, (x, target, None, 0, -100))
    divisor = weight.sum().double()
    grad = torch.ones((), device=device)
    torch.library.opcheck(
        operators.weighted_ce_backward.default, (grad, x, target, weight, divisor, 3, -100)
    )


def test_compiles_whole(device):
    logits, target, weight = case((2, 3, 5, 4), device)
    compiled = torch.compile(weighted_ce, fullgraph=True, backend="aot_eager")
    x = logits.clone().requires_grad_()
    loss = compiled(x, target, weight)
    assert torch.equal(loss, weighted_ce(logits, target, weight))
    loss.backward()
    leaf = logits.clone().requires_grad_()
    weighted_ce(leaf, target, weight).backward()
    assert torch.equal(x.grad, leaf.grad)


def test_vmap_of_the_forward(device):
    logits, target, weight = case((4, 3, 5, 6), device)
    logits, target = logits.unsqueeze(1), target.unsqueeze(1)
    for reduction in REDUCTIONS:
        op = functools.partial(weighted_ce, reduction=reduction)
        result = torch.func.vmap(op)(logits, target, weight.unsqueeze(1))
        each = [op(*sample) for sample in zip(logits, target, weight.unsqueeze(1), strict=True)]
        assert torch.equal(result, torch.stack(each))
    shared = torch.func.vmap(weighted_ce, in_dims=(1, None))(logits.transpose(0, 1), target[0])
    assert shared.shape == (4,)


@pytest.mark.filterwarnings("ignore:.*torch.jit")  # raised by torch.func.jvp itself
def test_refuses_what_would_be_silently_wrong(device):
    logits, target, _ = case((2, 3, 5), device)
    op = functools.partial(weighted_ce, target=target)
    with pytest.raises(NotImplementedError, match=r"^weighted_ce: forward-mode"):
        torch.func.jvp(op, (logits,), (logits,))
    with torch.autograd.forward_ad.dual_level(), pytest.raises(NotImplementedError):
        op(torch.autograd.forward_ad.make_dual(logits, logits))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_autocast(device, dtype):
    logits, target, weight = case((2, 3, 5, 4), device, dtype)
    x = logits.clone().requires_grad_()
    with torch.autocast(device.type, dtype=dtype):
        loss = weighted_ce(x, target, weight)
    assert loss.dtype == torch.float32
    assert torch.equal(loss, weighted_ce(logits, target, weight))
    assert torch.autograd.grad(loss, x)[0].dtype == dtype


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_saves_its_inputs_only(device, reduction):
    logits, target, weight = case((2, 3, 5, 4), device, torch.bfloat16)
    saved = []

    def pack(x):
        saved.append(x)
        return x

    x = logits.requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        weighted_ce(x, target, weight, reduction=reduction)
    inputs = {tensor.data_ptr() for tensor in (x, target, weight)}
    assert all(s.data_ptr() in inputs or s.numel() == 1 for s in saved)


def test_cuda_graph(device):
    if device.type != "cuda":
        pytest.skip("CUDA only")
    logits, target, weight = case((2, 2, 40, 50), device)
    x = logits.clone().requires_grad_()

    def step():
        loss = weighted_ce(x, target, weight)
        return loss, torch.autograd.grad(loss, x)[0]

    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = step()
    with torch.no_grad():
        x.copy_(logits.flip(2))
    graph.replay()
    for replayed, eager in zip(results, step(), strict=True):
        assert torch.equal(replayed, eager)


def test_same_bits_for_any_number_of_threads():
    logits, target, weight = case((2, 2, 200, 200))
    x = logits.requires_grad_()
    threads = torch.get_num_threads()
    losses, grads = [], []
    try:
        for n in (1, 2, 3):
            torch.set_num_threads(n)
            losses.append(weighted_ce(x, target, weight))
            grads.append(torch.autograd.grad(losses[-1], x)[0])
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(loss, losses[0]) for loss in losses)
    assert all(torch.equal(grad, grads[0]) for grad in grads)


def test_repeats_bit_for_bit(device):
    logits, target, weight = case((2, 2, 100, 100), device)
    first = weighted_ce(logits, target, weight)
    assert all(torch.equal(weighted_ce(logits, target, weight), first) for _ in range(5))


def test_module():
    logits, target, weight = case((2, 3, 5, 4))
    module = unet_fast.WeightedCELoss(reduction="sum")
    assert torch.equal(
        module(logits, target, weight), weighted_ce(logits, target, weight, reduction="sum")
    )
    assert "reduction='sum'" in repr(module)


def test_out_of_range_target():
    logits, target, _ = case((2, 3, 5, 4))
    target[1, 2, 3] = 7
    message = r"target must be in \[0, 2\] or ignore_index \(-100\), got 7 at flat index 31$"
    with pytest.raises(ValueError, match=r"^weighted_ce: " + message):
        weighted_ce(logits, target)
    compiled = torch.compile(weighted_ce, fullgraph=True, backend="aot_eager")
    with pytest.raises(RuntimeError, match=message[:-1]):
        compiled(logits, target)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"logits": torch.zeros(1, 2, 3).long()}, TypeError, "logits must be floating point"),
        (
            {"target": torch.zeros(1, 3)},
            TypeError,
            "target must be uint8, int16.*got torch.float32",
        ),
        ({"weight": torch.ones(1, 3).int()}, TypeError, "weight must be floating point, got"),
        ({"logits": torch.zeros(3)}, ValueError, r"logits must be \(N, C.*got \(3,\)"),
        ({"logits": torch.zeros(1, 0, 3)}, ValueError, r"C >= 1, got \(1, 0, 3\)"),
        ({"target": torch.zeros(1, 4).long()}, ValueError, r"target must have shape \(1, 3\), got"),
        ({"weight": torch.ones(3)}, ValueError, r"weight must have shape \(1, 3\), got \(3,\)"),
        (
            {"target": torch.zeros(1, 3, device="meta").long()},
            ValueError,
            "must be on cpu, got meta",
        ),
        ({"reduction": "average"}, ValueError, "reduction must be one of none.*got 'average'"),
    ],
)
def test_rejects(change, error, message):
    arguments = {"logits": torch.zeros(1, 2, 3), "target": torch.zeros(1, 3).long()} | change
    with pytest.raises(error, match="^weighted_ce: .*" + message):
        weighted_ce(**arguments)


HOST_CASES = [((1, 2, 1), False), ((2, 3, 257), True), ((2, 2, 2049), False), ((1, 40, 70), True)]
HOST_CASES += [((2, 1, 6), False), ((1, 5, 300), False)]
# Four pixels at once, by planes and by pixels; then odd numbers of them.
HOST_CASES += [((2, 2, 2052), False), ((1, 3, 260), False), ((2, 4, 1024), False)]
HOST_CASES += [((2, 2, 2052), True), ((1, 3, 260), True), ((2, 4, 1024), True), ((2, 4, 75), True)]
# Channels-last: classes four at once, by one thread or by four; one by one.
HOST_CASES += [((2, 20, 70), True), ((2, 64, 33), True), ((2, 21, 75), True)]
HOST_CASES += [((2100, 3, 1), False), ((2100, 5, 1), True)]  # images of one pixel
HOST_CASES += [pytest.param((1, 3000, 3), False, marks=pytest.mark.long)]


@pytest.mark.parametrize("reduction", _REDUCTION)
@pytest.mark.parametrize(("shape", "channels_last"), HOST_CASES, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_cuda_kernels_on_host(host_kernels, dtype, shape, channels_last, reduction):
    logits, target, weight = case(shape, dtype=dtype)
    target[0, 0] = -100
    if channels_last:
        logits = logits.transpose(1, 2).contiguous().transpose(1, 2)
    x = logits.double().detach().clone().requires_grad_()
    truth = reference.weighted_ce(x, target, weight.double(), reduction=reduction)
    upstream = torch.rand(truth.shape).double()
    truth_grad = torch.autograd.grad(truth, x, upstream)[0]

    w = weight.to(dtype).numpy()
    code = _REDUCTION[reduction]
    loss, divisor = host_kernels.weighted_ce(logits.numpy(), target.numpy(), w, code, -100)
    grad = host_kernels.weighted_ce_backward(
        upstream.to(dtype).numpy(), logits.numpy(), target.numpy(), w, divisor, code, -100
    )
    tolerance = 1e-6 if dtype == torch.float32 else 1e-12
    expected = truth.detach().numpy()
    np.testing.assert_allclose(loss.reshape(expected.shape), expected, tolerance, tolerance)
    np.testing.assert_allclose(
        grad, truth_grad, rtol=0, atol=tolerance * float(truth_grad.abs().max())
    )


@pytest.mark.parametrize("classes", [2, 3, 4])
@pytest.mark.parametrize("reduction", ["weighted_mean", "mean"])
def test_same_bits_for_any_layout_on_host(host_kernels, reduction, classes):
    logits, target, weight = case((2, classes, 2052))
    layouts = [
        logits,
        logits.transpose(1, 2).contiguous().transpose(1, 2),
        torch.stack([logits, logits], -1)[..., 1],
    ]
    code = _REDUCTION[reduction]
    results = [
        host_kernels.weighted_ce(x.numpy(), target.numpy(), weight.numpy(), code, -100)
        for x in layouts
    ]
    assert all(loss == results[0][0] and divisor == results[0][1] for loss, divisor in results)


@pytest.mark.parametrize("shape", [(0, 2, 4), (2, 2, 0), (0, 9, 4), (2, 9, 0)], ids=str)
def test_no_pixels_on_host(host_kernels, shape):
    logits, target = np.zeros(shape, np.float32), np.zeros((shape[0], shape[2]), np.int64)
    for reduction, expected in {"none": 1, "sum": 1, "mean": 0, "weighted_mean": 0}.items():
        loss, divisor = host_kernels.weighted_ce(logits, target, None, _REDUCTION[reduction], -100)
        assert divisor == expected
        assert (loss == 0).all()


@pytest.mark.parametrize("shape", [(2, 2, 260), (1, 3, 33)], ids=str)  # four at once, one by one
@pytest.mark.parametrize("target_dtype", [torch.uint8, torch.int16, torch.int32, torch.int64])
def test_target_dtypes_on_host(host_kernels, target_dtype, shape):
    logits, target, weight = case(shape, target_dtype=target_dtype)
    target[0, ::3] = 120
    loss, _ = host_kernels.weighted_ce(
        logits.numpy(), target.numpy(), weight.numpy(), _REDUCTION["mean"], 120
    )
    expected = reference.weighted_ce(logits, target, weight, ignore_index=120, reduction="mean")
    np.testing.assert_allclose(loss[0], expected, rtol=1e-6)


def test_huge_values_on_host(host_kernels):
    logits = np.float32([[[3e38, 0, 0, 0], [-3e38, 0, 0, 0]]])
    target = np.int64([[1, 1, 1, 1]])
    weight = np.float32([[1e-30, 3e38, 3e38, 3e38]])
    loss, divisor = host_kernels.weighted_ce(
        logits, target, weight, _REDUCTION["weighted_mean"], -100
    )
    np.testing.assert_allclose(loss[0], np.log(2), rtol=1e-6)
    assert np.isfinite(divisor)


@UNDEFINED
@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("classes", [1, 2, 3, 6])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_undefined_pixels_on_host(host_kernels, dtype, classes, channels_last, bad):
    logits, target, weight, undefined = undefined_case(classes, bad, dtype)
    if channels_last:
        logits = logits.transpose(1, 2).contiguous().transpose(1, 2)
    x, t, w = logits.numpy(), target.numpy(), weight.to(dtype).numpy()
    for code in _REDUCTION.values():
        loss, divisor = host_kernels.weighted_ce(x, t, w, code, -100)
        upstream = np.ones(target.numel() if code == 0 else 1, x.dtype)
        grad = host_kernels.weighted_ce_backward(upstream, x, t, w, divisor, code, -100)
        np.testing.assert_array_equal(np.isnan(grad), undefined)
        assert (grad[..., (w * (t >= 0))[0] == 0] == 0).all()
        np.testing.assert_array_equal(np.isnan(loss), undefined[0, 0] if code == 0 else [True])


@pytest.mark.parametrize("gap", [0.0, 60.0])
@pytest.mark.parametrize("weights", TINY_WEIGHTS, ids=len)
def test_tiny_weights_on_host(host_kernels, weights, gap):
    *inputs, truth, truth_grad = (x.numpy() for x in tiny_weights_case(weights, gap))
    code = _REDUCTION["weighted_mean"]
    loss, divisor = host_kernels.weighted_ce(*inputs, code, -100)
    grad = host_kernels.weighted_ce_backward(np.float32([1]), *inputs, divisor, code, -100)
    np.testing.assert_allclose(loss[0], truth, rtol=1e-5)
    np.testing.assert_allclose(grad, truth_grad, rtol=1e-5, atol=1e-37)
