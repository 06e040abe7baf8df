"""The form in which every data set reaches training: arrays, class names and normalisation."""

import dataclasses
import functools
import hashlib

import numpy as np

from dskd_keras.data import arrays
from dskd_keras.data.pixels import check_augmentation
from dskd_keras.data.plans import Images
from dskd_keras.data.streams import ImageStream
from dskd_keras.errors import InputError, wrong

# The confusion matrix has as many rows and columns.
MOST_CLASSES = 10_000


def check_arrays(x: str, images: Images, y: str, labels: np.ndarray) -> None:
    """Raises `InputError` unless images, in field `x`, and labels, in `y`, can be trained on."""
    if images.ndim != 4 or images.dtype != np.uint8 or 0 in images.shape:
        raise InputError(
            f"{x}: shape {images.shape} and dtype {images.dtype} should be [N, H, W, C], none of"
            " them 0, and uint8."
        )
    if labels.shape != images.shape[:1] or not np.issubdtype(labels.dtype, np.integer):
        raise InputError(
            f"{y}: shape {labels.shape} and dtype {labels.dtype} should be ({len(images)},), as"
            f" many labels as there are images in {x}, and integer."
        )


def _is_text(name: str) -> bool:
    """Returns whether a name can be written: of bytes that are no UTF-8 Python makes surrogates."""
    try:
        name.encode()
    except UnicodeEncodeError:
        return False
    return True


@dataclasses.dataclass(frozen=True, eq=False)
class LoadedImages:
    """What `ImageDataset` holds and checks, with a normalisation that may not be known yet."""

    name: str
    x_train: Images
    y_train: np.ndarray
    x_test: Images
    y_test: np.ndarray
    class_names: tuple[str, ...]
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None
    x_validation: Images | None = None
    y_validation: np.ndarray | None = None
    augmentation: str = "crop_flip"
    notes: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        check_augmentation(self.augmentation)
        if (self.x_validation is None) != (self.y_validation is None):
            raise InputError("x_validation and y_validation: give both or neither.")
        if self.num_classes < 2:
            raise InputError(
                f"dataset: {self.name!r} has {self.num_classes} class(es), and classification needs"
                " two."
            )
        if self.num_classes > MOST_CLASSES:
            raise InputError(
                f"dataset: {self.name!r} has {self.num_classes:,} classes, and {MOST_CLASSES:,} are"
                " the most."
            )
        for name in self.class_names:
            if not name.strip() or not _is_text(name):
                raise wrong("class_names", name, "a text of some letters, in UTF-8")
        for part in ("train", "test", *([] if self.x_validation is None else ["validation"])):
            x, y = f"x_{part}", f"y_{part}"
            images, labels = getattr(self, x), getattr(self, y)
            check_arrays(x, images, y, labels)
            if images.shape[1:] != self.input_shape:
                raise InputError(
                    f"{x}: images of shape {images.shape[1:]} should have the shape of the training"
                    f" images, {self.input_shape}."
                )
            low, high, most = int(labels.min()), int(labels.max()), self.num_classes - 1
            if low < 0 or high > most:
                raise InputError(
                    f"{y}: labels from {low} to {high} should lie in 0 … {most}, the"
                    f" {self.num_classes} classes."
                )

    @property
    def num_classes(self) -> int:
        """Number of classes."""
        return len(self.class_names)

    @property
    def input_shape(self) -> tuple[int, int, int]:
        """`(H, W, C)` of one image."""
        height, width, channels = self.x_train.shape[1:]
        return height, width, channels


@dataclasses.dataclass(frozen=True, eq=False)
class ImageDataset(LoadedImages):
    """Images and labels for classification, checked, with their normalisation.

    Attributes:
        name: What tables and pictures call it.
        x_train: uint8 `[N, H, W, C]`, pixels in [0, 255]; all three parts may be an `ImageStream`.
        y_train: int32 `[N]`, classes from 0.
        x_test: uint8 `[M, H, W, C]`.
        y_test: int32 `[M]`.
        class_names: One name a class, in the order of the labels.
        mean: Mean of each channel, of pixels in [0, 1]. Defaults to that of the training images.
        std: Standard deviation of each channel, of pixels in [0, 1] and positive. Defaults to that
            of the training images.
        x_validation: uint8 `[K, H, W, C]`, or `None` without a validation split.
        y_validation: int32 `[K]`, or `None`.
        augmentation: One of `AUGMENTATIONS`: what suits these images by default.
        notes: Sentences that a user should read before trusting a number.

    Raises:
        InputError: A part is empty, has images of another type or size, or labels that don't fit
            its images or the classes; or the normalisation doesn't fit the images.
    """

    mean: tuple[float, ...] = None  # type: ignore[assignment]
    std: tuple[float, ...] = None  # type: ignore[assignment]

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.mean is None or self.std is None:
            mean, std = arrays.channel_statistics(self.x_train)
            object.__setattr__(self, "mean", mean if self.mean is None else self.mean)
            object.__setattr__(self, "std", std if self.std is None else self.std)
        channels = self.x_train.shape[3]
        for field in ("mean", "std"):
            values = getattr(self, field)
            if np.shape(values) != (channels,) or not np.isfinite(values).all():
                raise wrong(field, values, f"one finite number for each of the {channels} channels")
        if min(self.std) <= 0:
            raise wrong("std", self.std, "positive in every channel")

    @functools.cached_property
    def fingerprint(self) -> str:
        """A short hex string that stands for what a teacher is trained on.

        It covers the training images and labels, the normalisation and the number of classes, and
        is the same in every process and on every machine for the same contents. Of a stream it
        covers the names of the images and their sizes in bytes instead of their pixels.
        """
        digest = hashlib.blake2b(digest_size=8)
        digest.update(repr((self.x_train.shape, self.num_classes)).encode())
        digest.update(np.asarray([self.mean, self.std], "<f8").tobytes())
        digest.update(self.y_train.astype("<i4").tobytes())
        if isinstance(self.x_train, ImageStream):
            digest.update(self.x_train.identity())
            return digest.hexdigest()
        for part in arrays.chunks(self.x_train):
            digest.update(np.ascontiguousarray(self.x_train[part]).data)
        return digest.hexdigest()
