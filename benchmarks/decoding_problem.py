"""What ways to decode are compared on: a model, adapters with weights, prompts; and the ways."""

import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from peft import get_peft_model
from torch import Tensor
from transformers import AutoTokenizer, DynamicCache, LogitsProcessorList, StoppingCriteria

import qadapter
from benchmarks import harness
from benchmarks.bases import SHAPES, lora_config, sharing_copy
from benchmarks.peers.llama_cpp import LlamaCpp
from benchmarks.peers.sampling import warpers
from qadapter import QAdapterModel
from qadapter.model.checkpoint import resolve_model
from qadapter.text.data import load_preference_data
from qadapter.text.prompts import encode_prompts

MODES: dict[str, dict[str, Any]] = {
    "greedy": {},
    "sampled": {"temperature": 0.8, "top_k": 50, "top_p": 0.9},
}
OURS = ("two streams", "one stream", "two adapters")
LLAMA_CPP = "llama.cpp"  # decodes one row, of the packaged model
WAYS = ("base", "lora", "naive", *OURS)
STRENGTH = 0.5
QUESTIONS = 4  # in a prompt, for about 64 tokens


class Clock(StoppingCriteria):
    """Stops nothing, and notes when each token was there."""

    def __init__(self, rows: int, device: torch.device) -> None:
        self.never = torch.zeros(rows, dtype=torch.bool, device=device)
        self.times: list[float] = []

    def __call__(self, input_ids: Tensor, scores: Any, **_: Any) -> Tensor:  # type: ignore[override]
        harness.synchronize(self.never.device.type)  # generate's own loop waits here, too
        self.times.append(time.perf_counter())
        return self.never


Way = Callable[[int, Clock], Tensor]  # how many new tokens -> all tokens


def random_lora(peft_model: Any, seed: int) -> None:
    """Of a size that changes the text: about 0.6 of the input's in each output."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in peft_model.named_parameters():
        if ".lora_" in name:
            scale = parameter.shape[1] ** -0.5 if ".lora_A." in name else 0.1
            values = torch.randn(parameter.shape, generator=generator)
            parameter.data.copy_(scale * values)


def prompts(model: Any, name: str, batch: int) -> tuple[Tensor, Tensor]:
    """Left-padded input_ids and attention_mask of about 64 tokens a row: the demo's held-out
    questions in the chat template, or, where there is no tokenizer, random tokens."""
    if name in SHAPES:
        generator = torch.Generator().manual_seed(0)
        lengths = torch.randint(57, 65, (batch,), generator=generator)
        ids = torch.randint(5, SHAPES[name]["vocab_size"], (batch, 64), generator=generator)
        mask = (torch.arange(64) >= 64 - lengths[:, None]).long()
        width = int(lengths.max())
        return (ids * mask)[:, -width:].to(model.device), mask[:, -width:].to(model.device)
    demo = Path(qadapter.__file__).parent / "demo_data" / "heldout.jsonl"
    messages = load_preference_data(str(demo))["prompt"]
    questions = [message[-1]["content"] for message in messages]
    texts = [
        " ".join(questions[(i + k) % len(questions)] for k in range(QUESTIONS))
        for i in range(batch)
    ]
    tokenizer = AutoTokenizer.from_pretrained(resolve_model(name))
    encoded = encode_prompts(tokenizer, texts, None, True, model.device)
    return encoded["input_ids"], encoded["attention_mask"]


@torch.no_grad()
def naive(
    peft_model: Any,
    input_ids: Tensor,
    mask: Tensor,
    new: int,
    chain: LogitsProcessorList | None,
    clock: Clock,
) -> Tensor:
    """Combined-logits decoding at `STRENGTH` as it is written without this package.

    Two forwards per token with PEFT's `disable_adapter()` around one of them, a cache for each, a
    log-softmax of the base, the sum, transformers' processors, softmax, multinomial. int64
    [B, T + new] from left-padded prompts; greedy (argmax) without a ``chain``.
    """
    alpha = 1 / STRENGTH
    q_cache, base_cache = DynamicCache(), DynamicCache()
    step_ids, positions = input_ids, (mask.cumsum(-1) - 1).clamp(min=0)
    for _ in range(new):
        inputs = {"input_ids": step_ids, "attention_mask": mask, "position_ids": positions}
        inputs |= {"use_cache": True, "logits_to_keep": 1}
        z_q = peft_model(**inputs, past_key_values=q_cache).logits[:, -1].float()
        with peft_model.disable_adapter():
            z_b = peft_model(**inputs, past_key_values=base_cache).logits[:, -1].float()
        q_values = z_q - z_b
        scores = (q_values + alpha * torch.log_softmax(z_b, -1)) / alpha
        if chain is None:
            step_ids = scores.argmax(-1, keepdim=True)
        else:
            probs = torch.softmax(chain(input_ids, scores), -1)
            step_ids = torch.multinomial(probs, num_samples=1)
        input_ids = torch.cat([input_ids, step_ids], 1)
        mask = torch.cat([mask, mask.new_ones(len(mask), 1)], 1)
        positions = positions[:, -1:] + 1
        clock(input_ids, None)
    return input_ids


class Competitors:
    """The models of one LoRA (on "all" layers or the "upper" half), and the ways to decode."""

    def __init__(self, base: Any, which: str, cache: str) -> None:
        self.base, self.cache = base, cache
        self.is_packaged = base.name_or_path == str(resolve_model("smollm2"))
        layers = base.config.num_hidden_layers
        self.layers = list(range(layers // 2, layers)) if which == "upper" else None
        self.peft = get_peft_model(sharing_copy(base), lora_config(layers=self.layers)).eval()
        random_lora(self.peft, 0)
        self.ours, self.blend = self._two_streams(0), self._two_streams(0)
        with tempfile.TemporaryDirectory() as folder:
            self._two_streams(1).save_pretrained(folder)
            self.blend.load_adapter(folder, "second")

    def _two_streams(self, seed: int) -> QAdapterModel:
        base, config = sharing_copy(self.base), lora_config(layers=self.layers)
        model = QAdapterModel.from_base(base, lora_config=config)
        random_lora(model.peft_model, seed)
        return model.eval()

    def ways(self, ids: Tensor, mask: Tensor, mode: str) -> dict[str, Way]:
        filters = MODES[mode]
        arguments: dict[str, Any] = {"do_sample": bool(filters), **filters}
        if self.cache == "static":
            arguments["cache_implementation"] = "static"

        def theirs(model: Any) -> Way:
            return lambda new, clock: model.generate(
                input_ids=ids,
                attention_mask=mask,
                max_new_tokens=new,
                stopping_criteria=[clock],
                **arguments,
            )

        def ours(model: QAdapterModel, **blend: Any) -> Way:
            return lambda new, clock: model.generate(
                ids, mask, max_new_tokens=new, stopping_criteria=[clock], **blend, **arguments
            )

        peer: dict[str, Way] = {}
        if len(ids) == 1 and self.is_packaged:
            llama_cpp = LlamaCpp(self.ours, filters)
            peer[LLAMA_CPP] = lambda new, clock: llama_cpp.run(ids, mask, new, clock)
        chain = warpers(**filters) if filters else None
        halves = dict.fromkeys(self.blend.adapter_names, 0.5)
        return {
            "base": theirs(self.base),
            "lora": theirs(self.peft),
            "naive": lambda new, clock: naive(self.peft, ids, mask, new, chain, clock),
            "two streams": ours(self.ours, strength=STRENGTH),
            "one stream": ours(self.ours, strength=1.0),
            "two adapters": ours(self.blend, strength=STRENGTH, adapters=halves),
            **peer,
        }
