import torch


def assert_as_accurate(op, reference, *inputs, factor=2):
    """Checks that `op` errs at most `factor` times as much as `reference` in the same dtype.

    The truth is `reference` on the same inputs in float64, so no tolerance is guessed.
    """
    truth = reference(*(x.double() if x.dtype.is_floating_point else x for x in inputs))
    scale = truth.abs().max().clamp_min(torch.finfo(torch.float64).tiny)
    result = op(*inputs)
    assert torch.isfinite(result).all()
    error = (result.double() - truth).abs().max() / scale
    allowed = (reference(*inputs).double() - truth).abs().max() / scale
    # One rounding is free; in float64 the truth itself is rounded, once for each of many terms.
    floor = torch.finfo(result.dtype).eps * (16 if result.dtype == torch.float64 else 1)
    assert error <= factor * allowed + floor, f"error {error:.2e}, reference {allowed:.2e}"
