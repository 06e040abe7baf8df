"""`create`, which builds a model of the zoo."""

import importlib
from collections.abc import Sequence
from types import ModuleType

import keras

from dskd_keras import checks
from dskd_keras.errors import InputError, wrong
from dskd_keras.models import catalog


def family(name: str) -> ModuleType:
    """Returns the module that builds a model, see `catalog.FAMILIES`."""
    return importlib.import_module(f"dskd_keras.models.{catalog.FAMILIES[name]}")


def create(
    name: str, num_classes: int, input_shape: Sequence[int], *, field: str = "model"
) -> keras.Model:
    """Builds a model of the zoo with freshly initialised weights.

    `keras.utils.set_random_seed` before the call makes them reproducible, and the same on every
    backend.

    Args:
        name: One of `names()`, in upper or lower case.
        num_classes: Number of classes, at least 2.
        input_shape: Shape of one image without the batch, in the order of
            `keras.config.image_data_format()`: `(height, width, channels)` by default.
        field: What an error about `name` calls it, say `"teacher"`. Defaults to `"model"`.

    Returns:
        A functional `keras.Model` from images to logits, `[B, num_classes]`, without a softmax.
        The logits are float32 under a mixed-precision policy too. The model bears the name as
        `names()` spells it.

    Raises:
        InputError: The name is unknown, `num_classes` isn't an integer of at least 2, or
            `input_shape` isn't three positive integers with a height and width that suffice.

    Example:

    ```python
    student = dskd_keras.models.create("resnet32", num_classes=100, input_shape=(32, 32, 3))
    shallow = student.get_layer("stage1").output  # [B, 32, 32, 16]
    ```
    """
    name = catalog.check_name(field, name)
    classes = checks.whole("num_classes", num_classes, 2)
    module = family(name)
    first = keras.config.image_data_format() == "channels_first"
    try:
        shape = tuple(checks.whole("input_shape", side, 1) for side in input_shape)
    except (TypeError, InputError):
        shape = ()
    if len(shape) != 3 or min(shape[1:] if first else shape[:2]) < module.MINIMUM_SIZE:
        raise wrong(
            "input_shape",
            input_shape,
            "three positive integers "
            f"{'(channels, height, width)' if first else '(height, width, channels)'} with a "
            f"height and width of at least {module.MINIMUM_SIZE} for {name}, as "
            f"keras.config.image_data_format() is {keras.config.image_data_format()!r}",
        )
    return module.build(name, classes, shape)
