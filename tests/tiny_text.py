"""A small vocabulary, its tokenizer, and preference pairs in its words."""

WORDS = (  # noqa: SIM905
    "the a cat dog bird sat ran flew on under over mat tree house red blue green big small "
    "old new is was not and or but so yes no please thanks hello why how what who when where "
    "tell me about it they we you one two three four five short long answer good bad very ."
).split()


def word_tokenizer():
    """A word-level chat tokenizer: one id a word, <s>, </s>, <pad>, <unk>."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocab = {word: i for i, word in enumerate(["<pad>", "<s>", "</s>", "<unk>", "<u>", "<b>"])}
    for word in WORDS:
        vocab.setdefault(word, len(vocab))
    backend = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        unk_token="<unk>",
        additional_special_tokens=["<u>", "<b>"],
    )
    tokenizer.chat_template = (
        "{% for m in messages %}{{ '<u> ' if m['role'] == 'user' else '<b> ' }}{{ m['content'] }}"
        "{{ ' </s> ' }}{% endfor %}{% if add_generation_prompt %}{{ '<b> ' }}{% endif %}"
    )
    return tokenizer


def template_with_variables():
    """A chat template that writes the names of tools, and "very" where ``loud`` is set."""
    return (
        "{% for t in tools or [] %}{{ t['name'] + ' ' }}{% endfor %}"
        "{% if loud is defined and loud %}{{ 'very ' }}{% endif %}"
    ) + word_tokenizer().chat_template


def preference_rows(count: int = 12) -> list[dict]:
    """Pairs in message format: chosen answers are short, rejected ones long, of varying length."""
    subjects = ["cat", "dog", "bird", "tree", "house"]
    rows = []
    for i in range(count):
        subject = subjects[i % len(subjects)]
        prompt = f"tell me about the {WORDS[14 + i % 7]} {subject}"
        chosen = "it is " + WORDS[14 + i % 7] + " ." * (i % 2)
        rejected = "it was " + "very " * (1 + i % 4) + "old and they ran under the " + subject
        rows.append(
            {
                "prompt": [{"role": "user", "content": prompt}],
                "chosen": [{"role": "assistant", "content": chosen}],
                "rejected": [{"role": "assistant", "content": rejected}],
            }
        )
    return rows
