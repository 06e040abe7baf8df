"""Deeply-supervised knowledge distillation for Keras 3."""

import os
from typing import TYPE_CHECKING

from dskd_keras._lazy import attach

if TYPE_CHECKING:
    from dskd_keras import (
        callbacks,
        data,
        export,
        heads,
        losses,
        models,
        optimizers,
        weighting,
    )
    from dskd_keras.distiller import Distiller, Targets
    from dskd_keras.endings import as_logits
    from dskd_keras.errors import InputError, TrainingError
    from dskd_keras.folding import fold_batch_norm
    from dskd_keras.layer_table import summary
    from dskd_keras.teacher import Teacher

__version__ = "0.1.0"

__all__ = [
    "Distiller",
    "InputError",
    "Targets",
    "Teacher",
    "TrainingError",
    "__version__",
    "as_logits",
    "callbacks",
    "data",
    "export",
    "fold_batch_norm",
    "heads",
    "losses",
    "models",
    "optimizers",
    "summary",
    "weighting",
]

_HOMES = {
    "Distiller": "distiller",
    "InputError": "errors",
    "Targets": "distiller",
    "Teacher": "teacher",
    "TrainingError": "errors",
    "as_logits": "endings",
    "callbacks": "",
    "data": "",
    "export": "",
    "fold_batch_norm": "folding",
    "heads": "",
    "losses": "",
    "models": "",
    "optimizers": "",
    "summary": "layer_table",
    "weighting": "",
}
__getattr__, __dir__ = attach(__name__, _HOMES)

# Keras finds the classes of a saved distiller only where they have been imported. The commands
# (dskd_commands.py) put that off until they have read their flags: a mistake is answered at once.
# The processes that decode images (data/prefetching.py) need no Keras at all.
if not os.environ.get("DSKD_KERAS_DEFER"):
    from dskd_keras import distiller, folding, heads, losses, optimizers, weighting  # noqa: F401
