"""The model that trains a student under a frozen teacher."""

import inspect
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import keras
import numpy as np
from keras import ops

from dskd_keras import checks, graph, heads, keras_internals, labels
from dskd_keras.errors import InputError, unknown_name, wrong
from dskd_keras.losses import FeatureMeanSquaredError, KLDivergence
from dskd_keras.progress import Place, ProgressLine
from dskd_keras.teacher import FrozenTeacher
from dskd_keras.weighting import Weighting, renamed
from dskd_keras.weighting import get as get_weighting


class Targets(NamedTuple):
    """What the training loss compares the student with.

    Attributes:
        label: The labels as `fit` got them, or None.
        teacher: The teacher's outputs for the same images, a dict: `"logits"` `[B, C]` and
            `"features"` (channels last), each only where a term needs it. None where no term needs
            one, or where `fit` is to run the teacher.
    """

    label: Any
    teacher: Any


@keras.saving.register_keras_serializable("dskd_keras")
class Distiller(keras.Model):
    """Trains a student with deeply-supervised knowledge distillation (DSKD, arXiv 2202.07846).

    A frozen teacher supervises the student's output by its class predictions. Through auxiliary
    heads it supervises the student's shallow layers by its class predictions and its last feature
    map. Let `a_l` be the temperature-softened divergence of head l from the teacher, `b_l` the mean
    squared difference of its projected feature map from the teacher's, and `u`, `v` the
    allocations: the weights that the weighting gives to the layers for the batch means of `a` and
    `b`.

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

    `distiller(x)`, `predict` and `evaluate` run the student alone, neither teacher nor heads. `fit`
    logs every term and, for each layer, its losses and its allocations. `loss` is the whole
    objective while `val_loss` is the compiled loss on the labels, so the two are not comparable.

    Args:
        teacher: A functional or Sequential model with logits `[B, C]`, or None. It is frozen
            (`teacher.trainable` becomes False), run in inference mode, and left out of
            `save_weights`; saving the whole distiller as `.keras` includes it.
        student: A functional or Sequential model with logits `[B, C]` for the same inputs.
        student_layers: Names of the student's shallow layers to supervise; `outer/inner` reaches
            into a nested model. Their outputs may be `[B, H, W, C]`, `[B, C, H, W]`, `[B, T, D]`
            or `[B, D]`. Defaults to none.
        teacher_layer: Name of the teacher's layer whose output supervises them. Defaults to the
            last feature map before the pooling.
        temperature: Positive number τ that softens both sides' logits. Defaults to 4.0.
        label_weight: Coefficient of the compiled loss. Defaults to 1.0.
        prediction_weight: Coefficient of the student's divergence from the teacher. Defaults
            to 1.0.
        deep_prediction_weight: Coefficient of the shallow layers' divergences. Defaults to 1.0.
        deep_feature_weight: Coefficient of the shallow layers' feature-map losses. Defaults to 1.0.
        weighting: The strategy that allocates weights to the shallow layers: `"softmax"`,
            `"proportional"`, `"inverse"`, `"uniform"`, or a `dskd_keras.weighting.Weighting`.
            Defaults to `"softmax"`.
        name: Optional name.
        **kwargs: `dtype` and `trainable`, as for `keras.Model`.

    Attributes:
        student: The student: what to save once trained.
        teacher: The `FrozenTeacher`, None where no term needs it.
        student_with_heads: The functional model of the student with its auxiliary heads, which
            gives `heads.Outputs`.
        prediction_weighting: The strategy's copy for the class-prediction losses.
        feature_weighting: The strategy's copy for the feature-map losses.
        resumed_at: The `Place` where training goes on. Who resumes a training within an epoch sets
            it before `fit`, since `fit` counts the rest of that epoch's steps from 0. Callbacks
            read it through `progress.steps_before`. Defaults to the beginning.

    Raises:
        InputError: An argument can't be used; the message says which and what would be right.

    Example:

    ```python
    distiller = dskd_keras.Distiller(teacher, student, student_layers=["stage1", "stage2"])
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
    teacher: FrozenTeacher | None
    student_with_heads: keras.Model
    prediction_weighting: Weighting
    feature_weighting: Weighting
    resumed_at: Place = Place()

    def __init__(
        self,
        teacher: keras.Model | None,
        student: keras.Model,
        student_layers: str | Iterable[str] = (),
        teacher_layer: str | None = None,
        temperature: float = 4.0,
        label_weight: float = 1.0,
        prediction_weight: float = 1.0,
        deep_prediction_weight: float = 1.0,
        deep_feature_weight: float = 1.0,
        weighting: str | dict[str, Any] | Weighting = "softmax",
        name: str | None = None,
        **kwargs: Any,
    ) -> None:
        for argument in kwargs.keys() - {"dtype", "trainable"}:
            _, *known, _ = inspect.signature(Distiller.__init__).parameters
            raise unknown_name("Distiller argument", argument, known)
        graph.check_classifier("student", student)
        if teacher is not None:
            graph.check_classifier("teacher", teacher)
            graph.check_pair(teacher, student)
        # Inputs go to the student as they come: casting them is its first layer's business.
        kwargs.setdefault("dtype", graph.precision(student))
        super().__init__(name=name, autocast=False, **kwargs)

        self.student = student
        self.student_layers = _names("student_layers", student_layers)
        self.teacher_layer = teacher_layer
        self.temperature = checks.real("temperature", temperature, above=0)
        self.label_weight = checks.real("label_weight", label_weight, least=0)
        self.prediction_weight = checks.real("prediction_weight", prediction_weight, least=0)
        self.deep_prediction_weight = checks.real(
            "deep_prediction_weight", deep_prediction_weight, least=0
        )
        self.deep_feature_weight = checks.real("deep_feature_weight", deep_feature_weight, least=0)

        # The kinds of loss that the shallow layers get.
        deep = []
        if self.student_layers and self.deep_prediction_weight:
            deep.append("prediction")
        if self.student_layers and self.deep_feature_weight:
            deep.append("feature")
        supervised = self.student_layers if deep else ()
        self.teacher = self._frozen(teacher, deep)
        # Two copies, because a strategy with a state must not mix the two kinds of loss.
        strategy = get_weighting(weighting)
        self.prediction_weighting, self.feature_weighting = (
            renamed(strategy, copy) for copy in ("prediction_weighting", "feature_weighting")
        )
        self.student_with_heads = heads.attach(
            student,
            supervised,
            teacher_shape=self.teacher.feature_shape if self.teacher else (),
            predictions="prediction" in deep,
            features="feature" in deep,
            dtype=self.dtype_policy,
        )
        if supervised:
            for strategy in (self.prediction_weighting, self.feature_weighting):
                strategy.build((len(supervised),))
        self._kl_divergence = KLDivergence(self.temperature)
        self._feature_loss = FeatureMeanSquaredError()
        self._batch_mean = _BatchMean()
        self._term_means = _TermMeans(self._names_of_terms(deep))
        self.built = True

    def _frozen(self, teacher: keras.Model | None, deep: list[str]) -> FrozenTeacher | None:
        """Returns the teacher, or None where no term needs one."""
        predictions = bool(self.prediction_weight or "prediction" in deep)
        if not (predictions or deep):
            if self.label_weight:
                return None
            raise InputError(
                "label_weight: 0.0 leaves no term. It should be positive, or prediction_weight, "
                "or, with student_layers, deep_prediction_weight or deep_feature_weight."
            )
        if teacher is None:
            raise InputError(
                "teacher: None, but prediction_weight, deep_prediction_weight or "
                "deep_feature_weight is positive. Give a teacher, or set them to 0."
            )
        return FrozenTeacher(teacher, predictions, bool(deep), self.teacher_layer)

    def _names_of_terms(self, deep: list[str]) -> list[str]:
        coefficients = {"label": self.label_weight, "prediction": self.prediction_weight}
        names = [f"{kind}_loss" for kind, coefficient in coefficients.items() if coefficient]
        names += [f"deep_{kind}_loss" for kind in deep]
        for what in ("loss", "allocation"):
            for kind in deep:
                names += [f"deep_{kind}_{what}/{layer}" for layer in self.student_layers]
        return names

    def call(self, inputs: Any, training: bool | None = False) -> Any:
        """Returns the student's logits `[B, C]`; with `training=True` its `heads.Outputs`."""
        if training:
            return self.student_with_heads(inputs, training=True)
        return keras.tree.flatten(self.student(inputs, training=False))[0]

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
            InputError: The compiled loss expects probabilities, or labels are outside the classes.
        """
        if self.compiled and (self.label_weight or self.loss is not None):
            labels.check_loss(self.loss)
        self._check_arrays(x, y)
        if y is None and kwargs.get("sample_weight") is not None:
            # Without any `y` Keras drops the weights and says nothing.
            y = Targets(None, None)
        if isinstance(y, Targets) and kwargs.get("class_weight") is not None:
            raise InputError(
                "class_weight: it can't be combined with Targets. Give the weight of each image as "
                "sample_weight."
            )
        if not isinstance(callbacks, keras.callbacks.CallbackList):
            callbacks = [] if callbacks is None else [*keras.tree.flatten(callbacks)]
            if verbose != 0 and not any(
                isinstance(callback, keras.callbacks.ProgbarLogger) for callback in callbacks
            ):
                callbacks.append(ProgressLine())
        return super().fit(x, y, batch_size, epochs, verbose, callbacks, **kwargs)

    def train_step(self, *args: Any) -> Any:
        """Runs the teacher, then Keras's own training step with its outputs as targets.

        The gradient code, mixed precision and loss scaling are those of the backend's Keras model.
        The teacher runs before them, so no gradient reaches it. `args` are `data`, on JAX
        `state, data`.
        """
        *state, data = args
        x, y, sample_weight = keras.utils.unpack_x_y_sample_weight(data)
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
        labels and logits `[B, C]`. `sample_weight` is None or `[B]`.
        """
        if isinstance(y_pred, heads.Outputs):
            return self._objective(y, y_pred, sample_weight)
        # Evaluation, and the symbolic build before training.
        label = y.label if isinstance(y, Targets) else y
        if self.loss is None or label is None:
            return ops.zeros(()) + sum(ops.sum(loss) for loss in self.losses)
        return super().compute_loss(x, label, y_pred, _of_image(sample_weight), training)

    def _objective(self, targets: Targets, outputs: heads.Outputs, sample_weight: Any) -> Any:
        label, teacher = targets
        self._check_teacher_outputs(teacher)
        if teacher is not None:
            teacher = keras.tree.map_structure(_full_precision, teacher)
        logits, deep_logits, deep_features = keras.tree.map_structure(_full_precision, outputs)
        terms = _Terms(self.student_layers, sample_weight)
        if self.label_weight:
            self._check_label_is_there(label)
            values = labels.per_image_loss(self.loss, label, logits)
            terms.add("label_loss", self.label_weight, values)
        if self.prediction_weight:
            values = self._kl_divergence.call(teacher["logits"], logits)
            terms.add("prediction_loss", self.prediction_weight, values)
        if deep_logits:
            terms.add_deep(
                "prediction",
                self.deep_prediction_weight,
                self.prediction_weighting,
                lambda layer: self._kl_divergence.call(teacher["logits"], deep_logits[layer]),
            )
        if deep_features:
            terms.add_deep(
                "feature",
                self.deep_feature_weight,
                self.feature_weighting,
                lambda layer: self._feature_loss.call(teacher["features"], deep_features[layer]),
            )
        means = ops.stack([terms.means[name] for name in self._term_means.names])
        self._term_means.update_state(means, ops.shape(logits)[0])
        total = self._batch_mean(terms.total, terms.sample_weight)
        if self.losses:
            regularisation = sum(ops.sum(_full_precision(loss)) for loss in self.losses)
            total = total + self._batch_mean(ops.reshape(regularisation, (1,)))
        return total

    def compute_metrics(
        self, x: Any, y: Any, y_pred: Any, sample_weight: Any = None
    ) -> dict[str, Any]:
        """Updates the compiled metrics on the student's logits and returns the logs."""
        label = y.label if isinstance(y, Targets) else y
        in_training = isinstance(y_pred, heads.Outputs)
        logits = y_pred.logits if in_training else y_pred
        logs = (
            self.get_metrics_result()
            if label is None
            else super().compute_metrics(x, label, logits, _of_image(sample_weight))
        )
        return {**logs, **self._term_means.result()} if in_training else logs

    def get_metrics_result(self) -> dict[str, Any]:
        """Returns `loss` and the compiled metrics: what `evaluate` reports."""
        results = {}
        for metric in self.metrics:
            # Without labels the compiled metrics are never built.
            if metric is self._term_means or not getattr(metric, "built", True):
                continue
            result = metric.result()
            results.update(result if isinstance(result, dict) else {metric.name: result})
        return results

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
        *totals, images = last_step.tolist()
        if not images:
            return {}
        return {
            name: total / images for name, total in zip(self._term_means.names, totals, strict=True)
        }

    @property
    def term_names(self) -> list[str]:
        """The names of the terms in the logs, in a fixed order: the keys of `step_terms`."""
        return list(self._term_means.names)

    @property
    def non_trainable_variables(self) -> list[keras.Variable]:
        """Those of the student and the heads, then the teacher's: JAX's step needs all of them."""
        variables = super().non_trainable_variables
        return variables if self.teacher is None else variables + self.teacher.variables

    def get_config(self) -> dict[str, Any]:
        """Returns the arguments that rebuild this distiller, both models included."""
        teacher = None if self.teacher is None else self.teacher.model
        return {
            **super().get_config(),
            "teacher": keras.saving.serialize_keras_object(teacher),
            "student": keras.saving.serialize_keras_object(self.student),
            "student_layers": list(self.student_layers),
            "teacher_layer": self.teacher_layer,
            "temperature": self.temperature,
            "label_weight": self.label_weight,
            "prediction_weight": self.prediction_weight,
            "deep_prediction_weight": self.deep_prediction_weight,
            "deep_feature_weight": self.deep_feature_weight,
            "weighting": keras.saving.serialize_keras_object(self.prediction_weighting),
        }

    @classmethod
    def from_config(
        cls, config: dict[str, Any], custom_objects: dict[str, Any] | None = None
    ) -> "Distiller":
        """Rebuilds a distiller from `get_config`."""
        config = dict(config)
        for field in ("teacher", "student", "weighting"):
            config[field] = keras.saving.deserialize_keras_object(
                config[field], custom_objects=custom_objects
            )
        return cls(**config)

    # Keras writes assets in `save` but not in `save_weights`. So a saved distiller can be loaded
    # whole, while checkpoints of weights hold only what changes.

    def save_assets(self, dir_path: str) -> None:
        """Writes the teacher's weights into a `.keras` file."""
        if self.teacher is not None:
            self.teacher.model.save_weights(f"{dir_path}/teacher.weights.h5")

    def load_assets(self, dir_path: str) -> None:
        """Reads the teacher's weights from a `.keras` file."""
        if self.teacher is not None:
            self.teacher.model.load_weights(f"{dir_path}/teacher.weights.h5")

    def _run_teacher(self, x: Any, state: Any = None) -> dict[str, Any] | None:
        if self.teacher is None:
            return None
        if state is None:
            return self.teacher(x)
        # On JAX the variables hold no values during training. They are in the step's state, where
        # the teacher's are the last (see `non_trainable_variables`).
        _, non_trainable, *_ = state
        return self.teacher(x, non_trainable[-len(self.teacher.variables) :])

    def _check_arrays(self, x: Any, y: Any) -> None:
        """Checks what `fit` got, where it is arrays. A stream is checked in its first step."""
        label = y.label if isinstance(y, Targets) else y
        if isinstance(x, np.ndarray):
            self._check_label_is_there(label)
        if isinstance(y, Targets) and y.teacher is not None:
            self._check_teacher_outputs(y.teacher)
        if isinstance(label, np.ndarray):
            labels.check_range(label, self.loss, self.student.outputs[0].shape[-1])

    def _check_label_is_there(self, label: Any) -> None:
        if label is None and self.label_weight:
            raise InputError(f"y: no labels, but label_weight={self.label_weight} needs them.")

    def _check_teacher_outputs(self, outputs: Any) -> None:
        needed = [] if self.teacher is None else self.teacher.output_names
        missing = [name for name in needed if outputs is None or name not in outputs]
        if missing:
            raise InputError(
                f"y: Targets without the teacher's {' and '.join(missing)}, which this distiller's "
                "terms need. Compute them with distiller.targets(x, y)."
            )


class _Terms:
    """The terms of one training step, as they are added up."""

    def __init__(self, layers: Sequence[str], sample_weight: Any) -> None:
        self.means: dict[str, Any] = {}  # over the batch, by the names in the logs
        self.total: Any = 0  # of the terms times their coefficients, one value an image
        self.sample_weight = sample_weight
        if sample_weight is not None:
            self.sample_weight = ops.reshape(_full_precision(sample_weight), (-1,))
        self._layers = layers

    def add(self, name: str, coefficient: float, values: Any) -> None:
        """Adds a term of the student's output, one value an image."""
        self.means[name] = self._mean(values)
        self.total = self.total + coefficient * values

    def add_deep(
        self, kind: str, coefficient: float, weighting: Weighting, loss: Callable[[str], Any]
    ) -> None:
        """Adds a term of the shallow layers; `loss` gives that of a layer, one value an image."""
        values = [loss(layer) for layer in self._layers]
        means = _mean_over_replicas(ops.stack([self._mean(of_layer) for of_layer in values]))
        weights = _full_precision(weighting(means))
        for layer, mean, weight in zip(
            self._layers, ops.unstack(means), ops.unstack(weights), strict=True
        ):
            self.means[f"deep_{kind}_loss/{layer}"] = mean
            self.means[f"deep_{kind}_allocation/{layer}"] = weight
        self.means[f"deep_{kind}_loss"] = ops.sum(weights * means)
        self.total = self.total + coefficient * ops.matmul(weights, ops.stack(values))

    def _mean(self, values: Any) -> Any:
        return ops.mean(values if self.sample_weight is None else values * self.sample_weight)


class _BatchMean(keras.losses.Loss):
    """The mean of one value an image: Σ w·l / B.

    `tf.distribute` sums the losses of the replicas, and a Keras loss scales itself by their number.
    """

    def __init__(self) -> None:
        super().__init__(name="batch_mean")

    def __call__(self, values: Any, sample_weight: Any = None) -> Any:
        # Keras pairs predictions with targets. Here the values are both.
        return super().__call__(values, values, sample_weight)

    def call(self, y_true: Any, y_pred: Any) -> Any:
        return y_pred


class _TermMeans(keras.metrics.Metric):
    """The means of all terms over an epoch, in one metric: a step updates it once.

    `last_step` holds what the last step added: the totals of the terms, then its number of images.
    Under `tf.distribute` the variables of metrics are summed over the replicas. A mean would be
    wrong then, while the quotient of two sums is right.
    """

    def __init__(self, names: list[str]) -> None:
        super().__init__(name="term_means")
        self.names = names
        self.total = self.add_weight(shape=(len(names),), initializer="zeros", name="total")
        self.images = self.add_weight(initializer="zeros", name="images")
        self.last_step = self.add_weight(
            shape=(len(names) + 1,), initializer="zeros", name="last_step"
        )

    def update_state(self, values: Any, batch_size: Any) -> None:
        batch_size = ops.cast(batch_size, self.dtype)
        values = ops.cast(values, self.dtype) * batch_size
        self.total.assign_add(values)
        self.images.assign_add(batch_size)
        self.last_step.assign(ops.append(values, batch_size))

    def result(self) -> dict[str, Any]:
        means = ops.divide_no_nan(self.total.value, self.images.value)
        return dict(zip(self.names, ops.unstack(means), strict=True))

    def reset_state(self) -> None:
        # Not `last_step`, which callbacks read: `evaluate` within `fit` resets all metrics.
        for variable in (self.total, self.images):
            variable.assign(ops.zeros(variable.shape, dtype=variable.dtype))

    # Files hold no `last_step`: it is over once they are read.

    def save_own_variables(self, store: Any) -> None:
        store["0"], store["1"] = self.total, self.images

    def load_own_variables(self, store: Any) -> None:
        self.total.assign(store["0"])
        self.images.assign(store["1"])


def _of_image(sample_weight: Any) -> Any:
    """Returns one value an image: beside `Targets` Keras copies `sample_weight` for every leaf."""
    if isinstance(sample_weight, Targets):
        return next(leaf for leaf in keras.tree.flatten(sample_weight) if leaf is not None)
    return sample_weight


def _full_precision(x: Any) -> Any:
    return ops.cast(x, keras.config.floatx())


def _mean_over_replicas(values: Any) -> Any:
    """Returns means over the replicas of `tf.distribute`, so that all of them allocate alike."""
    if keras.backend.backend() != "tensorflow":
        return values
    import tensorflow as tf

    context = tf.distribute.get_replica_context()
    if context is None or context.num_replicas_in_sync == 1:
        return values
    return context.all_reduce(tf.distribute.ReduceOp.MEAN, values)


def _names(field: str, names: str | Iterable[str]) -> tuple[str, ...]:
    names = (names,) if isinstance(names, str) else tuple(names or ())
    if len(set(names)) != len(names):
        raise wrong(field, list(names), "a list that names each layer once")
    return names
