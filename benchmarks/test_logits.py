"""Regression times of the operations on logits; each result is checked against float64."""

import pytest

from benchmarks import bench_logits
from benchmarks.logits_problem import gradient_error, make_problem, solve, value_errors

LIMITS = {"fp32": 1e-4, "bf16": 1e-2}  # of the gradient: bfloat16 rounds it


@pytest.mark.parametrize("dtype", LIMITS)
@pytest.mark.parametrize("op", bench_logits.OPS)
def test_logits(timed, size, device, op, dtype):
    n, v = size((128, 49152), (8, 1001))
    alphas = (1.0, 1.0, 1.0)
    problem = make_problem(n, v, bench_logits.DTYPES[dtype], device, alphas, 2)
    function = bench_logits.function_of(op, bench_logits.OURS, problem)
    before = getattr(function, "before", None)

    def once():
        if before is not None:
            before()
        return function()

    result = timed(once)  # "backward" has its forward in it here
    truth = solve(problem)
    if op == "forward":
        assert max(value_errors(truth, result).values()) < 1e-4
    else:
        right = truth.of_loss if op == "loss+backward" else truth.grad
        assert gradient_error(problem.q.grad, right) < LIMITS[dtype]
