"""Walking through the graphs of functional models, those of nested models included."""

from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import keras

from dskd_keras.keras_internals import (
    arguments_of,
    call_index,
    call_of,
    input_structure,
    output_index,
    producer,
)

# The ranks of feature maps with positions: `[B, T, D]`, `[B, H, W, C]` and `[B, D, H, W, C]`.
RANKS = (3, 4, 5)


class Place(NamedTuple):
    """A symbolic tensor, and where it is: in a model's own graph or in that of a nested model.

    Attributes:
        tensor: The tensor.
        calls: For each nested model around it, the outermost first, an output of the call that is
            meant: a nested model may be called several times.
    """

    tensor: Any
    calls: tuple[Any, ...] = ()

    @property
    def key(self) -> tuple[Any, ...]:
        """What two objects for the same place have in common."""
        return (id(self.tensor), *((id(producer(call)), call_index(call)) for call in self.calls))


def has_graph(layer: Any) -> bool:
    """Returns whether a layer is a model whose own layers can be seen."""
    outputs = getattr(layer, "outputs", None) if isinstance(layer, keras.Model) else None
    # A subclass may have an attribute of this name for something else.
    return (
        isinstance(outputs, (list, tuple))
        and bool(outputs)
        and all(isinstance(output, keras.KerasTensor) for output in outputs)
    )


def backwards(
    *tensors: keras.KerasTensor,
    through: Callable[[keras.KerasTensor], bool] = lambda tensor: True,
) -> list[keras.KerasTensor]:
    """Returns the tensors from which some are computed, themselves first, nearest first.

    It stays in one graph: a nested model is one step. `through` says of a tensor whether to go on
    to what it is computed from.
    """
    order, seen = [*tensors], {id(tensor) for tensor in tensors}
    for current in order:  # grows while it is walked: breadth first
        for earlier in call_of(current)[0] if through(current) else ():
            if id(earlier) not in seen:
                seen.add(id(earlier))
                order.append(earlier)
    return order


class Graph:
    """All tensors that lead to some places, with nested models laid open.

    The output of a nested model is there twice: as that of the call, and as that of the layer
    inside that computes it. So is the input of one.

    Attributes:
        places: All of them, each after those that it is computed from.
        before: For each of them the numbers of those that it is computed from.
        layers: For each of them the layer or operation that computes it. None for the output and
            for the input of a nested model, which are the tensor before them.
    """

    def __init__(self, *ends: Place) -> None:
        self.places: list[Place] = []
        self.before: list[list[int]] = []
        self.layers: list[Any] = []
        self._data_formats: list[str | None] = []
        self._numbers: dict[tuple[Any, ...], int] = {}
        for end in ends:
            self._add_with_earlier(end)

    def number(self, place: Place) -> int:
        """Returns the number of a place."""
        return self._numbers[place.key]

    def shape(self, number: int) -> tuple[int | None, ...]:
        """Returns the shape of a tensor, with the batch."""
        return tuple(self.places[number].tensor.shape)

    def data_format(self, number: int) -> str:
        """Returns the layout of a feature map: that of the layers before it which have one."""
        image = len(self.shape(number)) > RANKS[0]
        default = keras.config.image_data_format() if image else "channels_last"
        return self._data_formats[number] or default

    def positions(self, number: int) -> tuple[int | None, ...]:
        """Returns the sizes of a feature map without batch and channels; `()` of a vector."""
        return positions(self.shape(number), self.data_format(number))

    def back_from(self, numbers: Iterable[int], through: Callable[[int], bool]) -> list[int]:
        """Returns the numbers of some places and of those before them, the nearest first.

        `through` says of a place whether to go on to what it is computed from.
        """
        order = list(dict.fromkeys(numbers))
        seen = set(order)
        for current in order:  # grows while it is walked: breadth first
            for earlier in self.before[current] if through(current) else ():
                if earlier not in seen:
                    seen.add(earlier)
                    order.append(earlier)
        return order

    def _add_with_earlier(self, end: Place) -> None:
        # A recursion would be too deep in deep networks.
        waiting = [end]
        while waiting:
            place = waiting[-1]
            earlier = () if place.key in self._numbers else _earlier(place)
            missing = [other for other in earlier if other.key not in self._numbers]
            if missing:
                waiting.append(missing[0])
                continue
            waiting.pop()
            if place.key not in self._numbers:
                self._add(place, [self._numbers[other.key] for other in earlier])

    def _add(self, place: Place, before: list[int]) -> None:
        layer = producer(place.tensor)
        if has_graph(layer) or (place.calls and isinstance(layer, keras.layers.InputLayer)):
            layer = None
        rank = len(place.tensor.shape)
        # A layer such as ReLU takes any layout. A layout on the other side of a reshape says
        # nothing here.
        formats = [_own_data_format(layer, rank)]
        formats += [self._data_formats[n] for n in before if len(self.shape(n)) == rank]
        self._numbers[place.key] = len(self.places)
        self.places.append(place)
        self.before.append(before)
        self.layers.append(layer)
        self._data_formats.append(next(filter(None, formats), None))


def positions(shape: Sequence[int | None], data_format: str) -> tuple[int | None, ...]:
    """Returns the sizes of a feature map without batch and channels; `()` of a vector."""
    if len(shape) not in RANKS:
        return ()
    return tuple(shape[1:-1] if data_format == "channels_last" else shape[2:])


def data_format(tensor: keras.KerasTensor) -> str:
    """Returns the layout of a feature map: that of the nearest layers before it which have one."""
    place = Place(tensor)
    graph = Graph(place)
    return graph.data_format(graph.number(place))


# What a transposition from one layout to the other gives. That of a sequence may mean anything.
_LAYOUTS = {
    (2, 1): "channels_last",
    (2, 3, 1): "channels_last",
    (2, 3, 4, 1): "channels_last",
    (3, 1, 2): "channels_first",
    (4, 1, 2, 3): "channels_first",
}


def _own_data_format(layer: Any, rank: int) -> str | None:
    if rank not in RANKS:
        return None
    if isinstance(layer, keras.layers.Permute):
        return _LAYOUTS.get(tuple(layer.dims))
    data_format = getattr(layer, "data_format", None)
    return data_format if data_format in ("channels_first", "channels_last") else None


def _earlier(place: Place) -> list[Place]:
    """Returns what a place is computed from, one step back, into nested models and out of them."""
    tensor, calls = place
    layer = producer(tensor)
    if has_graph(layer):
        return [Place(layer.outputs[output_index(tensor)], (*calls, tensor))]
    if calls and isinstance(layer, keras.layers.InputLayer):
        passed = _passed(calls[-1])
        inputs = zip(producer(calls[-1]).inputs, passed, strict=False)
        return [
            Place(given, calls[:-1])
            for own, given in inputs
            if own is tensor and isinstance(given, keras.KerasTensor)
        ]
    return [Place(earlier, calls) for earlier in call_of(tensor)[0]]


def _passed(call: keras.KerasTensor) -> list[Any]:
    """Returns what the call of a nested model passed to it, in the order of its inputs."""
    model, (args, kwargs) = producer(call), arguments_of(call)
    passed = args[0] if args else kwargs["inputs"]
    if isinstance(passed, dict) and not isinstance(input_structure(model), dict):
        return [passed.get(own.name) for own in model.inputs]  # Keras pairs them by name
    return keras.tree.flatten(passed)
