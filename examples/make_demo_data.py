"""How the demo's pairs were made: prompts and answers by hand, some rejected ones by the model.

The prompts and the one-sentence answers of qadapter/demo_data/{train,heldout}.jsonl were written
for this project. The chosen answer opens with "In short,". The rejected one is the same answer
without that, so that the pairs differ in nothing else; or, for every third training pair and all
held-out ones, what the packaged model itself says (greedy, the first sentences of its first 64
tokens). This writes the rejected answers anew:

    python examples/make_demo_data.py qadapter/demo_data/train.jsonl /tmp/train.jsonl
    python examples/make_demo_data.py qadapter/demo_data/heldout.jsonl /tmp/heldout.jsonl --every 1
"""

from __future__ import annotations

import argparse
import json
import re

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from qadapter import packaged_model
from qadapter.cli.demo_rule import OPENING
from qadapter.model.precision import base_dtype

SENTENCE_END = re.compile(r"(?<!\d)[.!?][\"')\]]*(?=\s|$)")
MIN_WORDS = 20


def first_sentences(text: str) -> str | None:
    """Two sentences, more up to 20 words; None if there are fewer or a line is repeated."""
    ends = [match.end() for match in SENTENCE_END.finditer(text)]
    if len(ends) < 2:
        return None
    end = next((e for e in ends[1:] if len(text[:e].split()) >= MIN_WORDS), ends[-1])
    lines = [line for line in text[:end].split("\n") if line.strip()]
    return text[:end].strip() if len(set(lines)) == len(lines) else None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("source", help="pairs; their prompt and chosen columns are used")
    parser.add_argument("target")
    parser.add_argument("--every", type=int, default=3, help="use the model for every n-th pair")
    parser.add_argument("--batch-size", type=int, default=36)
    args = parser.parse_args()

    folder = packaged_model()
    tokenizer = AutoTokenizer.from_pretrained(folder, padding_side="left")
    dtype = base_dtype("auto", str(folder))
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()
    with open(args.source, encoding="utf-8") as file:
        pairs = [json.loads(line) for line in file]
    for pair in pairs:
        plain = pair["chosen"][0]["content"].removeprefix(OPENING).strip()
        pair["rejected"] = [{"role": "assistant", "content": plain[0].upper() + plain[1:]}]
    by_model = pairs[:: args.every]
    for start in range(0, len(by_model), args.batch_size):
        batch = by_model[start : start + args.batch_size]
        inputs = tokenizer.apply_chat_template(
            [pair["prompt"] for pair in batch],
            add_generation_prompt=True,
            padding=True,
            return_dict=True,
            return_tensors="pt",
        )
        with torch.inference_mode():
            output = model.generate(**inputs, max_new_tokens=64, do_sample=False)
        answers = output[:, inputs["input_ids"].shape[1] :]
        for pair, answer in zip(batch, answers, strict=True):
            text = first_sentences(tokenizer.decode(answer, skip_special_tokens=True))
            if text is not None:
                pair["rejected"][0]["content"] = text
    with open(args.target, "w", encoding="utf-8") as file:
        file.writelines(json.dumps(pair, ensure_ascii=False) + "\n" for pair in pairs)


if __name__ == "__main__":
    main()
