"""Data sets for image classification, and the batches that training and evaluation read."""

from typing import TYPE_CHECKING

from dskd_keras._lazy import attach

if TYPE_CHECKING:
    from dskd_keras.data.batches import EvaluationBatches, FixedViews, TrainingBatches, normalize
    from dskd_keras.data.dataset import AUGMENTATIONS, ImageDataset
    from dskd_keras.data.loading import load

__all__ = [
    "AUGMENTATIONS",
    "EvaluationBatches",
    "FixedViews",
    "ImageDataset",
    "TrainingBatches",
    "load",
    "normalize",
]

__getattr__, __dir__ = attach(
    __name__,
    {
        "AUGMENTATIONS": "dataset",
        "EvaluationBatches": "batches",
        "FixedViews": "batches",
        "ImageDataset": "dataset",
        "TrainingBatches": "batches",
        "load": "loading",
        "normalize": "batches",
    },
)
