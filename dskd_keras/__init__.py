"""Deeply-supervised knowledge distillation for Keras 3."""

from dskd_keras import callbacks, losses, models, optimizers, weighting
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
    "fold_batch_norm",
    "losses",
    "models",
    "optimizers",
    "weighting",
]
