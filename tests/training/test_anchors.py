"""Anchors hold KL down on texts that are not the pairs', by the exact gradient, within a budget;
training with them resumes exactly."""

import copy
import json
from pathlib import Path

import pytest
import torch
from datasets import Dataset, DatasetDict, IterableDataset

from qadapter import QAdapterConfig, QAdapterModel, QAdapterTrainer, reference
from qadapter.training import strength
from qadapter.training.anchors import AnchorControl, AnchorSet, anchor_texts
from tests.tiny_models import make_model
from tests.tiny_text import WORDS
from tests.training.tiny_trainer import trainer

RELEASED = {"alpha_0": 0.01, "center": 0.0, "value_at": "same", "length_norm": "response"}


def anchor_rows(count=12):
    rows = []
    for i in range(count):
        question = f"what is {WORDS[i % 9]} " + "very " * (i % 3) + WORDS[(3 * i) % 20]
        answer = " ".join(WORDS[(5 * i + j) % 30] for j in range(2 + i % 4))
        messages = [
            {"role": "user", "content": question},
            {"role": "assistant", "content": answer},
        ]
        rows.append({"messages": messages, "truncated": i % 2 == 0})
    return rows


def step(run):
    """Loss and gradient of one update."""
    batches = list(run.get_train_dataloader())
    gathered, _ = run.get_batch_samples(iter(batches), len(batches), run.args.device)
    run.model.train()
    run.model.zero_grad()
    total = 0.0
    for batch in gathered:
        loss = run.compute_loss(run.model, batch)
        loss.backward()
        total += float(loss.detach())
    grads = [p.grad.clone() for p in run.model.parameters() if p.grad is not None]
    return total, torch.cat([g.flatten() for g in grads])


def by_hand(run, coef):
    """The same from whole logits of every text alone, in float64."""
    model = copy.deepcopy(run.model).double()
    model.zero_grad()
    hf, kls = model.hf_model, []
    pairs = run._with_anchors(run.train_dataset)
    for number in [n for row in pairs for n in row["anchors"]]:
        anchor = run.anchors.anchors[number]
        ids = torch.tensor([anchor.ids])
        with torch.no_grad(), model.adapter_off():
            base = hf(input_ids=ids).logits[0, anchor.first :]
        q = hf(input_ids=ids).logits[0, anchor.first :]
        kls.append(reference.kl_base_policy(base, q, **model.composition))
    kl = torch.cat(kls)
    (coef * kl.mean()).backward()
    grads = [p.grad for p in model.parameters() if p.grad is not None]
    return kl.mean().item(), torch.cat([g.flatten() for g in grads])


@pytest.mark.parametrize("composition", [{}, RELEASED, {"alpha_0": 0.5, "alpha_tilde": 0.5}])
@pytest.mark.parametrize(
    "how",
    [
        {},
        {"packing": False},
        {"precompute_base": True},
        {"use_logits": True},
        {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 3},
        {"anchors_per_pair": 0.5},
        {"reg_coef": 0.0},
    ],
    ids=lambda how: "-".join(map(str, how)) or "plain",
)
def test_the_gradient_is_that_of_the_definition(tmp_path, tiny_tokenizer, how, composition):
    if "precompute_base" in how and composition:
        how = {**how, "base_hidden_mib": 10.0}
    common = {"moved": True, "rows": 6, "per_device_train_batch_size": 6, **composition, **how}
    plain = trainer(tmp_path / "a", tiny_tokenizer, **common)
    run = trainer(tmp_path / "b", tiny_tokenizer, anchors=anchor_rows(), anchor_coef=3.0, **common)
    (loss, gradient), (without, gradient_without) = step(run), step(plain)
    kl, wanted = by_hand(run, 3.0)
    assert kl > 1e-3
    assert loss - without == pytest.approx(3.0 * kl, rel=2e-3)
    difference = (gradient - gradient_without).double()
    torch.testing.assert_close(difference, wanted, rtol=2e-3, atol=1e-4 * float(wanted.abs().max()))


def test_a_base_with_soft_capped_logits(tmp_path, tiny_tokenizer, caplog):
    run = trainer(
        tmp_path, tiny_tokenizer, model=make_model("gemma2"), rows=6, anchors=anchor_rows(),
        per_device_train_batch_size=6, anchor_coef=3.0,
    )  # fmt: skip
    plain = trainer(
        tmp_path, tiny_tokenizer, model=make_model("gemma2"), rows=6, per_device_train_batch_size=6
    )
    kl, _ = by_hand(run, 3.0)
    assert step(run)[0] - step(plain)[0] == pytest.approx(3.0 * kl, rel=2e-3)
    assert "summed over the logits" in caplog.text


def test_held_out_anchors_are_never_trained_on_and_all_others_equally_often():
    from qadapter.text.anchors import Anchor

    anchors = AnchorSet([Anchor((1, 2, 3), 0)] * 23)
    assert anchors.held_out == [9, 19]
    for share in (0.5, 1.0, 1.7):
        taken = [n for pair in range(420) for n in anchors.of_pair(pair, share)]
        assert len(taken) == pytest.approx(420 * share, abs=1)
        counts = [taken.count(n) for n in range(23)]
        assert counts[9] == counts[19] == 0
        assert max(counts) - min(counts[:9]) <= 1
    assert AnchorSet([Anchor((1, 2), 0)] * 2).held_out == [1]


def test_at_the_start_there_is_nothing_to_hold(tmp_path, tiny_tokenizer):
    run = trainer(tmp_path, tiny_tokenizer, anchors=anchor_rows(), anchor_coef=1.0)
    sums, states = run.anchor_kl()
    assert states.sum() > 0
    assert sums.abs().max() < 1e-5


def logged(run, name):
    return [log[name] for log in run.state.log_history if name in log]


def test_it_holds_kl_down_elsewhere(tmp_path, tiny_tokenizer):
    common = {"anchors": anchor_rows(40), "max_steps": 25, "rows": 40}
    free = trainer(tmp_path / "a", tiny_tokenizer, anchor_coef=1e-6, **common)
    held = trainer(tmp_path / "b", tiny_tokenizer, anchor_coef=10.0, **common)
    for run in (free, held):
        run.train()
    kls = [
        float(sums.sum() / states.sum()) for sums, states in (free.anchor_kl(), held.anchor_kl())
    ]
    assert kls[1] < 0.3 * kls[0]
    assert logged(held, "loss")[-1] < 0.9 * logged(held, "loss")[0]


def test_resume_equals_the_uninterrupted_run(tmp_path, tiny_tokenizer):
    common = {
        "anchors": anchor_rows(24), "rows": 16, "max_steps": 6, "kl_budget": 0.01,
        "save_strategy": "steps", "save_steps": 3,
    }  # fmt: skip
    whole = trainer(tmp_path / "a", tiny_tokenizer, **common)
    whole.train()
    first = trainer(tmp_path / "b", tiny_tokenizer, **common)
    first.train()
    again = trainer(tmp_path / "b", tiny_tokenizer, **common)
    again.train(resume_from_checkpoint=str(tmp_path / "b" / "out" / "checkpoint-3"))
    assert again.state.global_step == 6
    for name in ("anchor/coef", "anchor/kl", "loss"):
        assert logged(again, name) == logged(whole, name), name
    for one, other in zip(whole.model.parameters(), again.model.parameters(), strict=True):
        assert torch.equal(one, other)
    assert again.model.recommended_strength == whole.model.recommended_strength


def test_the_budget_moves_the_coefficient():
    control = AnchorControl(0.0, 0.02)
    control.measured(0.0)
    low = control.coef
    assert low < 1.0
    for _ in range(20):
        control.measured(0.1)
    assert control.coef > 5 * low
    least = AnchorControl(2.0, 0.02)
    for _ in range(20):
        least.measured(0.001)
    assert least.coef == 2.0
    for _ in range(20):
        least.measured(0.1)
    assert least.coef > 4.0
    for _ in range(120):
        control.measured(0.001)
    assert control.coef == pytest.approx(1e-3)
    fixed = AnchorControl(3.0, None)
    fixed.measured(0.5)
    assert (fixed.coef, fixed.kl) == (3.0, 0.5)


def test_a_strength_that_keeps_the_budget_is_saved(tmp_path, tiny_tokenizer, caplog):
    run = trainer(
        tmp_path, tiny_tokenizer, anchors=anchor_rows(60), rows=40, max_steps=15, kl_budget=0.05
    )
    run.train()
    s = run.model.recommended_strength
    assert 0 < s <= strength.LARGEST
    run.save_model()
    config = json.loads((tmp_path / "out" / "qadapter_config.json").read_text())
    assert (config["recommended_strength"], config["kl_budget"]) == (s, 0.05)
    counts = torch.tensor([run.anchors.anchors[n].states for n in run.anchors.held_out])
    kl = run._kl_at_strength()
    assert strength.mean_and_upper(kl(s), counts)[1] <= 0.05
    if s < strength.LARGEST:
        assert strength.mean_and_upper(kl(1.03 * s), counts)[1] > 0.05
    # Rows of cached moments against whole forwards with other alphas.
    torch.testing.assert_close(kl(0.7), run._slow_kl_at_strength(0.7), rtol=1e-3, atol=1e-5)


def test_training_on_without_a_budget_forgets_the_recommendation(tmp_path, tiny_tokenizer):
    model = make_model()
    model.recommended_strength, model.kl_budget = 0.7, 0.02
    trainer(tmp_path, tiny_tokenizer, model=model, max_steps=1).train()
    assert model.recommended_strength is None and model.kl_budget is None


@pytest.mark.parametrize("width", [0.05, 2.0])
def test_strength_by_bisection(width):
    sizes = 1.0 + width * torch.rand(50, generator=torch.Generator().manual_seed(0)).double()
    counts = torch.full((50,), 10)
    found = strength.within_budget(lambda s: 0.2 * sizes * s**2, counts, 0.01)
    assert found.upper <= 0.01 < found.upper * 1.03
    assert found.kl < found.upper
    far = strength.within_budget(lambda s: 1e-6 * sizes * s**2, counts, 0.01)
    assert far.strength == strength.LARGEST


def test_moments_are_kept_and_told_apart(tmp_path, tiny_tokenizer, monkeypatch):
    common = {"anchors": anchor_rows(), "anchor_coef": 1.0}
    run = trainer(tmp_path, tiny_tokenizer, **common)
    made = run.anchors.fields
    files = list((tmp_path / "out" / "base-cache").glob("anchors-*.safetensors"))
    assert len(files) == 1
    again = trainer(tmp_path, tiny_tokenizer, **common)
    monkeypatch.setattr(QAdapterModel, "base_moments", None)
    assert all(torch.equal(value, made[name]) for name, value in again.anchors.fields.items())
    other = trainer(tmp_path, tiny_tokenizer, **{**common, "anchors": anchor_rows(11)})
    with pytest.raises(TypeError):
        other.anchors  # noqa: B018
    files[0].write_bytes(files[0].read_bytes()[:-100])
    with pytest.raises(ValueError, match="is damaged"):
        trainer(tmp_path, tiny_tokenizer, **common).anchors  # noqa: B018


def test_bad_input(tmp_path, tiny_tokenizer):
    for name, value in (("kl_budget", 0.0), ("kl_budget", -1.0), ("anchors_per_pair", 0.0)):
        with pytest.raises(ValueError, match=f"{name}: expected a number above 0"):
            QAdapterConfig(output_dir="x", use_cpu=True, **{name: value})
    with pytest.raises(ValueError, match="anchor_coef: expected 0 or more"):
        QAdapterConfig(output_dir="x", use_cpu=True, anchor_coef=-1.0)
    for name, value in (("anchors_per_pair", 1.0), ("anchor_count", 64), ("anchor_tokens", 32)):
        with pytest.raises(ValueError, match=f"{name}: has no effect without anchor_coef"):
            QAdapterConfig(output_dir="x", use_cpu=True, **{name: value})
        QAdapterConfig(output_dir="x", use_cpu=True, kl_budget=0.1, **{name: value})
    with pytest.raises(ValueError, match="anchor_dataset: has no effect"):
        trainer(tmp_path, tiny_tokenizer, anchors=anchor_rows())
    with pytest.raises(ValueError, match="at least 2"):
        trainer(tmp_path, tiny_tokenizer, anchors=anchor_rows(1), anchor_coef=1.0).anchors  # noqa: B018
    with pytest.raises(ValueError, match="data_collator: with anchors"):
        QAdapterTrainer(
            make_model(),
            QAdapterConfig(output_dir=str(tmp_path), use_cpu=True, kl_budget=0.1, report_to="none"),
            processing_class=tiny_tokenizer,
            data_collator=lambda features: features,
        )
    run = trainer(tmp_path / "c", tiny_tokenizer, anchor_coef=1.0, anchor_count=4, anchor_tokens=4)
    own = [dict(row) for row in run._anchor_rows()]
    moved = {**own[2], "base": {**own[2]["base"], "vocab_size": 5}}
    mixed = trainer(tmp_path / "d", tiny_tokenizer, anchor_coef=1.0, anchors=[own[0], own[1]])
    assert len(mixed.anchors.anchors) == 2
    with pytest.raises(ValueError, match=r"anchor 0: made by another base .*vocab_size"):
        anchor_texts([moved], tiny_tokenizer, max_length=64, eos_token_ids=[2], base=own[0]["base"])
    rows = anchor_rows(3)
    rows[1] = {"question": "why"}
    with pytest.raises(ValueError, match="anchor 1: expected one of the fields text, messages"):
        trainer(tmp_path, tiny_tokenizer, anchors=rows, anchor_coef=1.0).anchors  # noqa: B018


def test_prompts_are_answered_by_the_base_and_nothing_given_is_made_by_it(tmp_path, tiny_tokenizer):
    rows = anchor_rows(3)
    asked = {"messages": rows[0]["messages"][:1]}
    common = {"anchor_coef": 1.0, "anchor_tokens": 5}
    run = trainer(tmp_path / "a", tiny_tokenizer, anchors=[asked, *rows[1:]], **common)
    prompt = tiny_tokenizer.apply_chat_template(asked["messages"], add_generation_prompt=True)
    made = [a for a in run.anchors.anchors if list(a.ids[: a.first + 1]) == prompt["input_ids"]]
    assert len(made) == 1 and 1 <= made[0].states <= 6
    assert len(run.anchors.anchors) == 3
    # anchors.jsonl is all of them or not there: `eval` takes the held-out tenth by its lines
    assert not (tmp_path / "a" / "out" / "anchors.jsonl").exists()
    own = trainer(tmp_path / "b", tiny_tokenizer, anchor_count=7, **common)
    assert len(own.anchors.anchors) == 7
    assert len((tmp_path / "b" / "out" / "anchors.jsonl").read_text().splitlines()) == 7


def test_what_is_there_twice_counts_once(tmp_path, tiny_tokenizer, caplog):
    """Else the held-out tenth would be trained on under other numbers."""
    rows, run = anchor_rows(12), {"anchor_coef": 1.0}
    twice = [row for row in rows for _ in range(2)]
    once = trainer(tmp_path / "a", tiny_tokenizer, anchors=rows, **run).anchors.anchors
    assert trainer(tmp_path / "b", tiny_tokenizer, anchors=twice, **run).anchors.anchors == once
    assert "Left out 12 anchors that were there already" in caplog.text
    # Pairs of one prompt and one chosen answer.
    pairs = [
        {"prompt": "what is a cat", "chosen": chosen, "rejected": rejected}
        for chosen, rejected in (("the cat", "a dog"), ("the cat", "a bird"), ("the bird", "a dog"))
    ]
    made = trainer(tmp_path / "c", tiny_tokenizer, anchors=pairs, **run).anchors.anchors
    assert len(made) == len(set(made)) == 2
    few = trainer(tmp_path / "d", tiny_tokenizer, anchors=twice, anchor_count=5, **run)
    assert few.anchors.anchors == once[:5]
    assert "the first 5 different ones are taken" in caplog.text


def test_a_stream_of_anchors(tmp_path, tiny_tokenizer):
    def without_end():
        while True:
            yield from anchor_rows(12)

    run = trainer(tmp_path, tiny_tokenizer, anchors=anchor_rows(7), anchor_coef=1.0)
    want = run.anchors.anchors
    streamed = trainer(tmp_path, tiny_tokenizer, anchors=anchor_rows(7), anchor_coef=1.0)
    streamed.args.anchor_count = 7
    streamed.anchor_dataset = IterableDataset.from_generator(without_end)
    assert streamed.anchors.anchors == want


@pytest.mark.parametrize(
    ("given", "what"),
    [
        ("conversations.jsonl", "a str"),
        (Path("conversations.jsonl"), "a PosixPath"),
        (DatasetDict(train=Dataset.from_list(anchor_rows(2))), "a DatasetDict of train"),
    ],
)
def test_what_is_no_rows_is_refused(tmp_path, tiny_tokenizer, given, what):
    config = QAdapterConfig(output_dir=str(tmp_path), use_cpu=True, kl_budget=0.1, report_to="none")
    with pytest.raises(TypeError, match=rf"anchor_dataset: expected rows, .* got {what} "):
        QAdapterTrainer(make_model(), config, processing_class=tiny_tokenizer, anchor_dataset=given)


def test_anchors_that_the_model_has_no_positions_or_ids_for(tmp_path, tiny_tokenizer):
    long = [{"text": " ".join(WORDS[(i + j) % 30] for j in range(300))} for i in range(2)]
    run = trainer(tmp_path, tiny_tokenizer, model=make_model("gpt2"), anchors=long, anchor_coef=1.0)
    with pytest.raises(ValueError, match=r"tokenised anchor 0 has 300 tokens, .* for 256"):
        run.anchors  # noqa: B018
    larger = copy.deepcopy(tiny_tokenizer)
    larger.add_tokens([f"<new-{i}>" for i in range(100)])
    rows = [{"text": text} for text in ("what is", "the cat", "what is <new-99>")]
    run = trainer(tmp_path, larger, anchors=rows, anchor_coef=1.0)
    with pytest.raises(ValueError, match=r"tokenised anchor 2 has the token id .* 97 rows"):
        run.anchors  # noqa: B018


def test_a_stream_of_pairs(tmp_path, tiny_tokenizer):
    from tests.tiny_text import preference_rows

    data = Dataset.from_list(preference_rows(12)).to_iterable_dataset()
    run = trainer(tmp_path, tiny_tokenizer, data=data, anchors=anchor_rows(), anchor_coef=2.0)
    run.train()
    assert len(logged(run, "anchor/train_kl")) == 3
