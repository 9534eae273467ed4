"""Preference and KL over strengths are what whole forwards give at each strength alone."""

import copy

import pytest
import torch
from datasets import Dataset

from qadapter import reference
from qadapter.training import evaluation, frontier, plots
from qadapter.training.anchors import anchor_texts
from qadapter.training.strength import mean_and_interval, mean_and_upper
from tests.tiny_models import make_model
from tests.tiny_text import preference_rows

STRENGTHS = [0.25, 1.0, 2.0]
RELEASED = {"alpha_0": 0.01, "center": 0.0}


def texts_of(tokenizer, rows):
    return anchor_texts(rows, tokenizer, max_length=64, eos_token_ids=[tokenizer.eos_token_id])


def logits_alone(model, ids):
    with torch.no_grad():
        with model.adapter_off():
            base = model.hf_model(input_ids=ids).logits[0]
        return base, model.hf_model(input_ids=ids).logits[0]


def by_hand(model, tokenizer, rows, s):
    """KL of every chosen response, accuracy and gain, from whole logits of one text at a time."""
    model = copy.deepcopy(model).double()
    composition = {"alpha_0": 1 / s, "alpha_tilde": 1 / s, "center": model.center}
    prepared = evaluation.prepare(model, tokenizer, Dataset.from_list(rows), 64, True)
    kls, right, gains = [], [], []
    for row in prepared:
        of_policy, of_base, means = [], [], []
        for column in ("chosen", "rejected"):
            prompt, response = list(row["prompt_ids"]), list(row[f"{column}_ids"])
            base, q = logits_alone(model, torch.tensor([prompt + response]))
            states = slice(len(prompt) - 1, len(prompt) + len(response) - 1)
            base, q, actions = base[states], q[states], torch.tensor(response)[:, None]
            policy = (s * (q - model.center * base) + base.log_softmax(-1)).log_softmax(-1)
            if column == "chosen":
                kls.append(reference.kl_base_policy(base, q, **composition).sum())
            of_policy.append(policy.gather(1, actions).sum())
            of_base.append(base.log_softmax(-1).gather(1, actions).sum())
            means.append(of_policy[-1] / len(response))
        gains.append(of_policy[0] - of_policy[1] - of_base[0] + of_base[1])
        right.append(float(means[0] > means[1]))
    return torch.stack(kls), sum(right) / len(right), float(torch.stack(gains).mean())


@pytest.mark.parametrize("kind", ["llama", "gemma2"])
@pytest.mark.parametrize("composition", [{}, RELEASED], ids=["centred", "released"])
def test_the_figures_of_every_strength(tiny_tokenizer, kind, composition):
    model, rows = make_model(kind, **composition), preference_rows(6)
    texts = texts_of(tiny_tokenizer, rows)
    compositions = [model.composition_at(s) for s in STRENGTHS]
    options = {"batch_size": 4, "progress": False}
    kl = frontier.text_kl(model, tiny_tokenizer, texts, compositions, **options)
    data = Dataset.from_list(rows)
    made = frontier.preferences(model, tiny_tokenizer, data, STRENGTHS, max_length=64, **options)
    for number, s in enumerate(STRENGTHS):
        kls, accuracy, gain = by_hand(model, tiny_tokenizer, rows, s)
        torch.testing.assert_close(kl.sums[number], kls, rtol=1e-4, atol=1e-5)
        assert made[number]["accuracy"] == accuracy
        assert made[number]["gain"] == pytest.approx(gain, rel=1e-4, abs=1e-4)
    of_each = evaluation.forgetting_of(model, tiny_tokenizer, data, compositions, progress=False)
    for number, forgotten in enumerate(of_each):
        want = float(kl.sums[number].sum() / kl.states.sum())
        assert forgotten["kl_base_policy"] == pytest.approx(want, rel=1e-4, abs=1e-5)
        assert forgotten["tokens"] == int(kl.states.sum())
    # One alone is that at which the model is set.
    model.set_composition(1 / STRENGTHS[-1], 1 / STRENGTHS[-1], model.center)
    alone = evaluation.evaluate_forgetting(model, tiny_tokenizer, data, progress=False)
    assert alone == of_each[-1]


def test_both_ends_of_the_interval():
    states = torch.full((400,), 10)
    sums = 0.2 + 0.05 * torch.randn(400, dtype=torch.float64)
    mean, low, high = mean_and_interval(sums, states)
    assert mean_and_upper(sums, states) == (mean, high)
    half = 1.96 * float(sums.std()) / 400**0.5 / 10
    assert high - mean == pytest.approx(half, rel=0.15)
    assert mean - low == pytest.approx(half, rel=0.15)


def test_the_picture(tmp_path):
    pytest.importorskip("matplotlib")
    points = [
        {"strength": s, "accuracy": 0.5 + s / 5, "gain": s, "kl_base_policy": k, "kl_low": k / 2,
         "kl_high": 2 * k}
        for s, k in ((0.5, 0.0), (0.8, 0.01), (2.0, 0.2))
    ]  # fmt: skip
    plots.plot_strengths(points, tmp_path / "a.png", "anchors", 0.8, 0.02)
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")
    lines = frontier.table(points, "anchors", 0.8).splitlines()
    assert [line.endswith("recommended") for line in lines] == [False, False, False, True, False]
