"""Sets of benchmarks run on tiny shapes, resume where they were cut off, find what got slower."""

import copy
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from benchmarks import (
    __main__ as suite,
)
from benchmarks import (
    bench,
    bench_context,
    bench_instructions,
    bench_linear,
    bench_logits,
    bench_scaling,
    bench_train_step,
    compare,
    harness,
    linear_problem,
    logits_problem,
    recording,
    sets,
    training_problem,
)
from benchmarks.peers import logits as logits_peers

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.usefixtures("one_thread")
NOTHING = harness.Ceilings(10.0, 10.0, {"float32": 0.1, "bfloat16": 0.1})


@pytest.fixture(autouse=True)
def no_ceilings(monkeypatch):
    monkeypatch.setattr(harness, "ceilings", lambda *_: NOTHING)


@pytest.fixture
def no_compilers(monkeypatch):
    """Compiling takes longer than all else together."""
    for module in (bench_linear, bench_logits):
        few = [name for name in module.PEERS if name not in ("compile", "Liger", "CCE")]
        monkeypatch.setitem(module.OPTIONS, "peers", few)
    monkeypatch.setitem(bench_scaling.OPTIONS, "peers", ["qadapter", "eager"])


def logits_options(path, *more):
    arguments = ["--quick", "--peers", "eager", "TRL", "QuACK", "--dtype", "fp32", *more]
    return bench.parse(bench_logits, [*arguments, "--threads", "1", "--json", str(path)])


@pytest.fixture(scope="module")
def logits(tmp_path_factory):
    path = tmp_path_factory.mktemp("results") / "logits-cpu.json"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(harness, "ceilings", lambda *_: NOTHING)
        bench_logits.run(logits_options(path))
    return json.loads(path.read_text())


def test_rows_say_time_rate_ceiling_memory_error_and_ratio(logits):
    who = {row["who"]: row for row in logits["rows"] if row["op"] == "forward"}
    assert set(who) == {"qadapter", "eager", "TRL", "QuACK"}
    assert who["QuACK"]["missing"] == "it has CUDA kernels only"
    moved = 2 * 16 * 1001 * 4
    for name in ("qadapter", "eager"):
        row = who[name]
        assert row["gb_s"] == pytest.approx(moved / row["ms"]["median"] / 1e6)
        ours = who["qadapter"]["ms"]["median"]
        assert row["times_ours"] == pytest.approx(row["ms"]["median"] / ours)
        assert row["error"]["value"] < 1e-5 and row["peak_mib"] >= 0
        floor = moved / row["read_gb_s"] / 1e6
        assert row["share_of_ceiling"] == pytest.approx(floor / row["ms"]["median"])
    assert logits["ceilings"]["read_gb_s"] == 10.0 and logits["environment"]["threads"] == 1
    assert "QuACK" in logits["cannot"] and "qadapter" not in logits["cannot"]


@pytest.mark.parametrize("alphas", [(1.0, 1.0, 1.0), (0.3, 0.7, 0.0)])
def test_values_composed_of_log_probabilities_are_the_specification(alphas):
    problem = logits_problem.make_problem(6, 50, torch.float32, "cpu", alphas, 1)

    def logps(logits, actions):
        return torch.log_softmax(logits, -1).gather(1, actions[:, None])[:, 0]

    found = logits_peers.values_from_logps(problem, logps)
    expected = logits_peers.eager_values(problem.base, problem.q, problem.actions, *alphas)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)
    truth = logits_problem.solve(problem, step=4)  # chunks that do not divide the rows
    assert max(logits_problem.value_errors(truth, found).values()) < 1e-4
    torch.autograd.backward((found[0], found[1], found[3]), tuple(problem.grads))
    assert logits_problem.gradient_error(problem.q.grad, truth.grad, step=4) < 1e-4
    problem.q.grad = None
    logits_peers.OURS.loss(problem).backward()
    assert logits_problem.gradient_error(problem.q.grad, truth.of_loss) < 1e-4
    assert logits_problem.gradient_error(problem.q.grad, 2 * truth.of_loss) > 0.1


def test_resume_measures_what_is_missing_only(logits, tmp_path):
    path = tmp_path / "logits-cpu.json"
    kept = [row for row in logits["rows"] if row["op"] != "backward"]
    path.write_text(json.dumps({**logits, "rows": kept}))
    bench_logits.run(logits_options(path, "--resume"))
    again = json.loads(path.read_text())["rows"]
    assert [row for row in again if row["op"] != "backward"] == kept
    assert {row["who"] for row in again if row["op"] == "backward"} == {
        row["who"] for row in logits["rows"]
    }


@pytest.mark.parametrize(
    ("place", "name", "value"),
    [("environment", "threads", 7), ("environment", "cpu", "another"), (None, "shape", {"n": 1})],
)
def test_resume_refuses_other_conditions(logits, tmp_path, place, name, value):
    path = tmp_path / "logits-cpu.json"
    changed = copy.deepcopy(logits)
    (changed if place is None else changed[place])[name] = value
    path.write_text(json.dumps(changed))
    with pytest.raises(ValueError, match=f"other conditions: {name}"):
        bench_logits.run(logits_options(path, "--resume"))
    assert json.loads(path.read_text()) == changed


def test_a_run_that_is_cut_off_keeps_its_cases(tmp_path, monkeypatch):
    done = []

    def failing(op, *rest):
        if done:
            raise KeyboardInterrupt
        done.append(op)
        return [{"who": "qadapter", "missing": "none"}]

    monkeypatch.setattr(bench_logits, "run_case", failing)
    path = tmp_path / "logits-cpu.json"
    with pytest.raises(KeyboardInterrupt):
        bench_logits.run(logits_options(path))
    assert [row["op"] for row in json.loads(path.read_text())["rows"]] == ["forward"]


def test_every_set_can_be_parsed():
    for name, chosen in sets.SETS.items():
        earlier = set()
        for step in chosen.steps:
            # A file that is there already is added to, not written over.
            assert (step.name in earlier) == ("--append" in step.arguments), (name, step.name)
            earlier.add(step.name)
            module = suite.importlib.import_module(step.module)
            options = bench.parse(module, [*step.arguments, "--json", "x.json"])
            assert options.json == "x.json" and not options.quick
    assert {"logits", "linear", "sample", "decode", "train_step"} <= {
        step.name for step in sets.SETS["cpu-quick"].steps
    }


@pytest.mark.usefixtures("no_compilers")
def test_a_tiny_set_goes_through(tmp_path, capsys):
    only = ["logits", "linear_scaling", "context"]
    arguments = ["gpu", "--device", "cpu", "--tiny", "--threads", "1", "--output", str(tmp_path)]
    assert suite.main([*arguments, "--only", *only]) == 0
    text = capsys.readouterr().out
    assert text.index("ceilings of this run: read 10.0 GB/s") < text.index("== logits")
    for name in only:
        record = json.loads((tmp_path / f"{name}-cpu.json").read_text())
        assert record["benchmark"] == name and record["rows"]
        assert record["ceilings"]["copy_gb_s"] == 10.0
    sweeps = json.loads((tmp_path / "linear_scaling-cpu.json").read_text())["rows"]
    assert {row["sweep"] for row in sweeps} == set(bench_scaling.SWEEPS)


@pytest.mark.usefixtures("no_compilers")
def test_a_step_that_fails_does_not_end_the_set(tmp_path, monkeypatch, capsys):
    def failing(_):
        raise ValueError("on purpose")

    monkeypatch.setattr(bench_logits, "run", failing)
    arguments = ["cpu", "--tiny", "--threads", "1", "--output", str(tmp_path)]
    assert suite.main([*arguments, "--only", "logits", "linear"]) == 1
    assert "logits: ValueError: on purpose" in capsys.readouterr().err
    assert (tmp_path / "linear-cpu.json").is_file()


def test_what_cannot_be_asked_for(tmp_path):
    with pytest.raises(SystemExit, match="--output"):
        suite.main(["cpu-quick", "--tiny"])
    with pytest.raises(SystemExit):
        suite.main(["cpu-quick", "--only", "loss_curves"])
    if not torch.cuda.is_available():
        with pytest.raises(SystemExit, match="needs a CUDA device"):
            suite.main(["gpu", "--output", str(tmp_path)])


def test_inputs_that_fit_the_cache_are_driven_out(monkeypatch):
    read = []
    plain = torch.sum
    monkeypatch.setattr(torch, "sum", lambda t, *a, **k: read.append(t.nbytes) or plain(t, *a, **k))
    monkeypatch.setattr(harness, "cache_bytes", lambda: 1 << 20)
    harness.interleaved({"f": lambda: None}, rounds=3, least=3, cold=True)
    assert read == [harness.COLD << 20] * 3
    harness.interleaved({"f": lambda: None}, rounds=3, least=3)
    assert len(read) == 3


def test_who_is_far_slower_is_timed_once_and_said_to_be(monkeypatch):
    seconds, runs, now = {"ours": 2.0, "near": 39.0, "far": 41.0}, {}, [0.0]
    monkeypatch.setitem(harness.CLOCKS, "wall", lambda: now[0])

    def function(name):
        def run():
            runs[name] = runs.get(name, 0) + 1
            now[0] += seconds[name]

        return run

    def timed(*more):
        runs.clear()
        options = bench.parse(bench_logits, ["--rounds", "3", *more])
        return bench.timed({n: function(n) for n in seconds}, options, 1 << 60, "ours", warmup=0)

    times = timed("--far", "20")
    assert runs["far"] == 1 and times["far"].best == 41e3
    assert {name: timing.runs for name, timing in times.items()} == {"ours": 3, "near": 3, "far": 1}
    shown = recording.show([{"who": name, "ms": timing} for name, timing in times.items()])
    assert "far: timed once" in shown and "near: timed once" not in shown
    assert timed()["far"].runs == 3


@pytest.mark.parametrize(("budget", "length", "at_least"), [(999, 960, False), (10**9, 4096, True)])
def test_the_longest_context(budget, length, at_least):
    tried = []

    def peak(n):
        tried.append(n)
        return float(n)

    found = bench_context.longest(peak, budget, 64, 4096)
    assert (found["length"], found["at_least"]) == (length, at_least)
    assert found["peak_mib"] == length
    assert found["beyond_mib"] == (None if at_least else 1024)


def test_a_length_that_cannot_be_tried_is_no_limit():
    found = bench_context.longest(lambda n: None if n > 256 else float(n), 900, 64, 4096)
    assert (found["length"], found["at_least"]) == (256, True)
    nothing = bench_context.longest(lambda n: 1e6, 900, 64, 4096)
    assert (nothing["length"], nothing["peak_mib"], nothing["beyond_mib"]) == (0, None, 1e6)


def test_a_training_step_and_its_parts(tmp_path):
    path = tmp_path / "steps.json"
    arguments = ["--quick", "--lengths", "16", "--threads", "1", "--json", str(path)]
    bench_train_step.run(bench.parse(bench_train_step, arguments))
    record = json.loads(path.read_text())
    (row,) = record["rows"]
    # The pack has the prompt once, and no last tokens: nothing follows them.
    assert (row["tokens"], row["packed"]) == (2 * (16 + 16), 16 + 2 * 15)
    parts = row["parts"]
    known = sum(parts[name]["median"] for name in training_problem.PARTS)
    assert parts["rest"] == pytest.approx(parts["step"]["median"] - known)
    assert {"products", "products cached", "cached"} <= parts.keys()
    # Random weights have no tokenizer, without which TRL's trainer cannot be made.
    assert "TRL DPO" in record["missing"] and "TRL DPO ms" not in row


def result(**changes):
    timing = {"median": 10.0, "p20": 9.8, "p80": 10.2, "best": 9.7}
    rows = [{"dtype": "fp32", "op": "forward", "who": "qadapter", "ms": timing, "peak_mib": 100.0}]
    machine = {"cpu": "x", "cores": 2, "threads": 2, "torch": "2.13"}
    record = {"benchmark": "logits", "environment": machine, "clock": "wall", "rows": rows}
    record = copy.deepcopy(record)
    record["rows"][0] |= changes
    return record


def timing(median, best, half=0.0):
    return {"median": median, "p20": median - half, "p80": median + half, "best": best}


@pytest.mark.parametrize(
    ("ms", "verdict"),
    [
        (timing(10.4, 10.1), "same"),  # within 5 %
        (timing(12.0, 11.7), "slower"),
        (timing(12.0, 9.8), "same"),  # the best did not move: others on the machine
        (timing(12.0, 11.7, half=2.0), "same"),  # within twice the noise
        (timing(8.0, 7.8), "faster"),
    ],
)
def test_what_counts_as_slower(ms, verdict):
    assert verdicts(result(), result(ms=ms))["time"] == verdict


def verdicts(old, new):
    found = compare.differences(old, new)
    return dict(zip(found["kind"], found["verdict"], strict=True))


def test_memory_and_instructions_are_compared():
    assert verdicts(result(), result(peak_mib=120.0)) == {"time": "same", "memory": "slower"}
    old, new = result(instructions=1000), result(instructions=1015)
    assert verdicts(old, new)["instructions"] == "slower"
    assert verdicts(old, old)["instructions"] == "same"


def test_the_command_prints_its_noise_and_fails_on_what_is_slower(tmp_path, capsys):
    paths = [tmp_path / "old.json", tmp_path / "new.json"]
    for path, record in zip(paths, (result(), result(ms=timing(12.0, 11.7))), strict=True):
        path.write_text(json.dumps(record))
    old, new = map(str, paths)
    assert suite.main(["compare", old, old]) == 0
    assert "noise of a ratio of times: median 2.8%" in capsys.readouterr().out
    assert suite.main(["compare", old, new]) == 1
    text = capsys.readouterr().out
    assert "SLOWER" in text and "1.200" in text and "1 worse, 0 better" in text
    other = result()
    other["environment"]["threads"] = 1
    paths[1].write_text(json.dumps(other))
    with pytest.raises(SystemExit, match="threads: 2 and 1"):
        suite.main(["compare", old, new])


PROFILE = """events: Ir
fn=(1) main
cfn=(2) _ZN8qadapter12residual_fwdESt8optional
calls=2 10
5 300
fn=(2)
7 100
cfn=(3) _ZZN8qadapter12residual_fwdESt8optionalENKUllE_clEl
calls=8 3
7 200
fn=(4) other
cfn=(2)
calls=1 10
+3 150
totals: 1000
"""


def test_counts_are_read_from_a_profile():
    profile = bench_instructions.read_profile(PROFILE)
    assert profile["_ZN8qadapter12residual_fwdESt8optional"] == (3, 450)
    assert bench_instructions.of_kernel("residual_fwd", profile) == 150  # no lambda inside it
    with pytest.raises(RuntimeError, match="residual_bwd did not run"):
        bench_instructions.of_kernel("residual_bwd", profile)


def test_a_tool_that_is_missing_is_said(tmp_path, monkeypatch):
    monkeypatch.setattr(bench_instructions.shutil, "which", lambda _: None)
    path = tmp_path / "instructions-cpu.json"
    options = bench.parse(bench_instructions, ["--quick", "--json", str(path)])
    bench_instructions.run(options)
    (row,) = json.loads(path.read_text())["rows"]
    assert row["missing"] == "valgrind is not installed"


def test_a_tool_that_is_there_is_not_missing(monkeypatch):
    from qadapter.ops import cpp

    monkeypatch.setattr(bench_instructions.shutil, "which", lambda _: "/usr/bin/valgrind")
    monkeypatch.setattr(cpp, "why_not_loaded", lambda: None)
    assert bench_instructions.missing_reason() == ""
    monkeypatch.setattr(cpp, "why_not_loaded", lambda: "not built")
    assert bench_instructions.missing_reason() == "not built"


def test_the_driver_runs_every_kernel():
    from benchmarks import instruction_driver
    from qadapter.ops import cpp

    if not cpp.available()[0]:
        pytest.skip(cpp.available()[1])
    with torch.profiler.profile() as profile:
        instruction_driver.run(list(instruction_driver.CASES), 1)
    seen = {event.key for event in profile.key_averages()}
    for name in {case.split()[0] for case in instruction_driver.CASES}:
        assert f"qadapter_C::{name}" in seen, name


@pytest.mark.slow
def test_regression_runs_of_the_operations():
    command = [sys.executable, "-m", "pytest", "-q", "benchmarks", "--tiny", "--benchmark-disable"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-2000:]
    assert "24 passed" in done.stdout


def test_peers_that_are_missing_say_why():
    problem = linear_problem.make_problem(
        8, 16, 50, torch.float32, "cpu", linear_problem.MODES["uncached"], 1
    )
    options = bench.parse(bench_linear, ["--quick", "--peers", "QuACK", "CCE exact", "eager"])
    rows = bench_linear.run_case(options.peers, problem, None, options)
    missing = {row["who"]: row["missing"] for row in rows if "missing" in row}
    assert missing == {"QuACK": "it has CUDA kernels only", "CCE exact": "on a CPU the same as CCE"}
    ours = next(row for row in rows if row["who"] == "qadapter")
    flops = 3 * 2 * 8 * 16 * 50
    assert ours["share_of_ceiling"] == pytest.approx(flops / ours["ms"].median / 1e9 / 0.1)


def test_the_machine_is_recorded():
    found = recording.environment("cpu")
    assert set(recording.MACHINE) - {"gpu"} <= found.keys()
    assert found["cache_mib"] >= 0 and found["memory_gib"] >= 0 and found["backends"]
