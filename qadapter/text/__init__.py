"""Text: files and messages to tokens, tokens to rows, and answers back to text.

readers.py, data.py          files and the Hub -> preference pairs
tokenization.py              a pair -> token ids, by the model's own chat template
collator.py, packing.py      pairs -> a padded or a packed batch, and the rows of the loss
prompts.py, answers.py       prompts to generate from, and what is made of the tokens
"""
