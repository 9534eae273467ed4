"""The whole way of a user: `qadapter serve`, and the official client of OpenAI's interface."""

import argparse
import asyncio
import importlib
import os
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import pytest
import torch

pytest.importorskip("vllm", reason="needs vLLM, in an environment of its own: make serve-test")

import openai

from qadapter.cli.web_server import Server
from qadapter.text.compared import compare
from qadapter.text.prompts import prompt_ids
from tests.serving.tiny import VOCAB, save_adapter, save_base
from tests.tiny_text import WORDS, word_tokenizer

LIMIT = 1500  # seconds: three processes start, perhaps on a machine that does other things
OPTIONS = (
    *("--max-model-len", "128", "--max-num-seqs", "6", "--enforce-eager", "--enable-log-requests"),
    *("--kv-cache-memory-bytes", str(1 << 28)),
)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("server")


@pytest.fixture(scope="module")
def model(folder):
    tokenizer = word_tokenizer()
    assert len(tokenizer) < VOCAB
    base = save_base(folder / "base", "llama", bos_token_id=1)
    tokenizer.save_pretrained(base)
    return save_adapter(folder / "adapter", base)


@pytest.fixture(scope="module")
def address(folder, model):
    port = free_port()
    command = [sys.executable, "-m", "qadapter.cli", "serve", "--adapter", folder / "adapter"]
    command += ["--dtype", "float32", "--port", str(port), "--", *OPTIONS]
    environment = {**os.environ, "VLLM_ENABLE_V1_MULTIPROCESSING": "1"}
    log = folder / "server.log"
    with log.open("w") as file:
        server = subprocess.Popen(command, stdout=file, stderr=file, env=environment)
    try:
        until = time.monotonic() + LIMIT
        while not answers(port):
            assert server.poll() is None and time.monotonic() < until, log.read_text()[-8000:]
            time.sleep(1)
        yield f"http://127.0.0.1:{port}/v1"
    finally:
        server.terminate()
        server.wait(60)


def answers(port: int) -> bool:
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5) as response:
            return response.status == 200
    except OSError:
        return False


def expected(model, ids: list[int], strength: float, tokens: int) -> list[int]:
    options = {"max_new_tokens": tokens, "do_sample": False}
    made = model.generate(torch.tensor([ids]), strength=strength, **options)
    return made[0, len(ids) :].tolist()


def extra(**arguments):
    return {"vllm_xargs": arguments, "return_token_ids": True, "ignore_eos": True}


def test_32_requests_at_once(address, model):
    """Of them some ask for what is no strength, and one client goes away."""
    words = torch.Generator().manual_seed(0)
    prompts = [
        torch.randint(6, 6 + len(set(WORDS)), (1 + (11 * i) % 40,), generator=words).tolist()
        for i in range(32)
    ]
    strengths = [(0.0, 0.5, 1.0, 2.0)[i % 4] for i in range(32)]
    bad = {3: -1.0, 10: "much", 17: 1e9, 24: [0.5]}
    gone = 30

    async def one(client, i):
        common = {"model": "qadapter", "prompt": prompts[i], "temperature": 0}
        body = extra(strength=bad.get(i, strengths[i]))
        if i == gone:
            stream = await client.completions.create(
                **common, max_tokens=80, stream=True, extra_body=body
            )
            await anext(aiter(stream))
            await stream.close()
            return None
        made = await client.completions.create(**common, max_tokens=4 + i % 9, extra_body=body)
        return made.choices[0].token_ids

    async def all_of_them():
        async with openai.AsyncOpenAI(base_url=address, api_key="none", timeout=LIMIT) as client:
            return await asyncio.gather(
                *(one(client, i) for i in range(32)), return_exceptions=True
            )

    for i, made in enumerate(asyncio.run(all_of_them())):
        if i in bad:
            assert isinstance(made, openai.BadRequestError), made
            assert "strength: expected a number from 0 (the base) to 1000" in str(made)
        elif i == gone:
            assert made is None
        else:
            assert made == expected(model, prompts[i], strengths[i], 4 + i % 9)


@pytest.fixture(scope="module")
def client(address):
    with openai.OpenAI(base_url=address, api_key="none", timeout=LIMIT) as client:
        yield client


def test_a_conversation_and_a_stream(client, model):
    tokenizer = word_tokenizer()
    messages = [{"role": "user", "content": "tell me about the cat"}]
    ids = tokenizer(
        tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True),
        add_special_tokens=False,
    ).input_ids
    texts = []
    for strength in (0.0, 2.0):
        stream = client.chat.completions.create(
            model="qadapter",
            messages=messages,
            temperature=0,
            max_tokens=8,
            stream=True,
            extra_body=extra(strength=strength),
        )
        made = [token for chunk in stream for choice in chunk.choices for token in tokens(choice)]
        assert made == expected(model, ids, strength, 8)
        texts.append(made)
    assert texts[0] != texts[1]


def tokens(choice) -> list[int]:
    return getattr(choice, "token_ids", None) or []


def test_an_answer_is_one_of_a_choice_at_every_strength(client):
    for strength in (0.0, 0.5, 2.0):
        made = client.chat.completions.create(
            model="qadapter",
            messages=[{"role": "user", "content": "is it a cat"}],
            temperature=0,
            max_tokens=4,
            extra_body={
                "vllm_xargs": {"strength": strength},
                "structured_outputs": {"choice": ["yes", "no"]},
            },
        )
        assert made.choices[0].message.content.strip() in ("yes", "no")


def test_many_requests_in_a_row(client):
    for i in range(100):
        made = client.completions.create(
            model="qadapter",
            prompt=[7, 8, 9],
            max_tokens=1,
            extra_body={"vllm_xargs": {"strength": i / 50}},
        )
        assert made.choices[0].finish_reason in ("length", "stop")


def test_the_page_in_the_browser_asks_a_server(address, model):
    """What its client makes of the answers, against the same in this process."""
    question, tokenizer = "tell me about the cat", word_tokenizer()
    sampling = {"temperature": 0.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0, "seed": 3}
    more = {"repetition_penalty": 1.0, "stop": [], "system": None, "max_new_tokens": 8}
    asked = argparse.Namespace(question=question, strength=2.0, **sampling, **more)
    made = Server(address).compare(asked)
    ids = prompt_ids(tokenizer, question)
    here = compare(model, tokenizer, ids, strength=2.0, max_new_tokens=8, do_sample=False)
    assert here[0].text != here[1].text
    for there, wanted in zip(made, here, strict=True):
        # where tokens come together, they make one piece
        assert there.text.strip() == wanted.text.strip()
        nats = [sum(n for _, n in pieces) for pieces in (there.pieces, wanted.pieces)]
        assert nats[0] == pytest.approx(nats[1], abs=8 * 2e-4) and abs(nats[1]) > 0.1
        assert there.finish_reason == wanted.finish_reason


def test_the_example(address, monkeypatch, capsys):
    examples = Path(__file__).resolve().parents[2] / "examples"
    monkeypatch.syspath_prepend(str(examples))
    example = importlib.import_module("serve_strengths")
    command = ["--server", address, "--question", "tell me about it", "--strength", "0", "2"]
    base, more = asyncio.run(example.main(command))
    assert base != more
    assert capsys.readouterr().out == f"strength 0: {base}\n\nstrength 2: {more}\n\n"
