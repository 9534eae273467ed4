"""How the demo's pairs were made: prompts and chosen answers by hand, rejected ones by the model.

The prompts and the one-sentence answers of qadapter/demo_data/{train,heldout}.jsonl were written
for this project. The rejected answers are what the packaged model itself says (greedy, the first
sentences of its first 64 tokens), so that the pairs differ from the model's own habit in exactly
what is preferred. This script writes the rejected answers anew:

    python examples/make_demo_data.py qadapter/demo_data/train.jsonl /tmp/train.jsonl

Pairs whose rejected answer would follow the rule, or repeats itself, are left out.
"""

from __future__ import annotations

import argparse
import json
import re

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from qadapter import packaged_model
from qadapter.demo_rule import follows

SENTENCE_END = re.compile(r"(?<!\d)[.!?][\"')\]]*(?=\s|$)")
MIN_WORDS = 20


def first_sentences(text: str) -> str | None:
    """At least two sentences and 20 words where the text has them; None if it has only one."""
    ends = [match.end() for match in SENTENCE_END.finditer(text)]
    if len(ends) < 2:
        return None
    for end in ends[1:]:
        if len(text[:end].split()) >= MIN_WORDS:
            break
    return text[:end].strip()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("source", help="pairs; their prompt and chosen columns are used")
    parser.add_argument("target")
    parser.add_argument("--batch-size", type=int, default=36)
    args = parser.parse_args()

    folder = packaged_model()
    tokenizer = AutoTokenizer.from_pretrained(folder, padding_side="left")
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    with open(args.source, encoding="utf-8") as file:
        pairs = [json.loads(line) for line in file]
    kept = 0
    with open(args.target, "w", encoding="utf-8") as file:
        for start in range(0, len(pairs), args.batch_size):
            batch = pairs[start : start + args.batch_size]
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
                lines = [line for line in (text or "").split("\n") if line.strip()]
                if text is None or follows(text) or len(set(lines)) < len(lines):
                    continue
                pair["rejected"] = [{"role": "assistant", "content": text}]
                file.write(json.dumps(pair, ensure_ascii=False) + "\n")
                kept += 1
    print(f"{kept} of {len(pairs)} pairs written to {args.target}")


if __name__ == "__main__":
    main()
