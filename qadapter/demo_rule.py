"""The preference of the demo, as a rule that a program can check."""

import re

MAX_WORDS = 30

# A sentence ends at ., ! or ? (a closing quote or bracket may follow) before white space or the
# end.
_END = re.compile(r"[.!?][\"')\]]*(?=\s|$)")


def follows(text: str) -> bool:
    """Whether an answer is one short sentence: the preference that the demo teaches.

    True if the text, white space around it aside, is a single line of at most 30 words, ends like a
    sentence, and no sentence ends before that. A text that was cut off does not follow the rule,
    unless it was cut exactly at the end of its first sentence: generate enough tokens.
    """
    text = text.strip()
    if "\n" in text or len(text.split()) > MAX_WORDS:
        return False
    ends = [match.end() for match in _END.finditer(text)]
    return ends == [len(text)]
