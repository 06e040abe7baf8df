"""`load`, which reads a data set of any kind."""

import dataclasses
import os

import numpy as np

from dskd_keras import checks
from dskd_keras.data import arrays, kinds, sources
from dskd_keras.data.dataset import ImageDataset, LoadedImages
from dskd_keras.data.reading import AnyPath, needed
from dskd_keras.data.streams import ImageStream, cores
from dskd_keras.errors import wrong

# Pixels a side from which a window of the image is as good as the whole: those of photographs.
_LARGE = 128
_WORKERS_A_CORE = 16


def load(
    dataset: AnyPath,
    *,
    data_dir: AnyPath | None = None,
    image_size: int | None = None,
    train_examples: int | None = None,
    validation_fraction: float = 0.0,
    stream: bool | None = False,
    stream_workers: int | None = None,
) -> ImageDataset:
    """Loads a data set into memory, or leaves it in its files; it is the same in every call.

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
        stream: Whether the images stay in their files, as `ImageStream`s that decode them when they
            are asked for. `None` takes streams for images that would need more than a quarter of
            the memory. Folders of images and TFDS sets can be streams.
        stream_workers: Processes that make the batches of a stream ahead, at most 16 for each core;
            0 takes threads of this process. Defaults to one less than there are cores, and at most
            16.

    Returns:
        An `ImageDataset`.

    Raises:
        InputError: The data can't be found or used, or an argument is out of its range.
    """
    if image_size is not None:
        image_size = checks.whole("image_size", image_size, 1)
    validation_fraction = checks.real("validation_fraction", validation_fraction, least=0, below=1)
    if stream not in (None, False, True):
        raise wrong("stream", stream, "True, False or None")
    kind = kinds.kind(dataset)
    kinds.check_stream(dataset, stream)
    if kind == "digits":
        loaded = sources.load_digits(image_size)
    elif kind == "npz":
        loaded = sources.load_npz(dataset, image_size)
    elif kind == "folder":
        loaded = sources.load_folder(dataset, image_size, stream)
    else:
        # Imported here: it may import TensorFlow, which not all have.
        os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
        tfds = needed("dskd_keras.data.tfds", "tensorflow-datasets", "tfds")
        loaded = tfds.load_tfds(str(dataset), data_dir, image_size, stream)
    if stream_workers is not None:
        # Each takes a processor's time and 50 MB: hundreds on few cores look like a hang.
        most = _WORKERS_A_CORE * cores()
        workers = checks.whole("stream_workers", stream_workers, 0, most)
        for images in (loaded.x_train, loaded.x_test):
            if isinstance(images, ImageStream):
                images.workers = workers
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
    if min(loaded.x_train.shape[1:3]) >= _LARGE and loaded.augmentation == "crop_flip":
        loaded = dataclasses.replace(loaded, augmentation="resized_crop_flip")
    streamed = isinstance(loaded.x_train, ImageStream)
    if streamed and loaded.mean is None and len(loaded.x_train) > arrays.SAMPLED:
        notes += (f"mean and deviation are those of {arrays.SAMPLED:,} training images",)
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
