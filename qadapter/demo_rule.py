"""The preference of the demo, as a rule that a program can check."""

OPENING = "In short,"


def follows(text: str) -> bool:
    """Whether an answer opens with "In short," and goes on: the preference that the demo teaches.

    White space around the text does not count; capital letters do. At least three words must follow
    the opening, so that the opening alone, or one that is repeated, is not taken for an answer.
    """
    opening, found, rest = text.strip().partition(OPENING)
    return bool(found) and not opening and OPENING not in rest and len(rest.split()) >= 3
