"""KL between the blend of logits and an exported adapter, against the two-stream model's own."""

import pytest
import torch
from peft import LoraConfig, PeftModel
from transformers import AutoModelForCausalLM

from qadapter import QAdapterModel, export_adapter
from qadapter.text.anchors import Anchor
from qadapter.training import export_check, frontier
from tests.tiny_models import make_base, perturb

TEXTS = [
    Anchor(
        tuple(torch.randint(5, 97, (n,), generator=torch.Generator().manual_seed(n)).tolist()), f
    )
    for n, f in ((9, 3), (14, 0), (6, 5))
]


@pytest.fixture(scope="module", params=["llama", "gemma2"])
def folder(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    make_base(request.param).save_pretrained(folder / "base")
    std = 1.0 if request.param == "gemma2" else 0.1
    for name, sign in (("one", std), ("two", -std)):
        lora = LoraConfig(r=4)
        model = perturb(QAdapterModel.from_pretrained(folder / "base", lora_config=lora), sign)
        model.save_pretrained(folder / name)
    return folder


@pytest.mark.parametrize("merge", [False, True])
def test_figures_are_those_of_the_policies(folder, tmp_path, merge, tiny_tokenizer):
    out = export_adapter(folder / "one", tmp_path / "out", strength=0.5, merge=merge)
    adapters = export_check.Adapters({str(folder / "one"): 1.0})
    kl = adapters.kl(out, 0.5, TEXTS, progress=False)
    model = QAdapterModel.from_pretrained(folder / "one", dtype=torch.float32)
    compositions = [model.composition_at(0.5)]
    ours = frontier.text_kl(model, tiny_tokenizer, TEXTS, compositions, progress=False)
    torch.testing.assert_close(kl.base_blend, ours.sums[0], rtol=1e-4, atol=1e-5)
    assert kl.states.tolist() == ours.states.tolist() == [6, 14, 1]

    scaled = AutoModelForCausalLM.from_pretrained(out if merge else folder / "base")
    scaled = scaled if merge else PeftModel.from_pretrained(scaled, str(out))
    for number, text in enumerate(TEXTS):
        ids = torch.tensor([text.ids])
        with torch.no_grad():
            q = scaled.eval()(input_ids=ids).logits[0, text.first :].double().log_softmax(-1)
            both = model(ids)
            z_b, z_q = (z.double()[text.first :] for z in (both.base_logits, both.q_logits))
        for found, p in (
            (kl.base_exported, z_b.log_softmax(-1)),
            (kl.blend_exported, (0.5 * z_b + 0.5 * z_q).log_softmax(-1)),
        ):
            expected = (p.exp() * (p - q)).sum()
            torch.testing.assert_close(found[number], expected, rtol=1e-3, atol=1e-5)
    assert 1e-4 < kl.blend_exported.sum() < 0.5 * kl.base_blend.sum()


@pytest.mark.parametrize(
    ("strength", "weights"), [(1, {"one": 1.0}), (0, {"one": 1.0}), (2, {"two": 0.5})]
)
def test_there_is_no_difference_where_there_must_be_none(folder, tmp_path, strength, weights):
    given = {str(folder / name): weight for name, weight in weights.items()}
    out = export_adapter(given, tmp_path / "out", strength=strength)
    kl = export_check.Adapters(given).kl(out, strength, TEXTS, progress=False)
    assert kl.blend_exported.abs().max() < 1e-5
    assert (kl.base_blend.sum() > 0.01) == (strength > 0)
    text = export_check.table(kl, "some text")
    assert "some text: 3 texts, 21 tokens" in text and "KL(blend || exported)" in text
    assert ("% of KL(base || blend)" in text) == (strength > 0)


def test_several_adapters(folder, tmp_path):
    given = {str(folder / "one"): 1.5, str(folder / "two"): 0.5}
    out = export_adapter(given, tmp_path / "out", strength=0.5)
    kl = export_check.Adapters(given).kl(out, 0.5, TEXTS, progress=False)
    model = QAdapterModel.from_pretrained(folder / "one", dtype=torch.float32)
    model.load_adapter(folder / "two", "two")
    for number, text in enumerate(TEXTS):
        ids = torch.tensor([text.ids])
        streams = []
        for name in ("default", "two"):
            model.peft_model.set_adapter(name)
            streams.append(model(ids))
        z_b = streams[0].base_logits.double()
        one, two = (stream.q_logits.double() for stream in streams)
        p = z_b.log_softmax(-1)
        mixed = (z_b + 0.5 * (1.5 * (one - z_b) + 0.5 * (two - z_b))).log_softmax(-1)
        expected = (p.exp() * (p - mixed)).sum(-1)[text.first :].sum()
        torch.testing.assert_close(kl.base_blend[number], expected, rtol=1e-3, atol=1e-5)
    assert 1e-4 < kl.blend_exported.sum() < kl.base_blend.sum()
