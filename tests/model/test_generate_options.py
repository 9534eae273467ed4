"""Each argument of generate() does what the same thing done by hand, or row by row, does."""

import pytest
import torch
from peft import LoraConfig
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    CompileConfig,
    GenerationConfig,
    LogitsProcessorList,
    NoRepeatNGramLogitsProcessor,
    PreTrainedTokenizerFast,
    RepetitionPenaltyLogitsProcessor,
    StoppingCriteriaList,
)
from transformers.generation.logits_process import (
    MinPLogitsWarper,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from qadapter import QAdapterModel
from qadapter.model.decoding import split_processors
from tests.tiny_models import make_base, make_model, perturb

IDS = torch.randint(5, 97, (3, 9), generator=torch.Generator().manual_seed(0))
MASK = torch.ones_like(IDS)
MASK[1, :4] = 0
MASK[2, :2] = 0
GREEDY = {"do_sample": False, "pad_token_id": 0, "eos_token_id": None}
DRAW = {"do_sample": True, "pad_token_id": 0, "eos_token_id": None}


@pytest.fixture(scope="module")
def model():
    return make_model()


@torch.no_grad()
def composed_logits(model, ids, mask, strength):
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    inputs = {"input_ids": ids, "attention_mask": mask, "position_ids": positions}
    q = model.peft_model(**inputs).logits[:, -1]
    with model.peft_model.disable_adapter():
        base = model.peft_model(**inputs).logits[:, -1]
    return strength * q + (1.0 - strength) * base


def extended(mask, ids):
    return torch.cat([mask, mask.new_ones(len(mask), ids.shape[1] - mask.shape[1])], 1)


# A blend of its own for every row.


@pytest.mark.parametrize("kind", ["list", "tensor"])
def test_a_strength_for_each_row(model, kind):
    values = [0.0, 0.5, 2.0]
    given = values if kind == "list" else torch.tensor(values)
    got = model.generate(IDS, MASK, strength=given, max_new_tokens=40, **GREEDY)
    for row, strength in enumerate(values):
        alone = model.generate(IDS, MASK, strength=strength, max_new_tokens=40, **GREEDY)
        assert torch.equal(got[row], alone[row])
        other = model.generate(IDS, MASK, strength=values[row - 1], max_new_tokens=40, **GREEDY)
        assert not torch.equal(got[row], other[row])


def test_alphas_for_each_row(model):
    a_0, a_t = torch.tensor([1.0, 0.5, 1.5]), [1.0, 0.5, 2.0]
    got = model.generate(IDS, MASK, alpha_0=a_0, alpha_tilde=a_t, max_new_tokens=24, **GREEDY)
    for row in range(3):
        alone = model.generate(
            IDS, MASK, alpha_0=float(a_0[row]), alpha_tilde=a_t[row], max_new_tokens=24, **GREEDY
        )
        assert torch.equal(got[row], alone[row])


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"strength": [0.5, 1.0]}, "strength: expected a number or one for each of the 3 rows"),
        ({"strength": torch.ones(4)}, "strength: expected a number or one for each of the 3"),
        ({"strength": [0.5, -1.0, 0.5]}, "strength: expected 0 .the base. or more, got -1.0"),
        ({"strength": [0.5, "1", 0.5]}, "strength"),
        ({"alpha_tilde": [1.0, 0.0, 1.0]}, "alpha_tilde"),
        ({"strength": 0.5, "alpha_0": [1.0, 1.0, 1.0]}, "not both"),
        ({"seed": torch.zeros(2, dtype=torch.int64)}, "seed"),
        ({"seed": 0.5}, "seed: expected None, an int or an int64 tensor"),
        ({"seed": True}, "seed: expected None, an int or an int64 tensor"),
        ({"output_logprobs": True}, "output_logprobs: expected return_dict_in_generate=True"),
        ({"stop_strings": ["x"]}, "stop_strings: expected tokenizer="),
        ({"num_beams": 2}, "num_beams: beam search is not supported"),
        ({"assistant_model": object()}, "assistant_model: speculative decoding"),
        ({"prompt_lookup_num_tokens": 3}, "prompt_lookup_num_tokens: speculative"),
        ({"guidance_scale": 1.5}, "guidance_scale: classifier-free guidance"),
        ({"penalty_alpha": 0.5, "top_k": 4}, "penalty_alpha: contrastive search"),
        ({"cache_implementation": "offloaded"}, "cache_implementation: expected one of"),
        ({"output_attentions": True}, "output_attentions: returning attention"),
        ({"generation_config": GenerationConfig(num_beams=3)}, "num_beams"),
    ],
)
def test_refuses(model, kwargs, message):
    with pytest.raises(ValueError, match=message):
        model.generate(IDS, MASK, max_new_tokens=2, **kwargs)


# Stopping.


@pytest.fixture
def bytes_tokenizer():
    """A token for every byte, as in byte-level BPE, without merges."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {"<pad>": 0, "<s>": 1, "</s>": 2} | {c: i + 3 for i, c in enumerate(alphabet)}
    backend = Tokenizer(models.BPE(vocab, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="<pad>", eos_token="</s>")


def test_stop_strings_end_their_own_row(bytes_tokenizer):
    base = make_base(vocab=259)
    model = perturb(QAdapterModel.from_base(base, lora_config=LoraConfig(r=4)))
    steps = 60
    text = model.generate(IDS, MASK, strength=0.5, max_new_tokens=steps, **GREEDY)[:, 9:]
    pairs = [[bytes_tokenizer.decode(pair) for pair in row.unfold(0, 2, 1)] for row in text]
    row, at = next(
        (r, i)
        for r in range(3)
        for i in range(4, 40)
        if pairs[r][i].isascii() and pairs[r][i].isprintable() and len(pairs[r][i]) == 2
    )
    stop = pairs[row][at]
    options = {"do_sample": False, "pad_token_id": 0, "eos_token_id": 2}
    got = model.generate(
        IDS, MASK, strength=0.5, max_new_tokens=steps, stop_strings=[stop, "never seen"],
        tokenizer=bytes_tokenizer, **options,
    )  # fmt: skip
    counts = []
    for r in range(3):
        ends = [i for i in range(steps) if text[r, i] == 2 or (i and pairs[r][i - 1] == stop)]
        counts.append(ends[0] + 1 if ends else steps)
        mine = got[r, 9:]
        assert torch.equal(mine[: counts[r]], text[r, : counts[r]])
        assert (mine[counts[r] :] == 0).all()
    assert counts[row] <= at + 2 < steps and len(set(counts)) > 1
    config = GenerationConfig(stop_strings=[stop], max_new_tokens=steps, **options)
    same = model.generate(
        IDS, MASK, strength=0.5, generation_config=config, tokenizer=bytes_tokenizer
    )
    assert torch.equal(same, got) and config.stop_strings == [stop]


def test_finished_rows_leave_the_batch(model):
    """And what the others get does not change."""
    text = model.generate(IDS, MASK, strength=0.5, max_new_tokens=30, **GREEDY)
    eos = [int(text[0, 12]), int(text[2, 20])]
    rows = []
    layer = model.hf_model.base_model.layers[1]
    hook = layer.register_forward_hook(lambda m, args, out: rows.append(len(args[0])))
    options = {"strength": 0.5, "max_new_tokens": 30, **GREEDY, "eos_token_id": eos}
    got = model.generate(IDS, MASK, **options)
    hook.remove()
    assert rows[0] == 6 and set(rows) <= {6, 4, 2} and rows[-1] < 6
    assert rows == sorted(rows, reverse=True)
    stays = model.generate(IDS, MASK, **options, return_dict_in_generate=True, output_scores=True)
    assert torch.equal(got, stays.sequences)
    for r in range(3):
        ends = [i for i in range(9, text.shape[1]) if int(text[r, i]) in eos]
        count = min(ends[0] + 1 if ends else text.shape[1], got.shape[1])
        assert torch.equal(got[r, :count], text[r, :count])


def test_custom_criteria_see_whole_sequences(model):
    seen = []

    def after_five(ids, scores, **kwargs):
        seen.append(tuple(ids.shape))
        return torch.full((len(ids),), ids.shape[1] >= IDS.shape[1] + 5)

    got = model.generate(
        IDS, MASK, strength=0.5, max_new_tokens=30,
        stopping_criteria=StoppingCriteriaList([after_five]), **GREEDY,
    )  # fmt: skip
    assert got.shape == (3, 14)
    assert seen == [(3, 10 + i) for i in range(5)]


# What is done to the logits.


def test_penalties_act_on_the_composed_logits(model):
    options = {"repetition_penalty": 1.7, "no_repeat_ngram_size": 2}
    got = model.generate(IDS, MASK, strength=0.6, max_new_tokens=20, **options, **GREEDY)
    processors = LogitsProcessorList(
        [RepetitionPenaltyLogitsProcessor(1.7), NoRepeatNGramLogitsProcessor(2)]
    )
    ids = IDS
    for _ in range(20):
        logits = composed_logits(model, ids, extended(MASK, ids), 0.6)
        ids = torch.cat([ids, processors(ids, logits).argmax(-1)[:, None]], 1)
    assert torch.equal(got, ids)
    plain = model.generate(IDS, MASK, strength=0.6, max_new_tokens=20, **GREEDY)
    assert not torch.equal(got, plain)


FILTERS = {"temperature": 0.7, "top_k": 20, "top_p": 0.8, "min_p": 0.05}


@pytest.mark.parametrize("filters", [{}, FILTERS, {"temperature": 0.7}])
@pytest.mark.parametrize("scores", [False, True])
def test_logprobs_are_those_of_the_filtered_policy(model, filters, scores):
    out = model.generate(
        IDS, MASK, strength=0.5, max_new_tokens=12, seed=5, output_logprobs=True,
        return_dict_in_generate=True, output_scores=scores, output_logits=scores,
        **{"top_k": 0} | filters, **DRAW,
    )  # fmt: skip
    warpers = [
        TemperatureLogitsWarper(filters.get("temperature", 1.0)),
        TopKLogitsWarper(filters.get("top_k", 97)),
        TopPLogitsWarper(filters.get("top_p", 1.0)),
        MinPLogitsWarper(filters.get("min_p", 0.0)),
    ]
    assert out.logprobs.shape == (3, 12) and out.logprobs.dtype == torch.float32
    for step in range(12):
        ids = out.sequences[:, : 9 + step]
        logits = composed_logits(model, ids, extended(MASK, ids), 0.5)
        if scores:
            torch.testing.assert_close(out.logits[step], logits, rtol=1e-4, atol=1e-4)
        for warp in warpers:
            logits = warp(ids, logits)
        if scores:
            torch.testing.assert_close(out.scores[step], logits, rtol=1e-4, atol=1e-4)
        token = out.sequences[:, 9 + step : 10 + step]
        expected = logits.log_softmax(-1).gather(1, token)[:, 0]
        torch.testing.assert_close(out.logprobs[:, step], expected, rtol=1e-4, atol=1e-4)
    plain = model.generate(
        IDS, MASK, strength=0.5, max_new_tokens=12, seed=5, **{"top_k": 0} | filters, **DRAW
    )
    assert torch.equal(plain, out.sequences)


def test_logprobs_behind_the_end_are_0(model):
    text = model.generate(IDS, MASK, strength=0.5, max_new_tokens=20, **GREEDY)
    out = model.generate(
        IDS, MASK, strength=0.5, max_new_tokens=20, return_dict_in_generate=True,
        output_logprobs=True, **GREEDY | {"eos_token_id": int(text[0, 12])},
    )  # fmt: skip
    first = (out.sequences[0, 9:] == text[0, 12]).nonzero()[0]
    assert (out.logprobs[0, : int(first) + 1] < 0).all()
    assert (out.logprobs[0, int(first) + 1 :] == 0).all()
    assert (out.sequences[0, 10 + int(first) :] == 0).all()


def test_which_processors_the_sampler_takes_over():
    warpers = [
        TemperatureLogitsWarper(0.5),
        TopKLogitsWarper(5),
        TopPLogitsWarper(0.5),
        MinPLogitsWarper(0.1),
    ]
    penalty = RepetitionPenaltyLogitsProcessor(2.0)
    rest, filters = split_processors(LogitsProcessorList([penalty, *warpers]))
    assert list(rest) == [penalty]
    assert filters == {"temperature": 0.5, "top_k": 5, "top_p": 0.5, "min_p": 0.1}
    rest, filters = split_processors(LogitsProcessorList([warpers[0], penalty, warpers[1]]))
    assert list(rest) == [warpers[0], penalty] and filters == {"top_k": 5}
    # Top-p before top-k is another distribution.
    rest, filters = split_processors(LogitsProcessorList([warpers[2], warpers[1]]))
    assert list(rest) == [warpers[2]] and filters == {"top_k": 5}
    rest, filters = split_processors(LogitsProcessorList([warpers[1], penalty]))
    assert len(rest) == 2 and filters == {}
    at_least_two = TopPLogitsWarper(0.5, min_tokens_to_keep=2)
    assert split_processors(LogitsProcessorList([at_least_two]))[1] == {}
    filled = TopKLogitsWarper(5, filter_value=-1e4)
    assert split_processors(LogitsProcessorList([filled]))[1] == {}


def test_logits_from_which_nothing_can_be_drawn(model):
    def broken(ids, logits):
        logits[1] = float("nan") if ids.shape[1] > 11 else logits[1]
        return logits

    with pytest.raises(ValueError, match="no token can be drawn in row 1"):
        model.generate(
            IDS, MASK, strength=0.5, max_new_tokens=9, logits_processor=[broken], **GREEDY
        )


# Randomness.


def test_an_int_seed_is_reproducible_whatever_the_batch(model):
    draw = {"strength": 0.5, "max_new_tokens": 30, **DRAW}
    first = model.generate(IDS, MASK, seed=7, **draw)
    assert torch.equal(first, model.generate(IDS, MASK, seed=7, **draw))
    assert torch.equal(first[:2], model.generate(IDS[:2], MASK[:2], seed=7, **draw))
    assert not torch.equal(first, model.generate(IDS, MASK, seed=8, **draw))
    same = model.generate(IDS[:1].repeat(3, 1), seed=7, **draw)
    assert len({tuple(row) for row in same.tolist()}) == 3


def test_a_seed_for_each_row(model):
    draw = {"strength": [0.5, 0.2, 1.0], "max_new_tokens": 30, **DRAW}
    seeds = torch.tensor([3, -5, 2**62])
    all_rows = model.generate(IDS, MASK, seed=seeds, **draw)
    order = [2, 0]
    draw["strength"] = [1.0, 0.5]
    some = model.generate(IDS[order], MASK[order], seed=seeds[order], **draw)
    assert torch.equal(some, all_rows[order])


def test_without_a_seed_the_global_generator_decides(model):
    draw = {"strength": 0.5, "max_new_tokens": 20, **DRAW}
    torch.manual_seed(3)
    first, second = (model.generate(IDS, MASK, **draw) for _ in range(2))
    torch.manual_seed(3)
    assert torch.equal(first, model.generate(IDS, MASK, **draw))
    assert not torch.equal(first, second)


def test_several_answers_to_a_prompt(model):
    draw = {"strength": [0.5, 0.0, 1.5], "max_new_tokens": 20, **DRAW}
    seeds = torch.tensor([3, 4, 5])
    many = model.generate(IDS, MASK, seed=seeds, num_return_sequences=4, **draw)
    assert many.shape == (12, 29)
    assert torch.equal(many[:, :9], IDS.repeat_interleave(4, 0))
    assert all(len({tuple(r) for r in many[4 * i : 4 * i + 4].tolist()}) == 4 for i in range(3))
    draw["strength"] = 1.5
    last = model.generate(IDS[2:], MASK[2:], seed=seeds[2:], num_return_sequences=4, **draw)
    assert torch.equal(last, many[8:])
    greedy = model.generate(IDS, MASK, strength=[0.5, 0.0, 1.5], max_new_tokens=20, **GREEDY)
    with pytest.raises(ValueError, match="num_return_sequences"):  # as transformers has it
        model.generate(IDS, MASK, num_return_sequences=2, max_new_tokens=3, **GREEDY)
    assert greedy.shape == (3, 29)


# Caches.


@pytest.mark.parametrize("kind", ["llama", "gpt2", "gemma2"])
def test_static_cache(kind):
    model = make_model(kind)
    for strength, rows in ((0.5, 3), (0.5, 2), ([0.0, 0.4, 2.0], 3), (1.0, 3)):
        options = {"strength": strength, "max_new_tokens": 24, **GREEDY}
        expected = model.generate(IDS[:rows], MASK[:rows], **options)
        got = model.generate(IDS[:rows], MASK[:rows], cache_implementation="static", **options)
        assert torch.equal(got, expected)


@pytest.mark.parametrize("backend", ["eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_compiled_step(backend, model):
    torch.compiler.reset()
    config = CompileConfig(backend=backend, mode=None, fullgraph=True)
    for strength, rows in ((0.5, 3), ([0.0, 0.4, 2.0], 3), (1.0, 3)):
        options = {"strength": strength, "max_new_tokens": 24, **GREEDY}
        expected = model.generate(IDS[:rows], MASK[:rows], **options)
        got = model.generate(
            IDS[:rows], MASK[:rows], cache_implementation="static", compile_config=config, **options
        )
        assert torch.equal(got, expected)
    compiled = model.streams((None, "default"))._compiled
    assert compiled[0] == config


def test_one_stream_runs_where_one_counts():
    """m = 0 is the price of plain LoRA, strength 0 that of the base."""
    model = make_model()
    model.generate(IDS, MASK, max_new_tokens=1, **GREEDY)  # the first tries what the base can do
    rows = []
    layer = model.hf_model.base_model.layers[0]
    hook = layer.register_forward_hook(lambda m, args, out: rows.append(len(args[0])))
    for strength in (None, 1.0, 0.0, [1.0, 1.0, 1.0]):
        model.generate(IDS, MASK, strength=strength, max_new_tokens=3, **GREEDY)
    hook.remove()
    assert set(rows) == {3}
    base = make_base().generate(IDS, attention_mask=MASK, max_new_tokens=24, **GREEDY)
    mixed = model.generate(IDS, MASK, strength=[0.0, 1.0, 0.0], max_new_tokens=24, **GREEDY)
    assert torch.equal(mixed[[0, 2]], base[[0, 2]])
