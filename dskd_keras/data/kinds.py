"""What a data set's name stands for, told without Keras and without reading the data."""

import os
from pathlib import Path
from typing import Literal

from dskd_keras.errors import InputError, wrong

Kind = Literal["digits", "npz", "folder", "tfds"]


def kind(dataset: str | os.PathLike[str]) -> Kind:
    """Returns what a data set's name stands for.

    Args:
        dataset: As `dskd_keras.data.load` takes it.

    Returns:
        `"digits"` for scikit-learn's digits, `"npz"` for a NumPy archive, `"folder"` for a folder
        of images, or `"tfds"` for a name of TensorFlow Datasets, which may be unknown there.

    Raises:
        InputError: It is a path, and no such file or folder exists.
    """
    name = str(dataset)
    if name == "digits":
        return "digits"
    path = Path(name).expanduser()
    if path.suffix.lower() == ".npz":
        if not path.exists():
            raise InputError(f"dataset: there is no file {path}.")
        return "npz"
    if path.is_dir() and not _is_tfds_folder(path, name):
        return "folder"
    if path.is_absolute() or name.startswith((".", "~")):
        raise wrong("dataset", name, "an existing folder of images or a .npz file")
    return "tfds"


def _is_tfds_folder(path: Path, name: str) -> bool:
    # In a folder of TFDS data, "cifar100" is both the set's name and the folder that it is in.
    patterns = ("*/dataset_info.json", "*/*/dataset_info.json")
    return name == path.name and any(any(path.glob(pattern)) for pattern in patterns)
