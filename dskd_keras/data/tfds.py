"""Image-classification sets of TensorFlow Datasets, by name."""

import contextlib
import difflib
import logging
import os
import socket
import sys
import urllib.parse
import urllib.request

import keras
import numpy as np

from dskd_keras.data import arrays
from dskd_keras.data.dataset import LoadedImages
from dskd_keras.data.sources import one_line
from dskd_keras.errors import InputError

# Means and standard deviations that published results use.
_NORMALIZATION = {
    "cifar10": ((0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)),
    "cifar100": ((0.5071, 0.4867, 0.4408), (0.2675, 0.2565, 0.2761)),
    # mdistiller's. This std is the mean of the single images' deviations (0.229, 0.225, 0.225 over
    # 1,600 of them); that of all pixels is larger (0.277, 0.267, 0.280).
    "tiny_imagenet": ((0.4802, 0.4481, 0.3975), (0.2302, 0.2265, 0.2262)),
}
# Digits and letters: mirrored, they are others or none.
_NOT_MIRRORED = frozenset(
    (
        "binary_alpha_digits",
        "cmaterdb",
        "emnist",
        "kmnist",
        "mnist",
        "mnist_corrupted",
        "omniglot",
        "svhn_cropped",
    )
)
_BATCH_BYTES = 2**20
# Has some sets in prepared form, which TFDS prefers to their own sites.
_TFDS_HOST = "storage.googleapis.com"


def load_tfds(name, data_dir=None, image_size=None):
    """Loads a TFDS image-classification set; reads no network where it is already prepared.

    The test set is the split `test`, else `validation`, else 20 % of `train`.

    Args:
        name: Name as TFDS takes it, with a configuration or a version where wanted, such as
            `"cifar100"` or `"emnist/letters"`.
        data_dir: Folder of prepared data. Defaults to the environment variable `TFDS_DATA_DIR`,
            then to TFDS's own default. For `"tiny_imagenet"` it may also be a local copy of the
            archive, as `tiny_imagenet.find` tells.
        image_size: Height and width to which the images are resized, or `None` where all have one
            size.

    Returns:
        `LoadedImages`, in the order in which TFDS stores the images.

    Raises:
        InputError: Where TFDS is not installed, knows no such set, can neither find nor download
            it, or it doesn't consist of 8-bit images with a class each.
    """
    tfds = _import_tfds(name)
    builder = _find_builder(tfds, name, data_dir)
    label_key = _check_features(tfds, name, builder)
    _prepare(tfds, name, builder)
    counts = {split: info.num_examples for split, info in builder.info.splits.items()}
    if not counts.get("train"):
        raise InputError(
            f"dataset: {name!r} has no split 'train'; its splits are {', '.join(counts) or 'none'}."
        )
    images, labels = _read(tfds, name, builder, "train", counts["train"], image_size)
    class_names = tuple(builder.info.features[label_key].names)
    base = builder.name
    mean, std = _NORMALIZATION.get(base, (None, None))
    notes = builder.notes() if _is_tiny_imagenet(builder) else []
    test = next(
        (
            split
            for split in ("test", "validation")
            if counts.get(split) and _has_labels(tfds, builder, split, label_key)
        ),
        None,
    )
    if test:
        x_test, y_test = _read(tfds, name, builder, test, counts[test], image_size)
        if test == "validation":
            notes.append("no labelled test split: the validation split is the test set")
        elif counts.get("validation"):
            notes.append("the validation split is not used")
    else:
        kept, held_out, note = arrays.hold_out(labels)
        x_test, y_test = arrays.take(images, held_out), labels[held_out]
        images, labels = arrays.take(images, kept), labels[kept]
        notes.append(note)
    return LoadedImages(
        name=name,
        x_train=images,
        y_train=labels,
        x_test=x_test,
        y_test=y_test,
        class_names=class_names,
        augmentation="crop" if base in _NOT_MIRRORED else "crop_flip",
        mean=mean,
        std=std,
        notes=tuple(notes),
    )


def _import_tfds(name):
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    try:
        import tensorflow as tf
        import tensorflow_datasets as tfds

        from dskd_keras.data import tiny_imagenet  # noqa: F401, registers the builder
    except ImportError as error:
        raise InputError(
            f"dataset: {name!r} is read with tensorflow-datasets, which can't be imported"
            f" ({one_line(error)}); install tensorflow and tensorflow-datasets, or use 'digits',"
            " a .npz file or a folder of images."
        ) from error
    if keras.backend.backend() != "tensorflow":
        # TensorFlow only reads files here, and would take the memory that training needs. It
        # refuses where it already uses the GPU.
        with contextlib.suppress(RuntimeError):
            tf.config.set_visible_devices([], "GPU")
    if not sys.stderr.isatty():
        tfds.disable_progress_bar()
    # TFDS warns of every set that is not prepared yet; `_prepare` says it in other words.
    logging.getLogger("absl").addFilter(_is_news)
    return tfds


def _is_news(record):
    return not record.getMessage().startswith("Variant folder")


def _find_builder(tfds, name, data_dir):
    data_dir = data_dir or os.environ.get("TFDS_DATA_DIR") or None
    if data_dir is not None:
        data_dir = os.path.expanduser(data_dir)
    arguments = {"data_dir": data_dir}
    if name.split("/")[0].split(":")[0] == "tiny_imagenet":
        from dskd_keras.data import tiny_imagenet

        arguments = tiny_imagenet.find(data_dir)
    try:
        return tfds.builder(name, **arguments)
    except tfds.core.DatasetNotFoundError as error:
        raise _unknown_dataset(tfds, name) from error
    # TFDS raises ValueError for a malformed name, AssertionError for a version it doesn't have,
    # and more; all of them speak of the name.
    except Exception as error:
        known = tfds.list_builders(with_community_datasets=False)
        if name.split("/")[0].split(":")[0] not in known:
            raise _unknown_dataset(tfds, name) from error
        raise InputError(f"dataset: {name!r}: {one_line(error)}") from error


def _unknown_dataset(tfds, name):
    names = ["digits", *tfds.list_builders(with_community_datasets=False)]
    close = difflib.get_close_matches(name.casefold(), names, n=3, cutoff=0.6)
    hint = f" Did you mean {' or '.join(map(repr, close))}?" if close else ""
    return InputError(
        f"dataset: unknown name {name!r}.{hint} It should be 'digits', a .npz file, an existing"
        " folder of images or a TFDS name; tensorflow_datasets.list_builders() gives all of those."
    )


def _check_features(tfds, name, builder):
    """Returns the name of the label feature; called before anything is downloaded."""
    keys, features = builder.info.supervised_keys, builder.info.features
    problem = None
    if not keys or len(keys) != 2 or not all(isinstance(key, str) for key in keys):
        problem = "it declares no pair of image and label"
    elif not isinstance(features[keys[0]], tfds.features.Image):
        problem = f"its input {keys[0]!r} is no image"
    elif features[keys[0]].np_dtype != np.uint8:
        problem = f"its images are {np.dtype(features[keys[0]].np_dtype)} and not uint8"
    elif not isinstance(features[keys[1]], tfds.features.ClassLabel):
        problem = f"its target {keys[1]!r} is no class label"
    if problem:
        raise InputError(f"dataset: {name!r} is no set for image classification: {problem}.")
    return keys[1]


def _is_tiny_imagenet(builder):
    from dskd_keras.data import tiny_imagenet

    return isinstance(builder, tiny_imagenet.TinyImagenet)


def _prepare(tfds, name, builder):
    """Prepares the data where it isn't there yet, from a download or a local copy."""
    source = builder.source if _is_tiny_imagenet(builder) else None
    if builder.is_prepared():
        if source:
            builder.download_and_prepare()  # only checks that the data came from this source
        return
    place = f"dataset: {name!r} is not prepared in {builder.data_dir}"
    if source:
        print(f"{place}; preparing it from {source.path}", file=sys.stderr)
        failure, remedy = "prepared", ""
    else:
        failure, remedy = "downloaded", "; set data_dir or TFDS_DATA_DIR to a folder that has it"
        if _is_tiny_imagenet(builder):
            remedy += ", or data_dir to tiny-imagenet-200.zip or to the folder that it extracts to"
        if missing := _unreachable(builder):
            # TFDS would try for minutes, and print each attempt.
            raise InputError(
                f"{place} and can't be downloaded: no connection to {', '.join(missing)}{remedy}."
            )
        print(f"{place}; downloading", file=sys.stderr)
    try:
        builder.download_and_prepare()
    except InputError:
        raise
    # Whatever stops it (the network, a checksum, a file to be fetched by hand, a full disk) is
    # for the user to mend, and comes as its own type of error.
    except Exception as error:
        raise InputError(
            f"{place} and can't be {failure} ({type(error).__name__}: {one_line(error)}){remedy}."
        ) from error


def _unreachable(builder):
    """Returns the hosts that have the data if none of them can be reached, else nothing."""
    hosts = {urllib.parse.urlparse(url).hostname for url in builder.url_infos or ()}
    if not hosts or urllib.request.getproxies():
        return []
    hosts = sorted(hosts | {_TFDS_HOST})
    return [] if any(map(_resolves, hosts)) else hosts


def _resolves(host):
    try:
        socket.getaddrinfo(host, 443)
    except OSError:
        return False
    return True


def _dataset(tfds, builder, split):
    # No autocache: each split is read once.
    return builder.as_dataset(
        split=split,
        shuffle_files=False,
        as_supervised=True,
        read_config=tfds.ReadConfig(try_autocache=False),
    )


def _has_labels(tfds, builder, split, label_key):
    # Some test splits are published without labels and hold -1.
    _, label = next(_dataset(tfds, builder, f"{split}[:1]").as_numpy_iterator())
    return int(label) >= 0


def _read(tfds, name, builder, split, count, image_size):
    """Returns uint8 `[N, H, W, C]` and int32 `[N]` of one split, in stored order."""
    import tensorflow as tf

    dataset = _dataset(tfds, builder, split)
    shape = dataset.element_spec[0].shape
    if image_size and shape[:2] != (image_size, image_size):

        def resize(image, label):
            image = tf.image.resize(image, (image_size, image_size), antialias=True)
            return tf.saturate_cast(tf.round(image), tf.uint8), label

        dataset = dataset.map(resize, num_parallel_calls=tf.data.AUTOTUNE, deterministic=True)
        shape = dataset.element_spec[0].shape
    # Where the size is not declared, one image a batch lets each be compared with the first.
    batch_size = max(1, _BATCH_BYTES // shape.num_elements()) if shape.is_fully_defined() else 1
    dataset = dataset.batch(batch_size).prefetch(tf.data.AUTOTUNE)
    images, labels, start = None, np.empty(count, np.int32), 0
    try:
        for x, y in dataset.as_numpy_iterator():
            if images is None:
                images = arrays.allocate_images((count, *x.shape[1:]))
            if x.shape[1:] != images.shape[1:]:
                raise InputError(
                    f"dataset: images of {name!r} differ in size ({x.shape[1:]} and"
                    f" {images.shape[1:]}); pass --image_size to resize all of them."
                )
            images[start : start + len(x)] = x
            labels[start : start + len(x)] = y
            start += len(x)
    except tf.errors.OpError as error:
        raise InputError(
            f"dataset: {name!r} in {builder.data_dir} can't be read ({one_line(error)}); remove"
            " that folder and prepare it again."
        ) from error
    if start != count:
        raise InputError(
            f"dataset: {name!r} in {builder.data_dir} has {start} of {count} images in {split!r};"
            " remove that folder and prepare it again."
        )
    return images, labels
