"""Rows that end before others: the text is transformers' own, and what each row gives alone."""

import pytest
import torch
from transformers import (
    EosTokenCriteria,
    GenerationConfig,
    LogitsProcessor,
    StoppingCriteria,
    WatermarkingConfig,
)

from tests.tiny_models import make_base, make_model

IDS = torch.randint(5, 97, (4, 9), generator=torch.Generator().manual_seed(2))
MASK = torch.ones_like(IDS)
MASK[1, :4] = 0
MASK[2, :2] = 0
NEW = 16
GREEDY = {"do_sample": False, "pad_token_id": 0, "max_new_tokens": NEW}


@pytest.fixture(scope="module")
def model():
    return make_model()


@pytest.fixture(scope="module")
def base():
    return make_base()


class Rows:
    """How many rows a layer sees, forward by forward."""

    def __init__(self, model):
        self.seen = []
        layer = model.hf_model.base_model.layers[-1]
        self.hook = layer.register_forward_hook(lambda m, args, out: self.seen.append(len(args[0])))

    def __enter__(self):
        return self.seen

    def __exit__(self, *_):
        self.hook.remove()


def ends(generate, **options):
    """Two end tokens that end two rows of the batch at different times, and not all."""
    free = generate(eos_token_id=None, **options)[:, 9:]
    for first in range(2, 8):
        for row in range(4):
            eos = [int(free[row, first]), int(free[(row + 1) % 4, first + 6])]
            at = [next((t for t in range(NEW) if int(r[t]) in eos), NEW) for r in free]
            if len(set(at)) > 2 and sorted(at)[1] < 13:
                return eos
    raise AssertionError("no tokens end the rows apart")


SETTINGS = {
    "none": {},
    "repetition penalty": {"repetition_penalty": 1.8},
    "penalty on the prompt": {"encoder_repetition_penalty": 1.5},
    "n-grams": {"no_repeat_ngram_size": 2},
    "watermark": {"watermarking_config": WatermarkingConfig(bias=4.0, seeding_scheme="selfhash")},
    "shortest": {"min_new_tokens": 5},
    "length penalty": {"exponential_decay_length_penalty": (4, 1.1)},
    "bias": {"sequence_bias": [[[20], 3.0], [[8, 9], 3.0]]},
    "banned": {"bad_words_ids": [[5], [6, 7]], "begin_suppress_tokens": [11, 12]},
}


@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS.keys())
def test_at_strength_0_the_text_is_that_of_transformers(model, base, settings):
    def plain(**options):
        return base.generate(IDS, attention_mask=MASK, **GREEDY, **settings, **options)

    eos = ends(lambda **o: base.generate(IDS, attention_mask=MASK, **GREEDY, **o))
    with Rows(model) as rows:
        got = model.generate(IDS, MASK, strength=0.0, eos_token_id=eos, **GREEDY, **settings)
    assert torch.equal(got, plain(eos_token_id=eos))
    assert rows[-1] < 4, "no row has left the batch"
    without = base.generate(IDS, attention_mask=MASK, eos_token_id=eos, **GREEDY)
    assert torch.equal(got, without) == (not settings)


# transformers counts padding in as a part of the prompt where that is penalised: not as alone.
ALONE = [name for name in SETTINGS if name != "penalty on the prompt"]


@pytest.mark.parametrize("settings", ALONE)
def test_every_row_is_what_it_is_alone(model, settings):
    def blend(ids=IDS, mask=MASK, **options):
        return model.generate(ids, mask, strength=0.6, **GREEDY, **options)

    eos = ends(blend)
    options = {"eos_token_id": eos, **SETTINGS[settings]}
    got = blend(**options)
    for row in range(4):
        keep = MASK[row].bool()
        alone = blend(IDS[row : row + 1, keep], MASK[row : row + 1, keep], **options)
        mine = got[row, 9:]
        width = min(len(mine), alone.shape[1] - int(keep.sum()))
        assert torch.equal(mine[:width], alone[0, int(keep.sum()) :][:width])
        assert (mine[width:] == 0).all()


def test_a_sampled_row_does_not_depend_on_those_that_leave(model):
    seeds = torch.tensor([5, 6, 7, 8])
    options = {"strength": 0.6, "max_new_tokens": NEW, "do_sample": True, "pad_token_id": 0}
    options |= {"repetition_penalty": 1.3, "top_k": 20}
    free = model.generate(IDS, MASK, seed=seeds, eos_token_id=None, **options)
    eos = [int(free[0, 12]), int(free[1, 17])]
    with Rows(model) as rows:
        got = model.generate(IDS, MASK, seed=seeds, eos_token_id=eos, **options)
    assert rows[-1] < rows[0]
    for mine, full in zip(got[:, 9:], free[:, 9:], strict=True):
        at = next((t for t in range(NEW) if int(full[t]) in eos), NEW - 1)
        assert torch.equal(mine[: at + 1], full[: len(mine)][: at + 1])


class Apart(StoppingCriteria):
    """Ends row i after 2 + 2 i tokens."""

    def __call__(self, input_ids, scores, **kwargs):
        return torch.tensor([input_ids.shape[1] >= 11 + 2 * i for i in range(len(input_ids))])


@pytest.mark.parametrize("pad", [None, 0])
@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_rows_that_a_criterion_ends_are_written_on_as_in_transformers(kind, pad):
    model, base = make_model(kind), make_base(kind)
    for config in (model.generation_config, base.generation_config):
        config.eos_token_id = config.pad_token_id = None
    options = {"do_sample": False, "max_new_tokens": 12, "pad_token_id": pad}
    want = base.generate(IDS, attention_mask=MASK, stopping_criteria=[Apart()], **options)
    got = model.generate(IDS, MASK, strength=0.0, stopping_criteria=[Apart()], **options)
    assert torch.equal(got, want) and want.shape[1] == 17


def test_with_an_end_token_they_are_padded_as_in_transformers(model, base):
    options = {**GREEDY, "eos_token_id": 96, "stopping_criteria": [Apart()]}
    want = base.generate(IDS, attention_mask=MASK, **options)
    got = model.generate(IDS, MASK, strength=0.0, **options)
    assert torch.equal(got, want)
    assert (got[0, 11:] == 0).all() and (got[3, 11:] != 0).any()


def test_an_end_token_without_a_pad_token_asks_for_one():
    model = make_model()
    model.generation_config.eos_token_id = model.generation_config.pad_token_id = None
    criteria = [EosTokenCriteria(eos_token_id=7)]
    with pytest.raises(ValueError, match="pad_token_id: expected one"):
        model.generate(IDS, MASK, stopping_criteria=criteria, max_new_tokens=3, do_sample=False)


@pytest.mark.parametrize("given", ["object", "base"])
def test_logits_of_all_rows_wherever_they_are_asked_for(given):
    """In generation_config= or the base's own, not only as an argument."""
    model = make_model()
    eos = ends(lambda **o: model.generate(IDS, MASK, strength=0.6, **GREEDY, **o))
    asked = {"return_dict_in_generate": True, "output_logits": True, "output_scores": True}
    want = model.generate(IDS, MASK, strength=0.6, eos_token_id=eos, **GREEDY, **asked)
    if given == "object":
        config = GenerationConfig(eos_token_id=eos, **GREEDY, **asked)
        got = model.generate(IDS, MASK, strength=0.6, generation_config=config)
    else:
        for name, value in asked.items():
            setattr(model.generation_config, name, value)
        got = model.generate(IDS, MASK, strength=0.6, eos_token_id=eos, **GREEDY)
    assert torch.equal(got.sequences, want.sequences)
    for name in ("logits", "scores"):
        assert all(
            torch.equal(a, b) for a, b in zip(getattr(got, name), getattr(want, name), strict=True)
        )
        assert {len(step) for step in getattr(got, name)} == {4}


def test_a_processor_of_the_users_sees_the_whole_batch(model):
    shapes = set()

    class Looks(LogitsProcessor):
        def __call__(self, input_ids, scores):
            shapes.add((len(input_ids), len(scores)))
            return scores

    eos = ends(lambda **o: model.generate(IDS, MASK, strength=0.6, **GREEDY, **o))
    options = {"strength": 0.6, "eos_token_id": eos, **GREEDY}
    got = model.generate(IDS, MASK, logits_processor=[Looks()], **options)
    assert shapes == {(4, 4)}
    assert torch.equal(got, model.generate(IDS, MASK, **options))
