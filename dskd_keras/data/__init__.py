"""Data sets for image classification, and the batches that training and evaluation read."""

from typing import TYPE_CHECKING

from dskd_keras._lazy import attach

if TYPE_CHECKING:
    from dskd_keras.data.batches import EvaluationBatches, FixedViews, TrainingBatches
    from dskd_keras.data.dataset import ImageDataset
    from dskd_keras.data.loading import load
    from dskd_keras.data.pixels import AUGMENTATIONS, normalize
    from dskd_keras.data.streams import ImageStream

__all__ = [
    "AUGMENTATIONS",
    "EvaluationBatches",
    "FixedViews",
    "ImageDataset",
    "ImageStream",
    "TrainingBatches",
    "load",
    "normalize",
]

__getattr__, __dir__ = attach(
    __name__,
    {
        "AUGMENTATIONS": "pixels",
        "EvaluationBatches": "batches",
        "FixedViews": "batches",
        "ImageDataset": "dataset",
        "ImageStream": "streams",
        "TrainingBatches": "batches",
        "load": "loading",
        "normalize": "pixels",
    },
)
