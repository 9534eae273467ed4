"""What cannot be served is refused at start, and says why."""

import re
from types import SimpleNamespace

import pytest
from peft import LoraConfig

pytest.importorskip("vllm", reason="needs vLLM, in an environment of its own: make serve-test")

from qadapter.integrations.vllm import engine_arguments
from qadapter.integrations.vllm.models import _Streams, refusal
from tests.serving.engines import refused
from tests.serving.tiny import config, save_adapter, save_base


def settings(**options):
    """Of an engine, as far as they are looked at."""
    parallel = {"pipeline_parallel_size": 1, "use_ubatching": False}
    parallel |= {name: options.pop(name) for name in parallel if name in options}
    return SimpleNamespace(
        model_config=SimpleNamespace(hf_config=options.pop("hf_config", config("llama"))),
        parallel_config=SimpleNamespace(**parallel),
        **{"speculative_config": None, "use_v2_model_runner": False, "lora_config": None} | options,
    )


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"pipeline_parallel_size": 2}, "pipeline parallelism"),
        ({"use_ubatching": True}, "dual batch overlap"),
        ({"lora_config": object()}, "vLLM's own LoRA"),
        ({"speculative_config": object()}, "speculation with vLLM's V1"),
        ({"hf_config": config("gemma2")}, "final_logit_softcapping"),
        ({"hf_config": config("qwen2", dual_chunk_attention_config={"a": 1})}, "dual_chunk"),
    ],
)
def test_settings_of_an_engine(options, reason):
    assert refusal(settings(**options)).startswith(reason)


def test_settings_that_are_served():
    assert refusal(settings()) is None
    assert refusal(settings(speculative_config=object(), use_v2_model_runner=True)) is None
    assert refusal(settings(hf_config=config("gemma2", final_logit_softcapping=None))) is None


def test_hidden_states_of_several_layers_are_refused():
    with pytest.raises(ValueError, match="EAGLE-3"):
        _Streams.set_aux_hidden_state_layers(object.__new__(_Streams), (1, 2))


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return save_base(tmp_path_factory.mktemp("base"), "llama")


def test_an_engine_that_refuses_says_why(base, tmp_path):
    """Through all of vLLM, whose errors carry the reason."""
    save_adapter(tmp_path / "adapter", base)
    ngram = {"method": "ngram", "num_speculative_tokens": 2, "prompt_lookup_max": 3}
    said = refused(tmp_path / "adapter", speculative_config=ngram)
    assert "QAdapterLlamaForCausalLM: speculation with vLLM's V1" in said


@pytest.mark.parametrize(
    ("lora", "message"),
    [
        ({"target_modules": ["q_proj", "lm_head"]}, "a LoRA on lm_head is not served"),
        ({"target_modules": ["embed_tokens"]}, "a LoRA on model.embed_tokens is not served"),
        ({"target_modules": ["q_proj"], "use_dora": True}, "use_dora=True cannot be served"),
    ],
)
def test_adapters(base, tmp_path, lora, message):
    save_adapter(tmp_path / "adapter", base, LoraConfig(r=2, **lora))
    assert message in refused(tmp_path / "adapter")


def test_another_base_with_the_same_embedding(base, tmp_path):
    from transformers import AutoModelForCausalLM

    save_adapter(tmp_path / "adapter", base)
    other = AutoModelForCausalLM.from_pretrained(base)
    for layer in other.model.layers:
        layer.self_attn.v_proj.weight.data.mul_(1.1)
    other.save_pretrained(tmp_path / "other")
    said = refused(tmp_path / "adapter", served={"base_model": str(tmp_path / "other")})
    assert re.search(r"for another base .*other weights \(body\)", said)


def test_an_architecture_by_name(tmp_path):
    save_adapter(tmp_path / "adapter", save_base(tmp_path / "base", "gpt_neox"))
    with pytest.raises(ValueError, match="GPTNeoXForCausalLM is not served"):
        engine_arguments(tmp_path / "adapter")


def test_every_architecture_has_its_class():
    from qadapter.integrations.vllm import models
    from qadapter.model.serving import ARCHITECTURES, served_architecture

    for name in ARCHITECTURES:
        made = getattr(models, served_architecture(name))
        assert issubclass(made, getattr(models, name)) and made.__mro__[1] is _Streams
    with pytest.raises(ValueError, match="no adapter: start it by"):
        models.QAdapterGemma3ForCausalLM(vllm_config=settings())
