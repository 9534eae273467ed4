"""One engine, whatever it is asked: the answers are those of the package's own decoder."""

import pytest
import torch

pytest.importorskip("vllm", reason="needs vLLM, in an environment of its own: make serve-test")

from vllm import SamplingParams
from vllm.exceptions import VLLMValidationError

from tests.serving.engines import (
    NEAR,
    Request,
    ask,
    check,
    check_logprobs,
    engine,
    policy,
    prompt,
)
from tests.serving.tiny import save_adapter, save_base

STRENGTHS = (0.0, 0.5, 1.0, 2.0)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("served")


@pytest.fixture(scope="module")
def model(folder):
    return save_adapter(folder / "adapter", save_base(folder / "base", "llama"))


@pytest.fixture(scope="module")
def llm(folder, model):
    with engine(folder / "adapter", block_size=32, enable_prefix_caching=True) as llm:
        yield llm


def test_a_batch_of_strengths_and_lengths(llm, model):
    requests = [
        Request(prompt(length), strength, 6 + i)
        for i, (length, strength) in enumerate(zip((1, 4, 9, 40), STRENGTHS, strict=True))
    ]
    answers = ask(llm, requests)
    check(model, requests, answers)
    again = ask(llm, requests[::-1])  # the same in other rows
    check(model, requests[::-1], again)


def test_a_prefix_is_cached_for_every_strength(llm, model):
    shared = prompt(40, seed=1)
    for i, strength in enumerate((0.0, 2.0, 0.5)):
        requests = [Request(shared + prompt(5, seed=i + j), strength, 8) for j in (2, 3)]
        answers = ask(llm, requests)
        check(model, requests, answers)
        assert i == 0 or all(answer.num_cached_tokens >= 32 for answer in answers)


def test_log_probabilities_of_prompts(llm, model):
    requests = [Request(prompt(n, seed=7), s, 1) for n, s in ((12, 0.0), (30, 0.5), (21, 2.0))]
    for request, answer in zip(requests, ask(llm, requests, prompt_logprobs=0), strict=True):
        logp = policy(model, request.prompt, request.strength)
        for at, token in enumerate(request.prompt[1:], start=1):
            there = answer.prompt_logprobs[at][token].logprob
            assert abs(there - float(logp[at - 1, token])) < NEAR


def test_several_samples_of_a_prompt(llm, model):
    requests = [Request(prompt(7), strength, 6) for strength in STRENGTHS]
    answers = ask(llm, requests, temperature=1.0, seed=3, n=3)
    for request, answer in zip(requests, answers, strict=True):
        assert len({tuple(output.token_ids) for output in answer.outputs}) > 1
        for output in answer.outputs:
            check_logprobs(model, request, output)


def test_a_request_without_a_strength_gets_the_policy_as_trained(llm, model):
    requests = [Request(prompt(8), None, 8), Request(prompt(8), 1.0, 8)]
    answers = ask(llm, requests)
    check(model, requests, answers)
    assert answers[0].outputs[0].token_ids == answers[1].outputs[0].token_ids


@pytest.mark.parametrize(
    "strength",
    [-0.1, float("nan"), float("inf"), 1001.0, "0.5", None, True, [0.5]],
    ids=str,
)
def test_what_is_no_strength_is_refused_and_the_engine_goes_on(llm, model, strength):
    params = SamplingParams(max_tokens=2, detokenize=False, extra_args={"strength": strength})
    with pytest.raises(VLLMValidationError, match="strength: expected a number from 0 "):
        llm.generate([{"prompt_token_ids": prompt(3)}], params, use_tqdm=False)
    requests = [Request(prompt(3), 0.5, 3)]
    check(model, requests, ask(llm, requests))


def test_strength_0_is_the_base_and_1_the_lora(llm, model):
    ids = torch.tensor([prompt(11)])
    length = {"max_new_tokens": 8, "do_sample": False}
    answers = ask(llm, [Request(prompt(11), strength, 8) for strength in (0.0, 1.0)])
    peft = model.peft_model
    with peft.disable_adapter():
        base = peft.generate(input_ids=ids, **length)
    lora = peft.generate(input_ids=ids, **length)
    assert base.tolist() != lora.tolist()
    for answer, expected in zip(answers, (base, lora), strict=True):
        assert list(answer.outputs[0].token_ids) == expected[0, ids.shape[1] :].tolist()
