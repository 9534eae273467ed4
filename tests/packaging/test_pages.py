"""README is one page and its Python runs; links and paths in it and in docs/ lead somewhere."""

import re
from pathlib import Path

import pytest

from tests.tiny_models import make_base
from tests.tiny_text import preference_rows

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text()
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
CODE = re.compile(r"```.*?```|`[^`\n]*`", re.DOTALL)
LINK = re.compile(r"\]\(([^)\s]+)\)")


def anchors(page: Path) -> set[str]:
    """Of a page's headings, as GitHub makes them."""
    titles = re.findall(r"^#+ (.+)$", re.sub(r"```.*?```", "", page.read_text(), flags=re.S), re.M)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


def dead(page: Path, text: str) -> list[str]:
    """Links of ``text`` on ``page`` that lead nowhere in the repository."""
    found = []
    for link in LINK.findall(CODE.sub("", text)):
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        if "://" in link or (target.exists() and not anchor):
            continue
        if not (target.suffix == ".md" and target.exists() and anchor in anchors(target)):
            found.append(link)
    return found


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_link_leads_somewhere(page):
    assert dead(page, page.read_text()) == []


def test_a_dead_link_is_found():
    text = "[a](docs/speed.md) [b](docs/none.md) [c](docs/quality.md#results) [d](README.md#none)"
    assert dead(ROOT / "README.md", text) == ["docs/none.md", "README.md#none"]


def test_the_index_names_every_page():
    index = (ROOT / "docs" / "README.md").read_text()
    named = set(LINK.findall(index))
    assert {page.name for page in (ROOT / "docs").glob("*.md")} - {"README.md"} <= named


def test_paths_of_the_source_exist():
    """Files that pages name in code, such as `tests/ops/test_linear.py`."""
    rooms = "qadapter|kernels|csrc|tests|benchmarks|examples"
    rooted = re.compile(rf"(?<![\w./<-])(?:{rooms})/[\w/.-]+")
    missing = {
        f"{page.name}: {path}"
        for page in PAGES
        for path in rooted.findall(page.read_text())
        if re.search(r"\.(py|cpp|cu|h|cuh|md|json|txt)$", path) and not (ROOT / path).exists()
    }
    assert missing == set()


def test_readme_is_one_page():
    lines = README.splitlines()
    assert len(lines) <= 170
    assert max((len(line) for line in lines if line.startswith("|")), default=0) <= 100
    first_screen = "\n".join(lines[:24])
    assert "make demo" in first_screen and "make test" in first_screen


def blocks() -> list[str]:
    return re.findall(r"```python\n(.*?)```", README, re.DOTALL)


def test_the_loss_of_the_readme_runs(capsys):
    exec(blocks()[0], {})
    assert re.fullmatch(r"loss \d\.\d{4}, margin [+-]\d.*, \d\.\d{4}\n", capsys.readouterr().out)


def test_the_whole_way_of_the_readme_runs(tmp_path, monkeypatch, tiny_tokenizer):
    """With a tiny model and a few pairs in the place of those on the Hub."""
    import datasets

    base = make_base()
    base.save_pretrained(tmp_path / "base")
    tiny_tokenizer.save_pretrained(tmp_path / "base")
    pairs = datasets.Dataset.from_list(preference_rows(8))
    monkeypatch.setattr(datasets, "load_dataset", lambda name, split: pairs)
    monkeypatch.chdir(tmp_path)
    hub, steps = '"HuggingFaceTB/SmolLM2-135M-Instruct"', "max_steps=200"
    assert hub in blocks()[1] and steps in blocks()[1]
    code = blocks()[1].replace(hub, '"base"')
    exec(code.replace(steps, "max_steps=2, report_to=[], disable_tqdm=True"), names := {})
    assert names["trainer"].state.global_step == 2
