"""README and docs show what the committed results hold, and nothing else."""

import json
import re
import shutil
from pathlib import Path

import pytest

pytest.importorskip("matplotlib")

from benchmarks import plots, plotting, report, report_overall, report_tables, tables

ROOT = Path(__file__).parents[2]
BLOCK = re.compile(r"<!-- table:(\w+) -->.*?<!-- /table -->", re.S)
# What is said of speed or memory in running text: a number and its unit.
UNITS = r"\s?(?:ms|s/pair|[KMG]i?B(?:/s)?|[GT]FLOP/s)(?!\w)"
FIGURE = re.compile(rf"\d[\d.,]*(?:x\b|{UNITS}|\s?times (?:faster|less|as))")


def prose(text):
    """A page without its tables and its code."""
    return re.sub(r"```.*?```", "", BLOCK.sub("", text), flags=re.S)


def unsupported(text):
    """Figures of a page's running text that no table of the results has."""
    names = (*report.TABLES, *report.OVERALL)
    held = " ".join(report.content(name) for name in names)
    return [f for f in FIGURE.findall(prose(text)) if f not in held]


def test_pages_show_what_the_results_hold():
    assert report.stale() == []


def test_every_marker_is_known():
    known = {*report.TABLES, *report.OVERALL}
    for page in report.pages():
        text = page.read_text()
        assert set(re.findall(r"<!-- table:(\w+) -->", text)) <= known, page
        assert len(BLOCK.findall(text)) == text.count("<!-- table:"), page


@pytest.mark.parametrize("page", ["README.md", "docs/speed.md"])
def test_what_is_said_of_speed_is_in_the_results(page):
    assert unsupported((ROOT / page).read_text()) == []


@pytest.fixture
def copied(tmp_path, monkeypatch):
    """The pages and results in a folder that may be changed."""
    (tmp_path / "docs").mkdir()
    for page in ("README.md", "docs/speed.md"):
        shutil.copy(ROOT / page, tmp_path / page)
    shutil.copytree(ROOT / "benchmarks" / "results", tmp_path / "results")
    monkeypatch.setattr(report, "ROOT", tmp_path)
    monkeypatch.setattr(report, "RESULTS", tmp_path / "results")
    return tmp_path


def test_a_figure_that_no_result_holds_is_found(copied):
    page = copied / "docs" / "speed.md"
    text = page.read_text()
    table = text.index("<!-- table:logits -->")
    number = re.compile(r"\d+\.\dx").search(text, table)
    page.write_text(f"{text[: number.start()]}987.6x{text[number.end() :]}")
    assert report.stale() == [page]
    assert report.main(["--check"]) == 1
    assert report.main(["--no-plots"]) == 0 and report.main(["--check"]) == 0
    assert page.read_text() == text
    assert unsupported(f"{text}\nIt is 987.6x faster and takes 54321 MiB.") == [
        "987.6x",
        "54321 MiB",
    ]


def test_a_result_that_changes_makes_the_page_stale(copied):
    path = copied / "results" / "logits-cpu.json"
    record = json.loads(path.read_text())
    for row in record["rows"]:
        if "missing" not in row:
            row["ms"]["median"] *= 3
    path.write_text(json.dumps(record))
    assert report.stale() == [copied / "README.md", copied / "docs" / "speed.md"]


def test_a_table_has_a_column_each_and_nothing_where_nothing_is():
    rows = tables.frame(
        [
            {"who": "a", "ms": {"median": 1234.5, "p20": 1, "p80": 2}, "share": 0.5, "n": 3},
            {"who": "b", "ms": {"median": 2.0, "p20": 1, "p80": 3}, "share": None},
            {"who": "c", "missing": "left out"},
        ]
    )
    columns = [("", "who"), ("ms", tables.spread(1)), ("share", "share", "{:.0%}")]
    columns += [("twice", lambda row: 2 * row["n"], "{:g}"), ("none", "no such field")]
    assert tables.table(rows, columns).splitlines() == [
        "|   |                ms | share | twice | none |",
        "|--:|------------------:|------:|------:|-----:|",
        "| a | 1,234.5 (1.0-2.0) |   50% |     6 |      |",
        "| b |     2.0 (1.0-3.0) |       |       |      |",
    ]


def test_competitors_side_by_side():
    case = [("bf16", "ours"), ("fp32", "ours"), ("fp32", "eager"), ("bf16", "compile")]
    rows = tables.frame({"dtype": d, "who": w, "ms": i} for i, (d, w) in enumerate(case))
    wide = tables.beside(rows, ("dtype",))
    columns = [("", "dtype"), *((who, f"{who} ms", "{:g}") for who in ("ours", "eager"))]
    lines = [
        [c.strip() for c in line.split("|")] for line in tables.table(wide, columns).split("\n")
    ]
    assert lines[2:] == [["", "bf16", "0", "", ""], ["", "fp32", "1", "2", ""]]
    assert list(tables.beside(rows, ("dtype",), ["eager"])["dtype"]) == ["fp32"]
    assert tables.beside(rows, ("dtype",), ["QuACK"]).empty


def test_who_is_left_out_everywhere_or_somewhere():
    rows = [
        {"who": "a", "mode": "x", "missing": "no GPU"},
        {"who": "a", "mode": "y", "missing": "no GPU"},
        {"who": "b", "mode": "y", "missing": "no place"},
        {"who": "b", "mode": "x"},
    ]
    assert tables.left_out(rows, "mode") == "- a: no GPU.\n- b (y): no place."
    assert tables.left_out(rows[3:], "mode") == ""


def row(who, median, error, peak, **more):
    timing = {"median": median, "p20": median, "p80": median, "best": median}
    case = {"dtype": "fp32", "op": "forward", "who": who}
    return {**case, "ms": timing, "error": {"value": error}, "peak_mib": peak, **more}


def test_where_peers_win_is_shown():
    rows = [row("qadapter", 4.0, 1e-6, 10.0), row("eager", 8.0, 2e-7, 10.5)]
    rows += [row("compile", 3.0, 2e-6, 4.0), {**rows[0], "who": "QuACK", "missing": "no GPU"}]
    table = report_overall.wins([{"benchmark": "logits", "rows": rows}])
    lines = [[cell.strip() for cell in line.split("|")[3:6]] for line in table.splitlines()[2:]]
    assert lines == [
        ["eager", "error of value", "0.20x ours"],
        ["compile", "time", "0.75x ours"],
        ["compile", "memory", "0.40x ours"],
    ]
    rows += [{**r, "op": "backward"} for r in (row("eager", 2.0, 1e-5, 10), rows[0])]
    short = report_overall.wins_short([{"benchmark": "logits", "rows": rows}])
    lines = [[cell.strip() for cell in line.split("|")[2:]] for line in short.splitlines()[2:]]
    assert [(line[0], line[1], line[2], line[-2]) for line in lines] == [
        ("fp32 forward", "eager", "error of value", "1"),
        ("fp32 backward", "eager", "time", "2"),
        ("fp32 forward", "compile", "memory", "1"),
    ]
    for made in (report_overall.wins, report_overall.wins_short):
        alone = made([{"benchmark": "logits", "rows": rows[:1]}])
        assert alone == "No peer is ahead in any figure of these results."


def test_gpu_figures_are_said_to_be_missing():
    machine = {"cpu": "x", "threads": 1, "torch": "2", "date": "2026-01-01T00:00"}
    record = {"benchmark": "logits", "environment": machine, "rows": []}
    assert "**not measured yet**" in report_overall.gpu([record])
    assert "H100" in report_overall.gpu([{**record, "environment": {**machine, "gpu": "H100"}}])


def context_record():
    machine = {"cpu": "x", "threads": 1, "torch": "2", "date": "2026-01-01T00:00"}
    rows = [
        {"who": "ours", "budget_mib": 64, "length": 96, "at_least": False},
        {"who": "released", "budget_mib": 64, "length": 0, "at_least": False},
        {"who": "ours", "budget_mib": 512, "length": 2048, "at_least": True},
    ]
    for each in rows:
        each["peaks"] = {"32": 20.0, "64": 40.0, "128": 80.0}
    more = {"model": "tiny", "resolution": 32, "missing": {"TRL DPO": "left out"}}
    return {"benchmark": "context", "environment": machine, "rows": rows, **more}


def test_contexts_as_table_and_plot(tmp_path):
    text = report_tables.context(context_record())
    lines = [
        [c.strip() for c in line.split("|")[1:-1]] for line in text.splitlines() if "|" in line
    ]
    assert lines[0] == ["MiB", "ours", "released"]
    assert lines[2:] == [["64", "96", "none"], ["512", "at least 2,048", ""]]
    assert "- TRL DPO: left out." in text
    plotting.save(plots.context(context_record()), tmp_path / "context.png")
    assert (tmp_path / "context.png").read_bytes()[1:4] == b"PNG"


def cells(table):
    """Of a Markdown table, its header and ruler left out."""
    lines = [line for line in table.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines[2:]]


def results_of(name, machine):
    return ROOT / "benchmarks" / "results" / f"{name}-{machine}.json"


def is_measured(name, machine):
    return results_of(name, machine).exists()


def committed(name, machine="cpu"):
    return json.loads(results_of(name, machine).read_text())


def medians(name, machine="cpu", **case):
    """who -> median of the rows of one case."""
    found_rows = committed(name, machine)["rows"]
    rows = [r for r in found_rows if case.items() <= r.items() and "ms" in r]
    found = {row["who"]: row["ms"]["median"] for row in rows}
    assert len(found) == len(rows)
    return found


MACHINES = {"AVX-512 bf16": "cpu", "AMX": "cpu-amx", "AVX2": "cpu-avx2"}


@pytest.mark.parametrize("column", MACHINES)
def test_the_speed_in_short_is_of_the_results(column):
    machine, text = MACHINES[column], report.content("speed")
    about = committed("logits", machine)["environment"]
    assert f"- {column}: {about['cpu']}, {column}, {about['threads']} thread" in text
    header = next(line for line in text.splitlines() if line.startswith("|"))
    place = [cell.strip() for cell in header.split("|")[1:-1]].index(column)
    lines = {(line[0], line[1]): line[place] for line in cells(text)}

    def check(what, peer, ours, theirs):
        assert lines[what, peer] == report_overall.in_short(ours, theirs)

    if is_measured("train_step", machine):
        rows = committed("train_step", machine)["rows"]
        mean = {
            way: sum(row[f"{way} ms"]["median"] for row in rows) / len(rows)
            for way in ("ours", "cached", "TRL DPO")
        }
        step = "a step, smollm2, 4 pairs"
        check(step, "TRL's DPO", mean["ours"], mean["TRL DPO"])
        check("the same, the base cached", "TRL's DPO", mean["cached"], mean["TRL DPO"])
    if is_measured("linear", machine):
        dtype = "fp32" if column == "AVX2" else "bf16"  # as training takes it there
        who = medians("linear", machine, dtype=dtype, d=576, v=49152, mode="uncached")
        hidden = "hidden, 576 x 49,152"
        check(hidden, "torch.compile", who["qadapter"], who["compile"])
    who = medians("logits", machine, dtype="bf16", op="loss+backward")
    logits = "logits, bf16 256 x 128,256"
    check(logits, "torch.compile", who["qadapter"], who["compile"])
    who = medians("decode", machine, batch=8, mode="sampled", lora="all")
    token = "a token, smollm2, 2 x 8 rows"
    check(token, "two forwards", who["two streams"], who["naive"])
    case = {"streams": "two", "logits": "peaked", "filters": "top-k, top-p"}
    who = medians("sample", machine, dtype="bf16", b=8, v=49152, **case)
    draw = "sampling, bf16 8 x 49,152"
    check(draw, "transformers", who["qadapter cpp"], who["transformers"])


def test_the_speed_in_short_says_times_and_ratios():
    assert report_overall.in_short(1420.0, 9798.0) == "1.42 s, 6.9x"
    assert report_overall.in_short(0.1384, 16.2) == "0.14 ms, 117x"


def test_the_speed_in_short_is_narrow():
    assert max(map(len, report.content("speed").splitlines())) <= 100


def test_the_speed_in_short_of_nothing_is_said_to_be_missing(copied):
    for path in (copied / "results").glob("*.json"):
        path.unlink()
    assert report.content("speed") == "Not measured yet."
