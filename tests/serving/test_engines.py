"""Engines of several kinds, and what makes requests wait, move and come back in them."""

import pytest
from peft import LoraConfig

pytest.importorskip("vllm", reason="needs vLLM, in an environment of its own: make serve-test")

from tests.serving.engines import Request, ask, check, engine, policy, prompt
from tests.serving.tiny import KINDS, LAYERS, save_adapter, save_base

STRENGTHS = (0.0, 0.5, 1.0, 2.0)


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    """The folder of an adapter, and its model."""
    folder = tmp_path_factory.mktemp("llama")
    model = save_adapter(folder / "adapter", save_base(folder / "base", "llama"))
    return folder / "adapter", model


def of_many_lengths(count: int) -> list[Request]:
    return [
        Request(prompt(1 + (23 * i) % 61, seed=i), STRENGTHS[i % 4], 2 + (7 * i) % 11)
        for i in range(count)
    ]


def runner(llm):
    return llm.llm_engine.model_executor.driver_worker.worker.model_runner


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "llama"])
def test_architectures(tmp_path, kind):
    model = save_adapter(tmp_path / "adapter", save_base(tmp_path / "base", kind))
    requests = [
        Request(prompt(length), strength, 8)
        for length, strength in zip((2, 33, 17, 8), STRENGTHS, strict=True)
    ]
    with engine(tmp_path / "adapter") as llm:
        check(model, requests, ask(llm, requests))


def test_prefill_in_chunks_and_more_requests_than_slots(llama):
    folder, model = llama
    requests = of_many_lengths(16)
    options = {"enable_chunked_prefill": True, "enable_prefix_caching": False}
    with engine(folder, max_num_seqs=3, max_num_batched_tokens=24, **options) as llm:
        check(model, requests, ask(llm, requests))


def test_requests_that_are_preempted_come_back(llama):
    folder, model = llama
    requests = [Request(prompt(24 + i, seed=i), STRENGTHS[i % 4], 24) for i in range(6)]
    blocks = {"block_size": 32, "num_gpu_blocks_override": 8, "max_model_len": 96}
    with engine(folder, **blocks) as llm:
        check(model, requests, ask(llm, requests))
        counted = {metric.name: getattr(metric, "value", 0) for metric in llm.get_metrics()}
    assert counted["vllm:num_preemptions"] > 0


def test_layers_below_the_first_adapted_one_run_and_cache_once(tmp_path):
    lora = LoraConfig(r=4, target_modules=["q_proj", "down_proj"], layers_to_transform=[2])
    model = save_adapter(tmp_path / "adapter", save_base(tmp_path / "base", "llama"), lora)
    requests = of_many_lengths(6)
    rows = []
    with engine(tmp_path / "adapter") as llm:
        assert len(runner(llm).kv_caches) == LAYERS + 1
        for layer in runner(llm).model.model.layers:
            layer.mlp.register_forward_hook(lambda mlp, args, out: rows.append(len(out)))
        check(model, requests, ask(llm, requests))
    below, between, above = rows[-LAYERS:]
    assert above == 2 * below == 2 * between


def test_adapters_blended_with_weights(tmp_path):
    base = save_base(tmp_path / "base", "llama")
    some = LoraConfig(r=2, lora_alpha=4, target_modules=["k_proj", "up_proj"], lora_bias=True)
    ranks = {"rank_pattern": {"o_proj": 3}, "alpha_pattern": {"v_proj": 1}, "use_rslora": True}
    other = LoraConfig(r=5, lora_alpha=3, target_modules="all-linear", **ranks)
    model = save_adapter(tmp_path / "one", base, some)
    save_adapter(tmp_path / "two", base, other, seed=2)
    model.load_adapter(tmp_path / "two", "two")
    own = model.adapter_names[0]
    requests = of_many_lengths(8)
    folders = {"one": tmp_path / "one", "two": tmp_path / "two"}
    with engine(folders, served={"weights": {"two": -0.5}}) as llm:
        check(model, requests, ask(llm, requests), adapters={own: 1.0, "two": -0.5})
        trained = [Request(prompt(9), None, 8)]
        check(model, trained, ask(llm, trained), adapters={own: 1.0, "two": -0.5})


def test_requests_without_a_strength(tmp_path):
    """The recommended one, if there is one, else the policy as trained, whatever its alphas."""
    base = save_base(tmp_path / "base", "llama")
    alphas = {"alpha_0": 0.7, "alpha_tilde": 1.4, "center": 0.5}
    model = save_adapter(tmp_path / "alphas", base, **alphas)
    requests = [Request(prompt(9), None, 8), Request(prompt(4), 0.5, 8)]
    with engine(tmp_path / "alphas") as llm:
        check(model, requests, ask(llm, requests))
    model.recommended_strength, model.kl_budget = 0.625, 0.02
    model.save_pretrained(tmp_path / "budget")
    with engine(tmp_path / "budget") as llm:
        answers = ask(llm, [Request(prompt(9), None, 8)])
    check(model, [Request(prompt(9), 0.625, 8)], answers)


def test_two_ranks_share_a_model(tmp_path):
    """Shares of A and B, on heads of which there is one for both ranks, and of their sums."""
    base = save_base(tmp_path / "base", "llama", num_key_value_heads=1)
    lora = LoraConfig(r=3, target_modules="all-linear", lora_bias=True)
    model = save_adapter(tmp_path / "adapter", base, lora)
    requests = of_many_lengths(6)
    with engine(tmp_path / "adapter", tensor_parallel_size=2) as llm:
        check(model, requests, ask(llm, requests))


def test_compiled_by_vllm(llama, monkeypatch, tmp_path):
    folder, model = llama
    monkeypatch.setenv("VLLM_CACHE_ROOT", str(tmp_path))
    requests = of_many_lengths(8)
    with engine(folder, enforce_eager=False, max_num_seqs=4) as llm:
        check(model, requests, ask(llm, requests))


def test_half_precision_is_near(llama):
    """To what bfloat16 leaves of log-probabilities; which token is greedy may differ."""
    folder, model = llama
    requests = [Request(prompt(12), strength, 1) for strength in STRENGTHS]
    with engine(folder, dtype="bfloat16") as llm:
        answers = ask(llm, requests)
    for request, answer in zip(requests, answers, strict=True):
        ((token, there),) = answer.outputs[0].logprobs[0].items()
        here = policy(model, request.prompt, request.strength)[-1, token]
        assert abs(there.logprob - float(here)) < 0.5
