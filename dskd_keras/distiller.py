"""The model that trains a student under a frozen teacher."""

import contextlib
import dataclasses
import functools
import inspect
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import keras
import numpy as np
from keras import ops

from dskd_keras import (
    coefficients,
    depthwise,
    freezing,
    fused_normalization,
    graph,
    heads,
    keras_internals,
    labels,
    naming,
    objective,
    pairing,
)
from dskd_keras.coefficients import Coefficients
from dskd_keras.ensemble import Ensemble
from dskd_keras.errors import InputError, unknown_name, wrong
from dskd_keras.freezing import TeacherSettings
from dskd_keras.inputs import of_model
from dskd_keras.labels import LabelCheck
from dskd_keras.pairing import DistilledOutput
from dskd_keras.progress import Place, ProgressLine
from dskd_keras.teacher import FrozenTeacher, FunctionTeacher, Teacher
from dskd_keras.term_means import BatchMean, TermMeans
from dskd_keras.terms import in_full_precision
from dskd_keras.traced_training import TracedTraining
from dskd_keras.weighting import Weighting, renamed
from dskd_keras.weighting import get as get_weighting


class Targets(NamedTuple):
    """What the training loss compares the student with.

    Attributes:
        label: The labels as `fit` got them, or None.
        teacher: The teacher's outputs for the same images, a dict: `"logits"` `[B, C]` and
            `"features"` (channels last), each only where a term needs it. With one teacher layer
            for each student layer the maps are `"features/NAME"`, NAME being the teacher's layer;
            of K teachers the logits are `[B, K, C]`. None where no term needs one, or where `fit`
            is to run the teacher.
    """

    label: Any
    teacher: Any


def _guarded(method: Callable[..., Any]) -> Callable[..., Any]:
    """Lets an `InputError` raised within a step leave without what the backend puts around it.

    Whatever is raised, the variables keep their values.
    """

    @functools.wraps(method)
    def wrapped(self: "Distiller", *args: Any, **kwargs: Any) -> Any:
        try:
            with keras_internals.values_kept(self):
                return method(self, *args, **kwargs)
        except Exception as error:
            cause: BaseException | None = error
            innermost = None
            while cause is not None:
                if isinstance(cause, InputError):
                    innermost = cause
                cause = cause.__cause__ or cause.__context__
            if innermost is None and str(error).startswith("When passing a Python generator"):
                # Keras shows the whole batch.
                raise InputError(
                    "x: the generator should give tuples (x, y) or (x, y, sample_weight). Keras "
                    "takes neither dicts nor lists as batches."
                ) from None
            if innermost is None or innermost is error:
                raise
            raise InputError(*innermost.args) from None

    return wrapped


def _number(name: str) -> Any:
    """Returns the property for a number of the objective that may change while it trains."""

    def read(self: "Distiller") -> float:
        return self.coefficients.read(self, name)

    def write(self: "Distiller", value: Any) -> None:
        if name == "temperature" and not self._objective.strategies.shares_temperature:
            raise InputError(
                f"temperature: {value!r}, but prediction_loss is an object, which has its own, or "
                "a function without one. Set it there, or give the loss by its name."
            )
        self.coefficients.write(self, name, value)
        if self.train_function is not None:
            self.make_train_function()

    return property(read, write, doc=f"The {name.replace('_', ' ')}; callbacks may assign it.")


@keras.saving.register_keras_serializable("dskd_keras")
class Distiller(keras.Model):
    """Trains a student with deeply-supervised knowledge distillation (DSKD, arXiv 2202.07846).

    A frozen teacher supervises the student's output by its class predictions. Through auxiliary
    heads it supervises the student's layers by its class predictions and its feature maps. Let
    `a_l` be the temperature-softened divergence of head l from the teacher, `b_l` the mean squared
    difference of its projected feature map from the teacher's, and `u`, `v` the allocations: the
    weights that the weighting gives to the layers for the batch means of `a` and `b`.

    ```
    loss = label_weight           · loss(y, student)
         + prediction_weight      · KL_τ(teacher, student)
         + deep_prediction_weight · Σ_l u_l a_l
         + deep_feature_weight    · Σ_l v_l b_l
         + the student's own regularisation losses
    ```

    Every term has one value an image. With `sample_weight` w the mean of a batch is Σ w·l / B, for
    all terms alike. A term whose coefficient is 0 is not computed. Without `student_layers` this is
    plain distillation. With `prediction_weight=0` too it is ordinary training, and then `teacher`
    may be None. With `label_weight=0` no labels are needed.

    The divergence follows the compiled loss: over classes (a softmax) where it is a categorical
    one, over independent labels (a sigmoid each) where it is a binary one. Logits may be `[B, C]`,
    or dense, `[B, T, C]` and `[B, H, W, C]`: then every position is compared. The mean is that over
    the positions that are neither padded (by a Keras mask, or the input `mask`) nor labelled with
    the compiled loss's `ignore_class`. The others count in no term and in no allocation.

    `distiller(x)`, `predict` and `evaluate` run the student alone, neither teacher nor heads. `fit`
    logs every term and, for each layer, its losses and its allocations. `loss` is the whole
    objective while `val_loss` is the compiled loss on the labels, so the two are not comparable.

    `temperature` and the coefficients may be assigned, by callbacks too, while it trains. They are
    saved with the weights.

    Args:
        teacher: A functional or Sequential model with logits; or a `dskd_keras.Teacher`, any
            function of a batch; or a list of them; or None. A model is frozen (`teacher.trainable`
            becomes False, so `teacher.fit` trains nothing any more), run in inference mode, and
            left out of `save_weights`; saving the whole distiller as `.keras` includes it.
        student: A functional or Sequential model with logits.
        student_layers: Names of the student's shallow layers to supervise; `outer/inner` reaches
            into a nested model, `name#1` is the second call of a layer, `name:1` or `name:key` one
            of several outputs. Their outputs may be `[B, H, W, C]`, `[B, C, H, W]`,
            `[B, D, H, W, C]`, `[B, T, D]` or `[B, D]`. `"auto"` takes the last layer of each
            resolution. `dskd_keras.summary(student)` shows what can be named.
            Defaults to none.
        teacher_layer: Name of the teacher's layer whose output supervises them, or a list with one
            for each student layer. `"auto"`, the default, gives each the teacher's layer of the
            same place: the last one of a resolution, where resolutions are counted from the output.
            Where they can't be told, as in a transformer, it takes the last feature map before the
            pooling, as None does everywhere. The attribute then holds the names.
        temperature: Positive number τ that softens both sides' logits. Defaults to 4.0.
        label_weight: Coefficient of the compiled loss. Defaults to 1.0.
        prediction_weight: Coefficient of the student's divergence from the teacher. Defaults
            to 1.0.
        deep_prediction_weight: Coefficient of the shallow layers' divergences. Defaults to 1.0.
        deep_feature_weight: Coefficient of the shallow layers' feature-map losses. Defaults to
            1.0. Image classifiers that train for thousands of steps gained by 10 to 30, which cost
            accuracy in short trainings and on some other tasks.
        weighting: The strategy that allocates weights to the shallow layers: `"softmax"`,
            `"proportional"`, `"inverse"`, `"uniform"`, `"relative"`, or a
            `dskd_keras.weighting.Weighting`. Defaults to `"uniform"`.
        prediction_loss: What compares logits: a name of `dskd_keras.losses`, or a
            `keras.losses.Loss` or function of teacher's and student's logits that gives one value
            an image or a position. An object has its own temperature. Defaults to the divergence
            that goes with the compiled loss.
        feature_loss: What compares feature maps, likewise. Defaults to
            `"feature_mean_squared_error"`.
        head: What sits on each supervised layer: `"separable"`, `"pointwise"`, `"convolutional"`,
            or a `dskd_keras.heads.Head`. Defaults to `"separable"`.
        teacher_output: Which output of the teacher are the logits: the key of a dict, the name of
            a layer, or the place in a list. Defaults to the only one.
        student_output: The same of the student. The other outputs are trained by the losses that
            `compile` gets for them.
        teacher_classes: Indices of the teacher's classes, in the order of the student's. Defaults
            to all.
        teacher_inputs: A function or a functional model from the batch `x` to the teacher's inputs,
            run within the step. With it `x` may be a tuple that holds the student's inputs first.
            Defaults to the batch itself.
        teacher_weighting: How several teachers count: `"uniform"`, a number for each, or
            `"confidence"`: by their loss on each image's label, as CA-MKD does. Defaults to
            `"uniform"`.
        mask: Name of the student's input `[B, T]` that is not 0 where a position counts, for models
            that get their padding as an input. Defaults to the masks that Keras keeps.
        name: Optional name.
        **kwargs: `dtype` and `trainable`, as for `keras.Model`.

    Attributes:
        student: The student: what to save once trained.
        teacher: The `FrozenTeacher`, None where no term needs it.
        teacher_layer: The name of the teacher's layer that was chosen, or a list with one for each
            student layer; of several teachers what was given.
        student_layers: The names of the supervised layers, a tuple.
        student_with_heads: The functional model of the student with its auxiliary heads, which
            gives `heads.Outputs`.
        prediction_weighting: The strategy's copy for the class-prediction losses.
        feature_weighting: The strategy's copy for the feature-map losses.
        traced_training: On PyTorch, the `TracedTraining` through which the student trains; None
            elsewhere.
        recompiles: Whether the step is compiled anew when the coefficients of both terms of the
            shallow layers have become 0: it then has no heads and costs what plain distillation
            does, and their terms leave the logs. With a positive coefficient the heads come back.
            Compiling takes as long as the first time. Defaults to True.
        resumed_at: The `Place` where training goes on. Who resumes a training within an epoch sets
            it before `fit`, since `fit` counts the rest of that epoch's steps from 0. Callbacks
            read it through `progress.steps_before`. Defaults to the beginning.

    Raises:
        InputError: An argument can't be used; the message says which and what would be right.

    Example:

    ```python
    distiller = dskd_keras.Distiller(teacher, student, student_layers="auto")
    distiller.compile(
        optimizer="adam",
        loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        metrics=["accuracy"],
    )
    distiller.fit(x, y, validation_data=(x_val, y_val))
    distiller.student.save("student.keras")
    ```
    """

    student: keras.Model
    teacher: FrozenTeacher | FunctionTeacher | Ensemble | None
    student_with_heads: keras.Model
    prediction_weighting: Weighting
    feature_weighting: Weighting
    recompiles: bool = True
    resumed_at: Place = Place()
    # Whether `get_metrics_result` gives the terms too: see there.
    _reports_terms = False

    temperature = _number("temperature")
    label_weight = _number("label_weight")
    prediction_weight = _number("prediction_weight")
    deep_prediction_weight = _number("deep_prediction_weight")
    deep_feature_weight = _number("deep_feature_weight")

    def __init__(
        self,
        teacher: Any,
        student: keras.Model,
        student_layers: str | Iterable[str] = (),
        teacher_layer: str | Sequence[str] | None = "auto",
        temperature: float = 4.0,
        label_weight: float = 1.0,
        prediction_weight: float = 1.0,
        deep_prediction_weight: float = 1.0,
        deep_feature_weight: float = 1.0,
        weighting: str | dict[str, Any] | Weighting = "uniform",
        prediction_loss: Any = None,
        feature_loss: Any = "feature_mean_squared_error",
        head: str | heads.Head | None = None,
        teacher_output: str | int | None = None,
        student_output: str | int | None = None,
        teacher_classes: Sequence[int] | None = None,
        teacher_inputs: Any = None,
        teacher_weighting: str | Sequence[float] = "uniform",
        mask: str | None = None,
        name: str | None = None,
        **kwargs: Any,
    ) -> None:
        for argument in kwargs.keys() - {"dtype", "trainable"}:
            _, *known, _ = inspect.signature(Distiller.__init__).parameters
            raise unknown_name("Distiller argument", argument, known)
        numbers = {
            "temperature": temperature,
            "label_weight": label_weight,
            "prediction_weight": prediction_weight,
            "deep_prediction_weight": deep_prediction_weight,
            "deep_feature_weight": deep_feature_weight,
        }
        numbers = {name: coefficients.check(name, value) for name, value in numbers.items()}
        pairing.check_model("student", student)
        # Inputs go to the student as they come: casting them is its first layer's business.
        kwargs.setdefault("dtype", graph.precision(student))
        super().__init__(name=name, autocast=False, **kwargs)

        self.student = student
        self.coefficients = Coefficients(numbers)
        # What is given, for get_config. In tuples and dicts Keras would track the models.
        self._settings = TeacherSettings(
            teacher_layer,
            teacher_output,
            teacher_classes,
            teacher_inputs,
            teacher_weighting,
        )
        self._given = _Given(student_output, prediction_loss, feature_loss, mask)
        self._output = DistilledOutput(student, student_output)
        self.student_layers = self._names(student_layers)
        deep = [
            kind
            for kind in ("prediction", "feature")
            if self.student_layers and numbers[f"deep_{kind}_weight"]
        ]
        kinds = {
            "label": bool(numbers["label_weight"]),
            "prediction": bool(numbers["prediction_weight"]),
            "deep_prediction": "prediction" in deep,
            "deep_feature": "feature" in deep,
        }
        supervised = self.student_layers if deep else ()
        self.teacher = freezing.freeze(
            teacher, student, self._output, self.student_layers, kinds, self._settings
        )
        self.teacher_layer = teacher_layer
        if supervised and isinstance(self.teacher, FrozenTeacher):
            self.teacher_layer = self.teacher.layer
        # Two copies, because a strategy with a state must not mix the two kinds of loss.
        strategy = get_weighting(weighting)
        self.prediction_weighting, self.feature_weighting = (
            renamed(strategy, copy) for copy in ("prediction_weighting", "feature_weighting")
        )
        self._head = heads.get(head)
        names = objective.feature_names(self.teacher, supervised)
        self.student_with_heads = heads.attach(
            student,
            supervised,
            freezing.head_shapes(self.teacher, names, student, self._output, len(supervised)),
            predictions="prediction" in deep,
            features="feature" in deep,
            head=self._head,
            output=self._output.index,
            mask=mask,
            dtype=self.dtype_policy,
        )
        self.traced_training: TracedTraining | None = None
        if keras.backend.backend() == "torch":
            self.traced_training = TracedTraining(self.student_with_heads)
        if supervised:
            for strategy in (self.prediction_weighting, self.feature_weighting):
                strategy.build((len(supervised),))
        if self.teacher is not None and not self.teacher.supports_jit:
            # Keras looks at the layers that it knows of, and the teacher's are not among them.
            self.supports_jit = False
        compares = kinds["prediction"] or kinds["deep_prediction"]
        self._objective = objective.Objective(
            kinds,
            supervised,
            self._output,
            self.teacher,
            objective.strategies(prediction_loss, feature_loss, self._output.classes, compares),
            self.coefficients,
            {"prediction": self.prediction_weighting, "feature": self.feature_weighting},
        )
        self._whole = _Step(self.student_with_heads, self.traced_training, self._objective, ())
        self._step = self._whole
        self._without_heads: _Step | None = None
        self._batch_mean = BatchMean()
        self._term_means = TermMeans(self._objective.term_names())
        self.built = True

    def _names(self, names: Any) -> tuple[str, ...]:
        if names in ("auto", ["auto"], ("auto",)):
            return tuple(graph.auto_student_layers(self.student, self._output.index))
        if isinstance(names, (str, keras.Operation)):
            names = (names,)
        if not isinstance(names, Iterable):
            raise wrong("student_layers", names, "a list of names of layers")
        names = tuple(names)
        naming.find("student_layers", self.student, names)
        if len(set(names)) != len(names):
            raise wrong("student_layers", list(names), "a list that names each layer once")
        return names

    def call(self, inputs: Any, training: bool | None = False) -> Any:
        """Returns the student's logits or outputs; with `training=True` its `heads.Outputs`."""
        inputs = self._of_student(inputs)
        if training:
            step = self._step
            if step.traced is not None and not self.run_eagerly:
                return step.traced(inputs)
            with depthwise.as_products(), fused_normalization.fused():
                return step.model(inputs, training=True)
        with depthwise.as_products():
            outputs = self.student(inputs, training=False)
        return keras.tree.flatten(outputs)[0] if self._output.is_alone else outputs

    def _of_student(self, x: Any) -> Any:
        """Returns what of a batch is the student's, and checks it."""
        count = len(self.student.inputs)
        is_row = isinstance(x, (list, tuple))
        if is_row and self._settings.teacher_inputs is not None and len(x) > count:
            x = x[0] if count == 1 else x[:count]
        return of_model("x", self.student, x)

    @property
    def output_names(self) -> list[str] | None:
        """The names of the student's outputs, by which `compile` may give losses; None of one."""
        return None if self._output.is_alone else self.student.output_names

    def targets(self, x: Any, y: Any = None, batch_size: int | None = None) -> Targets:
        """Runs the teacher once over fixed images, for many epochs of training on them.

        Args:
            x: Array of N images, as for `fit`.
            y: Array of N labels, or None where `label_weight` is 0.
            batch_size: As in `predict`.

        Returns:
            `Targets` of NumPy arrays, to be given to `fit` as `y`, which then runs no teacher.
        """
        if self.teacher is None:
            raise InputError("targets: no term of this distiller needs a teacher.")
        return Targets(y, self.teacher.predict(x, batch_size=batch_size))

    @_guarded
    def fit(
        self,
        x: Any = None,
        y: Any = None,
        batch_size: int | None = None,
        epochs: int = 1,
        verbose: str | int = "auto",
        callbacks: Any = None,
        **kwargs: Any,
    ) -> keras.callbacks.History:
        """Trains the student. Arguments and result are those of `keras.Model.fit`.

        `y` may be `Targets`, computed beforehand by `targets`. The progress bar leaves out the
        values of single layers. Callbacks and the returned history get them.

        Raises:
            InputError: The compiled loss expects probabilities, the labels have another shape than
                it takes or are outside the classes, or a batch is not what the models take.
        """
        self._check_compiled()
        if kwargs.get("class_weight") is not None:
            self._check_class_weight(x, y)
        self._check_arrays(x, y)
        if y is None and kwargs.get("sample_weight") is not None:
            # Without any `y` Keras drops the weights and says nothing.
            y = Targets(None, None)
        if not isinstance(callbacks, keras.callbacks.CallbackList):
            callbacks = [] if callbacks is None else [*keras.tree.flatten(callbacks)]
            if labels.kind(self._output.of(self.loss)) is not None:
                callbacks.insert(0, LabelCheck())
            if verbose != 0 and not any(
                isinstance(callback, keras.callbacks.ProgbarLogger) for callback in callbacks
            ):
                callbacks.append(ProgressLine())
        with self._reporting(terms=self._replicas() > 1):
            return super().fit(x, y, batch_size, epochs, verbose, callbacks, **kwargs)

    @_guarded
    def evaluate(self, *args: Any, **kwargs: Any) -> Any:
        """Runs the student alone on labelled data, as `keras.Model.evaluate`."""
        with self._reporting(terms=False):
            results = super().evaluate(*args, **kwargs)
        self.check_labels_seen()
        return results

    @_guarded
    def predict(self, *args: Any, **kwargs: Any) -> Any:
        """Returns the student's outputs, as `keras.Model.predict`."""
        return super().predict(*args, **kwargs)

    @_guarded
    def train_on_batch(self, *args: Any, **kwargs: Any) -> Any:
        """Trains on one batch, as `keras.Model.train_on_batch`."""
        self._check_compiled()
        logs = super().train_on_batch(*args, **kwargs)
        self.check_labels_seen()
        return logs

    @_guarded
    def test_on_batch(self, *args: Any, **kwargs: Any) -> Any:
        """Evaluates one batch, as `keras.Model.test_on_batch`."""
        return super().test_on_batch(*args, **kwargs)

    def make_train_function(self, force: bool = False) -> Any:
        """Makes the step, as in `keras.Model`: without heads where `recompiles` says so."""
        kinds = self._objective.kinds
        is_over = (
            self.recompiles
            and (kinds["deep_prediction"] or kinds["deep_feature"])
            and not (self.deep_prediction_weight or self.deep_feature_weight)
        )
        step = self._student_alone() if is_over else self._whole
        if step is not self._step:
            self._step, force = step, True
            self._term_means.computed = step.objective.term_names()
        return super().make_train_function(force)

    def _student_alone(self) -> "_Step":
        if self._without_heads is None:
            model = heads.attach(
                self.student, (), (), output=self._output.index, mask=self._given.mask
            )
            traced = None
            if self.traced_training is not None:
                traced = TracedTraining(model)
                traced.after = self.traced_training.after
            of_student = {id(weight) for weight in self.student.trainable_weights}
            unused = tuple(w for w in self.trainable_weights if id(w) not in of_student)
            self._without_heads = _Step(model, traced, self._objective.without_deep_terms(), unused)
        return self._without_heads

    def train_step(self, *args: Any) -> Any:
        """Runs the teacher, then Keras's own training step with its outputs as targets.

        The gradient code, mixed precision and loss scaling are those of the backend's Keras model.
        The teacher runs before them, so no gradient reaches it. `args` are `data`, on JAX
        `state, data`.
        """
        *state, data = args
        x, y, sample_weight = keras.utils.unpack_x_y_sample_weight(data)
        self._of_student(x)
        label, outputs = y if isinstance(y, Targets) else (y, None)
        if outputs is None:
            outputs = self._run_teacher(x, *state)
        y = Targets(label, outputs)
        return super().train_step(*state, (x, y, _of_image(sample_weight)))

    def compute_loss(
        self,
        x: Any = None,
        y: Any = None,
        y_pred: Any = None,
        sample_weight: Any = None,
        training: bool = True,
    ) -> Any:
        """Returns the objective in a training step, the compiled loss on the labels elsewhere.

        In a training step `y` is `Targets` and `y_pred` is `heads.Outputs`; elsewhere these are the
        labels and the student's outputs. `sample_weight` is None, `[B]`, or `[B, *positions]` for
        dense logits.
        """
        if isinstance(y_pred, heads.Outputs):
            return self._training_loss(y, y_pred, sample_weight)
        # Evaluation, and the symbolic build before training.
        label = y.label if isinstance(y, Targets) else y
        if self.loss is None or label is None:
            return ops.zeros(()) + sum(ops.sum(loss) for loss in self.losses)
        checked = self._objective.labels(self.loss, label, y_pred)
        if checked is not None and checked.outside is not None:
            self._term_means.count_wrong_labels(checked.outside)
            label = checked.values if self._output.is_alone else label
        return super().compute_loss(x, label, y_pred, _of_image(sample_weight), training)

    def _training_loss(self, targets: Targets, outputs: heads.Outputs, sample_weight: Any) -> Any:
        label, teacher = targets
        self._check_label_is_there(label)
        self._check_teacher_outputs(teacher)
        terms, wrong_labels = self._step.objective(
            self.loss, label, teacher, outputs, sample_weight
        )
        total = 0.0
        if self._objective.kinds["label"] and not self._output.is_alone:
            value = keras_internals.compiled_loss(self, label, outputs.outputs, sample_weight)
            terms.means["label_loss"] = value
            total = self.coefficients.in_step()["label_weight"] * value
        self._term_means.update_state(terms.means, ops.shape(outputs.logits)[0], wrong_labels)
        if terms.total is not None:
            total = total + self._batch_mean(terms.total, terms.sample_weight)
        if self.losses:
            regularisation = sum(ops.sum(in_full_precision(loss)) for loss in self.losses)
            total = total + self._batch_mean(ops.reshape(regularisation, (1,)))
        if self._step.unused:
            # A gradient of 0 for each of them: Keras warns where there is none.
            total = total + 0.0 * sum(ops.sum(weight) for weight in self._step.unused)
        return total

    def compute_metrics(
        self, x: Any, y: Any, y_pred: Any, sample_weight: Any = None
    ) -> dict[str, Any]:
        """Updates the compiled metrics on the student's outputs and returns the logs."""
        label = y.label if isinstance(y, Targets) else y
        in_training = isinstance(y_pred, heads.Outputs)
        outputs = y_pred
        if in_training:
            outputs = y_pred.logits if self._output.is_alone else y_pred.outputs
        logs = (
            self.get_metrics_result()
            if label is None
            else super().compute_metrics(x, label, outputs, _of_image(sample_weight))
        )
        return {**logs, **self._term_means.result()} if in_training else logs

    def get_metrics_result(self) -> dict[str, Any]:
        """Returns `loss` and the compiled metrics: what `evaluate` reports.

        In `fit` on several replicas of `tf.distribute` it returns the terms too. Keras takes an
        epoch's logs from here where the names are those of the last step's logs, and otherwise the
        mean of what each replica has logged, which is another number where their parts of the data
        differ in size.
        """
        results = {}
        for metric in self.metrics:
            # Without labels the compiled metrics are never built.
            if metric is self._term_means or not getattr(metric, "built", True):
                continue
            result = metric.result()
            results.update(result if isinstance(result, dict) else {metric.name: result})
        return {**results, **self._term_means.result()} if self._reports_terms else results

    @contextlib.contextmanager
    def _reporting(self, terms: bool) -> Iterator[None]:
        before, self._reports_terms = self._reports_terms, terms
        try:
            yield
        finally:
            self._reports_terms = before

    def _replicas(self) -> int:
        """Returns how many replicas of `tf.distribute` this model was made for."""
        strategy = getattr(self, "distribute_strategy", None)  # on TensorFlow alone
        return 1 if strategy is None else strategy.num_replicas_in_sync

    def step_terms(self) -> dict[str, float]:
        """Returns the terms of the last training step alone; the logs hold means over the epoch.

        For callbacks, in `on_train_batch_end`, and after `train_on_batch`. With
        `steps_per_execution` it is the last step of those that ran together.

        Returns:
            A dict of floats, without unit: every term of the logs except `loss` and the compiled
            metrics, under the same names. `deep_prediction_loss/NAME` and
            `deep_prediction_allocation/NAME` are the loss of the layer NAME and the weight that it
            got. `deep_prediction_loss` is the sum of their products over the layers. The names for
            the feature maps begin with `deep_feature`. Empty before the first step.

        Example:

        ```python
        distiller.train_on_batch(x, y)
        distiller.step_terms()["deep_feature_allocation/stage1"]
        ```
        """
        last_step = keras_internals.metric_value(self, self._term_means.last_step)
        return self._term_means.of_last_step(last_step.tolist())

    @property
    def term_names(self) -> list[str]:
        """The names of all terms, in a fixed order.

        The logs and `step_terms` have each of them, but for those of the shallow layers in steps
        without heads (see `recompiles`).
        """
        return list(self._term_means.names)

    @property
    def non_trainable_variables(self) -> list[keras.Variable]:
        """Those of the student and the heads, then the teacher's: JAX's step needs all of them."""
        variables = super().non_trainable_variables
        return variables if self.teacher is None else variables + self.teacher.variables

    def get_config(self) -> dict[str, Any]:
        """Returns the arguments that rebuild this distiller, both models included."""
        given, settings = self._given, self._settings
        teacher: Any = None if self.teacher is None else self.teacher.model
        if any(isinstance(each, Teacher) for each in (teacher, *_several(teacher))):
            raise InputError(
                "teacher: a dskd_keras.Teacher is a function, which can't be saved. Save the "
                "student (distiller.student.save) or the weights (distiller.save_weights)."
            )
        serialize = keras.saving.serialize_keras_object
        layer = self.teacher_layer
        return {
            **super().get_config(),
            "teacher": [_uncompiled(each) for each in teacher] if _several(teacher)
            else _uncompiled(teacher),
            "student": serialize(self.student),
            "student_layers": list(self.student_layers),
            "teacher_layer": layer if layer is None or isinstance(layer, str) else list(layer),
            **self.coefficients.config(self),
            "weighting": serialize(self.prediction_weighting),
            "prediction_loss": _by_name_or(serialize, given.prediction_loss),
            "feature_loss": _by_name_or(serialize, given.feature_loss),
            "head": serialize(self._head),
            "teacher_output": settings.teacher_output,
            "student_output": given.student_output,
            "teacher_classes": None if settings.teacher_classes is None
            else list(map(int, settings.teacher_classes)),
            "teacher_inputs": _by_name_or(serialize, settings.teacher_inputs),
            "teacher_weighting": settings.teacher_weighting
            if isinstance(settings.teacher_weighting, str)
            else list(settings.teacher_weighting),
            "mask": given.mask,
        }  # fmt: skip

    @classmethod
    def from_config(
        cls, config: dict[str, Any], custom_objects: dict[str, Any] | None = None
    ) -> "Distiller":
        """Rebuilds a distiller from `get_config`."""
        config = dict(config)

        def rebuilt(value: Any) -> Any:
            if isinstance(value, list):
                return [rebuilt(each) for each in value]
            is_config = isinstance(value, dict) and "class_name" in value
            if not is_config:
                return value
            return keras.saving.deserialize_keras_object(value, custom_objects=custom_objects)

        for field in (
            "teacher", "student", "weighting", "prediction_loss", "feature_loss", "head",
            "teacher_inputs",
        ):  # fmt: skip
            if field in config:
                config[field] = rebuilt(config[field])
        return cls(**config)

    # Keras writes assets in `save` but not in `save_weights`. So a saved distiller can be loaded
    # whole, while checkpoints of weights hold only what changes.

    def save_assets(self, dir_path: str) -> None:
        """Writes the weights of the teacher, or teachers, into a `.keras` file."""
        for name, model in self._models_of_assets():
            model.save_weights(f"{dir_path}/{name}.weights.h5")

    def load_assets(self, dir_path: str) -> None:
        """Reads them from a `.keras` file."""
        for name, model in self._models_of_assets():
            model.load_weights(f"{dir_path}/{name}.weights.h5")

    def _models_of_assets(self) -> list[tuple[str, keras.Model]]:
        """Returns the models whose weights a configuration doesn't hold, with their names."""
        teacher = None if self.teacher is None else self.teacher.model
        several = _several(teacher)
        found = [(f"teacher_{number}", model) for number, model in enumerate(several)]
        if teacher is not None and not several:
            found = [("teacher", teacher)]
        before = self._settings.teacher_inputs
        return [*found, ("teacher_inputs", before)] if isinstance(before, keras.Model) else found

    def _run_teacher(self, x: Any, state: Any = None) -> dict[str, Any] | None:
        if self.teacher is None:
            return None
        variables = self.teacher.variables
        if state is None or not variables:
            return self.teacher(x)
        # On JAX the variables hold no values during training. They are in the step's state, where
        # the teacher's are the last (see `non_trainable_variables`).
        _, non_trainable, *_ = state
        return self.teacher(x, non_trainable[-len(variables) :])

    def check_labels_seen(self) -> None:
        """Raises `InputError` where a training step met labels that no class or range allows."""
        seen = self._term_means.wrong_labels
        count = int(keras_internals.metric_value(self, seen))
        if count:
            coefficients.sync(self)
            seen.assign(0.0)
            raise labels.outside_range(count, self._output.of(self.loss), self._output.classes)

    def _check_compiled(self) -> None:
        if not self.compiled:
            raise InputError(
                "compile: not called. Call distiller.compile(optimizer, loss=keras.losses."
                "SparseCategoricalCrossentropy(from_logits=True)) before fit."
            )
        if self._output.is_alone and (self._objective.kinds["label"] or self.loss is not None):
            labels.check_loss(self.loss)
        self._objective.check_compiled(self.loss)

    def _check_arrays(self, x: Any, y: Any) -> None:
        """Checks what `fit` got, where it is arrays. A stream is checked in its first step."""
        label = y.label if isinstance(y, Targets) else y
        if isinstance(keras.tree.flatten(x)[0] if x is not None else None, np.ndarray):
            self._of_student(x)
            self._check_label_is_there(label)
        if isinstance(y, Targets) and y.teacher is not None:
            self._check_teacher_outputs(y.teacher)
        label = self._output.of(label)
        if isinstance(label, np.ndarray):
            labels.check_range(label, self._output.of(self.loss), self._output.classes)

    def _check_class_weight(self, x: Any, y: Any) -> None:
        if isinstance(y, Targets):
            raise InputError(
                "class_weight: it can't be combined with Targets. Give the weight of each image as "
                "sample_weight."
            )
        if y is None and isinstance(keras.tree.flatten(x)[0], np.ndarray):
            raise InputError(
                "class_weight: given, but y is None, so no image has a class. Give the labels, or "
                "the weight of each image as sample_weight."
            )

    def _check_label_is_there(self, label: Any) -> None:
        if label is None and self._objective.kinds["label"]:
            raise InputError(f"y: no labels, but label_weight={self.label_weight} needs them.")

    def _check_teacher_outputs(self, outputs: Any) -> None:
        needed = [] if self.teacher is None else self.teacher.output_names
        missing = [name for name in needed if outputs is None or name not in outputs]
        if missing:
            raise InputError(
                f"y: Targets without the teacher's {' and '.join(missing)}, which this distiller's "
                "terms need. Compute them with distiller.targets(x, y)."
            )


@dataclasses.dataclass(frozen=True)
class _Step:
    """What a training step runs."""

    model: keras.Model  # gives `heads.Outputs`
    traced: TracedTraining | None  # the same as a trace, on PyTorch
    objective: objective.Objective  # of these outputs
    unused: tuple[keras.Variable, ...]  # weights of heads that the model doesn't have


@dataclasses.dataclass(frozen=True)
class _Given:
    """Arguments as they came."""

    student_output: str | int | None
    prediction_loss: Any
    feature_loss: Any
    mask: str | None


def _several(teacher: Any) -> list[Any]:
    return list(teacher) if isinstance(teacher, (list, tuple)) else []


def _uncompiled(model: Any) -> Any:
    """Returns the configuration of a frozen model, or None, without what it was compiled with.

    Its optimizer, built anew, would find nothing to train, and Keras would warn that the state that
    was saved doesn't fit.
    """
    config = keras.saving.serialize_keras_object(model)
    if isinstance(config, dict):
        config.pop("compile_config", None)
    return config


def _by_name_or(serialize: Callable[[Any], Any], value: Any) -> Any:
    return value if value is None or isinstance(value, (str, int)) else serialize(value)


def _of_image(sample_weight: Any) -> Any:
    """Returns the weights of images: beside `Targets` Keras copies them for every leaf."""
    if isinstance(sample_weight, Targets):
        return next(leaf for leaf in keras.tree.flatten(sample_weight) if leaf is not None)
    return sample_weight
