"""evaluate and predict take what the constructor takes: raw or tokenised pairs, dicts, streams."""

import pytest
import torch
from datasets import Dataset, DatasetDict, IterableDataset

from qadapter import QAdapterConfig, QAdapterTrainer
from tests.tiny_models import make_model
from tests.tiny_text import preference_rows
from tests.training.tiny_trainer import trainer

PAIRS = 5  # as many as `trainer` evaluates on


@pytest.fixture
def raw():
    return Dataset.from_list(preference_rows(PAIRS))


@pytest.fixture
def run(tmp_path, tiny_tokenizer):
    return trainer(tmp_path, tiny_tokenizer, moved=True, per_device_eval_batch_size=2)


def figures(metrics, prefix="eval"):
    """Without those of time."""
    return {
        name.removeprefix(f"{prefix}_"): value
        for name, value in metrics.items()
        if not any(word in name for word in ("time", "second", "epoch"))
    }


def test_any_form_of_the_same_pairs(run, raw):
    want = figures(run.evaluate())
    assert len(want) > 10 and want["loss"] > 0
    tokenised = run.eval_dataset
    streams = raw.to_iterable_dataset(), tokenised.to_iterable_dataset()
    for data in (raw, tokenised, *streams):
        assert figures(run.evaluate(data)) == want
    metrics = run.evaluate({"a": raw, "b": tokenised, "c": streams[0]})
    for name in "abc":
        of_one = {k: v for k, v in metrics.items() if k.startswith(f"eval_{name}_")}
        assert figures(of_one, f"eval_{name}") == want
    assert figures(run.predict(raw).metrics, "test") == want
    assert figures(run.evaluate(DatasetDict({"x": raw})), "eval_x") == want


def test_predictions_are_the_rewards(run, raw):
    made = run.predict(raw)
    assert made.predictions.shape == (PAIRS, 2) and made.label_ids.tolist() == [0] * PAIRS
    means = made.predictions.mean(0)
    assert means[0] == pytest.approx(made.metrics["test_rewards/chosen"], rel=1e-5)
    assert means[1] == pytest.approx(made.metrics["test_rewards/rejected"], rel=1e-5)
    assert run.predict(raw.to_iterable_dataset()).predictions.shape == (PAIRS, 2)
    run.args.prediction_loss_only = True
    alone = run.evaluation_loop(run.get_eval_dataloader(), "", metric_key_prefix="eval")
    assert alone.predictions is None


def test_metrics_of_ones_own(tmp_path, tiny_tokenizer):
    def accuracy(prediction):
        right = prediction.predictions.argmax(1) == prediction.label_ids
        return {"mine": right.mean()}

    run = QAdapterTrainer(
        make_model(),
        QAdapterConfig(str(tmp_path), report_to="none", disable_tqdm=True, use_cpu=True),
        eval_dataset={"a": Dataset.from_list(preference_rows(PAIRS))},
        processing_class=tiny_tokenizer,
        compute_metrics=accuracy,
    )
    metrics = run.evaluate()
    assert metrics["eval_a_mine"] == metrics["eval_a_rewards/accuracies"]


def test_a_stream_is_counted_in_pairs(run, raw):
    for data in (raw, raw.to_iterable_dataset()):
        loop = run.evaluation_loop(run.get_eval_dataloader(data), "", metric_key_prefix="eval")
        assert loop.num_samples == PAIRS


def test_loaders_that_are_kept_are_not_those_of_other_data(tmp_path, tiny_tokenizer, raw):
    run = trainer(
        tmp_path,
        tiny_tokenizer,
        moved=True,
        dataloader_num_workers=1,
        dataloader_persistent_workers=True,
    )
    own = figures(run.evaluate())
    other = figures(run.evaluate(raw.select([0])))
    assert other["logps/chosen"] != own["logps/chosen"]
    assert figures(run.evaluate()) == own


def test_training_on_a_stream(tmp_path, tiny_tokenizer):
    """The same updates as on the data set in its own order."""
    stream = Dataset.from_list(preference_rows(12)).to_iterable_dataset()
    runs = []
    for data in (stream, None):
        run = trainer(
            tmp_path,
            tiny_tokenizer,
            moved=True,
            train_sampling_strategy="random" if data else "sequential",
            data=data,
        )
        run.train()
        runs.append([log["loss"] for log in run.state.log_history if "loss" in log])
    assert len(runs[0]) == 3 and runs[0] == runs[1]


def test_a_stream_drops_long_prompts_or_says_which(tmp_path, tiny_tokenizer):
    rows = preference_rows(6)
    rows[4]["prompt"][0]["content"] = "tell me " * 30
    stream = Dataset.from_list(rows).to_iterable_dataset()
    run = trainer(tmp_path, tiny_tokenizer, max_length=40)
    with pytest.raises(ValueError, match="row 4: the prompt has"):
        run.evaluate(stream)
    run.args.drop_long_prompts = True
    loop = run.evaluation_loop(run.get_eval_dataloader(stream), "", metric_key_prefix="eval")
    assert loop.num_samples == 5


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"precompute_base": True}, "precompute_base: expected a data set with a length"),
        ({"train_sampling_strategy": "group_by_length"}, "train_sampling_strategy: a stream"),
    ],
)
def test_what_a_stream_cannot_have(tmp_path, tiny_tokenizer, given, message):
    stream = Dataset.from_list(preference_rows(4)).to_iterable_dataset()
    with pytest.raises(ValueError, match=message):
        trainer(tmp_path, tiny_tokenizer, data=stream, **given)


def test_data_that_is_none(tmp_path, tiny_tokenizer, run, raw):
    with pytest.raises(TypeError, match="train_dataset: expected one data set, got a dict"):
        trainer(tmp_path, tiny_tokenizer, data=DatasetDict({"train": raw}))
    with pytest.raises(TypeError, match="test_dataset: expected one data set, got a dict"):
        run.predict({"a": raw})
    with pytest.raises(TypeError, match=r"expected a datasets\.Dataset"):
        run.evaluate(preference_rows(2))
    with pytest.raises(ValueError, match="missing column"):
        run.evaluate(Dataset.from_list([{"text": "a"}]).to_iterable_dataset())
    with pytest.raises(ValueError, match="without rows"):
        run.evaluate(IterableDataset.from_generator(lambda: iter(())))
    with pytest.raises(ValueError):
        run.evaluate(Dataset.from_list([]))


# What a model has no position and no embedding for.


def test_a_text_longer_than_the_positions(tmp_path, tiny_tokenizer):
    rows = preference_rows(3)
    rows[1]["rejected"][0]["content"] = "very " * 300
    data = Dataset.from_list(rows)
    message = "pair 1 of the tokenised training data has .* positions for 256: max_length=256"
    with pytest.raises(ValueError, match=message):
        trainer(tmp_path, tiny_tokenizer, model=make_model("gpt2"), data=data)
    stream = data.to_iterable_dataset()
    run = trainer(tmp_path, tiny_tokenizer, model=make_model("gpt2"), max_length=256, data=data)
    run.train()
    run.args.max_length = 1024
    with pytest.raises(ValueError, match=r"pair 1 of the tokenised evaluation data has .* tokens"):
        run.evaluate(stream)
    # Positions that are computed have no such end.
    trainer(tmp_path, tiny_tokenizer, model=make_model("llama"), data=data).train()


def test_an_id_without_an_embedding(tmp_path, tiny_tokenizer):
    from qadapter.training import evaluation
    from tests.tiny_models import make_base
    from tests.tiny_text import word_tokenizer

    tokenizer = word_tokenizer()
    from qadapter import QAdapterModel

    model = QAdapterModel.from_base(make_base("llama", vocab=len(tokenizer)))
    data = Dataset.from_list(preference_rows(3))
    want = evaluation.evaluate_preferences(model, tokenizer, data, progress=False)
    # A padding token of its own is only padding: the same figures, packed or not.
    tokenizer.add_special_tokens({"pad_token": "[PAD]"})
    assert tokenizer.pad_token_id == model.config.vocab_size
    got = evaluation.evaluate_preferences(model, tokenizer, data, progress=False)
    assert got == want
    for packing in (True, False):
        trainer(tmp_path, tokenizer, model=model, packing=packing).train()
    # A word of the data is not.
    tokenizer.add_tokens(["platypus"])
    rows = preference_rows(3)
    rows[2]["chosen"][0]["content"] = "a platypus"
    data = Dataset.from_list(rows)
    message = "pair 2 of the tokenised .* data has the token id 65, but .* embedding has 64 rows"
    with pytest.raises(ValueError, match=message):
        trainer(tmp_path, tokenizer, model=model, data=data)
    with pytest.raises(ValueError, match=message):
        evaluation.evaluate_preferences(model, tokenizer, data, progress=False)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"batch_size": 0}, "batch_size: expected an integer of 1 or more, got 0"),
        ({"batch_size": 1.5}, "batch_size: expected an integer"),
        ({"max_length": 1}, "max_length: expected an integer of 2 or more"),
        ({"dataset": Dataset.from_list(preference_rows(2)).to_iterable_dataset()}, "got a stream"),
        ({"dataset": Dataset.from_list(preference_rows(2)).select([])}, "found no rows"),
    ],
)
def test_what_cannot_be_evaluated_is_named(tiny_tokenizer, given, message):
    from qadapter.training import evaluation

    given = {"dataset": Dataset.from_list(preference_rows(2)), "progress": False, **given}
    for evaluate in (evaluation.evaluate_preferences, evaluation.evaluate_forgetting):
        with pytest.raises((ValueError, TypeError), match=message):
            evaluate(make_model(), tiny_tokenizer, **given)


def test_answers_of_a_tokenizer_with_a_padding_token_of_its_own():
    from qadapter import QAdapterModel
    from qadapter.text.answers import answer
    from tests.tiny_models import make_base
    from tests.tiny_text import word_tokenizer

    tokenizer = word_tokenizer()
    torch.manual_seed(0)
    model = QAdapterModel.from_base(make_base("llama", vocab=len(tokenizer)))
    prompts = [tokenizer("a cat").input_ids, tokenizer("tell me about the big dog").input_ids]
    greedy = {"max_new_tokens": 6, "do_sample": False}
    want = answer(model, tokenizer, prompts, **greedy)
    tokenizer.add_special_tokens({"pad_token": "[PAD]"})
    assert answer(model, tokenizer, prompts, **greedy) == want
