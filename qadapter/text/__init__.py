"""Text: files and messages to tokens, tokens to rows, and answers back to text.

readers.py, loading.py       files and the Hub -> rows, bad_rows.py: those that cannot be used
forms.py, messages.py        rows and messages as people write them -> a pair, a chat template
tokenization.py, data.py     a pair, a data set -> token ids, by the model's own chat template
collator.py, packing.py      pairs -> a padded or a packed batch, and the rows of the loss
prompts.py, answers.py       prompts to generate from, and what is made of the tokens
compared.py                  answers of base and policy, and what the adapter changed in them
"""
