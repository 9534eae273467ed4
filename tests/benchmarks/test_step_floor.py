"""The products that a step's time is held against are the step's own, no more and no fewer."""

import pytest
from peft.tuners.lora.layer import Linear as LoraLinear
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import step_floor
from qadapter.text.packing import PackedPreferenceCollator
from tests.tiny_models import make_model


@pytest.mark.parametrize("cached", [False, True])
def test_products_are_those_of_the_step(cached):
    model = make_model()
    config = model.config
    pair = {"prompt_ids": [1] * 5, "chosen_ids": [2] * 7, "rejected_ids": [3] * 4}
    packed = PackedPreferenceCollator()([pair])
    with FlopCounterMode(display=False) as counted:
        step_floor.products(model, packed, cached)()

    streams = 1 if cached else 2
    layers, hidden, inner = (
        config.num_hidden_layers, config.hidden_size, config.intermediate_size
    )  # fmt: skip
    heads, keys = config.num_attention_heads, config.num_key_value_heads
    dim = hidden // heads
    weights = 2 * hidden * heads * dim + 2 * hidden * keys * dim + 3 * hidden * inner
    tokens = 5 + 6 + 3  # nothing follows the last token of a response
    pairs_seen = (5 + 6) ** 2 + 3 * (5 + 3)  # queries x keys of each sequence
    rows = packed.get("unique_rows", packed["rows"]).numel()
    expected = 2 * layers * tokens * weights * (streams + 1)
    expected += 2 * layers * heads * dim * pairs_seen * (2 * streams + 5)
    expected += 2 * rows * hidden * config.vocab_size * (streams + 1)
    assert counted.get_total_flops() == expected

    with FlopCounterMode(display=False) as counted:
        step_floor.products(model, packed, cached, lora=True)()
    sizes = [
        tuple(factor.weight.shape)
        for module in model.modules()
        if isinstance(module, LoraLinear)
        for factor in (*module.lora_A.values(), *module.lora_B.values())
    ]
    assert sizes
    assert counted.get_total_flops() == expected + 6 * tokens * sum(a * b for a, b in sizes)
