"""Auxiliary heads on the student's shallow layers, and the one graph that computes all of them."""

import copy
import inspect
import re
from collections.abc import Sequence
from typing import Any, NamedTuple

import keras
from keras import layers, ops

from dskd_keras import graph, maps, replicas
from dskd_keras.errors import InputError, unknown_name, wrong
from dskd_keras.keras_internals import input_structure, output_structure


class Outputs(NamedTuple):
    """What a training step sees of the student. A dict is empty where its term is off.

    Attributes:
        logits: The student's own, `[B, C]`, `[B, T, C]` or `[B, H, W, C]`.
        deep_logits: Those of the auxiliary heads by layer name, at the positions of their maps.
        deep_features: The projected maps by layer name, channels last.
        masks: bool `[B, T]` where some positions are padding: `"logits"`, and `"features/NAME"`
            for the map of a layer.
        outputs: All outputs of the student, in its structure.
    """

    logits: Any
    deep_logits: dict[str, Any]
    deep_features: dict[str, Any]
    masks: dict[str, Any]
    outputs: Any


# The layers that a head is made of, by the rank of the feature map that it sits on.
_SEPARABLE = {3: layers.SeparableConv1D, 4: layers.SeparableConv2D}
_CONVOLUTION = {3: layers.Conv1D, 4: layers.Conv2D, 5: layers.Conv3D}
_POOLING = {
    3: layers.GlobalAveragePooling1D,
    4: layers.GlobalAveragePooling2D,
    5: layers.GlobalAveragePooling3D,
}


class Head:
    """What sits on a supervised layer while training: a projector, and a classifier on top.

    Derive from it and implement `project`. The distiller calls the methods once for each layer,
    while it builds the student's graph: they take symbolic tensors and return what Keras layers
    make of them. One head object serves all layers. `self.named("conv")` gives a layer a name that
    is its own on every supervised layer, and the student's precision.

    A head that is saved with a distiller needs `get_config`, as a Keras layer does, and to be
    registered.

    Example:

    ```python
    @keras.saving.register_keras_serializable()
    class Pointwise(dskd_keras.heads.Head):
        def project(self, x, teacher_shape, mask=None):
            return keras.layers.Dense(teacher_shape[-1], **self.named("projection"))(x)

    distiller = dskd_keras.Distiller(teacher, student, ["stage1"], head=Pointwise())
    ```
    """

    # A head that was not given a layer has no names to protect.
    _prefix = "head"
    _dtype: Any = None

    def project(
        self,
        x: keras.KerasTensor,
        teacher_shape: Sequence[int | None],
        mask: Any = None,
    ) -> keras.KerasTensor:
        """Returns the layer's feature map as it is compared with the teacher's.

        Args:
            x: `[B, H, W, D]`, `[B, D, H, W, C]`, `[B, T, D]` or `[B, D]`, channels last whatever
                the student's layout is. Padded positions are zero.
            teacher_shape: That of the teacher's map without the batch, channels last; None stands
                for a size that is not known before it runs.
            mask: bool `[B, T]`, False at padded positions, or None.

        Returns:
            A map with the teacher's channels. Where its size is not the teacher's, the feature loss
            pools the larger one.
        """
        raise NotImplementedError(f"{type(self).__name__} should implement project.")

    def classify(
        self, x: keras.KerasTensor, num_classes: int, mask: Any = None
    ) -> keras.KerasTensor:
        """Returns the logits `[B, C]` of a projected map, or `[B, *positions, C]` of a dense one.

        Args:
            x: What `classify` is to look at: for `[B, C]` the projected map's average over its
                (valid) positions, for dense logits the projected map.
            num_classes: C.
            mask: As in `project`, None for an average.
        """
        # Logits leave in float32 whatever the student's precision is.
        return layers.Dense(num_classes, **{**self.named("logits"), "dtype": "float32"})(x)

    def named(self, part: str) -> dict[str, Any]:
        """Returns the arguments `name` and `dtype` for a layer of this head."""
        return {"name": f"{self._prefix}_{part}", "dtype": self._dtype}

    def on(self, layer: str, dtype: Any) -> "Head":
        """Returns this head for one of the student's layers."""
        head = copy.copy(self)
        # A slash would be a new scope in a TensorFlow graph and a folder in a weights file, and
        # PyTorch takes no dots.
        head._prefix = "head_" + re.sub(r"\W", "_", layer)
        head._dtype = dtype
        return head

    def get_config(self) -> dict[str, Any]:
        """Returns the arguments that rebuild this head."""
        return {}

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> "Head":
        """Rebuilds a head from `get_config`."""
        return cls(**config)


@keras.saving.register_keras_serializable("dskd_keras")
class SeparableHead(Head):
    """The default: separable convolutions down to the teacher's size, as in "Be Your Own Teacher".

    The projector halves the map with separable convolutions of stride 2 until it has the teacher's
    size (Zhang et al., ICCV 2019). Then a 1×1 convolution brings it to the teacher's channels. No
    activation follows, because a teacher's feature map may be negative. Of `[B, D, H, W, C]`
    average pooling and 1×1 convolutions take that place. A map of unknown size, or with padded
    positions, keeps its positions; the feature loss pools the larger map.
    """

    def project(
        self,
        x: keras.KerasTensor,
        teacher_shape: Sequence[int | None],
        mask: Any = None,
    ) -> keras.KerasTensor:
        """Returns a feature map, channels last, brought to the teacher's shape."""
        *size, channels = teacher_shape
        assert channels is not None
        if len(x.shape) != len(teacher_shape) + 1 and len(x.shape) > 2:
            # Maps of different kinds are compared by their averages over positions.
            x, mask = average(x, mask, **self.named("pool")), None
        if len(x.shape) == 2:
            dense = layers.Dense(channels, use_bias=False, **self.named("dense"))
            return layers.Dense(channels, **self.named("projection"))(
                _activated(dense, x, None, self._dtype)
            )
        own = list(x.shape[1:-1])
        fixed = mask is None and None not in own and None not in size
        # Where the student has fewer positions, the loss pools the teacher's.
        target = [min(a, b) for a, b in zip(own, size, strict=True)] if fixed else own
        block = 0
        while block == 0 or (fixed and _can_halve(x, target)):
            block += 1
            x = self._block(x, block, channels, fixed and _can_halve(x, target), mask)
        if fixed and list(x.shape[1:-1]) != target:
            x = _Resizing(target, **self.named("resize"))(x)
        if mask is not None:
            x = _without_padding(x, mask)
        project = _CONVOLUTION[len(x.shape)](
            channels,
            kernel_size=1,
            data_format="channels_last",
            **self.named("projection"),
        )
        return project(x)

    def _block(
        self, x: keras.KerasTensor, number: int, channels: int, halve: bool, mask: Any
    ) -> keras.KerasTensor:
        options = {
            "use_bias": False, "data_format": "channels_last", **self.named(f"conv{number}"),
        }  # fmt: skip
        width = min(channels, 2 * x.shape[-1])
        if len(x.shape) in _SEPARABLE:
            convolve = _SEPARABLE[len(x.shape)](
                width,
                kernel_size=3,
                strides=2 if halve else 1,
                padding="same",
                **options,
            )
        else:
            # Keras has no separable convolution of volumes.
            if halve:
                pool = self.named(f"pool{number}")
                x = layers.AveragePooling3D(2, data_format="channels_last", **pool)(x)
            convolve = layers.Conv3D(width, kernel_size=1, **options)
        return _activated(convolve, x, mask, self._dtype)


@keras.saving.register_keras_serializable("dskd_keras")
class PointwiseHead(Head):
    """The cheapest: the map averaged down to the teacher's size, and one 1×1 convolution.

    It is FitNet's regressor (Romero et al., ICLR 2015) with a convolution of one position. What it
    asks of the layer is to be linear in what the teacher knows.
    """

    def project(
        self,
        x: keras.KerasTensor,
        teacher_shape: Sequence[int | None],
        mask: Any = None,
    ) -> keras.KerasTensor:
        """Returns a feature map, channels last, brought to the teacher's shape."""
        *size, channels = teacher_shape
        x, mask = _pooled(self, x, size, mask)
        return layers.Dense(channels, **self.named("projection"))(x)


@keras.saving.register_keras_serializable("dskd_keras")
class ConvolutionalHead(Head):
    """The largest: SemCKD's projector, at the teacher's size.

    A 1×1 convolution to twice the teacher's channels, a 3×3 one, and a 1×1 one to the teacher's
    channels, with batch normalisation and ReLU between them (Chen et al., "Cross-Layer Distillation
    with Semantic Calibration", AAAI 2021). The map is averaged down first.
    """

    def project(
        self,
        x: keras.KerasTensor,
        teacher_shape: Sequence[int | None],
        mask: Any = None,
    ) -> keras.KerasTensor:
        """Returns a feature map, channels last, brought to the teacher's shape."""
        *size, channels = teacher_shape
        assert channels is not None
        x, mask = _pooled(self, x, size, mask)
        widen = layers.Dense(2 * channels, use_bias=False, **self.named("widen"))
        x = _activated(widen, x, mask, self._dtype)
        if len(x.shape) > 2:
            if mask is not None:
                x = _without_padding(x, mask)
            convolve = _CONVOLUTION[len(x.shape)](
                2 * channels,
                kernel_size=3,
                padding="same",
                use_bias=False,
                data_format="channels_last",
                **self.named("conv"),
            )
            x = _activated(convolve, x, mask, self._dtype)
        return layers.Dense(channels, **self.named("projection"))(x)


def _activated(layer: Any, x: keras.KerasTensor, mask: Any, dtype: Any) -> keras.KerasTensor:
    """Returns what a layer makes of a map, normalised over the batch and rectified."""
    norm = layers.BatchNormalization(
        momentum=0.9,
        epsilon=1e-5,
        # On JAX it is so by itself. No head is saved with its layers: another backend, which would
        # refuse the setting, never reads it.
        synchronized=replicas.count() > 1,
        name=f"{layer.name}_bn",
        dtype=dtype,
    )
    x = norm(layer(x)) if mask is None else norm(layer(x), mask=mask)
    return layers.ReLU(name=f"{layer.name}_relu", dtype=dtype)(x)


def _pooled(
    head: Head, x: keras.KerasTensor, size: Sequence[int | None], mask: Any
) -> tuple[keras.KerasTensor, Any]:
    """Returns a map averaged down to a size where both are known, and the mask that is left."""
    if len(x.shape) == 2:
        return x, None
    if len(x.shape) != len(size) + 2:
        # Maps of different kinds are compared by their averages over positions.
        return average(x, mask, **head.named("average")), None
    own = list(x.shape[1:-1])
    if mask is not None or None in own or None in size:
        return x, mask
    target = [min(a, b) for a, b in zip(own, size, strict=True)]
    return (x if own == target else _Resizing(target, **head.named("resize"))(x)), None


class _Resizing(layers.Layer):
    """Averages a map to given sizes. Keras's adaptive pooling gives NaN on JAX for some sizes."""

    def __init__(self, size: Sequence[int], **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self._size = tuple(size)

    def call(self, x: Any) -> Any:
        return maps.resized(x, self._size)[0]

    def compute_output_shape(self, shape: tuple[int | None, ...]) -> tuple[int | None, ...]:
        return shape[0], *self._size, shape[-1]


_HEADS: dict[str, type[Head]] = {
    "separable": SeparableHead,
    "pointwise": PointwiseHead,
    "convolutional": ConvolutionalHead,
}


def names() -> list[str]:
    """Returns the names of the heads of this module."""
    return list(_HEADS)


def get(identifier: str | dict[str, Any] | Head | None) -> Head:
    """Returns the head for a name out of `names()`, a configuration, an object, or the default.

    Raises:
        InputError: The name is unknown, or the object is no `Head`.
    """
    if identifier is None:
        return SeparableHead()
    if isinstance(identifier, str):
        if identifier not in _HEADS:
            raise unknown_name("head", identifier, _HEADS)
        return _HEADS[identifier]()
    if isinstance(identifier, dict):
        identifier = keras.saving.deserialize_keras_object(identifier)
    if isinstance(identifier, Head):
        return identifier
    raise wrong(
        "head",
        identifier,
        f"one of {', '.join(_HEADS)}, or an object of a dskd_keras.heads.Head",
    )


def attach(
    student: keras.Model,
    names: Sequence[str],
    teacher_shapes: Sequence[Sequence[int | None]],
    predictions: bool = True,
    features: bool = True,
    head: Head | None = None,
    output: int = 0,
    mask: str | None = None,
    dtype: Any = None,
) -> keras.Model:
    """Returns a model with a student's layers and inputs that gives `Outputs` in one pass.

    Args:
        student: A functional or Sequential model.
        names: Those of the shallow layers.
        teacher_shapes: For each of them the shape of the teacher's map without the batch, channels
            last.
        predictions: Whether heads get a classifier.
        features: Whether the projected maps are outputs.
        head: Defaults to `SeparableHead`.
        output: Which of the student's outputs are the logits, counted in flattened order.
        mask: Name of the input `[B, T]` that says which positions count, where Keras has no mask.
        dtype: The heads' policy.
    """
    tapped = graph.tap("student_layers", student, names)
    logits = tapped.model.outputs[output]
    deep_logits, deep_features, masks = {}, {}, {}
    of_input = None if mask is None else _input_mask(tapped.model, mask)
    if len(logits.shape) > 2:
        of_logits = _of_positions(graph.mask_of(logits), of_input, logits)
        if of_logits is not None:
            masks["logits"] = of_logits
    for name, tensor, own, shape in zip(
        names, tapped.tensors, tapped.masks, teacher_shapes, strict=True
    ):
        of_layer = get(head).on(name, dtype)
        x = graph.channels_last(tensor)
        counts = _of_positions(own, of_input, x)
        if counts is not None:
            x = _without_padding(x, counts)
        x = _called(of_layer.project, counts, x, shape)
        counts = counts if len(x.shape) > 2 else None
        if predictions:
            deep_logits[name] = _classified(of_layer, name, x, counts, logits)
        if features:
            deep_features[name] = x
            if counts is not None:
                masks[f"features/{name}"] = counts
    outputs = Outputs(logits, deep_logits, deep_features, masks, output_structure(tapped.model))
    return keras.Model(input_structure(tapped.model), outputs, name=f"{student.name}_with_heads")


def _input_mask(student: keras.Model, name: str) -> keras.KerasTensor:
    """Returns the input that says which positions count, as a symbolic mask."""
    structure = input_structure(student)
    by_name = {tensor.name: tensor for tensor in student.inputs}
    if isinstance(structure, dict):
        by_name |= structure
    if name not in by_name:
        raise unknown_name("mask", name, by_name)
    if len(by_name[name].shape) != 2:
        raise InputError(
            f"mask: input '{name}' has the shape {tuple(by_name[name].shape)}, where [B, T] is "
            "expected, true at the positions that count."
        )
    return ops.not_equal(by_name[name], 0)


def _of_positions(mask: Any, of_input: Any, x: keras.KerasTensor) -> Any:
    """Returns the mask for a map: Keras's own, else the input's if the map has its positions."""
    if mask is None and of_input is not None and len(x.shape) == 3:
        return of_input if of_input.shape[1] == x.shape[1] else None
    return mask


def _without_padding(x: keras.KerasTensor, mask: keras.KerasTensor) -> keras.KerasTensor:
    """Returns a map with zeros at padded positions, and without Keras's own mask.

    Zeros are what convolutions see beyond the end, so it does not matter how long the padding is.
    They would warn of a mask.
    """
    return x * ops.cast(ops.expand_dims(mask, -1), x.dtype)


def _classified(
    head: Head, name: str, x: keras.KerasTensor, mask: Any, logits: keras.KerasTensor
) -> keras.KerasTensor:
    """Returns the logits of a projected map: of the whole, or of its positions if these are."""
    if len(logits.shape) > 2:
        if len(x.shape) != len(logits.shape):
            raise InputError(
                f"student_layers: '{name}' is projected to {tuple(x.shape)}, whose positions are "
                f"not those of the logits {tuple(logits.shape)}. Name a layer with such positions, "
                "or set deep_prediction_weight to 0."
            )
        return _called(head.classify, mask, x, logits.shape[-1])
    if len(x.shape) > 2:
        x = average(x, mask, **head.named("pool"))
    return head.classify(x, logits.shape[-1])


def average(x: keras.KerasTensor, mask: Any, **options: Any) -> keras.KerasTensor:
    """Returns the average `[B, D]` of a map over its positions, those that count."""
    pool = _POOLING[len(x.shape)](data_format="channels_last", **options)
    return pool(x) if mask is None else pool(x, mask=mask)


def _called(hook: Any, mask: Any, *args: Any) -> Any:
    """Calls a method of a head, which may have been written without a thought of masks."""
    if mask is None:
        return hook(*args)
    if "mask" not in inspect.signature(hook).parameters:
        raise InputError(
            f"head: {hook.__qualname__} takes no mask, but the layer has padded positions. Let it "
            "take mask=None, bool [B, T], and leave those positions out."
        )
    return hook(*args, mask=mask)


def _can_halve(x: keras.KerasTensor, size: Sequence[int]) -> bool:
    return all(own >= 2 * target for own, target in zip(x.shape[1:-1], size, strict=True))
