"""Each training example runs, its loss falls, and that loss is what the specification says."""

import importlib
import math
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.nn.utils.rnn import pad_sequence

from qadapter import reference
from qadapter.text.collator import PreferenceCollator
from qadapter.text.data import prepare_dataset
from tests.tiny_models import perturb

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"


@pytest.fixture
def example(monkeypatch):
    """Imports an example as it imports its neighbour when it is run."""
    monkeypatch.syspath_prepend(str(EXAMPLES))
    return importlib.import_module


def plain_loss(model, input_ids, attention_mask, sequences):
    """The specification in float64; ``sequences`` lists (position, action) of every response."""
    with torch.no_grad():
        with model.disable_adapter():
            base = model(input_ids=input_ids, attention_mask=attention_mask).logits
        adapter = model(input_ids=input_ids, attention_mask=attention_mask).logits
    at = [(s, position) for s, states in enumerate(sequences) for position, _ in states]
    numbers, positions = (list(column) for column in zip(*at, strict=True))
    actions = torch.tensor([action for states in sequences for _, action in states])
    ends = torch.tensor([0, *(len(states) for states in sequences)]).cumsum(0)
    rows = [logits[numbers, positions].double() for logits in (base, adapter)]
    return reference.qadapter_loss(*rows, actions, ends.int()).loss


def responses(features):
    """Input ids, mask and the (position, action) of each response, token by token."""
    ids, sequences = [], []
    for name in ("chosen", "rejected"):
        for feature in features:
            prompt, answer = feature["prompt_ids"], feature[f"{name}_ids"]
            ids.append(torch.tensor(prompt + answer))
            sequences.append([(len(prompt) - 1 + i, token) for i, token in enumerate(answer)])
    mask = [torch.ones_like(x) for x in ids]
    return pad_sequence(ids, batch_first=True), pad_sequence(mask, batch_first=True), sequences


def falls(losses, least=0.05):
    assert losses[0] == pytest.approx(math.log(2), abs=1e-5)  # a fresh LoRA does nothing
    assert losses[-1] < losses[0] - least, losses


def test_bare_loop(example, capsys):
    module = example("bare_loop")
    falls(module.main(["--steps", "8"]))
    assert re.search(r"tiny: loss 0\.6931 -> 0\.\d+ in 8 steps", capsys.readouterr().out)


def test_anchored_loop(example, capsys):
    module = example("anchored_loop")
    losses = module.main(["--steps", "8"])
    assert losses[-1] < 0.5 * losses[0]
    kls = [float(kl) for kl in re.findall(r"KL on anchors (-?[0-9.]+)", capsys.readouterr().out)]
    assert kls[0] < 1e-5 < max(kls)
    module.COEF = 1000.0
    module.main(["--steps", "8"])
    held = [float(kl) for kl in re.findall(r"KL on anchors (-?[0-9.]+)", capsys.readouterr().out)]
    assert held[-1] < 0.5 * kls[-1]


def test_bare_loop_is_the_specification(example):
    module, common = example("bare_loop"), example("_common")
    model, tokenizer = common.load("tiny")
    perturb(model)
    pairs = prepare_dataset(common.preference_pairs(3), tokenizer, max_length=512)
    got = module.batch_loss(model, PreferenceCollator(0)(list(pairs)))
    expected = plain_loss(model, *responses(list(pairs)))
    assert abs(expected.item() - math.log(2)) > 0.05
    torch.testing.assert_close(got.loss.double(), expected, atol=1e-4, rtol=1e-4)


def test_runs_as_a_script_from_any_folder(tmp_path):
    environment = {**os.environ, "PYTHONPATH": str(EXAMPLES.parent)}
    result = subprocess.run(
        [sys.executable, EXAMPLES / "bare_loop.py", "--steps", "2", "--pairs", "1"],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout.splitlines()[-1].endswith("in 2 steps")
    assert not list(tmp_path.iterdir()), "an example leaves nothing behind"


@pytest.mark.parametrize("name", ["transformers_trainer", "trl_trainer"])
def test_trainer(example, capsys, name):
    if name == "trl_trainer":
        pytest.importorskip("trl", reason='needs TRL: pip install "qadapter[trl]"')
    falls(example(name).main(["--steps", "8"]))
    out = capsys.readouterr().out
    assert re.search(r"tiny: evaluation loss 0\.6931 -> 0\.\d+ in 8 steps", out)


@pytest.mark.parametrize("name", ["transformers_trainer", "trl_trainer"])
def test_trainer_is_the_specification(example, tmp_path, name):
    if name == "trl_trainer":
        pytest.importorskip("trl", reason='needs TRL: pip install "qadapter[trl]"')
    trainer = example(name).make_trainer("tiny", 2, output_dir=str(tmp_path), use_cpu=True)
    perturb(trainer.model)
    trainer.model.eval()
    features = [trainer.train_dataset[i] for i in range(3)]
    got = trainer.compute_loss(trainer.model, trainer.data_collator(features))
    expected = plain_loss(trainer.model, *responses(features))
    assert abs(expected.item() - math.log(2)) > 0.05
    torch.testing.assert_close(got.detach().double(), expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("name", ["transformers_trainer", "trl_trainer"])
def test_gradient_accumulation_averages(example, tmp_path, name):
    if name == "trl_trainer":
        pytest.importorskip("trl", reason='needs TRL: pip install "qadapter[trl]"')
    trainer = example(name).make_trainer(
        "tiny",
        1,
        output_dir=str(tmp_path),
        use_cpu=True,
        max_steps=1,
        learning_rate=1e-3,
        gradient_accumulation_steps=4,
    )
    trainer.train()
    logged = next(entry["loss"] for entry in trainer.state.log_history if "loss" in entry)
    assert logged == pytest.approx(math.log(2), abs=1e-3)


def test_trl_batches_give_the_same_rows(example, tmp_path):
    """Also where responses are cut off: 150 tokens are too few for some of them."""
    pytest.importorskip("trl", reason='needs TRL: pip install "qadapter[trl]"')
    module, common = example("trl_trainer"), example("_common")
    trainer = module.make_trainer("tiny", 2, max_length=150, output_dir=str(tmp_path), use_cpu=True)
    inputs = trainer.data_collator([trainer.train_dataset[i] for i in range(8)])
    length = inputs["attention_mask"].sum(1)
    last = inputs["input_ids"].gather(1, length[:, None] - 1).squeeze(1)
    cut = (length == 150) & (last != trainer.processing_class.eos_token_id)
    assert 0 < cut.sum() < len(cut)
    rows, actions, cu_seqlens = module.states(inputs["input_ids"], inputs["completion_mask"], cut)

    ours = prepare_dataset(common.preference_pairs(8), trainer.processing_class, max_length=150)
    expected = PreferenceCollator(trainer.processing_class.pad_token_id)(list(ours))
    for name, got in {**inputs, "rows": rows, "actions": actions, "cu_seqlens": cu_seqlens}.items():
        if name in expected:
            assert torch.equal(got, expected[name]), name


@pytest.mark.skipif(shutil.which("c++") is None, reason="torch.compile needs a C++ compiler")
def test_compiled_linear(example, capsys):
    losses, error = example("compiled_linear").main(["--steps", "8"])
    falls(losses, least=0.01)
    assert error < 1e-5
    assert "(compiling)" in capsys.readouterr().out
