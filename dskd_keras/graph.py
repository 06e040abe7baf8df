"""Looking into functional models: their layers by name, and the feature maps that these give."""

from collections.abc import Callable, Iterable
from typing import Any

import keras

from dskd_keras.errors import InputError, unknown_name
from dskd_keras.keras_internals import (
    call_of,
    flat_layers,
    input_structure,
    output_structure,
    producer,
)


def check_classifier(role: str, model: keras.Model) -> None:
    """Raises `InputError` unless a teacher or student is functional and gives logits `[B, C]`."""
    check_graph(role, model)
    outputs = model.outputs
    if len(outputs) != 1 or len(outputs[0].shape) != 2 or outputs[0].shape[-1] is None:
        shapes = ", ".join(str(tuple(output.shape)) for output in outputs)
        raise InputError(
            f"{role}: '{model.name}' gives {shapes}, but should give logits [B, C] alone."
        )
    last = producer(outputs[0])
    while isinstance(last, keras.Model):
        last = producer(last.outputs[0])
    activation = getattr(getattr(last, "activation", None), "__name__", "")
    layer = f"{role}.get_layer('{last.name}')"
    if isinstance(last, keras.layers.Softmax):
        ending = "softmax"
        advice = f"Take the layer off: {role} = keras.Model({role}.input, {layer}.input)."
    elif activation in ("softmax", "log_softmax", "sigmoid"):
        ending = activation
        advice = f"Make it linear: {layer}.activation = keras.activations.linear."
    else:
        return
    raise InputError(
        f"{role}: '{model.name}' ends in a {ending} (layer '{last.name}'), where logits are "
        f"expected. {advice}"
    )


def check_graph(field: str, model: keras.Model) -> None:
    """Raises `InputError` unless `model`, which `field` held, has layers that can be seen."""
    if not isinstance(model, keras.Model):
        raise InputError(f"{field}: {type(model).__name__} should be a keras.Model.")
    if not has_graph(model):
        raise InputError(
            f"{field}: {type(model).__name__} '{model.name}' has no graph of layers. Build it with "
            "the functional API, or as a keras.Sequential that begins with keras.Input."
        )


def check_pair(teacher: keras.Model, student: keras.Model) -> None:
    """Raises `InputError` unless the models agree in classes and inputs and share no weights."""
    classes = [model.outputs[0].shape[-1] for model in (teacher, student)]
    if classes[0] != classes[1]:
        raise InputError(
            f"teacher: '{teacher.name}' gives {classes[0]} logits, student '{student.name}' "
            f"{classes[1]}. They should have the same classes."
        )
    shapes = [[tuple(x.shape[1:]) for x in model.inputs] for model in (teacher, student)]
    alike = len(shapes[0]) == len(shapes[1]) and all(
        len(a) == len(b) and all(m == n or None in (m, n) for m, n in zip(a, b, strict=True))
        for a, b in zip(*shapes, strict=True)
    )
    if not alike:
        taken = [", ".join(map(str, of_model)) for of_model in shapes]
        raise InputError(
            f"teacher: '{teacher.name}' takes {taken[0]}, student '{student.name}' {taken[1]}. "
            "They should take the same inputs."
        )
    frozen = {id(variable) for variable in teacher.variables}
    for layer in flat_layers(student)[1:]:
        if any(id(variable) in frozen for variable in layer.variables):
            raise InputError(
                f"teacher: '{teacher.name}' and the student share the weights of layer "
                f"'{layer.name}'. The teacher is frozen: give it weights of its own "
                "(keras.models.clone_model, set_weights)."
            )


def precision(student: keras.Model) -> keras.dtype_policies.DTypePolicy:
    """Returns a student's dtype policy, or that of a layer in float16, which needs loss scaling."""
    for layer in flat_layers(student)[1:]:
        if layer.compute_dtype == "float16":
            return layer.dtype_policy
    return student.dtype_policy


def layer_names(model: keras.Model) -> list[str]:
    """Returns the names of a model's layers, those of nested models as `outer/inner`."""
    names = []
    for layer in model.layers:
        names.append(layer.name)
        if has_graph(layer):
            names += [f"{layer.name}/{name}" for name in layer_names(layer)]
    return names


def check_names(field: str, model: keras.Model, names: Iterable[str]) -> None:
    """Raises `InputError` unless all of `names`, which `field` held, are those of layers."""
    known = layer_names(model)
    for name in names:
        if name not in known:
            raise unknown_name(field, name, known)


def names_inside(layer: keras.layers.Layer, names: Iterable[str]) -> list[str]:
    """Returns those of `names` that reach into a nested model, as that model knows them."""
    prefix = f"{layer.name}/"
    return [name.removeprefix(prefix) for name in names if name.startswith(prefix)]


def has_graph(layer: keras.layers.Layer) -> bool:
    """Returns whether a layer is a model whose own layers can be seen."""
    outputs = getattr(layer, "outputs", None) or [None]
    return isinstance(layer, keras.Model) and isinstance(outputs[0], keras.KerasTensor)


def tap(
    field: str, model: keras.Model, names: Iterable[str]
) -> tuple[keras.Model, list[keras.KerasTensor]]:
    """Returns a model with one output, and the feature maps of its named layers in its graph.

    It is the model given, unless a name reaches into a nested model (`outer/inner`), which is
    opened then. It shares all layers with the model given.
    """
    names = list(names)
    check_names(field, model, names)
    if any("/" in name for name in names):
        model, found = _open_nested(model, names)
    else:
        found = _outputs_by_layer(model)
    return model, [_check_feature_map(field, name, found.get(name, [])) for name in names]


def last_feature_map(model: keras.Model) -> keras.KerasTensor:
    """Returns the last feature map before the pooling, as a symbolic tensor of the model's graph.

    That is, going back from the logits, the first tensor that has more than one position
    (`[B, H, W, C]` or `[B, T, D]`). In a model without any it is the input of the last layer.
    """
    tensors = backwards(model.outputs[0])
    for tensor in tensors[1:]:
        positions = [size for size in _positions(tensor) if size != 1]
        if positions and not isinstance(producer(tensor), keras.layers.InputLayer):
            break
    else:
        tensor = tensors[min(1, len(tensors) - 1)]
    return _check_feature_map("teacher_layer", producer(tensor).name, [tensor])


def channels_last(tensor: keras.KerasTensor) -> keras.KerasTensor:
    """Returns a symbolic feature map with its channels moved to the last axis."""
    rank = len(tensor.shape)
    if rank == 2 or _data_format(tensor) == "channels_last":
        return tensor
    return keras.layers.Permute((*range(2, rank), 1), dtype=tensor.dtype)(tensor)


def backwards(
    *tensors: keras.KerasTensor,
    through: Callable[[keras.KerasTensor], bool] = lambda tensor: True,
) -> list[keras.KerasTensor]:
    """Returns the tensors from which some are computed, themselves first, nearest first.

    `through` says of a tensor whether to go on to what it is computed from.
    """
    order, seen = [*tensors], {id(tensor) for tensor in tensors}
    for current in order:  # grows while it is walked: breadth first
        for earlier in call_of(current)[0] if through(current) else ():
            if id(earlier) not in seen:
                seen.add(id(earlier))
                order.append(earlier)
    return order


def rebuild(
    model: keras.Model, copy: Callable[[Any], Any], call: Callable[..., Any]
) -> keras.Model:
    """Returns a functional model made by going through another's graph.

    `copy` gives the layer that takes the place of a layer, `call` the outputs of such a layer.
    """
    # A Sequential is cloned without asking `call_function`. A functional model of it is not.
    functional = keras.Model(input_structure(model), output_structure(model), name=model.name)
    return keras.models.clone_model(functional, clone_function=copy, call_function=call)


# What a transposition from one layout to the other gives.
_LAYOUTS = {(2, 3, 1): "channels_last", (3, 1, 2): "channels_first"}


def _data_format(tensor: keras.KerasTensor) -> str:
    """Returns the layout of a map: that of the nearest layer before it which has one."""
    rank = len(tensor.shape)
    for earlier in backwards(tensor):
        if len(earlier.shape) != rank:
            break  # the layout on the other side of a reshape says nothing here
        layer = producer(earlier)
        if isinstance(layer, keras.layers.Permute) and tuple(layer.dims) in _LAYOUTS:
            return _LAYOUTS[tuple(layer.dims)]
        data_format = getattr(layer, "data_format", None)
        if data_format in ("channels_first", "channels_last"):
            return data_format
    return keras.config.image_data_format() if rank == 4 else "channels_last"


def _positions(tensor: keras.KerasTensor) -> tuple[int | None, ...]:
    rank = len(tensor.shape)
    if rank not in (3, 4):
        return ()
    return tensor.shape[1:-1] if _data_format(tensor) == "channels_last" else tensor.shape[2:]


def _outputs_by_layer(model: keras.Model) -> dict[str, list[keras.KerasTensor]]:
    found: dict[str, list[keras.KerasTensor]] = {}
    for tensor in backwards(model.outputs[0]):
        found.setdefault(producer(tensor).name, []).append(tensor)
    return found


def _open_nested(
    model: keras.Model, names: list[str]
) -> tuple[keras.Model, dict[str, list[keras.KerasTensor]]]:
    """Rebuilds the graph so that every nested model with a named layer gives its output too."""
    found: dict[str, list[keras.KerasTensor]] = {}

    def call(layer: Any, *args: Any, **kwargs: Any) -> Any:
        inner = names_inside(layer, names)
        if not inner:
            output = layer(*args, **kwargs)
            if not isinstance(output, (list, tuple, dict)):
                found.setdefault(layer.name, []).append(output)
            return output
        opened, tensors = layer, _outputs_by_layer(layer)
        if any("/" in name for name in inner):
            opened, tensors = _open_nested(layer, inner)
        taps = {name: tensors.get(name, []) for name in inner}
        twin = keras.Model(input_structure(opened), [opened.outputs[0], taps], name=layer.name)
        output, tapped = twin(*args, **kwargs)
        found.setdefault(layer.name, []).append(output)
        for name, values in tapped.items():
            found.setdefault(f"{layer.name}/{name}", []).extend(values)
        return output

    return rebuild(model, lambda layer: layer, call), found


def _check_feature_map(
    field: str, name: str, tensors: list[keras.KerasTensor]
) -> keras.KerasTensor:
    if len(tensors) != 1:
        times = f"is called {len(tensors)} times" if tensors else "does not lead to the logits"
        reason = f"it {times} in the graph"
    elif isinstance(producer(tensors[0]), keras.layers.InputLayer):
        reason = "it is the input"
    else:
        (tensor,) = tensors
        shape = tuple(tensor.shape)
        if len(shape) in (2, 3, 4) and None not in shape[1:] and "float" in tensor.dtype:
            return tensor
        reason = (
            f"it gives {tensor.dtype} {shape}, where [B, H, W, C], [B, C, H, W], [B, T, D] or "
            "[B, D] of floats with fixed sizes is expected"
        )
    raise InputError(f"{field}: layer '{name}' has no usable feature map: {reason}.")
