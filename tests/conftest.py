"""What tests of several rooms ask for by name."""

import os

# before anything imports huggingface_hub
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")

import random

import hypothesis
import numpy as np
import pytest
import torch

from tests.tiny_text import word_tokenizer

# How fast examples are drawn is a matter of what else the machine does.
hypothesis.settings.register_profile(
    "any load", deadline=None, suppress_health_check=[hypothesis.HealthCheck.too_slow]
)
hypothesis.settings.load_profile("any load")


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
