"""generate() samples from the composed policy: held against full forwards of both streams."""

import pytest
import torch

from qadapter.composition import stream_weights
from tests.tiny_models import make_base, make_model

IDS = torch.randint(3, 97, (3, 9), generator=torch.Generator().manual_seed(0))
MASK = torch.ones_like(IDS)
MASK[1, :4] = 0
MASK[2, :2] = 0
PLAIN = {"max_new_tokens": 24, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
KINDS = ["llama", "qwen2", "gpt2", "gemma2"]


@torch.no_grad()
def stepwise(model, weights, steps=24, ids=IDS, mask=MASK):
    """Greedy decoding that recomputes everything at every token, without a cache."""
    for _ in range(steps):
        positions = (mask.cumsum(-1) - 1).clamp(min=0)
        inputs = {"input_ids": ids, "attention_mask": mask, "position_ids": positions}
        q = model.peft_model(**inputs).logits[:, -1]
        with model.peft_model.disable_adapter():
            base = model.peft_model(**inputs).logits[:, -1]
        tokens = (weights[0] * q + weights[1] * base).argmax(-1)
        ids = torch.cat([ids, tokens[:, None]], 1)
        mask = torch.cat([mask, mask.new_ones(len(ids), 1)], 1)
    return ids


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("strength", [0.5, 2.0])
def test_greedy_with_center_1(kind, strength):
    model = make_model(kind)
    got = model.generate(IDS, MASK, strength=strength, **PLAIN)
    assert torch.equal(got, stepwise(model, (strength, 1.0 - strength)))
    plain_lora = model.hf_model.generate(IDS, attention_mask=MASK, **PLAIN)
    assert not torch.equal(got, plain_lora)


@pytest.mark.parametrize("kind", KINDS)
def test_greedy_with_center_0(kind):
    model = make_model(kind, center=0.0, alpha_0=1.0)
    got = model.generate(IDS, MASK, **PLAIN)
    assert torch.equal(got, stepwise(model, (1.0, 1.0)))
    assert not torch.equal(got, model.hf_model.generate(IDS, attention_mask=MASK, **PLAIN))


@pytest.mark.parametrize("kind", KINDS)
def test_the_ends_of_strength(kind):
    model = make_model(kind)
    lora = model.hf_model.generate(IDS, attention_mask=MASK, **PLAIN)
    assert torch.equal(model.generate(IDS, MASK, strength=1.0, **PLAIN), lora)
    assert torch.equal(model.generate(IDS, MASK, **PLAIN), lora)
    base = make_base(kind).generate(IDS, attention_mask=MASK, **PLAIN)
    assert torch.equal(model.generate(IDS, MASK, strength=0.0, **PLAIN), base)
    assert not torch.equal(lora, base)


def test_alphas_at_call_time():
    model = make_model()
    expected = stepwise(model, (1 / 0.8, (0.3 - 1.0) / 0.8))
    assert torch.equal(model.generate(IDS, MASK, alpha_0=0.3, alpha_tilde=0.8, **PLAIN), expected)
    assert (model.alpha_0, model.alpha_tilde) == (1.0, 1.0)


def test_without_cache_and_without_padding():
    model = make_model()
    cached = model.generate(IDS, MASK, strength=2.0, **PLAIN)
    assert torch.equal(model.generate(IDS, MASK, strength=2.0, use_cache=False, **PLAIN), cached)
    alone = model.generate(IDS[1:2, 4:], strength=2.0, **PLAIN)
    assert torch.equal(alone[:, 5:], cached[1:2, 9:])


def test_rows_end_on_their_own_eos():
    model = make_model()
    free = model.generate(IDS, MASK, strength=2.0, **PLAIN)[:, 9:]
    eos = int(free[0, 3])
    settings = {**PLAIN, "eos_token_id": eos}
    got = model.generate(IDS, MASK, strength=2.0, **settings)[:, 9:]
    for row, full in zip(got, free, strict=True):
        ends = (full == eos).nonzero()[:, 0]
        stop = int(ends[0]) + 1 if len(ends) else len(full)
        stop = min(stop, len(row))
        assert torch.equal(row[:stop], full[:stop])
        assert (row[stop:] == 0).all()
    assert (got[0] == eos).sum() == 1


@pytest.mark.parametrize(
    "filters", [{"temperature": 0.7}, {"top_k": 5}, {"top_p": 0.8}, {"min_p": 0.1}]
)
def test_samples_come_from_the_filtered_policy(filters):
    """2,000 continuations of one prompt against the exact distribution of the first token."""
    from qadapter import reference

    model = make_model()
    torch.manual_seed(0)
    ids = IDS[:1].expand(2000, -1)
    arguments = {"max_new_tokens": 1, "do_sample": True, "top_k": 0, "pad_token_id": 0, **filters}
    got = model.generate(ids, strength=0.5, **arguments)[:, -1]
    out = model(IDS[:1], None, torch.tensor([8]))
    logp = reference.filtered_logprobs(
        out.base_logits, out.q_logits, alpha_0=2.0, alpha_tilde=2.0, **filters
    )[0].detach()
    counts = torch.bincount(got, minlength=97)
    assert (counts[logp == float("-inf")] == 0).all()
    distance = 0.5 * (counts / 2000 - logp.exp()).abs().sum()
    assert distance < 0.5 * (97 / 2000) ** 0.5 + 0.05


def test_streaming_and_dict_output():
    class Recorder:
        def __init__(self):
            self.pieces, self.ended = [], False

        def put(self, value):
            self.pieces.append(value.reshape(-1))

        def end(self):
            self.ended = True

    model, recorder = make_model(), Recorder()
    got = model.generate(IDS[:1], streamer=recorder, strength=2.0, **PLAIN)
    assert recorder.ended and torch.equal(torch.cat(recorder.pieces), got[0])
    out = model.generate(
        IDS, MASK, strength=2.0, return_dict_in_generate=True, output_logits=True,
        output_scores=True, **PLAIN,
    )  # fmt: skip
    assert len(out.logits) == len(out.scores) == 24
    assert torch.equal(out.logits[0].argmax(-1), out.sequences[:, 9])


def test_processors_act_on_the_policy():
    """A banned token is banned from the blend, and penalties see the composed logits."""
    model = make_model()
    free = model.generate(IDS, MASK, strength=2.0, **PLAIN)
    banned = int(free[0, 9])
    got = model.generate(IDS, MASK, strength=2.0, suppress_tokens=[banned], **PLAIN)
    assert banned not in got[:, 9:]
    several = model.generate(
        IDS[:1], strength=2.0, num_return_sequences=3, max_new_tokens=4, do_sample=True,
        pad_token_id=0,
    )  # fmt: skip
    assert several.shape == (3, 13)


def test_generate_leaves_the_mode_alone():
    model = make_model()
    model.train()
    model.generate(IDS, MASK, strength=0.5, **PLAIN)
    assert model.training
    model.eval()
    model.generate(IDS, MASK, strength=0.5, **PLAIN)
    assert not model.training


def test_weights():
    model = make_model(center=1.0)
    assert stream_weights(model.compositions["default"]) == (1.0, 0.0)
    assert stream_weights(model.compositions["default"], strength=0.0) == (0.0, 1.0)
    assert stream_weights(model.compositions["default"], strength=0.25) == (0.25, 0.75)
    assert stream_weights(model.compositions["default"], alpha_0=4.0, alpha_tilde=4.0) == (
        0.25,
        0.75,
    )
    model = make_model(center=0.0, alpha_0=0.01)
    assert stream_weights(model.compositions["default"]) == (1.0, 0.01)
    assert stream_weights(model.compositions["default"], strength=0.5) == (0.5, 1.0)


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"strength": 1.0, "alpha_0": 1.0}, "not both"),
        ({"strength": -0.5}, "strength: expected 0"),
        ({"strength": float("nan")}, "strength"),
        ({"alpha_tilde": 0.0}, "alpha_tilde"),
        ({"num_beams": 4}, "num_beams: beam search is not supported"),
        ({"stop_strings": ["x"]}, "stop_strings"),
        ({"max_new_tokens": 1.5}, "max_new_tokens: expected an integer of 1 or more, got 1.5"),
        ({"num_return_sequences": 0}, "num_return_sequences: expected an integer of 1 or more"),
        ({"do_sample": True, "top_p": 1.5}, r"top_p: expected a number in \(0, 1\], got 1.5"),
        ({"do_sample": True, "seed": 2**63}, "seed: expected an integer of at most 64 bits"),
        ({"assistant_model": object()}, "assistant_model"),
        ({"guidance_scale": 1.5}, "guidance_scale"),
        ({"attention_mask": torch.ones(3, 4)}, "attention_mask: expected the shape"),
        ({"attention_mask": MASK.flip(1)}, "padded on the left, got padding at the end of row 1"),
    ],
)
def test_refuses(kwargs, message):
    with pytest.raises(ValueError, match=message):
        make_model().generate(IDS, **{"max_new_tokens": 2, **kwargs})
    with pytest.raises(ValueError, match="at least one token"):
        make_model().generate(IDS[:, :0])


@pytest.mark.parametrize("use_cache", [True, False])
def test_ids_in_the_padding_need_no_embedding(use_cache):
    """On the left of a prompt, behind a row's end, and in a training forward."""
    model = make_model()
    ids = torch.tensor([[500, 500, 5, 6], [9, 8, 7, 6]])
    mask = (ids != 500).long()
    options = {"strength": 0.6, "max_new_tokens": 8, "do_sample": False, "use_cache": use_cache}
    known = ids.masked_fill(mask == 0, 0)
    free = model.generate(known, mask, eos_token_id=None, pad_token_id=0, **options)
    end = int(free[0, 6])
    want = model.generate(known, mask, eos_token_id=end, pad_token_id=0, **options)[:, 4:]
    # a processor of one's own keeps rows that have ended in the batch
    for extra in ({}, {"logits_processor": [lambda ids, scores: scores]}):
        more = {"eos_token_id": end, "pad_token_id": 600, **options, **extra}
        got = model.generate(ids, mask, **more)[:, 4:]
        assert torch.equal(got.masked_fill(got == 600, 0), want) and (got == 600).any()
    states = mask.flatten().nonzero()[:, 0]
    for one, other in zip(model(ids, mask, states), model(known, mask, states), strict=True):
        assert torch.equal(one, other)
    with pytest.raises(ValueError, match=r"input_ids: row 0 has the id 500, .* has 97 rows"):
        model.generate(ids, max_new_tokens=2)
