"""QAdapterTrainer on transformers.Trainer.

Everything but the loss is the Trainer's: data loading, accumulation, checkpoints, resume, progress
bar, distribution. A step runs both streams over the real tokens of a micro-batch, packed, and goes
from the hidden states of the response rows to the loss without ever making logits. Sums are divided
by the totals of all micro-batches and processes, so that the gradient is that of one batch.
"""

import logging
import re
from collections.abc import Iterator
from inspect import signature
from pathlib import Path
from typing import Any

import torch
from datasets import IterableDataset as Stream
from peft import LoraConfig, PeftModel
from torch import Tensor, nn
from transformers import AutoTokenizer, PreTrainedModel

from qadapter import files
from qadapter import functional as QF
from qadapter.model import saving
from qadapter.model.checkpoint import fingerprint_digest
from qadapter.model.modeling import QAdapterModel
from qadapter.outputs import AnchoredValues
from qadapter.training import arguments, heap, metrics, processes
from qadapter.training.anchored import AnchoredTraining, AnchorWatch
from qadapter.training.anchors import AnchoredCollator
from qadapter.training.base_cache import CachedCollator
from qadapter.training.config import RELEASED_PRESET, QAdapterConfig
from qadapter.training.preparation import (
    as_qadapter_model,
    check_is_one,
    check_training_data,
    collator,
    prepare,
    prepare_training,
)

__all__ = ["RELEASED_PRESET", "QAdapterConfig", "QAdapterTrainer", "last_complete_checkpoint"]

logger = logging.getLogger(__name__)

ANCHOR_KL = "anchor/train_kl"


class QAdapterTrainer(AnchoredTraining):
    """Train the adapter of a `QAdapterModel` on preference pairs.

    Args:
        model: a `QAdapterModel`; or a `peft.PeftModel`, a transformers model, a Hub id or a folder,
            from which one is made.
        args: `QAdapterConfig`; default ``QAdapterConfig("qadapter-output")``.
        train_dataset, eval_dataset: `datasets.Dataset` in TRL's preference format (prompt, chosen,
            rejected; strings or messages; the prompt may be implicit), or already tokenised by
            `qadapter.text.data.prepare_dataset`; or a `datasets.IterableDataset`, tokenised as it
            comes. ``eval_dataset`` may be a dict of them. `evaluate` and `predict` take the same.
            With ``data_weights``, ``train_dataset`` is a list or a dict of them
            (`qadapter.text.mixture.mix`).
        processing_class: the tokenizer; default, the one saved with the model.
        peft_config: LoRA of a new adapter, where ``model`` does not have one.
        anchor_dataset: with ``anchor_coef`` or ``kl_budget``, rows of text on which the policy
            shall stay what the base is (`qadapter.text.anchors.tokenize_anchor`), or prompts, which
            the base answers; default, questions and answers that the base makes.
        **kwargs: as transformers.Trainer takes them, but for a loss of one's own. Predictions,
            which ``compute_metrics`` gets, are the rewards of the chosen and of the rejected
            response, [P, 2]; their labels are 0, the column of the chosen one.

    Logs TRL's names (``rewards/chosen``, ``rewards/rejected``, ``rewards/margins``,
    ``rewards/accuracies``, ``logps/chosen``, ``logps/rejected``) and ``loss/bt``, ``reg_loss``,
    ``q/mean``, ``value/mean`` and ``kl``, KL(base || policy) per response token in nats. With
    anchors: ``anchor/kl``, the same of anchors that are not trained on, a running mean;
    ``anchor/train_kl`` of those in the batch; ``anchor/coef``.
    """

    args: QAdapterConfig
    loss_is_scaled_for_ga = True

    def __init__(
        self,
        model: QAdapterModel | PeftModel | PreTrainedModel | str | Path,
        args: QAdapterConfig | None = None,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        processing_class: Any = None,
        data_collator: Any = None,
        peft_config: LoraConfig | None = None,
        anchor_dataset: Any = None,
        **kwargs: Any,
    ) -> None:
        args = QAdapterConfig(output_dir="qadapter-output") if args is None else args
        if not isinstance(args, QAdapterConfig):
            raise ValueError(f"args: expected a QAdapterConfig, got {type(args).__name__}")
        if args.n_gpu > 1:
            raise ValueError(
                f"torch sees {args.n_gpu} GPUs in one process, which would be nn.DataParallel: it "
                "cuts batches through pairs. Start one process a GPU (torchrun, accelerate launch) "
                "or set CUDA_VISIBLE_DEVICES"
            )
        arguments.check_callables(kwargs)
        model = as_qadapter_model(model, peft_config, args)
        composition = ("alpha_0", "alpha_tilde", "center")
        if any(getattr(args, name) is not None for name in composition):
            asked = [getattr(args, name) for name in composition]
            now = [getattr(model, name) for name in composition]
            model.set_composition(*(n if a is None else a for a, n in zip(asked, now, strict=True)))
        model.gamma = model.gamma if args.gamma is None else args.gamma
        if processing_class is None:
            processing_class = AutoTokenizer.from_pretrained(model.tokenizer_source)

        check_training_data(train_dataset, args)

        if train_dataset is not None:
            train_dataset = prepare_training(train_dataset, model, args, processing_class)
        if eval_dataset is not None:
            eval_dataset = prepare(eval_dataset, "evaluation", model, args, processing_class)
            eval_dataset = processes.countable(eval_dataset, args.world_size)

        if args.precompute_base and (args.use_logits or not model.selects_hidden_rows):
            raise ValueError(
                "precompute_base: expected a model whose logits are one plain head on the last "
                "hidden state, and use_logits=False; got "
                + ("use_logits=True" if args.use_logits else type(model.hf_model).__name__)
            )
        takes = ("anchors",) if data_collator is None else signature(data_collator).parameters
        if args.anchored and "anchors" not in takes:
            raise ValueError(
                "data_collator: with anchors, expected one that takes (features, anchors), as "
                f"PackedPreferenceCollator does, got {type(data_collator).__name__}"
            )
        if data_collator is None:
            data_collator = collator(model, args, processing_class)
        self._sums: dict[str, dict[str, list[Tensor]]] = {"train": {}, "eval": {}}
        self.args = args
        self._set_up_anchors(anchor_dataset)
        super().__init__(
            model=model,
            args=args,
            data_collator=data_collator,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            processing_class=processing_class,
            **kwargs,
        )
        if args.anchored:
            self.add_callback(AnchorWatch(self))
        if self.args.device.type == "cpu":
            self.add_callback(heap.FreedMemory())
        self._refuse_quantised_shards()
        self.model_accepts_loss_kwargs = True  # what transformers before 5.19 reads
        verdicts = {
            "the base": fingerprint_digest(model.base_fingerprint),
            "whether logits are the head's alone": model.selects_hidden_rows,
            "batches": type(data_collator).__name__,
        }
        processes.check_agreement(verdicts, self.accelerator)

    # Data.

    def get_train_dataloader(self) -> Any:
        """The Trainer's, with anchors in its batches, and what is cached of the base."""
        plain, pairs = self.data_collator, self.train_dataset
        if pairs is None:
            return super().get_train_dataloader()
        try:
            if self.args.anchored:
                self.train_dataset = self._with_anchors(pairs)
                self.data_collator = AnchoredCollator(plain, self.anchors)
            if self.args.precompute_base:
                cache = self._precomputed_base(plain)
                self.data_collator = CachedCollator(self.data_collator, cache)
            if isinstance(pairs, Stream) and self.args.world_size > 1:
                self.train_dataset = processes.NumberedStream(self.train_dataset)
                self.data_collator = processes.NumberedCollator(self.data_collator)
            return super().get_train_dataloader()
        finally:
            self.data_collator, self.train_dataset = plain, pairs

    def get_eval_dataloader(self, eval_dataset: Any = None) -> Any:
        if eval_dataset is None or isinstance(eval_dataset, str):
            return super().get_eval_dataloader(eval_dataset)
        # With persistent workers the Trainer keeps loaders, by a name that does not tell a data set
        # that is given here from its own.
        kept = self.__dict__.pop("_eval_dataloaders", {})
        try:
            return super().get_eval_dataloader(self._prepared(eval_dataset, "evaluation"))
        finally:
            self._eval_dataloaders = kept

    def get_test_dataloader(self, test_dataset: Any) -> Any:
        check_is_one(test_dataset, "test_dataset")
        return super().get_test_dataloader(self._prepared(test_dataset, "test"))

    def _prepared(self, dataset: Any, what: str) -> Any:
        made = prepare(dataset, what, self._own, self.args, self.processing_class)
        return processes.countable(made, self.args.world_size)

    def _track_num_input_tokens(self, inputs: dict[str, Any]) -> None:
        if "attention_mask" not in inputs:
            # A pack has no padding; the Trainer would leave out what looks like it, such as an
            # end-of-sequence token that is the padding token, too.
            inputs = {**inputs, "attention_mask": torch.ones_like(inputs["input_ids"])}
        super()._track_num_input_tokens(inputs)

    # The loss.

    def get_batch_samples(
        self, epoch_iterator: Iterator, num_batches: int, device: torch.device
    ) -> tuple[list, Any]:
        """Micro-batches of one update, each told the totals that its sums are divided by."""
        batches, _ = super().get_batch_samples(epoch_iterator, num_batches, device)
        if not batches:
            return batches, None
        batches = [processes.of_stream(batch, self.accelerator) for batch in batches]
        batches[-1] = processes.without_repeats(batches[-1], self.accelerator)
        world = self.args.average_tokens_across_devices
        counts = processes.totals(batches, self.accelerator, device, world)
        there = processes.without_waiting(counts, device)
        for batch in batches:
            batch["denominators"] = there[:2]
            if "anchors" in batch:
                batch["anchors"]["total"] = there[2]
        return batches, int(counts[1])

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Any = None,
    ) -> Any:
        own = self._own
        mode = "train" if model.training else "eval"
        actions, cu_seqlens = inputs["actions"], inputs["cu_seqlens"]
        forward = {k: v for k, v in inputs.items() if k not in ("cu_seqlens", "denominators")}
        kl_rows = metrics.KL_ROWS if mode == "train" else None
        rows = metrics.spread(actions.shape[0], kl_rows, actions.device)
        totals = inputs.get("denominators")
        made = model(**forward, kl_rows=rows, use_logits=self.args.use_logits)
        values, kl = made.values, made.kl
        outputs = QF.preference_loss(
            values,
            actions,
            cu_seqlens,
            gamma=own.gamma,
            reg_coef=self.args.reg_coef,
            bt_scale=self.args.bt_scale,
            value_at=self.args.value_at,
            length_norm=self.args.length_norm,
            denominators=None if totals is None else totals.float(),
        )
        self._record(mode, metrics.batch_sums(inputs, values, outputs, kl))
        if isinstance(made, AnchoredValues):
            outputs = outputs._replace(loss=outputs.loss + self._anchor_loss(made, inputs))
        if totals is not None and self.args.average_tokens_across_devices:
            # Gradients are averaged over processes, whose sums make up what the totals count.
            outputs = outputs._replace(loss=outputs.loss * self.accelerator.num_processes)
        return (outputs.loss, outputs) if return_outputs else outputs.loss

    def _anchor_loss(self, made: AnchoredValues, inputs: dict[str, Any]) -> Tensor:
        kl = made.anchor_kl.sum()
        states = torch.full((), float(made.anchor_kl.numel()), device=kl.device)
        total = inputs["anchors"].get("total", states).float()
        self._record("train", {ANCHOR_KL: (kl, states)})
        return self.anchor_control.coef * kl / total.to(kl.device).clamp(min=1)

    def prediction_step(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        prediction_loss_only: bool,
        ignore_keys: list[str] | None = None,
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        given = (len(inputs["cu_seqlens"]) - 1) // 2
        inputs = processes.without_repeats(self._prepare_inputs(inputs), self.accelerator)
        with torch.no_grad(), self.compute_loss_context_manager():
            loss, outputs = self.compute_loss(model, inputs, return_outputs=True)
        if prediction_loss_only:
            return loss.detach(), None, None
        rewards = torch.stack([outputs.chosen_rewards, outputs.rejected_rewards], 1).detach()
        # Of as many pairs in every process: the Trainer gathers them, and then drops the repeats.
        rewards = nn.functional.pad(rewards, (0, 0, 0, given - len(rewards)))
        return loss.detach(), rewards, rewards.new_zeros(len(rewards), dtype=torch.int64)

    # Metrics: sums stay on the device until they are logged.

    def _record(self, mode: str, sums: dict[str, tuple[Tensor, Tensor]]) -> None:
        for name, (total, count) in sums.items():
            pair = torch.stack([total.detach().double(), count.double()])
            self._sums[mode].setdefault(name, []).append(pair)

    def _drain(self, mode: str) -> dict[str, float]:
        """Means since the last call, over all processes."""
        sums, self._sums[mode] = self._sums[mode], {}
        if not sums:
            return {}
        if mode == "train" and self.args.anchored and ANCHOR_KL not in sums:
            # A process without anchors in these batches takes part in the sum of the others.
            sums[ANCHOR_KL] = [next(iter(sums.values()))[0].new_zeros(2)]
        totals = torch.stack([torch.stack(pairs).sum(0) for pairs in sums.values()])
        totals = self.accelerator.reduce(totals, reduction="sum").cpu()
        means = (totals[:, 0] / totals[:, 1].clamp(min=1)).tolist()
        found = dict(zip(sums, means, strict=True))
        if ANCHOR_KL in found and totals[list(sums).index(ANCHOR_KL), 1] == 0:
            del found[ANCHOR_KL]
        return found

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if "loss" in logs:
            logs = {**logs, **self._drain("train")}
            if self.args.anchored:
                control = self.anchor_control.state()
                logs |= {f"anchor/{name}": v for name, v in control.items() if v is not None}
        super().log(logs, start_time)

    def evaluation_loop(self, *args: Any, **kwargs: Any) -> Any:
        self._sums["eval"] = {}
        output = super().evaluation_loop(*args, **kwargs)
        prefix = kwargs.get("metric_key_prefix", "eval")
        if isinstance(getattr(self.callback_handler.eval_dataloader, "dataset", None), Stream):
            # Of a stream the Trainer counts the rows of its batches, and a pack is one.
            pairs = sum(count for _, count in self._sums["eval"]["rewards/margins"])
            pairs = self.accelerator.reduce(pairs, reduction="sum")
            output = output._replace(num_samples=int(pairs))
        means = self._drain("eval")
        if means:
            # Over all pairs and actions; the Trainer's is a mean over batches.
            means["loss"] = means["loss/bt"] + self.args.reg_coef * means["reg_loss"]
        own = {f"{prefix}_{name}": value for name, value in means.items()}
        return output._replace(metrics={**(output.metrics or {}), **own})

    # Files.

    def train(
        self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any
    ) -> Any:
        saving.check_comes_back(self._own.peft_model)
        if resume_from_checkpoint is None:
            resume_from_checkpoint = self.args.resume_from_checkpoint
        if str(resume_from_checkpoint) == "True":  # on a command line it comes as text
            last = last_complete_checkpoint(str(self.args.output_dir))
            last = processes.of_first(last, self.accelerator)
            if last is None:
                raise ValueError(f"no complete checkpoint to resume from in {self.args.output_dir}")
            resume_from_checkpoint = str(last)
        own = self._own
        own.recommended_strength = own.kl_budget = None  # of another training
        with heap.objects_left_alone():
            output = super().train(resume_from_checkpoint, *args, **kwargs)
        self._recommend()
        return output

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        """Without waiting for another process; ``state_dict`` as `save_pretrained` takes it."""
        if not self.args.should_save:
            return
        target = Path(output_dir or str(self.args.output_dir))
        own: QAdapterModel = self.accelerator.unwrap_model(self.model, keep_torch_compile=False)
        with files.replacing_directory(target) as temporary:
            own.save_pretrained(temporary / "adapter", state_dict=state_dict)
            for item in (temporary / "adapter").iterdir():
                item.rename(temporary / item.name)
            (temporary / "adapter").rmdir()
            if self.processing_class is not None:
                self.processing_class.save_pretrained(str(temporary))
            # JSON, where the Trainer would pickle its arguments.
            content = arguments.as_json(self.args.to_dict())
            content["world_size"] = self.args.world_size
            files.write_json(temporary / "training_args.json", content)
            self._save_anchor_state(temporary)

    def _load_from_checkpoint(self, folder: str, model: nn.Module | None = None) -> None:
        self.accelerator.unwrap_model(model or self.model).load_adapter_weights(folder)
        self._load_anchor_state(folder)

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """Nothing to do: `QAdapterModel.save_pretrained` writes the card, which fits the method."""


def last_complete_checkpoint(output_dir: str | Path) -> Path | None:
    """The newest checkpoint that was written to its end (its trainer state is written last)."""
    steps = {}
    for path in Path(output_dir).glob("checkpoint-*"):
        match = re.fullmatch(r"checkpoint-(\d+)", path.name)
        if match and (path / "trainer_state.json").exists():
            steps[int(match[1])] = path
    return steps[max(steps)] if steps else None
