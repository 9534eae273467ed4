"""``qadapter chat --web``, without a browser: what it asks for, its links, its HTML, its client.

The page itself: test_web_page.py. A real server: tests/serving.
"""

import argparse
import http.server
import importlib.util
import json
import threading
import urllib.parse
from contextlib import contextmanager

import pytest

from qadapter.cli import main, web
from qadapter.cli.web_server import Server
from qadapter.text.compared import Compared


@pytest.fixture
def options():
    parser = argparse.ArgumentParser()
    from qadapter.cli import chat

    chat.add_parser(parser.add_subparsers())
    made = parser.parse_args(["chat", "--web", "--adapter", "x", "--strength", "1", "--seed", "7"])
    made.weights = {"one": 1.0, "two": 1.0}
    return made


def test_a_link_leads_to_the_same_settings(options):
    given = {
        "question": "What is <b> & why? ü", "system": "be short", "strength": 0.35,
        "temperature": 0, "top_p": 0.5, "max_new_tokens": 17, "seed": 3,
    }  # fmt: skip
    made = web.settings(options, given, {"one": 1.0, "two": -0.25})
    query = dict(urllib.parse.parse_qsl(web.link(made).removeprefix("?")))
    again = web.from_link(options, query, ["one", "two"])
    assert vars(again) == vars(made)
    assert {name: getattr(made, name) for name in given} == given
    assert made.weights == {"one": 1.0, "two": -0.25} and made.max_new_tokens == 17


def test_a_link_without_settings_has_those_of_the_command(options):
    made = web.from_link(options, {"question": "why"}, ["one", "two"])
    assert (made.question, made.strength, made.seed, made.temperature) == ("why", 1.0, 7, 0.7)
    assert made.weights == options.weights and made.system == ""
    assert vars(web.settings(options, vars(made), made.weights)) == vars(made)


@pytest.mark.parametrize(
    ("query", "message"),
    [
        ({"strength": "much"}, "strength: expected a number, got 'much'"),
        ({"strength": "-1"}, "strength: expected 0 (the base) or more, got -1.0"),
        ({"temperature": "nan"}, "temperature: expected a number"),
        ({"top_p": "2"}, "--top-p: expected a number in (0, 1], got 2.0"),
        ({"max_new_tokens": "1.5"}, "max_new_tokens: expected a whole number, got 1.5"),
        ({"max_new_tokens": "0"}, "--max-new-tokens: expected 1 or more, got 0"),
        ({"weight.two": "x"}, "weight.two: expected a number, got 'x'"),
    ],
)
def test_what_does_not_fit_is_named(options, query, message):
    with pytest.raises(ValueError) as error:
        web.from_link(options, query, ["one", "two"])
    assert message in str(error.value)


def test_text_of_the_model_is_no_html():
    answer = Compared([("<script>", 3.0), (" a&b", -0.25)], -9.0, "eos")
    made = web.coloured(answer)
    assert "&lt;script&gt;" in made and " a&amp;b" in made and "<script" not in made
    assert [f'title="{n}"' in made for n in ("+3.00", "-0.25", "-9.00")] == [True] * 3
    assert "cut off" in web.coloured(answer._replace(end=None, finish_reason="length"))


def test_colours_say_which_way_and_how_far():
    assert web.colour(3.0) == web.colour(50.0) == web.colour(float("inf"))
    assert web.colour(0.0).endswith(" 0.00)") and web.colour(float("nan")).endswith(" 0.00)")
    more, less = web.colour(1.5), web.colour(-1.5)
    assert more != less and more.endswith(" 0.30)") and less.endswith(" 0.30)")


@pytest.mark.parametrize(
    ("command", "message"),
    [
        ([], "--adapter: expected the folder of a saved adapter"),
        (["--server", "http://127.0.0.1:1", "--adapter", "x"], "--server: is of the page"),
        (
            ["--web", "--server", "http://127.0.0.1:1", "--adapter", "x"],
            "--adapter: what is served",
        ),
        (["--port", "80", "--adapter", "x"], "--port: is of the page, give --web"),
        (["--web", "--server", "x:1", "--strength", "recommended"], "--strength: give a number"),
    ],
)
def test_options_that_do_not_go_together(capsys, command, message):
    assert main(["chat", *command]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1


def test_without_gradio_one_line_says_what_to_install_and_what_works(capsys, monkeypatch):
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda n: None if n == "gradio" else found(n))
    assert main(["chat", "--web", "--adapter", "x"]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert 'pip install "qadapter[web]"' in error and "conversation in the terminal" in error


# The client. Tokens of this server's answers: "a", half of a character, the other half, the end.

TEXTS = ["a", "", "\u00e9", ""]
LOGPROBS = {0.0: [-1.0, -2.0, -3.0, -4.0], 0.5: [-1.5, -1.0, -3.25, -1.0]}


@contextmanager
def serving(chunks=(1, 1, 1, 1), refuse=False, token_ids=True):
    seen = []

    class Handler(http.server.BaseHTTPRequestHandler):
        def log_message(self, *arguments):
            pass

        def do_GET(self):
            self.send_json({"data": [{"id": "qadapter"}]})

        def do_POST(self):
            asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            seen.append((self.path, asked))
            if refuse:
                self.send_json({"error": {"message": "strength: too much"}}, 400)
            elif self.path == "/v1/completions":
                made = LOGPROBS[asked["vllm_xargs"]["strength"]]
                of = zip(asked["prompt"][2:], made, strict=True)
                rows = [None, {"9": {"logprob": -9.0}}] + [{str(t): {"logprob": p}} for t, p in of]
                self.send_json({"choices": [{"prompt_logprobs": rows}]})
            else:
                self.stream()

        def stream(self):
            self.send_response(200)
            self.end_headers()
            at = 0
            first = {"prompt_token_ids": [5, 9]} if token_ids else {}
            self.event({"choices": [{"delta": {"role": "assistant", "content": ""}}]} | first)
            for count in chunks:
                choice = {"delta": {"content": "".join(TEXTS[at : at + count])}}
                if token_ids:
                    choice["token_ids"] = list(range(20 + at, 20 + at + count))
                at += count
                if at == len(TEXTS):
                    choice["finish_reason"] = "stop"
                self.event({"choices": [choice]})
            self.wfile.write(b"data: [DONE]\n\n")

        def event(self, value):
            self.wfile.write(f"data: {json.dumps(value)}\n\n".encode())

        def send_json(self, value, status=200):
            self.send_response(status)
            self.end_headers()
            self.wfile.write(json.dumps(value).encode())

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", seen
    finally:
        server.shutdown()
        server.server_close()


@pytest.fixture
def asked(options):
    return web.settings(options, {"question": "why", "strength": 0.5, "system": "short"}, {})


def test_answers_of_a_server(asked):
    with serving() as (address, seen):
        base, policy = Server(address).compare(asked)
    assert base == policy == ([("a", -0.5), ("\u00e9", 0.75)], 3.0, "eos")
    chats = [asked for path, asked in seen if path == "/v1/chat/completions"]
    assert sorted(chat["vllm_xargs"]["strength"] for chat in chats) == [0.0, 0.5]
    for chat in chats:
        roles = [(m["role"], m["content"]) for m in chat["messages"]]
        assert roles == [("system", "short"), ("user", "why")]
        assert (chat["seed"], chat["top_p"], chat["max_tokens"]) == (7, 0.95, 256)


@pytest.mark.parametrize("chunks", [(2, 2), (4,), (1, 3)], ids=str)
def test_tokens_that_come_together(asked, chunks):
    with serving(chunks) as (address, _):
        base, _ = Server(address + "/v1/").compare(asked)
    assert base.text == "a\u00e9" and base.end == 3.0
    assert sum(nats for _, nats in base.pieces) == pytest.approx(0.25)


def test_what_a_server_refuses_is_told_in_its_words(asked):
    with serving(refuse=True) as (address, _), pytest.raises(ValueError, match="too much"):
        Server(address).compare(asked)
    with serving(token_ids=False) as (address, _), pytest.raises(ValueError, match="no token ids"):
        Server(address).compare(asked)


def test_no_server(capsys):
    with pytest.raises(ValueError, match="expected http://HOST:PORT"):
        Server("127.0.0.1:8000")
    with serving() as (address, _):
        pass
    with pytest.raises(OSError, match="does not answer"):
        Server(address)
