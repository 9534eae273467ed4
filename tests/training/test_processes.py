"""Two processes take the updates of one on the same pairs, and measure what it measures.

Slow for starting them: one start does all cases.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from safetensors.torch import load_file, save_file

from qadapter.text.collator import PreferenceCollator
from qadapter.text.packing import PackedPreferenceCollator
from qadapter.training.processes import first_pairs
from tests.tiny_text import preference_rows, word_tokenizer
from tests.training.test_anchors import anchor_rows
from tests.training.tiny_trainer import trainer

ROOT = Path(__file__).resolve().parents[2]
# Pairs and anchors differ in length. 9 pairs in updates of 4 leave 1, and no pair at all for the
# second process; 7 and 11 leave it fewer.
CASES = {
    "even": {"rows": 8},
    "one left": {"rows": 9},
    "fewer": {"rows": 11, "base_cache": True},
    "accumulated": {"rows": 7, "gradient_accumulation_steps": 2},
    "padded": {"rows": 9, "packing": False},
    # Of two files, the last batch of which is short, as above.
    "streamed": {"rows": 9, "streamed": True},
    "anchored": {"rows": 8, "anchored": True},
    "anchored, one left": {"rows": 9, "anchored": True, "base_cache": True},
}


def run(folder, processes, rows, anchored=False, base_cache=False, streamed=False, **config):
    """The adapter after one pass, and the last figures: logged, evaluated on 5 pairs, predicted;
    of one process, predicted in float64 too."""
    accumulated = config.get("gradient_accumulation_steps", 1)
    if anchored:
        config |= {"anchors": anchor_rows(), "anchor_coef": 2.0}
    if base_cache:
        config |= {"precompute_base": True}
    if streamed:
        data = Dataset.from_list(preference_rows(rows)).to_iterable_dataset(num_shards=2)
        config |= {"data": data, "max_steps": 3, "train_sampling_strategy": "random"}
    how = {"max_steps": -1, "train_sampling_strategy": "sequential", **config}
    made = trainer(
        folder,
        word_tokenizer(),
        moved=True,
        rows=rows,
        optim="sgd",
        lr_scheduler_type="constant",
        num_train_epochs=1,
        per_device_train_batch_size=4 // processes // accumulated,
        per_device_eval_batch_size=4 // processes,
        reg_coef=0.5,
        **how,
    )
    made.train()
    logged = [line for line in made.state.log_history if "loss" in line][-1]
    figures = {**logged, **made.evaluate()}
    pairs = Dataset.from_list(preference_rows(7))
    predicted = made.predict(pairs).predictions
    streamed = made.evaluate(pairs.to_iterable_dataset(), metric_key_prefix="streamed")
    figures |= {k: v for k, v in streamed.items() if "/" in k or k.endswith("loss")}
    # Of the training KL some rows are taken in each process.
    own = ("runtime", "per_second")
    figures = {k: v for k, v in figures.items() if not k.endswith(own) and k != "kl"}
    weights = [p.detach().flatten() for n, p in made.model.named_parameters() if "lora_" in n]
    weights = torch.cat(weights)
    if processes == 1:
        made.model.double()
        exact = torch.as_tensor(made.predict(pairs).predictions)
        return weights, figures, torch.as_tensor(predicted), exact
    return weights, figures, torch.as_tensor(predicted)


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    """What two processes make of each case."""
    folder = tmp_path_factory.mktemp("two")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    done = subprocess.run(
        [*command, "-m", "tests.training.test_processes", str(folder)],
        env=dict(os.environ, OMP_NUM_THREADS="1"),
        capture_output=True,
        text=True,
        timeout=900,
        cwd=ROOT,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return load_file(folder / "made.safetensors"), json.loads((folder / "made.json").read_text())


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_two_processes_are_as_one(tmp_path, two, name):
    tensors, figures = two[0], two[1][name]
    weights, alone, predicted, exact = run(tmp_path, 1, **CASES[name])
    torch.testing.assert_close(tensors[f"{name} weights"], weights, rtol=0, atol=1e-6)
    # A reward is a sum of differences of logits, and two processes see batches of other shapes:
    # each is as far from float64 as PyTorch's products and sums are.
    rounding = float((predicted - exact).abs().max())
    assert rounding < 1e-4
    torch.testing.assert_close(tensors[f"{name} predicted"], predicted, rtol=0, atol=3 * rounding)
    assert figures.keys() == alone.keys() and "eval_rewards/accuracies" in figures
    for key, value in alone.items():
        assert figures[key] == pytest.approx(value, rel=1e-4, abs=1e-5), key


@pytest.mark.parametrize("collate", [PackedPreferenceCollator(), PreferenceCollator(0)])
def test_the_first_pairs_of_a_batch(collate):
    lengths = ((2, 3, 1), (1, 1, 4), (4, 2, 2))
    features = [
        {"prompt_ids": [1] * p, "chosen_ids": [2] * c, "rejected_ids": [3] * r}
        for p, c, r in lengths
    ]
    batch = collate(features)
    batch["base_lse"] = torch.arange(len(batch["rows"])).float()
    assert first_pairs(batch, 3) is batch and first_pairs(batch, 4) is batch
    for count in (0, 1, 2):
        got, alone = first_pairs(batch, count), collate(features[:count])
        assert torch.equal(got["input_ids"], batch["input_ids"])
        assert torch.equal(got["cu_seqlens"], alone["cu_seqlens"])
        assert got["cu_seqlens"].dtype == batch["cu_seqlens"].dtype
        assert torch.equal(got["actions"], alone["actions"])
        tokens = got["input_ids"].flatten()[got["rows"]]
        assert torch.equal(tokens, alone["input_ids"].flatten()[alone["rows"]])
        assert torch.equal(batch["rows"][got["base_lse"].long()], got["rows"])


if __name__ == "__main__":
    where = Path(sys.argv[1])
    tensors, figures = {}, {}
    for case, settings in CASES.items():
        weights, figures[case], predicted = run(
            where / case, int(os.environ["WORLD_SIZE"]), **settings
        )
        tensors |= {f"{case} weights": weights, f"{case} predicted": predicted}
    if os.environ["RANK"] == "0":
        save_file(tensors, where / "made.safetensors")
        (where / "made.json").write_text(json.dumps(figures))
