"""One training, whatever the method: a LoRA from the same start, and what it cost.

The optimiser is transformers' Trainer's with the same arguments everywhere. Q-Adapter is
`QAdapterTrainer`; SFT and Replay take its batches of hidden states and lower the negative
log-likelihood per token; DPO and IPO are TRL's `DPOTrainer`, "dpo_own" DPO's loss by
`QAdapterTrainer`.
"""

import itertools
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from typing import Any

import torch
from peft import LoraConfig, get_peft_model_state_dict
from transformers import PrinterCallback, TrainerCallback, set_seed

from benchmarks import harness
from benchmarks.quality.data import Row, dataset
from benchmarks.quality.settings import TRL, Settings
from qadapter import QAdapterConfig, QAdapterModel, QAdapterTrainer
from qadapter.model.wrapping import load_base
from qadapter.text.collator import collate_sequences
from qadapter.text.tokenization import pad_token_id

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
LOSS = ("gamma", "reg_coef", "bt_scale", "value_at", "length_norm")
CHOSEN = ("prompt_ids", "chosen_ids", "chosen_truncated")
Weights = dict[str, torch.Tensor]


def lora_config(settings: Settings) -> LoraConfig:
    targets = str(settings["lora_targets"])
    return LoraConfig(
        r=settings["lora_r"],
        lora_alpha=2 * settings["lora_r"],
        target_modules=targets if targets == "all-linear" else targets.split("+"),
        task_type="CAUSAL_LM",
    )


def composition(settings: Settings) -> dict[str, float]:
    """alpha_0, alpha_tilde and center of the trained policy; the LoRA alone where a method has no
    such settings."""
    usual = {"alpha_0": settings.get("alpha", 1.0), "alpha_tilde": settings.get("alpha", 1.0)}
    return {n: float(settings.get(n, v)) for n, v in {**usual, "center": 1.0}.items()}


def new_model(base: str, settings: Settings, **values: float) -> QAdapterModel:
    """The base with a LoRA whose start depends on the seed alone."""
    loaded = load_base(base, "auto", {}).to(DEVICE)
    set_seed(settings["seed"])
    return QAdapterModel.from_base(loaded, lora_config=lora_config(settings), **values)


def train(
    method: str,
    settings: Settings,
    base: str,
    tokenizer: Any,
    rows: list[Row],
    checkpoints: list[int],
    replay: list[Row],
    on_step: Callable[[int], None] = lambda step: None,
    base_cache: str | None = None,
) -> tuple[dict[int, Weights], dict[str, Any]]:
    """The LoRA's weights by step, and what it cost, with what the trainer logged.

    ``rows`` are pairs (as text); ``replay`` prompts with the base's answers, tokenised.
    ``base_cache``: where Q-Adapter and DPO by its step keep and find what the base contributes.
    """
    watch = _Watch({*checkpoints, settings["steps"]}, on_step)
    common = {"train_dataset": dataset(rows), "processing_class": tokenizer, "callbacks": [watch]}
    with tempfile.TemporaryDirectory() as folder:
        if method in TRL:
            trainer = _trl(method, settings, base, folder, common)
        else:
            trainer = _own(method, settings, base, folder, common, replay, base_cache)
        trainer.remove_callback(PrinterCallback)
        started = time.perf_counter()
        with harness.peak_memory(DEVICE) as peak:
            trainer.train()
        seconds = time.perf_counter() - started
    # The first step also warms up.
    steps = watch.seconds[1:] or watch.seconds
    return watch.weights, {
        "seconds": seconds,
        "seconds_per_pair": statistics.median(steps) / settings["batch"],
        "peak_mib": peak.mebibytes,
        "threads": torch.get_num_threads(),
        "log": [
            {k: v for k, v in line.items() if isinstance(v, int | float)}
            for line in trainer.state.log_history
            if "loss" in line
        ],
    }


class _Watch(TrainerCallback):
    """Times the updates and keeps the LoRA of some."""

    def __init__(self, wanted: set[int], on_step: Callable[[int], None]) -> None:
        self.wanted, self.on_step = wanted, on_step
        self.weights: dict[int, Weights] = {}
        self.seconds: list[float] = []
        self.last = 0.0

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.last = time.perf_counter()

    def on_step_end(
        self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any
    ) -> None:
        # From end to end, so that loading a batch counts.
        self.seconds.append(time.perf_counter() - self.last)
        if state.global_step in self.wanted:
            weights = get_peft_model_state_dict(getattr(model, "peft_model", model))
            self.weights[state.global_step] = {
                name: value.detach().clone().cpu() for name, value in weights.items()
            }
        self.on_step(state.global_step)
        self.last = time.perf_counter()


def _arguments(settings: Settings, folder: str) -> dict[str, Any]:
    batch, micro = settings["batch"], settings["micro_batch"]
    if batch % micro:
        raise ValueError(f"micro_batch: expected a divisor of batch {batch}, got {micro}")
    return {
        **{n: settings[n] for n in ("learning_rate", "warmup_steps", "max_length", "seed")},
        "output_dir": folder,
        "max_steps": settings["steps"],
        "per_device_train_batch_size": micro,
        "gradient_accumulation_steps": batch // micro,
        "lr_scheduler_type": "linear",
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "bf16": False,  # the base's own dtype, in every method
    }


def _own(
    method: str,
    settings: Settings,
    base: str,
    folder: str,
    common: dict[str, Any],
    replay: list[Row],
    base_cache: str | None,
) -> QAdapterTrainer:
    model = new_model(base, settings, **composition(settings))
    arguments = {**_arguments(settings, folder), "drop_long_prompts": True}
    if method in ("sft", "replay"):
        return _SftTrainer(replay, model=model, args=QAdapterConfig(**arguments), **common)
    if method == "dpo_own":
        loss = {"reg_coef": 0.0, "bt_scale": settings["beta"], "length_norm": "none"}
    else:
        loss = {name: settings[name] for name in LOSS}
    if base_cache is not None and model.alpha_0 == model.center:
        arguments |= {"precompute_base": True, "base_cache_dir": base_cache}
    return QAdapterTrainer(model=model, args=QAdapterConfig(**arguments, **loss), **common)


class _SftTrainer(QAdapterTrainer):
    """The negative log-likelihood of the chosen responses (and of replayed ones) per token."""

    def __init__(self, replay: list[Row], **kwargs: Any) -> None:
        pad, in_turns = pad_token_id(kwargs["processing_class"]), itertools.cycle(replay)

        def collate(features: list[Row]) -> dict[str, torch.Tensor]:
            rows = [*features, *itertools.islice(in_turns, len(features))]
            return collate_sequences([tuple(row[name] for name in CHOSEN) for row in rows], pad)

        super().__init__(data_collator=collate, **kwargs)

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        names = ("input_ids", "attention_mask", "rows", "actions")
        # The policy at center = alpha_0 is the LoRA alone: given the base's figures, which do
        # not enter its log-likelihood, no base pass runs.
        unused = torch.zeros(inputs["actions"].shape[0], device=inputs["actions"].device)
        values, _ = model(**{n: inputs[n] for n in names}, base_lse=unused, base_logp=unused)
        loss = -values.policy_logp.sum() / inputs["denominators"][1]
        return (loss, values) if return_outputs else loss


def _trl(method: str, settings: Settings, base: str, folder: str, common: dict[str, Any]) -> Any:
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    from trl import DPOConfig, DPOTrainer

    # Padded and with logits of every token, 4 pairs of 512 tokens took 17 GB. The same gradient.
    micro = min(settings["micro_batch"], 2 if settings["batch"] % 2 == 0 else 1)
    args = DPOConfig(
        **_arguments({**settings, "micro_batch": micro}, folder),
        gradient_checkpointing=False,  # on by default there
        beta=settings["beta"],
        loss_type=[{"dpo": "sigmoid", "ipo": "ipo"}[method]],
    )
    # TRL seeds just before it makes the LoRA.
    model, lora = load_base(base, "auto", {}), lora_config(settings)
    return DPOTrainer(model=model, args=args, peft_config=lora, **common)
