"""What training saves comes back: here, in plain PEFT and into a run that goes on."""

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model

from qadapter import QAdapterModel
from qadapter.model import saving
from tests.tiny_models import make_base
from tests.training.tiny_trainer import trainer

IDS = torch.arange(3, 15)[None]


@pytest.fixture
def folder(tmp_path):
    make_base("llama").save_pretrained(tmp_path / "base")
    return tmp_path


def wrapped(folder, name="default", base=None, **lora):
    base = make_base("llama") if base is None else base
    base.config._name_or_path = str(folder / "base")
    config = LoraConfig(r=4, task_type="CAUSAL_LM", **lora)
    return QAdapterModel(get_peft_model(base, config, adapter_name=name))


def logits(model):
    with torch.no_grad():
        return model(IDS)


SAVED = {
    "lora": {},
    "on the embedding": {"target_modules": ["q_proj", "embed_tokens"]},
    "embedding": {"modules_to_save": ["embed_tokens"]},
    "head": {"modules_to_save": ["lm_head"]},
    "some tokens": {"trainable_token_indices": [4, 9]},
    "biases": {"bias": "lora_only"},
}


@pytest.mark.parametrize("name", ["default", "mine", "layers"])
@pytest.mark.parametrize("kind", SAVED)
def test_trained_saved_loaded(folder, tiny_tokenizer, name, kind):
    model = wrapped(folder, name, **SAVED[kind])
    run = trainer(folder, tiny_tokenizer, model=model, save_strategy="steps", save_steps=2)
    run.train()
    run.save_model()
    want = logits(model)
    assert (want.q_logits - want.base_logits).abs().max() > 1e-3

    here = logits(QAdapterModel.from_pretrained(folder / "out"))
    assert torch.equal(here.q_logits, want.q_logits)
    assert torch.equal(here.base_logits, want.base_logits)

    plain = PeftModel.from_pretrained(make_base("llama"), str(folder / "out"))
    with torch.no_grad():
        # norms and gates by their own kernels there
        got = plain(IDS).logits.flatten(0, 1)
        torch.testing.assert_close(got, want.q_logits, rtol=1e-4, atol=1e-4)

    again = wrapped(folder, name, **SAVED[kind])
    resumed = trainer(folder, tiny_tokenizer, model=again, save_strategy="steps", save_steps=2)
    resumed.train(resume_from_checkpoint=str(folder / "out" / "checkpoint-2"))
    assert resumed.state.global_step == 3
    assert torch.equal(logits(again).q_logits, want.q_logits)


def test_the_best_checkpoint_of_a_named_adapter(folder, tiny_tokenizer):
    best = {"eval_strategy": "steps", "eval_steps": 1, "save_strategy": "steps", "save_steps": 1}
    best |= {"load_best_model_at_end": True, "metric_for_best_model": "eval_rewards/margins"}
    run = trainer(folder, tiny_tokenizer, model=wrapped(folder, "mine"), **best)
    run.train()
    margins = [log["eval_rewards/margins"] for log in run.state.log_history if "eval_loss" in log]
    assert run.evaluate()["eval_rewards/margins"] == pytest.approx(max(margins), abs=1e-6)


def refused(folder, tokenizer, model, message):
    run = trainer(folder, tokenizer, model=model)
    with pytest.raises(ValueError, match=message):
        run.train()
    assert run.state.global_step == 0


def test_a_name_that_cannot_be_saved(folder, tiny_tokenizer):
    refused(folder, tiny_tokenizer, wrapped(folder, "weight"), "named 'weight'")


def test_an_embedding_that_was_enlarged_in_memory(folder, tiny_tokenizer):
    base = make_base("llama")
    base.resize_token_embeddings(101)
    refused(
        folder, tiny_tokenizer, wrapped(folder, base=base), "the base has 101 tokens, .* has 97"
    )
    base = make_base("llama")
    base.resize_token_embeddings(101)
    base.save_pretrained(folder / "base")
    saving.check_comes_back(wrapped(folder, base=base).peft_model)


def test_a_config_without_json(folder, tiny_tokenizer):
    model = wrapped(folder)
    model.peft_model.peft_config["default"].auto_mapping = {"dtype": torch.bfloat16}
    refused(folder, tiny_tokenizer, model, "config cannot be written as JSON")


def test_weights_that_would_be_left_out(folder, monkeypatch):
    model = wrapped(folder)
    find = saving.get_peft_model_state_dict

    def without_one(*args, **kwargs):
        saved = find(*args, **kwargs)
        saved.pop(next(iter(saved)))
        return saved

    monkeypatch.setattr(saving, "get_peft_model_state_dict", without_one)
    with pytest.raises(ValueError, match="1 trained weights would not be saved"):
        saving.check_comes_back(model.peft_model)
