"""Every command does what it says on a tiny model, and bad arguments end in one clear line."""

import json

import pytest

from qadapter import QAdapterModel
from qadapter.cli import main
from qadapter.cli.environment import huge_pages
from qadapter.text.prompts import encode_prompts
from qadapter.training import evaluation
from tests.tiny_models import make_base
from tests.tiny_text import preference_rows


@pytest.fixture
def files(tmp_path, tiny_tokenizer):
    make_base("llama").save_pretrained(tmp_path / "base")
    tiny_tokenizer.save_pretrained(tmp_path / "base")
    for name, rows in (("train", preference_rows(12)), ("test", preference_rows(5))):
        lines = "".join(json.dumps(row) + "\n" for row in rows)
        (tmp_path / f"{name}.jsonl").write_text(lines)
    return tmp_path


def train(files, *options):
    return main(
        [
            "train", "--model", str(files / "base"), "--data", str(files / "train.jsonl"),
            "--output", str(files / "out"), "--max-steps", "4", "--learning-rate", "1e-2",
            "--logging-steps", "1", "--per-device-train-batch-size", "4", "--report-to", "none",
            "--use-cpu", "--bt-scale", "5", "--save-strategy", "steps", "--save-steps", "2",
            *options,
        ]
    )  # fmt: skip


def test_train_generate_eval(files, capsys):
    assert train(files, "--eval-data", str(files / "test.jsonl")) == 0
    names = {p.name for p in (files / "out").iterdir()}
    assert {"adapter_model.safetensors", "qadapter_config.json", "checkpoint-4"} <= names
    assert not (files / "out" / "training_args.bin").exists()

    adapter = str(files / "out")
    texts = []
    for strength in ("0", "1"):
        capsys.readouterr()
        command = ["generate", "--adapter", adapter, "--prompt", "tell me about the red cat"]
        assert main([*command, "--strength", strength, "--max-new-tokens", "8"]) == 0
        texts.append(capsys.readouterr().out)
    assert all(text.strip() for text in texts)

    report_path = files / "report.json"
    command = ["eval", "--adapter", adapter, "--data", str(files / "test.jsonl")]
    unrelated = ["--unrelated", str(files / "train.jsonl")]
    assert main([*command, *unrelated, "--json", str(report_path), "--max-length", "64"]) == 0
    report = json.loads(report_path.read_text())
    assert report["preference"]["pairs"] == 5
    assert report["preference"]["accuracy"] == 1.0
    assert report["forgetting"]["kl_base_policy"] > 0
    assert "accuracy" in capsys.readouterr().out


def test_resume_and_adapter_as_start(files):
    assert train(files) == 0
    assert train(files, "--max-steps", "6", "--resume") == 0
    state = json.loads((files / "out" / "trainer_state.json").read_text())
    assert state["global_step"] == 6
    # Training goes on with the tokenizer that the adapter was saved with, as answers do.
    template = files / "out" / "chat_template.jinja"
    other = template.read_text().replace("<u> ", "hello <u> ")
    template.write_text(other)
    for more in ((), ("--skip-bad-rows",)):
        onward = ("--model", str(files / "out"), "--output", str(files / "out2"), *more)
        assert train(files, *onward) == 0
        assert (files / "out2" / "chat_template.jinja").read_text() == other
    model = QAdapterModel.from_pretrained(files / "out")
    assert model.tokenizer_source == str(files / "out")
    assert QAdapterModel.from_pretrained(files / "base").tokenizer_source == str(files / "base")


def test_a_budget_with_anchors_of_ones_own_and_with_the_bases(files, capsys):
    rows = [{"prompt": r["prompt"], "completion": r["rejected"]} for r in preference_rows(9)]
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    (files / "kept.jsonl").write_text(lines)
    given = ["--kl-budget", "0.05", "--anchor-data", str(files / "kept.jsonl")]
    assert train(files, *given) == 0
    saved = json.loads((files / "out" / "qadapter_config.json").read_text())
    assert saved["kl_budget"] == 0.05 and saved["recommended_strength"] > 0
    assert not (files / "out" / "anchors.jsonl").exists()
    assert f"recommended strength {saved['recommended_strength']:.3g}" in capsys.readouterr().out

    own = ["--output", str(files / "own"), "--anchor-count", "6", "--anchor-tokens", "5"]
    assert train(files, "--anchor-coef", "2", *own) == 0
    assert len((files / "own" / "anchors.jsonl").read_text().splitlines()) == 6
    assert "recommended_strength" not in (files / "own" / "qadapter_config.json").read_text()


def test_the_released_preset(files):
    assert train(files, "--preset", "released", "--gamma", "0.9") == 0
    saved = json.loads((files / "out" / "qadapter_config.json").read_text())
    assert (saved["alpha_0"], saved["center"], saved["gamma"]) == (0.01, 0.0, 0.9)
    arguments = json.loads((files / "out" / "training_args.json").read_text())
    assert arguments["value_at"] == "same"


@pytest.mark.parametrize(
    ("command", "message"),
    [
        (["generate", "--adapter", "{dir}/base", "--prompt", "a"], "not the folder of a saved"),
        (["eval", "--adapter", "{dir}/base", "--data", "{dir}/nothing.jsonl"], "nothing.jsonl"),
        (["eval", "--adapter", "{dir}/base", "--data", "{dir}/broken.jsonl"], "line 2"),
        (
            [
                "train",
                "--model",
                "{dir}/none",
                "--data",
                "{dir}/train.jsonl",
                "--output",
                "{dir}/o",
            ],
            "no such folder",
        ),
        (["train", "--model", "{dir}/base", "--data", "{dir}/train.jsonl"], "--output"),
        (
            [
                "train",
                "--model",
                "{dir}/base",
                "--data",
                "{dir}/columns.jsonl",
                "--output",
                "{dir}/o",
            ],
            "rejected",
        ),
    ],
)
def test_errors_are_one_line(files, capsys, command, message):
    (files / "broken.jsonl").write_text(json.dumps(preference_rows(1)[0]) + "\n{oops\n")
    (files / "columns.jsonl").write_text('{"prompt": "a", "chosen": "b"}\n')
    assert main([part.format(dir=files) for part in command]) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("qadapter: error: ") and message in error
    assert not (files / "o").exists()


def test_env_tells_how_to_get_huge_pages(tmp_path, monkeypatch):
    file = tmp_path / "enabled"
    monkeypatch.delenv("GLIBC_TUNABLES", raising=False)
    assert huge_pages(file) == ""
    file.write_text("[always] madvise never\n")
    assert huge_pages(file) == "always"
    file.write_text("always [madvise] never\n")
    assert "GLIBC_TUNABLES=glibc.malloc.hugetlb=1" in huge_pages(file)
    monkeypatch.setenv("GLIBC_TUNABLES", "glibc.malloc.hugetlb=1:glibc.malloc.trim_threshold=1")
    assert huge_pages(file) == "madvise"


def test_env(capsys):
    assert main(["env"]) == 0
    out = capsys.readouterr().out
    for word in ("torch", "transformers", "cpp", "triton", "max err"):
        assert word in out


def test_help(capsys):
    assert main([]) == 2
    assert "train" in capsys.readouterr().out


def test_prompts_are_padded_left_with_one_bos(tiny_tokenizer):
    batch = encode_prompts(tiny_tokenizer, ["a cat", "the big red dog"], None, True, "cpu")
    assert batch["attention_mask"].tolist()[0][:2] == [0, 0]
    assert batch["attention_mask"][:, -1].all()
    plain = encode_prompts(tiny_tokenizer, ["a cat"], None, False, "cpu")
    assert plain["input_ids"].shape == (1, 2)


def test_forgetting_is_zero_before_training(files, tiny_tokenizer):
    from datasets import Dataset

    from tests.tiny_models import make_model

    rows = Dataset.from_list(preference_rows(6))
    start = make_model(moved=False)
    figures = evaluation.evaluate_forgetting(start, tiny_tokenizer, rows, progress=False)
    assert figures["kl_base_policy"] == 0.0 and figures["delta_nll"] == 0.0
    moved = make_model(moved=True)
    figures = evaluation.evaluate_forgetting(moved, tiny_tokenizer, rows, progress=False)
    assert figures["kl_base_policy"] > 0.01
    # The same number from whole-vocabulary softmaxes, one response at a time.
    import torch

    from qadapter.text.data import prepare_dataset
    from qadapter.text.tokenization import eos_token_ids

    total, count = 0.0, 0
    ids = eos_token_ids(moved, tiny_tokenizer)
    for row in prepare_dataset(rows, tiny_tokenizer, eos_token_ids=ids):
        sequence = torch.tensor([row["prompt_ids"] + row["chosen_ids"]])
        with torch.no_grad():
            policy = moved.peft_model(input_ids=sequence).logits[0].log_softmax(-1)
            with moved.peft_model.disable_adapter():
                base = moved.peft_model(input_ids=sequence).logits[0].log_softmax(-1)
        states = slice(len(row["prompt_ids"]) - 1, sequence.shape[1] - 1)
        kl = (base.exp() * (base - policy)).sum(-1)[states]
        total, count = total + kl.sum().item(), count + kl.numel()
    assert figures["tokens"] == count
    assert figures["kl_base_policy"] == pytest.approx(total / count, rel=1e-4)


def test_unrelated_text_is_shipped():
    rows = evaluation.load_unrelated()
    assert len(rows) >= 20 and {"prompt", "chosen"} <= set(rows.column_names)


def test_training_from_a_cache_of_the_base(files, capsys):
    """Its steps know no KL, which the plot then goes without."""
    evaluation_data = ["--eval-data", str(files / "test.jsonl"), "--eval-strategy", "epoch"]
    for extra in ([], evaluation_data):
        assert train(files, "--precompute-base", *extra) == 0
        assert "adapter saved" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--num-train-epochs", "2"], True),
        (["--num-train-epochs", "2", "--precompute-base"], False),
        (["--num-train-epochs", "2", "--alpha-0", "0.5"], False),
        (["--num-train-epochs", "1"], False),
    ],
)
def test_several_epochs_tell_of_the_cache(files, capsys, options, said):
    assert train(files, "--max-steps", "-1", *options) == 0
    assert ("2 epochs: with --precompute_base" in capsys.readouterr().out) == said


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--output-dir", "elsewhere"], "--output: give it or --output_dir"),
        (["--do-predict"], "--do_predict: train makes no predictions"),
        (["--do-eval"], "--do_eval, --eval_strategy: give held-out pairs"),
        (["--label-smoothing-factor", "0.1"], "label_smoothing_factor: not supported"),
        (["--bf16-full-eval"], "bf16_full_eval: not supported"),
        (["--anchor-data", "a.jsonl"], "--anchor-data: has no effect without --kl-budget"),
        (["--anchors-per-pair", "2"], "anchors_per_pair: has no effect without anchor_coef"),
        (["--kl-budget", "0.1", "--anchor-data", "no/a.jsonl"], "no such file: no/a.jsonl"),
    ],
)
def test_options_without_effect_are_refused(files, capsys, options, message):
    """Before the base is loaded, which may take minutes."""
    assert train(files, *options) == 2
    out, err = capsys.readouterr()
    assert message in err and "base in" not in out
    assert not (files / "out").exists()


def test_what_is_no_number_is_said_in_a_few_lines(files, capsys):
    with pytest.raises(SystemExit):
        train(files, "--kl-budget", "little")
    said = capsys.readouterr().err.strip().splitlines()
    assert len(said) <= 3 and "invalid float value: 'little'" in said[-1]


@pytest.mark.parametrize("option", ["--lora-r", "--lora-alpha", "--lora-dropout"])
def test_lora_options_are_of_a_new_adapter(files, capsys, option):
    from tests.tiny_models import make_model

    model = make_model()
    model.save_pretrained(files / "adapter")
    assert train(files, "--model", str(files / "adapter"), option, "1") == 2
    assert f"{option.replace('-', '_').replace('__', '--')}: of a new" in capsys.readouterr().err


def test_train_says_the_dtype(files, capsys, monkeypatch):
    import torch

    from qadapter.model import precision

    make_base("llama", dtype=torch.bfloat16).save_pretrained(files / "base")
    monkeypatch.setattr(precision, "cpu_capabilities", lambda: {"avx2": True})
    for options, expected in ([], "float32"), (["--dtype", "bfloat16"], "bfloat16"):
        assert train(files, *options) == 0
        assert f"base in {expected}\n" in capsys.readouterr().out
