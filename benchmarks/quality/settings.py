"""What is run: the methods, their settings, and the sets."""

import hashlib
import json
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

from qadapter.training.config import RELEASED_PRESET

Settings = dict[str, Any]

TRAINING: Settings = {
    "learning_rate": 2e-3,
    "warmup_steps": 4,
    "batch": 8,
    "micro_batch": 4,
    "max_length": 512,
    "lora_r": 8,
    "lora_targets": "all-linear",
}
"""The same for every method, with the set's pairs and steps."""

Q_ADAPTER: Settings = {
    "alpha": 1.0,  # alpha_0 and alpha_tilde
    "center": 1.0,
    "gamma": 1.0,
    "bt_scale": 0.1,
    "reg_coef": 0.1,
    "length_norm": "none",
    "value_at": "next",
}

ANCHORS: Settings = {
    "kl_budget": 0.02,  # nats a token; 0: no budget, a fixed coefficient
    "anchor_coef": 0.0,  # with a budget, where it begins: 0 is the trainer's usual one
    "anchors_per_pair": 0.5,
    "anchor_count": 256,
    "anchor_tokens": 96,
}
FIXED: Settings = {**ANCHORS, "kl_budget": 0.0, "anchor_coef": 3.0}


class Method(NamedTuple):
    """``settings`` are those that it has beside everybody's."""

    title: str
    colour: str
    settings: Settings


METHODS = {
    "qadapter": Method("Q-Adapter", "tab:red", Q_ADAPTER),
    "released": Method("Q-Adapter, released conventions", "tab:orange", RELEASED_PRESET),
    "anchored": Method("Q-Adapter, KL budget", "darkred", {**Q_ADAPTER, **ANCHORS}),
    "anchored_coef": Method("Q-Adapter, anchors", "tab:pink", {**Q_ADAPTER, **FIXED}),
    "selfaug": Method(
        "Q-Adapter, prompts as anchors (SelfAug)", "tab:brown", {**Q_ADAPTER, "anchor_coef": 3.0}
    ),
    "sft": Method("SFT", "tab:green", {}),
    # "temperature" tells it from the greedy answers that it took before.
    "replay": Method("Replay", "tab:olive", {"replay_tokens": 64, "temperature": 1.0}),
    "dpo": Method("DPO (TRL)", "tab:blue", {"beta": 0.1}),
    "ipo": Method("IPO (TRL)", "tab:purple", {"beta": 0.1}),
    "dpo_own": Method("DPO (this package's step)", "tab:cyan", {"beta": 0.1}),
    "dpo_anchor": Method("DPO, KL budget", "navy", {"beta": 0.1, **ANCHORS}),
    "dpo_nll": Method("DPO + NLL", "teal", {"beta": 0.1, "nll_coef": 1.0}),
    "tdpo": Method("TDPO", "tab:gray", {"beta": 0.1, "tdpo_alpha": 0.5}),
}
TITLES = {"base": "base", **{name: method.title for name, method in METHODS.items()}}
TRL = ("dpo", "ipo")
FIRST = ("qadapter", "released", "sft", "replay")
STEERED = ("qadapter", "anchored", "anchored_coef", "dpo_anchor")  # shown by strength


@dataclass(frozen=True)
class Run:
    """One training: a method, with settings that differ from the usual ones."""

    method: str
    seed: int = 0
    noise: float = 0.0
    changes: tuple[tuple[str, Any], ...] = ()

    @property
    def variant(self) -> str:
        """The method and what was changed, for all seeds and noise alike."""
        return "-".join([self.method, *(f"{name}={value}" for name, value in self.changes)])

    @property
    def is_main(self) -> bool:
        """Of the comparison itself: measured along its way too."""
        # DPO by this package's step gives TRL's losses at a fraction of its time: for more of them.
        return self.method != "dpo_own" and not self.noise and not self.changes

    @property
    def name(self) -> str:
        return f"{self.variant}-noise{self.noise:g}-seed{self.seed}"

    def settings(self, usual: Settings) -> Settings:
        known = {**usual, **METHODS[self.method].settings}
        for name, _ in self.changes:
            if name not in known:
                raise ValueError(
                    f"{name}: {self.method} has no such setting; it has {', '.join(sorted(known))}"
                )
        return {**known, **dict(self.changes), "seed": self.seed, "noise": self.noise}


@dataclass(frozen=True, kw_only=True)
class Set:
    """How much is trained and measured; as it is, the quick one."""

    pairs: int = 108
    steps: int = 18
    seeds: tuple[int, ...] = (0,)
    methods: tuple[tuple[str, ...], ...] = (FIRST,)  # one group after the other, TRL's after all
    noise: tuple[float, ...] = ()
    noisy_methods: tuple[str, ...] = ()
    betas: tuple[float, ...] = ()  # of DPO (`dpo_own`), besides its usual one
    rates: tuple[float, ...] = ()  # learning rates of DPO (`dpo_own`) and SFT, besides everybody's
    heldout: int = 36  # pairs for accuracy
    prompts: int = 36  # answered and judged
    new_tokens: int = 40
    unrelated: int = 24  # conversations for KL
    questions: int = 160  # asked of the base; those that it answers right count
    kept_questions: int = 48  # at most so many
    strengths: tuple[float, ...] = (0.25, 0.5, 0.75, 1.0, 1.5, 2.0)  # scored
    answered_strengths: tuple[float, ...] = (0.5, 2.0)  # of Q-Adapter, also answered
    answered_kls: tuple[float, ...] = ()  # every method is answered where its KL is this, too
    checkpoints: tuple[float, ...] = (0.5,)  # shares of the steps, scored; SFT's are answered too
    precompute: bool = False  # the base cached for every run, which makes times another thing
    training: Settings = field(default_factory=dict)

    @property
    def usual(self) -> Settings:
        return {**TRAINING, "pairs": self.pairs, "steps": self.steps, **self.training}

    def runs(self) -> list[Run]:
        """An early end leaves whole seeds: the comparison first, then what else each seed has.

        TRL's methods, several times slower than all others, end their seed.
        """
        more = ("dpo_own",) if self.betas or self.rates else ()
        first, *rest = self.methods
        groups = [tuple(dict.fromkeys(first + more)), *rest]
        made = [Run(m, seed) for group in groups for seed in self.seeds for m in group]
        other: list[tuple[str, tuple[str, Any]]] = [("dpo_own", ("beta", b)) for b in self.betas]
        other += [(m, ("learning_rate", r)) for r in self.rates for m in ("dpo_own", "sft")]
        for seed in self.seeds:
            made += [Run(method, seed, 0.0, (change,)) for method, change in other]
            made += [Run(m, seed, noise) for noise in self.noise for m in self.noisy_methods]
            made += [Run(method, seed) for method in TRL]
        return made


QUICK = Set(training={"learning_rate": 1e-3, "batch": 6, "micro_batch": 6, "warmup_steps": 3})
FULL = Set(
    pairs=160,
    steps=20,
    seeds=(0, 1, 2),
    noise=(0.1, 0.2, 0.3),
    noisy_methods=("qadapter", "dpo_own"),
    betas=(0.03, 0.3, 1.0),
    rates=(5e-4,),
    heldout=72,
    prompts=64,
    new_tokens=64,
    unrelated=36,
    questions=240,
    kept_questions=96,
    strengths=(0.25, 0.5, 0.75, 1.0, 1.5, 2.0, 3.0),
)
WIDE = replace(
    FULL,
    pairs=320,
    steps=80,  # under an anchor the second time through the pairs still helps: all get it
    methods=(
        ("qadapter", "anchored", "dpo_own", "dpo_anchor"),
        ("anchored_coef", "dpo_nll", "tdpo", "selfaug", "sft", "replay", "released"),
    ),
    noise=(),
    betas=(),
    rates=(),
    heldout=100_000,  # all
    unrelated=360,  # some 300 of HH fit into max_length
    strengths=(0.25, 0.5, 1.0, 2.0, 3.0),
    answered_strengths=(),
    answered_kls=(0.03,),
    checkpoints=(),
    precompute=True,
    training={"max_length": 256},
)
SETS = {"quick": QUICK, "full": FULL, "wide": WIDE}


def changed(chosen: Set, changes: Settings) -> Set:
    """A set with other numbers: its own fields, else settings of the training."""
    own = {k: v for k, v in changes.items() if k in Set.__dataclass_fields__}
    rest = {k: v for k, v in changes.items() if k not in own}
    if unknown := rest.keys() - TRAINING.keys():
        known = ", ".join(sorted({*Set.__dataclass_fields__, *TRAINING} - {"training"}))
        raise ValueError(f"no setting {', '.join(sorted(unknown))}; there are {known}")
    return replace(chosen, **own, training={**chosen.training, **rest})


def digest(content: Any) -> str:
    """Short and the same in every process."""
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:12]
