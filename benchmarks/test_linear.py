"""Regression times of the loss from hidden states; each gradient is checked against float64."""

import pytest

from benchmarks.bench_linear import DTYPES, accuracy, step
from benchmarks.linear_problem import MODES, make_problem, solve, with_cache
from benchmarks.peers.linear import OURS

LIMITS = {"fp32": 1e-4, "bf16": 1e-2}  # the median row where p < 0.9


@pytest.mark.parametrize("dtype", LIMITS)
@pytest.mark.parametrize("mode", MODES)
def test_linear(timed, size, device, mode, dtype):
    n, d, v = size((256, 576, 16384), (32, 64, 1001))
    kind = DTYPES[dtype]
    problem = make_problem(n, d, v, kind, device, MODES[mode], 2)
    truth = solve(problem)
    problem = with_cache(problem, truth)
    timed(step(OURS, problem))
    error = accuracy(OURS, problem, truth)
    assert error["dh"]["<0.9"]["median"] < LIMITS[dtype]
