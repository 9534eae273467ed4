"""The preference of the demo, as a rule that a program can check."""

OPENING = "In short,"


def follows(text: str) -> bool:
    """Whether an answer opens with "In short," and goes on: the preference that the demo teaches.

    White space around the text does not count; the capital letter does. At least three words must
    follow, and the opening must not come again, in capitals or not: the opening alone, or one that
    is repeated, is not an answer.
    """
    opening, found, rest = text.strip().partition(OPENING)
    repeated = OPENING.casefold() in rest.casefold()
    return bool(found) and not opening and not repeated and len(rest.split()) >= 3
