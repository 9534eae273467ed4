"""The study's own losses are their plain definitions, and its anchored methods have anchors."""

import tempfile

import pytest
import torch

from benchmarks.quality import data, train
from benchmarks.quality.settings import METHODS, QUICK
from tests.tiny_models import make_base
from tests.tiny_text import preference_rows

ROWS = 8
SMALL = {"pairs": ROWS, "steps": 2, "batch": 4, "micro_batch": 4, "lora_r": 2, "max_length": 64}
SETTINGS = {**QUICK.usual, **SMALL, "warmup_steps": 0, "seed": 0, "noise": 0.0}


@pytest.fixture(scope="module")
def base(tmp_path_factory, tiny_tokenizer):
    folder = tmp_path_factory.mktemp("base")
    make_base("llama", vocab=len(tiny_tokenizer)).save_pretrained(folder)
    tiny_tokenizer.save_pretrained(folder)
    return str(folder)


def trainer_and_batch(method, base, tokenizer, said=()):
    """A trainer whose LoRA has moved, and a batch of its with the totals of an update."""
    settings = {**SETTINGS, **METHODS[method].settings}
    common = {"train_dataset": data.dataset(preference_rows(ROWS)), "processing_class": tokenizer}
    folder = tempfile.mkdtemp()
    trainer = train._own(method, settings, base, folder, common, list(said), folder, False)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, value in trainer.model.named_parameters():
            if "lora_B" in name:
                value.copy_(0.3 * torch.randn(value.shape, generator=generator))
    batches, _ = trainer.get_batch_samples(iter(trainer.get_train_dataloader()), 1, "cpu")
    return trainer, batches[0], settings


def plain(trainer, batch):
    """log pi / base of the actions, log pi, and KL(base || policy), float64 [N]; the ends."""
    own, head = trainer.model, trainer.model.hf_model.get_output_embeddings().weight.double()
    apart = ("input_ids", "rows", "actions", "cu_seqlens", "denominators", "anchors")
    arguments = {k: v for k, v in batch.items() if k not in (*apart, *train.UNIQUE)}
    rows = batch["rows"]
    if "anchors" in batch:
        rows = torch.cat((rows, batch["anchors"]["rows"]))
    with torch.no_grad():
        streams = own._base_hidden, own._stream_hidden
        base, q = (
            (stream(batch["input_ids"], rows, arguments).double() @ head.T).log_softmax(-1)
            for stream in streams
        )
    kl = (base.exp() * (base - q)).sum(-1)
    count, taken = len(batch["actions"]), batch["actions"][:, None]
    logp, of_base = (z[:count].gather(1, taken)[:, 0] for z in (q, base))
    return logp - of_base, logp, kl, batch["cu_seqlens"].diff().tolist()


def per_pair(values, sizes):
    return torch.stack([part.sum() for part in values.split(sizes)]).chunk(2)


def test_dpo_with_nll_is_the_sum_of_its_terms(base, tiny_tokenizer):
    trainer, batch, settings = trainer_and_batch("dpo_nll", base, tiny_tokenizer)
    ratio, logp, _, sizes = plain(trainer, batch)
    chosen, rejected = per_pair(ratio, sizes)
    dpo = -torch.nn.functional.logsigmoid(settings["beta"] * (chosen - rejected)).mean()
    tokens = sum(sizes[: len(sizes) // 2])
    nll = -logp[:tokens].sum() / tokens
    loss = trainer.compute_loss(trainer.model, batch)
    assert float(loss) == pytest.approx(float(dpo + nll), abs=1e-5) and float(nll) > 1


def test_tdpo_is_its_equation(base, tiny_tokenizer):
    trainer, batch, settings = trainer_and_batch("tdpo", base, tiny_tokenizer)
    ratio, _, kl, sizes = plain(trainer, batch)
    (chosen, rejected), (kl_chosen, kl_rejected) = (per_pair(v, sizes) for v in (ratio, kl))
    further = settings["tdpo_alpha"] * settings["beta"] * (kl_rejected - kl_chosen)
    margins = settings["beta"] * (chosen - rejected) - further
    loss = trainer.compute_loss(trainer.model, batch)
    expected = -torch.nn.functional.logsigmoid(margins).mean()
    assert float(loss) == pytest.approx(float(expected), abs=1e-5)
    assert further.abs().max() > 1e-3 and loss.requires_grad


def test_selfaug_holds_the_prompts_to_the_base(base, tiny_tokenizer):
    trainer, batch, settings = trainer_and_batch("selfaug", base, tiny_tokenizer)
    prompts = [tuple(row["prompt_ids"]) for row in trainer.train_dataset]
    assert [(anchor.ids, anchor.first) for anchor in trainer.anchors.anchors] == [
        (prompt, 0) for prompt in prompts
    ]
    *_, kl, _ = plain(trainer, batch)
    of_prompts = kl[len(batch["actions"]) :].mean()
    loss = trainer.compute_loss(trainer.model, batch)
    trainer.anchor_control.coef = 0.0
    without = trainer.compute_loss(trainer.model, batch)
    expected = settings["anchor_coef"] * float(of_prompts)
    assert float(loss - without) == pytest.approx(expected, abs=1e-4) and expected > 1e-2


@pytest.mark.parametrize("method", ["anchored", "anchored_coef", "dpo_anchor"])
def test_anchored_methods_hold_the_anchors(method, base, tiny_tokenizer):
    anchors = [{"text": row["prompt"][0]["content"]} for row in preference_rows(7)]
    trainer, batch, settings = trainer_and_batch(method, base, tiny_tokenizer, anchors)
    assert trainer.args.kl_budget == (settings["kl_budget"] or None)
    assert trainer.args.reg_coef == (0.0 if method == "dpo_anchor" else 0.1)
    assert len(batch["anchors"]["rows"]) > 0 and trainer.args.anchored
