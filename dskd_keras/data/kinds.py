"""What a data set's name stands for, told without Keras and without reading the data."""

import os
from pathlib import Path
from typing import Literal

from dskd_keras.errors import InputError, wrong


def kind(dataset: str | os.PathLike[str]) -> Literal["digits", "npz", "folder", "tfds"]:
    """Returns what a data set's name, as `dskd_keras.data.load` takes it, stands for.

    `"tfds"` is any other name; TensorFlow Datasets may not know it. Raises `InputError` where the
    name is a path and nothing is there.
    """
    name = str(dataset)
    if name == "digits":
        return "digits"
    path = Path(name).expanduser()
    if path.suffix.lower() == ".npz":
        if not path.exists():
            raise InputError(f"dataset: there is no file {path}.")
        if not path.is_file():
            raise InputError(f"dataset: {path} should be a regular file.")
        return "npz"
    # In a folder of TFDS data, "cifar100" is both the set's name and the folder that it is in.
    of_tfds = name == path.name and any(
        any(path.glob(pattern)) for pattern in ("*/dataset_info.json", "*/*/dataset_info.json")
    )
    if path.is_dir() and not of_tfds:
        return "folder"
    if path.is_absolute() or name.startswith((".", "~")):
        raise wrong("dataset", name, "an existing folder of images or a .npz file")
    return "tfds"


def check_stream(dataset: str | os.PathLike[str], stream: bool | None) -> None:
    """Raises `InputError` where a data set is not there, or is to be a stream and can't."""
    if kind(dataset) in ("digits", "npz") and stream:
        raise InputError(
            f"stream: True, but {dataset} is read into memory as a whole. Folders of images and "
            "sets of TensorFlow Datasets can be streams."
        )
