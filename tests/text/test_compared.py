"""Answers of base and policy with what the adapter changed, against the logits of the streams."""

import pytest
import torch

from qadapter import QAdapterModel
from qadapter.text.compared import _texts, changes, compare, in_pieces
from qadapter.text.prompts import encode_prompts, prompt_ids
from tests.tiny_models import save_two_adapters

WEIGHTS = {"default": 1.0, "two": -0.5}


@pytest.fixture(scope="module")
def model(tmp_path_factory, tiny_tokenizer):
    folder = save_two_adapters(tmp_path_factory.mktemp("models"), tiny_tokenizer, lora_dropout=0.5)
    model = QAdapterModel.from_pretrained(folder / "one")
    model.load_adapter(folder / "two", "two")
    return model.eval()


def logits(model, name, ids):
    """Of one stream, by PEFT's own layers."""
    if name is None:
        with model.peft_model.disable_adapter(), torch.no_grad():
            return model.peft_model(input_ids=ids).logits[0].double()
    model.peft_model.set_adapter(name)
    try:
        with torch.no_grad():
            return model.peft_model(input_ids=ids).logits[0].double()
    finally:
        model.peft_model.set_adapter("default")


@pytest.mark.parametrize("adapters", [None, WEIGHTS], ids=["one", "two"])
def test_changes_are_those_of_the_blend(model, adapters):
    prompt, answer, strength = [5, 9, 11], [7, 20, 31, 8], 0.75
    ids = torch.tensor([[*prompt, *answer]])
    base = logits(model, None, ids)
    moves = [
        weight * (logits(model, name, ids) - base)
        for name, weight in (adapters or {"default": 1.0}).items()
    ]
    expected = (base + strength * sum(moves)).log_softmax(-1) - base.log_softmax(-1)
    rows = torch.arange(len(prompt) - 1, ids.shape[1] - 1)
    model.train()  # what it was before, it is after
    got = changes(model, prompt, answer, strength, adapters)
    assert model.training
    model.eval()
    torch.testing.assert_close(
        torch.tensor(got, dtype=torch.float64), expected[rows, torch.tensor(answer)],
        rtol=0, atol=1e-4,
    )  # fmt: skip
    assert max(map(abs, got)) > 0.1
    assert changes(model, prompt, answer, 0.0, adapters) == [0.0] * len(answer)


def test_answers_are_those_of_generate(model, tiny_tokenizer):
    prompt = prompt_ids(tiny_tokenizer, "tell me about the cat")
    arguments = {"max_new_tokens": 8, "do_sample": False}
    made = compare(model, tiny_tokenizer, prompt, strength=2.0, adapters=WEIGHTS, **arguments)
    inputs = encode_prompts(tiny_tokenizer, ["tell me about the cat"])
    texts = []
    for strength, got in zip((0.0, 2.0), made, strict=True):
        ids = model.generate(**inputs, strength=strength, adapters=WEIGHTS, **arguments)
        new = ids[0, len(prompt) :].tolist()
        texts.append(tiny_tokenizer.decode(new, skip_special_tokens=True))
        assert got.text == texts[-1]
        nats = changes(model, prompt, new, 2.0, WEIGHTS)
        reason = "eos" if new[-1] == tiny_tokenizer.eos_token_id else "length"
        assert got == in_pieces(_texts(tiny_tokenizer, new), nats, reason, len(texts[-1]))
    assert texts[0] != texts[1]


def test_both_answers_are_drawn_with_the_same_noise(model, tiny_tokenizer):
    drawn = {"max_new_tokens": 12, "do_sample": True, "top_k": 0}
    made = [
        compare(model, tiny_tokenizer, [5, 9], strength=s, seed=3, **drawn) for s in (0.0, 0.0, 2.0)
    ]
    assert made[0] == made[1] and made[0][0].text == made[0][1].text
    assert made[2][0].text == made[0][0].text != made[2][1].text


def test_pieces():
    assert in_pieces(["a", " b", ""], [0.5, -1.0, 2.0], "eos", 3) == (
        [("a", 0.5), (" b", -1.0)], 2.0, "eos",
    )  # fmt: skip
    # two tokens of one character; a stop string, which is no part of the answer
    cut = in_pieces(["a", "", "\u00e9", "STOP"], [0.5, 1.0, 2.0, 9.0], "stop", 2)
    assert cut == ([("a", 0.5), ("\u00e9", 3.0)], None, "stop")
    assert in_pieces(["ab", "cd"], [1.0, 2.0], "stop", 3).pieces == [("ab", 1.0), ("c", 2.0)]


def test_characters_of_several_tokens():
    class Bytes:
        def decode(self, ids, skip_special_tokens):
            return bytes(ids).decode(errors="replace")

    text = "h\u00e9!\u4f60"
    texts = _texts(Bytes(), list(text.encode()))
    assert "".join(texts) == text and texts == ["h", "", "\u00e9", "!", "", "", "\u4f60"]
    assert _texts(Bytes(), list("h\u4f60".encode())[:-1])[-1] == "\ufffd"  # cut off in the middle
