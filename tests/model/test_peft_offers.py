"""What PEFT offers is exact here or refused, and docs/peft.md says which."""

import dataclasses

import pytest
from peft import LoraConfig
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING

from tests.model import peft_offers
from tests.model.peft_offers import EACH, LORA, MISSING, ONE, OTHERS, REFUSED, outcome

pytestmark = pytest.mark.filterwarnings("ignore")


def test_every_offer_has_a_row():
    """Fails with a release of PEFT that offers something new: try it, give it a row."""
    fields = {field.name for field in dataclasses.fields(LoraConfig)} - peft_offers.DESCRIBE
    named = {part.partition(" (")[0] for row in LORA for part in row.split(", ")}
    assert fields == named
    assert {kind.value for kind in PEFT_TYPE_TO_CONFIG_MAPPING} - {"LORA"} <= OTHERS.keys()


def _exact_or_refused(row, folder):
    offer = outcome(row, folder)
    if offer.runs in (REFUSED, MISSING):
        assert offer.why
        return offer
    assert offer.runs in (ONE, EACH)
    assert offer.adapter_off_by == offer.loaded_off_by == 0
    assert offer.base_off_by < 1e-4  # norms and gates by their own kernels
    assert offer.moved_by > 0.1  # the adapter is seen
    assert offer.decoded_off_by < 2e-4 and offer.alone_off_by < 2e-4
    return offer


@pytest.mark.parametrize("row", LORA)
def test_options_of_lora(row, tmp_path):
    offer = _exact_or_refused(row, tmp_path)
    page = peft_offers.PAGE.read_text(encoding="utf-8")
    assert f"| LoRA: {row} | {offer.runs} |" in page


@pytest.mark.slow
@pytest.mark.parametrize("row", OTHERS)
def test_other_adapters(row, tmp_path):
    offer = _exact_or_refused(row, tmp_path)
    page = peft_offers.PAGE.read_text(encoding="utf-8")
    # One that needs a package of its own may be there on one machine and not on another.
    assert any(f"| {row} | {runs} |" in page for runs in (offer.runs, MISSING))
