"""QAdapterConfig on transformers.TrainingArguments, and the released code's settings."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from transformers import TrainingArguments

from qadapter.ops import checks
from qadapter.text.mixture import STOPPING
from qadapter.training import arguments

RELEASED_PRESET: dict[str, Any] = {
    "alpha_0": 0.01,
    "alpha_tilde": 1.0,
    "center": 0.0,
    "gamma": 1.0,
    "reg_coef": 0.1,
    "bt_scale": 1.0,
    "value_at": "same",
    "length_norm": "response",
}
"""The released research code's settings, with this package's masks and length normalisation."""


@dataclass
class QAdapterConfig(TrainingArguments):
    """transformers.TrainingArguments plus the loss and the data. See `qadapter.functional`.

    ``alpha_0``, ``alpha_tilde``, ``center`` and ``gamma`` belong to the model; None keeps what the
    model has (1 for a new one), a number is written into the model and saved with it.
    """

    learning_rate: float = field(default=1e-3, metadata={"help": "Peak learning rate."})
    remove_unused_columns: bool = field(
        default=False, metadata={"help": "Not supported: the collator reads them."}
    )
    logging_steps: float = field(default=10, metadata={"help": "Log every so many updates."})
    alpha_0: float | None = field(
        default=None, metadata={"help": "Weight of log pi_base in the policy."}
    )
    alpha_tilde: float | None = field(
        default=None, metadata={"help": "Entropy weight (temperature) of the policy."}
    )
    center: float | None = field(
        default=None, metadata={"help": "1: Q = z_q - z_b, a true residual; 0: Q = z_q."}
    )
    gamma: float | None = field(default=None, metadata={"help": "Discount."})
    reg_coef: float = field(default=0.1, metadata={"help": "Weight of the mean squared reward."})
    bt_scale: float = field(default=0.1, metadata={"help": "Inverse temperature of Bradley-Terry."})
    value_at: str = field(
        default="next", metadata={"help": "next: r = Q - gamma V(s'); same: V(s), as released."}
    )
    length_norm: str = field(
        default="none", metadata={"help": "none: sum of r over the response; response: its mean."}
    )
    max_length: int = field(
        default=1024, metadata={"help": "Prompt and response are cut to so many tokens."}
    )
    drop_long_prompts: bool = field(
        default=False,
        metadata={"help": "Drop pairs whose prompt fills max_length (else an error)."},
    )
    packing: bool = field(
        default=True,
        metadata={"help": "One row of real tokens and prompts computed once, where the model can."},
    )
    use_logits: bool = field(
        default=False,
        metadata={"help": "Make the logits of both streams, to cross-check the default."},
    )
    precompute_base: bool = field(
        default=False,
        metadata={
            "help": "Compute what the base contributes once, before training, and keep it on disk: "
            "where alpha_0 == center (the default) steps then run no base pass at all."
        },
    )
    base_cache_dir: str | None = field(
        default=None,
        metadata={"help": "Folder of that cache, default <output_dir>/base-cache; reusable."},
    )
    base_hidden_mib: float = field(
        default=0.0,
        metadata={
            "help": "Where alpha_0 != center: keep the base's hidden states too if they fit in so "
            "many MiB of disk; else a step saves one product of three and still runs the base."
        },
    )
    anchor_coef: float = field(
        default=0.0,
        metadata={
            "help": "Weight of KL(base || policy), nats a token, in the states of anchors: texts "
            "on which the policy shall stay what the base is. With kl_budget, where it begins "
            "and the least that it becomes."
        },
    )
    kl_budget: float | None = field(
        default=None,
        metadata={
            "help": "KL(base || policy) that training may cost, nats a token of held-out anchors: "
            "the weight follows from it, and after training a recommended strength."
        },
    )
    anchor_count: int = field(
        default=256, metadata={"help": "Anchors to make, or to take of anchor_dataset, at most."}
    )
    anchor_tokens: int = field(
        default=96, metadata={"help": "Longest answer of an anchor that the base makes."}
    )
    anchors_per_pair: float = field(
        default=0.5, metadata={"help": "Anchors that a step takes for each of its pairs."}
    )
    dataset_num_proc: int | None = field(
        default=None, metadata={"help": "Processes that tokenise."}
    )
    data_weights: list[float] | None = field(
        default=None,
        metadata={"help": "One for each of several data sets: the share that pairs of it have."},
    )
    data_stopping_strategy: str = field(
        default="all_exhausted",
        metadata={
            "help": "of datasets.interleave_datasets. all_exhausted: until all were taken once, "
            "short ones again; first_exhausted: until one ends."
        },
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        arguments.check(self)
        if not torch.accelerator.is_available():
            # It would only warn that there is nothing to pin for.
            self.dataloader_pin_memory = False
        for name in ("alpha_0", "center", "gamma"):
            if getattr(self, name) is not None:
                setattr(self, name, checks.number(name, getattr(self, name)))
        if self.alpha_tilde is not None:
            self.alpha_tilde = checks.number("alpha_tilde", self.alpha_tilde, above=0.0)
        if isinstance(self.precompute_base, str | Path):
            self.base_cache_dir = str(self.precompute_base)
            self.precompute_base = True
        checks.number("base_hidden_mib", self.base_hidden_mib)
        if self.base_cache_dir and not (self.precompute_base or self.anchored):
            raise ValueError("base_cache_dir: has no effect without precompute_base or anchors")
        if self.base_hidden_mib and not self.precompute_base:
            raise ValueError("base_hidden_mib: has no effect without precompute_base")
        checks.number("reg_coef", self.reg_coef)
        checks.number("bt_scale", self.bt_scale, above=0.0)
        checks.number("anchor_coef", self.anchor_coef)
        if self.anchor_coef < 0:
            raise ValueError(f"anchor_coef: expected 0 or more, got {self.anchor_coef!r}")
        if self.kl_budget is not None:
            checks.number("kl_budget", self.kl_budget, above=0.0)
        checks.number("anchors_per_pair", self.anchors_per_pair, above=0.0)
        for name in ("anchors_per_pair", "anchor_count", "anchor_tokens"):
            changed = getattr(self, name) != self.__dataclass_fields__[name].default
            if changed and not self.anchored:
                raise ValueError(
                    f"{name}: has no effect without anchor_coef above 0 or a kl_budget"
                )
        for name, least in (("anchor_count", 2), ("anchor_tokens", 1)):
            checks.whole(name, getattr(self, name), least)
        for weight in self.data_weights or ():
            checks.number("data_weights", weight, above=0.0)
        checks.choice("data_stopping_strategy", self.data_stopping_strategy, STOPPING)
        if self.data_stopping_strategy != STOPPING[0] and self.data_weights is None:
            raise ValueError("data_stopping_strategy: has no effect without data_weights")
        checks.choice("value_at", self.value_at, ("next", "same"))
        checks.choice("length_norm", self.length_norm, ("response", "none"))
        checks.whole("max_length", self.max_length, 2)

    @property
    def anchored(self) -> bool:
        """Whether the loss has a term for anchors."""
        return self.anchor_coef > 0 or self.kl_budget is not None
