"""The form in which every data set reaches training: arrays, class names and normalisation."""

import dataclasses
import hashlib
from typing import NamedTuple

import numpy as np

from dskd_keras.data import arrays
from dskd_keras.errors import InputError, unknown_name

AUGMENTATIONS = ("crop_flip", "crop", "none")


class LoadedImages(NamedTuple):
    """What a source hands over: all of its images, before a subset or a validation split.

    `mean` and `std` are given where the field has agreed on constants, and `None` where they are to
    be measured on the training images.
    """

    name: str
    x_train: np.ndarray
    y_train: np.ndarray
    x_test: np.ndarray
    y_test: np.ndarray
    class_names: tuple[str, ...]
    augmentation: str = "crop_flip"
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None
    notes: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True, eq=False)
class ImageDataset:
    """Images and labels for classification, checked.

    Attributes:
        name: What tables and pictures call it.
        x_train: uint8 `[N, H, W, C]`, pixels in [0, 255].
        y_train: int32 `[N]`, classes from 0.
        x_test: uint8 `[M, H, W, C]`.
        y_test: int32 `[M]`.
        class_names: One name a class, in the order of the labels.
        mean: Mean of each channel, of pixels in [0, 1].
        std: Standard deviation of each channel, of pixels in [0, 1]; positive.
        x_validation: uint8 `[K, H, W, C]`, or `None` without a validation split.
        y_validation: int32 `[K]`, or `None`.
        augmentation: `"crop_flip"`, `"crop"` or `"none"`: what suits these images by default.
        notes: Sentences that a user should read before trusting a number.

    Raises:
        InputError: Where a part is empty, has images of another type or size, or labels that don't
            fit its images or the classes.
    """

    name: str
    x_train: np.ndarray
    y_train: np.ndarray
    x_test: np.ndarray
    y_test: np.ndarray
    class_names: tuple[str, ...]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    x_validation: np.ndarray | None = None
    y_validation: np.ndarray | None = None
    augmentation: str = "crop_flip"
    notes: tuple[str, ...] = ()

    def __post_init__(self):
        if (self.x_validation is None) != (self.y_validation is None):
            raise InputError("x_validation and y_validation: give both or neither.")
        check_arrays(self)
        channels = self.x_train.shape[3]
        for field in ("mean", "std"):
            values = np.asarray(getattr(self, field), np.float64)
            if values.shape != (channels,) or not np.isfinite(values).all():
                raise InputError(
                    f"{field}: {getattr(self, field)!r} should be one finite number for each of the"
                    f" {channels} channels."
                )
        if min(self.std) <= 0:
            raise InputError(f"std: {self.std!r} should be positive in every channel.")
        if self.augmentation not in AUGMENTATIONS:
            raise unknown_name("augmentation", self.augmentation, AUGMENTATIONS)

    @property
    def num_classes(self):
        """Number of classes."""
        return len(self.class_names)

    @property
    def input_shape(self):
        """`(H, W, C)` of one image."""
        return tuple(self.x_train.shape[1:])

    def fingerprint(self):
        """Returns a short hex string that stands for what a teacher is trained on.

        It covers the training images and labels, the normalisation and the number of classes, and
        is the same in every process and on every machine for the same contents.
        """
        digest = hashlib.blake2b(digest_size=8)
        digest.update(repr((self.x_train.shape, self.num_classes)).encode())
        digest.update(np.asarray([self.mean, self.std], "<f8").tobytes())
        digest.update(self.y_train.astype("<i4").tobytes())
        for part in arrays.chunks(self.x_train):
            digest.update(np.ascontiguousarray(self.x_train[part]))
        return digest.hexdigest()


def check_arrays(data):
    """Checks the images and labels of an `ImageDataset` or of `LoadedImages`.

    Args:
        data: Either of the two.

    Raises:
        InputError: Names the array and what it should be.
    """
    num_classes = len(data.class_names)
    if num_classes < 2:
        raise InputError(
            f"dataset: {data.name!r} has {num_classes} class(es), and classification needs two."
        )
    _check_part(data, "train", num_classes)
    _check_part(data, "test", num_classes)
    if getattr(data, "x_validation", None) is not None:
        _check_part(data, "validation", num_classes)


def _check_part(data, part, num_classes):
    images, labels = getattr(data, f"x_{part}"), getattr(data, f"y_{part}")
    if images.ndim != 4 or images.dtype != np.uint8:
        raise InputError(
            f"x_{part}: shape {images.shape} and dtype {images.dtype} should be [N, H, W, C] and"
            " uint8."
        )
    if len(images) == 0:
        raise InputError(f"x_{part}: the data set {data.name!r} has no images in this part.")
    if 0 in images.shape:
        raise InputError(f"x_{part}: images of shape {images.shape[1:]} have no pixels.")
    if images.shape[1:] != data.x_train.shape[1:]:
        raise InputError(
            f"x_{part}: images of shape {images.shape[1:]} should have the shape of the training"
            f" images, {data.x_train.shape[1:]}."
        )
    if not np.issubdtype(labels.dtype, np.integer) or labels.ndim != 1:
        raise InputError(
            f"y_{part}: shape {labels.shape} and dtype {labels.dtype} should be [N] and integer."
        )
    if len(labels) != len(images):
        raise InputError(
            f"y_{part}: {len(labels)} labels should be as many as the {len(images)} images in"
            f" x_{part}."
        )
    low, high = int(labels.min()), int(labels.max())
    if low < 0 or high >= num_classes:
        raise InputError(
            f"y_{part}: labels from {low} to {high} should lie in 0 … {num_classes - 1}, the"
            f" {num_classes} classes."
        )
