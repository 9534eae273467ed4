"""Regression times of the sampler; the tokens are checked to be among those that filters keep."""

import pytest
import torch

from benchmarks.bench_sample import DTYPES
from benchmarks.peers.sampling import probabilities
from benchmarks.sampling_problem import FILTERS, make_problem
from qadapter import functional as QF


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("filters", FILTERS)
def test_sample(timed, size, device, filters, dtype):
    batch, vocab = size((8, 49152), (3, 1001))
    problem = make_problem(batch, vocab, DTYPES[dtype], device, "two", "peaked", filters)
    arguments = problem.arguments
    drawn = timed(lambda: QF.sample(problem.base, problem.q, **arguments))
    kept = probabilities(problem).gather(-1, drawn.tokens[:, None])[:, 0]
    assert (kept > 0).all()
    torch.testing.assert_close(drawn.logprobs.exp(), kept, rtol=1e-3, atol=1e-5)
