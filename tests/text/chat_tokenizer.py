"""A byte-level tokenizer with a chat template, and a pair in messages."""

import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
TEXTS = [
    "the sky is blue and the sea is green",
    "what color is it?",
    "user assistant system",
    "hello world, hello sky",
] * 5


def make_tokenizer(
    bos: bool = False,
    template: str | None = TEMPLATE,
    specials=("<s>", "<|im_start|>", "<|im_end|>"),
):
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=list(specials),
        initial_alphabet=alphabet,
        show_progress=False,
    )
    core.train_from_iterator(TEXTS, trainer)
    if bos:
        core.post_processor = processors.TemplateProcessing(
            single="<s> $A", special_tokens=[("<s>", 0)]
        )
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=core, bos_token="<s>", eos_token="<|im_end|>", pad_token="<|im_end|>"
    )
    tokenizer.chat_template = template
    return tokenizer


def closing_tokenizer(**options):
    """Writes <s> before and <|im_end|> behind every text."""
    tokenizer = make_tokenizer(**options)
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A <|im_end|>", special_tokens=[("<s>", 0), ("<|im_end|>", end)]
    )
    return tokenizer


TOKENIZER = make_tokenizer()
BOS_TOKENIZER = make_tokenizer(bos=True)
EOS = TOKENIZER.eos_token_id


def user(text):
    return {"role": "user", "content": text}


def assistant(text):
    return {"role": "assistant", "content": text}


PAIR = {
    "prompt": [user("what color is the sky?")],
    "chosen": [assistant("the sky is blue")],
    "rejected": [assistant("the sky is green")],
}


def decode(ids):
    return TOKENIZER.decode(ids)
