"""lm-eval scores the composed policy: likelihoods and texts are those of the model's own calls."""

import json

import pytest
import torch
from peft import LoraConfig

from tests.tiny_models import make_base, make_model, perturb
from tests.tiny_text import word_tokenizer

pytest.importorskip("lm_eval", reason="needs lm-eval")

import lm_eval
from lm_eval.api.instance import Instance
from lm_eval.api.registry import get_model
from lm_eval.tasks import TaskManager

from qadapter import QAdapterModel
from qadapter.integrations.lm_eval import QAdapterLM

CHOICES = """
task: tiny_choices
dataset_path: json
dataset_kwargs: {{data_files: {{test: {file}}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{question}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: "{{{{label}}}}"
metric_list: [{{metric: acc}}]
"""
TEXT = """
task: tiny_text
dataset_path: json
dataset_kwargs: {{data_files: {{test: {file}}}}}
test_split: test
output_type: generate_until
doc_to_text: "{{{{question}}}}"
doc_to_target: "cat"
generation_kwargs: {{until: ["."], max_gen_toks: 4, do_sample: false}}
metric_list: [{{metric: exact_match}}]
"""


@pytest.fixture
def model():
    return make_model("llama")


@pytest.fixture
def folder(tmp_path, tiny_tokenizer):
    make_base("llama", vocab=len(tiny_tokenizer)).save_pretrained(tmp_path / "base")
    tiny_tokenizer.save_pretrained(tmp_path / "base")
    made = QAdapterModel.from_pretrained(tmp_path / "base", lora_config=LoraConfig(r=4))
    perturb(made).save_pretrained(tmp_path / "adapter")
    return tmp_path


def request(kind, *arguments):
    return Instance(request_type=kind, doc={}, arguments=arguments, idx=0)


@pytest.mark.parametrize("knobs", [{}, {"strength": "0.5"}, {"alpha_0": 0.7, "alpha_tilde": 1.3}])
def test_log_likelihoods_are_the_policy_s(model, tiny_tokenizer, knobs):
    lm = QAdapterLM(model, tokenizer=tiny_tokenizer, batch_size=2, **knobs)
    texts = [
        ("the cat", " sat on"),
        ("a very big dog", " ran"),
        ("we", " saw the bird and it flew"),
    ]
    made = lm.loglikelihood([request("loglikelihood", *pair) for pair in texts])
    weights = {"alpha_0": 1.0, "alpha_tilde": 1.0}
    if "strength" in knobs:
        weights = {"alpha_0": 2.0, "alpha_tilde": 2.0}
    weights |= {name: float(v) for name, v in knobs.items() if name != "strength"}
    for (context, continuation), (logp, _) in zip(texts, made, strict=True):
        prefix, rest = lm._encode_pair(context, continuation)
        ids, start = torch.tensor([prefix + rest]), len(prefix)
        with torch.no_grad():
            base, q = (z.double() for z in model(ids))
        mixed = (q + (weights["alpha_0"] - 1.0) * base) / weights["alpha_tilde"]
        at = mixed.log_softmax(-1)[start - 1 : -1]
        assert logp == pytest.approx(float(at.gather(1, ids[0, start:, None]).sum()), abs=1e-3)


def test_text_is_the_policy_s(model, tiny_tokenizer):
    prompts = ["the cat sat", "tell me about the big old dog"]
    arguments = {"until": ["nothing"], "max_gen_toks": 6, "do_sample": False}
    seen = set()
    for strength in (0.0, 1.0, 2.0):
        lm = QAdapterLM(model, strength=strength, tokenizer=tiny_tokenizer, batch_size=2)
        made = lm.generate_until([request("generate_until", p, arguments) for p in prompts])
        for prompt, text in zip(prompts, made, strict=True):
            ids = torch.tensor([lm.tok_encode(prompt)])
            own = model.generate(ids, strength=strength, max_new_tokens=6, do_sample=False)
            expected = tiny_tokenizer.decode(own[0, ids.shape[1] :], skip_special_tokens=True)
            assert text.split() == expected.split()
        seen.add(tuple(made))
    assert len(seen) > 1


def test_a_local_task_file_runs(folder):
    rows = [
        {"question": "the cat", "choices": ["sat", "flew"], "label": 0},
        {"question": "the bird", "choices": ["ran", "flew"], "label": 1},
        {"question": "a dog", "choices": ["sat", "ran"], "label": 1},
    ]
    file = folder / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "choices.yaml").write_text(CHOICES.format(file=file))
    (folder / "text.yaml").write_text(TEXT.format(file=file))
    lm = QAdapterLM(str(folder / "adapter"), strength=0.5)
    made = lm_eval.simple_evaluate(
        model=lm,
        tasks=["tiny_choices", "tiny_text"],
        task_manager=TaskManager(include_path=str(folder), include_defaults=False),
        bootstrap_iters=0,
    )
    right = 0
    for row in rows:
        pairs = [request("loglikelihood", row["question"], f" {c}") for c in row["choices"]]
        scores = [logp for logp, _ in lm.loglikelihood(pairs)]
        right += scores.index(max(scores)) == row["label"]
    assert made["results"]["tiny_choices"]["acc,none"] == pytest.approx(right / 3)
    assert made["n-samples"]["tiny_text"]["effective"] == 3


def test_the_recommended_strength(model, tiny_tokenizer, monkeypatch):
    monkeypatch.setattr(model, "recommended_strength", 0.5)
    lm = QAdapterLM(model, strength="recommended", tokenizer=tiny_tokenizer)
    assert lm.knobs["strength"] == 0.5


def test_arguments_are_checked(folder):
    with pytest.raises(ValueError, match="not both"):
        QAdapterLM(str(folder / "adapter"), strength=1.0, alpha_0=1.0)
    with pytest.raises(ValueError, match="strength"):
        QAdapterLM(str(folder / "adapter"), strength=-1)
    with pytest.raises(ValueError, match="no recommended strength"):
        QAdapterLM(str(folder / "adapter"), strength="recommended")
    for name in ("revision", "peft", "load_in_4bit"):
        with pytest.raises(ValueError, match=f"^{name}: got 'x'"):
            QAdapterLM(str(folder / "adapter"), **{name: "x"})


def test_what_belongs_to_a_folder_is_refused_of_a_model(model, tiny_tokenizer):
    for given in ({"dtype": "bfloat16"}, {"base_model": "somewhere"}):
        with pytest.raises(ValueError, match="base_model, dtype: of a folder"):
            QAdapterLM(model, tokenizer=tiny_tokenizer, **given)


def test_a_padding_token_outside_the_embedding():
    tokenizer = word_tokenizer()
    model = QAdapterModel.from_base(make_base("llama", vocab=len(tokenizer)))
    prompts = ["the cat sat", "tell me about the big old dog"]
    arguments = {"until": ["nothing"], "max_gen_toks": 6, "do_sample": False}
    texts = []
    for own_pad in (False, True):
        if own_pad:
            tokenizer.add_special_tokens({"pad_token": "[PAD]"})
        lm = QAdapterLM(model, tokenizer=tokenizer, batch_size=2)
        requests = [request("generate_until", p, arguments) for p in prompts]
        texts.append(lm.generate_until(requests))
    assert texts[0] == texts[1]


def test_the_harness_finds_it_by_name():
    assert get_model("qadapter") is QAdapterLM
