"""What tests of models share."""

import pytest

from tests.model.saved_adapters import save_all


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Holds saved adapters of many kinds and their base."""
    folder = tmp_path_factory.mktemp("models")
    save_all(folder)
    return folder
