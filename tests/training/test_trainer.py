"""The trainer starts at the base, and accumulation, checkpoints and resuming change no number."""

import json
import math

import pytest
import torch

from qadapter import QAdapterConfig, QAdapterModel, QAdapterTrainer
from qadapter.training.trainer import last_complete_checkpoint
from tests.tiny_models import make_model
from tests.training.tiny_trainer import trainer


def adapter_state(model):
    return {n: p.detach().clone() for n, p in model.named_parameters() if "lora_" in n}


def test_first_step_starts_at_the_base(tmp_path, tiny_tokenizer):
    run = trainer(tmp_path, tiny_tokenizer, max_steps=1)
    run.train()
    first = run.state.log_history[0]
    for name in ("rewards/chosen", "rewards/rejected", "rewards/margins", "kl", "reg_loss"):
        assert first[name] == 0.0, name
    assert first["loss"] == pytest.approx(math.log(2), abs=1e-6)


def test_training_raises_the_margin(tmp_path, tiny_tokenizer):
    run = trainer(tmp_path, tiny_tokenizer, max_steps=20, bt_scale=10.0)
    before = run.evaluate()
    run.train()
    after = run.evaluate()
    assert before["eval_rewards/margins"] == 0.0
    assert after["eval_rewards/margins"] > 0.1
    assert after["eval_rewards/accuracies"] == 1.0
    assert after["eval_loss"] < before["eval_loss"]
    assert after["eval_kl"] > 0.0


def test_only_the_adapter_trains(tmp_path, tiny_tokenizer):
    run = trainer(tmp_path, tiny_tokenizer)
    frozen = {n: p.detach().clone() for n, p in run.model.named_parameters() if "lora_" not in n}
    start = adapter_state(run.model)
    run.train()
    for name, parameter in run.model.named_parameters():
        if name in frozen:
            assert torch.equal(parameter, frozen[name]), name
    assert any(not torch.equal(p, start[n]) for n, p in adapter_state(run.model).items())


@pytest.mark.parametrize("reg_coef", [0.0, 0.5])
def test_accumulation_gives_the_unaccumulated_run(tmp_path, tiny_tokenizer, reg_coef):
    """Responses differ in length, so means of means would not agree."""
    common = {"moved": True, "reg_coef": reg_coef, "optim": "sgd", "lr_scheduler_type": "constant"}
    whole = trainer(tmp_path / "a", tiny_tokenizer, per_device_train_batch_size=6, **common)
    parts = trainer(
        tmp_path / "b",
        tiny_tokenizer,
        per_device_train_batch_size=2,
        gradient_accumulation_steps=3,
        **common,
    )
    whole.train()
    parts.train()
    for name, value in adapter_state(whole.model).items():
        torch.testing.assert_close(adapter_state(parts.model)[name], value, rtol=1e-4, atol=1e-6)
    for a, b in zip(whole.state.log_history[:3], parts.state.log_history[:3], strict=True):
        for key in ("loss", "reg_loss", "loss/bt", "rewards/margins", "grad_norm"):
            assert a[key] == pytest.approx(b[key], rel=1e-3, abs=1e-6), key


def test_gradient_checkpointing_changes_nothing(tmp_path, tiny_tokenizer):
    plain = trainer(tmp_path / "a", tiny_tokenizer, moved=True)
    checkpointed = trainer(tmp_path / "b", tiny_tokenizer, moved=True, gradient_checkpointing=True)
    plain.train()
    checkpointed.train()
    assert checkpointed.model.hf_model.is_gradient_checkpointing
    for name, value in adapter_state(plain.model).items():
        torch.testing.assert_close(adapter_state(checkpointed.model)[name], value)


def test_evaluation_does_not_depend_on_its_batches(tmp_path, tiny_tokenizer):
    """Five pairs in batches of 5, 2 and 1: the same means, the loss among them."""
    whole = trainer(tmp_path, tiny_tokenizer, moved=True, per_device_eval_batch_size=5).evaluate()
    for size in (2, 1):
        run = trainer(tmp_path, tiny_tokenizer, moved=True, per_device_eval_batch_size=size)
        parts = run.evaluate()
        for key in whole:
            if "time" not in key and "second" not in key:
                assert parts[key] == pytest.approx(whole[key], rel=1e-4, abs=1e-5), key


def test_mixed_precision_trains(tmp_path, tiny_tokenizer):
    run = trainer(tmp_path, tiny_tokenizer, bf16=True, max_steps=10, bt_scale=10.0)
    run.train()
    assert run.state.log_history[0]["loss"] == pytest.approx(math.log(2), abs=1e-4)
    assert run.evaluate()["eval_rewards/margins"] > 0.05


def test_resume_equals_the_uninterrupted_run(tmp_path, tiny_tokenizer):
    common = {"max_steps": 6, "save_strategy": "steps", "save_steps": 3}
    whole = trainer(tmp_path / "a", tiny_tokenizer, **common)
    whole.train()
    # The first half alone, under the schedule of the whole run.
    first = trainer(tmp_path / "b", tiny_tokenizer, callbacks=[_StopAt(3)], **common)
    first.train()
    assert first.state.global_step == 3
    second = trainer(tmp_path / "b", tiny_tokenizer, **common)
    second.train(resume_from_checkpoint=True)
    assert second.state.global_step == 6
    for name, value in adapter_state(whole.model).items():
        assert torch.equal(adapter_state(second.model)[name], value), name
    losses = [
        {log["step"]: log["loss"] for log in run.state.log_history if "loss" in log}
        for run in (whole, second)
    ]
    assert losses[0] == losses[1]


def test_checkpoint_is_an_adapter_folder(tmp_path, tiny_tokenizer):
    run = trainer(tmp_path, tiny_tokenizer, save_strategy="steps", save_steps=3)
    run.train()
    folder = last_complete_checkpoint(run.args.output_dir)
    assert folder is not None and folder.name == "checkpoint-3"
    names = {path.name for path in folder.iterdir()}
    assert {"adapter_model.safetensors", "qadapter_config.json", "tokenizer.json"} <= names
    assert "training_args.bin" not in names
    assert json.loads((folder / "training_args.json").read_text())["bt_scale"] == 0.1


def test_an_incomplete_checkpoint_is_not_resumed_from(tmp_path, tiny_tokenizer):
    run = trainer(tmp_path, tiny_tokenizer)
    (tmp_path / "out" / "checkpoint-9").mkdir(parents=True)
    with pytest.raises(ValueError, match="no complete checkpoint"):
        run.train(resume_from_checkpoint=True)


def test_a_failing_save_leaves_no_checkpoint(tmp_path, tiny_tokenizer, monkeypatch):
    run = trainer(tmp_path, tiny_tokenizer, save_strategy="steps", save_steps=1)

    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("peft.PeftModel.save_pretrained", full)
    with pytest.raises(OSError, match="No space left on device"):
        run.train()
    assert list((tmp_path / "out").glob("*")) == []


def test_config_writes_its_composition_into_the_model(tmp_path, tiny_tokenizer):
    run = trainer(tmp_path, tiny_tokenizer, alpha_0=0.01, center=0.0, gamma=0.9)
    assert (run.model.alpha_0, run.model.alpha_tilde, run.model.center) == (0.01, 1.0, 0.0)
    run.save_model(str(tmp_path / "saved"))
    saved = json.loads((tmp_path / "saved" / "qadapter_config.json").read_text())
    assert (saved["alpha_0"], saved["center"], saved["gamma"]) == (0.01, 0.0, 0.9)


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("bt_scale", 0.0, "bt_scale"),
        ("value_at", "here", "'next', 'same'"),
        ("length_norm", "padded", "'response', 'none'"),
        ("max_length", 1, "max_length"),
        ("alpha_tilde", -1.0, "alpha_tilde"),
    ],
)
def test_config_refuses(tmp_path, name, value, message):
    with pytest.raises(ValueError, match=message):
        QAdapterConfig(output_dir=str(tmp_path), **{name: value})


def test_trainer_refuses_plain_arguments(tmp_path):
    from transformers import TrainingArguments

    with pytest.raises(ValueError, match="expected a QAdapterConfig"):
        QAdapterTrainer(make_model(), TrainingArguments(output_dir=str(tmp_path)))
    with pytest.raises(ValueError, match="expected a QAdapterModel"):
        QAdapterTrainer(torch.nn.Linear(2, 2), QAdapterConfig(output_dir=str(tmp_path)))


def test_train_mode_keeps_the_base_free_of_noise():
    model = make_model("gpt2", moved=False)  # GPT-2 has dropout 0.1
    model.train()
    assert isinstance(model, QAdapterModel) and model.training
    out = model(torch.arange(3, 20)[None])
    assert torch.equal(out.base_logits, out.q_logits)


class _StopAt:
    """A callback that ends training after ``step`` updates."""

    def __new__(cls, step):
        from transformers import TrainerCallback

        class Stop(TrainerCallback):
            def on_step_end(self, args, state, control, **kwargs):
                control.should_training_stop = state.global_step >= step

        return Stop()
