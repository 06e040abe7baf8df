"""What there is to distil in a model: its layers, under the names that `Distiller` takes."""

import math
import sys
from collections.abc import Callable
from typing import NamedTuple

import keras

from dskd_keras.errors import InputError
from dskd_keras.feature_maps import (
    FeatureMaps,
    auto_student_layers,
    auto_teacher_layers,
    resolutions,
)
from dskd_keras.graph import check_graph
from dskd_keras.naming import places_by_name
from dskd_keras.walking import Graph

# The columns of what goes to a file or a pipe, where rich would assume 80.
_WIDTH = 120


_LEGEND = {
    "student": 'student: one that student_layers="auto" takes.',
    "teacher": 'teacher: one that teacher_layer="auto" takes.',
}


class Row(NamedTuple):
    """A layer of a model.

    Attributes:
        name: As `student_layers` and `teacher_layer` take it.
        shape: That of its output, with the batch.
        section: The number of its section, from 0: a new resolution begins one.
        parameters: The number of weights that its output depends on.
    """

    name: str
    shape: tuple[int | None, ...]
    section: int
    parameters: int


def summary(model: keras.Model, output: int = 0) -> None:
    """Prints the layers of a model under the names that `Distiller` takes.

    For every layer, also of nested models, it says the shape of the output, how many of the model's
    weights the output depends on, and whether `"auto"` takes it as a student's layer or as a
    teacher's. Where these can't be told, the reason stands below. A new resolution begins a new
    section.

    Args:
        model: A functional or Sequential model.
        output: Which of its outputs are the logits, counted in flattened order. Defaults to the
            first.

    Raises:
        InputError: The model has no graph of layers.

    Example:

    ```python
    dskd_keras.summary(student)
    ```
    """
    # Keras prints its own summaries with it.
    from rich import box
    from rich.console import Console
    from rich.table import Table

    check_graph("model", model)
    total = model.count_params()
    taken: dict[str, list[str]] = {}
    notes = []
    suggestions: dict[str, Callable[[], list[str]]] = {
        "student": lambda: auto_student_layers(model, output),
        "teacher": lambda: auto_teacher_layers(model, output),
    }
    for role, suggest in suggestions.items():
        try:
            for name in suggest():
                taken.setdefault(name, []).append(role)
        except InputError as doubt:
            notes.append(str(doubt))
    table = Table(
        title=f"{model.name}: {total:,} parameters", title_justify="left", box=box.SIMPLE_HEAD,
        padding=(0, 1, 0, 0), pad_edge=False,
    )  # fmt: skip
    table.add_column("layer", overflow="fold")
    table.add_column("output", overflow="fold")
    table.add_column("parameters up to it", justify="right")
    table.add_column("suggested as")
    section = 0
    listed = rows(model, output)
    for row in listed:
        if row.section != section:
            table.add_section()
            section = row.section
        shape = ", ".join(["B", *("?" if size is None else str(size) for size in row.shape[1:])])
        share = f"{row.parameters:,} {row.parameters / max(total, 1):6.1%}"
        table.add_row(row.name, f"[{shape}]", share, ", ".join(taken.get(row.name, ())))
    # Without colours and markup: shapes and names may look like it.
    width = None if sys.stdout.isatty() else _WIDTH
    console = Console(width=width, highlight=False, markup=False, soft_wrap=True)
    console.print(table)
    shown = {role for roles in taken.values() for role in roles}
    legend = [text for role, text in _LEGEND.items() if role in shown]
    if any(None in row.shape[1:] for row in listed):
        legend.append("?: a size that is known when the model runs.")
    for line in (*legend, *notes):
        console.print(line)


def rows(model: keras.Model, output: int = 0) -> list[Row]:
    """Returns what `summary` prints, in the order of the layers."""
    named = places_by_name(model)
    maps = FeatureMaps(model, output)
    sections = resolutions(maps)
    section_of = {
        maps.graph.places[number].key: section
        for section, numbers in enumerate(sections)
        for number in numbers
    }
    graph = Graph(*named.values())
    parameters = _parameters(graph)
    waiting = {place.key for place in named.values()} & section_of.keys()
    found, section = [], 0
    for name, place in named.items():
        # What is no map of a known resolution belongs to what stands before it.
        section = section_of.get(place.key, section)
        if not waiting:
            section = len(sections)  # the classifier
        waiting.discard(place.key)
        number = graph.number(place)
        found.append(Row(name, graph.shape(number), section, parameters[number]))
    return found


def _parameters(graph: Graph) -> list[int]:
    """Returns the number of weights that each place of a graph depends on."""
    bits: dict[int, int] = {}
    sizes: list[int] = []
    counts: list[int] = []
    sets: list[int] = []
    for layer, before in zip(graph.layers, graph.before, strict=True):
        # A set of weights as the bits of a number: there is one for every place.
        own = 0
        for earlier in before:
            own |= sets[earlier]
        for weight in getattr(layer, "weights", None) or ():
            if id(weight) not in bits:
                bits[id(weight)] = len(sizes)
                sizes.append(math.prod(weight.shape))
            own |= 1 << bits[id(weight)]
        sets.append(own)
        counts.append(sum(size for bit, size in enumerate(sizes) if own >> bit & 1))
    return counts
