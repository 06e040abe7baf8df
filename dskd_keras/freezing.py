"""Makes of what a user gives as teacher what a training step runs."""

import dataclasses
from collections.abc import Iterable, Sequence
from typing import Any

import keras

from dskd_keras import ensemble, graph, naming, pairing
from dskd_keras.ensemble import Ensemble
from dskd_keras.errors import InputError, wrong
from dskd_keras.pairing import DistilledOutput
from dskd_keras.teacher import FrozenTeacher, FunctionTeacher, Teacher


@dataclasses.dataclass(frozen=True)
class TeacherSettings:
    """The arguments of `Distiller` that say how a teacher is run, under its names."""

    teacher_layer: str | Sequence[str] | None = "auto"
    teacher_output: str | int | None = None
    teacher_classes: Sequence[int] | None = None
    teacher_inputs: Any = None
    teacher_weighting: str | Sequence[float] = "uniform"


def freeze(
    teacher: Any,
    student: keras.Model,
    output: DistilledOutput,
    layers: Sequence[str],
    kinds: dict[str, bool],
    settings: TeacherSettings,
) -> FrozenTeacher | FunctionTeacher | Ensemble | None:
    """Returns the teacher, or teachers, frozen; None where no term needs one.

    Args:
        teacher: A model, a `Teacher`, a list of these, or None.
        student: The student.
        output: Which of the student's outputs is distilled.
        layers: Names of the student's supervised layers.
        kinds: Which terms are computed, as in `Objective`.
        settings: How it is run.

    Raises:
        InputError: The teacher can't teach this student; the message says which argument is wrong.
    """
    several = isinstance(teacher, (list, tuple))
    each = list(teacher) if several else [teacher]
    each = [model for model in each if model is not None]
    for model in each:
        if not isinstance(model, Teacher):
            pairing.check_model("teacher", model)
    models = [model for model in each if isinstance(model, keras.Model)]
    pairing.check_no_shared_weights(models, student)
    predictions = kinds["prediction"] or kinds["deep_prediction"]
    features = kinds["deep_prediction"] or kinds["deep_feature"]
    if not (predictions or features):
        if kinds["label"]:
            return None
        raise InputError(
            "label_weight: 0.0 leaves no term. It should be positive, or prediction_weight, "
            "or, with student_layers, deep_prediction_weight or deep_feature_weight."
        )
    if not each:
        raise InputError(
            "teacher: None, but prediction_weight, deep_prediction_weight or "
            "deep_feature_weight is positive. Give a teacher, or set them to 0."
        )
    if predictions:
        for model in models:
            _check_classes(model, student, output, settings)
    layer = settings.teacher_layer
    if layer == "auto":
        layer = None
        if features and layers and len(models) == len(each):
            layer = _matching(models, student, output, layers, predictions, settings)
    elif layer is not None and not isinstance(layer, str):
        if isinstance(layer, keras.Operation) or not isinstance(layer, Iterable):
            naming.find("teacher_layer", models[0], [layer])  # which says what it should be
        layer = list(layer)
        if len(layer) != len(layers):
            rule = f"one name, or a list of {len(layers)}, one for each student layer"
            raise wrong("teacher_layer", layer, rule)
    frozen = [
        _function(model, student, output, predictions, features, kinds, settings)
        if isinstance(model, Teacher)
        else _model(model, student, predictions, features, layer, settings)
        for model in each
    ]
    if not several:
        return frozen[0]
    return Ensemble(frozen, ensemble.check_weights(settings.teacher_weighting, len(each)))


def _matching(
    teachers: Sequence[keras.Model],
    student: keras.Model,
    output: DistilledOutput,
    layers: Sequence[str],
    predictions: bool,
    settings: TeacherSettings,
) -> list[str] | None:
    """Returns the teacher's layer for each layer of the student; None for the last map.

    That is where a teacher's resolutions can't be told, or several teachers differ in them.
    """
    found = []
    for teacher in teachers:
        candidates = graph.auto_teacher_layers(
            teacher, _logits_index(teacher, predictions, settings)
        )
        if len(candidates) < 2:
            return None
        found.append(graph.matching_teacher_layers(candidates, student, output.index, layers))
    return found[0] if all(names == found[0] for names in found) else None


def _logits_index(teacher: keras.Model, predictions: bool, settings: TeacherSettings) -> int:
    """Returns which output of a teacher leads to its logits, counted in flattened order."""
    if not predictions and settings.teacher_output is None:
        return 0
    return pairing.output_index("teacher", teacher, settings.teacher_output)


def _check_classes(
    teacher: keras.Model,
    student: keras.Model,
    output: DistilledOutput,
    settings: TeacherSettings,
) -> None:
    index = pairing.output_index("teacher", teacher, settings.teacher_output)
    classes = pairing.check_logits("teacher", teacher, index)
    chosen = pairing.check_classes(settings.teacher_classes, classes)
    count = classes if chosen is None else len(chosen)
    pairing.check_same_classes(teacher.name, student.name, count, output.classes)
    pairing.check_same_positions(teacher.outputs[index], student.outputs[output.index])


def _model(
    teacher: keras.Model,
    student: keras.Model,
    predictions: bool,
    features: bool,
    layer: str | list[str] | None,
    settings: TeacherSettings,
) -> FrozenTeacher:
    before = settings.teacher_inputs
    if before is None:
        pairing.check_same_inputs(teacher, student)
    elif not callable(before):
        raise wrong("teacher_inputs", before, "a function of a batch, or a functional model")
    index = _logits_index(teacher, predictions, settings)
    classes = None if settings.teacher_classes is None else list(settings.teacher_classes)
    return FrozenTeacher(teacher, predictions, features, layer, index, classes, before)


def _function(
    teacher: Teacher,
    student: keras.Model,
    output: DistilledOutput,
    predictions: bool,
    features: bool,
    kinds: dict[str, bool],
    settings: TeacherSettings,
) -> FunctionTeacher:
    # Where maps are not compared, heads need no more than a shape, which the student has too.
    features = features and (kinds["deep_feature"] or teacher.features is not None)
    classes = None if settings.teacher_classes is None else list(settings.teacher_classes)
    frozen = FunctionTeacher(
        teacher, student, predictions, features, classes, settings.teacher_inputs
    )
    if frozen.classes is not None:
        pairing.check_same_classes("Teacher", student.name, frozen.classes, output.classes)
    return frozen


def head_shapes(
    frozen: FrozenTeacher | FunctionTeacher | Ensemble | None,
    names: Sequence[str],
    student: keras.Model,
    output: DistilledOutput,
    count: int,
) -> list[Any]:
    """Returns for each of so many supervised layers the shape that its head projects to.

    Args:
        frozen: The teacher.
        names: The keys of its maps, one for each layer; empty where it has none.
        student: The student. Where the teacher has no maps, heads project to its own last one.
        output: Which of its outputs is distilled.
        count: How many layers are supervised.
    """
    if frozen is not None and names:
        return [frozen.feature_shapes[name] for name in names]
    if not count:
        return []
    own = graph.default_teacher_layer(student, output.index)
    (tensor,) = graph.tap("student_layers", student, [own]).tensors
    return [tuple(graph.channels_last(tensor).shape[1:])] * count
