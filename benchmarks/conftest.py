"""Regression runs of the operations with pytest-benchmark.

    python -m pytest benchmarks --benchmark-autosave      # keeps the times below .benchmarks/
    python -m pytest benchmarks --benchmark-compare --benchmark-compare-fail=min:10%

They time ours alone and compare a run with earlier ones; `python -m benchmarks` has the peers.
"""

import pytest
import torch


def pytest_addoption(parser):
    parser.addoption("--tiny", action="store_true", help="tiny shapes: does everything run?")


@pytest.fixture(scope="session")
def device():
    return "cuda" if torch.cuda.is_available() else "cpu"


@pytest.fixture(scope="session")
def size(request):
    """Takes the full value and the tiny one, gives the one asked for."""
    tiny = request.config.getoption("--tiny")
    return lambda full, small: small if tiny else full


@pytest.fixture
def timed(benchmark, device):
    """Runs a function under the clock, the GPU's work included; gives its result."""

    def run(function):
        def waited():
            result = function()
            if device == "cuda":
                torch.cuda.synchronize()
            return result

        return benchmark.pedantic(waited, rounds=15, warmup_rounds=2)

    return run
