"""Whether a teacher and a student are models that can be distilled, and go together."""

from collections.abc import Sequence
from typing import Any

import keras

from dskd_keras import checks, endings, graph
from dskd_keras.errors import InputError, unknown_name, wrong
from dskd_keras.keras_internals import (
    flat_layers,
    input_structure,
    output_structure,
    producer,
)


class DistilledOutput:
    """Which of a student's outputs is compared with the teacher's.

    Args:
        student: A functional or Sequential model.
        wanted: As in `output_index`.

    Attributes:
        index: Its place among the flattened outputs.
        classes: Size of its last axis.
        is_alone: Whether the student has no other output.

    Raises:
        InputError: There is no such output, or it gives no logits.
    """

    def __init__(self, student: keras.Model, wanted: str | int | None) -> None:
        self.index = output_index("student", student, wanted)
        self.classes = check_logits("student", student, self.index)
        self.is_alone = len(student.outputs) == 1
        self._names = [output_names(student)[self.index]]
        if not self.is_alone:
            self._names.append(student.output_names[self.index])

    def of(self, structure: Any) -> Any:
        """Returns its part of labels, losses or weights that are given for all outputs."""
        if self.is_alone:
            return structure
        if isinstance(structure, dict):
            return next((structure[name] for name in self._names if name in structure), None)
        return structure[self.index] if isinstance(structure, (list, tuple)) else structure


def output_index(role: str, model: keras.Model, wanted: str | int | None) -> int:
    """Returns which output of a model is to be distilled, counted in flattened order.

    Args:
        role: `"teacher"` or `"student"`.
        model: A functional or Sequential model.
        wanted: The key of a dict of outputs, the name of the layer that gives it, its place in a
            list, or None for the only one.

    Raises:
        InputError: It is none of the model's outputs, or there are several and none is named.
    """
    names = output_names(model)
    field = f"{role}_output"
    if wanted is None:
        if len(names) > 1:
            raise InputError(
                f"{field}: None, but '{model.name}' has {len(names)} outputs. Name the one with "
                f"the logits to distil: {', '.join(map(repr, names))}."
            )
        return 0
    if wanted in names:
        return names.index(wanted)
    of_layers = [producer(tensor).name for tensor in model.outputs]
    if wanted in of_layers:
        return of_layers.index(wanted)
    if isinstance(wanted, int) and not isinstance(wanted, bool) and 0 <= wanted < len(names):
        return wanted
    raise unknown_name(field, wanted, names)


def output_names(model: keras.Model) -> list[str]:
    """Returns the names of a model's outputs, in flattened order: keys, or those of layers."""
    structure = output_structure(model)
    if isinstance(structure, dict):
        # Keras flattens dicts in the order of their keys.
        return [key for key in sorted(structure) for _ in keras.tree.flatten(structure[key])]
    return [producer(tensor).name for tensor in model.outputs]


def check_model(role: str, model: Any) -> None:
    """Raises `InputError` unless a teacher or student is a model whose layers can be seen."""
    if isinstance(model, keras.Model) and not graph.has_graph(model):
        name = type(model).__name__
        sequential = isinstance(model, keras.Sequential)
        advice = (
            "begin it with keras.Input"
            if sequential
            else f"wrap it, keras.Model(inputs, model(inputs)) with inputs = keras.Input(...), "
            f"whose layer '{model.name}' then has its outputs"
            + (
                ", or let it teach as dskd_keras.Teacher(model, logits=..., features=...)"
                if role == "teacher"
                else ""
            )
        )
        raise InputError(f"{role}: {name} '{model.name}' has no graph of layers: {advice}.")
    graph.check_graph(role, model)
    for tensor in model.inputs:
        if tensor.dtype == "string" and keras.backend.backend() != "tensorflow":
            raise InputError(
                f"{role}: input '{tensor.name}' of '{model.name}' takes strings, which only "
                "TensorFlow computes with. Vectorise the text before: give the model integers."
            )


def check_logits(role: str, model: keras.Model, output: int) -> int:
    """Returns the number of classes of a model that gives logits.

    Raises:
        InputError: It gives something else.
    """
    tensor = model.outputs[output]
    if not 2 <= len(tensor.shape) <= 5 or tensor.shape[-1] is None:
        raise InputError(
            f"{role}: '{model.name}' gives {tuple(tensor.shape)}, but should give logits [B, C], "
            "or [B, T, C], [B, H, W, C] for each position."
        )
    endings.check_logits(role, model, output)
    return tensor.shape[-1]


def check_classes(classes: Any, of_teacher: int) -> list[int] | None:
    """Returns `teacher_classes` as a list of indices, or None.

    Raises:
        InputError: They are no different indices of the teacher's classes.
    """
    if classes is None:
        return None
    rule = f"different whole numbers from 0 to {of_teacher - 1}, one for each of the student's"
    try:
        chosen = [checks.whole("teacher_classes", number, 0) for number in classes]
    except TypeError:
        raise wrong("teacher_classes", classes, rule) from None
    if not chosen or len(set(chosen)) < len(chosen) or max(chosen) >= of_teacher:
        raise wrong("teacher_classes", classes, rule)
    return chosen


def check_same_classes(teacher: str, student: str, of_teacher: int, of_student: int) -> None:
    """Raises `InputError` unless both give logits of so many classes."""
    if of_teacher != of_student:
        raise InputError(
            f"teacher: '{teacher}' gives {of_teacher} logits, student '{student}' {of_student}. "
            "They should have the same classes; teacher_classes=[...] picks some of the teacher's."
        )


def check_same_positions(teacher: keras.KerasTensor, student: keras.KerasTensor) -> None:
    """Raises `InputError` unless the logits of both have positions of one kind and size."""
    shapes = [tuple(tensor.shape[1:-1]) for tensor in (teacher, student)]
    if len(shapes[0]) != len(shapes[1]) or any(
        None not in (a, b) and a != b for a, b in zip(*shapes, strict=True)
    ):
        raise InputError(
            f"teacher: its logits have the shape {tuple(teacher.shape)}, the student's "
            f"{tuple(student.shape)}. They should have the same positions."
        )


def check_same_inputs(teacher: keras.Model, student: keras.Model) -> None:
    """Raises `InputError` unless the teacher takes the student's batches as they are."""
    structures = [input_structure(model) for model in (teacher, student)]
    advice = "give teacher_inputs, a function from the student's batch to the teacher's."
    if isinstance(structures[0], dict) and isinstance(structures[1], dict):
        missing = sorted(structures[0].keys() - structures[1].keys())
        if missing:
            raise InputError(
                f"teacher: '{teacher.name}' takes {', '.join(map(repr, structures[0]))}, student "
                f"'{student.name}' {', '.join(map(repr, structures[1]))}. Where a batch holds all "
                f"of them, or they can be computed, {advice}"
            )
        structures[1] = {name: structures[1][name] for name in structures[0]}
    shapes = [
        [tuple(x.shape[1:]) for x in keras.tree.flatten(structure)] for structure in structures
    ]
    alike = len(shapes[0]) == len(shapes[1]) and all(
        len(a) == len(b) and all(m == n or None in (m, n) for m, n in zip(a, b, strict=True))
        for a, b in zip(*shapes, strict=True)
    )
    if not alike:
        taken = [", ".join(map(str, of_model)) for of_model in shapes]
        raise InputError(
            f"teacher: '{teacher.name}' takes {taken[0]}, student '{student.name}' {taken[1]}. "
            f"They should take the same inputs; otherwise {advice}"
        )


def check_no_shared_weights(teachers: Sequence[keras.Model], student: keras.Model) -> None:
    """Raises `InputError` where a teacher and the student share the weights of a layer."""
    for teacher in teachers:
        frozen = {id(variable) for variable in teacher.variables}
        for layer in flat_layers(student)[1:]:
            if any(id(variable) in frozen for variable in layer.variables):
                raise InputError(
                    f"teacher: '{teacher.name}' and the student share the weights of layer "
                    f"'{layer.name}'. The teacher is frozen: give it weights of its own "
                    "(keras.models.clone_model, set_weights)."
                )
