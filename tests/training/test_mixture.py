"""A trainer on several data sets: in forms of their own, the same again after a resume."""

import pytest
import torch
from datasets import Dataset

from tests.tiny_text import preference_rows
from tests.training.tiny_trainer import trainer


def parts():
    """Messages, and the same as text, which do not fit into one table."""
    rows = preference_rows(14)
    text = [
        {
            "prompt": row["prompt"][-1]["content"] + " ",
            "chosen": row["chosen"][-1]["content"],
            "rejected": row["rejected"][-1]["content"],
        }
        for row in rows[8:]
    ]
    return {"messages": Dataset.from_list(rows[:8]), "text": Dataset.from_list(text)}


def lora(run):
    named = run.model.named_parameters()
    return torch.cat([p.detach().flatten() for name, p in named if "lora_" in name])


def test_a_mixture_is_resumed_as_it_was(tmp_path, tiny_tokenizer, caplog):
    how = {"data_weights": [1, 2], "save_strategy": "steps", "save_steps": 2, "max_steps": 4}
    run = trainer(tmp_path, tiny_tokenizer, data=parts(), moved=True, **how)
    taken = [tuple(row["prompt_ids"]) for row in run.train_dataset]
    assert "pairs an epoch, of data sets of {'messages': 8, 'text': 6}" in caplog.text
    assert len(taken) > 14
    run.train()
    listed = list(parts().values())
    again = trainer(tmp_path, tiny_tokenizer, data=listed, moved=True, **how)
    assert [tuple(row["prompt_ids"]) for row in again.train_dataset] == taken
    again.train(str(tmp_path / "out" / "checkpoint-2"))
    assert torch.equal(lora(again), lora(run))
    other = trainer(tmp_path, tiny_tokenizer, data=parts(), data_seed=7, **how)
    assert [tuple(row["prompt_ids"]) for row in other.train_dataset] != taken


def test_by_length_and_as_streams(tmp_path, tiny_tokenizer):
    how = {"data_weights": [1, 1], "train_sampling_strategy": "group_by_length"}
    run = trainer(tmp_path, tiny_tokenizer, data=parts(), **how)
    assert "length" in run.train_dataset.column_names
    run.train()
    streams = [part.to_iterable_dataset() for part in parts().values()]
    run = trainer(tmp_path, tiny_tokenizer, data=streams, data_weights=[1, 1])
    run.train()
    assert run.state.global_step == 3


def test_what_is_no_mixture(tmp_path, tiny_tokenizer):
    several = list(parts().values())
    for data, config, what in (
        (several, {"data_weights": [1]}, "data_weights: .* got 1 for 2 data sets"),
        (several[0], {"data_weights": [1]}, "data_weights: .* got 1 for one data set"),
        (several, {"data_weights": [1, 0]}, "data_weights: expected a number above 0"),
        (several, {"data_stopping_strategy": "first_exhausted"}, "no effect without data_weights"),
        (
            several,
            {"data_weights": [1, 1], "data_stopping_strategy": "all"},
            "data_stopping_strategy: expected",
        ),
    ):
        with pytest.raises(ValueError, match=what):
            trainer(tmp_path, tiny_tokenizer, data=data, **config)
    with pytest.raises(TypeError, match=r"expected one data set, got a list .*data_weights"):
        trainer(tmp_path, tiny_tokenizer, data=several)
    streams = [one.to_iterable_dataset() for one in several]
    with pytest.raises(ValueError, match=r"precompute_base: .* a stream"):
        trainer(tmp_path, tiny_tokenizer, data=streams, data_weights=[1, 1], precompute_base=True)
