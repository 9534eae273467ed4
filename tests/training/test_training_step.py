"""The default step, packed or from a cached base, trains as the plain one on logits."""

import pytest
import torch

from qadapter import QAdapterConfig, QAdapterModel
from qadapter.text.collator import PreferenceCollator
from qadapter.text.packing import PackedPreferenceCollator
from tests.model import tiny_classes
from tests.tiny_models import make_model, perturb
from tests.training.tiny_trainer import trainer


def curve(run):
    run.train()
    return [log["loss"] for log in run.state.log_history if "loss" in log]


def count_passes(monkeypatch, model):
    """How often each stream's trunk runs."""
    counts = {"base": 0, "adapter": 0}
    original = type(model)._stream_hidden

    def counted(self, *args):
        off = self._switches[0]._disable_adapters
        counts["base" if off else "adapter"] += 1
        return original(self, *args)

    monkeypatch.setattr(type(model), "_stream_hidden", counted)
    return counts


SETTINGS = {"moved": True, "max_steps": 6, "bt_scale": 5.0}


@pytest.mark.parametrize("composition", [{}, {"alpha_0": 0.6}])
def test_same_curve_as_on_logits(tmp_path, tiny_tokenizer, composition):
    common = {**SETTINGS, **composition}
    packed = trainer(tmp_path / "a", tiny_tokenizer, **common)
    assert isinstance(packed.data_collator, PackedPreferenceCollator)
    logits = trainer(tmp_path / "b", tiny_tokenizer, use_logits=True, packing=False, **common)
    assert isinstance(logits.data_collator, PreferenceCollator)
    ours, wanted = curve(packed), curve(logits)
    assert ours == pytest.approx(wanted, rel=1e-3)
    kl = [[log["kl"] for log in run.state.log_history if "kl" in log] for run in (packed, logits)]
    assert kl[0] == pytest.approx(kl[1], rel=1e-2)


def test_soft_capped_heads_take_the_logits_path_and_are_padded(tmp_path, tiny_tokenizer, caplog):
    run = trainer(tmp_path, tiny_tokenizer, model=make_model("gemma2"), max_steps=2)
    assert isinstance(run.data_collator, PreferenceCollator)
    assert "padded instead of packed" in caplog.text
    assert len(curve(run)) == 2


def test_with_both_floats_cached_the_base_does_not_run(tmp_path, tiny_tokenizer, monkeypatch):
    plain = curve(trainer(tmp_path / "a", tiny_tokenizer, **SETTINGS))
    run = trainer(tmp_path / "b", tiny_tokenizer, precompute_base=True, **SETTINGS)
    counts = count_passes(monkeypatch, run.model)
    cached = curve(run)
    assert cached == pytest.approx(plain, rel=1e-4)
    precomputing = counts["base"]
    assert counts["adapter"] == 6
    assert (tmp_path / "b" / "out" / "base-cache" / "identity.json").exists()
    # A second run finds everything there, wherever its output goes; evaluation runs the base.
    again = trainer(
        tmp_path / "c", tiny_tokenizer,
        precompute_base=str(tmp_path / "b" / "out" / "base-cache"), **SETTINGS,
    )  # fmt: skip
    assert curve(again) == pytest.approx(plain, rel=1e-4)
    assert counts["base"] == precomputing
    assert "kl" not in again.state.log_history[0]
    assert again.evaluate()["eval_kl"] > 0


def test_other_compositions_keep_hidden_states_within_a_budget(
    tmp_path, tiny_tokenizer, monkeypatch, caplog
):
    common = {**SETTINGS, "alpha_0": 0.6}
    plain = curve(trainer(tmp_path / "a", tiny_tokenizer, **common))
    small = trainer(tmp_path / "b", tiny_tokenizer, precompute_base=True, **common)
    counts = count_passes(monkeypatch, small.model)
    assert curve(small) == pytest.approx(plain, rel=1e-4)
    assert counts["base"] > counts["adapter"] == 6
    assert "every step runs the base" in caplog.text

    enough = trainer(
        tmp_path / "c", tiny_tokenizer, precompute_base=True, base_hidden_mib=1.0, **common
    )
    counts.update(base=0, adapter=0)
    loader = enough.get_train_dataloader()  # computes
    assert counts["base"] > 0 and "base_hidden" in next(iter(loader))
    counts.update(base=0)
    assert curve(enough) == pytest.approx(plain, rel=1e-4)
    assert counts["base"] == 0
    assert enough.state.log_history[0]["kl"] > 0


def test_hidden_states_of_a_config_that_does_not_say_their_size(tmp_path, tiny_tokenizer):
    """Blt's; and its batches are padded."""
    cached = {"precompute_base": True, "base_hidden_mib": 1.0}
    curves = []
    for name, given in {"plain": {}, "cached": cached}.items():
        model = perturb(QAdapterModel.from_base(tiny_classes.make("blt")))
        given = {**SETTINGS, "alpha_0": 0.6, "max_steps": 1, **given}
        run = trainer(tmp_path / name, tiny_tokenizer, model=model, **given)
        curves.append(curve(run))
    assert curves[1] == pytest.approx(curves[0], rel=1e-4)
    assert "base_hidden" in next(iter(run.get_train_dataloader()))


def test_a_cache_of_another_base_is_refused(tmp_path, tiny_tokenizer):
    trainer(tmp_path, tiny_tokenizer, precompute_base=True, max_steps=1).train()
    other = make_model()
    with torch.no_grad():
        other.hf_model.get_output_embeddings().weight[3, 4] += 0.5
    with pytest.raises(ValueError, match="weights"):
        trainer(tmp_path, tiny_tokenizer, model=other, precompute_base=True).train()


def test_a_base_that_cannot_be_cached_is_refused(tmp_path, tiny_tokenizer):
    with pytest.raises(ValueError, match=r"precompute_base: .*got Gemma2"):
        trainer(tmp_path, tiny_tokenizer, model=make_model("gemma2"), precompute_base=True)
    with pytest.raises(ValueError, match="use_logits"):
        trainer(tmp_path, tiny_tokenizer, precompute_base=True, use_logits=True)
    assert QAdapterConfig("x", precompute_base="there").base_cache_dir == "there"


@pytest.mark.parametrize("bf16", [False, True])
@pytest.mark.parametrize("accumulate", [1, 2])
def test_cached_under_autocast_and_accumulation(tmp_path, tiny_tokenizer, bf16, accumulate):
    common = {
        **SETTINGS, "bf16": bf16, "gradient_accumulation_steps": accumulate,
        "per_device_train_batch_size": 4 // accumulate,
    }  # fmt: skip
    plain = curve(trainer(tmp_path / "a", tiny_tokenizer, **common))
    cached = curve(trainer(tmp_path / "b", tiny_tokenizer, precompute_base=True, **common))
    assert cached == pytest.approx(plain, rel=5e-2 if bf16 else 1e-4)


@pytest.mark.slow
def test_torch_compile(tmp_path, tiny_tokenizer):
    plain = curve(trainer(tmp_path / "a", tiny_tokenizer, **SETTINGS))
    compiled = curve(trainer(tmp_path / "b", tiny_tokenizer, torch_compile=True, **SETTINGS))
    assert compiled == pytest.approx(plain, rel=1e-3)
