"""The distiller as KerasTuner's hypermodel."""

import inspect
import math

import keras
import keras_tuner

from dskd_keras.callbacks import StopOnNonFiniteLoss
from dskd_keras.config import SearchRanges
from dskd_keras.distiller import Distiller
from dskd_keras.errors import InputError, TrainingError, unknown_name
from dskd_keras.optimizers import SGD
from dskd_keras.tuning.memory import gradients_forgotten
from dskd_keras.weighting import Softmax
from dskd_keras.weighting import get as get_weighting

# Digits of a number that a trial draws: more would only look precise.
_DIGITS = 4
# Between the layers of one choice: KerasTuner chooses among strings, and layers' names have none.
_AND = ", "


class DistillationHyperModel(keras_tuner.HyperModel):
    """Builds a compiled `Distiller` for every trial of a KerasTuner search.

    What `ranges` leaves out, and what the distiller has no use for (the weights of shallow layers
    where none is supervised, say), keeps its given value. The first value that a range proposes is
    the given one, so a search can be compared with where it began.

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
        teacher,
        student,
        ranges=None,
        optimizer=None,
        learning_rate=0.05,
        loss=None,
        metrics=None,
        **settings,
    ):
        super().__init__()
        for argument in settings.keys() - set(_SETTINGS):
            raise unknown_name("DistillationHyperModel argument", argument, _SETTINGS)
        if not callable(student) or isinstance(student, keras.Model):
            raise InputError(
                "student should be a function that returns a new student: every trial trains one "
                f"of its own. Received: {type(student).__name__}."
            )
        if ranges is not None and not isinstance(ranges, SearchRanges):
            # A dict is the whole of what is searched.
            ranges = {name: None for name in SearchRanges.__dataclass_fields__} | dict(ranges)
        self.ranges = SearchRanges.get(ranges)
        self.teacher = teacher
        self._student = student
        self._optimizer = optimizer or _sgd
        self._learning_rate = learning_rate
        self._loss = loss
        self._metrics = metrics or _accuracy
        self._settings = {name: _SETTINGS[name].default for name in _SETTINGS} | settings
        self._settings["weighting"] = get_weighting(self._settings["weighting"])

    def declare_hyperparameters(self, hp):
        """Declares all that is searched.

        Args:
            hp: `keras_tuner.HyperParameters`.
        """
        self.values(hp)

    def values(self, hp):
        """Returns a trial's values of what is searched, by the names of `SearchRanges`.

        Args:
            hp: The trial's `keras_tuner.HyperParameters`.

        Returns:
            A dict: floats with four digits, a name for `weighting`, a list of names for
            `student_layers`.
        """
        values = {}
        layers = self._settings["student_layers"]
        if self.ranges.student_layers is not None:
            choices = [_AND.join(choice) for choice in self.ranges.student_layers]
            given = _AND.join(layers)
            default = given if given in choices else choices[0]
            values["student_layers"] = hp.Choice("student_layers", choices, default=default).split(
                _AND
            )
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
            self._weighting(hp, values)
        self._number(hp, "learning_rate", self._learning_rate, values)
        return values

    def distiller(self, hp):
        """Returns a new `Distiller` with a trial's values, not compiled.

        Args:
            hp: The trial's `keras_tuner.HyperParameters`.
        """
        values = self.values(hp)
        values.pop("learning_rate", None)
        sharpness = values.pop("weighting_temperature", self._sharpness())
        given = self._settings["weighting"]
        if values.get("weighting", "softmax" if isinstance(given, Softmax) else None) == "softmax":
            values["weighting"] = Softmax(sharpness)
        return Distiller(self.teacher, self._student(), **self._settings | values)

    def build(self, hp):
        """Returns a new compiled `Distiller` with a trial's values.

        Args:
            hp: The trial's `keras_tuner.HyperParameters`.
        """
        distiller = self.distiller(hp)
        distiller.compile(
            self._optimizer(self.values(hp).get("learning_rate", self._learning_rate)),
            loss=self._loss or keras.losses.SparseCategoricalCrossentropy(from_logits=True),
            metrics=self._metrics(),
        )
        return distiller

    def fit(self, hp, model, *args, **kwargs):
        """Trains a trial's distiller; a loss that is not finite makes it a failed trial.

        Args:
            hp: The trial's `keras_tuner.HyperParameters`.
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
        callbacks = [StopOnNonFiniteLoss(), *(kwargs.pop("callbacks", None) or [])]
        try:
            with gradients_forgotten():
                return model.fit(*args, callbacks=callbacks, **kwargs)
        except TrainingError as error:
            raise keras_tuner.errors.FailedTrialError(str(error)) from error

    def _number(self, hp, name, given, values):
        ends = getattr(self.ranges, name)
        if ends is None:
            return
        low, high = map(float, ends)
        default = given if low <= given <= high else math.sqrt(low * high)
        value = hp.Float(name, low, high, sampling="log", default=default)
        values[name] = min(max(float(f"{value:.{_DIGITS}g}"), low), high)

    def _weighting(self, hp, values):
        given, sharpness = self._settings["weighting"], self._sharpness()
        names = self.ranges.weighting
        if names is None:
            if isinstance(given, Softmax):
                self._number(hp, "weighting_temperature", sharpness, values)
            return
        default = type(given).__name__.lower()
        default = default if default in names else names[0]
        values["weighting"] = hp.Choice("weighting", list(names), default=default)
        if "softmax" in names:
            # Not in a conditional scope: in chiefs and workers KerasTuner prints a line for each.
            self._number(hp, "weighting_temperature", sharpness, values)
            if values["weighting"] != "softmax":
                values.pop("weighting_temperature", None)

    def _sharpness(self):
        given = self._settings["weighting"]
        return given.temperature if isinstance(given, Softmax) else 1.0


def _sgd(learning_rate):
    return SGD(learning_rate, momentum=0.9, weight_decay=5e-4)


def _accuracy():
    return ["accuracy"]


# What a distiller takes beside its models.
_SETTINGS = {
    name: parameter
    for name, parameter in inspect.signature(Distiller.__init__).parameters.items()
    if name not in ("self", "teacher", "student", "kwargs")
}
