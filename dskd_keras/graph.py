"""Looking into functional models: their layers by name, and the feature maps that these give.

What is below it is reached through it: walking through graphs (`walking.py`), names (`naming.py`)
and the layers that are taken where none is named (`feature_maps.py`).
"""

from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import keras

from dskd_keras.errors import InputError
from dskd_keras.feature_maps import (
    auto_student_layers,
    auto_teacher_layers,
    default_teacher_layer,
    matching_teacher_layers,
)
from dskd_keras.keras_internals import (
    call_of,
    flat_layers,
    input_structure,
    output_structure,
    outputs_of,
    producer,
    symbolic_mask,
)
from dskd_keras.naming import check_names, find, layer_names, names_inside
from dskd_keras.walking import Graph, Place, backwards, data_format, has_graph, positions

__all__ = [
    "Tapped",
    "auto_student_layers",
    "auto_teacher_layers",
    "backwards",
    "channels_last",
    "check_graph",
    "check_names",
    "default_teacher_layer",
    "has_graph",
    "layer_names",
    "mask_of",
    "matching_teacher_layers",
    "names_inside",
    "precision",
    "rebuild",
    "tap",
]

# The size that unknown ones get to see whether they stay the same: networks can halve it often.
_ANY_SIZE = 96


class Tapped(NamedTuple):
    """A model with the feature maps of some of its layers.

    Attributes:
        model: The model that was given, or one with the same layers, inputs and outputs.
        tensors: The feature maps, in its graph.
        masks: For each of them what `mask_of` gives: bool, of the map's positions, or None.
    """

    model: keras.Model
    tensors: list[Any]
    masks: list[Any]


def check_graph(field: str, model: keras.Model) -> None:
    """Raises `InputError` unless `model`, which `field` held, has layers that can be seen."""
    if not isinstance(model, keras.Model):
        raise InputError(f"{field}: {type(model).__name__} should be a keras.Model.")
    if not has_graph(model):
        raise InputError(
            f"{field}: {type(model).__name__} '{model.name}' has no graph of layers. Build it with "
            "the functional API, or as a keras.Sequential that begins with keras.Input."
        )


def precision(student: keras.Model) -> keras.dtype_policies.DTypePolicy:
    """Returns a student's dtype policy, or that of a layer in float16, which needs loss scaling."""
    for layer in flat_layers(student)[1:]:
        if layer.compute_dtype == "float16":
            return layer.dtype_policy
    return student.dtype_policy


def tap(field: str, model: keras.Model, names: Iterable[Any]) -> Tapped:
    """Returns a model and, in its graph, the feature maps of its named layers.

    The model is the one given, unless a name or a mask is inside a nested model, which is opened
    then. An opened model shares all layers with the model given. Its outputs are the same, in the
    same structure.

    Args:
        field: The argument that held the names.
        model: A functional or Sequential model.
        names: Names as in `naming.py`. Without any it may be the masks of the outputs that a nested
            model is opened for.

    Returns:
        `Tapped`. The maps are floats of one of the shapes `[B, D]`, `[B, T, D]`, `[B, H, W, C]` and
        `[B, D, H, W, C]`, or channels first. The channels are known, the other sizes may not be.

    Raises:
        InputError: A name means no layer or several, or a layer gives something else.
    """
    names = list(names)
    places = find(field, model, names)
    ends = [*places, *map(Place, model.outputs)]
    graph = Graph(*ends)
    masks = [masked for end in ends if (masked := _masked(graph, end)) and masked.calls]
    wanted = [_Wanted(place, is_mask=False) for place in places]
    opened, tensors = _open(model, wanted + [_Wanted(masked, is_mask=True) for masked in masks])
    tensors = tensors[: len(names)]
    for name, tensor in zip(names, tensors, strict=True):
        _check_feature_map(field, name, tensor)
    return Tapped(opened, tensors, [mask_of(tensor) for tensor in tensors])


def mask_of(tensor: keras.KerasTensor) -> keras.KerasTensor | None:
    """Returns the mask that counts for a feature map, in the same graph, or None.

    That is the map's own, which its layer has passed on or made, or else that of the nearest tensor
    before it that has one: an operation such as `x + y` and many layers lose it. It counts if it
    has a value for each of the map's positions. In a nested model it is reached where `tap` opened
    the model.

    Args:
        tensor: A symbolic tensor, `[B, T, D]` for instance.

    Returns:
        A symbolic tensor, bool `[B, T]`, False at padded positions.
    """
    place = Place(tensor)
    masked = _masked(Graph(place), place)
    if masked is None:
        return None
    mask = symbolic_mask(masked.tensor)
    for call in reversed(masked.calls):
        outputs = zip(producer(call).outputs, outputs_of(call), strict=True)
        mask = next((outer for inner, outer in outputs if inner is mask), None)
    return mask if mask is not None and _has_positions_of(tensor, mask) else None


def channels_last(tensor: keras.KerasTensor) -> keras.KerasTensor:
    """Returns a symbolic feature map with its channels moved to the last axis."""
    rank = len(tensor.shape)
    if rank == 2 or data_format(tensor) == "channels_last":
        return tensor
    return keras.layers.Permute((*range(2, rank), 1), dtype=tensor.dtype)(tensor)


def rebuild(
    model: keras.Model, copy: Callable[[Any], Any], call: Callable[..., Any]
) -> keras.Model:
    """Returns a functional model made by going through another's graph.

    `copy` gives the layer that takes the place of a layer, `call` the outputs of such a layer.
    """
    # A Sequential is cloned without asking `call_function`. A functional model of it is not.
    functional = keras.Model(input_structure(model), output_structure(model), name=model.name)
    return keras.models.clone_model(functional, clone_function=copy, call_function=call)


class _Wanted(NamedTuple):
    place: Place
    is_mask: bool  # the mask of the place is wanted, rather than its tensor

    @property
    def key(self) -> tuple[Any, ...]:
        return (*self.place.key, self.is_mask)


def _open(model: Any, wanted: list[_Wanted]) -> tuple[Any, list[Any]]:
    """Returns a model in whose graph there is what is wanted of another one, and these tensors.

    A nested model with such a place inside is replaced by a twin, which has the same layers and
    gives the tensors beside its own outputs.
    """
    inside: dict[int, dict[Any, _Wanted]] = {}  # by nested model, as that model knows its places
    for (tensor, calls), is_mask in wanted:
        if calls:
            inner = _Wanted(Place(tensor, calls[1:]), is_mask)
            inside.setdefault(id(producer(calls[0])), {})[inner.key] = inner
    twins: dict[int, Any] = {}
    given: dict[int, dict[Any, Any]] = {}  # by an output of a twin: the tensors that it gave beside

    def call(layer: Any, *args: Any, **kwargs: Any) -> Any:
        if id(layer) not in inside:
            return layer(*args, **kwargs)
        if id(layer) not in twins:
            opened, tensors = _open(layer, list(inside[id(layer)].values()))
            twins[id(layer)] = keras.Model(
                input_structure(opened), [output_structure(opened), tensors], name=layer.name
            )
        outputs, tensors = twins[id(layer)](*args, **kwargs)
        beside = dict(zip(inside[id(layer)], tensors, strict=True))
        given.update((id(output), beside) for output in keras.tree.flatten(outputs))
        return outputs

    opened = rebuild(model, lambda layer: layer, call) if inside else model
    counterparts = _counterparts(model, opened)
    found = []
    for (tensor, calls), is_mask in wanted:
        if calls:
            beside = given[id(counterparts[id(calls[0])])]
            found.append(beside[_Wanted(Place(tensor, calls[1:]), is_mask).key])
        else:
            own = counterparts[id(tensor)]
            found.append(symbolic_mask(own) if is_mask else own)
    return opened, found


def _counterparts(model: keras.Model, rebuilt: keras.Model) -> dict[int, Any]:
    """Returns the tensors of a rebuilt graph by the ids of those that they take the place of."""
    found: dict[int, Any] = {}
    pairs = list(zip(model.outputs, rebuilt.outputs, strict=True))
    for old, new in pairs:  # grows while it is walked
        if id(old) not in found:
            # A twin gives more.
            both = zip(outputs_of(old), outputs_of(new), strict=False)
            found.update((id(one), other) for one, other in both)
            pairs += zip(call_of(old)[0], call_of(new)[0], strict=True)
    return found


def _check_feature_map(field: str, name: str, tensor: keras.KerasTensor) -> None:
    shape = tuple(tensor.shape)
    if 2 <= len(shape) <= 5 and "float" in tensor.dtype:
        channels = shape[-1] if data_format(tensor) == "channels_last" else shape[1]
        if channels is not None:
            return
    raise InputError(
        f"{field}: layer '{name}' has no usable feature map: it gives {tensor.dtype} {shape}, "
        "where floats [B, D], [B, T, D], [B, H, W, C] or [B, D, H, W, C], or channels first, are "
        "expected, with a fixed number of channels."
    )


def _masked(graph: Graph, place: Place) -> Place | None:
    """Returns the nearest place, at or before one, whose own mask has the same positions."""
    number = graph.number(place)
    sizes = graph.positions(number)
    # The positions of a vector are none, and so are those of its mask.
    near = graph.back_from(
        [number] if sizes else [], through=lambda other: _agree(graph.positions(other), sizes)
    )
    for other in near:
        mask = symbolic_mask(graph.places[other].tensor)
        if mask is not None and _agree(mask.shape[1:], sizes):
            return graph.places[other]
    return None


def _agree(sizes: Sequence[int | None], others: Sequence[int | None]) -> bool:
    # A nested model may know less than the one around it.
    return len(sizes) == len(others) and all(
        a == b or None in (a, b) for a, b in zip(sizes, others, strict=True)
    )


def _has_positions_of(tensor: keras.KerasTensor, mask: keras.KerasTensor) -> bool:
    """Returns whether a mask has a map's positions, also where their number is not known yet."""
    layout = data_format(tensor)
    sizes = positions(tensor.shape, layout)
    if sizes != tuple(mask.shape[1:]) or None not in sizes:
        return sizes == tuple(mask.shape[1:])
    inputs = [earlier for earlier in backwards(tensor, mask) if not call_of(earlier)[0]]
    shapes = [[None, *(size or _ANY_SIZE for size in each.shape[1:])] for each in inputs]
    sized = [
        keras.KerasTensor(shape, dtype=each.dtype)
        for shape, each in zip(shapes, inputs, strict=True)
    ]
    try:
        spec, of_mask = keras.Function(inputs, [tensor, mask]).compute_output_spec(sized)
    except Exception:  # whatever a layer of the user's raises: it may not take this size
        return True
    return positions(spec.shape, layout) == tuple(of_mask.shape[1:])
