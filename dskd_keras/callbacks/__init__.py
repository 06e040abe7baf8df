"""Keras callbacks for distillation: what a run shows and keeps while it trains."""

from dskd_keras.callbacks.fade_out import FadeOut
from dskd_keras.callbacks.layer_weights import LayerWeightLogger
from dskd_keras.callbacks.non_finite import StopOnNonFiniteLoss
from dskd_keras.callbacks.tensorboard import TensorBoardScalars
from dskd_keras.callbacks.throughput import Throughput
from dskd_keras.progress import ProgressLine

__all__ = [
    "FadeOut",
    "LayerWeightLogger",
    "ProgressLine",
    "StopOnNonFiniteLoss",
    "TensorBoardScalars",
    "Throughput",
]
