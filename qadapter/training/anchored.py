"""What `QAdapterTrainer` does with anchors: loading, measuring, the coefficient, the strength."""

import itertools
import logging
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from datasets import IterableDataset as Stream
from torch import Tensor
from transformers import TrainerCallback

from qadapter import files
from qadapter.model import sharded
from qadapter.text.anchors import anchor_row, different, has_answer, only_prompt
from qadapter.text.prompts import prompt_row
from qadapter.text.tokenization import eos_token_ids
from qadapter.training import processes, strength
from qadapter.training.anchor_texts import make_anchors
from qadapter.training.anchors import (
    BATCH_TOKENS,
    AnchorControl,
    AnchoredCollator,
    AnchorSet,
    anchor_texts,
    on_device,
)
from qadapter.training.config import QAdapterConfig
from qadapter.training.kept_base import KeptBase
from qadapter.training.preparation import check_anchors

logger = logging.getLogger(__name__)

STATE_NAME = "anchor_state.json"
MEASURED = 2  # held-out anchors whose KL is measured after an update
FEW = 5  # held-out anchors whose interval says little
TEXTS_NAME = "anchors.jsonl"
ANSWERS_NAME = "anchor-answers.jsonl"  # where some anchors were given whole: not all of them


class AnchoredTraining(KeptBase):
    """A base class of `QAdapterTrainer`; see `qadapter.training.anchors`."""

    args: QAdapterConfig
    anchor_dataset: Any
    anchor_control: AnchorControl

    def _set_up_anchors(self, anchor_dataset: Any) -> None:
        """Before transformers' own __init__, which saves nothing yet."""
        if anchor_dataset is not None and not self.args.anchored:
            raise ValueError(
                "anchor_dataset: has no effect without anchor_coef above 0 or a kl_budget"
            )
        if isinstance(anchor_dataset, str | Path | Mapping):
            what = type(anchor_dataset).__name__
            if isinstance(anchor_dataset, Mapping):
                what += " of " + ", ".join(map(str, anchor_dataset))
            raise TypeError(
                f"anchor_dataset: expected rows, as a Dataset or a list of them, got a {what} "
                "(qadapter.text.anchors.load_anchors reads files)"
            )
        self.anchor_dataset = anchor_dataset
        self.anchor_control = AnchorControl(self.args.anchor_coef, self.args.kl_budget)

    # The anchors.

    @cached_property
    def anchors(self) -> AnchorSet:
        """Tokenised, with the base's moments: read, or made when they are first asked for."""
        own, args, tokenizer = self._own, self.args, self.processing_class
        plain = own.selects_hidden_rows and not args.use_logits
        identity = self._base_identity() if plain else {}
        with self.accelerator.main_process_first():
            texts = anchor_texts(
                self._anchor_rows(),
                tokenizer,
                max_length=args.max_length,
                eos_token_ids=eos_token_ids(own, tokenizer),
                base=own.base_fingerprint,
            )
            check_anchors(texts, own.hf_model, tokenizer)
            made = AnchorSet(texts[: args.anchor_count])
            if plain:
                dtype = self._autocast_dtype
                with torch.autocast(own.device.type, dtype, enabled=dtype is not None):
                    made.compute(
                        own,
                        self.data_collator,
                        self._cache_directory(),
                        identity,
                        progress=not args.disable_tqdm,
                    )
            else:
                logger.warning(
                    "anchors: KL is summed over the logits of both streams, exactly and slower: %s",
                    "use_logits" if args.use_logits else type(own.hf_model).__name__,
                )
        return made

    def _anchor_rows(self) -> list[dict[str, Any]]:
        """Given ones; prompts among them, and nothing at all, are for the base to answer."""
        args = self.args
        given = () if self.anchor_dataset is None else self.anchor_dataset
        # One by one: a stream may have no end.
        every = different(anchor_row(one, f"anchor {i}") for i, one in enumerate(given))
        rows = list(itertools.islice(every, args.anchor_count))
        if next(every, None) is not None:
            logger.warning(
                "anchors: the first %d different ones are taken of those given (anchor_count)",
                len(rows),
            )
        prompts = [row for row in rows if not has_answer(row)]
        if rows and not prompts:
            return rows
        asked = [prompt_row(only_prompt(row), f"anchor {i}").asked for i, row in enumerate(prompts)]
        name = TEXTS_NAME if len(prompts) == len(rows) else ANSWERS_NAME
        made = make_anchors(
            self._own,
            self.processing_class,
            len(asked) or args.anchor_count,
            max_new_tokens=args.anchor_tokens,
            path=Path(str(args.output_dir)) / name,
            prompts=asked or None,
            progress=not args.disable_tqdm,
        )
        return [*(row for row in rows if has_answer(row)), *made]

    def _with_anchors(self, pairs: Any) -> Any:
        """Every pair with the anchors that go with it: the same ones whatever order pairs come in,
        and when training is resumed."""
        chosen, share = self.anchors, self.args.anchors_per_pair
        if isinstance(pairs, Stream):
            return pairs.map(
                lambda row, index: {**row, "anchors": chosen.of_pair(index, share)},
                with_indices=True,
            )
        assert isinstance(pairs, Dataset)
        column = [chosen.of_pair(index, share) for index in range(len(pairs))]
        return pairs.add_column("anchors", column)

    # Measuring.

    @torch.no_grad()
    def anchor_kl(self, numbers: Sequence[int] | None = None) -> tuple[Tensor, Tensor]:
        """KL(base || policy) of anchors, by default those held out of training: float64 [n], summed
        over the states of each, and int64 [n], how many these are."""
        own, chosen = self._own, self.anchors
        numbers = chosen.held_out if numbers is None else numbers
        sums, states = [], [chosen.anchors[number].states for number in numbers]
        was_training = own.training
        own.eval()
        try:
            for part in self._batches(numbers):
                batch = AnchoredCollator(self.data_collator, chosen).with_anchors([], part)
                batch = on_device(_without_pairs(batch), own.device)
                with self.compute_loss_context_manager():
                    kl = own(**batch, use_logits=self.args.use_logits).anchor_kl
                counts = [chosen.anchors[number].states for number in part]
                sums += [piece.double().sum() for piece in kl.split(counts)]
        finally:
            own.train(was_training)
        return torch.stack(sums).cpu(), torch.tensor(states)

    def _batches(self, numbers: Sequence[int]) -> Iterator[list[int]]:
        part: list[int] = []
        for number in numbers:
            longest = max(len(self.anchors.anchors[n].ids) for n in (*part, number))
            if part and longest * (len(part) + 1) > BATCH_TOKENS:
                yield part
                part = []
            part = [*part, number]
        if part:
            yield part

    def _after_update(self, step: int) -> None:
        """Measure some of the held-out anchors, and set the coefficient by that."""
        held_out = self.anchors.held_out
        first = (step - 1) * MEASURED
        some = {held_out[i % len(held_out)] for i in range(first, first + MEASURED)}
        sums, states = self.anchor_kl(sorted(some))
        self.anchor_control.measured(float(sums.sum() / states.sum()))

    # After training.

    def _recommend(self) -> None:
        """The strength at which the budget is kept, on the model, to be saved with it."""
        budget = self.args.kl_budget
        if budget is None:
            return
        own, chosen = self._own, self.anchors
        counts = torch.tensor([chosen.anchors[number].states for number in chosen.held_out])
        if len(counts) < FEW:
            logger.warning(
                "kl_budget: measured on %d held-out anchors, which say little; take more of them "
                "(anchor_count)",
                len(counts),
            )
        with sharded.whole_head(own):
            found = strength.within_budget(self._kl_at_strength(), counts, budget)
        found = processes.of_first(found, self.accelerator)
        own.recommended_strength = found.strength
        own.kl_budget = budget
        logger.info("strength %.3g keeps KL %.3g on held-out anchors", found.strength, budget)
        self.log({"anchor/strength": found.strength, "anchor/kl_at_strength": found.kl})

    @torch.no_grad()
    def _kl_at_strength(self) -> Any:
        """A function of the strength: KL of the held-out anchors, float64 [n] sums."""
        own, chosen = self._own, self.anchors
        if not chosen.fields:
            return self._slow_kl_at_strength
        own.eval()
        parts = []
        for part in self._batches(chosen.held_out):
            collate: Any = self.data_collator
            batch = on_device(collate([], [chosen.anchors[n] for n in part]), own.device)
            with self.compute_loss_context_manager():
                q_hidden = own.anchor_hidden(batch)
            of_base = on_device(chosen.batch(part), own.device)
            counts = [chosen.anchors[number].states for number in part]
            parts.append((q_hidden, of_base, counts))

        def kl(s: float) -> Tensor:
            sums: list[Tensor] = []
            for q_hidden, of_base, counts in parts:
                with torch.no_grad(), self.compute_loss_context_manager():
                    found = own.kl_at_strength(q_hidden, of_base, s)
                sums += [piece.double().sum() for piece in found.split(counts)]
            return torch.stack(sums).cpu()

        return kl

    def _slow_kl_at_strength(self, s: float) -> Tensor:
        own = self._own
        trained = own.alpha_0, own.alpha_tilde, own.center
        own.alpha_0 = own.alpha_tilde = 1.0 / s
        try:
            return self.anchor_kl()[0]
        finally:
            own.alpha_0, own.alpha_tilde, own.center = trained

    # Files.

    def _save_anchor_state(self, folder: Path) -> None:
        if self.args.anchored:
            files.write_json(folder / STATE_NAME, self.anchor_control.state())

    def _load_engine(self, folder: str) -> None:
        super()._load_engine(folder)
        self._load_anchor_state(folder)

    def _load_anchor_state(self, folder: str | Path) -> None:
        if self.args.anchored and (Path(folder) / STATE_NAME).exists():
            self.anchor_control.load(files.read_json(Path(folder) / STATE_NAME))


class AnchorWatch(TrainerCallback):
    """Measures after every update."""

    def __init__(self, trainer: AnchoredTraining) -> None:
        self.trainer = trainer

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.trainer._after_update(state.global_step)


def _without_pairs(batch: dict[str, Any]) -> dict[str, Any]:
    """The forward's arguments of a batch that has anchors alone: nothing of the base is needed."""
    empty = torch.zeros(0)
    known = {"base_lse": empty, "base_logp": empty}
    if "hidden" in batch["anchors"]:
        known["base_hidden"] = batch["anchors"]["hidden"][:0]
    return {**{k: v for k, v in batch.items() if k != "cu_seqlens"}, **known}
