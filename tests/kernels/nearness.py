"""The bound of the Triton tests on residual values and losses."""

import torch


def assert_near(got, exact, eager, what, terms=1.0):
    """Same NaN and infinities, and the rest no further from float64 than twice eager float32.

    `terms` is the size of what is subtracted on the way: some of its roundings are granted, because
    over few rows eager's own error can be small by luck.
    """
    assert torch.equal(got.isnan(), exact.isnan()), f"{what}: NaN in other places"
    infinite = exact.isinf()
    assert torch.equal(got[infinite].double(), exact[infinite]), what
    finite = exact.isfinite()
    if finite.any():
        largest = exact[finite].abs().max().item()
        baseline = (eager.double() - exact)[finite].abs().nan_to_num(0.0).max().item()
        tolerance = 2 * baseline + 4 * 2.0**-23 * max(largest, terms)
        error = (got.double() - exact)[finite].abs().max().item()
        assert error <= tolerance, f"{what}: error {error:.2e} > {tolerance:.2e}"
