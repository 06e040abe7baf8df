"""Data sets for image classification, and the batches that training and evaluation read."""

from numbers import Integral, Real
from pathlib import Path

import numpy as np

from dskd_keras.data import arrays, sources
from dskd_keras.data.batches import EvaluationBatches, FixedViews, TrainingBatches, normalize
from dskd_keras.data.dataset import AUGMENTATIONS, ImageDataset, check_arrays
from dskd_keras.errors import InputError

__all__ = [
    "AUGMENTATIONS",
    "EvaluationBatches",
    "FixedViews",
    "ImageDataset",
    "TrainingBatches",
    "load",
    "normalize",
]


def load(
    dataset,
    *,
    data_dir=None,
    image_size=None,
    train_examples=None,
    validation_fraction=0.0,
):
    """Loads a data set into memory, the same arrays in every call.

    Args:
        dataset: `"digits"` (comes with scikit-learn, no download); a `.npz` file with `x_train`,
            `y_train`, `x_test`, `y_test`; a folder of class folders, or of `train` and `test` with
            class folders; or the name of a TFDS image-classification set, such as `"cifar100"`.
            An existing folder of images goes before a TFDS name.
        data_dir: Folder of prepared TFDS data. Defaults to the environment variable
            `TFDS_DATA_DIR`, then to TFDS's own default. For `"tiny_imagenet"` it may also be
            `tiny-imagenet-200.zip`, the folder that it extracts to, or a folder that has either.
            Other sources don't use it.
        image_size: Height and width in pixels to which all images are resized, or `None` to keep
            them as they are.
        train_examples: Train on that many images only, with the classes balanced as they are in
            the whole. The choice is fixed: it doesn't depend on a run's seed.
        validation_fraction: Share of the training images, after `train_examples`, that is set
            apart for validation; in [0, 1). Stratified and fixed, too.

    Returns:
        An `ImageDataset`.

    Raises:
        InputError: Where the data can't be found or used, or an argument is out of its range.
    """
    if image_size is not None and not (isinstance(image_size, Integral) and image_size >= 1):
        raise InputError(f"image_size: {image_size!r} should be a positive number of pixels.")
    if not (isinstance(validation_fraction, Real) and 0 <= validation_fraction < 1):
        raise InputError(
            f"validation_fraction: {validation_fraction!r} should be at least 0 and below 1."
        )
    loaded = _load_all(dataset, data_dir, image_size)
    check_arrays(loaded)
    x_train, y_train = loaded.x_train, loaded.y_train
    if train_examples is not None:
        kept = _subset(y_train, train_examples)
        x_train, y_train = arrays.take(x_train, kept), y_train[kept]
    x_validation = y_validation = None
    if validation_fraction:
        train, validation = _validation_split(y_train, validation_fraction)
        x_validation, y_validation = arrays.take(x_train, validation), y_train[validation]
        x_train, y_train = arrays.take(x_train, train), y_train[train]
    mean, std = loaded.mean, loaded.std
    if mean is None:
        mean, std = arrays.channel_statistics(x_train)
    notes = loaded.notes
    absent = np.setdiff1d(np.arange(len(loaded.class_names)), y_train)
    if len(absent):
        first = loaded.class_names[absent[0]]
        notes += (f"{len(absent)} class(es) without a training image, the first is {first!r}",)
    loaded = loaded._replace(x_train=x_train, y_train=y_train, mean=mean, std=std, notes=notes)
    return ImageDataset(**loaded._asdict(), x_validation=x_validation, y_validation=y_validation)


def _load_all(dataset, data_dir, image_size):
    name = str(dataset)
    if name == "digits":
        return sources.load_digits(image_size)
    path = Path(name).expanduser()
    if path.suffix.lower() == ".npz":
        return sources.load_npz(path, image_size)
    if path.is_dir() and not _is_tfds_folder(path, name):
        return sources.load_folder(path, image_size)
    if path.is_absolute() or name.startswith((".", "~")):
        raise InputError(f"dataset: {name!r} is neither an existing folder nor a .npz file.")
    # Here and not above: everything else works where TensorFlow is not installed.
    from dskd_keras.data import tfds

    return tfds.load_tfds(name, data_dir, image_size)


def _is_tfds_folder(path, name):
    # In a folder of TFDS data, "cifar100" is both the set's name and the folder that it is in.
    patterns = ("*/dataset_info.json", "*/*/dataset_info.json")
    return name == path.name and any(any(path.glob(pattern)) for pattern in patterns)


def _subset(labels, train_examples):
    num_classes = len(np.unique(labels))
    if not isinstance(train_examples, Integral) or not num_classes <= train_examples <= len(labels):
        raise InputError(
            f"train_examples: {train_examples!r} should be a whole number from {num_classes} (one"
            f" image a class) to {len(labels)}, the training images there are."
        )
    if train_examples == len(labels):
        return np.arange(len(labels))
    kept, _ = arrays.stratified_split(labels, len(labels) - train_examples, "train_examples")
    return kept


def _validation_split(labels, fraction):
    num_classes = len(np.unique(labels))
    count = round(fraction * len(labels))
    if count < num_classes:
        raise InputError(
            f"validation_fraction: {fraction!r} of {len(labels)} training images gives {count}, and"
            f" {num_classes} classes need as many; it should be at least"
            f" {num_classes / len(labels):.2g}."
        )
    return arrays.stratified_split(labels, count, "validation_fraction")
