"""Packs with shared prompts give the values and gradients of padded sequences."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from qadapter import functional as QF
from qadapter.model import packed_attention
from qadapter.ops import varlen_attention
from qadapter.text.collator import PreferenceCollator
from qadapter.text.packing import PackedPreferenceCollator
from tests.text.tokenized_pairs import PAIRS
from tests.tiny_models import make_base, make_model

KINDS = ["llama", "llama-tied", "qwen2", "gpt2"]


def pairs(vocab=97, seed=0, long=9):
    generator = torch.Generator().manual_seed(seed)

    def ids(count):
        return torch.randint(3, vocab, (count,), generator=generator).tolist()

    lengths = [(5, 4, long), (1, 1, 1), (2, long, 2), (7, 1, 6)]
    return [
        {
            "prompt_ids": ids(p),
            "chosen_ids": ids(c),
            "rejected_ids": ids(r),
            "chosen_truncated": i == 0,
            "rejected_truncated": i == 3,
        }
        for i, (p, c, r) in enumerate(lengths)
    ]


def values_and_gradients(model, batch, **kwargs):
    inputs = {k: v for k, v in batch.items() if k != "cu_seqlens"}
    model.zero_grad(set_to_none=True)
    values = model(**inputs, **kwargs).values
    loss = QF.preference_loss(values, batch["actions"], batch["cu_seqlens"], bt_scale=3.0).loss
    loss.backward()
    gradients = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    return values, loss.detach(), gradients


def assert_same(ours, wanted, tolerance=2e-4):
    for name, a, b in zip(ours[0]._fields, ours[0], wanted[0], strict=True):
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance, msg=name)
    torch.testing.assert_close(ours[1], wanted[1], rtol=tolerance, atol=tolerance)
    assert ours[2].keys() == wanted[2].keys() and ours[2]
    for name, gradient in ours[2].items():
        size = wanted[2][name].abs().max().item()
        error = (gradient - wanted[2][name]).abs().max().item()
        assert error <= tolerance * size + 1e-7, name


@pytest.mark.parametrize("share_prompt", [True, False])
@pytest.mark.parametrize("kind", KINDS)
def test_equals_padded_batches_and_logits(kind, share_prompt):
    model = make_model(kind, alpha_0=0.7)
    assert packed_attention.enable(model.hf_model) is None
    packed = PackedPreferenceCollator(share_prompt)(pairs())
    padded = PreferenceCollator(0)(pairs())
    ours = values_and_gradients(model, packed)
    assert_same(ours, values_and_gradients(model, padded))
    assert_same(ours, values_and_gradients(model, padded, use_logits=True))
    assert_same(ours, values_and_gradients(model, packed, use_logits=True))


@pytest.mark.parametrize("alpha_0", [1.0, 0.7])
@pytest.mark.parametrize("cached", [False, True])
def test_repeated_prompts_and_responses_are_computed_once(cached, alpha_0):
    model = make_model(alpha_0=alpha_0)
    assert packed_attention.enable(model.hf_model) is None
    rows = pairs()
    same = {name: rows[0][name] for name in ("prompt_ids", "chosen_ids", "chosen_truncated")}
    rows[1] = {**rows[1], **same}  # another rejected response to the same question and answer
    rows[2] = {**rows[2], "prompt_ids": rows[0]["prompt_ids"]}
    rows[3] = {**rows[3], "rejected_ids": rows[3]["chosen_ids"]}
    packed = PackedPreferenceCollator()(rows)
    assert packed["input_ids"].numel() < sum(
        len(r["prompt_ids"]) + len(r["chosen_ids"]) + len(r["rejected_ids"]) for r in rows
    )
    assert len(packed["unique_rows"]) < len(packed["unique_index"]) == len(packed["rows"])
    wanted = values_and_gradients(model, PreferenceCollator(0)(rows))
    if cached:
        statistics = model.base_statistics(packed)
        names = ("base_lse", "base_logp", "base_hidden")[: 2 if alpha_0 == 1.0 else 3]
        packed |= {name: statistics[name] for name in names}
    assert_same(values_and_gradients(model, packed), wanted)
    kl_rows = torch.arange(len(packed["rows"]))
    inputs = {k: v for k, v in packed.items() if k != "cu_seqlens"}
    inputs = {k: v for k, v in inputs.items() if not k.startswith("base")}
    kl = model(**inputs, kl_rows=kl_rows).kl
    on_logits = model(**inputs, kl_rows=kl_rows, use_logits=True).kl
    torch.testing.assert_close(kl, on_logits, rtol=1e-3, atol=1e-5)


def test_two_passes_over_a_pack_see_nothing_of_their_neighbours():
    """Changing one pair changes no bit of the others."""
    model = make_model()
    assert packed_attention.enable(model.hf_model) is None
    rows = pairs()
    before = model(**_forward(rows)).values
    rows[1] = {**rows[1], "chosen_ids": [50]}
    rows[2] = {**rows[2], "prompt_ids": [60, 61]}
    after = model(**_forward(rows)).values
    ends = PackedPreferenceCollator()(rows)["cu_seqlens"].tolist()
    for s in (0, 3, 4, 7):  # pairs 0 and 3, chosen and rejected
        part = slice(ends[s], ends[s + 1])
        assert torch.equal(before.value[part], after.value[part])
        assert torch.equal(before.q[part], after.q[part])


def _forward(rows):
    return {k: v for k, v in PackedPreferenceCollator()(rows).items() if k != "cu_seqlens"}


@pytest.mark.parametrize("window", [3, 8])
def test_sliding_windows(window):
    import transformers as tf

    from qadapter import QAdapterModel

    torch.manual_seed(0)
    config = tf.MistralConfig(
        vocab_size=97, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, initializer_range=0.3, sliding_window=window,
    )  # fmt: skip
    model = QAdapterModel.from_base(tf.AutoModelForCausalLM.from_config(config))
    assert packed_attention.enable(model.hf_model) is None
    packed, padded = (
        PackedPreferenceCollator()(pairs(long=20)),
        PreferenceCollator(0)(pairs(long=20)),
    )
    assert_same(values_and_gradients(model, packed), values_and_gradients(model, padded))


@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing(reentrant):
    model = make_model()
    assert packed_attention.enable(model.hf_model) is None
    batch = PackedPreferenceCollator()(pairs())
    wanted = values_and_gradients(model.train(), batch)
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    assert_same(values_and_gradients(model.train(), batch), wanted, tolerance=1e-6)


def test_without_packing_nothing_changes():
    """Padded batches, decoding with a cache: bit for bit what the model computed before."""
    model = make_base()
    ids = torch.arange(3, 23).view(2, 10)
    mask = torch.ones_like(ids)
    mask[0, :4] = 0
    before = model(ids, attention_mask=mask).logits
    generated = model.generate(ids, attention_mask=mask, max_new_tokens=5, do_sample=False)
    assert packed_attention.enable(model) is None
    assert model.config._attn_implementation == "qadapter_sdpa"
    assert torch.equal(model(ids, attention_mask=mask).logits, before)
    again = model.generate(ids, attention_mask=mask, max_new_tokens=5, do_sample=False)
    assert torch.equal(again, generated)


def test_train_and_eval_modes_survive_the_trial():
    model = make_model().train()
    modes = {name: module.training for name, module in model.named_modules()}
    assert packed_attention.enable(model.hf_model) is None
    assert modes == {name: module.training for name, module in model.named_modules()}


def test_what_cannot_be_packed_says_why(monkeypatch):
    eager = make_base("gemma2")  # soft-capped attention, which sdpa does not have
    assert "'eager'" in packed_attention.enable(eager)
    model = make_base()
    model.config.layer_types = ["full_attention", "chunked_attention", "full_attention"]
    assert "chunked_attention" in packed_attention.enable(model)
    model = make_base()
    monkeypatch.setattr(
        packed_attention.cpu_attention, "causal_mask",
        lambda queries, keys, window, device: torch.ones(queries, keys, dtype=torch.bool),
    )  # fmt: skip
    assert "differ" in packed_attention.enable(model)
    assert model.config._attn_implementation == "sdpa"


def test_a_pack_for_a_model_that_is_not_ready_is_an_error():
    model = make_model()
    with pytest.raises(RuntimeError, match=r"packed_attention\.enable"):
        model(**_forward(pairs()))
    assert packed_attention.enable(model.hf_model) is None
    model.hf_model.set_attn_implementation("sdpa")
    with pytest.raises(RuntimeError, match=r"packed_attention\.enable"):
        model(**_forward(pairs()))


def _varlen(query, key, value, cu_q, cu_k, scaling):
    """What flash-attention's varlen call computes: causal, flush right. [1, H, T, d]."""
    outputs = []
    repeat = query.shape[1] // key.shape[1]
    for i in range(len(cu_q) - 1):
        q = query[0, :, cu_q[i] : cu_q[i + 1]]
        k, v = (x[0, :, cu_k[i] : cu_k[i + 1]].repeat_interleave(repeat, 0) for x in (key, value))
        scores = q @ k.transpose(1, 2) * scaling
        mask = torch.ones(scores.shape[1:], dtype=torch.bool).tril(k.shape[1] - q.shape[1])
        outputs.append(scores.masked_fill(~mask, -torch.inf).softmax(-1) @ v)
    return torch.cat(outputs, 1).transpose(0, 1)[None]


@pytest.mark.parametrize("share_prompt", [True, False])
def test_flash_attention_gets_one_varlen_call(monkeypatch, share_prompt):
    """flash-attention needs a GPU; here a stand-in computes what its arguments ask for."""
    seen = []

    def flash(module, query, key, value, mask, *, scaling, cu_seq_lens_q, cu_seq_lens_k,
              max_length_q, max_length_k, **kwargs):  # fmt: skip
        assert mask is None and not {"packed_groups", "packed_key_index"} & set(kwargs)
        assert cu_seq_lens_q.dtype == cu_seq_lens_k.dtype == torch.int32
        assert max_length_q == cu_seq_lens_q.diff().max()
        assert max_length_k == cu_seq_lens_k.diff().max()
        assert cu_seq_lens_q[-1] == query.shape[2] and cu_seq_lens_k[-1] == key.shape[2]
        seen.append((module.config._attn_implementation, query.shape[2], key.shape[2]))
        cu_q, cu_k = cu_seq_lens_q.tolist(), cu_seq_lens_k.tolist()
        return _varlen(query, key, value, cu_q, cu_k, scaling), None

    sdpa = make_model()
    assert packed_attention.enable(sdpa.hf_model) is None
    wanted = values_and_gradients(sdpa, PackedPreferenceCollator(share_prompt)(pairs()))

    monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS._global_mapping, "flash_attention_2", flash)
    model = make_model()
    name = packed_attention._register("flash_attention_2")
    model.hf_model.config._attn_implementation = name
    ours = values_and_gradients(model, PackedPreferenceCollator(share_prompt)(pairs()))
    assert_same(ours, wanted)
    assert {s[0] for s in seen} == {"flash_attention_2"}
    assert all((q < k) == share_prompt for _, q, k in seen)
    assert model.hf_model.config._attn_implementation == name


@settings(max_examples=100)
@given(rows=PAIRS, share=st.booleans())
def test_collator(rows, share):
    """Every row sees the prompt and its response so far, and takes the padded collator's action."""
    packed, padded = PackedPreferenceCollator(share)(rows), PreferenceCollator(0)(rows)
    assert torch.equal(packed["actions"], padded["actions"])
    assert torch.equal(packed["cu_seqlens"], padded["cu_seqlens"])
    width = padded["input_ids"].shape[1]
    positions = packed["position_ids"][0]
    assert torch.equal(positions[packed["rows"]], padded["rows"] % width)
    ids = packed["input_ids"][0]
    assert torch.equal(ids[packed["rows"]], padded["input_ids"].flatten()[padded["rows"]])
    sequences = [
        (tuple(p["prompt_ids"]), tuple(p[f"{c}_ids"][: None if p[f"{c}_truncated"] else -1]))
        for p in rows
        for c in ("chosen", "rejected")
    ]
    if share:  # what is the same is there once
        tokens = sum(len(prompt) for prompt in {prompt for prompt, _ in sequences})
        tokens += sum(len(states) for _, states in set(sequences))
    else:
        tokens = sum(len(prompt) + len(states) for prompt, states in sequences)
    if "unique_rows" in packed:
        unique, index = packed["unique_rows"], packed["unique_index"]
        for name in ("rows", "actions"):
            assert torch.equal(packed[name][unique][index], packed[name])
        places = torch.stack([packed["rows"][unique], packed["actions"][unique]], 1)
        assert len(places.unique(dim=0)) == len(unique) < len(index)
    assert ids.numel() == tokens == packed["cu_seq_lens_q"][-1]
    keys = packed.get("packed_key_index", torch.arange(tokens))
    assert len(keys) == packed["cu_seq_lens_k"][-1]
    for i in range(len(packed["cu_seq_lens_q"]) - 1):
        q0, q1 = packed["cu_seq_lens_q"][i : i + 2].tolist()
        k0, k1 = packed["cu_seq_lens_k"][i : i + 2].tolist()
        assert keys[k0:k1].tolist()[k1 - k0 - (q1 - q0) :] == list(range(q0, q1))
        assert positions[keys[k0:k1]].tolist() == list(range(k1 - k0))


def test_empty_pairs_are_refused():
    for column in ("prompt_ids", "chosen_ids", "rejected_ids"):
        with pytest.raises(ValueError, match="without a token"):
            PackedPreferenceCollator()([{**pairs()[0], column: []}])


@pytest.mark.parametrize("window", [None, 20])
def test_one_call_for_all_sequences(window, monkeypatch):
    """Where a CPU has AVX512_BF16 or AMX; against a product a sequence."""
    generator = torch.Generator().manual_seed(0)
    groups = packed_attention.Groups(((5, 30, 7, 40), (17,), (3, 1, 0), (0, 2, 9)))
    tokens = sum(map(sum, groups.lengths))
    tensors = [torch.randn(1, h, tokens, 32, generator=generator).bfloat16() for h in (4, 2, 2)]
    upstream = torch.randn(1, tokens, 4, 32, generator=generator).bfloat16()
    if not varlen_attention.serves(tensors[0], tensors[2]):
        pytest.skip("needs a CPU with AVX512_BF16 or AMX")

    def evaluate():
        q, k, v = (t.clone().requires_grad_() for t in tensors)
        arguments = {"scaling": 0.2, "sliding_window": window}
        output = packed_attention._sdpa_packed("sdpa", None, q, k, v, groups, **arguments)
        return output, *torch.autograd.grad(output, (q, k, v), upstream)

    ours = evaluate()
    monkeypatch.setattr(varlen_attention, "serves", lambda *_: False)
    for a, b in zip(ours, evaluate(), strict=True):
        assert a.shape == b.shape
        assert (a.float() - b.float()).norm() <= 1e-2 * b.float().norm()
