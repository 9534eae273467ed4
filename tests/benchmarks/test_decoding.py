"""Peers of decoding and of the sampler give the reference's tokens, tables what was measured."""

import json
import shutil
from pathlib import Path

import pytest
import torch

pytest.importorskip("matplotlib")

from benchmarks import bench, bench_decode, bench_sample, harness, plots, report
from benchmarks import decoding_problem as decoding
from benchmarks.bases import load_base
from benchmarks.peers.sampling import EAGER, FLASHINFER, HF, probabilities, ranked
from benchmarks.sampling_problem import FILTERS, LOGITS, STREAMS, make_problem
from qadapter.reference import filtered_logprobs


@pytest.fixture(scope="module")
def quick_decode(tmp_path_factory):
    path = tmp_path_factory.mktemp("results") / "decode-cpu.json"
    arguments = ["--quick", "--new-tokens", "4", "--mode", "sampled", "--json", str(path)]
    bench_decode.run(bench.parse(bench_decode, arguments))
    return path


@pytest.fixture(scope="module")
def quick_sample(tmp_path_factory):
    path = tmp_path_factory.mktemp("results") / "sample-cpu.json"
    arguments = ["--quick", "--dtype", "fp32", "--streams", "two", "--json", str(path)]
    arguments += ["--peers", "eager", "transformers", "FlashInfer"]
    with pytest.MonkeyPatch.context() as patch:
        nothing = harness.Ceilings(1.0, 1.0, {"float32": 1.0})
        patch.setattr(harness, "ceilings", lambda *_: nothing)
        bench_sample.run(bench.parse(bench_sample, arguments))
    return path


@pytest.mark.parametrize(
    ("which", "batch", "cache"),
    [("all", 1, "dynamic"), ("upper", 1, "dynamic"), ("upper", 3, "dynamic"), ("all", 3, "static")],
)
def test_the_naive_text_is_ours_in_float32(which, batch, cache):
    base = load_base("tiny", "cpu", torch.float32)
    competitors = decoding.Competitors(base, which, cache)
    ids, mask = decoding.prompts(base, "tiny", batch)
    assert ids.shape[0] == batch and mask.sum(1).min() >= 57 and mask.sum(1).max() <= 64
    assert batch == 1 or not mask.all()  # some row is padded
    ways = competitors.ways(ids, mask, "greedy")
    texts = {}
    for name, way in ways.items():
        clock = decoding.Clock(batch, ids.device)
        texts[name] = way(12, clock)
        assert len(clock.times) == 12 and texts[name].shape == (batch, ids.shape[1] + 12), name
    assert set(texts) == set(decoding.WAYS)
    torch.testing.assert_close(texts["two streams"], texts["naive"], rtol=0, atol=0)
    torch.testing.assert_close(texts["one stream"], texts["lora"], rtol=0, atol=0)
    # What would be equal anyway shows nothing.
    assert not torch.equal(texts["base"], texts["lora"])
    assert not torch.equal(texts["two adapters"], texts["two streams"])


def test_the_competitors_share_their_weights():
    base = load_base("tiny", "cpu")
    competitors = decoding.Competitors(base, "all", "dynamic")
    weight = base.get_input_embeddings().weight.data_ptr()
    for model in (competitors.peft, competitors.ours.hf_model):
        assert model.get_input_embeddings().weight.data_ptr() == weight
    assert not any("lora" in name for name, _ in base.named_parameters())


@pytest.mark.parametrize("filters", FILTERS)
@pytest.mark.parametrize("streams", STREAMS)
@pytest.mark.parametrize("logits", LOGITS)
def test_the_peers_draw_from_the_reference(filters, streams, logits):
    problem = make_problem(5, 300, torch.float32, "cpu", streams, logits, filters)
    expected = filtered_logprobs(
        None if problem.base is None else problem.base.double(),
        problem.q.double(),
        **problem.composition,
        **problem.filters,
    ).exp()
    theirs = probabilities(problem)
    torch.testing.assert_close(theirs.double(), expected, rtol=1e-5, atol=1e-6)
    probs, ids = ranked(problem)
    spread = probs if ids is None else torch.zeros_like(problem.q).scatter(-1, ids, probs)
    torch.testing.assert_close(spread.double(), expected, rtol=1e-5, atol=1e-6)


def test_everybody_draws_kept_tokens_only():
    problem = make_problem(4, 300, torch.bfloat16, "cpu", "two", "peaked", "top-k, top-p")
    allowed = probabilities(problem) > 0
    for sampler in (bench_sample.ours("torch"), HF, EAGER):
        draw = sampler.prepare(problem)
        for _ in range(20):
            assert allowed.gather(-1, draw()[:, None]).all(), sampler.name
    assert FLASHINFER.reason(problem) == "it has CUDA kernels only"


def test_a_run_of_the_decoding_benchmark(quick_decode):
    record = json.loads(quick_decode.read_text())
    cases = {(row["batch"], row["lora"], row["who"]) for row in record["rows"]}
    assert {who for _, lora, who in cases if lora == "all"} == set(decoding.WAYS)
    assert {who for _, lora, who in cases if lora == "upper"} == set(bench_decode.LESS)
    assert not any("missing" in row for row in record["rows"])
    for row in record["rows"]:
        assert 0 < row["ms"]["p20"] <= row["ms"]["median"] <= row["ms"]["p80"]
        base = next(
            r["ms"]["median"]
            for r in record["rows"]
            if r["who"] == "base" and all(r[name] == row[name] for name in bench_decode.CASE)
        )
        assert row["times_base"] == pytest.approx(row["ms"]["median"] / base)
    for part in record["parts"]:
        known = sum(part[name]["median"] for name in ("forward", "head", "sampler"))
        assert part["rest"] == pytest.approx(part["two streams"] - known)


def test_a_second_run_keeps_the_other_cases(quick_decode, tmp_path):
    path = shutil.copy(quick_decode, tmp_path)
    before = json.loads(quick_decode.read_text())["rows"]
    arguments = ["--quick", "--new-tokens", "4", "--mode", "sampled", "--lora", "all"]
    arguments += ["--batch-sizes", "1", "--append", "--json", str(path)]
    bench_decode.run(bench.parse(bench_decode, arguments))
    after = json.loads(Path(path).read_text())["rows"]
    redone = [row for row in after if (row["batch"], row["lora"]) == (1, "all")]
    assert [row["who"] for row in redone] == list(decoding.WAYS)
    assert not any(row in before for row in redone)
    kept = [row for row in before if (row["batch"], row["lora"]) != (1, "all")]
    assert [row for row in after if row not in redone] == kept


def test_a_peer_that_fails_is_reported_and_ours_is_an_error():
    def failing(new, clock):
        raise NotImplementedError("cannot\nat all")

    options = bench.parse(bench_decode, ["--quick", "--new-tokens", "3"])
    base = load_base("tiny", "cpu")
    ids, mask = decoding.prompts(base, "tiny", 1)
    ways = decoding.Competitors(base, "all", "dynamic").ways(ids, mask, "greedy")
    ways = {"base": ways["base"]}
    rows = bench_decode.run_case({**ways, "naive": failing}, ids, 1, options)
    assert rows[-1] == {"who": "naive", "missing": "NotImplementedError: cannot"}
    with pytest.raises(NotImplementedError):
        bench_decode.run_case({**ways, "two streams": failing}, ids, 1, options)


def test_tables_and_plots(quick_decode, quick_sample, tmp_path, monkeypatch):
    (tmp_path / "docs").mkdir()
    for path in (quick_decode, quick_sample):
        shutil.copy(path, tmp_path)
    names = ("decode", "decode_full", "decode_parts", "sample", "sample_full")
    page = "".join(f"# {n}\n<!-- table:{n} -->\nold\n<!-- /table -->\n" for n in names)
    (tmp_path / "README.md").write_text(page)
    monkeypatch.setattr(report, "ROOT", tmp_path)
    monkeypatch.setattr(report, "RESULTS", tmp_path)
    report.main()
    parts = (tmp_path / "README.md").read_text().split("<!-- table:")[1:]
    text = {part.split(" ", 1)[0]: part for part in parts}
    lines = {n: [line for line in text[n].splitlines() if line.startswith("| ")] for n in names}
    assert not any("old" in part for part in text.values())
    # A line a case, of which the base and the naive way took part in all.
    assert len(lines["decode"]) == 1 + 4
    assert len(lines["decode_full"]) == 1 + 2 * len(decoding.WAYS) + 2 * len(bench_decode.LESS)
    assert len(lines["decode_parts"]) == 1 + 4
    assert len(lines["sample"]) == 1 + 2
    assert len(lines["sample_full"]) == 1 + len(FILTERS)
    assert "- FlashInfer: it has CUDA kernels only." in text["sample_full"]
    record = json.loads(quick_decode.read_text())
    times = {r["who"]: r["ms"]["median"] for r in record["rows"][: len(decoding.WAYS)]}
    assert f"{times['two streams'] / times['base']:.2f}x" in lines["decode"][1]
    plots.draw(tmp_path, tmp_path / "docs")
    for name in ("decode", "sample"):
        assert (tmp_path / "docs" / f"{name}.png").read_bytes()[1:4] == b"PNG"
