"""Looking into functional models: their layers by name, and the feature maps that these give."""

import keras

from dskd_keras.errors import InputError, unknown_name


def check_classifier(role, model):
    """Raises `InputError` unless `model` is a functional model that gives logits `[B, C]`.

    Args:
        role: "teacher" or "student", the field that the message names.
        model: What the user gave.
    """
    if not isinstance(model, keras.Model):
        raise InputError(f"{role} should be a keras.Model. Received: {type(model).__name__}.")
    try:
        inputs, outputs = model.inputs, model.outputs
    except AttributeError:
        inputs = outputs = None
    if not inputs or not outputs or not hasattr(outputs[0], "_keras_history"):
        raise InputError(
            f"{role}: {type(model).__name__} '{model.name}' has no graph of layers. Build it with "
            "the functional API, or as a keras.Sequential that begins with keras.Input."
        )
    if len(outputs) != 1 or len(outputs[0].shape) != 2 or outputs[0].shape[-1] is None:
        shapes = ", ".join(str(tuple(output.shape)) for output in outputs)
        raise InputError(f"{role} should give logits [B, C] alone. It gives {shapes}.")
    last = producer(outputs[0])
    while isinstance(last, keras.Model):
        last = producer(last.outputs[0])
    activation = getattr(getattr(last, "activation", None), "__name__", "")
    if isinstance(last, keras.layers.Softmax):
        raise InputError(
            f"{role} ends in a softmax (layer '{last.name}'), where logits are expected. Take "
            f"the layer off: {role} = keras.Model({role}.input, "
            f"{role}.get_layer('{last.name}').input)."
        )
    if activation in ("softmax", "log_softmax", "sigmoid"):
        raise InputError(
            f"{role} ends in a {activation} (layer '{last.name}'), where logits are expected. "
            f"Make it linear: {role}.get_layer('{last.name}').activation = "
            "keras.activations.linear."
        )


def check_pair(teacher, student):
    """Raises `InputError` unless the models agree in classes and inputs and share no weights."""
    classes = [model.outputs[0].shape[-1] for model in (teacher, student)]
    if classes[0] != classes[1]:
        raise InputError(
            f"teacher and student should have the same classes. teacher '{teacher.name}' gives "
            f"{classes[0]} logits, student '{student.name}' {classes[1]}."
        )
    shapes = [[tuple(x.shape[1:]) for x in model.inputs] for model in (teacher, student)]
    alike = len(shapes[0]) == len(shapes[1]) and all(
        len(a) == len(b) and all(m == n or None in (m, n) for m, n in zip(a, b, strict=True))
        for a, b in zip(*shapes, strict=False)
    )
    if not alike:
        taken = [", ".join(map(str, of_model)) for of_model in shapes]
        raise InputError(
            f"teacher and student should take the same inputs. teacher '{teacher.name}' takes "
            f"{taken[0]}, student '{student.name}' {taken[1]}."
        )
    frozen = {id(variable) for variable in teacher.variables}
    for layer in all_layers(student):
        if any(id(variable) in frozen for variable in layer.variables):
            raise InputError(
                f"teacher and student share the weights of layer '{layer.name}'. The teacher is "
                "frozen: give it weights of its own (keras.models.clone_model, set_weights)."
            )


def precision(student):
    """Returns a student's dtype policy: float16, if any layer has it, needs loss scaling."""
    for layer in all_layers(student):
        if layer.compute_dtype == "float16":
            return layer.dtype_policy
    return student.dtype_policy


def all_layers(model):
    """Yields a model's layers and those of its nested models."""
    for layer in model.layers:
        yield layer
        if hasattr(layer, "layers"):
            yield from all_layers(layer)


def layer_names(model):
    """Returns the names of a model's layers, those of nested models as `outer/inner`."""
    names = []
    for layer in model.layers:
        names.append(layer.name)
        if has_graph(layer):
            names += [f"{layer.name}/{name}" for name in layer_names(layer)]
    return names


def has_graph(layer):
    """Returns whether a layer is a model whose own layers can be seen."""
    return isinstance(layer, keras.Model) and bool(getattr(layer, "outputs", None))


def tap(field, model, names):
    """Makes the feature maps of named layers accessible as tensors of one graph.

    Args:
        field: The argument that held `names`, for errors.
        model: A functional model with one output.
        names: Layer names; `outer/inner` reaches into a nested model.

    Returns:
        `(model, tensors)`: a functional model that shares all layers with the one given, and a
        list with the symbolic output of each named layer, in its graph. It is the same model unless
        a nested one had to be opened.

    Raises:
        InputError: A name is unknown, or the layer's output can't serve as a feature map.
    """
    known = layer_names(model)
    for name in names:
        if name not in known:
            raise unknown_name(field, name, known)
    if any("/" in name for name in names):
        model, found = _open_nested(model, names)
    else:
        found = _outputs_by_layer(model)
    return model, [_check_feature_map(field, name, found.get(name, [])) for name in names]


def last_feature_map(model):
    """Returns the last feature map before the pooling, as a symbolic tensor of the model's graph.

    That is, going back from the logits, the first tensor with positions (`[B, H, W, C]` or
    `[B, T, D]`, more than one of them); in a model without any, the input of the last layer.

    Raises:
        InputError: It has no fixed size, or there is nothing between the input and the logits.
    """
    tensors = backwards(model.outputs[0])
    for tensor in tensors[1:]:
        positions = [size for size in _positions(tensor) if size != 1]
        if positions and not isinstance(producer(tensor), keras.layers.InputLayer):
            break
    else:
        tensor = tensors[min(1, len(tensors) - 1)]
    return _check_feature_map("teacher_layer", producer(tensor).name, [tensor])


def channels_last(tensor):
    """Returns a symbolic feature map with its channels moved to the last axis."""
    rank = len(tensor.shape)
    if rank == 2 or _data_format(tensor) == "channels_last":
        return tensor
    return keras.layers.Permute((*range(2, rank), 1), dtype=tensor.dtype)(tensor)


# What is left by a transposition from the one layout to the other.
_LAYOUTS = {(2, 3, 1): "channels_last", (3, 1, 2): "channels_first"}


def _data_format(tensor):
    """The layout of a map. Many layers have none of their own (a ReLU): it is that of the nearest
    convolution or pooling before it."""
    rank = len(tensor.shape)
    for earlier in backwards(tensor):
        if len(earlier.shape) != rank:
            break  # a reshape stands between: the layout on its other side says nothing here
        layer = producer(earlier)
        if isinstance(layer, keras.layers.Permute) and tuple(layer.dims) in _LAYOUTS:
            return _LAYOUTS[tuple(layer.dims)]
        data_format = getattr(layer, "data_format", None)
        if data_format in ("channels_first", "channels_last"):
            return data_format
    return keras.config.image_data_format() if rank == 4 else "channels_last"


# Keras has no public way to walk a graph tensor by tensor. `layer.output`, the public one for a
# single layer, fails as soon as a layer was called in a second graph, which opening a nested model
# does; `model.inputs` is flat, where the caller's may be a dict. All that is private stands in the
# next five functions.


def input_structure(model):
    """Returns a model's symbolic inputs in the structure that it is called with."""
    inputs = getattr(model, "_inputs_struct", model.inputs)
    return inputs[0] if isinstance(inputs, (list, tuple)) and len(inputs) == 1 else inputs


def output_structure(model):
    """Returns a model's symbolic outputs in the structure that it returns."""
    return getattr(model, "_outputs_struct", model.outputs[0])


def producer(tensor):
    """Returns the layer or operation that computes a symbolic tensor."""
    return tensor._keras_history.operation


def call_of(tensor):
    """Returns `(inputs, arguments)` of the call that computed a symbolic tensor: the tensors that
    went in, and the keyword arguments, a dict."""
    history = tensor._keras_history
    node = history.operation._inbound_nodes[history.node_index]
    return node.input_tensors, node.arguments.kwargs


def _producer_inputs(tensor):
    return call_of(tensor)[0]


def backwards(*tensors):
    """Returns the tensors from which some are computed, themselves first, nearest first."""
    order, seen = [*tensors], {id(tensor) for tensor in tensors}
    for current in order:  # grows while it is walked: breadth first
        for earlier in _producer_inputs(current):
            if id(earlier) not in seen:
                seen.add(id(earlier))
                order.append(earlier)
    return order


def _outputs_by_layer(model):
    found = {}
    for tensor in backwards(model.outputs[0]):
        found.setdefault(producer(tensor).name, []).append(tensor)
    return found


def _open_nested(model, names):
    """Rebuilds the graph with every nested model that holds a named layer made multi-output."""
    found = {}

    def call(layer, *args, **kwargs):
        prefix = f"{layer.name}/"
        inner = [name.removeprefix(prefix) for name in names if name.startswith(prefix)]
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
            found.setdefault(prefix + name, []).extend(values)
        return output

    # A Sequential is cloned without asking `call_function`; its functional twin is not.
    functional = keras.Model(input_structure(model), model.outputs[0], name=model.name)
    rebuilt = keras.models.clone_model(
        functional, clone_function=lambda layer: layer, call_function=call
    )
    return rebuilt, found


def _check_feature_map(field, name, tensors):
    if len(tensors) != 1:
        times = f"is called {len(tensors)} times" if tensors else "does not lead to the logits"
        raise InputError(
            f"{field}: layer '{name}' has no usable feature map: it {times} in the graph."
        )
    tensor = tensors[0]
    shape = tuple(tensor.shape)
    if isinstance(producer(tensor), keras.layers.InputLayer):
        raise InputError(f"{field}: layer '{name}' has no usable feature map: it is the input.")
    if len(shape) not in (2, 3, 4) or None in shape[1:] or "float" not in tensor.dtype:
        raise InputError(
            f"{field}: layer '{name}' has no usable feature map: it gives {tensor.dtype} {shape}, "
            "where [B, H, W, C], [B, C, H, W], [B, T, D] or [B, D] of floats with fixed sizes "
            "is expected."
        )
    return tensor


def _positions(tensor):
    rank = len(tensor.shape)
    if rank not in (3, 4):
        return ()
    return tensor.shape[1:-1] if _data_format(tensor) == "channels_last" else tensor.shape[2:]
