"""A trainer of a tiny model on a few pairs, three steps long unless told otherwise."""

from datasets import Dataset

from qadapter import QAdapterConfig, QAdapterTrainer
from tests.tiny_models import make_model
from tests.tiny_text import preference_rows


def trainer(
    tmp_path,
    tokenizer,
    *,
    moved=False,
    model=None,
    rows=12,
    data=None,
    callbacks=None,
    anchors=None,
    **config,
):
    arguments = {
        "output_dir": str(tmp_path / "out"),
        "per_device_train_batch_size": 4,
        "max_steps": 3,
        "logging_steps": 1,
        "learning_rate": 1e-2,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "use_cpu": True,
        "seed": 3,
    }
    return QAdapterTrainer(
        model or make_model(moved=moved),
        QAdapterConfig(**{**arguments, **config}),
        train_dataset=Dataset.from_list(preference_rows(rows)) if data is None else data,
        eval_dataset=Dataset.from_list(preference_rows(5)),
        processing_class=tokenizer,
        callbacks=callbacks,
        anchor_dataset=None if anchors is None else Dataset.from_list(anchors),
    )
