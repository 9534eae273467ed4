"""``qadapter chat``: a conversation with the composed policy; its blend can change at any time."""

import argparse
import contextlib
import secrets
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from typing import Any

from qadapter.cli import sampling, web
from qadapter.cli.sampling import Blend
from qadapter.composition import RECOMMENDED
from qadapter.text.prompts import checked_strength, prompt_ids

HELP = """\
/strength [S]             0 is the base, 1 as trained, more is more; "trained" for the saved values,
                          "recommended" for what training with --kl-budget found
/weights [NAME=W ...]     weights of the adapters
/both                     the last message answered by the base and by the blend, side by side
/compare [S ...]          the same at these strengths
/temperature [T]          0 is greedy
/system [TEXT]            the system message from now on; "none" removes it
/retry                    answer the last message once more
/reset                    forget the conversation
/help, /quit
Ctrl-C stops an answer, Ctrl-D quits. A message that begins with / is written with //."""


def add_parser(commands: Any) -> None:
    parser = commands.add_parser("chat", help="talk to the composed policy, change the blend live")
    sampling.add_adapters(parser, required=False)  # `web.check` knows when
    parser.add_argument(
        "--strength",
        type=sampling.strength_option,
        help="0 is the base, 1 as trained, more is more, recommended what training with "
        "--kl-budget found",
    )
    sampling.add_sampling(parser, temperature=0.7, top_p=0.95)
    web.add_options(parser)
    parser.set_defaults(run=chat)


def chat(options: argparse.Namespace) -> int:
    sampling.check_sampling(options)
    web.check(options)
    if options.web:
        return web.run(options)
    blend = sampling.parse_blend(options.adapter, options.weight)
    options.strength = sampling.given_strength(options.strength, blend)
    sampling.say_recommended(blend, options.strength is None)
    model, tokenizer = sampling.load(blend.folders, options.base_model, options.dtype, decodes=True)
    Chat(model, tokenizer, blend, options).run()
    return 0


class Chat:
    """The state of a conversation and the commands that change it."""

    def __init__(
        self, model: Any, tokenizer: Any, blend: Blend, options: argparse.Namespace
    ) -> None:
        self.model, self.tokenizer, self.blend, self.options = model, tokenizer, blend, options
        self.weights = dict(blend.weights)
        self.strength: float | None = options.strength
        self.messages: list[dict[str, str]] = []
        self.seed = secrets.randbits(53) if options.seed is None else options.seed
        self.turn = 0

    def run(self) -> None:
        """Read lines until /quit or the end of the input."""
        print(f"{self._state()}; /help lists the commands")
        if self.tokenizer.chat_template is None:
            print(
                "(this model has no chat template: it reads the messages joined by line breaks, "
                "without roles)"
            )
        while True:
            try:
                line = _read_line()
            except KeyboardInterrupt:
                print("\n(Ctrl-D or /quit leaves)")
                continue
            if line is None or line in ("/quit", "/exit"):
                return
            try:
                if line.startswith("/") and not line.startswith("//"):
                    self._command(line)
                elif line:
                    self._message(line.removeprefix("/") if line.startswith("//") else line)
            except ValueError as error:
                print(f"({error})")
            except KeyboardInterrupt:  # a second one, before the answer had stopped
                print("\n(stopped)")

    # Commands.

    def _command(self, line: str) -> None:
        name, _, text = line[1:].partition(" ")
        commands: dict[str, Callable[[str], None]] = {
            "strength": self._strength,
            "weights": self._weights,
            "both": self._both,
            "compare": self._compare,
            "temperature": self._temperature,
            "system": self._system,
            "retry": self._retry,
            "reset": self._reset,
            "help": lambda text: print(HELP),
        }
        if name not in commands:
            raise ValueError(f"unknown command /{name}; /help lists them")
        commands[name](text.strip())

    def _strength(self, text: str) -> None:
        if text:
            self.strength = None if text == "trained" else self._number(text, "/strength")
        print(f"({self._state()})")

    def _number(self, text: str, what: str) -> float:
        if text == RECOMMENDED:
            return sampling.recommended(self.blend._replace(weights=self.weights), what)
        return checked_strength(sampling.parse_number(text, what), what)

    def _weights(self, text: str) -> None:
        self.weights |= sampling.parse_weights(text.split(), self.blend, "/weights")
        print(f"({self._state()})")

    def _temperature(self, text: str) -> None:
        if text:
            value = sampling.parse_number(text, "/temperature")
            if value < 0:
                raise ValueError(f"/temperature: expected 0 (greedy) or more, got {text!r}")
            self.options.temperature = value
        print(f"(temperature {self.options.temperature:g})")

    def _system(self, text: str) -> None:
        if text:
            self.options.system = None if text == "none" else text
        print(f"(system message: {self.options.system or 'none'})")

    def _reset(self, text: str) -> None:
        self.messages = []
        print("(conversation forgotten)")

    def _retry(self, text: str) -> None:
        self.messages = self._until_last_message()
        self._answer()

    def _both(self, text: str) -> None:
        self._compare("")

    def _compare(self, text: str) -> None:
        from qadapter.text.answers import answer, derived_seed, side_by_side

        strengths: list[float | None] = [self._number(s, "/compare") for s in text.split()]
        # Where the blend is the base, next to what was trained.
        strengths = strengths or [0.0, self.strength or None]
        ids = self._ids(self._until_last_message())
        self.turn += 1
        seed = derived_seed(self.seed, self.turn)
        texts: dict[int, str] = {}
        with _stoppable() as halt:
            # All in one batch, with the same noise; the trained values are not a strength.
            for given in (True, False):
                at = [i for i, s in enumerate(strengths) if (s is not None) == given]
                if at and not halt():
                    together = [strengths[i] for i in at]
                    answers = answer(
                        self.model,
                        self.tokenizer,
                        [ids] * len(at),
                        **self._arguments(together if given else None, [seed] * len(at)),
                        halt=halt,
                    )
                    texts |= {i: a.text for i, a in zip(at, answers, strict=True)}
        titles = ["as trained" if s is None else f"strength {s:g}" for s in strengths]
        print(side_by_side([titles[i] for i in sorted(texts)], [texts[i] for i in sorted(texts)]))

    # Answers.

    def _message(self, line: str) -> None:
        before = list(self.messages)
        self.messages.append({"role": "user", "content": line})
        try:
            self._answer()
        except ValueError:
            self.messages = before  # nothing is forgotten for a message that cannot be answered
            raise

    def _answer(self) -> None:
        """Stream the answer to the last message, and keep it, also one that was stopped."""
        from qadapter.text.answers import Printer, answer, derived_seed

        ids = self._ids(self.messages)
        self.turn += 1
        seed = derived_seed(self.seed, self.turn)
        printer = Printer(self.tokenizer, self.options.stop)
        with _stoppable() as halt:
            strength = None if self.strength is None else [self.strength]
            arguments = self._arguments(strength, [seed])
            (made,) = answer(
                self.model, self.tokenizer, [ids], streamer=printer, halt=halt, **arguments
            )
        if made.finish_reason == "interrupted":
            print("(stopped)")
        elif made.finish_reason == "length":
            print(f"(cut off after {made.tokens} tokens: --max-new-tokens)")
        self.messages.append({"role": "assistant", "content": made.text.strip()})

    def _arguments(self, strengths: Any, seeds: list[int]) -> dict[str, Any]:
        arguments = sampling.sampling_arguments(self.options)
        arguments["stop"] = self.options.stop
        if strengths is not None:
            # One number lets a stream that does not count rest.
            arguments["strength"] = strengths[0] if len(set(strengths)) == 1 else strengths
        if self.options.temperature > 0:
            arguments["seeds"] = seeds
        adapters = self.blend.adapters(self.weights)
        return arguments if adapters is None else {**arguments, "adapters": adapters}

    def _ids(self, messages: list[dict[str, str]]) -> list[int]:
        """Token ids of a conversation; where it outgrows the model, its oldest turns go."""
        limit = getattr(self.model.config.get_text_config(), "max_position_embeddings", None)
        room = float("inf") if limit is None else limit - self.options.max_new_tokens
        dropped = 0
        while True:
            ids = prompt_ids(
                self.tokenizer,
                messages[dropped:],
                self.options.system,
                template=self.options.chat_template_kwargs,
            )
            if len(ids) <= room:
                break
            users = (i for i in range(dropped + 1, len(messages)) if messages[i]["role"] == "user")
            dropped = next(users, 0)
            if not dropped:
                raise ValueError(
                    f"the message has {len(ids)} tokens, which with --max-new-tokens "
                    f"{self.options.max_new_tokens} is more than the model's {limit} positions"
                )
        if dropped:
            del messages[:dropped]
            print("(the conversation outgrew the model: its oldest turns are forgotten)")
        return ids

    def _until_last_message(self) -> list[dict[str, str]]:
        users = [i for i, message in enumerate(self.messages) if message["role"] == "user"]
        if not users:
            raise ValueError("there is no message to answer yet")
        return self.messages[: users[-1] + 1]

    def _state(self) -> str:
        strength = "strength as trained" if self.strength is None else f"strength {self.strength:g}"
        if len(self.weights) == 1 and set(self.weights.values()) == {1.0}:
            return strength
        return strength + ", weights " + " ".join(f"{n}={w:g}" for n, w in self.weights.items())


def _read_line() -> str | None:
    """The next line, stripped; None at the end. Piped lines are printed, for a readable record."""
    if sys.stdin.isatty():
        with contextlib.suppress(ImportError):
            import readline  # noqa: F401  (history and editing for input())
        try:
            return input("> ").strip()
        except EOFError:
            print()
            return None
    line = sys.stdin.readline()
    if not line:
        return None
    print(f"> {line.strip()}")
    return line.strip()


@contextlib.contextmanager
def _stoppable() -> Iterator[Callable[[], bool]]:
    """Inside, Ctrl-C sets what the given function returns; a second one interrupts at once."""
    asked = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield asked.is_set
        return

    def stop(signum: int, frame: Any) -> None:
        if asked.is_set():
            raise KeyboardInterrupt
        asked.set()

    before = signal.signal(signal.SIGINT, stop)
    try:
        yield asked.is_set
    finally:
        signal.signal(signal.SIGINT, before)
