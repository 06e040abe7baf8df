"""Batch normalisation folded into the layers before it: the same function, fewer operations."""

from collections import Counter
from collections.abc import Collection, Iterable
from typing import Any

import keras
import numpy as np
from keras import layers

from dskd_keras import copying, graph
from dskd_keras.errors import InputError, unknown_name
from dskd_keras.keras_internals import call_of, producer

DTYPES = ("float32", "bfloat16", "float16")

# The layers that take a batch normalisation in: the weight that is scaled, and its axis (or, of a
# depthwise kernel, axes) of output channels.
_SCALED: dict[type, tuple[str, tuple[int, ...]]] = {
    layers.Dense: ("kernel", (-1,)),
    layers.Conv1D: ("kernel", (-1,)),
    layers.Conv2D: ("kernel", (-1,)),
    layers.Conv3D: ("kernel", (-1,)),
    layers.Conv1DTranspose: ("kernel", (-2,)),
    layers.Conv2DTranspose: ("kernel", (-2,)),
    layers.Conv3DTranspose: ("kernel", (-2,)),
    layers.DepthwiseConv1D: ("kernel", (-2, -1)),
    layers.DepthwiseConv2D: ("kernel", (-2, -1)),
    layers.SeparableConv1D: ("pointwise_kernel", (-1,)),
    layers.SeparableConv2D: ("pointwise_kernel", (-1,)),
}
_KERNELS = ("kernel", "depthwise_kernel", "pointwise_kernel")

# They shape the training, which is over. Kept, they would add losses to any model that holds the
# copy.
_OF_TRAINING = ("regularizer", "constraint")

# Takes the place of a batch normalisation that was folded.
_PASS = object()


def fold_batch_norm(
    model: keras.Model, dtype: str | None = None, keep: str | Iterable[str] = ()
) -> keras.Model:
    """Returns a copy of a model for inference, its batch normalisations folded away.

    In inference a batch normalisation is `γ (x − μ) / √(σ² + ε) + β` with constants. Where `x`
    comes from a linear layer, it can be a part of that layer's kernel and bias. This is done where
    a dense layer or a convolution of any kind, without an activation, feeds a batch normalisation
    over its channels and nothing else. The layer that does the work of both has the name of the
    batch normalisation, because a feature map of that name is the normalised one. A layer that is
    shared, activated, quantised or used elsewhere stays as it is, and so does a batch normalisation
    that was called with `training=True`. Nested models are folded too. Layers in a wrapper such as
    `TimeDistributed` are not.

    Args:
        model: A functional or Sequential model, which is not changed. The copy has weights of its
            own: training `model` further does not reach it.
        dtype: `"float32"`, `"bfloat16"` or `"float16"`: the precision of the copy's weights and
            computations. The last layers with weights before the outputs, batch normalisations
            that stay and `Normalization` keep float32. Quantised layers keep what they have.
            Defaults to the precision of `model`. In float16 a feature map overflows above 65504,
            and only the outputs show it.
        keep: Names of layers that have to be in the copy (`outer/inner` in nested models), such as
            a convolution whose own output is wanted.

    Returns:
        A functional model of the same name, inputs and outputs, frozen (`trainable` is False).

    Raises:
        InputError: `model` has no graph of layers, or one that can't be made anew from its
            `get_config`; `dtype` or a name in `keep` is unknown, or a weight is too large for
            `dtype`.

    Example:

    ```python
    teacher = dskd_keras.fold_batch_norm(teacher, dtype="bfloat16")
    distiller = dskd_keras.Distiller(teacher, student, student_layers=["stage1", "stage2"])
    ```
    """
    graph.check_graph("model", model)
    if dtype is not None and dtype not in DTYPES:
        raise unknown_name("dtype", dtype, DTYPES)
    keep = (keep,) if isinstance(keep, str) else tuple(keep or ())
    graph.check_names("keep", model, keep)
    folded = _fold(model, dtype, keep, gives_outputs=True)
    folded.trainable = False
    return folded


def _fold(
    model: keras.Model, dtype: str | None, keep: Collection[str], gives_outputs: bool
) -> keras.Model:
    into = _foldable(model, keep)
    norms = {id(norm) for _, norm in into.values()}
    last = _last_layers(model) if gives_outputs else set()
    copies: dict[int, Any] = {}

    def copy(layer: Any) -> Any:
        if id(layer) not in copies:
            copies[id(layer)] = make(layer)
        return copies[id(layer)]

    def make(layer: Any) -> Any:
        if not isinstance(layer, layers.Layer):
            return layer  # an operation has no weights
        if id(layer) in norms:
            return _PASS  # its work is done in the layer before it
        is_last = id(layer) in last
        if graph.has_graph(layer):
            return _fold(layer, dtype, graph.names_inside(layer, keep), gives_outputs=is_last)
        norm = None
        if id(layer) in into:
            _, norm = into[id(layer)]
            is_last = id(norm) in last
        return _copied(layer, norm, "float32" if dtype and is_last else dtype)

    def call(layer: Any, *args: Any, **kwargs: Any) -> Any:
        return args[0] if layer is _PASS else layer(*args, **kwargs)

    folded = graph.rebuild(model, copy, call)
    # Weights exist once the layers have been called.
    with np.errstate(over="ignore"):  # looked for below
        for layer in model.layers:
            made = copies.get(id(layer), _PASS)
            if id(layer) in into:
                _set_folded(made, layer, into[id(layer)][1])
            elif made is not _PASS and not graph.has_graph(layer):
                copying.copy_state(made, layer)
    for weight in folded.weights if dtype else ():
        if not np.isfinite(keras.ops.convert_to_numpy(weight).astype("float32")).all():
            raise InputError(
                f"dtype: weight '{weight.path}' of '{model.name}' is not finite in {dtype}."
            )
    return folded


def _last_layers(model: keras.Model) -> set[int]:
    """Returns the ids of the last layers with weights before the outputs, and of all after them."""
    tensors = graph.backwards(
        *model.outputs, through=lambda tensor: not getattr(producer(tensor), "weights", None)
    )
    return {id(producer(tensor)) for tensor in tensors}


def _foldable(model: keras.Model, keep: Collection[str]) -> dict[int, tuple[Any, Any]]:
    """Returns `(layer, batch norm)` by the layer's id, for all pairs that can become one."""
    tensors = graph.backwards(*model.outputs)
    # How many tensors a layer gives, and how many calls read a tensor.
    calls = Counter(id(producer(tensor)) for tensor in tensors)
    uses = Counter(id(tensor) for tensor in model.outputs)
    uses.update(id(used) for tensor in tensors for used in call_of(tensor)[0])
    found = {}
    for tensor in tensors:
        norm, (inputs, arguments) = producer(tensor), call_of(tensor)
        if type(norm) is not layers.BatchNormalization or len(inputs) != 1:
            continue
        layer = producer(inputs[0])
        if (
            calls[id(norm)] == calls[id(layer)] == uses[id(inputs[0])] == 1
            and not arguments.get("training")
            and layer.name not in keep
            and _is_linear(layer)
            and norm.axis % len(tensor.shape) == _channel_axis(layer, tensor)
            and not _bias_goes_astray(layer, tensor)
        ):
            found[id(layer)] = layer, norm
    return found


def _is_linear(layer: Any) -> bool:
    return (
        type(layer) in _SCALED
        and layer.activation is keras.activations.linear
        and not _is_quantised(layer)
        and not getattr(layer, "lora_enabled", False)
    )


def _is_quantised(layer: Any) -> bool:
    return getattr(layer, "quantization_mode", None) is not None


def _channel_axis(layer: Any, tensor: keras.KerasTensor) -> int:
    first = getattr(layer, "data_format", "channels_last") == "channels_first"
    return 1 if first else len(tensor.shape) - 1


def _bias_goes_astray(layer: Any, tensor: keras.KerasTensor) -> bool:
    """Returns whether Keras would add the bias along the width.

    Keras 3.15 does so on TensorFlow, in channels-first maps that are as wide as they have channels:
    its `ops.add` takes the last axis for that of the channels.
    """
    return (
        keras.backend.backend() == "tensorflow"
        and len(tensor.shape) > 2
        and _channel_axis(layer, tensor) == 1
        and tensor.shape[-1] == tensor.shape[1]
    )


def _copied(layer: Any, norm: Any, dtype: str | None) -> Any:
    """Returns a new layer like `layer`, ready to be called; with the name of `norm`, if any."""

    def change(config: dict[str, Any]) -> None:
        config.update({name: None for name in config if name.endswith(_OF_TRAINING)})
        if norm is not None:
            config.update(name=norm.name, use_bias=True)
            # The weights are set in a moment; random ones would be drawn for nothing.
            config.update({name: "zeros" for name in config if name.endswith("initializer")})
        fixed = isinstance(layer, layers.InputLayer) or _is_quantised(layer)
        if dtype is not None and "dtype" in config and not fixed:
            config["dtype"] = _policy(layer, dtype)

    return copying.anew(layer, change)


def _policy(layer: Any, dtype: str) -> str:
    # Half precision is too coarse for the statistics of both kinds.
    if isinstance(layer, layers.Normalization):
        return "float32"
    half = isinstance(layer, layers.BatchNormalization) and dtype != "float32"
    return f"mixed_{dtype}" if half else dtype


def _set_folded(folded: Any, layer: Any, norm: Any) -> None:
    """Gives `folded` the weights that do the work of `layer` and `norm`, computed in float64."""

    def values(variable: Any, default: Any) -> Any:
        if variable is None:
            return default
        return keras.ops.convert_to_numpy(variable).astype("float64")

    scale = values(norm.gamma, 1.0) / np.sqrt(values(norm.moving_variance, None) + norm.epsilon)
    bias = values(layer.bias, 0.0) if layer.use_bias else 0.0
    folded.bias.assign(values(norm.beta, 0.0) + (bias - values(norm.moving_mean, None)) * scale)
    scaled, axes = _SCALED[type(layer)]
    for name in _KERNELS:
        if hasattr(layer, name):
            value = values(getattr(layer, name), None)
            if name == scaled:
                own = {axis % value.ndim for axis in axes}
                shape = [size if axis in own else 1 for axis, size in enumerate(value.shape)]
                value = value * scale.reshape(shape)
            getattr(folded, name).assign(value)
