"""Tokenised pairs of any lengths, for hypothesis to draw."""

from hypothesis import strategies as st

IDS = st.lists(st.integers(0, 99), min_size=1, max_size=6)
PAIRS = st.lists(
    st.fixed_dictionaries(
        {
            "prompt_ids": IDS,
            "chosen_ids": IDS,
            "rejected_ids": IDS,
            "chosen_truncated": st.booleans(),
            "rejected_truncated": st.booleans(),
        }
    ),
    min_size=1,
    max_size=4,
)
