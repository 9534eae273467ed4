"""Short questions made by rule, each with one right answer, asked after two examples of its kind.

What the base answers right is what it can lose.
"""

import random
import re
from collections.abc import Callable, Iterator
from typing import NamedTuple

CAPITALS = {
    "France": "Paris", "Italy": "Rome", "Spain": "Madrid", "Germany": "Berlin",
    "Japan": "Tokyo", "Egypt": "Cairo", "Russia": "Moscow", "China": "Beijing",
    "Greece": "Athens", "Portugal": "Lisbon", "Austria": "Vienna", "Poland": "Warsaw",
    "Norway": "Oslo", "Sweden": "Stockholm", "Ireland": "Dublin", "Cuba": "Havana",
    "Peru": "Lima", "Kenya": "Nairobi", "Thailand": "Bangkok", "England": "London",
    "Hungary": "Budapest", "Belgium": "Brussels", "Denmark": "Copenhagen", "Finland": "Helsinki",
    "Iraq": "Baghdad", "Iran": "Tehran", "Canada": "Ottawa", "Chile": "Santiago",
}  # fmt: skip
OPPOSITES = {
    "hot": "cold", "big": "small", "up": "down", "left": "right", "day": "night",
    "good": "bad", "fast": "slow", "old": "new", "open": "closed", "happy": "sad",
    "black": "white", "rich": "poor", "high": "low", "wet": "dry", "early": "late",
    "full": "empty", "light": "dark", "strong": "weak", "true": "false", "hard": "soft",
    "long": "short", "loud": "quiet", "love": "hate", "first": "last", "inside": "outside",
    "start": "end", "win": "lose", "buy": "sell",
}  # fmt: skip
PLURALS = {
    "cat": "cats", "box": "boxes", "city": "cities", "child": "children", "mouse": "mice",
    "leaf": "leaves", "foot": "feet", "man": "men", "woman": "women", "baby": "babies",
    "dog": "dogs", "bus": "buses", "wolf": "wolves", "tooth": "teeth", "car": "cars",
    "house": "houses", "story": "stories", "knife": "knives", "book": "books", "tree": "trees",
}  # fmt: skip
PAST = {
    "walk": "walked", "go": "went", "see": "saw", "eat": "ate", "run": "ran", "take": "took",
    "play": "played", "write": "wrote", "come": "came", "give": "gave", "find": "found",
    "make": "made", "know": "knew", "sing": "sang", "drink": "drank", "buy": "bought",
    "fly": "flew", "fall": "fell", "jump": "jumped", "speak": "spoke",
}  # fmt: skip
CHILDREN = {
    "dog": "puppy", "cat": "kitten", "cow": "calf", "sheep": "lamb", "horse": "foal",
    "duck": "duckling", "bear": "cub", "goat": "kid", "frog": "tadpole", "deer": "fawn",
}  # fmt: skip
SPANISH = {
    "house": "casa", "water": "agua", "cat": "gato", "dog": "perro", "book": "libro",
    "friend": "amigo", "red": "rojo", "sun": "sol", "milk": "leche", "bread": "pan",
    "hello": "hola", "green": "verde", "night": "noche", "table": "mesa", "one": "uno",
}  # fmt: skip
ELEMENTS = {
    "hydrogen": "H", "oxygen": "O", "carbon": "C", "nitrogen": "N", "iron": "Fe", "gold": "Au",
    "helium": "He", "sodium": "Na", "silver": "Ag", "calcium": "Ca", "copper": "Cu", "zinc": "Zn",
    "potassium": "K", "sulfur": "S", "neon": "Ne",
}  # fmt: skip
DAYS = ["Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday"]
MONTHS = [
    "January", "February", "March", "April", "May", "June", "July", "August", "September",
    "October", "November", "December",
]  # fmt: skip
WORDS = ["one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven"]


class Question(NamedTuple):
    kind: str
    text: str
    answer: str
    examples: tuple[tuple[str, str], ...]

    def messages(self) -> list[dict[str, str]]:
        turns = [*self.examples, (self.text, "")]
        messages = []
        for asked, answered in turns:
            messages.append({"role": "user", "content": asked})
            messages.append({"role": "assistant", "content": answered})
        return messages[:-1]


def _table(text: str, table: dict[str, str]) -> list[tuple[str, str]]:
    return [(text.format(key), value) for key, value in table.items()]


def _following(text: str, names: list[str]) -> list[tuple[str, str]]:
    return [(text.format(a), b) for a, b in zip(names, [*names[1:], names[0]], strict=True)]


def _sums() -> list[tuple[str, str]]:
    return [(f"What is {a} + {b}?", str(a + b)) for a in range(1, 13) for b in range(1, 13)]


def _differences() -> list[tuple[str, str]]:
    return [(f"What is {a} - {b}?", str(a - b)) for a in range(3, 16) for b in range(1, a)]


def _products() -> list[tuple[str, str]]:
    return [(f"What is {a} x {b}?", str(a * b)) for a in range(2, 11) for b in range(2, 11)]


def _next_numbers() -> list[tuple[str, str]]:
    made = []
    for step in (1, 2, 5, 10):
        for first in range(step, 12 * step, step):
            shown = ", ".join(str(first + i * step) for i in range(3))
            made.append((f"Which number comes next: {shown}?", str(first + 3 * step)))
    return made


def _copies() -> list[tuple[str, str]]:
    words = [*OPPOSITES, *PLURALS, *SPANISH]
    return [(f"Repeat this word: {word}", word) for word in dict.fromkeys(words)]


def _larger() -> list[tuple[str, str]]:
    rng = random.Random(0)
    pairs = [rng.sample(range(2, 100), 2) for _ in range(60)]
    made = [(f"Which number is larger, {a} or {b}?", str(max(a, b))) for a, b in pairs]
    return list(dict.fromkeys(made))


def _first_letters() -> list[tuple[str, str]]:
    words = dict.fromkeys([*PLURALS, *SPANISH])
    return [(f"What is the first letter of the word {w}?", w[0]) for w in words]


KINDS: dict[str, Callable[[], list[tuple[str, str]]]] = {
    "capital": lambda: _table("What is the capital of {}?", CAPITALS),
    "opposite": lambda: _table("What is the opposite of {}?", OPPOSITES),
    "plural": lambda: _table("What is the plural of {}?", PLURALS),
    "past": lambda: _table("What is the past tense of {}?", PAST),
    "young": lambda: _table("What is a young {} called?", CHILDREN),
    "spanish": lambda: _table("What is {} in Spanish?", SPANISH),
    "element": lambda: _table("What is the chemical symbol of {}?", ELEMENTS),
    "day": lambda: _following("Which day comes after {}?", DAYS),
    "month": lambda: _following("Which month comes after {}?", MONTHS),
    "digit": lambda: [(f"Write {w} as a number.", str(i)) for i, w in enumerate(WORDS, start=1)],
    "sum": _sums,
    "difference": _differences,
    "product": _products,
    "next": _next_numbers,
    "copy": _copies,
    "larger": _larger,
    "letter": _first_letters,
}


def questions(count: int, seed: int = 0) -> list[Question]:
    """So many, the kinds in turns; the examples of a question are two others of its kind."""
    rng = random.Random(seed)
    streams = [_shuffled(kind, make(), rng) for kind, make in KINDS.items()]
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


def normalised(text: str) -> str:
    """The first line without case, punctuation and articles."""
    line = next((part for part in text.strip().splitlines() if part.strip()), "")
    return re.sub(r"\b(the|a|an)\b|[^\w\s-]", " ", line.casefold()).strip()


def right(text: str, answer: str) -> bool:
    """The answer and nothing else."""
    return " ".join(normalised(text).split()) == answer.casefold()


def contained(text: str, answer: str) -> bool:
    """The answer as a word, whatever is around it."""
    return re.search(rf"(?<!\w){re.escape(answer.casefold())}(?!\w)", text.casefold()) is not None
