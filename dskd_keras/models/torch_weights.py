"""Reading the PyTorch checkpoints that the projects of the literature publish."""

import argparse
import importlib
import os
import re
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import keras
import numpy as np

from dskd_keras.errors import InputError, missing_package
from dskd_keras.models import zoo
from dskd_keras.models.catalog import FAMILIES

# Where training scripts put the `state_dict` beside the optimizer's state and the epoch.
_WRAPPERS = ("model", "state_dict")
# An error lists that many keys of each kind.
_MOST_SHOWN = 8
# What training scripts save beside tensors: their options, and NumPy's numbers and arrays. Reading
# these runs no code of the file. Before version 2, NumPy's module had another name.
_MULTIARRAY: Any = importlib.import_module("numpy._core.multiarray")
_NUMPY = (_MULTIARRAY.scalar, _MULTIARRAY._reconstruct)
_HARMLESS = [argparse.Namespace, np.dtype, np.ndarray, *_NUMPY]
_HARMLESS += [type(np.dtype(kind)) for kind in ("float32", "float64", "int64")]
_HARMLESS += [(function, f"numpy.core.multiarray.{function.__name__}") for function in _NUMPY]


def load_torch_weights(
    model: keras.Model, path: str | os.PathLike[str], *, field: str = "path"
) -> keras.Model:
    """Loads a published PyTorch checkpoint into a model of the zoo.

    It takes the files of RepDistiller, SimKD, SemCKD and mdistiller: a `state_dict`, or one under
    `"model"` or `"state_dict"`, with or without `module.` before each key, from PyTorch of any
    age, of tensors of any floating type on any device. Nothing in the file is executed: it is read
    by `torch.load(weights_only=True)`. PyTorch has to be installed, whatever the Keras backend is.

    Args:
        model: A model made by `dskd_keras.models.create`, built for the checkpoint's number of
            classes; its weights are overwritten. Where the checkpoint doesn't fit, none is.
        path: The checkpoint, usually `.pth`.
        field: What an error calls `path`, say `"teacher_weights"`. Defaults to `"path"`.

    Returns:
        The model given.

    Raises:
        InputError: PyTorch is not installed; the file is missing, damaged, no checkpoint, or would
            need code to be run; the model is none of the zoo's; or the checkpoint has values that
            are not finite, or is of another architecture, with the missing keys, the unexpected
            keys and the shapes that differ.

    Example:

    ```python
    teacher = dskd_keras.models.create("resnet110", num_classes=100, input_shape=(32, 32, 3))
    dskd_keras.models.load_torch_weights(teacher, "resnet110_vanilla/ckpt_epoch_240.pth")
    ```
    """
    if not isinstance(model, keras.Model) or model.name not in FAMILIES:
        raise InputError(
            f"model: {getattr(model, 'name', model)!r} is not a model of the zoo, whose layers "
            "have known names in PyTorch. Make one with dskd_keras.models.create."
        )
    tensors = _state_dict(_read(field, path), f"{field}: '{path}'")
    targets = dict(_targets(model))
    _check_fit(f"{field}: '{path}' does not fit {model.name}", tensors, targets)
    arrays = {key: tensors[key].detach().float().numpy() for key in targets}
    broken = [key for key, array in arrays.items() if not np.isfinite(array).all()]
    if broken:
        raise InputError(f"{field}: '{path}' has values that are not finite in {_shown(broken)}.")
    for key, (variable, axes, shape) in targets.items():
        variable.assign(arrays[key].reshape(shape).transpose(np.argsort(axes)))
    return model


def _read(field: str, path: str | os.PathLike[str]) -> Any:
    """Returns what is in the file, without running any code of it."""
    if not os.path.isfile(path):
        raise InputError(f"{field}: there is no file '{path}'.")
    try:
        import torch
    except ModuleNotFoundError:
        raise missing_package(field, "torch", "torch") from None
    try:
        if zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as archive:
                # PyTorch reads damaged tensors without a word.
                if (damaged := archive.testzip()) is not None:
                    raise InputError(f"{field}: '{path}' is damaged: '{damaged}' in it.")
        with torch.serialization.safe_globals(_HARMLESS):
            return torch.load(path, map_location="cpu", weights_only=True)
    except InputError:
        raise
    except Exception as error:  # PyTorch and zipfile raise all kinds for a bad file
        code = re.search(r"GLOBAL (\S+)", str(error))
        reason = f" It contains {code[1]}, which is no tensor." if code else ""
        raise InputError(
            f"{field}: '{path}' is no PyTorch checkpoint of tensors alone, or it is damaged."
            f"{reason} Code in a file is never run."
        ) from None


def _state_dict(content: Any, where: str) -> dict[str, Any]:
    """Returns the tensors by key, from wherever in the checkpoint they are."""
    import torch

    found = content
    if isinstance(content, Mapping):
        found = next((content[key] for key in _WRAPPERS if key in content), content)
    if not isinstance(found, Mapping) or not all(map(torch.is_tensor, found.values())):
        keys = f" with {_shown(list(content))}" if isinstance(content, Mapping) else ""
        raise InputError(
            f"{where} holds a {type(content).__name__}{keys}, where a state_dict is expected, "
            f"alone or under {' or '.join(map(repr, _WRAPPERS))}."
        )
    return {
        # `torch.nn.DataParallel` puts it before every key.
        str(key).removeprefix("module."): value
        for key, value in found.items()
        # How many batches the statistics saw: PyTorch needs it for a cumulative average alone.
        if "num_batches_tracked" not in str(key)
    }


# A Keras variable, its axes in PyTorch's order, and the shape that gives.
_Target = tuple[keras.Variable, tuple[int, ...], tuple[int, ...]]
# The axes of kernels; those of all else have one order.
_AXES = {
    keras.layers.Conv2D: (3, 2, 0, 1),
    keras.layers.DepthwiseConv2D: (2, 3, 0, 1),
    keras.layers.Dense: (1, 0),
}
# In Keras's order, of a convolution and a linear layer (two) as of a batch normalisation (four).
_WEIGHTS = ("weight", "bias", "running_mean", "running_var")


def _targets(model: keras.Model) -> Iterator[tuple[str, _Target]]:
    """Yields each key that a checkpoint of the model has, with what its tensor goes into."""
    family = zoo.family(model.name)
    for layer in model.layers:
        if not layer.weights:
            continue
        try:
            module = family.torch_module(model.name, layer.name)
        except KeyError:
            raise InputError(
                f"model: '{model.name}' has a layer '{layer.name}', which the zoo's {model.name} "
                "lacks. Load the weights into an unchanged model of the zoo."
            ) from None
        for variable, key in zip(layer.weights, _WEIGHTS, strict=False):
            axes = tuple(range(len(variable.shape)))
            if key == "weight":
                axes = _AXES.get(type(layer), axes)
            shape = tuple(variable.shape[axis] for axis in axes)
            yield f"{module}.{key}", (variable, axes, shape)


def _check_fit(problem: str, tensors: Mapping[str, Any], targets: Mapping[str, _Target]) -> None:
    """Raises `InputError` unless the checkpoint has the model's keys, with its shapes."""
    differing = []
    for key, (_, _, expected) in targets.items():
        if key in tensors:
            shape = tuple(tensors[key].shape)
            # A classifier may be a 1×1 convolution there.
            as_linear = shape[:2] if len(expected) == 2 and shape[2:] == (1, 1) else shape
            if as_linear != expected:
                differing.append(f"{key} {shape} instead of {expected}")
    differences = {
        "missing keys": [key for key in targets if key not in tensors],
        "unexpected keys": [key for key in tensors if key not in targets],
        "shapes that differ": differing,
    }
    if any(differences.values()):
        listed = (f"{kind}: {_shown(keys)}" for kind, keys in differences.items())
        raise InputError(f"{problem}; {'; '.join(listed)}.")


def _shown(names: Sequence[object]) -> str:
    shown = ", ".join(map(str, names[:_MOST_SHOWN])) or "none"
    rest = len(names) - _MOST_SHOWN
    return f"{shown} and {rest} more" if rest > 0 else shown
