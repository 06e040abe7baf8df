"""The models by name: which there are, and `create`, which builds one."""

import operator
from collections.abc import Sequence
from types import ModuleType

import keras

from dskd_keras.errors import InputError, unknown_name
from dskd_keras.models import mobilenet, resnet, shufflenet, vgg, wide_resnet

# A family is a module with `ARCHITECTURES` (by name), `MINIMUM_SIZE` (of an image's height and
# width), `build(name, num_classes, input_shape)`, and `torch_module(name, layer)`, which says what
# a layer with weights is called in the family's published PyTorch checkpoints.
FAMILIES: dict[str, ModuleType] = {
    name: family
    for family in (resnet, wide_resnet, vgg, mobilenet, shufflenet)
    for name in family.ARCHITECTURES
}


def names() -> list[str]:
    """Returns the names that `create` knows, family by family, small models first."""
    return list(FAMILIES)


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
    canonical = {known.casefold(): known for known in FAMILIES}.get(str(name).casefold())
    if canonical is None:
        raise unknown_name(field, name, FAMILIES)
    family = FAMILIES[canonical]
    classes = _integer(num_classes)
    if classes is None or classes < 2:
        raise InputError(f"num_classes: {num_classes!r} is not an integer of at least 2.")
    shape = _image_shape(input_shape, family.MINIMUM_SIZE, canonical)
    return family.build(canonical, classes, shape)


def _image_shape(input_shape: Sequence[int], minimum_size: int, model: str) -> tuple[int, int, int]:
    """Returns `input_shape` as a tuple of three integers, or raises `InputError`."""
    data_format = keras.config.image_data_format()
    if data_format == "channels_first":
        order, spatial = "(channels, height, width)", slice(1, 3)
    else:
        order, spatial = "(height, width, channels)", slice(0, 2)
    sized = isinstance(input_shape, Sequence) and not isinstance(input_shape, str)
    shape = tuple(_integer(size) for size in input_shape) if sized else ()
    if len(shape) != 3 or any(size is None or size < 1 for size in shape):
        raise InputError(
            f"input_shape: {input_shape!r} is not three positive integers {order}, "
            f"the order of keras.config.image_data_format() = {data_format!r}."
        )
    if min(shape[spatial]) < minimum_size:
        raise InputError(
            f"input_shape: {input_shape!r} is too small or in another order; {model} takes "
            f"{order} with a height and width of at least {minimum_size}, "
            f"as keras.config.image_data_format() = {data_format!r}."
        )
    return shape


def _integer(value: object) -> int | None:
    """Returns `value` as an `int`, or `None` where it is no integer; a bool is none."""
    if isinstance(value, bool):
        return None
    try:
        return operator.index(value)
    except TypeError:
        return None
