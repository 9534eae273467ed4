"""README and docs show what the committed results hold, and nothing else."""

import json
import re
import shutil
import sys
from pathlib import Path

import pytest

pytest.importorskip("matplotlib")
sys.path.append(str(Path(__file__).parents[2]))

from benchmarks import plots, report, report_suite

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


def test_readme_has_no_figure_of_its_own():
    assert unsupported((ROOT / "README.md").read_text()) == []


@pytest.fixture
def copied(tmp_path, monkeypatch):
    """The pages and results in a folder that may be changed."""
    shutil.copy(ROOT / "README.md", tmp_path)
    (tmp_path / "docs").mkdir()
    shutil.copytree(ROOT / "benchmarks" / "results", tmp_path / "results")
    for module in (report, plots):
        monkeypatch.setattr(module, "ROOT", tmp_path)
        monkeypatch.setattr(module, "RESULTS", tmp_path / "results")
    return tmp_path


def test_a_figure_that_no_result_holds_is_found(copied):
    page = copied / "README.md"
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
    assert report.stale() == [copied / "README.md"]


def row(who, median, error, peak, **more):
    timing = {"median": median, "p20": median, "p80": median, "best": median}
    case = {"dtype": "fp32", "op": "forward", "who": who}
    return {**case, "ms": timing, "error": {"value": error}, "peak_mib": peak, **more}


def test_where_peers_win_is_shown():
    rows = [row("qadapter", 4.0, 1e-6, 10.0), row("eager", 8.0, 2e-7, 10.5)]
    rows += [row("compile", 3.0, 2e-6, 4.0), {**rows[0], "who": "QuACK", "missing": "no GPU"}]
    table = report_suite.wins([{"benchmark": "logits", "rows": rows}])
    lines = [[cell.strip() for cell in line.split("|")[3:6]] for line in table.splitlines()[2:]]
    assert lines == [
        ["eager", "error of value", "0.20x ours"],
        ["compile", "time", "0.75x ours"],
        ["compile", "memory", "0.40x ours"],
    ]
    rows += [{**r, "op": "backward"} for r in (row("eager", 2.0, 1e-5, 10), rows[0])]
    short = report_suite.wins_short([{"benchmark": "logits", "rows": rows}])
    lines = [[cell.strip() for cell in line.split("|")[2:]] for line in short.splitlines()[2:]]
    assert [(line[0], line[1], line[2], line[-2]) for line in lines] == [
        ("fp32 forward", "eager", "error of value", "1"),
        ("fp32 backward", "eager", "time", "2"),
        ("fp32 forward", "compile", "memory", "1"),
    ]
    for made in (report_suite.wins, report_suite.wins_short):
        alone = made([{"benchmark": "logits", "rows": rows[:1]}])
        assert alone == "No peer is ahead in any figure of these results."


def test_gpu_figures_are_said_to_be_missing():
    machine = {"cpu": "x", "threads": 1, "torch": "2", "date": "2026-01-01T00:00"}
    record = {"benchmark": "logits", "environment": machine, "rows": []}
    assert "**not measured yet**" in report_suite.gpu([record])
    assert "H100" in report_suite.gpu([{**record, "environment": {**machine, "gpu": "H100"}}])


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
    text = report_suite.context(context_record())
    lines = [
        [c.strip() for c in line.split("|")[1:-1]] for line in text.splitlines() if "|" in line
    ]
    assert lines[0] == ["MiB", "ours", "released"]
    assert lines[2:] == [["64", "96", "none"], ["512", "at least 2,048", ""]]
    assert "- TRL DPO: left out." in text
    plots.draw_context(context_record(), tmp_path / "context.png")
    assert (tmp_path / "context.png").read_bytes()[1:4] == b"PNG"
