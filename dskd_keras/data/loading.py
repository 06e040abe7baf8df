"""`load`, which reads a data set of any kind."""

import dataclasses
import os

import numpy as np

from dskd_keras import checks
from dskd_keras.data import arrays, kinds, sources
from dskd_keras.data.dataset import ImageDataset, LoadedImages
from dskd_keras.data.reading import AnyPath, needed
from dskd_keras.errors import wrong


def load(
    dataset: AnyPath,
    *,
    data_dir: AnyPath | None = None,
    image_size: int | None = None,
    train_examples: int | None = None,
    validation_fraction: float = 0.0,
) -> ImageDataset:
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
        InputError: The data can't be found or used, or an argument is out of its range.
    """
    if image_size is not None:
        image_size = checks.whole("image_size", image_size, 1)
    validation_fraction = checks.real("validation_fraction", validation_fraction, least=0, below=1)
    kind = kinds.kind(dataset)
    if kind == "digits":
        loaded = sources.load_digits(image_size)
    elif kind == "npz":
        loaded = sources.load_npz(dataset, image_size)
    elif kind == "folder":
        loaded = sources.load_folder(dataset, image_size)
    else:
        # Imported here: everything else works where TensorFlow is not installed.
        os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
        tfds = needed("dskd_keras.data.tfds", "tensorflow-datasets", "tfds")
        loaded = tfds.load_tfds(str(dataset), data_dir, image_size)
    if train_examples is not None:
        loaded = _keep(loaded, _subset(loaded.y_train, train_examples))
    if validation_fraction:
        train, validation = _validation_split(loaded.y_train, validation_fraction)
        held_out = _keep(loaded, validation)
        loaded = dataclasses.replace(
            _keep(loaded, train), x_validation=held_out.x_train, y_validation=held_out.y_train
        )
    absent = np.setdiff1d(np.arange(len(loaded.class_names)), loaded.y_train)
    notes = loaded.notes
    if len(absent):
        first = loaded.class_names[absent[0]]
        notes += (f"{len(absent)} class(es) without a training image, the first is {first!r}",)
    return ImageDataset(**vars(loaded) | {"notes": notes})


def _keep(loaded: LoadedImages, chosen: np.ndarray) -> LoadedImages:
    """Returns the data with the `chosen` training images alone."""
    return dataclasses.replace(
        loaded, x_train=arrays.take(loaded.x_train, chosen), y_train=loaded.y_train[chosen]
    )


def _subset(labels: np.ndarray, train_examples: int) -> np.ndarray:
    classes, most = len(np.unique(labels)), len(labels)
    if not classes <= checks.whole("train_examples", train_examples, 0) <= most:
        rule = f"a whole number from {classes} (one image a class) to {most} (all that there are)"
        raise wrong("train_examples", train_examples, rule)
    if train_examples == most:
        return np.arange(most)
    kept, _ = arrays.stratified_split(labels, most - train_examples, "train_examples")
    return kept


def _validation_split(labels: np.ndarray, fraction: float) -> tuple[np.ndarray, np.ndarray]:
    classes, total = len(np.unique(labels)), len(labels)
    count = round(fraction * total)
    if count < classes:
        rule = f"at least {classes / total:.2g}: an image for each of {classes} classes, of {total}"
        raise wrong("validation_fraction", fraction, rule)
    return arrays.stratified_split(labels, count, "validation_fraction")
