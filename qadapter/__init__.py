"""Q-Adapter: customise a frozen language model with a residual Q-function (arXiv 2407.03856).

`qadapter.functional` holds the fused operations, `QAdapterModel` the two-stream model,
`QAdapterTrainer` and `QAdapterConfig` the trainer. Importing this package needs torch alone; the
model and the trainer import transformers and peft when they are first used.
"""

import importlib
from typing import TYPE_CHECKING, Any

from qadapter import functional, reference
from qadapter.ops.backends import backends, use_backend
from qadapter.outputs import PreferenceLoss, ResidualValues, Sample
from qadapter.version import __version__

if TYPE_CHECKING:
    from qadapter.model.export import export_adapter
    from qadapter.model.modeling import QAdapterModel
    from qadapter.model.packaged import packaged_model
    from qadapter.modules import QAdapterLinearLoss, QAdapterLoss
    from qadapter.training.config import QAdapterConfig
    from qadapter.training.trainer import QAdapterTrainer

__all__ = [
    "PreferenceLoss",
    "QAdapterConfig",
    "QAdapterLinearLoss",
    "QAdapterLoss",
    "QAdapterModel",
    "QAdapterTrainer",
    "ResidualValues",
    "Sample",
    "__version__",
    "backends",
    "export_adapter",
    "functional",
    "packaged_model",
    "reference",
    "use_backend",
]

_LAZY = {
    "QAdapterConfig": "qadapter.training.config",
    "QAdapterLinearLoss": "qadapter.modules",
    "QAdapterLoss": "qadapter.modules",
    "QAdapterModel": "qadapter.model.modeling",
    "QAdapterTrainer": "qadapter.training.trainer",
    "export_adapter": "qadapter.model.export",
    "packaged_model": "qadapter.model.packaged",
}


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        return getattr(importlib.import_module(_LAZY[name]), name)
    raise AttributeError(f"module 'qadapter' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *_LAZY})
