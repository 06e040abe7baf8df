"""Deeply-supervised knowledge distillation for Keras 3."""

import os
from typing import TYPE_CHECKING

from dskd_keras._lazy import attach

if TYPE_CHECKING:
    from dskd_keras import callbacks, data, export, losses, models, optimizers, weighting
    from dskd_keras.distiller import Distiller, Targets
    from dskd_keras.errors import InputError, TrainingError
    from dskd_keras.folding import fold_batch_norm

__version__ = "0.1.0"

__all__ = [
    "Distiller",
    "InputError",
    "Targets",
    "TrainingError",
    "__version__",
    "callbacks",
    "data",
    "export",
    "fold_batch_norm",
    "losses",
    "models",
    "optimizers",
    "weighting",
]

_HOMES = {
    "Distiller": "distiller",
    "InputError": "errors",
    "Targets": "distiller",
    "TrainingError": "errors",
    "callbacks": "",
    "data": "",
    "export": "",
    "fold_batch_norm": "folding",
    "losses": "",
    "models": "",
    "optimizers": "",
    "weighting": "",
}
__getattr__, __dir__ = attach(__name__, _HOMES)

# Keras finds the classes of a saved distiller only where they have been imported. The commands
# (dskd_commands.py) put that off until they have read their flags: a mistake is answered at once.
if not os.environ.get("DSKD_KERAS_DEFER"):
    from dskd_keras import distiller, folding, losses, optimizers, weighting  # noqa: F401
