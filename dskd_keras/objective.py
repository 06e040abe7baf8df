"""The objective of a training step: the weighted sum of its terms."""

import dataclasses
import inspect
from collections.abc import Sequence
from typing import Any

import keras
from keras import ops

from dskd_keras import ensemble, heads, losses, terms
from dskd_keras.coefficients import Coefficients
from dskd_keras.ensemble import Ensemble
from dskd_keras.errors import InputError
from dskd_keras.labels import Labels
from dskd_keras.pairing import DistilledOutput
from dskd_keras.teacher import FrozenTeacher, FunctionTeacher
from dskd_keras.terms import Predictions, Terms, in_full_precision
from dskd_keras.weighting import Weighting


@dataclasses.dataclass(frozen=True)
class Strategies:
    """What the terms are computed with.

    Attributes:
        prediction_loss: A `keras.losses.Loss`, a function, or None where the compiled loss decides.
        feature_loss: A `keras.losses.Loss` or a function.
        shares_temperature: Whether the prediction loss takes the distiller's temperature: one by
            name, and a function with such an argument. An object has its own.
    """

    prediction_loss: Any
    feature_loss: Any
    shares_temperature: bool


class Objective:
    """Computes the terms of a step and adds them up.

    It is no Keras layer: what has variables belongs to the distiller, which tracks and saves it.

    Args:
        kinds: Which of the terms `"label"`, `"prediction"`, `"deep_prediction"` and
            `"deep_feature"` are computed.
        layers: Names of the supervised layers.
        output: Which of the student's outputs is distilled.
        teacher: As it is run, None where no term needs one.
        strategies: What compares.
        coefficients: Temperature and coefficients.
        weightings: The allocation to the layers, for `"prediction"` and for `"feature"`.
    """

    def __init__(
        self,
        kinds: dict[str, bool],
        layers: Sequence[str],
        output: DistilledOutput,
        teacher: FrozenTeacher | FunctionTeacher | Ensemble | None,
        strategies: Strategies,
        coefficients: Coefficients,
        weightings: dict[str, Weighting],
    ) -> None:
        self.kinds = kinds
        self._layers = layers
        self._output = output
        self._teacher = teacher
        self.strategies = strategies
        self._coefficients = coefficients
        self._weightings = weightings

    def without_deep_terms(self) -> "Objective":
        """Returns the objective of the student's own output alone."""
        kinds = {**self.kinds, "deep_prediction": False, "deep_feature": False}
        return Objective(
            kinds,
            (),
            self._output,
            self._teacher,
            self.strategies,
            self._coefficients,
            self._weightings,
        )

    def term_names(self) -> list[str]:
        """Returns the names of the terms in the logs."""
        names = [f"{kind}_loss" for kind, is_on in self.kinds.items() if is_on]
        deep = [kind for kind in ("deep_prediction", "deep_feature") if self.kinds[kind]]
        for what in ("loss", "allocation"):
            for kind in deep:
                names += [f"{kind}_{what}/{layer}" for layer in self._layers]
        return names

    def check_compiled(self, compiled: Any) -> None:
        """Raises `InputError` where the compiled loss leaves open how predictions are compared."""
        compares = self.kinds["prediction"] or self.kinds["deep_prediction"]
        if compares and self.strategies.prediction_loss is None:
            terms.divergence(self._output.of(compiled), self._output.classes)

    def labels(self, compiled: Any, label: Any, outputs: Any) -> Labels | None:
        """Returns the labels of the distilled output, None where there are none.

        Args:
            compiled: What `compile(loss=...)` got.
            label: The labels, in the structure of the student's outputs.
            outputs: The student's outputs.

        Raises:
            InputError: The labels don't have the shape that the compiled loss takes.
        """
        logits = keras.tree.flatten(outputs)[0 if self._output.is_alone else self._output.index]
        compiled, label = self._output.of(compiled), self._output.of(label)
        if compiled is None or label is None:
            return None
        return Labels(label, logits, compiled)

    def __call__(
        self,
        compiled: Any,
        label: Any,
        teacher: dict[str, Any] | None,
        outputs: heads.Outputs,
        sample_weight: Any,
    ) -> tuple[Terms, Any]:
        """Returns the terms, and how many labels are outside the range (None: not known).

        Args:
            compiled: What `compile(loss=...)` got.
            label: The labels, in the structure of the student's outputs, or None.
            teacher: The teacher's outputs.
            outputs: The student's.
            sample_weight: None, `[B]`, or `[B, *positions]`; a structure where `label` is one.
        """
        teacher = keras.tree.map_structure(in_full_precision, teacher or {})
        logits, deep_logits, deep_features = keras.tree.map_structure(
            in_full_precision, outputs[:3]
        )
        compiled, label = self._output.of(compiled), self._output.of(label)
        of_logits = None
        if label is not None and compiled is not None:
            of_logits = Labels(label, logits, compiled)
        sample_weight = self._output.of(sample_weight)
        terms.check_sample_weight(sample_weight, logits)
        masks = _masks(outputs, teacher)
        valid = None if of_logits is None else of_logits.valid
        if len(logits.shape) > 2:
            valid = both(valid, masks.get("logits"))
        numbers = self._coefficients.in_step()
        found = Terms(self._layers, sample_weight, valid)
        if self.kinds["label"] and self._output.is_alone:
            assert of_logits is not None
            found.add("label_loss", numbers["label_weight"], of_logits.loss(logits))
        if self.kinds["prediction"] or deep_logits:
            compare = self._predictions(compiled, teacher, of_logits, valid, numbers)
            if self.kinds["prediction"]:
                found.add("prediction_loss", numbers["prediction_weight"], compare(logits))
            if deep_logits:
                found.add_deep(
                    "prediction",
                    numbers["deep_prediction_weight"],
                    self._weightings["prediction"],
                    lambda layer: found.of_images(compare(deep_logits[layer]), valid),
                )
        if deep_features:
            keys = dict(
                zip(
                    self._layers,
                    feature_names(self._teacher, self._layers),
                    strict=True,
                )
            )
            found.add_deep(
                "feature",
                numbers["deep_feature_weight"],
                self._weightings["feature"],
                lambda layer: terms.feature_values(
                    found,
                    self.strategies.feature_loss,
                    teacher[keys[layer]],
                    deep_features[layer],
                    masks.get(keys[layer]),
                    masks.get(f"deep/{layer}"),
                ),
            )
        return found, None if of_logits is None else of_logits.outside

    def _predictions(
        self,
        compiled: Any,
        teacher: dict[str, Any],
        label: Labels | None,
        valid: Any,
        numbers: dict[str, Any],
    ) -> Predictions:
        loss = self.strategies.prediction_loss
        if loss is None:
            loss = terms.divergence(compiled, self._output.classes)
        temperature = numbers["temperature"] if self.strategies.shares_temperature else None
        of_teacher, weights = [teacher["logits"]], None
        if isinstance(self._teacher, Ensemble):
            of_teacher = ensemble.of_each(teacher["logits"])
            weights = self._teacher.weights
        if weights == "confidence":
            if label is None:
                raise InputError(
                    "teacher_weighting: 'confidence' needs labels and a compiled loss: compile("
                    "loss=...) and give fit the labels, or choose 'uniform'."
                )
            weights = ensemble.confidence([label.loss(logits) for logits in of_teacher])
        return Predictions(loss, of_teacher, weights, label, valid, temperature)


def _masks(outputs: heads.Outputs, teacher: dict[str, Any]) -> dict[str, Any]:
    """Returns the masks: of the logits, of the teacher's maps by key, of heads by `deep/NAME`."""
    masks = {key.removesuffix("_mask"): m for key, m in teacher.items() if key.endswith("_mask")}
    for key, mask in outputs.masks.items():
        key = key.replace("features/", "deep/", 1)
        masks[key] = both(masks.get(key), mask)
    return masks


def strategies(prediction_loss: Any, feature_loss: Any, classes: int, compares: bool) -> Strategies:
    """Returns the strategies for what a user gave.

    Args:
        prediction_loss: None, a name, a configuration, a loss or a function.
        feature_loss: Likewise, but not None.
        classes: Size of the logits' last axis.
        compares: Whether a term compares predictions.

    Raises:
        InputError: A name is unknown, or the prediction loss can only be zero.
    """
    shares_temperature = prediction_loss is None or isinstance(prediction_loss, str)
    if prediction_loss is not None:
        prediction_loss = losses.get("prediction_loss", prediction_loss)
        if compares:
            terms.check_not_zero(prediction_loss, classes)
        if not isinstance(prediction_loss, keras.losses.Loss):
            parameters = inspect.signature(prediction_loss).parameters
            shares_temperature = "temperature" in parameters
    return Strategies(prediction_loss, losses.get("feature_loss", feature_loss), shares_temperature)


def feature_names(
    teacher: FrozenTeacher | FunctionTeacher | Ensemble | None, layers: Sequence[str]
) -> list[str]:
    """Returns for each supervised layer the key of the teacher's map; empty without maps."""
    names = [] if teacher is None else teacher.feature_names
    return names * len(layers) if len(names) == 1 else names


def both(a: Any, b: Any) -> Any:
    """Returns what two masks leave; None is a mask that leaves everything."""
    if a is None or b is None:
        return b if a is None else a
    return ops.logical_and(a, b)
