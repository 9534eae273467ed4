"""The page of ``qadapter chat --web`` in a real browser: what is asked, shown, and linked to.

Needs Gradio, Playwright and a Chromium: make web-test.
"""

import argparse
import shutil
from collections.abc import Iterator

import pytest

from qadapter.cli import chat, main, sampling, web
from qadapter.text.compared import Compared, compare
from qadapter.text.prompts import prompt_ids
from tests.tiny_models import save_two_adapters

pytest.importorskip("gradio", reason="needs qadapter[web]")
playwright = pytest.importorskip("playwright.sync_api", reason="drives a browser by Playwright")

CHROMIUM = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), ""
)
pytestmark = pytest.mark.skipif(not CHROMIUM, reason="needs Chromium")

QUESTION = "tell me about the cat"
OPTIONS = ("--temperature", "0", "--max-new-tokens", "8", "--strength", "1", "--seed", "3")
LIMIT = 60_000  # milliseconds, on a machine that does other things


@pytest.fixture(scope="module")
def folder(tmp_path_factory, tiny_tokenizer):
    return save_two_adapters(tmp_path_factory.mktemp("models"), tiny_tokenizer)


@pytest.fixture(scope="module")
def command(folder):
    adapters = [f"--adapter={name}={folder / name}" for name in ("one", "two")]
    return ["chat", "--web", *adapters, "--weight", "two=0", *OPTIONS]


@pytest.fixture(scope="module")
def loaded(command):
    parser = argparse.ArgumentParser()
    chat.add_parser(parser.add_subparsers())
    options = parser.parse_args(command)
    blend = sampling.parse_blend(options.adapter, options.weight)
    return options, blend, *sampling.load(blend.folders, None, "auto")


@pytest.fixture(scope="module")
def address(loaded) -> Iterator[str]:
    options, blend, model, tokenizer = loaded
    answers = web.in_process(model, tokenizer, blend)
    made = web.page(answers, options, blend.weights)
    web.launch(made)
    yield made.local_url
    made.close()


@pytest.fixture(scope="module")
def browser():
    with playwright.sync_playwright() as driver:
        # Chromium's own sandbox is not to be had for root, which containers run tests as.
        browser = driver.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture
def page(browser, address):
    context = browser.new_context()
    context.set_default_timeout(LIMIT)
    page = context.new_page()
    page.goto(address)
    page.wait_for_selector("#question textarea")
    yield page
    context.close()


@pytest.fixture(scope="module")
def expected(loaded):
    def call(strength, **weights) -> tuple[Compared, Compared]:
        _, blend, model, tokenizer = loaded
        return compare(
            model,
            tokenizer,
            prompt_ids(tokenizer, QUESTION),
            strength=strength,
            adapters=blend.adapters(blend.weights | weights),
            max_new_tokens=8,
            do_sample=False,
        )

    return call


def shown(page, answers):
    """Waits until these are on the page, token by token."""
    for name, answer in zip(("base", "policy"), answers, strict=True):
        wanted = [[text, f"{nats:+.2f}"] for text, nats in answer.pieces]
        page.wait_for_function(
            "([name, wanted]) => JSON.stringify([...document.querySelectorAll("
            "`#${name} .compared span:not(.end)`)].map(s => [s.textContent, s.title]))"
            " === JSON.stringify(wanted)",
            arg=[name, wanted],
        )


def slide(page, name, value):
    number = page.locator(f"#{name} input[type=number]")
    number.fill(str(value))
    number.blur()


def ask(page):
    page.locator("#question textarea").fill(QUESTION)
    page.locator("#question button").first.click()


def test_a_question_and_other_strengths(page, expected):
    ask(page)
    shown(page, expected(1.0))
    for strength in (2.5, 0.0):
        slide(page, "strength", strength)
        shown(page, expected(strength))
        page.get_by_text(f"Policy, strength {strength:g}", exact=True).wait_for()
    base, policy = expected(0.0)
    assert base == policy and base.text != expected(2.5)[1].text


def test_the_slider_itself(page, expected):
    ask(page)
    shown(page, expected(1.0))
    handle = page.locator("#strength input[type=range]").bounding_box()
    middle = handle["y"] + handle["height"] / 2
    page.mouse.move(handle["x"] + handle["width"] / 3, middle)
    page.mouse.down()
    page.mouse.move(handle["x"] + handle["width"] - 1, middle, steps=4)
    page.mouse.up()
    shown(page, expected(3.0))


def test_weights_and_the_link_to_them(page, expected):
    ask(page)
    shown(page, expected(1.0))
    slide(page, "weight-two", -1.5)
    both = expected(1.0, two=-1.5)
    assert both[1].text != expected(1.0)[1].text
    shown(page, both)
    page.wait_for_selector("#settings-link[href*='weight.two=-1.5']")
    page.locator("#settings-link").click()
    page.wait_for_url("**/?*question=*")
    page.reload()
    shown(page, both)  # without a click
    assert page.locator("#question textarea").input_value() == QUESTION
    assert page.locator("#weight-two input[type=number]").input_value() == "-1.5"


def test_a_link_that_is_not_right_is_said(page, address, expected):
    page.goto(address + "?strength=much&question=why")
    page.get_by_text("strength: expected a number, got 'much'").wait_for()
    assert page.locator("#question textarea").input_value() == ""


def test_what_cannot_be_answered_is_said(page, address, expected):
    page.goto(f"{address}?question=cat&max_new_tokens=400")
    page.get_by_text("is more than the model's 256 positions").wait_for()
    slide(page, "strength", 1)  # and the page goes on
    page.goto(address)
    ask(page)
    shown(page, expected(1.0))


def test_nothing_is_fetched_from_elsewhere(browser, address):
    page = browser.new_page()
    asked = []
    page.on("request", lambda request: asked.append(request.url))
    page.goto(address)
    page.wait_for_selector("#question textarea", timeout=LIMIT)
    page.close()
    elsewhere = [u for u in asked if not u.startswith((address, "data:", "blob:"))]
    assert asked and elsewhere == []


def test_the_command_serves_this_machine_alone(command, monkeypatch, capsys):
    import gradio as gr

    pages = []

    def stop(self):
        pages.append(self)
        self.close()

    monkeypatch.setattr(gr.Blocks, "block_thread", stop)
    assert main(command) == 0
    (made,) = pages
    assert made.server_name == "127.0.0.1" and not made.share
    assert f"http://127.0.0.1:{made.server_port}" in capsys.readouterr().out
