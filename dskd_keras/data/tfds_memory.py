"""Sets of TensorFlow Datasets, read into memory.

Importing this module needs tensorflow and tensorflow-datasets.
"""

import contextlib

import keras
import numpy as np
import tensorflow as tf
import tensorflow_datasets as tfds

from dskd_keras.data import arrays
from dskd_keras.data.reading import refused
from dskd_keras.errors import InputError

_BATCH_BYTES = 2**20

if keras.backend.backend() != "tensorflow":
    # TensorFlow only reads files here, and would take the memory that training needs. It refuses
    # where it already uses the GPU.
    with contextlib.suppress(RuntimeError):
        tf.config.set_visible_devices([], "GPU")


def _dataset(builder: tfds.core.DatasetBuilder, split: str) -> tf.data.Dataset:
    # Each split is read once.
    once = tfds.ReadConfig(try_autocache=False)
    return builder.as_dataset(split, shuffle_files=False, as_supervised=True, read_config=once)


def has_labels(builder: tfds.core.DatasetBuilder, split: str) -> bool:
    """Returns whether a split has labels."""
    # Some test splits are published without labels and hold -1.
    _, label = next(_dataset(builder, f"{split}[:1]").as_numpy_iterator())
    return int(label) >= 0


def read(
    name: str, builder: tfds.core.DatasetBuilder, split: str, image_size: int | None
) -> tuple[np.ndarray, np.ndarray]:
    """Returns uint8 `[N, H, W, C]` and int32 `[N]` of one split, in stored order."""
    dataset, count = _dataset(builder, split), builder.info.splits[split].num_examples
    shape = dataset.element_spec[0].shape
    if image_size and shape[:2] != (image_size, image_size):

        def resize(image: tf.Tensor, label: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
            image = tf.image.resize(image, (image_size, image_size), antialias=True)
            return tf.saturate_cast(tf.round(image), tf.uint8), label

        dataset = dataset.map(resize, num_parallel_calls=tf.data.AUTOTUNE, deterministic=True)
        shape = dataset.element_spec[0].shape
    # Where the size is not declared, one image a batch lets each be compared with the first.
    batch_size = max(1, _BATCH_BYTES // shape.num_elements()) if shape.is_fully_defined() else 1
    dataset = dataset.batch(batch_size).prefetch(tf.data.AUTOTUNE)
    images, labels, start = np.empty(0, np.uint8), np.empty(count, np.int32), 0
    place = f"dataset: {name!r} in {builder.data_dir}"
    remedy = "; remove that folder and prepare it again"
    with refused(f"{place} can't be read", tf.errors.OpError, remedy=remedy):
        for x, y in dataset.as_numpy_iterator():
            if not start:
                images = arrays.allocate_images((count, *x.shape[1:]))
            if x.shape[1:] != images.shape[1:]:
                raise InputError(
                    f"dataset: images of {name!r} differ in size ({x.shape[1:]} and"
                    f" {images.shape[1:]}); pass --image_size to resize all of them."
                )
            images[start : start + len(x)] = x
            labels[start : start + len(x)] = y
            start += len(x)
    if start != count:
        raise InputError(f"{place} has {start} of {count} images in {split!r}{remedy}.")
    return images, labels
