"""The distiller as KerasTuner's hypermodel."""

import functools
import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import keras

from dskd_keras import checks, weighting
from dskd_keras.callbacks import StopOnNonFiniteLoss
from dskd_keras.distiller import Distiller
from dskd_keras.errors import TrainingError, missing_package, unknown_name, wrong
from dskd_keras.optimizers import SGD
from dskd_keras.tuning.config import SearchRanges
from dskd_keras.tuning.tensorflow_internals import clean_gradient_registry

try:
    import keras_tuner
except ModuleNotFoundError as error:
    raise missing_package("tuning", str(error.name).replace("_", "-"), "tune") from None

# Digits of a number that a trial draws: more would only look precise.
_DIGITS = 4
# Between the layers of one choice: KerasTuner chooses among strings, and layers' names have none.
_SEPARATOR = ", "


class DistillationHyperModel(keras_tuner.HyperModel):
    """Builds a compiled `Distiller` for every trial of a KerasTuner search.

    What `ranges` leaves out keeps its given value, and so does what the distiller has no use for,
    such as the coefficients of shallow layers where none is supervised. The first value that a
    range proposes is the given one, so a search can be compared with where it began.

    The teacher is one object for all trials. It is not saved with them: the weights that a tuner
    keeps of a trial are the student's and its heads'.

    Args:
        teacher: As for `Distiller`.
        student: A function without arguments that returns a new student.
        ranges: `SearchRanges`, or a dict of some of them, such as `{"temperature": [2, 8]}`: then
            nothing else is searched. Defaults to all, as `SearchRanges` has them.
        optimizer: A function that returns a new optimizer, given the learning rate. Defaults to
            `dskd_keras.optimizers.SGD` with momentum 0.9 and weight decay 5e-4.
        learning_rate: Where it is not searched. Defaults to 0.05.
        loss: As for `compile`. Defaults to sparse categorical cross-entropy on logits.
        metrics: A function that returns new metrics. Defaults to `accuracy`.
        **settings: Other arguments of `Distiller`: `student_layers`, `temperature` and so on.

    Raises:
        InputError: An argument or a range can't be used.

    Example:

    ```python
    hypermodel = dskd_keras.tuning.DistillationHyperModel(
        teacher,
        lambda: dskd_keras.models.create("resnet8", 10, (32, 32, 3)),
        ranges={"temperature": [2, 8], "deep_feature_weight": [1, 500]},
        student_layers=["stage1", "stage2"],
    )
    tuner = keras_tuner.RandomSearch(
        hypermodel, keras_tuner.Objective("val_accuracy", "max"), max_trials=10
    )
    tuner.search(x, y, validation_data=(x_val, y_val), epochs=5)
    ```
    """

    def __init__(
        self,
        teacher: keras.Model | None,
        student: Callable[[], keras.Model],
        ranges: SearchRanges | Mapping[str, Any] | None = None,
        optimizer: Callable[[float], keras.optimizers.Optimizer] | None = None,
        learning_rate: float = 0.05,
        loss: Any = None,
        metrics: Callable[[], list[Any]] | None = None,
        **settings: Any,
    ):
        super().__init__()
        for argument in settings.keys() - set(_SETTINGS):
            raise unknown_name("argument", argument, _SETTINGS)
        if not callable(student) or isinstance(student, keras.Model):
            raise wrong(
                "student", student, "a function that returns a new student: every trial trains one"
            )
        if isinstance(ranges, Mapping):
            ranges = SearchRanges.only(ranges)
        self.ranges = ranges or SearchRanges()
        self.teacher = teacher
        self._student = student
        self._optimizer = optimizer or _SGD
        self._learning_rate = checks.real("learning_rate", learning_rate, above=0)
        self._loss = loss
        self._metrics = metrics or (lambda: ["accuracy"])
        self._settings = {name: _SETTINGS[name].default for name in _SETTINGS} | settings
        given = self._settings["weighting"] = weighting.get(self._settings["weighting"])
        self._has_softmax = isinstance(given, weighting.Softmax)
        self._weighting_temperature = given.temperature if self._has_softmax else 1.0

    def declare_hyperparameters(self, hp: keras_tuner.HyperParameters) -> None:
        """Declares all that is searched."""
        self.values(hp)

    def values(self, hp: keras_tuner.HyperParameters) -> dict[str, Any]:
        """Returns a trial's values of what is searched, by the names of `SearchRanges`.

        They are floats with four digits, a name for `weighting`, a list of names for
        `student_layers`.
        """
        values: dict[str, Any] = {}
        layers = self._settings["student_layers"]
        layers = [layers] if isinstance(layers, str) else layers
        if self.ranges.student_layers is not None:
            choices = [_SEPARATOR.join(choice) for choice in self.ranges.student_layers]
            chosen = _choose(hp, "student_layers", choices, _SEPARATOR.join(layers))
            values["student_layers"] = chosen.split(_SEPARATOR)
            layers = choices
        # A term that is switched off stays off.
        terms = ["prediction_weight"]
        if layers:
            terms += ["deep_prediction_weight", "deep_feature_weight"]
        terms = [name for name in terms if self._settings[name]]
        if terms and terms != ["deep_feature_weight"]:
            self._number(hp, "temperature", self._settings["temperature"], values)
        if terms and self._settings["label_weight"]:
            terms = ["label_weight", *terms]
        for name in terms:
            self._number(hp, name, self._settings[name], values)
        if any(name.startswith("deep") for name in terms):
            self._strategy(hp, values)
        self._number(hp, "learning_rate", self._learning_rate, values)
        return values

    def distiller(self, hp: keras_tuner.HyperParameters) -> Distiller:
        """Returns a new `Distiller` with a trial's values, not compiled."""
        values = self.values(hp)
        values.pop("learning_rate", None)
        temperature = values.pop("weighting_temperature", self._weighting_temperature)
        if values.get("weighting") == "softmax":
            values["weighting"] = weighting.Softmax(temperature)
        elif "weighting" not in values and self._has_softmax:
            # It may be a subclass, with more settings.
            given = self._settings["weighting"]
            changes = {"temperature": temperature}
            values["weighting"] = type(given).from_config(given.get_config() | changes)
        return Distiller(self.teacher, self._student(), **self._settings | values)

    def build(self, hp: keras_tuner.HyperParameters) -> Distiller:
        """Returns a new compiled `Distiller` with a trial's values."""
        distiller = self.distiller(hp)
        distiller.compile(
            self._optimizer(self.values(hp).get("learning_rate", self._learning_rate)),
            loss=self._loss or keras.losses.SparseCategoricalCrossentropy(from_logits=True),
            metrics=self._metrics(),
        )
        return distiller

    def fit(
        self, hp: keras_tuner.HyperParameters, model: Distiller, *args: Any, **kwargs: Any
    ) -> keras.callbacks.History:
        """Trains a trial's distiller; a loss that is not finite makes it a failed trial.

        Args:
            hp: The trial's.
            model: What `build` returned.
            *args: As for `keras.Model.fit`.
            **kwargs: As for `keras.Model.fit`. `validation_data` or `validation_split` is needed.

        Raises:
            keras_tuner.errors.FatalError: There is no validation data: the search would miss its
                objective after the first trial.
        """
        if kwargs.get("validation_data") is None and not kwargs.get("validation_split"):
            raise keras_tuner.errors.FatalValueError(
                "validation_data: not given to search(), so val_accuracy can't be the objective. "
                "Give images held out of the training, not the test set."
            )
        kwargs["callbacks"] = [StopOnNonFiniteLoss(), *(kwargs.get("callbacks") or [])]
        try:
            with clean_gradient_registry():
                return model.fit(*args, **kwargs)
        except TrainingError as error:
            raise keras_tuner.errors.FailedTrialError(str(error)) from error

    def _number(
        self, hp: keras_tuner.HyperParameters, name: str, given: float, values: dict[str, Any]
    ) -> None:
        ends = getattr(self.ranges, name)
        if ends is None:
            return
        low, high = map(float, ends)
        default = given if low <= given <= high else math.sqrt(low * high)
        value = hp.Float(name, low, high, sampling="log", default=default)
        values[name] = min(max(float(f"{value:.{_DIGITS}g}"), low), high)

    def _strategy(self, hp: keras_tuner.HyperParameters, values: dict[str, Any]) -> None:
        names = self.ranges.weighting
        if names is None:
            may_be_softmax = is_softmax = self._has_softmax
        else:
            given = type(self._settings["weighting"]).__name__.lower()
            values["weighting"] = _choose(hp, "weighting", names, given)
            may_be_softmax, is_softmax = "softmax" in names, values["weighting"] == "softmax"
        if may_be_softmax:
            # Not in a conditional scope: in chiefs and workers KerasTuner prints a line for each.
            self._number(hp, "weighting_temperature", self._weighting_temperature, values)
            if not is_softmax:
                values.pop("weighting_temperature", None)


def _choose(hp: keras_tuner.HyperParameters, name: str, choices: Sequence[str], given: str) -> str:
    return hp.Choice(name, list(choices), default=given if given in choices else choices[0])


_SGD = functools.partial(SGD, momentum=0.9, weight_decay=5e-4)
# What a distiller takes beside its models.
_SETTINGS = {
    name: parameter
    for name, parameter in inspect.signature(Distiller.__init__).parameters.items()
    if name not in ("self", "teacher", "student", "kwargs")
}
