"""The layers that are supervised, and that supervise, where the user names none."""

import math
from collections.abc import Callable, Sequence
from typing import Any

import keras
from keras import layers

from dskd_keras.errors import InputError
from dskd_keras.naming import listed, places_by_name
from dskd_keras.walking import Graph, Place

# What they give is an image with a border, or a part of one, rather than features.
_RESIZING = (
    layers.ZeroPadding1D,
    layers.ZeroPadding2D,
    layers.ZeroPadding3D,
    layers.Cropping1D,
    layers.Cropping2D,
    layers.Cropping3D,
    layers.CenterCrop,
    layers.RandomCrop,
    layers.Resizing,
    layers.UpSampling1D,
    layers.UpSampling2D,
    layers.UpSampling3D,
)


class FeatureMaps:
    """What there is on the way to one output of a model.

    Args:
        model: A functional or Sequential model.
        output: Which of its outputs, counted in flattened order.

    Attributes:
        graph: The graph that leads to the output.
        names: The names of places as `Distiller` takes them, by the places' numbers. Where a nested
            model gives what a layer inside computes, it is the outer name.
        classifiers: The numbers of the outputs of the last layers with kernels: those that only a
            layer without a kernel follows, such as a softmax or a batch normalisation.
        nearest: The numbers of the feature maps that are the last before the classifiers.
    """

    def __init__(self, model: keras.Model, output: int = 0) -> None:
        end = Place(model.outputs[output])
        self.graph = graph = Graph(end)
        self._end = graph.number(end)
        # The outer one of two names comes after the inner one.
        by_place = {place.key: name for name, place in places_by_name(model).items()}
        self.names: dict[int, str] = {}
        for number in reversed(range(len(graph.places))):
            name = by_place.get(graph.places[number].key)
            if name is not None:
                self.names.setdefault(number, name)
            if graph.layers[number] is None and number in self.names:
                self.names.update(dict.fromkeys(graph.before[number], self.names[number]))
        self._kernels = [_has_kernel(layer) for layer in graph.layers]
        self._learned: list[bool] = []
        for number, before in enumerate(graph.before):
            learned = self._kernels[number] or any(self._learned[n] for n in before)
            self._learned.append(learned)
        back = graph.back_from([self._end], through=lambda number: not self._kernels[number])
        self.classifiers = [number for number in back if self._kernels[number]]
        back = graph.back_from(self._read(), through=lambda number: not self.is_map(number))
        self.nearest = [number for number in back if self.is_map(number)]

    def is_learned(self, number: int) -> bool:
        """Returns whether a layer or operation gives floats here, at or after a kernel."""
        return (
            self.graph.layers[number] is not None
            and number in self.names
            and self._learned[number]
            and "float" in self.graph.places[number].tensor.dtype
        )

    def is_map(self, number: int) -> bool:
        """Returns whether a place has learned features at more than one position."""
        return (
            any(size != 1 for size in self.graph.positions(number))
            and not isinstance(self.graph.layers[number], _RESIZING)
            and self.is_learned(number)
        )

    def vectors(self) -> list[int]:
        """Returns the numbers of what the classifiers read, where it is learned itself."""
        same = self.graph.back_from(
            self._read(), through=lambda number: self.graph.layers[number] is None
        )
        return [number for number in same if self.is_learned(number)]

    def before_classifiers(self, which: Callable[[int], bool]) -> list[int]:
        """Returns the numbers of those places before the classifiers, the first ones first."""
        back = self.graph.back_from(self._read(), through=lambda number: True)
        return [number for number in sorted(back) if which(number)]

    def on_all_paths(self, start: int) -> set[int]:
        """Returns the numbers of the places that every path from a place to the output passes."""
        # As many paths lead from the start to the output through a place on all of them as there
        # are in all.
        count = len(self.graph.places)
        leading_to, leading_on = [0] * count, [0] * count
        leading_to[start], leading_on[self._end] = 1, 1
        for number in range(start + 1, count):
            leading_to[number] = sum(leading_to[n] for n in self.graph.before[number])
        for number in reversed(range(start, count)):
            for earlier in self.graph.before[number]:
                leading_on[earlier] += leading_on[number]
        return {
            number
            for number in range(start, count)
            if leading_to[number] * leading_on[number] == leading_on[start]
        }

    def joins(self, number: int) -> bool:
        """Returns whether a place is computed from several others, as a residual sum is."""
        return len(set(self.graph.before[number])) > 1

    def has_kernel(self, number: int) -> bool:
        """Returns whether a layer with a kernel computes a place."""
        return self._kernels[number]

    def _read(self) -> list[int]:
        return [number for one in self.classifiers for number in self.graph.before[one]]


def default_teacher_layer(model: keras.Model, output: int = 0) -> str:
    """Returns the name of a teacher's last feature map: what `teacher_layer=None` means.

    From the output it goes back, through nested models, to the last layers with kernels, the
    classifiers, and from what these read to the nearest feature map that has more than one position
    and is learned: a layer with a kernel comes before it or gives it. Padding, cropping and
    resizing don't count. In a model without such maps, such as a perceptron, it is what the
    classifier reads.

    Args:
        model: A functional or Sequential model.
        output: Which of its outputs are the logits, counted in flattened order.

    Returns:
        A name that `tap` takes.

    Raises:
        InputError: There are several, or none.
    """
    maps = FeatureMaps(model, output)
    found = maps.nearest or maps.vectors()
    names = list(dict.fromkeys(maps.names[number] for number in found))
    if not names:
        raise InputError(
            f"teacher_layer: '{model.name}' has no feature map before its classifier. Name a "
            "layer, or set deep_feature_weight and deep_prediction_weight to 0."
        )
    if len(names) > 1:
        raise InputError(
            f"teacher_layer: '{model.name}' has {len(names)} feature maps that could be its last "
            f"one. Name {listed(names)}."
        )
    return names[0]


def auto_student_layers(model: keras.Model, output: int = 0) -> list[str]:
    """Returns the names of a student's layers to supervise: what `student_layers="auto"` means.

    These are the last layers of each resolution. A layer counts that gives a learned feature map
    with more than one position and that all paths pass from the first map of this resolution to the
    output: the first convolution within a residual block does not.

    Args:
        model: A functional or Sequential model.
        output: Which of its outputs are the logits, counted in flattened order.

    Returns:
        Names that `tap` takes, the shallowest layer first.

    Raises:
        InputError: The model has one resolution, or unknown ones.
    """
    maps = FeatureMaps(model, output)
    if found := _last_of_each_resolution(maps):
        return found
    sizes = {maps.graph.positions(number) for number in maps.before_classifiers(maps.is_map)}
    if any(None in size for size in sizes):
        reason = "whose feature maps have unknown sizes"
    elif not sizes:
        reason = "which has no feature maps with positions"
    else:
        reason = "whose feature maps have all one resolution"
    blocks = _blocks(maps)
    advice = f"Name some layers, such as {listed(blocks)}." if blocks else "Name some layers."
    raise InputError(
        "student_layers: 'auto' takes the last layer of each resolution, which can't be told "
        f"in '{model.name}', {reason}. {advice}"
    )


def auto_teacher_layers(model: keras.Model, output: int = 0) -> list[str]:
    """Returns the names of the layers of a teacher that may supervise: `teacher_layer="auto"`.

    They are the last layers of each resolution; the last feature map alone where resolutions can't
    be told.

    Args:
        model: A functional or Sequential model.
        output: Which of its outputs are the logits, counted in flattened order.

    Returns:
        Names that `tap` takes, the shallowest layer first.

    Raises:
        InputError: There is no feature map, or several could be the last.
    """
    found = _last_of_each_resolution(FeatureMaps(model, output))
    return found or [default_teacher_layer(model, output)]


def matching_teacher_layers(
    teacher: Sequence[str], student: keras.Model, output: int, names: Sequence[str]
) -> list[str]:
    """Returns for each layer of a student the teacher's layer of the same place.

    The resolutions of both are counted from the output. The last layer of the student's last
    resolution gets that of the teacher's last, and so on; of those that the student has more than
    the teacher each gets the teacher's first. A layer without a resolution gets the teacher's last.

    Args:
        teacher: What `auto_teacher_layers` gave.
        student: A functional or Sequential model.
        output: Which of its outputs is distilled, counted in flattened order.
        names: Of the student's layers.
    """
    maps = FeatureMaps(student, output)
    numbers_by_key = {place.key: number for number, place in enumerate(maps.graph.places)}
    by_end = _by_end(maps)
    # Counted from the output, the last one is 1.
    from_output = {
        number: place
        for place, end in enumerate(sorted(by_end, reverse=True), start=1)
        for number in by_end[end]
    }
    places = places_by_name(student)
    found = []
    for name in names:
        number = numbers_by_key.get(places[name].key)
        while number is not None and maps.graph.layers[number] is None:
            number = maps.graph.before[number][0]  # what a nested model gives is a layer's inside
        place = 1 if number is None else from_output.get(number, 1)
        found.append(teacher[-min(place, len(teacher))])
    return found


def resolutions(maps: FeatureMaps) -> list[list[int]]:
    """Returns the numbers of the feature maps of each resolution, the first ones first."""
    found: list[list[int]] = []
    for number in maps.before_classifiers(maps.is_map):
        size = maps.graph.positions(number)
        for numbers in reversed(found):
            if _alike(size, maps.graph.positions(numbers[-1])):
                numbers.append(number)
                break
        else:
            found.append([number])
    # The shapes in a channel shuffle or between attention heads are no resolutions: no layer with a
    # kernel gives them.
    return [numbers for numbers in found if any(map(maps.has_kernel, numbers))]


def _last_of_each_resolution(maps: FeatureMaps) -> list[str]:
    """Returns the names of the last layers of each resolution; none where there is one alone."""
    ends = sorted(_by_end(maps))
    return [maps.names[number] for number in ends] if len(ends) > 1 else []


def _by_end(maps: FeatureMaps) -> dict[int, list[int]]:
    """Returns the numbers of each resolution's feature maps by that of its last layer."""
    found = resolutions(maps)
    if any(None in maps.graph.positions(numbers[0]) for numbers in found):
        return {}
    return {max(maps.on_all_paths(numbers[0]).intersection(numbers)): numbers for numbers in found}


def _alike(size: Sequence[Any], other: Sequence[Any]) -> bool:
    """Returns whether two sizes are one resolution, as before and after an unpadded convolution."""
    if None in (*size, *other):
        return size == other
    if len(size) != len(other):  # an image cut into patches, with a token more
        size, other = [math.prod(size)], [math.prod(other)]
    return all(max(a, b) <= 1.5 * min(a, b) for a, b in zip(size, other, strict=True))


def _blocks(maps: FeatureMaps) -> list[str]:
    """Returns the names of the layers that the blocks of a model end in, as far as can be told."""
    learned = maps.before_classifiers(maps.is_learned)
    if not learned:
        return []
    on_all_paths = maps.on_all_paths(learned[0])
    trunk = [number for number in learned if number in on_all_paths]
    ends = [number for number in trunk if maps.joins(number)]
    ends = ends or [number for number in trunk if maps.has_kernel(number)]
    return list(dict.fromkeys(maps.names[number] for number in ends))


def _has_kernel(layer: Any) -> bool:
    # A batch normalisation has vectors alone. `Normalization` is preprocessing.
    return not isinstance(layer, layers.Normalization) and any(
        len(weight.shape) > 1 for weight in getattr(layer, "weights", None) or ()
    )
