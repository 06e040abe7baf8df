"""Auxiliary heads on the student's shallow layers, and the one graph that computes all of them."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import keras
from keras import layers

from dskd_keras import graph
from dskd_keras.keras_internals import input_structure


class Outputs(NamedTuple):
    """What a training step sees of the student. A dict is empty where its term is off.

    `logits` `[B, C]` are the student's own, `deep_logits` those of the auxiliary heads by layer
    name, `deep_features` the projected maps by layer name: channels last, the teacher's channels.
    """

    logits: Any
    deep_logits: dict[str, Any]
    deep_features: dict[str, Any]


# The layers that a head is made of, by the rank of the feature map that it sits on.
_SEPARABLE = {3: layers.SeparableConv1D, 4: layers.SeparableConv2D}
_CONVOLUTION = {3: layers.Conv1D, 4: layers.Conv2D}
_RESIZING = {3: layers.AdaptiveAveragePooling1D, 4: layers.AdaptiveAveragePooling2D}
_POOLING = {3: layers.GlobalAveragePooling1D, 4: layers.GlobalAveragePooling2D}


def attach(
    student: keras.Model,
    names: Sequence[str],
    teacher_shape: Sequence[int],
    predictions: bool = True,
    features: bool = True,
    dtype: Any = None,
) -> keras.Model:
    """Returns a model with a student's layers and inputs that gives `Outputs` in one pass.

    Every head is a projector followed by pooling and a classifier. The projector halves the map
    with separable convolutions of stride 2 until it has the teacher's size, as the heads of "Be
    Your Own Teacher" (Zhang et al., ICCV 2019) do. Then a 1×1 convolution brings it to the
    teacher's channels. No activation follows, because a teacher's feature map may be negative.

    `names` are those of the shallow layers. `teacher_shape` is the teacher's map without the batch,
    channels last: `(H, W, D)`, `(T, D)` or `(D,)`. `predictions` says whether heads get a
    classifier, `features` whether the projected maps are outputs. `dtype` is the heads' policy.
    """
    student, tensors = graph.tap("student_layers", student, names)
    deep_logits, deep_features = {}, {}
    for name, tensor in zip(names, tensors, strict=True):
        head = _Head(name, dtype)
        projected = head.project(graph.channels_last(tensor), teacher_shape)
        if predictions:
            deep_logits[name] = head.classify(projected, student.outputs[0].shape[-1])
        if features:
            deep_features[name] = projected
    outputs = Outputs(student.outputs[0], deep_logits, deep_features)
    return keras.Model(input_structure(student), outputs, name=f"{student.name}_with_heads")


class _Head:
    """The layers of one head, named after the student's layer that it sits on."""

    def __init__(self, name: str, dtype: Any) -> None:
        # A slash would be a new scope in a TensorFlow graph and a folder in a weights file.
        self.prefix = f"head_{name.replace('/', '_')}"
        self.dtype = dtype

    def project(self, x: keras.KerasTensor, teacher_shape: Sequence[int]) -> keras.KerasTensor:
        """Returns a feature map, channels last, brought to the teacher's shape."""
        *size, channels = teacher_shape
        if len(x.shape) != len(teacher_shape) + 1 and len(x.shape) > 2:
            # Maps of different kinds are compared by their averages over positions.
            x = self._pool(x)
        if len(x.shape) == 2:
            x = self._activate(layers.Dense(channels, use_bias=False, **self._named("dense")), x)
            return layers.Dense(channels, **self._named("projection"))(x)
        # Where the student has fewer positions, the loss pools the teacher's.
        size = [min(own, other) for own, other in zip(x.shape[1:-1], size, strict=True)]
        block = 0
        while block == 0 or _can_halve(x, size):
            block += 1
            convolve = _SEPARABLE[len(x.shape)](
                min(channels, 2 * x.shape[-1]),
                kernel_size=3,
                strides=2 if _can_halve(x, size) else 1,
                padding="same",
                use_bias=False,
                data_format="channels_last",
                **self._named(f"conv{block}"),
            )
            x = self._activate(convolve, x)
        if list(x.shape[1:-1]) != size:
            resize = _RESIZING[len(x.shape)]
            x = resize(size, data_format="channels_last", **self._named("resize"))(x)
        project = _CONVOLUTION[len(x.shape)](
            channels, kernel_size=1, data_format="channels_last", **self._named("projection")
        )
        return project(x)

    def classify(self, x: keras.KerasTensor, num_classes: int) -> keras.KerasTensor:
        """Returns the logits `[B, C]` of a projected feature map."""
        if len(x.shape) > 2:
            x = self._pool(x)
        # Logits leave in float32 whatever the student's precision is.
        return layers.Dense(num_classes, name=f"{self.prefix}_logits", dtype="float32")(x)

    def _pool(self, x: keras.KerasTensor) -> keras.KerasTensor:
        pool = _POOLING[len(x.shape)]
        return pool(data_format="channels_last", **self._named("pool"))(x)

    def _activate(self, layer: Any, x: keras.KerasTensor) -> keras.KerasTensor:
        x = layers.BatchNormalization(
            momentum=0.9, epsilon=1e-5, name=f"{layer.name}_bn", dtype=self.dtype
        )(layer(x))
        return layers.ReLU(name=f"{layer.name}_relu", dtype=self.dtype)(x)

    def _named(self, part: str) -> dict[str, Any]:
        return {"name": f"{self.prefix}_{part}", "dtype": self.dtype}


def _can_halve(x: keras.KerasTensor, size: Sequence[int]) -> bool:
    return all(own >= 2 * target for own, target in zip(x.shape[1:-1], size, strict=True))
