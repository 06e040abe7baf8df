"""What a model takes, compared with what a batch holds."""

from typing import Any

import keras

from dskd_keras.errors import InputError
from dskd_keras.keras_internals import input_structure


def of_model(field: str, model: keras.Model, x: Any) -> Any:
    """Returns what of a batch is a functional model's, in the structure that it takes.

    Of a dict with more keys than the model has inputs Keras may take the wrong ones.

    Args:
        field: The argument that the batch came from: `"x"` or `"teacher_inputs"`.
        model: A functional or Sequential model.
        x: A tensor, or a structure of tensors. Of a dict the model gets the keys that its inputs
            are called by.

    Raises:
        InputError: The batch can't be what the model takes. Keras adds or takes away a last axis of
            size 1, so that may differ.
    """
    structure = input_structure(model)
    if isinstance(x, dict):
        _check_keys(field, model, x)
        if isinstance(structure, dict):
            x = {name: x[name] for name in structure}
            pairs = [(f"{field}[{name!r}]", x[name], structure[name]) for name in structure]
        else:
            names = [tensor.name for tensor in model.inputs]
            pairs = [(f"{field}[{t.name!r}]", x[t.name], t) for t in model.inputs]
            x = x[names[0]] if len(names) == 1 else [x[name] for name in names]
    else:
        leaves = keras.tree.flatten(x)
        if len(leaves) != len(model.inputs):
            raise InputError(
                f"{field}: a batch holds {len(leaves)} tensor(s), but '{model.name}' takes "
                f"{len(model.inputs)}: {', '.join(tensor.name for tensor in model.inputs)}."
            )
        named = [field] if len(leaves) == 1 else [f"{field}[{n}]" for n in range(len(leaves))]
        pairs = list(zip(named, leaves, model.inputs, strict=True))
    for name, leaf, tensor in pairs:
        shape = getattr(leaf, "shape", None)
        if shape is None or getattr(shape, "rank", 0) is None:
            continue  # a tf.data set may not know it
        came, wanted = tuple(shape)[1:], tuple(tensor.shape)[1:]
        if not _agree(came, wanted):
            raise InputError(
                f"{name}: a batch of {_shown(came)}, but '{model.name}' takes {_shown(wanted)}."
            )
    return x


def _check_keys(field: str, model: keras.Model, x: dict[str, Any]) -> None:
    structure = input_structure(model)
    names = list(structure) if isinstance(structure, dict) else [t.name for t in model.inputs]
    missing = [name for name in names if name not in x]
    if not missing:
        return
    keys = ", ".join(map(str, x))
    labels = [key for key in x if key in ("label", "labels")]
    if len(names) == 1 and labels and len(x) > 1:
        image = next(key for key in x if key not in labels)
        raise InputError(
            f"{field}: batches are dicts of {keys}, where Keras takes pairs (x, y): "
            f"dataset.map(lambda batch: (batch[{image!r}], batch[{labels[0]!r}]))."
        )
    raise InputError(
        f"{field}: a batch is a dict of {keys}, but '{model.name}' takes {', '.join(names)}."
    )


def _agree(came: tuple[Any, ...], wanted: tuple[int | None, ...]) -> bool:
    if len(came) == len(wanted) + 1 and came[-1] in (1, None):
        came = came[:-1]
    elif len(came) == len(wanted) - 1 and wanted[-1] in (1, None):
        came = (*came, 1)
    return len(came) == len(wanted) and all(
        a == b or None in (a, b) for a, b in zip(came, wanted, strict=True)
    )


def _shown(shape: tuple[Any, ...]) -> str:
    return f"[{', '.join(['B', *('?' if size is None else str(size) for size in shape)])}]"
