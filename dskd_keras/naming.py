"""The layers of functional models by name, as `student_layers` and `teacher_layer` take them.

`stage1` is a layer, `backbone/stage1` one in a nested model. Of a layer that is called several
times, `name#0` is the first call. Of a layer with several outputs, `name:0` is the first one, and
`name:key` one in a dict. Both together are `name#1:key`; of a nested model that is called twice,
`backbone#1/stage1` is a layer in the second call.
"""

import itertools
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import keras

from dskd_keras.errors import InputError, unknown_name, wrong
from dskd_keras.keras_internals import (
    arguments_of,
    call_index,
    output_structure,
    outputs_of,
    producer,
)
from dskd_keras.walking import Place, backwards, has_graph

# As many choices an error names where it asks for one of them.
_MOST_CHOICES = 10


class _Part(NamedTuple):
    """What a name says about one level of nesting."""

    layer: str
    call: str | None  # of a layer that is called once it says nothing
    output: str | None

    def __str__(self) -> str:
        call = "" if self.call is None else f"#{self.call}"
        return self.layer + call + ("" if self.output is None else f":{self.output}")


class _Named(NamedTuple):
    parts: tuple[_Part, ...]
    place: Place

    def __str__(self) -> str:
        return "/".join(map(str, self.parts))

    @property
    def is_input(self) -> bool:
        return isinstance(producer(self.place.tensor), keras.layers.InputLayer)


def places_by_name(model: keras.Model) -> dict[str, Place]:
    """Returns all tensors of a model that have a name, except inputs, in the order of its layers.

    These are the outputs of the layers and operations that lead to any of the model's outputs.
    """
    return {str(named): named.place for named in _named(model) if not named.is_input}


def layer_names(model: keras.Model) -> list[str]:
    """Returns the names of all layers that can be named, in the order of the layers."""
    return list(places_by_name(model))


def find(field: str, model: keras.Model, names: Iterable[Any]) -> list[Place]:
    """Returns the places that some names mean.

    Args:
        field: The argument that held the names.
        model: A functional or Sequential model.
        names: The names.

    Raises:
        InputError: A name means none or several, or is none.
    """
    named = list(_named(model))
    by_name = {str(one): one for one in named}
    found = []
    for name in names:
        _check_is_name(field, name)
        if name not in by_name:
            raise _not_found(field, name, named)
        if by_name[name].is_input:
            raise InputError(f"{field}: layer '{name}' has no usable feature map: it is the input.")
        found.append(by_name[name].place)
    return found


def check_names(field: str, model: keras.Model, names: Iterable[Any]) -> None:
    """Raises `InputError` unless all of `names`, which `field` held, are those of layers.

    A layer with several calls or outputs may be named as a whole.
    """
    named = list(_named(model))
    known = {str(one) for one in named}
    known |= {"/".join(part.layer for part in one.parts) for one in named}
    for name in names:
        _check_is_name(field, name)
        if name not in known:
            raise _not_found(field, name, named)


def names_inside(layer: Any, names: Iterable[str]) -> list[str]:
    """Returns those of `names` that reach into a nested model, as that model knows them."""
    inside = []
    for name in names:
        outer, _, inner = name.partition("/")
        start, _, call = outer.rpartition("#")
        if inner and (outer == layer.name or (start == layer.name and call.isdecimal())):
            inside.append(inner)
    return inside


def listed(names: Sequence[str]) -> str:
    """Returns `'a', 'b' or 'c'`, for an error that asks for one of them."""
    shown = [repr(name) for name in names[:_MOST_CHOICES]]
    if len(names) > _MOST_CHOICES:
        return f"{', '.join(shown)}, … ({len(names)} in all)"
    return " or ".join(filter(None, [", ".join(shown[:-1]), shown[-1]]))


def _check_is_name(field: str, name: Any) -> None:
    if isinstance(name, keras.Operation):
        kind = _with_article(type(name).__name__)
        raise InputError(f"{field}: {kind}, where its name, '{name.name}', is expected.")
    if not isinstance(name, str):
        raise wrong(field, name, "the name of a layer")


def _named(
    model: Any, calls: tuple[Any, ...] = (), outer: tuple[_Part, ...] = ()
) -> Iterator[_Named]:
    # By layer, and by the number of a call, one of its outputs.
    found: dict[int, dict[int, Any]] = {}
    for tensor in backwards(*model.outputs):
        found.setdefault(id(producer(tensor)), {}).setdefault(call_index(tensor), tensor)
    layers = getattr(model, "operations", None) or model.layers  # a Sequential has no operations
    names = {layer.name for layer in layers}
    for layer in layers:
        of_layer = sorted(found.get(id(layer), {}).items())
        for number, (_, tensor) in enumerate(of_layer):
            call = str(number) if len(of_layer) > 1 else None
            for key, output in zip(_output_keys(tensor), outputs_of(tensor), strict=True):
                part = _Part(layer.name, call, key)
                if str(part) == layer.name or str(part) not in names:  # else a layer is called so
                    yield _Named((*outer, part), Place(output, calls))
            if has_graph(layer):
                part = _Part(layer.name, call, None)
                yield from _named(layer, (*calls, tensor), (*outer, part))


def _output_keys(tensor: keras.KerasTensor) -> list[str | None]:
    """Returns what the outputs of a call are named by: keys or numbers, None where it gives one."""
    count = len(outputs_of(tensor))
    if count == 1:
        return [None]
    layer = producer(tensor)
    try:
        if has_graph(layer):
            structure = output_structure(layer)
        else:
            args, kwargs = arguments_of(tensor)
            structure = layer.compute_output_spec(*args, **kwargs)
        keys = [".".join(map(str, path)) for path, _ in keras.tree.flatten_with_path(structure)]
    except Exception:  # whatever a layer of the user's raises
        keys = []
    return list(keys) if len(keys) == count else [str(number) for number in range(count)]


def _not_found(field: str, name: str, named: Sequence[_Named]) -> InputError:
    """Returns the error for a name that means none of the places, or several."""
    several = _meant(name, named)
    if several:
        return InputError(
            f"{field}: {_missing(several)}: name {listed([str(one) for one in several])}."
        )
    for count in range(name.count("/"), 0, -1):
        outer = name.rsplit("/", count)[0]
        opaque = _meant(outer, named)
        if opaque and not has_graph(layer := producer(opaque[0].place.tensor)):
            kind = _with_article(type(layer).__name__)
            return InputError(
                f"{field}: {name!r} reaches into '{outer}', {kind}, which has no graph of layers. "
                f"Name {listed([str(one) for one in opaque])} instead."
            )
    return unknown_name(field, name, [str(one) for one in named if not one.is_input])


def _meant(name: str, named: Sequence[_Named]) -> list[_Named]:
    """Returns the places that a name means if it leaves out calls or outputs."""
    meant = []
    for one in named:
        shorter = [
            {str(part), str(part._replace(call=None)), str(part._replace(output=None)), part.layer}
            for part in one.parts
        ]
        if name in map("/".join, itertools.product(*shorter)):
            meant.append(one)
    return meant


def _missing(several: Sequence[_Named]) -> str:
    """Returns in words what some places, that one name means, are several of."""
    reasons = []
    for level in range(len(several[0].parts)):
        parts = [one.parts[level] for one in several]
        path = "/".join(part.layer for part in several[0].parts[: level + 1])
        calls, outputs = ({part[index] for part in parts} for index in (1, 2))
        words = [f"is called {len(calls)} times"] if len(calls) > 1 else []
        words += [f"gives {len(outputs)} outputs"] if len(outputs) > 1 else []
        reasons += [f"'{path}' {' and '.join(words)}"] if words else []
    return ", ".join(reasons)


def _with_article(kind: str) -> str:
    return f"{'an' if kind[0] in 'AEIOU' else 'a'} {kind} layer"
