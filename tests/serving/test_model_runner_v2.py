"""What vLLM's second model runner, CUDA's, is given: its classes with stand-ins for its objects."""

from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("vllm", reason="needs vLLM, in an environment of its own: make serve-test")

from vllm import SamplingParams
from vllm.v1.worker.gpu.model_states import resolve_model_state_cls
from vllm.v1.worker.gpu.sample.logits_processor.loader import _load_v2_logitsprocs_plugins

from qadapter.integrations.vllm import models, strength
from qadapter.model.serving import Settings

SETTINGS = Settings({"default": "out"}, {"default": 1.0}, 0.25, {"default": (1.0, 1.0, 1.0)})


@pytest.fixture
def state():
    """Without the runner's own part, which needs a GPU's libraries to be made."""
    made = object.__new__(strength.model_state())
    made.rope_state = made.prompt_embeds_state = None
    made.supports_mm_inputs = False
    made._settings = SETTINGS
    made._slots = torch.tensor([SETTINGS.stream_weights(None)]).repeat(8, 1)
    made._tokens = made._slots[:1].repeat(64, 1)
    return made


def add(state, slot, **extra):
    params = SamplingParams(extra_args=extra or None)
    state.add_request(slot, SimpleNamespace(sampling_params=params))


def batch(slots, starts, tokens):
    """A batch of the runner's: slots of its rows, where their tokens start, with padding."""
    return SimpleNamespace(
        num_tokens_after_padding=tokens,
        num_reqs=len(slots),
        query_start_loc=torch.tensor(starts, dtype=torch.int32),
        idx_mapping=torch.tensor(slots),
    )


def test_every_token_gets_the_weights_of_its_request(state):
    add(state, 5, strength=0.0)
    add(state, 2, strength=2.0)
    add(state, 7)
    out = state.prepare_inputs(batch([7, 5, 2], [0, 1, 6, 9, 9, 9], 12), None)["stream_weights"]
    assert out.dtype == torch.float32 and out.shape == (12, 2)
    assert out[:, 1].tolist() == [0.25] + 5 * [0.0] + 6 * [2.0]
    assert torch.equal(out.sum(1), torch.ones(12))


def test_a_slot_that_is_taken_again(state):
    add(state, 3, strength=2.0)
    add(state, 3)
    out = state.prepare_inputs(batch([3], [0, 2], 2), None)["stream_weights"]
    assert out[:, 1].tolist() == [0.25, 0.25]


def test_a_captured_graph_reads_the_same_storage(state):
    captured = state.prepare_dummy_inputs(4, 12)["stream_weights"]
    add(state, 1, strength=3.0)
    state.prepare_inputs(batch([1], [0, 12], 12), None)
    assert captured.shape == (12, 2) and captured[:, 1].tolist() == 12 * [3.0]


def test_the_runner_finds_both_hooks():
    assert strength.RequestStrength in _load_v2_logitsprocs_plugins()
    model = object.__new__(models.QAdapterLlamaForCausalLM)
    made = resolve_model_state_cls(SimpleNamespace(), model)
    assert made.__name__ == "StrengthState"


def test_the_processor_is_inert_there():
    config = SimpleNamespace(hf_config=SimpleNamespace(qadapter=None))
    made = strength.RequestStrength(SimpleNamespace(model_config=config), object())
    logits = torch.randn(2, 5)
    assert not made.add_request(0, SamplingParams()) and made.apply(logits, None) is logits
    made.update_state(SimpleNamespace(added=[(0, SamplingParams())], moved=[]))


def test_the_forward_mixes_by_what_it_is_given():
    """Both streams' hidden states [2 T, D] in, mixed ones [T, D] out."""
    hidden = torch.randn(6, 4)
    model = SimpleNamespace(model=lambda *inputs: hidden)
    weights = torch.tensor([[1.0, 0.0], [0.0, 1.0], [-1.0, 2.0]])
    out = models._Streams.forward(model, None, torch.arange(3), stream_weights=weights)
    base, q = hidden[:3], hidden[3:]
    torch.testing.assert_close(out, torch.stack([base[0], q[1], 2 * q[2] - base[2]]))
    assert torch.equal(out[0], base[0]) and torch.equal(out[1], q[1])
