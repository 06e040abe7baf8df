"""The model that trains a student under a frozen teacher."""

import inspect
from typing import Any, NamedTuple

import keras
import numpy as np
from keras import ops

from dskd_keras import graph, heads, labels
from dskd_keras.callbacks import ProgressLine
from dskd_keras.errors import InputError, unknown_name
from dskd_keras.losses import (
    FeatureMeanSquaredError,
    KLDivergence,
    check_coefficient,
    check_temperature,
)
from dskd_keras.teacher import FrozenTeacher
from dskd_keras.weighting import get as get_weighting


class Targets(NamedTuple):
    """What the training loss compares the student with.

    Attributes:
        label: The labels as `fit` got them, or None.
        teacher: The teacher's outputs for the same images: a dict with `"logits"` `[B, C]` and
            `"features"` (channels last), each where a term needs it; None where none does, or
            where `fit` is to run the teacher.
    """

    label: Any
    teacher: Any


@keras.saving.register_keras_serializable("dskd_keras")
class Distiller(keras.Model):
    """Trains a student with deeply-supervised knowledge distillation (DSKD, arXiv 2202.07846).

    A frozen teacher's class predictions and last feature map supervise the student's output and,
    through auxiliary heads, its shallow layers. With `a_l` the temperature-softened divergence of
    head l from the teacher, `b_l` the mean squared difference of its projected feature map, and
    `u`, `v` the weights that the loss-based allocation gives to their batch means:

    ```
    loss = label_weight           · loss(y, student)
         + prediction_weight      · KL_τ(teacher, student)
         + deep_prediction_weight · Σ_l u_l a_l
         + deep_feature_weight    · Σ_l v_l b_l
         + the student's own regularisation losses
    ```

    Every term is one value an image, and with `sample_weight` w the mean of a batch is Σ w·l / B
    for all terms alike. A term with weight 0 is not computed. Without `student_layers` this is
    plain distillation, with `prediction_weight=0` too it is ordinary training, and then `teacher`
    may be None. With `label_weight=0` no labels are needed.

    `distiller(x)`, `predict` and `evaluate` are the student's alone: neither teacher nor heads are
    run. `fit` logs every term and, for each layer, its losses and its allocated weights. `loss` is
    the whole objective while `val_loss` is the compiled loss on the labels, so the two are not
    comparable.

    Args:
        teacher: A functional or Sequential model with logits `[B, C]`, or None. It is frozen
            (`teacher.trainable` becomes False), run in inference mode, and left out of
            `save_weights`; saving the whole distiller as `.keras` includes it.
        student: A functional or Sequential model with logits `[B, C]` for the same inputs. Also
            `distiller.student`: what to save once trained.
        student_layers: Names of the student's shallow layers to supervise; `outer/inner` reaches
            into a nested model. Their outputs may be `[B, H, W, C]`, `[B, C, H, W]`, `[B, T, D]`
            or `[B, D]`. Defaults to none.
        teacher_layer: Name of the teacher's layer whose output supervises them. Defaults to the
            last feature map before the pooling.
        temperature: Positive float τ that softens both sides' logits. Defaults to 4.0.
        label_weight: Coefficient of the compiled loss. Defaults to 1.0.
        prediction_weight: Coefficient of the student's divergence from the teacher. Defaults
            to 1.0.
        deep_prediction_weight: Coefficient of the shallow layers' divergences. Defaults to 1.0.
        deep_feature_weight: Coefficient of the shallow layers' feature-map losses. Defaults to 1.0.
        weighting: How the shallow layers share those two: `"softmax"`, `"proportional"`,
            `"inverse"`, `"uniform"`, or a `dskd_keras.weighting.Weighting`. Defaults to
            `"softmax"`.
        name: Optional name.

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

    def __init__(
        self,
        teacher,
        student,
        student_layers=(),
        teacher_layer=None,
        temperature=4.0,
        label_weight=1.0,
        prediction_weight=1.0,
        deep_prediction_weight=1.0,
        deep_feature_weight=1.0,
        weighting="softmax",
        name=None,
        **kwargs,
    ):
        for argument in kwargs.keys() - {"dtype", "trainable"}:
            raise unknown_name("Distiller argument", argument, _ARGUMENTS)
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
        self.temperature = check_temperature("temperature", temperature)
        self.label_weight = check_coefficient("label_weight", label_weight)
        self.prediction_weight = check_coefficient("prediction_weight", prediction_weight)
        self.deep_prediction_weight = check_coefficient(
            "deep_prediction_weight", deep_prediction_weight
        )
        self.deep_feature_weight = check_coefficient("deep_feature_weight", deep_feature_weight)

        deep_predictions = bool(self.student_layers and self.deep_prediction_weight)
        deep_features = bool(self.student_layers and self.deep_feature_weight)
        supervised = self.student_layers if deep_predictions or deep_features else ()
        needs_logits = bool(self.prediction_weight or deep_predictions)
        if not (self.label_weight or needs_logits or supervised):
            raise InputError(
                "label_weight, prediction_weight, deep_prediction_weight and deep_feature_weight "
                "leave no term: at least one should be positive (the last two count only with "
                "student_layers)."
            )
        self.teacher = None
        if needs_logits or supervised:
            if teacher is None:
                raise InputError(
                    "teacher: None, but prediction_weight, deep_prediction_weight or "
                    "deep_feature_weight is positive. Give a teacher, or set them to 0."
                )
            self.teacher = FrozenTeacher(
                teacher,
                predictions=needs_logits,
                features=bool(supervised),
                layer=teacher_layer,
            )

        # Two copies, since a strategy with a state must not mix the two kinds of loss.
        strategy = get_weighting(weighting)
        self.prediction_weighting, self.feature_weighting = (
            type(strategy).from_config({**strategy.get_config(), "name": name})
            for name in ("prediction_weighting", "feature_weighting")
        )
        self.student_with_heads = heads.attach(
            student,
            supervised,
            teacher_shape=self.teacher.feature_shape if supervised else None,
            num_classes=student.outputs[0].shape[-1],
            predictions=deep_predictions,
            features=deep_features,
            dtype=self.dtype_policy,
        )
        if supervised:
            for strategy in (self.prediction_weighting, self.feature_weighting):
                strategy.build((len(supervised),))
        self._kl_divergence = KLDivergence(self.temperature)
        self._feature_loss = FeatureMeanSquaredError()
        self._batch_mean = _BatchMean()
        self._term_means = _TermMeans(self._term_names(deep_predictions, deep_features))
        self.built = True

    def call(self, inputs, training=False):
        """Returns the student's logits `[B, C]`; with `training=True` its `heads.Outputs`."""
        if training:
            return self.student_with_heads(inputs, training=True)
        return keras.tree.flatten(self.student(inputs, training=False))[0]

    def targets(self, x, y=None, batch_size=None):
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
        self, x=None, y=None, batch_size=None, epochs=1, verbose="auto", callbacks=None, **kwargs
    ):
        """Trains the student. Arguments and result are those of `keras.Model.fit`.

        `y` may be `Targets`, computed beforehand by `targets`. The progress bar leaves out the
        values of single layers; the logs that callbacks and the returned history get have them.

        Raises:
            InputError: The compiled loss expects probabilities, or labels are outside the classes.
        """
        if self.compiled and (self.label_weight or self.loss is not None):
            labels.check_loss(self.loss)
        label = y.label if isinstance(y, Targets) else y
        # What can be seen of arrays is said here; of a stream only the first step can say it.
        if isinstance(x, np.ndarray):
            self._check_label_is_there(label)
        if isinstance(y, Targets) and y.teacher is not None:
            self._check_teacher_outputs(y.teacher)
        if isinstance(label, np.ndarray):
            labels.check_range(label, self.loss, self.student.outputs[0].shape[-1])
        if y is None and kwargs.get("sample_weight") is not None:
            # Without any `y` Keras drops the weights and says nothing.
            y = Targets(None, None)
        if isinstance(y, Targets) and kwargs.get("class_weight") is not None:
            raise InputError(
                "class_weight can't be combined with Targets. Give the weight of each image as "
                "sample_weight."
            )
        if not isinstance(callbacks, keras.callbacks.CallbackList):
            callbacks = [] if callbacks is None else [*keras.tree.flatten(callbacks)]
            if verbose != 0 and not any(
                isinstance(callback, keras.callbacks.ProgbarLogger) for callback in callbacks
            ):
                callbacks.append(ProgressLine())
        return super().fit(x, y, batch_size, epochs, verbose, callbacks, **kwargs)

    def train_step(self, *args):
        """Runs the teacher, then Keras's own training step with its outputs as targets.

        The gradient code, mixed precision and loss scaling are those of the backend's Keras model;
        the teacher runs before them, so no gradient reaches it.

        Args:
            *args: `data`; on JAX `state, data`.
        """
        *state, data = args
        x, y, sample_weight = keras.utils.unpack_x_y_sample_weight(data)
        label, outputs = y if isinstance(y, Targets) else (y, None)
        if outputs is None:
            outputs = self._run_teacher(x, *state)
        y = Targets(label, outputs)
        return super().train_step(*state, (x, y, _of_image(sample_weight)))

    def compute_loss(self, x=None, y=None, y_pred=None, sample_weight=None, training=True):
        """Returns the objective in a training step, the compiled loss on the labels elsewhere.

        Args:
            x: The batch; not used.
            y: `Targets` in a training step, else the labels.
            y_pred: `heads.Outputs` in a training step, else logits `[B, C]`.
            sample_weight: None or `[B]`.
            training: As in Keras.
        """
        if not isinstance(y_pred, heads.Outputs):
            # Evaluation, and the symbolic build before training.
            label = y.label if isinstance(y, Targets) else y
            if self.loss is None or label is None:
                return ops.zeros(()) + sum(ops.sum(loss) for loss in self.losses)
            return super().compute_loss(x, label, y_pred, _of_image(sample_weight), training)

        if sample_weight is not None:
            sample_weight = ops.reshape(ops.cast(sample_weight, keras.config.floatx()), (-1,))
        label, teacher = y
        self._check_teacher_outputs(teacher)
        logits, deep_logits, deep_features = keras.tree.map_structure(_full_precision, y_pred)
        terms, means = [], {}

        def batch_mean(values):
            return ops.mean(values if sample_weight is None else values * sample_weight)

        def deep_term(kind, weighting, values):
            means_by_layer = _mean_over_replicas(ops.stack([batch_mean(v) for v in values]))
            weights = _full_precision(weighting(means_by_layer))
            for layer, mean, weight in zip(
                self.student_layers, ops.unstack(means_by_layer), ops.unstack(weights), strict=True
            ):
                means[f"deep_{kind}_loss/{layer}"] = mean
                means[f"deep_{kind}_allocation/{layer}"] = weight
            means[f"deep_{kind}_loss"] = ops.sum(weights * means_by_layer)
            return ops.matmul(weights, ops.stack(values))

        if self.label_weight:
            self._check_label_is_there(label)
            values = labels.per_image_loss(self.loss, label, logits)
            means["label_loss"] = batch_mean(values)
            terms.append(self.label_weight * values)
        if teacher is not None:
            teacher = keras.tree.map_structure(_full_precision, teacher)
        if self.prediction_weight:
            values = self._kl_divergence.call(teacher["logits"], logits)
            means["prediction_loss"] = batch_mean(values)
            terms.append(self.prediction_weight * values)
        if deep_logits:
            values = [
                self._kl_divergence.call(teacher["logits"], deep_logits[layer])
                for layer in self.student_layers
            ]
            values = deep_term("prediction", self.prediction_weighting, values)
            terms.append(self.deep_prediction_weight * values)
        if deep_features:
            values = [
                self._feature_loss.call(teacher["features"], deep_features[layer])
                for layer in self.student_layers
            ]
            values = deep_term("feature", self.feature_weighting, values)
            terms.append(self.deep_feature_weight * values)

        self._term_means.update_state(
            ops.stack([means[name] for name in self._term_means.names]), ops.shape(logits)[0]
        )
        total = self._batch_mean(sum(terms), sample_weight)
        if self.losses:
            regularisation = sum(ops.sum(_full_precision(loss)) for loss in self.losses)
            total = total + self._batch_mean(ops.reshape(regularisation, (1,)))
        return total

    def compute_metrics(self, x, y, y_pred, sample_weight=None):
        """Updates the compiled metrics on the student's logits and returns the logs."""
        label = y.label if isinstance(y, Targets) else y
        if not isinstance(y_pred, heads.Outputs):
            if label is None:
                return self.get_metrics_result()
            return super().compute_metrics(x, label, y_pred, _of_image(sample_weight))
        logs = (
            self.get_metrics_result()
            if label is None
            else super().compute_metrics(x, label, y_pred.logits, sample_weight)
        )
        return {**logs, **self._term_means.result()}

    def get_metrics_result(self):
        """Returns `loss` and the compiled metrics: what `evaluate` reports."""
        results = {}
        for metric in self.metrics:
            # Compiled metrics are unbuilt where there are no labels to build them on.
            if metric is self._term_means or not getattr(metric, "built", True):
                continue
            result = metric.result()
            results.update(result if isinstance(result, dict) else {metric.name: result})
        return results

    def step_terms(self):
        """Returns the terms of the last training step alone; the logs hold means over the epoch.

        For callbacks, in `on_train_batch_end`, and after `train_on_batch`. With
        `steps_per_execution` it is the last step of those that ran together.

        Returns:
            A dict of floats, without unit: every term of the logs except `loss` and the compiled
            metrics, under the same names. `deep_prediction_loss/NAME` and
            `deep_prediction_allocation/NAME` are the loss of the layer NAME and the weight that it
            got, `deep_prediction_loss` is their sum of products; for the feature maps likewise.
            Empty before the first step.

        Example:

        ```python
        distiller.train_on_batch(x, y)
        distiller.step_terms()["deep_feature_allocation/stage1"]
        ```
        """
        *totals, images = self._last_step().tolist()
        if not images:
            return {}
        return {
            name: total / images for name, total in zip(self._term_means.names, totals, strict=True)
        }

    @property
    def term_names(self):
        """The names of the terms in the logs, a list in a fixed order: the keys of `step_terms`."""
        return list(self._term_means.names)

    def _last_step(self):
        variable = self._term_means.last_step
        # On JAX the variables hold no values during `fit`, they are in the state between the steps.
        # `jax_state_sync` would put all of them back, the teacher's too, and here one is enough.
        if getattr(self, "_jax_state", None) and not self._jax_state_synced:
            index = [v is variable for v in self.metrics_variables].index(True)
            variable = self._jax_state["metrics_variables"][index]
        return ops.convert_to_numpy(variable)

    @property
    def non_trainable_variables(self):
        """The student's and the heads', then the teacher's, which JAX needs in the step's state."""
        variables = super().non_trainable_variables
        return variables if self.teacher is None else variables + self.teacher.variables

    def get_config(self):
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
    def from_config(cls, config, custom_objects=None):
        """Rebuilds a distiller from `get_config`."""
        config = dict(config)
        for field in ("teacher", "student", "weighting"):
            config[field] = keras.saving.deserialize_keras_object(
                config[field], custom_objects=custom_objects
            )
        return cls(**config)

    # Assets are written by `save` and not by `save_weights`: the whole distiller can be loaded
    # again, while checkpoints of weights hold only what changes.

    def save_assets(self, dir_path):
        """Writes the teacher's weights into a `.keras` file."""
        if self.teacher is not None:
            self.teacher.model.save_weights(f"{dir_path}/teacher.weights.h5")

    def load_assets(self, dir_path):
        """Reads the teacher's weights from a `.keras` file."""
        if self.teacher is not None:
            self.teacher.model.load_weights(f"{dir_path}/teacher.weights.h5")

    def _run_teacher(self, x, state=None):
        if self.teacher is None:
            return None
        if state is None:
            return self.teacher(x)
        # On JAX the variables hold no values during training: they are in the step's state, the
        # teacher's last (see `non_trainable_variables`).
        _, non_trainable, *_ = state
        return self.teacher(x, non_trainable[-len(self.teacher.variables) :])

    def _term_names(self, deep_predictions, deep_features):
        names = []
        if self.label_weight:
            names.append("label_loss")
        if self.prediction_weight:
            names.append("prediction_loss")
        kinds = [("prediction", deep_predictions), ("feature", deep_features)]
        names += [f"deep_{kind}_loss" for kind, used in kinds if used]
        for what in ("loss", "allocation"):
            for kind, used in kinds:
                if used:
                    names += [f"deep_{kind}_{what}/{layer}" for layer in self.student_layers]
        return names

    def _check_label_is_there(self, label):
        if label is None and self.label_weight:
            raise InputError(f"y: no labels, but label_weight={self.label_weight} needs them.")

    def _check_teacher_outputs(self, outputs):
        needed = [] if self.teacher is None else self.teacher.output_names
        missing = [name for name in needed if outputs is None or name not in outputs]
        if missing:
            raise InputError(
                f"y: Targets without the teacher's {' and '.join(missing)}, which this distiller's "
                "terms need. Compute them with distiller.targets(x, y)."
            )


class _BatchMean(keras.losses.Loss):
    """The mean of one value an image: Σ w·l / B.

    Being a Keras loss it scales itself by the number of replicas under `tf.distribute`, which sums
    their losses.
    """

    def __init__(self):
        super().__init__(name="batch_mean")

    def __call__(self, values, sample_weight=None):
        # Keras pairs predictions with targets; there are none left here.
        return super().__call__(values, values, sample_weight)

    def call(self, y_true, y_pred):
        return y_pred


class _TermMeans(keras.metrics.Metric):
    """Means of all terms over an epoch, in one variable: one update a step instead of dozens.

    `last_step` holds what the last step added: the terms' totals, then its number of images. Under
    `tf.distribute` variables of metrics are summed over the replicas, so that their quotient is
    right where the means themselves would not be.
    """

    def __init__(self, names):
        super().__init__(name="term_means")
        self.names = names
        self.total = self.add_weight(shape=(len(names),), initializer="zeros", name="total")
        self.images = self.add_weight(initializer="zeros", name="images")
        self.last_step = self.add_weight(
            shape=(len(names) + 1,), initializer="zeros", name="last_step"
        )

    def update_state(self, values, batch_size):
        batch_size = ops.cast(batch_size, self.dtype)
        values = ops.cast(values, self.dtype) * batch_size
        self.total.assign_add(values)
        self.images.assign_add(batch_size)
        self.last_step.assign(ops.append(values, batch_size))

    def result(self):
        means = ops.divide_no_nan(self.total.value, self.images.value)
        return dict(zip(self.names, ops.unstack(means), strict=True))

    def reset_state(self):
        # The last step stays the last step: `evaluate` within `fit` resets all metrics.
        for variable in (self.total, self.images):
            variable.assign(ops.zeros(variable.shape, dtype=variable.dtype))

    # Files hold the means alone: the last step is over once they are read.

    def save_own_variables(self, store):
        store["0"], store["1"] = self.total, self.images

    def load_own_variables(self, store):
        self.total.assign(store["0"])
        self.images.assign(store["1"])


def _of_image(sample_weight):
    """Undoes what Keras makes of `sample_weight` beside `Targets`: a copy for every leaf."""
    if isinstance(sample_weight, Targets):
        return next(leaf for leaf in keras.tree.flatten(sample_weight) if leaf is not None)
    return sample_weight


def _full_precision(x):
    return ops.cast(x, keras.config.floatx())


def _mean_over_replicas(values):
    """Means over the replicas of `tf.distribute`, so that all of them allocate alike."""
    if keras.backend.backend() != "tensorflow":
        return values
    import tensorflow as tf

    context = tf.distribute.get_replica_context()
    if context is None or context.num_replicas_in_sync == 1:
        return values
    return context.all_reduce(tf.distribute.ReduceOp.MEAN, values)


def _names(field, names):
    names = (names,) if isinstance(names, str) else tuple(names or ())
    if len(set(names)) != len(names):
        raise InputError(f"{field} names a layer twice. Received: {', '.join(names)}.")
    return names


# Without `self` and `kwargs`.
_ARGUMENTS = list(inspect.signature(Distiller.__init__).parameters)[1:-1]
