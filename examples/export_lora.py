"""An adapter at a strength of one's choice as a plain LoRA, loaded by PEFT alone.

    python examples/export_lora.py
    python examples/export_lora.py --adapter out --strength 0.5

Without ``--adapter`` a tiny random model gets a random one. What PEFT loads has one stream, and
layers W + s dW. The policy that it stands for blends the logits of two, z_b + s (z_q - z_b). They
are compared on a text, as `qadapter export --check FILE` does it on files.
"""

import argparse
import tempfile
from pathlib import Path

import torch
from _common import DATA, load_base
from peft import PeftModel
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

import qadapter
from qadapter.text.data import load_preference_data


def random_adapter(folder: Path) -> Path:
    """A tiny base with its tokenizer, and an adapter on it that does something."""
    base, tokenizer = load_base("tiny")
    base.save_pretrained(folder / "base")
    tokenizer.save_pretrained(folder / "base")
    model = qadapter.QAdapterModel.from_pretrained(folder / "base")
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.03)
    model.save_pretrained(folder / "adapter")
    return folder / "adapter"


def kl(p: Tensor, q: Tensor) -> float:
    """Mean KL(p || q) of rows of logits, in nats."""
    p, q = p.double().log_softmax(-1), q.double().log_softmax(-1)
    return float((p.exp() * (p - q)).sum(-1).mean())


@torch.no_grad()
def compare(adapter: Path, strength: float, output: Path) -> tuple[float, float]:
    """KL(base || blend) and KL(blend || exported), of what is written to ``output``."""
    qadapter.export_adapter(adapter, output, strength=strength)

    # What a server does: the base, and PEFT's files. Nothing of qadapter is needed any more.
    model = qadapter.QAdapterModel.from_pretrained(adapter, dtype=torch.float32)
    source = model.config._name_or_path
    base = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
    exported = PeftModel.from_pretrained(base, str(output)).eval()

    row = load_preference_data(DATA)[0]
    text = row["prompt"][-1]["content"] + " " + row["chosen"][-1]["content"]
    ids = AutoTokenizer.from_pretrained(source)(text, return_tensors="pt").input_ids
    streams = model(ids)
    blend = streams.base_logits + strength * (streams.q_logits - streams.base_logits)
    return kl(streams.base_logits, blend), kl(blend, exported(input_ids=ids).logits[0])


def main(argv: list[str] | None = None) -> list[tuple[float, float, float]]:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--adapter", type=Path, help="folder of a saved adapter; default, random")
    parser.add_argument("--strength", type=float, nargs="+", default=[0.25, 0.5, 1.0, 2.0])
    args = parser.parse_args(argv)
    made = []
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        adapter = args.adapter or random_adapter(folder)
        for strength in args.strength:
            moved, between = compare(adapter, strength, folder / f"lora-{strength:g}")
            made.append((strength, moved, between))
            print(
                f"strength {strength:g}: KL(base || blend) {moved:.4f}, "
                f"KL(blend || exported) {between:.6f} nats a token"
            )
    return made


if __name__ == "__main__":
    main()
