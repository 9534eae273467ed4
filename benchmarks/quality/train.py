"""One training, whatever the method: a LoRA from the same start, and what it cost.

The optimiser is transformers' Trainer's with the same arguments everywhere. Q-Adapter is
`QAdapterTrainer`; SFT and Replay take its batches of hidden states and lower the negative
log-likelihood per token; DPO and IPO are TRL's `DPOTrainer`, "dpo_own" DPO's loss by
`QAdapterTrainer`, and "dpo_nll" and "tdpo" add their term to that. Anchors are the trainer's own.
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
from qadapter import functional as QF
from qadapter.model.values import base_statistics
from qadapter.model.wrapping import load_base
from qadapter.text.collator import collate_sequences
from qadapter.text.prompts import prompt_text
from qadapter.text.tokenization import pad_token_id

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
LOSS = ("gamma", "reg_coef", "bt_scale", "value_at", "length_norm")
ANCHORS = ("anchor_coef", "anchors_per_pair", "anchor_count", "anchor_tokens")
UNIQUE = ("unique_rows", "unique_index")
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
    said: list[Row],
    on_step: Callable[[int], None] = lambda step: None,
    base_cache: str | None = None,
    precompute: bool = False,
) -> tuple[dict[int, Weights], dict[str, Any]]:
    """The LoRA's weights by step, and what it cost, with what the trainer logged.

    ``rows`` are pairs (as text); ``said`` is the base's: prompts with its answers, tokenised, to
    replay, or the anchors. ``base_cache``: where the package's trainer keeps what the base
    contributes to anchors and, with ``precompute``, to pairs.
    """
    watch = _Watch({*checkpoints, settings["steps"]}, on_step)
    common = {"train_dataset": dataset(rows), "processing_class": tokenizer, "callbacks": [watch]}
    with tempfile.TemporaryDirectory() as folder:
        if method in TRL:
            trainer = _trl(method, settings, base, folder, common)
        else:
            cache = base_cache or folder
            trainer = _own(method, settings, base, folder, common, said, cache, precompute)
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
    said: list[Row],
    base_cache: str,
    precompute: bool,
) -> QAdapterTrainer:
    model = new_model(base, settings, **composition(settings))
    arguments = {**_arguments(settings, folder), "drop_long_prompts": True}
    if method in ("sft", "replay"):
        return _SftTrainer(said, model=model, args=QAdapterConfig(**arguments), **common)
    if "beta" in settings:
        loss = {"reg_coef": 0.0, "bt_scale": settings["beta"], "length_norm": "none"}
    else:
        loss = {name: settings[name] for name in LOSS}
    if "anchor_coef" in settings:
        tokenizer, rows = common["processing_class"], common["train_dataset"]
        if method == "selfaug":
            said = [{"text": prompt_text(tokenizer, row["prompt"])} for row in rows]
            loss["anchor_count"] = len(said)
        loss |= {name: settings[name] for name in ANCHORS if name in settings}
        loss["kl_budget"] = settings.get("kl_budget") or None
        common = {**common, "anchor_dataset": said}
    if precompute and method != "tdpo" and model.alpha_0 == model.center:
        arguments["precompute_base"] = True
    args = QAdapterConfig(**arguments, **loss)
    args.base_cache_dir = base_cache
    kind = {"dpo_nll": _NllTrainer, "tdpo": _TdpoTrainer}.get(method, QAdapterTrainer)
    trainer = kind(model=model, args=args, **common)
    trainer.study = settings
    return trainer


class _NllTrainer(QAdapterTrainer):
    """DPO, and the negative log-likelihood of the chosen responses per token (TRL's "sigmoid" with
    "sft", RPO)."""

    study: Settings

    def get_batch_samples(self, *args: Any) -> tuple[list[Any], Any]:
        batches, count = super().get_batch_samples(*args)
        chosen = sum(int((b["actions"][_chosen_rows(b)] != -100).sum()) for b in batches)
        for batch in batches:
            batch["denominators"] = torch.cat((batch["denominators"], torch.tensor([chosen])))
        return batches, count

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        apart = ("cu_seqlens", "denominators")
        values = model(**{n: v for n, v in inputs.items() if n not in apart}).values
        outputs = QF.preference_loss(
            values,
            inputs["actions"],
            inputs["cu_seqlens"],
            reg_coef=0.0,
            bt_scale=self.study["beta"],
            length_norm="none",
            denominators=inputs["denominators"][:2].float(),
        )
        nll = -values.policy_logp[_chosen_rows(inputs)].sum() / inputs["denominators"][2]
        loss = outputs.loss + self.study["nll_coef"] * nll
        return (loss, values) if return_outputs else loss


def _chosen_rows(batch: dict[str, Any]) -> slice:
    """Those of the chosen responses, which come first."""
    ends = batch["cu_seqlens"]
    return slice(int(ends[(len(ends) - 1) // 2]))


class _TdpoTrainer(QAdapterTrainer):
    """TDPO2 (arXiv 2404.11999): -log sigmoid(margin - alpha beta (SeqKL of the rejected - SeqKL of
    the chosen, without gradient)), with SeqKL the sum of KL(base || policy) over a response's
    states."""

    study: Settings

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        own = self.accelerator.unwrap_model(model)
        ids, rows, actions = (inputs[name] for name in ("input_ids", "rows", "actions"))
        apart = ("input_ids", "rows", "actions", "cu_seqlens", "denominators")
        arguments = {n: v for n, v in inputs.items() if n not in (*apart, *UNIQUE)}
        base_hidden = own._base_hidden(ids, rows, arguments)
        hidden = own._stream_hidden(ids, rows, arguments)
        head = own.hf_model.get_output_embeddings()
        moments = QF.base_moments(base_hidden, head.weight, bias=head.bias)
        known = base_statistics(head, base_hidden, actions)
        values = QF.linear_residual_values(
            None,
            hidden,
            head.weight,
            actions,
            bias=head.bias,
            base_lse=known["base_lse"],
            base_logp=known["base_logp"],
        )
        kl = QF.kl_to_base(values.value, hidden, moments)
        per_row = torch.stack((values.policy_logp - values.base_logp, kl), 1)
        sizes = inputs["cu_seqlens"].diff().tolist()
        taken = (actions != -100)[:, None]
        sums = torch.stack([part.sum(0) for part in (per_row * taken).split(sizes)])
        (chosen, kl_chosen), (rejected, kl_rejected) = (half.unbind(1) for half in sums.chunk(2))
        further = self.study["tdpo_alpha"] * (kl_rejected - kl_chosen.detach())
        margins = self.study["beta"] * (chosen - rejected - further)
        loss = -torch.nn.functional.logsigmoid(margins).sum() / inputs["denominators"][0]
        return (loss, values) if return_outputs else loss


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
