"""Image-classification sets of TensorFlow Datasets, by name.

Importing this module needs tensorflow-datasets.
"""

import contextlib
import difflib
import logging
import os
import socket
import sys
import urllib.parse
import urllib.request
from typing import Any

import numpy as np
import tensorflow_datasets as tfds

from dskd_keras.data import arrays, streams, tfds_stream, tiny_imagenet
from dskd_keras.data.dataset import LoadedImages
from dskd_keras.data.reading import AnyPath, needed, one_line
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
_NOT_MIRRORED = (
    "binary_alpha_digits", "cmaterdb", "emnist", "kmnist", "mnist", "mnist_corrupted", "omniglot",
    "svhn_cropped",
)  # fmt: skip
# Where a set doesn't declare it: about that of ImageNet's photographs.
_UNKNOWN_SIDE = 400
# Has some sets in prepared form, which TFDS prefers to their own sites.
_TFDS_HOST = "storage.googleapis.com"


def load_tfds(
    name: str,
    data_dir: AnyPath | None = None,
    image_size: int | None = None,
    stream: bool | None = False,
) -> LoadedImages:
    """Loads a TFDS image-classification set; reads no network where it is already prepared.

    The images come in the order in which TFDS stores them; a stream needs no TensorFlow. The test
    set is the split `test`, else `validation`, else 20 % of `train`. The arguments are those of
    `dskd_keras.data.load`; a name may have a configuration or a version, as in `"emnist/letters"`.
    """
    _keep_quiet()
    builder = _find_builder(name, data_dir)
    image_key, label_key = _check_features(name, builder)
    _prepare(name, builder)
    counts = {split: info.num_examples for split, info in builder.info.splits.items()}
    if not counts.get("train"):
        raise InputError(
            f"dataset: {name!r} has no split 'train'; its splits are {', '.join(counts) or 'none'}."
        )
    notes = tiny_imagenet.notes(counts) if builder.name == tiny_imagenet.NAME else []
    shape = builder.info.features[image_key].shape
    size = (image_size,) * 2 if image_size else [side or _UNKNOWN_SIDE for side in shape[:2]]
    stream, large = streams.is_wanted(stream, sum(counts.values()), (*size, shape[2] or 3))
    notes += large
    reader: Any = tfds_stream
    if not stream:
        reader = needed("dskd_keras.data.tfds_memory", "tensorflow", "tfds")
    x_train, y_train = reader.read(name, builder, "train", image_size)
    tests = [split for split in ("test", "validation") if counts.get(split)]
    tests = [split for split in tests if reader.has_labels(builder, split)]
    if tests:
        x_test, y_test = reader.read(name, builder, tests[0], image_size)
        if tests[0] == "validation":
            notes.append("no labelled test split: the validation split is the test set")
        elif counts.get("validation"):
            notes.append("the validation split is not used")
    else:
        kept, held_out, note = arrays.hold_out(y_train)
        x_test, y_test = arrays.take(x_train, held_out), y_train[held_out]
        x_train, y_train = arrays.take(x_train, kept), y_train[kept]
        notes.append(note)
    mean, std = _NORMALIZATION.get(builder.name, (None, None))
    return LoadedImages(
        name=name,
        x_train=x_train,
        y_train=y_train,
        x_test=x_test,
        y_test=y_test,
        class_names=tuple(builder.info.features[label_key].names),
        augmentation="crop" if builder.name in _NOT_MIRRORED else "crop_flip",
        mean=mean,
        std=std,
        notes=tuple(notes),
    )


def _keep_quiet() -> None:
    """Leaves standard error to those who need it."""
    if not sys.stderr.isatty():
        tfds.disable_progress_bar()
    # TFDS warns of every set that is not prepared yet; `_prepare` says it in other words.
    logging.getLogger("absl").addFilter(_is_news)


def _is_news(record: logging.LogRecord) -> bool:
    return not record.getMessage().startswith("Variant folder")


def _find_builder(name: str, data_dir: AnyPath | None) -> tfds.core.DatasetBuilder:
    data_dir = os.path.expanduser(data_dir or os.environ.get("TFDS_DATA_DIR") or "") or None
    base = name.split("/")[0].split(":")[0]
    find = tiny_imagenet.find if base == tiny_imagenet.NAME else lambda folder: {"data_dir": folder}
    arguments = find(data_dir)
    try:
        return tfds.builder(name, **arguments)
    # TFDS raises ValueError for a malformed name, AssertionError for a version it doesn't have,
    # and more; all of them speak of the name.
    except Exception as error:
        known = ["digits", *tfds.list_builders(with_community_datasets=False)]
        if base in known:
            raise InputError(f"dataset: {name!r}: {one_line(error)}") from error
        close = difflib.get_close_matches(name.casefold(), known, n=3, cutoff=0.6)
        hint = f" Did you mean {' or '.join(map(repr, close))}?" if close else ""
        raise InputError(
            f"dataset: {name!r} should be 'digits', a .npz file, an existing folder of images or a"
            f" TFDS name.{hint} tensorflow_datasets.list_builders() gives all of those."
        ) from error


def _check_features(name: str, builder: tfds.core.DatasetBuilder) -> tuple[str, str]:
    """Returns the names of image and label; called before anything is downloaded."""
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
    return keys


def _prepare(name: str, builder: tfds.core.DatasetBuilder) -> None:
    """Prepares the data where it isn't there yet, from a download or a local copy."""
    if builder.is_prepared():
        # A builder may check here what its data was prepared from.
        builder.download_and_prepare()
        return
    place = f"dataset: {name!r} is not prepared in {builder.data_dir}"
    if source := getattr(builder, "source", None):
        doing, failure, remedy = f"preparing it from {source.path}", "prepared", ""
    else:
        doing, failure = "downloading", "downloaded"
        remedy = "; set data_dir or TFDS_DATA_DIR to a folder that has it"
        if builder.name == tiny_imagenet.NAME:
            remedy += ", or data_dir to tiny-imagenet-200.zip or to the folder that it extracts to"
        if missing := _unreachable(builder):
            # TFDS would try for minutes, and print each attempt.
            raise InputError(
                f"{place} and can't be downloaded: no connection to {', '.join(missing)}{remedy}."
            )
    print(f"{place}; {doing}", file=sys.stderr)
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


def _unreachable(builder: tfds.core.DatasetBuilder) -> list[str]:
    """Returns the hosts that have the data if none of them can be reached, else nothing."""
    hosts = {urllib.parse.urlparse(url).hostname or "" for url in builder.url_infos or ()}
    if not hosts or urllib.request.getproxies():
        return []
    for host in hosts | {_TFDS_HOST}:
        with contextlib.suppress(OSError):
            socket.getaddrinfo(host, 443)
            return []
    return sorted(hosts | {_TFDS_HOST})
