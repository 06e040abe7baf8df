"""Search for a distillation's settings with KerasTuner."""

from typing import TYPE_CHECKING

from dskd_keras._lazy import attach

if TYPE_CHECKING:
    from dskd_keras.tuning.config import SearchRanges
    from dskd_keras.tuning.hypermodel import DistillationHyperModel

__all__ = ["DistillationHyperModel", "SearchRanges"]

__getattr__, __dir__ = attach(
    __name__, {"DistillationHyperModel": "hypermodel", "SearchRanges": "config"}
)
