"""What training steps are compared on: a model with LoRA, pairs; the ways; the parts of a step."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoTokenizer

import qadapter
from benchmarks import harness, step_floor
from benchmarks.bases import SHAPES, load_base, lora_config
from benchmarks.peers.training import released, trl_dpo, trl_reason, trl_trainer
from qadapter import QAdapterModel
from qadapter import functional as QF
from qadapter.model import packed_attention
from qadapter.model.checkpoint import resolve_model
from qadapter.outputs import ResidualValues
from qadapter.text.collator import PreferenceCollator
from qadapter.text.data import load_preference_data, prepare_dataset
from qadapter.text.packing import PackedPreferenceCollator
from qadapter.text.tokenization import eos_token_ids, pad_token_id
from qadapter.training import heap

DEMO = str(Path(qadapter.__file__).parent / "demo_data" / "train.jsonl")
WAYS = ("ours", "cached", "released", "TRL DPO")
LORA: dict[str, Any] = {"query and value": None, "all linear": "all-linear"}


@dataclass
class Setup:
    """A model in training mode; ``dpo`` is TRL's trainer, or None where ``missing`` says why."""

    model: QAdapterModel
    tokenizer: Any  # None for a model of random weights
    device: str
    dpo: Any
    missing: dict[str, str]


def load(name: str, device: str, lora: str = "query and value", dtype: str = "auto") -> Setup:
    """``lora``: the layers that have one, a key of `LORA`. ``dtype``: of a pre-trained base."""
    tokenizer = None
    if device == "cpu":
        heap.keep_freed_memory()  # as the trainer does; for the other ways, too
    of_lora = lora_config(LORA[lora])
    if name in SHAPES:
        # An 8B in float32 fills a GPU by itself.
        base = load_base(name, device, torch.float32 if device == "cpu" else torch.bfloat16)
        model = QAdapterModel.from_base(base, lora_config=of_lora)
    else:
        source = resolve_model(name)
        tokenizer = AutoTokenizer.from_pretrained(source)
        model = QAdapterModel.from_pretrained(source, dtype=dtype, lora_config=of_lora).to(device)
    model.train()
    if (reason := packed_attention.enable(model.hf_model)) is not None:
        raise SystemExit(f"{name} cannot be packed: {reason}")
    reason = trl_reason(tokenizer)
    trainer = None if reason else trl_trainer(model.peft_model, tokenizer, device)
    model.train()
    return Setup(model, tokenizer, device, trainer, {"TRL DPO": reason} if reason else {})


def real_pairs(setup: Setup, options: Any) -> list[Any]:
    """The first (or shuffled) pairs of a file, tokenised."""
    data = load_preference_data(options.data)
    data = data if options.shuffle is None else data.shuffle(seed=options.shuffle)
    pairs = data.select(range(options.pairs * options.batches))
    ends = eos_token_ids(setup.model, setup.tokenizer)
    return list(
        prepare_dataset(pairs, setup.tokenizer, max_length=options.max_length, eos_token_ids=ends)
    )


def random_pair(setup: Setup, length: int, prompt: int = 16) -> dict[str, Any]:
    """Two responses of one length: nothing to pad."""
    generator = torch.Generator().manual_seed(length)
    vocab = setup.model.config.get_text_config().vocab_size
    ids = torch.randint(3, vocab, (prompt + 2 * length,), generator=generator).tolist()
    return {
        "prompt_ids": ids[:prompt],
        "chosen_ids": ids[prompt : prompt + length],
        "rejected_ids": ids[prompt + length :],
    }


def our_step(model: QAdapterModel, batch: dict[str, Any]) -> Tensor:
    inputs = {name: value for name, value in batch.items() if name != "cu_seqlens"}
    values = model(**inputs).values
    loss = QF.preference_loss(values, batch["actions"], batch["cu_seqlens"]).loss
    loss.backward()
    return loss.detach()


@dataclass
class Batch:
    """The same pairs as each way wants them."""

    padded: dict[str, Any]
    packed: dict[str, Any]
    ways: dict[str, Callable[[], Any]]

    def sizes(self) -> dict[str, int]:
        return {
            "tokens": int(self.padded["attention_mask"].sum()),
            "padded": self.padded["input_ids"].numel(),
            "packed": self.packed["input_ids"].numel(),
            "response rows": self.padded["rows"].numel(),
        }


def make_batch(setup: Setup, pairs: list[Any], chosen: tuple[str, ...] = WAYS) -> Batch:
    model = setup.model

    def placed(batch: dict[str, Any]) -> dict[str, Any]:
        tensors = {k: v.to(setup.device) for k, v in batch.items() if isinstance(v, Tensor)}
        return {**batch, **tensors}

    pad = pad_token_id(setup.tokenizer) if setup.tokenizer is not None else 0
    padded = placed(PreferenceCollator(pad)(pairs))
    packed = placed(PackedPreferenceCollator()(pairs))
    ways: dict[str, Callable[[], Any]] = {"ours": lambda: our_step(model, packed)}
    if "cached" in chosen:
        statistics = model.base_statistics(packed)
        cached = {**packed, **{k: statistics[k] for k in ("base_lse", "base_logp")}}
        ways["cached"] = lambda: our_step(model, cached)
    if "released" in chosen:
        ways["released"] = released(model, padded)
    if "TRL DPO" in chosen and setup.dpo is not None:
        ways["TRL DPO"] = trl_dpo(setup.dpo, pairs)
    return Batch(padded, packed, {name: ways[name] for name in chosen if name in ways})


PARTS = ("base trunk", "adapter trunk", "head and loss", "trunk backward", "optimiser")


def parts(setup: Setup, batch: Batch, rounds: int) -> dict[str, Any]:
    """Milliseconds of the parts of our step, each measured alone, of the whole, and the rest.

    "head and loss" is forward and backward from hidden states; the optimiser is AdamW on LoRA.
    "products" are the step's bare matrix products, and of the step with a cached base; with "LoRA"
    those of its LoRAs are among them.
    """
    model, packed = setup.model, batch.packed
    names = ("attention_mask", "position_ids", *packed_attention.ARGUMENTS)
    arguments = {name: packed[name] for name in names if packed.get(name) is not None}
    rows, actions, unique = packed["rows"], packed["actions"], packed.get("unique_index")
    of_head = actions
    if unique is not None:
        rows, of_head = rows[packed["unique_rows"]], actions[packed["unique_rows"]]
    head = model.hf_model.get_output_embeddings()
    trained = [p for p in model.parameters() if p.requires_grad]
    optimiser = torch.optim.AdamW(trained, lr=1e-9)
    ids = packed["input_ids"]

    def base() -> Tensor:
        return model._base_hidden(ids, rows, arguments)

    def adapter() -> Tensor:
        return model._stream_hidden(ids, rows, arguments)

    base_hidden, leaf = base(), adapter().detach().requires_grad_()

    def head_and_loss() -> Tensor:
        leaf.grad = None
        values = QF.linear_residual_values(
            base_hidden, leaf, head.weight, of_head, bias=head.bias, **model.composition
        )
        if unique is not None:
            values = ResidualValues(*(value[unique] for value in values))
        loss = QF.preference_loss(values, actions, packed["cu_seqlens"]).loss
        loss.backward()
        return loss.detach()

    graph: list[Tensor] = []
    head_and_loss()
    assert leaf.grad is not None
    gradient = leaf.grad.clone()
    functions: dict[str, Callable[[], Any]] = {
        "base trunk": base,
        "adapter trunk": adapter,
        "head and loss": head_and_loss,
        "trunk backward": lambda: graph.pop().backward(gradient),
        "optimiser": optimiser.step,
    }

    def whole() -> None:
        optimiser.zero_grad(set_to_none=True)
        our_step(model, packed)
        optimiser.step()

    floors = {
        "products": step_floor.products(model, packed, cached=False),
        "products cached": step_floor.products(model, packed, cached=True),
        "products LoRA": step_floor.products(model, packed, cached=False, lora=True),
        "products LoRA cached": step_floor.products(model, packed, cached=True, lora=True),
        "cached": batch.ways["cached"],
    }
    our_step(model, packed)  # the optimiser needs gradients
    times = harness.interleaved(
        {**functions, "step": whole, **floors},
        before={"trunk backward": lambda: graph.append(adapter())},
        device=setup.device,
        rounds=rounds,
        warmup=0,
        least=rounds,
        settle_ms=200.0,
    )
    model.zero_grad(set_to_none=True)
    known = sum(times[name].median for name in PARTS)
    return {**times, "rest": times["step"].median - known}
