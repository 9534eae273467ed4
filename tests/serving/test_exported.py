"""What `export_adapter` writes, served by vLLM as it comes: answers are those of PEFT."""

import pytest
import torch
from peft import LoraConfig, PeftModel
from transformers import AutoModelForCausalLM

pytest.importorskip("vllm", reason="needs vLLM, in an environment of its own: make serve-test")

from vllm.lora.request import LoRARequest

from qadapter import export_adapter
from tests.serving.engines import NEAR, Request, ask, plain_engine, prompt
from tests.serving.tiny import save_adapter, save_base

REQUESTS = [Request(prompt(length), None, 8) for length in (3, 17, 40)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Of two adapters, whose ranks add up: ``lora``, and ``merged``."""
    folder = tmp_path_factory.mktemp("exported")
    base = save_base(folder / "base", "llama")
    for seed, (name, targets) in enumerate({"one": "all-linear", "two": ["q_proj"]}.items()):
        lora = LoraConfig(r=3 + seed, lora_alpha=6, target_modules=targets)
        save_adapter(folder / name, base, lora, seed=seed)
    weights = {str(folder / "one"): 1.0, str(folder / "two"): -0.5}
    export_adapter(weights, folder / "lora", strength=0.5)
    export_adapter(weights, folder / "merged", strength=0.5, merge=True)
    return folder


@pytest.fixture(scope="module")
def model(folder):
    base = AutoModelForCausalLM.from_pretrained(folder / "base", dtype=torch.float32)
    return PeftModel.from_pretrained(base, folder / "lora").eval()


@torch.no_grad()
def check(model, answers):
    for request, answer in zip(REQUESTS, answers, strict=True):
        ids = torch.tensor([request.prompt])
        made = model.generate(input_ids=ids, max_new_tokens=request.tokens, do_sample=False)
        (got,) = answer.outputs
        assert list(got.token_ids) == made[0, ids.shape[1] :].tolist()
        logp = model(input_ids=made).logits[0].double().log_softmax(-1)
        for at, token in enumerate(got.token_ids, start=ids.shape[1]):
            there = got.logprobs[at - ids.shape[1]][token].logprob
            assert abs(there - float(logp[at - 1, token])) < NEAR


def test_a_plain_lora_beside_the_base(folder, model):
    lora = LoRARequest("exported", 1, str(folder / "lora"))
    with plain_engine(model=str(folder / "base"), enable_lora=True, max_lora_rank=8) as llm:
        check(model, ask(llm, REQUESTS, lora))
        with model.disable_adapter():
            check(model, ask(llm, REQUESTS))


def test_merged_weights(folder, model):
    with plain_engine(model=str(folder / "merged")) as llm:
        check(model, ask(llm, REQUESTS))
