"""Answers for the page from a server that `qadapter serve` has started, by its HTTP interface.

The server is asked for each answer at a strength, 0 for the base's, and then for the
log-probabilities of both answers under both. Nothing but the standard library is needed.
"""

import argparse
import json
import urllib.error
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from qadapter.text.compared import Compared, in_pieces

TIMEOUT = 600.0  # seconds that an answer may take


class Server:
    """The model of a server, by its address: http://HOST:PORT, with or without /v1.

    Raises:
        OSError: nothing answers there.
        ValueError: what answers is no such server.
    """

    def __init__(self, address: str) -> None:
        if not address.startswith(("http://", "https://")):
            raise ValueError(f"--server: expected http://HOST:PORT, got {address!r}")
        self.address = address.rstrip("/").removesuffix("/v1") + "/v1"
        with self._open("models", None, timeout=10.0) as response:
            served = json.load(response)
        try:
            self.model = served["data"][0]["id"]
        except (KeyError, IndexError, TypeError):
            raise ValueError(f"--server: {self.address} lists no model") from None

    def compare(self, options: argparse.Namespace) -> tuple[Compared, Compared]:
        """As `qadapter.text.compared.compare`, but that tokens which the server sends in one event
        make one piece; ValueError with the server's words if it refuses."""
        with ThreadPoolExecutor(2) as pool:
            base, policy = pool.map(
                lambda strength: self._compared(options, strength), (0.0, options.strength)
            )
        return base, policy

    def _compared(self, options: argparse.Namespace, strength: float) -> Compared:
        texts: list[str] = []
        counts: list[int] = []
        ids: list[int] = []
        prompt: list[int] = []
        reason = "length"
        for event in self._stream("chat/completions", self._request(options, strength)):
            prompt = event.get("prompt_token_ids") or prompt
            for choice in event["choices"]:
                new = choice.get("token_ids") or []
                if new:
                    texts.append("")
                    counts.append(len(new))
                    ids += new
                if texts:  # text of tokens that came before comes with those that complete it
                    texts[-1] += (choice.get("delta") or {}).get("content") or ""
                if choice.get("finish_reason") == "stop":
                    reason = "stop" if choice.get("stop_reason") else "eos"
        if not prompt or not ids:
            raise ValueError(f"{self.address} sends no token ids: it is no vLLM, or an old one")
        of_base, of_policy = (
            self._logprobs(prompt + ids, len(ids), s) for s in (0.0, options.strength)
        )
        moved = iter([q - b for b, q in zip(of_base, of_policy, strict=True)])
        if reason == "eos" and counts[-1] > 1:  # the last token ended it and has no text
            counts[-1:], texts[-1:] = [counts[-1] - 1, 1], [texts[-1], ""]
        nats = [sum(next(moved) for _ in range(count)) for count in counts]
        return in_pieces(texts, nats, reason, len("".join(texts)))

    def _request(self, options: argparse.Namespace, strength: float) -> dict[str, Any]:
        messages = [{"role": "user", "content": options.question}]
        if options.system:
            messages = [{"role": "system", "content": options.system}, *messages]
        return {
            "model": self.model,
            "messages": messages,
            "max_tokens": options.max_new_tokens,
            "temperature": options.temperature,
            "top_k": options.top_k,
            "top_p": options.top_p,
            "min_p": options.min_p,
            "repetition_penalty": options.repetition_penalty,
            "stop": options.stop,
            "seed": options.seed,
            "stream": True,
            "return_token_ids": True,
            "vllm_xargs": {"strength": strength},
            **options.chat_template_kwargs,
        }

    def _logprobs(self, ids: list[int], last: int, strength: float) -> list[float]:
        """Of the last tokens of a text, each after all before it."""
        request = {"model": self.model, "prompt": ids, "max_tokens": 1, "prompt_logprobs": 0}
        request |= {"temperature": 0.0, "vllm_xargs": {"strength": strength}}
        with self._open("completions", request) as response:
            made = json.load(response)["choices"][0]["prompt_logprobs"]
        tail = zip(ids[-last:], made[-last:], strict=True)
        return [float(of_token[str(token)]["logprob"]) for token, of_token in tail]

    # HTTP.

    def _stream(self, path: str, request: dict[str, Any]) -> Iterator[dict[str, Any]]:
        """The events of a streamed answer."""
        with self._open(path, request) as response:
            for line in response:
                data = line.decode().partition("data:")[2].strip()
                if data and data != "[DONE]":
                    event = json.loads(data)
                    if "error" in event:
                        raise ValueError(_message(event))
                    yield event

    def _open(self, path: str, request: dict[str, Any] | None, timeout: float = TIMEOUT) -> Any:
        data = None if request is None else json.dumps(request).encode()
        asked = urllib.request.Request(
            f"{self.address}/{path}", data, {"Content-Type": "application/json"}
        )
        try:
            return urllib.request.urlopen(asked, timeout=timeout)
        except urllib.error.HTTPError as error:
            try:
                said = _message(json.load(error))
            except ValueError:
                said = str(error)
            raise ValueError(f"{self.address}: {said}") from None
        except urllib.error.URLError as error:
            raise OSError(f"{self.address} does not answer: {error.reason}") from None


def _message(answer: Any) -> str:
    found = answer.get("error", answer) if isinstance(answer, dict) else answer
    return str(found.get("message", found) if isinstance(found, dict) else found)
