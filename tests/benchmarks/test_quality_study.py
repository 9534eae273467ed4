"""A quality study trains, resumes, sums up, reports and sweeps without losing or redoing a run."""

import gc
import importlib.util
import json

import pytest
import torch

from benchmarks import recording
from benchmarks import report as pages
from benchmarks.quality import __main__ as command
from benchmarks.quality import data, decode_cost, report, score, study, summary, train
from benchmarks.quality.settings import METHODS, QUICK, Run, changed, digest
from tests.tiny_models import make_base
from tests.tiny_text import preference_rows

HAS_TRL = importlib.util.find_spec("trl") is not None
OURS = ["qadapter", "released", "sft", "replay"]
ALL = [*OURS, *(["dpo", "ipo"] if HAS_TRL else [])]
SMALL = {"pairs": 8, "steps": 2, "batch": 4, "micro_batch": 2, "lora_r": 2, "max_length": 64}
SETTINGS = {**QUICK.usual, **SMALL, "warmup_steps": 0, "seed": 0, "noise": 0.0}
ROWS = 8


@pytest.fixture(scope="module")
def base(tmp_path_factory, tiny_tokenizer):
    folder = tmp_path_factory.mktemp("base")
    make_base("llama", vocab=len(tiny_tokenizer)).save_pretrained(folder)
    tiny_tokenizer.save_pretrained(folder)
    return str(folder)


def trained(method, base, tokenizer, replay=(), rows=ROWS, **changes):
    settings = {**SETTINGS, **METHODS[method].settings, **changes}
    return train.train(method, settings, base, tokenizer, preference_rows(rows), [1], list(replay))


def chosen_scores(base, tokenizer, rows):
    model = train.new_model(base, SETTINGS)
    made = score.score(model, tokenizer, rows, ["chosen"], [score.strength(1.0)])
    return made["base_logp"].sum(), made["tokens"].sum()


@pytest.fixture(scope="module")
def tokenised(tiny_tokenizer):
    return data.tokenised(preference_rows(ROWS), tiny_tokenizer, 64, [2])


@pytest.mark.parametrize("method", [m for m in ALL if m != "qadapter"])
def test_every_method_starts_at_the_same_lora(method, base, tiny_tokenizer, tokenised):
    start, other = (
        trained(m, base, tiny_tokenizer, tokenised, learning_rate=0.0)[0][2]
        for m in ("qadapter", method)
    )
    assert start.keys() == other.keys() and start
    for name, value in start.items():
        torch.testing.assert_close(value, other[name], rtol=0, atol=0)


@pytest.mark.skipif(not HAS_TRL, reason="needs TRL")
def test_dpo_is_q_adapter_without_its_regulariser(base, tiny_tokenizer):
    """The same losses update by update: same pairs, same order, same start, same optimiser."""
    common = {"steps": 4, "learning_rate": 1e-2}
    dpo = trained("dpo", base, tiny_tokenizer, beta=0.3, **common)
    own = trained("dpo_own", base, tiny_tokenizer, beta=0.3, **common)
    losses = [[line["loss"] for line in cost["log"]] for _, cost in (dpo, own)]
    assert len(losses[0]) == 4 and losses[0][0] == pytest.approx(0.6931, abs=1e-3)
    assert losses[0] == pytest.approx(losses[1], abs=2e-3)
    assert abs(losses[0][-1] - losses[0][0]) > 0.02


def test_sft_lowers_the_likelihood_of_the_chosen_alone(base, tiny_tokenizer, tokenised):
    _, made = trained("sft", base, tiny_tokenizer, batch=8, micro_batch=4, learning_rate=0.0)
    logp, tokens = chosen_scores(base, tiny_tokenizer, tokenised)
    assert made["log"][0]["loss"] == pytest.approx(-logp / tokens, abs=1e-3)


def test_replay_adds_the_base_s_answers(base, tiny_tokenizer, tokenised):
    arguments = {"rows": 4, "batch": 4, "micro_batch": 4, "learning_rate": 0.0, "steps": 1}
    replayed = tokenised[5:7]
    _, made = trained("replay", base, tiny_tokenizer, replayed, **arguments)
    # Four chosen responses, and as many replayed ones in turns; a mean over all their tokens.
    own, twice = (chosen_scores(base, tiny_tokenizer, part) for part in (tokenised[:4], replayed))
    expected = -(own[0] + 2 * twice[0]) / (own[1] + 2 * twice[1])
    assert made["log"][0]["loss"] == pytest.approx(expected, abs=1e-3)
    assert abs(expected + own[0] / own[1]) > 1e-2


def test_the_released_conventions_start_at_the_base_s_logits(base, tiny_tokenizer):
    own, released = (trained(m, base, tiny_tokenizer)[1]["log"][0]["loss"] for m in OURS[:2])
    assert own == pytest.approx(0.6931, abs=1e-3) and abs(released - own) > 0.1


@pytest.fixture(scope="module")
def files_of(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pairs")
    rows = preference_rows(35)
    for name, part in (("train", rows[:16]), ("test", rows[16:]), ("other", rows[16:22])):
        lines = "".join(json.dumps(row) + "\n" for row in part)
        (folder / f"{name}.jsonl").write_text(lines)
    return folder


@pytest.fixture
def call(base, files_of, tmp_path, monkeypatch, capsys):
    """(*options) -> (status, what was printed, the errors)."""
    machine = {"cpu": "a CPU", "threads": 1, "torch": torch.__version__, "date": "2026-01-01"}
    monkeypatch.setattr(recording, "environment", lambda device: machine)
    monkeypatch.setattr(decode_cost, "decode_cost", lambda study: None)
    # Looking through all that pytest holds, at every training, would be most of the time.
    monkeypatch.setattr(gc, "collect", lambda: 0)
    # A random model answers nothing right, and then there would be nothing to lose.
    monkeypatch.setattr(study.tasks, "right", lambda text, answer: len(answer) > 2)
    small = [f"{name}={value}" for name, value in {**SMALL, "micro_batch": 4}.items()]
    small += ["heldout=6", "prompts=3", "new_tokens=3", "unrelated=3", "questions=17"]
    small += ["strengths=0.5,1", "answered_strengths=0.5", "checkpoints=0.5"]

    def run(*options):
        arguments = ["--model", base, "--output", tmp_path / "out"]
        arguments += ["--data", files_of / "train.jsonl", "--heldout", files_of / "test.jsonl"]
        arguments += ["--unrelated", files_of / "other.jsonl", "--judges", "n-grams"]
        arguments += [part for change in small for part in ("--change", change)]
        status = command.main([*map(str, arguments), *options])
        captured = capsys.readouterr()
        return status, captured.out, captured.err

    return run


def never(*args, **kwargs):
    raise AssertionError("done twice")


def test_a_study_from_end_to_end(call, tmp_path, monkeypatch):
    options = ("--methods", *OURS)
    status, printed, error = call(*options)
    assert status == 0, error
    record = json.loads((tmp_path / "out" / "summary.json").read_text())
    rows = {(row["variant"], row["label"]): row for row in record["rows"]}
    assert {variant for variant, _ in rows} == set(OURS)
    assert rows["qadapter", "trained"]["blend"] == [1.0, 0.0]
    assert rows["released", "trained"]["blend"] == [1.0, 0.01]
    labels = {label for variant, label in rows if variant == "qadapter"}
    assert labels == {"trained", "strength 0.5", "step 1"}
    for row in rows.values():
        for mean, low, high in row["figures"].values():
            assert low <= mean + 1e-9 and mean <= high + 1e-9
    for answered in (("qadapter", "trained"), ("qadapter", "strength 0.5"), ("sft", "step 1")):
        assert {"wins n-grams", "questions", "words"} <= rows[answered]["figures"].keys()
    assert "words" not in rows["replay", "step 1"]["figures"]
    assert {test["against"] for test in record["tests"]} == set(OURS) - {"qadapter"}
    assert "Q-Adapter, released conventions" in printed and "n-grams" in printed
    # What is committed holds neither the data nor answers.
    assert "content" not in json.dumps(record) and "answers" not in json.dumps(record["rows"])

    # Again: nothing is trained or measured.
    with monkeypatch.context() as patch:
        patch.setattr(study, "train", never)
        patch.setattr(score, "score", never)
        assert call(*options)[0] == 0
    # A run that was cut off between training and measuring does not train again.
    (tmp_path / "out" / "runs" / "sft-noise0-seed0" / "result.json").unlink()
    assert call("--done", *options)[0] == 0  # sums up the others
    rows_now = json.loads((tmp_path / "out" / "summary.json").read_text())["rows"]
    assert {row["method"] for row in rows_now} == set(OURS) - {"sft"}
    with monkeypatch.context() as patch:
        patch.setattr(study, "train", never)
        assert call(*options)[0] == 0
    assert json.loads((tmp_path / "out" / "summary.json").read_text())["rows"] == record["rows"]
    # Another set does not mix with it.
    status, _, error = call("--methods", "sft", "--change", "heldout=5")
    assert status == 2 and "made with another set" in error


def test_more_seeds_and_methods_go_on_in_the_same_folder(call, tmp_path, monkeypatch):
    assert call("--methods", "sft")[0] == 0
    trained_now = []
    original = study.train
    monkeypatch.setattr(study, "train", lambda *a: trained_now.append(a[0]) or original(*a))
    assert call("--methods", "sft", "qadapter", "--seeds", "0", "1")[0] == 0
    assert trained_now == ["qadapter", "qadapter", "sft"]
    rows = json.loads((tmp_path / "out" / "summary.json").read_text())["rows"]
    assert {tuple(row["seeds"]) for row in rows} == {(0, 1)}


def test_noise_pictures_and_report(call, tmp_path, monkeypatch, capsys):
    pytest.importorskip("matplotlib")
    options = [
        "--change",
        "noise=0.5",
        "--change",
        "noisy_methods=qadapter",
        "--change",
        "betas=0.3",
        "--change",
        "rates=0.002",
    ]
    path = tmp_path / "results" / "quality-tiny.json"
    status, _, error = call(
        "--methods", "qadapter", "sft", "dpo_own", *options, "--json", str(path)
    )
    assert status == 0, error
    docs = tmp_path / "docs"
    docs.mkdir()
    names = [*report.TABLES, "quality_short"]
    marks = [f"<!-- table:{name} -->\n<!-- /table -->\n" for name in names]
    (docs / "quality.md").write_text("# Quality\n\n" + "\n".join(marks))
    (tmp_path / "README.md").write_text("# Q-Adapter\n")
    monkeypatch.setattr(pages, "ROOT", tmp_path)
    monkeypatch.setattr(pages, "RESULTS", path.parent)
    assert pages.main([]) == 0
    page = (docs / "quality.md").read_text()
    assert page.count("<!-- /table -->") == len(names)
    assert "50% flipped" in page and "strength 0.5" in page and "beta 0.3" in page
    assert "learning_rate 0.002" in page
    # Other betas and rates are in the tables, and not among the methods that are tested.
    record = json.loads(path.read_text())
    assert {test["against"] for test in record["tests"]} == {"qadapter", "sft", "dpo_own"}
    assert {row["noise"] for row in record["matched"]} == {0.0, 0.5}
    pictures = {picture.name for picture in docs.glob("*.png")}
    assert pictures == {f"quality-tiny-{name}.png" for name in ("frontier", "learning", "noise")}
    assert min((docs / name).stat().st_size for name in pictures) > 10_000


def test_a_sweep_is_resumed_and_compares_variants(call, tmp_path, monkeypatch):
    vary = ["--vary", "reg_coef=0,0.5"]
    status, printed, error = call(*vary)
    assert status == 0, error
    variants = {"qadapter", "qadapter-reg_coef=0", "qadapter-reg_coef=0.5"}
    named = {"as usual", "reg_coef 0", "reg_coef 0.5"}
    assert named <= {line.split("|")[1].strip() for line in printed.splitlines() if "|" in line}
    record = json.loads((tmp_path / "out" / "sweep-qadapter.json").read_text())
    assert record["benchmark"] == "quality_sweep"
    rows = record["rows"]
    assert {row["variant"] for row in rows} == variants
    assert all("words" not in row["figures"] for row in rows)
    monkeypatch.setattr(study, "train", never)
    assert call(*vary)[0] == 0
    # The comparison takes the training over, and adds answers.
    assert call("--methods", "qadapter")[0] == 0
    status, _, error = call("--vary", "reg_koef=1")
    assert status == 2 and "reg_koef" in error
    status, _, error = call(*vary, "--methods", "sft", "dpo_own")
    assert status == 2 and "expected one of --methods" in error


def test_a_sweep_s_table_reads_off_at_equal_forgetting():
    def row(value, label, strength):
        figures = {"kl": 0.04 * strength**2, "gain": value * strength, "nll_change": 0.0}
        figures = {name: [figure] * 3 for name, figure in {**figures, "accuracy": 0.7}.items()}
        changes = {"reg_coef": value}
        about = {"variant": f"qadapter-{value}", "method": "qadapter", "changes": changes}
        return {**about, "noise": 0.0, "label": label, "seeds": [0], "figures": figures}

    points = (("trained", 1.0), ("strength 2", 2.0), ("step 1", 9.0))
    rows = [row(value, *point) for value in (1.0, 3.0) for point in points]
    counts = dict.fromkeys(("heldout", "prompts", "unrelated", "questions"), 1)
    machine = {"cpu": "a CPU", "threads": 1, "torch": torch.__version__, "date": "2026-01-01"}
    record = {"benchmark": "quality_sweep", "method": "qadapter", "kls": [0.09, 9.0]}
    record |= {"set": {"usual": QUICK.usual}, "counts": counts, "data": {"name": "tiny"}}
    record |= {"environment": machine, "base": "tiny", "rows": rows}
    cells = [
        [cell.strip() for cell in line.split("|")[1:-1]]
        for line in report.sweep_table(record).splitlines()
        if line.startswith("|")
    ]
    at = cells[0].index("gain at KL 0.09")
    record["kls"] = [0.09]
    # Strength 1.5 has that KL, and none has the other.
    assert [(line[0], line[at], line[at + 3]) for line in cells[2:]] == [
        ("reg_coef 1.0", "1.500", ""),
        ("reg_coef 3.0", "4.500", ""),
    ]
    first = next(line for line in report.sweep_table(record).splitlines() if "reg_coef" in line)
    assert "reg_coef 3.0" in first  # the best gain at the middle KL


def test_a_method_that_cannot_run_is_named(call, tmp_path, monkeypatch):
    monkeypatch.setattr(command, "find_spec", lambda name: None)
    status, printed, error = call("--methods", "dpo", "ipo")
    assert status == 0 and "- ipo: needs TRL" in printed, error
    # DPO is compared all the same where TRL is not there, by the package's own step.
    runs = tmp_path / "out" / "runs"
    assert [path.name for path in runs.iterdir()] == ["dpo_own-noise0-seed0"]
    # What was trained elsewhere is summed up here.
    (runs / "dpo_own-noise0-seed0").rename(runs / "dpo-noise0-seed0")
    for path in (runs / "dpo-noise0-seed0").glob("*.json"):
        settings = Run("dpo").settings(changed(QUICK, {**SMALL, "micro_batch": 4}).usual)
        record = json.loads(path.read_text())
        record |= {"method": "dpo", "variant": "dpo", "settings_digest": digest(settings)}
        path.write_text(json.dumps(record))
    status, printed, error = call("--methods", "dpo", "--done")
    assert status == 0 and "DPO (TRL)" in printed and "needs TRL" not in printed, error


def test_decoding_is_timed_to_the_last_token(base, tmp_path, files_of, monkeypatch):
    monkeypatch.setattr(decode_cost, "SHORT", 1)
    monkeypatch.setattr(decode_cost, "LONG", 3)
    lengths = []
    original = decode_cost.generate.answer

    def watched(*args, **kwargs):
        made = original(*args, **kwargs)
        lengths.extend((kwargs["max_new_tokens"], item.tokens) for item in made)
        return made

    monkeypatch.setattr(decode_cost.generate, "answer", watched)
    pairs = data.load(str(files_of / "train.jsonl"), str(files_of / "test.jsonl"))
    chosen = changed(QUICK, {"prompts": 2, "new_tokens": 2, "questions": 5, "lora_r": 2})
    made = study.Study(chosen, pairs, tmp_path / "out", base, ("n-grams",))
    before = made.model().generation_config.eos_token_id
    lengths.clear()
    record = decode_cost.decode_cost(made, rounds=1)
    assert [row["way"] for row in record["rows"]] == list(decode_cost.WAYS)
    assert record["rows"][0]["times_base"] == 1.0
    assert lengths and all(asked == tokens for asked, tokens in lengths)
    assert made.model().generation_config.eos_token_id == before == 2


def test_answers_to_replay_that_are_too_long_are_left_out(base, tmp_path, files_of):
    pairs = data.load(str(files_of / "train.jsonl"), str(files_of / "test.jsonl"))
    chosen = changed(QUICK, {"max_length": 64, "questions": 5, "lora_r": 2})
    made = study.Study(chosen, pairs, tmp_path / "out", base, ("n-grams",))

    def replayed(question, truncated):
        messages = ({"role": "user", "content": question}, {"role": "assistant", "content": "a b"})
        return made._replayed({"messages": list(messages), "truncated": truncated})

    assert replayed("why " * 100, False) == []
    (whole,), (cut,) = replayed("why", False), replayed("why", True)
    assert cut["chosen_ids"] == whole["chosen_ids"][:-1]
    assert (whole["chosen_truncated"], cut["chosen_truncated"]) == (False, True)


def test_an_untouched_policy_is_right_half_the_time():
    point = {"pairs": {"gain": [0.0, 1.0, -1.0]}, "unrelated": {"kl": [], "nll_change": []}}
    assert summary._metrics(point)["accuracy"] == [0.5, 1.0, 0.0]


def test_costs_are_of_runs_that_pass_the_base():
    def result(seconds, threads=2, **other):
        training = {"threads": threads, "seconds_per_pair": seconds, "peak_mib": 100 * seconds}
        return {"variant": "qadapter", "changes": {}, "noise": 0.0, "training": training, **other}

    results = [result(3.0), result(2.0), result(1.5, threads=1)]
    results += [result(0.5, noise=0.1), result(0.1, changes={"gamma": 0.9}, variant="other")]
    (row,) = summary.cost(results)
    assert (row["runs"], row["threads"]) == (2, 2)
    assert (row["seconds_per_pair"], row["peak_mib"]) == (2.0, 200.0)
