"""What tests of several rooms ask for by name."""

import os

# before anything imports huggingface_hub
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")

import importlib.util
import random
import re

import numpy as np
import pytest
import torch

from tests.tiny_text import word_tokenizer

try:
    import hypothesis
except ModuleNotFoundError:  # a machine that is there for its GPU may have little else
    pass
else:
    # How fast examples are drawn is a matter of what else the machine does.
    hypothesis.settings.register_profile(
        "any load", deadline=None, suppress_health_check=[hypothesis.HealthCheck.too_slow]
    )
    hypothesis.settings.load_profile("any load")


def pytest_addoption(parser):
    parser.addoption("--share", default="0/1", help="i/n: of n equal shares of the tests the i-th")


def runs_on_gpu(item):
    """By its parameter, a device or a backend on a device; or all of its file does (ON_GPU)."""
    parameters = item.callspec.params.values() if hasattr(item, "callspec") else ()
    parts = [part for p in parameters for part in (p if isinstance(p, tuple) else (p,))]
    devices = (str(part) for part in parts if isinstance(part, (str, torch.device)))
    on_cuda = any(torch.cuda.is_available() and d.partition(":")[0] == "cuda" for d in devices)
    return on_cuda or getattr(item.module, "ON_GPU", False)


@pytest.hookimpl(wrapper=True)
def pytest_collection_modifyitems(config, items):
    for item in items:
        if runs_on_gpu(item):
            item.add_marker(pytest.mark.gpu)
    yield  # -m and -k choose
    # Neighbours are much alike: dealt out, the shares take about equally long.
    share, shares = map(int, config.getoption("--share").split("/"))
    items[:] = items[share::shares]


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report(collector):
    """Files that need what a machine for GPU tests may not have are skipped, and say why."""
    report = yield
    if report.failed and isinstance(collector, pytest.Module):
        missing = re.search(r"No module named '(datasets|hypothesis|peft)\b", str(report.longrepr))
        if missing and importlib.util.find_spec(missing[1]) is None:
            reason = f"Skipped: {missing[1]} is not installed"
            report.outcome, report.longrepr = "skipped", (str(collector.path), 1, reason)
    return report


@pytest.fixture(autouse=True)
def same_random_numbers():
    """Whatever ran before, and in whichever order."""
    random.seed(0)
    np.random.seed(0)  # noqa: NPY002
    torch.manual_seed(0)


@pytest.fixture
def one_thread():
    """Small tensors gain nothing from more, and lose much where cores are shared."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def tiny_tokenizer():
    return word_tokenizer()
