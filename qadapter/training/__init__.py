"""Training and evaluation on transformers' Trainer.

config.py, trainer.py             QAdapterConfig, QAdapterTrainer
arguments.py, preparation.py      which arguments are followed; models, data and collators as given
base_cache.py, base_identity.py   what the base says, computed once and kept on disk
engines.py, kept_base.py          the trainer where an engine shards the model; its base cache
processes.py                      what processes that train together agree on
anchor_texts.py, anchor_files.py  texts of the base itself, that it should keep
evaluation.py, frontier.py        preference and forgetting; over strengths; plots.py: pictures
heap.py                           memory that a step frees is kept, older objects are no garbage
export_check.py                   what an exported adapter is off its policy
"""
