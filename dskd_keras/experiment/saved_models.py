"""Saved models: `.keras` files with notes inside, and weights read from files of several kinds."""

import json
import re
import textwrap
import warnings
import zipfile
from pathlib import Path
from typing import Any

import keras
import numpy as np

from dskd_keras import data, files, models
from dskd_keras.errors import InputError
from dskd_keras.experiment.run import Run

# Of PyTorch checkpoints; some projects publish theirs without any.
_TORCH_SUFFIXES = (".pth", ".pt", ".tar", "")
# A member of the .keras archive beside Keras's own, which Keras passes over when it loads.
_NOTES = "dskd_keras.json"
# What a saved student takes that has the normalisation inside.
PIXELS = "pixels from 0 to 255"
_OTHER_LAYERS = "it holds the weights of other layers."
# In Keras's errors: a layer's name, its variable's shape, and the file's; an unknown class.
_SHAPES = re.compile(
    r"for object <\w+ name=([^,>]+).*?variable\.shape=(\([\d, ]*\)), "
    r"Received: value\.shape=(?:torch\.Size\()?([(\[][\d, ]*[)\]])",
    re.DOTALL,
)
_UNKNOWN_CLASS = re.compile(r"Could not locate class '(\w+)'")


def save_model(model: keras.Model, path: Path, notes: dict[str, Any]) -> None:
    """Saves a model as `.keras` with notes inside.

    The notes are JSON under the name `dskd_keras.json` in the archive, which is a zip file:
    `json.loads(zipfile.ZipFile(path).read("dskd_keras.json"))` reads them anywhere.
    """
    with files.written_aside(path, ".keras") as aside:
        model.save(aside)
        with zipfile.ZipFile(aside, "a") as archive:
            archive.writestr(_NOTES, json.dumps(notes, indent=1))


def read_notes(path: Path) -> dict[str, Any]:
    """Returns the notes that `save_model` put into a file, `{}` where there are none."""
    with zipfile.ZipFile(path) as archive:
        return json.loads(archive.read(_NOTES)) if _NOTES in archive.namelist() else {}


def save_student(run: Run, student: keras.Model, path: Path) -> None:
    """Saves a student, with the normalisation inside where the configuration wants it."""
    dataset = run.dataset
    notes = dataset_notes(dataset)
    if run.config.include_preprocessing:
        inputs = keras.Input(student.inputs[0].shape[1:], name="pixels")
        normalization = keras.layers.Normalization(
            axis=1 if keras.config.image_data_format() == "channels_first" else -1,
            mean=[255 * value for value in dataset.mean],
            variance=[(255 * value) ** 2 for value in dataset.std],
            name="normalization",
        )
        student = keras.Model(inputs, student(normalization(inputs)), name=student.name)
        notes["input"] = PIXELS
    save_model(student, path, notes)


def dataset_notes(dataset: data.ImageDataset) -> dict[str, Any]:
    """Returns what a user of a saved model needs to know of the images that it was trained on."""
    return {
        "dataset": dataset.name,
        "class_names": list(dataset.class_names),
        "mean": list(dataset.mean),
        "std": list(dataset.std),
        "input": "(pixels / 255 - mean) / std, by channel",
    }


def load_weights(field: str, path: Path, architecture: keras.Model) -> None:
    """Loads all weights of a model, or none.

    The file is a `.keras` file of the same architecture, a `.weights.h5` or a PyTorch checkpoint.

    Raises:
        InputError: The file is missing, of another kind, damaged, or holds another model.
    """
    if path.suffix in _TORCH_SUFFIXES:
        models.load_torch_weights(architecture, path, field=field)
        return
    if not path.name.endswith((".keras", ".weights.h5")):
        raise InputError(
            f"{field}: '{path}' should be a .keras or a .weights.h5 file, or a PyTorch checkpoint "
            f"({', '.join(suffix or 'no suffix' for suffix in _TORCH_SUFFIXES)})."
        )
    if not path.is_file():
        raise InputError(f"{field}: there is no file '{path}'.")
    try:
        loaded = _load(path, architecture)
    except Exception as error:  # Keras, h5py and zipfile raise all kinds for a bad file
        raise InputError(
            f"{field}: can't load '{path}' for {architecture.name}: {_reason(error)}"
        ) from None
    shapes, expected = (
        [tuple(weight.shape) for weight in model.weights] for model in (loaded, architecture)
    )
    if shapes != expected:
        raise InputError(
            f"{field}: '{path}' holds {_described(loaded)}, where {_described(architecture)} is "
            "expected."
        )
    for weight in loaded.weights:
        if not np.isfinite(keras.ops.convert_to_numpy(weight)).all():
            raise InputError(
                f"{field}: '{path}' has values that are not finite in '{weight.path}'."
            )
    architecture.set_weights(loaded.get_weights())


def _load(path: Path, architecture: keras.Model) -> keras.Model:
    if path.suffix == ".keras":
        with zipfile.ZipFile(path) as archive:
            # Keras reads damaged weights without a word.
            damaged = archive.testzip()
        if damaged is not None:
            raise OSError(f"'{damaged}' in the archive is damaged")
        return keras.models.load_model(path, compile=False)
    # Into a copy: a file that doesn't fit would leave a part of its weights behind.
    loaded = keras.models.clone_model(architecture)
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        loaded.load_weights(path)
    # Keras passes over what the file lacks: those weights would stay random.
    if any(str(warning.message).startswith("Skipping") for warning in warned):
        raise ValueError(_OTHER_LAYERS)
    return loaded


def _reason(error: Exception) -> str:
    """Returns what is wrong with a file in one line; Keras shows whole tensors, or ways around."""
    text = str(error)
    if "safe_mode" in text:
        return "it holds the code of a Lambda layer. Code in a file is never run."
    if found := _SHAPES.search(text):
        layer, here, there = found.groups()
        there = f"({there.strip('([])')})"
        return f"{_OTHER_LAYERS[:-1]}: '{layer}' has shape {there} there and {here} here."
    if "objects could not be loaded" in text:
        return _OTHER_LAYERS
    if found := _UNKNOWN_CLASS.search(text):
        return f"its layer class '{found[1]}' is not one of Keras."
    line = next((line.strip() for line in text.splitlines() if line.strip()), "damaged")
    return textwrap.shorten(line, 300, placeholder=" …")


def _described(model: keras.Model) -> str:
    try:
        (inputs,), (outputs,) = model.inputs, model.outputs
    except (AttributeError, TypeError, ValueError):
        return f"a {type(model).__name__} '{model.name}'"
    return f"'{model.name}' from {tuple(inputs.shape[1:])} to {outputs.shape[-1]} classes"
