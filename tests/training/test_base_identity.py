"""A cache serves the pairs and the base that it was made for, and refuses any other, by name."""

import copy

import pytest
import torch

from qadapter.training.base_cache import (
    BaseCache,
    example_key,
    hidden_mib,
    identity,
    pair_rows,
    weights_hash,
)
from tests.tiny_models import make_base, make_model, perturb
from tests.training.ragged_pairs import (
    COLLATE,
    NOTHING,
    RAGGED,
    filled,
    ragged,
)

# Keys and rows.


def test_the_key_covers_ids_and_flags_alone():
    keys = {example_key(feature) for feature in RAGGED}
    assert len(keys) == 5
    for column in ("prompt_ids", "chosen_ids", "rejected_ids"):
        changed = {**RAGGED[0], column: [*RAGGED[0][column], 9]}
        assert example_key(changed) not in keys
    for column in ("chosen_truncated", "rejected_truncated"):
        assert example_key({**RAGGED[0], column: True}) not in keys
    moved = {**RAGGED[0], "prompt_ids": [3, 4], "chosen_ids": [5, *RAGGED[0]["chosen_ids"]]}
    assert example_key(moved) not in keys  # the same ids, another border
    assert example_key({**RAGGED[0], "note": "ignored"}) in keys
    assert example_key(ragged().with_format("torch")[0]) in keys
    ids_alone = {k: v for k, v in RAGGED[0].items() if k.endswith("_ids")}
    assert example_key(ids_alone) in keys  # as the collator takes it: nothing truncated
    with pytest.raises(ValueError, match="tokenised pair with 'prompt_ids', got prompt, chosen"):
        example_key({"prompt": "a", "chosen": "b"})


def test_rows_and_the_estimate_are_those_of_the_collator():
    ends = COLLATE(RAGGED)["cu_seqlens"]
    sizes = ends.diff().view(2, -1).T.tolist()
    assert [list(pair_rows(feature)) for feature in RAGGED] == sizes
    assert hidden_mib(ragged(), 32, 4) == int(ends[-1]) * 32 * 4 / 2**20


# What the values belong to.


def test_every_single_weight_counts_and_the_adapter_does_not():
    model = make_model(moved=False)
    base = model.hf_model
    start = weights_hash(base)
    assert weights_hash(make_base()) == start  # wrapped by PEFT or not
    assert weights_hash(perturb(model).hf_model) == start
    for name, parameter in base.named_parameters():
        entry = parameter.detach().view(-1)[parameter.numel() // 3]
        before = entry.clone()
        entry += 1e-3
        assert (weights_hash(base) == start) == ("lora_" in name), name
        entry.copy_(before)
    assert weights_hash(base) == start
    with pytest.raises(ValueError, match="not in memory"):
        weights_hash(base.to("meta"))


def _grow(model, **_):
    model.hf_model.resize_token_embeddings(101)


def _head(model, **_):
    model.hf_model.get_output_embeddings().weight.data[5, 5] += 0.01


def _config(**entries):
    return lambda model, **_: model.config.update(entries)


CHANGES = {
    "weights": (_head, "weights"),
    "soft cap": (
        _config(final_logit_softcapping=30.0),
        "config.final_logit_softcapping: null then, 30.0 now",
    ),
    "scale": (_config(logit_scale=0.25), "config.logit_scale: null then, 0.25 now"),
    "rope": (
        _config(rope_parameters={"rope_theta": 5e5, "rope_type": "default"}),
        "config.rope_parameters.rope_theta: 10000.0 then, 500000.0 now",
    ),
    "dtype": (lambda model, **_: model.bfloat16(), 'dtype: "float32" then, "bfloat16" now'),
    "vocabulary": (_grow, "vocab_size: 97 then, 101 now"),
    "template": (lambda tokenizer, **_: setattr(tokenizer, "chat_template", "x"), "tokenizer"),
    "word": (lambda tokenizer, **_: tokenizer.add_tokens(["zebra"]), "tokenizer"),
    "end": (lambda tokenizer, **_: setattr(tokenizer, "eos_token", "<u>"), "tokenizer"),
    "max_length": ({"max_length": 64}, "max_length: 128 then, 64 now"),
    "autocast": ({"autocast": torch.float16}, 'autocast: "off" then, "float16" now'),
}


def arguments_of(tokenizer):
    tokenizer = copy.deepcopy(tokenizer)
    return {"model": make_model(), "tokenizer": tokenizer, "max_length": 128, "autocast": None}


@pytest.mark.parametrize("change", CHANGES)
def test_a_cache_of_something_else_is_refused(tmp_path, tiny_tokenizer, change):
    now = arguments_of(tiny_tokenizer)
    BaseCache.open(tmp_path / "cache", identity(**now))
    BaseCache.open(tmp_path / "cache", identity(**arguments_of(tiny_tokenizer)))
    alter, line = CHANGES[change]
    if isinstance(alter, dict):
        now.update(alter)
    else:
        alter(**now)
    with pytest.raises(ValueError, match="made for something else") as refusal:
        BaseCache.open(tmp_path / "cache", identity(**now))
    message = str(refusal.value)
    assert f"  {line}" in message
    assert str(tmp_path / "cache") in message and "another directory, or delete" in message
    named = [text for text in message.splitlines() if text.startswith("  ")]
    # A cast or a new vocabulary changes the weights too.
    assert len(named) == 1 or change in ("dtype", "vocabulary")


def test_what_does_not_matter_is_not_refused(tmp_path, tiny_tokenizer):
    now = arguments_of(tiny_tokenizer)
    before = identity(**now)
    perturb(now["model"], std=1.0)
    now["model"].train()
    config = now["model"].hf_model.config
    config.use_cache, config.pad_token_id, config._name_or_path = False, 7, "elsewhere"
    now["model"].hf_model.set_attn_implementation("eager")
    now["tokenizer"](["the cat", "a"], padding=True, truncation=True, max_length=5)
    assert identity(**now) == before


def test_a_format_of_another_version_and_a_lost_identity_are_refused(tmp_path):
    filled(tmp_path / "cache")
    with pytest.raises(ValueError, match="format: 1 then, 2 now"):
        BaseCache.open(tmp_path / "cache", {**NOTHING, "format": 2})
    (tmp_path / "cache" / "identity.json").write_text("{")
    with pytest.raises(ValueError, match=r"identity\.json is not valid JSON"):
        BaseCache.open(tmp_path / "cache", NOTHING)
    (tmp_path / "cache" / "identity.json").unlink()
    with pytest.raises(ValueError, match=r"no identity\.json"):
        BaseCache.open(tmp_path / "cache", NOTHING)
