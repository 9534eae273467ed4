"""Which of transformers' arguments this trainer follows, and why it refuses the others.

Every field of `transformers.TrainingArguments` is in `FOLLOWED` or `REFUSED`, so that no argument
is without effect and without a word.
"""

import dataclasses
from typing import Any

from transformers import TrainingArguments
from transformers.trainer_utils import HubStrategy

FOLLOWED = {
    # What is trained, and for how long.
    *("output_dir", "num_train_epochs", "max_steps", "per_device_train_batch_size"),
    *("gradient_accumulation_steps", "auto_find_batch_size", "average_tokens_across_devices"),
    *("seed", "data_seed", "full_determinism", "ignore_data_skip", "train_sampling_strategy"),
    *("length_column_name", "resume_from_checkpoint", "restore_callback_states_from_checkpoint"),
    # The optimiser.
    *("learning_rate", "lr_scheduler_type", "lr_scheduler_kwargs", "warmup_steps", "optim"),
    *("optim_args", "weight_decay", "adam_beta1", "adam_beta2", "adam_epsilon", "max_grad_norm"),
    # Numbers, memory, time.
    *("bf16", "fp16", "tf32", "use_cpu", "activation_checkpointing", "gradient_checkpointing"),
    *("activation_checkpointing_kwargs", "gradient_checkpointing_kwargs"),
    *("torch_empty_cache_steps", "use_cache", "debug", "skip_memory_metrics"),
    *("torch_compile", "torch_compile_backend", "torch_compile_mode"),
    # Loading batches.
    *("dataloader_drop_last", "dataloader_num_workers", "dataloader_pin_memory"),
    *("dataloader_persistent_workers", "dataloader_prefetch_factor", "dataloader_in_order"),
    "dataloader_multiprocessing_context",
    # Processes; see also `check`.
    *("accelerator_config", "deepspeed", "ddp_find_unused_parameters", "ddp_bucket_cap_mb"),
    *("ddp_broadcast_buffers", "ddp_static_graph", "ddp_backend", "ddp_timeout", "local_rank"),
    # Logging.
    *("logging_strategy", "logging_steps", "logging_first_step", "log_on_each_node", "log_level"),
    *("logging_nan_inf_filter", "include_num_input_tokens_seen", "log_level_replica"),
    *("disable_tqdm", "report_to", "run_name", "project", "trackio_space_id"),
    *("trackio_bucket_id", "trackio_static_space_id"),
    # Evaluation; predictions are `QAdapterTrainer.prediction_step`'s.
    *("eval_strategy", "eval_steps", "eval_delay", "eval_on_start", "per_device_eval_batch_size"),
    *("prediction_loss_only", "eval_do_concat_batches", "eval_use_gather_object"),
    *("eval_accumulation_steps", "batch_eval_metrics"),
    # Checkpoints and the Hub; see also `check`.
    *("save_only_model", "save_strategy", "save_steps", "save_on_each_node", "save_total_limit"),
    *("enable_jit_checkpoint", "load_best_model_at_end", "metric_for_best_model"),
    *("greater_is_better", "push_to_hub", "hub_token", "hub_private_repo", "hub_model_id"),
    *("hub_strategy", "hub_always_push", "hub_revision"),
    # For the script that reads them: no trainer of transformers does.
    *("do_train", "do_eval", "do_predict"),
    *("fsdp", "fsdp_config"),
}

_LIGER = "Liger replaces the logits and the loss of a transformers model, and this loss makes none"

REFUSED = {
    "label_smoothing_factor": "it smooths the labels of a cross-entropy, and this loss has none; "
    "bt_scale sets how sure a preference is taken to be",
    "neftune_noise_alpha": "noise on the embeddings would be noise in the frozen base too, which "
    "both streams share",
    "use_liger_kernel": _LIGER,
    "liger_kernel_config": _LIGER,
    "optim_target_modules": "GaLore and APOLLO project the gradients of full weights, and only the "
    "adapter's small ones are trained",
    "bf16_full_eval": "it would round the weights of the adapter for good; bf16 evaluates in mixed "
    "precision",
    "fp16_full_eval": "it would round the weights of the adapter for good; fp16 evaluates in mixed "
    "precision",
    "include_for_metrics": "a packed batch has no inputs and no losses a pair to hand out",
    "label_names": "batches have actions and no labels",
    "remove_unused_columns": "the collator reads columns that no model takes",
    "parallelism_config": "it shards the model or cuts sequences, and pairs with them",
}


def check(args: TrainingArguments) -> None:
    """ValueError for an argument that would have no effect here, or a wrong one."""
    defaults = {field.name: field for field in dataclasses.fields(type(args))}
    for name, reason in REFUSED.items():
        if name not in defaults:
            continue  # of another version of transformers
        field, value = defaults[name], getattr(args, name)
        factory = field.default_factory
        default = field.default if factory is dataclasses.MISSING else factory()
        # 0 and False are how to switch off what is off with None, too.
        if value != default and value not in (None, 0, "", []):
            raise ValueError(f"{name}: not supported, got {value!r}: {reason}")
    loading: Any = args.accelerator_config
    if loading.dispatch_batches:
        raise ValueError(
            "accelerator_config: dispatch_batches=True is not supported: it cuts batches along "
            "their first dimension, and pairs with them"
        )
    loading.dispatch_batches = False  # with None, accelerate would do it with streams
    if args.push_to_hub and args.hub_strategy != HubStrategy.END:
        strategy = HubStrategy(args.hub_strategy).value
        raise ValueError(
            f"hub_strategy: expected 'end' with push_to_hub, got {strategy!r}: what "
            "is pushed during training would lack qadapter_config.json, and could not be loaded"
        )


def check_fsdp(plugin: Any) -> None:
    """ValueError for settings of FSDP (accelerate's plugin) that cannot be followed."""
    if plugin.fsdp_version != 2:
        raise ValueError(
            "fsdp: version 1 is not supported: it flattens the parameters of a layer into one, "
            "frozen and trained ones alike; take version 2 (fsdp_version: 2)"
        )
    if plugin.activation_checkpointing:
        raise ValueError(
            "fsdp: activation_checkpointing is not supported: its wrappers rename the layers that "
            "the adapter is saved by; take gradient_checkpointing=True of the training arguments"
        )


def as_json(value: Any) -> Any:
    """What JSON has no notation for (a function, a dtype, a path) as text: it is for reading, and
    training goes on from the arguments it is given."""
    if isinstance(value, dict):
        return {str(key): as_json(item) for key, item in value.items()}
    if isinstance(value, list | tuple | set):
        return [as_json(item) for item in value]
    return value if isinstance(value, str | int | float | None) else str(value)


def check_callables(given: dict[str, Any]) -> None:
    """ValueError for an argument of transformers.Trainer that this one has no use for."""
    reasons = {
        "compute_loss_func": "the loss is Q-Adapter's; override compute_loss for another",
        "model_init": "give the model itself, or a function that makes it to your own loop",
    }
    for name, reason in reasons.items():
        if given.get(name) is not None:
            raise ValueError(f"{name}: not supported: {reason}")
