"""Training and evaluation on transformers' Trainer.

config.py, trainer.py             QAdapterConfig, QAdapterTrainer
base_cache.py, base_identity.py   what the base says, computed once and kept on disk
evaluation.py, plots.py           preference and forgetting, as figures and as a picture
"""
