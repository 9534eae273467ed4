"""Every argument that the trainer inherits has its effect, or is refused by name."""

import dataclasses
import json

import pytest
import torch
from accelerate import FullyShardedDataParallelPlugin
from transformers import TrainingArguments

from qadapter import QAdapterConfig
from qadapter.training import arguments
from tests.training.tiny_trainer import trainer

INHERITED = {field.name for field in dataclasses.fields(TrainingArguments)}


def test_every_inherited_argument_was_looked_at():
    """A field that a release of transformers adds is named here until somebody sees what it does:
    into FOLLOWED if it has its effect with this trainer, else into REFUSED with the reason."""
    assert INHERITED - arguments.FOLLOWED - set(arguments.REFUSED) == set()
    assert set(arguments.REFUSED) & arguments.FOLLOWED == set()


VALUES = {
    "label_smoothing_factor": 0.1,
    "neftune_noise_alpha": 5.0,
    "use_liger_kernel": True,
    "liger_kernel_config": {"rope": True},
    "optim_target_modules": ["q_proj"],
    "bf16_full_eval": True,
    "fp16_full_eval": True,
    "include_for_metrics": ["loss"],
    "label_names": ["labels"],
    "remove_unused_columns": True,
    "parallelism_config": object(),
}


@pytest.mark.parametrize("name", sorted(set(arguments.REFUSED) & INHERITED))
def test_refused_by_name(tmp_path, monkeypatch, name):
    # Some are looked at by transformers first, which this is not about.
    monkeypatch.setattr(TrainingArguments, "__post_init__", lambda self: None)
    monkeypatch.setattr("qadapter.training.config.QAdapterConfig.__post_init__", arguments_alone)
    QAdapterConfig(output_dir=str(tmp_path))
    with pytest.raises(ValueError, match=f"^{name}: not supported"):
        QAdapterConfig(output_dir=str(tmp_path), **{name: VALUES[name]})


def arguments_alone(self):
    from transformers.trainer_pt_utils import AcceleratorConfig

    self.accelerator_config = AcceleratorConfig()
    self.deepspeed_plugin = None
    arguments.check(self)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"label_smoothing_factor": 0.4}, "label_smoothing_factor"),
        ({"neftune_noise_alpha": 5.0}, "neftune_noise_alpha"),
        ({"accelerator_config": {"dispatch_batches": True}}, "dispatch_batches"),
        ({"push_to_hub": True, "hub_token": "x"}, "hub_strategy: expected 'end'"),
        ({"base_cache_dir": "there"}, "base_cache_dir: has no effect without precompute_base"),
        ({"base_hidden_mib": 1.0}, "base_hidden_mib: has no effect without precompute_base"),
    ],
)
def test_refused_before_anything_is_loaded(tmp_path, given, message):
    with pytest.raises(ValueError, match=message):
        QAdapterConfig(output_dir=str(tmp_path), use_cpu=True, **given)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"fsdp_version": 1}, "fsdp: version 1 is not supported: .* take version 2"),
        ({"activation_checkpointing": True}, "take gradient_checkpointing=True"),
    ],
)
def test_what_fsdp_cannot_do_here(given, message):
    plugin = FullyShardedDataParallelPlugin(**{"fsdp_version": 2, **given})
    with pytest.raises(ValueError, match=message):
        arguments.check_fsdp(plugin)
    arguments.check_fsdp(FullyShardedDataParallelPlugin(fsdp_version=2))


def test_off_is_not_refused(tmp_path):
    off = {"label_smoothing_factor": 0.0, "neftune_noise_alpha": None, "label_names": None}
    QAdapterConfig(output_dir=str(tmp_path), use_cpu=True, use_liger_kernel=False, **off)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"compute_loss_func": lambda *_: 0.0}, "compute_loss_func: not supported"),
        ({"model_init": lambda: None}, "model_init: not supported"),
    ],
)
def test_refused_of_the_trainer(tmp_path, tiny_tokenizer, given, message):
    from qadapter import QAdapterTrainer
    from tests.tiny_models import make_model

    config = QAdapterConfig(output_dir=str(tmp_path), use_cpu=True, report_to="none")
    with pytest.raises(ValueError, match=message):
        QAdapterTrainer(make_model(), config, processing_class=tiny_tokenizer, **given)


# Those followed by what this trainer does, not by the Trainer alone.


@pytest.mark.parametrize("strategy", ["group_by_length", "batch_rebalance"])
def test_batches_by_length(tmp_path, tiny_tokenizer, strategy):
    run = trainer(tmp_path, tiny_tokenizer, train_sampling_strategy=strategy, rows=12)
    lengths = run.train_dataset["length"]
    for row, length in zip(run.train_dataset, lengths, strict=True):
        ids = (row["prompt_ids"], row["chosen_ids"], row["rejected_ids"])
        assert length == sum(map(len, ids))
    assert len(set(lengths)) > 2
    run.train()
    assert run.state.global_step == 3 and "eval_loss" in run.evaluate()
    if strategy == "group_by_length":
        order = [lengths[i] for i in run._get_train_sampler()]
        batches = [order[i : i + 4] for i in range(0, 12, 4)]
        assert all(batch == sorted(batch, reverse=True) for batch in batches)


def test_tokens_seen_are_those_of_the_pack(tmp_path, tiny_tokenizer):
    """Also where the padding token is one that texts have, as the end token often is."""
    seen = {}
    for kind in ("all", "non_padding"):
        run = trainer(
            tmp_path / kind, tiny_tokenizer, include_num_input_tokens_seen=kind, max_steps=2
        )
        before = run.processing_class.pad_token
        run.processing_class.pad_token = run.processing_class.eos_token
        try:
            run.train()
        finally:
            run.processing_class.pad_token = before
        seen[kind] = run.state.num_input_tokens_seen
    assert seen["all"] == seen["non_padding"] > 0


def test_resuming_by_the_argument(tmp_path, tiny_tokenizer):
    common = {"save_strategy": "steps", "save_steps": 2}
    trainer(tmp_path, tiny_tokenizer, max_steps=2, **common).train()
    run = trainer(tmp_path, tiny_tokenizer, max_steps=3, resume_from_checkpoint="True", **common)
    run.train()
    assert [log["step"] for log in run.state.log_history if "loss" in log] == [1, 2, 3]
    # Steps 1 and 2 come from the checkpoint's history, not from a training of its own.
    assert run.callback_handler.train_dataloader is not None
    folder = str(tmp_path / "out" / "checkpoint-2")
    again = trainer(tmp_path, tiny_tokenizer, max_steps=3, resume_from_checkpoint=folder, **common)
    again.train()
    for (name, a), (_, b) in zip(
        run.model.named_parameters(), again.model.named_parameters(), strict=True
    ):
        assert torch.equal(a, b), name


def test_totals_of_all_processes(tmp_path, tiny_tokenizer, monkeypatch):
    """Each divides by the totals of all; gradients are averaged, so its loss counts twice."""
    run = trainer(tmp_path, tiny_tokenizer)
    theirs = torch.tensor([2, 100, 7])
    monkeypatch.setattr(type(run.accelerator), "num_processes", property(lambda _: 2))
    monkeypatch.setattr(run.accelerator, "reduce", lambda totals, reduction: totals + theirs)
    one = run.data_collator([run.train_dataset[i] for i in range(4)])
    actions = int((one["actions"] != -100).sum())
    batches, _ = run.get_batch_samples(iter([dict(one)]), 1, torch.device("cpu"))
    assert batches[0]["denominators"].tolist() == [4 + 2, actions + 100]
    run.args.average_tokens_across_devices = False
    batches, _ = run.get_batch_samples(iter([dict(one)]), 1, torch.device("cpu"))
    assert batches[0]["denominators"].tolist() == [4, actions]


def test_arguments_without_json_are_written_as_text(tmp_path, tiny_tokenizer):
    run = trainer(tmp_path, tiny_tokenizer)
    run.args.lr_scheduler_kwargs = {"lr_lambda": len, ("a", 1): [torch.bfloat16, {2}, None, 0.5]}
    run.save_model(str(tmp_path / "saved"))
    written = json.loads((tmp_path / "saved" / "training_args.json").read_text())
    assert written["bt_scale"] == 0.1
    assert written["lr_scheduler_kwargs"] == {
        "lr_lambda": str(len),
        "('a', 1)": ["torch.bfloat16", [2], None, 0.5],
    }


@pytest.mark.slow
def test_torch_compile_is_followed(tmp_path, tiny_tokenizer):
    losses = []
    for given in ({}, {"torch_compile": True, "torch_compile_backend": "aot_eager"}):
        run = trainer(tmp_path / str(len(losses)), tiny_tokenizer, moved=True, **given)
        run.train()
        losses.append([log["loss"] for log in run.state.log_history if "loss" in log])
    assert losses[1] == pytest.approx(losses[0], abs=1e-5)
