"""Search for a distillation's settings with KerasTuner."""

from dskd_keras.config import SearchRanges
from dskd_keras.tuning.hypermodel import DistillationHyperModel

__all__ = ["DistillationHyperModel", "SearchRanges"]
