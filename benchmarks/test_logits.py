"""Regression times of the operations on logits; each result is checked against float64."""

import pytest

from benchmarks.bench_logits import DTYPES, OPS, functions_of
from benchmarks.logits_problem import gradient_error, make_problem, solve, value_errors
from benchmarks.peers.logits import OURS

LIMITS = {"fp32": 1e-4, "bf16": 1e-2}  # of the gradient: bfloat16 rounds it


@pytest.mark.parametrize("dtype", LIMITS)
@pytest.mark.parametrize("op", OPS)
def test_logits(timed, size, device, op, dtype):
    n, v = size((128, 49152), (8, 1001))
    alphas = (1.0, 1.0, 1.0)
    problem = make_problem(n, v, DTYPES[dtype], device, alphas, 2)
    function, before = functions_of(op, OURS, problem)

    def once():
        before()
        return function()

    result = timed(once)  # "backward" has its forward in it here
    truth = solve(problem)
    if op == "forward":
        assert max(value_errors(truth, result).values()) < 1e-4
    else:
        right = truth.of_loss if op == "loss+backward" else truth.grad
        assert gradient_error(problem.q.grad, right) < LIMITS[dtype]
