"""Short questions made by rule, each with one right answer, asked after two examples of its kind.

What the base answers right is what it can lose.
"""

import json
import random
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

TABLES: dict[str, Any] = json.loads(
    (Path(__file__).parent / "questions.json").read_text(encoding="utf-8")
)


TOKENS = 8  # of an answer


class Question(NamedTuple):
    kind: str
    text: str
    answer: str
    examples: tuple[tuple[str, str], ...]

    def messages(self) -> list[dict[str, str]]:
        messages = []
        for asked, answered in (*self.examples, (self.text, "")):
            messages.append({"role": "user", "content": asked})
            messages.append({"role": "assistant", "content": answered})
        return messages[:-1]


def _words(*kinds: str) -> list[str]:
    """What the questions of these kinds are about, each word once."""
    return list(dict.fromkeys(word for kind in kinds for word in TABLES[kind]["answers"]))


def _larger() -> list[tuple[str, str]]:
    rng = random.Random(0)
    pairs = [rng.sample(range(2, 100), 2) for _ in range(60)]
    made = [(f"Which number is larger, {a} or {b}?", str(max(a, b))) for a, b in pairs]
    return list(dict.fromkeys(made))


KINDS: dict[str, list[tuple[str, str]]] = {
    **{
        kind: [(table["question"].format(word), a) for word, a in table["answers"].items()]
        for kind, table in TABLES.items()
    },
    "sum": [(f"What is {a} + {b}?", str(a + b)) for a in range(1, 13) for b in range(1, 13)],
    "difference": [(f"What is {a} - {b}?", str(a - b)) for a in range(3, 16) for b in range(1, a)],
    "product": [(f"What is {a} x {b}?", str(a * b)) for a in range(2, 11) for b in range(2, 11)],
    "next": [
        (f"Which number comes next: {a}, {a + step}, {a + 2 * step}?", str(a + 3 * step))
        for step in (1, 2, 5, 10)
        for a in range(step, 12 * step, step)
    ],
    "copy": [(f"Repeat this word: {w}", w) for w in _words("opposite", "plural", "spanish")],
    "larger": _larger(),
    "letter": [
        (f"What is the first letter of the word {w}?", w[0]) for w in _words("plural", "spanish")
    ],
}
"""Question and answer."""


def questions(count: int, seed: int = 0) -> list[Question]:
    """So many, the kinds in turns; the examples of a question are two others of its kind."""
    rng = random.Random(seed)
    streams = [_shuffled(kind, list(items), rng) for kind, items in KINDS.items()]
    made: list[Question] = []
    while streams and len(made) < count:
        for stream in list(streams):
            question = next(stream, None)
            if question is None:
                streams.remove(stream)
            elif len(made) < count:
                made.append(question)
    return made


def _shuffled(kind: str, items: list[tuple[str, str]], rng: random.Random) -> Iterator[Question]:
    rng.shuffle(items)
    examples = tuple(items[:2])
    return (Question(kind, text, answer, examples) for text, answer in items[2:])


def right(text: str, answer: str) -> bool:
    """The answer and nothing else, whatever the case, the punctuation and the articles."""
    line = next((part for part in text.strip().splitlines() if part.strip()), "")
    words = re.sub(r"\b(the|a|an)\b|[^\w\s-]", " ", line.casefold()).split()
    return " ".join(words) == answer.casefold()
