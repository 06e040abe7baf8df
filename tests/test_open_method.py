"""Losses, heads and numbers of the objective that a user exchanges."""

import json

import keras
import numpy as np
import pytest
import small
from keras import layers

import dskd_keras
from dskd_keras import coefficients, heads, losses

BACKEND = keras.backend.backend()
NAMES = coefficients.NAMES


def array(x):
    return np.asarray(keras.ops.convert_to_numpy(x), "float64")


def make(layers_of=("stage1", "stage2"), rate=0.0, **options):
    keras.utils.set_random_seed(1)
    distiller = dskd_keras.Distiller(
        small.convnet("teacher", width=5),
        small.convnet("student", batch_norm=False),
        list(layers_of),
        **options,
    )
    distiller.compile(keras.optimizers.SGD(rate), loss=small.crossentropy())
    return distiller


def step(distiller, x, y):
    logs = distiller.train_on_batch(x, y, return_dict=True)
    return {name: float(value) for name, value in logs.items()}


@keras.saving.register_keras_serializable("tests")
def absolute(y_true, y_pred):
    return keras.ops.mean(keras.ops.abs(y_true - y_pred), axis=-1)


@keras.saving.register_keras_serializable("tests")
class Pointwise(heads.Head):
    def __init__(self, units=None):
        self.units = units

    def project(self, x, teacher_shape, mask=None):
        units = self.units or teacher_shape[-1]
        return layers.Dense(units, **self.named("projection"))(x)

    def get_config(self):
        return {"units": self.units}


@pytest.mark.parametrize(
    "options",
    [
        {"prediction_loss": "decoupled_kl_divergence", "feature_loss": "attention_transfer"},
        {"prediction_loss": losses.DIST(temperature=2.0), "feature_loss": "cosine_features"},
        {"prediction_loss": "standardized_kl_divergence"},
        {"prediction_loss": absolute, "feature_loss": absolute, "head": Pointwise()},
        {"feature_loss": keras.losses.LogCosh(), "head": Pointwise()},
    ],
    ids=["dkd+at", "dist+cosine", "standardized", "function", "keras loss"],
)
@small.eagerly()
def test_losses_and_heads_are_exchanged_and_saved(options, tmp_path):
    x, y = small.images(6)
    distiller = make(rate=0.05, **options)
    before = small.values(distiller.trainable_variables)
    logs = step(distiller, x, y)
    assert all(np.isfinite(value) for value in logs.values())
    after = small.values(distiller.trainable_variables)
    assert all(np.isfinite(b).all() for b in after)
    assert all((a != b).any() for a, b in zip(before, after, strict=True))
    distiller.save(tmp_path / "d.keras")
    loaded = keras.models.load_model(tmp_path / "d.keras")
    assert json.dumps(loaded.get_config()) == json.dumps(distiller.get_config())
    for each in (distiller, loaded):
        each.reset_metrics()
    again = step(loaded, x, y)
    for name, value in step(distiller, x, y).items():
        assert again[name] == pytest.approx(value, rel=1e-4), name


@small.eagerly()
def test_the_objective_is_that_of_the_losses_given():
    x, y = small.images(6)
    distiller = make(
        prediction_loss="decoupled_kl_divergence", feature_loss=absolute, head=Pointwise(),
        temperature=3.0, teacher_layer=["stage1", "stage2"],
    )  # fmt: skip
    logs = step(distiller, x, y)
    p, q = (keras.ops.convert_to_tensor(array(m(x)), "float32")
            for m in (distiller.teacher.model, distiller.student))  # fmt: skip
    expected = losses.DecoupledKLDivergence(3.0).call(p, q, label=y)
    assert logs["prediction_loss"] == pytest.approx(array(expected).mean(), rel=1e-4)
    maps = distiller.teacher(keras.ops.convert_to_tensor(x))
    projected = distiller(x, training=True).deep_features
    for layer in ("stage1", "stage2"):
        difference = np.abs(array(maps[f"features/{layer}"]) - array(projected[layer]))
        assert logs[f"deep_feature_loss/{layer}"] == pytest.approx(difference.mean(), rel=1e-4)


def softened(y_true, y_pred, temperature):
    return keras.ops.mean(keras.ops.square(y_true - y_pred) / temperature, axis=-1)


@small.eagerly()
def test_a_function_may_take_the_temperature():
    x, y = small.images(6)
    distiller = make(prediction_loss=softened, temperature=2.0)
    p, q = (array(m(x)) for m in (distiller.teacher.model, distiller.student))
    expected = np.square(p - q).mean() / 2.0
    assert step(distiller, x, y)["prediction_loss"] == pytest.approx(expected, rel=1e-4)


def needs_labels(y_true, y_pred, labels):
    return y_true


def scalar(y_true, y_pred):
    return keras.ops.mean(y_true - y_pred)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"prediction_loss": "kl"}, "prediction_loss: 'kl' should be a known name"),
        ({"feature_loss": "mse_"}, "feature_loss: 'mse_' should be a known name"),
        ({"feature_loss": 3}, "feature_loss: 3 should be"),
        ({"head": "deep"}, "head: 'deep' should be a known name. Choices: separable"),
        ({"head": Pointwise}, "head: .* or an object of a dskd_keras.heads.Head"),
        (
            {"prediction_loss": scalar},
            "prediction_loss: scalar gives one value for the whole batch",
        ),
        ({"feature_loss": scalar}, "feature_loss: scalar gives one value for the whole batch"),
        (
            {"prediction_loss": needs_labels},
            "prediction_loss: needs_labels needs 'labels', which is not given to it. Beside the "
            "teacher's side and the student's it may name label and mask and temperature.",
        ),
        ({"feature_loss": needs_labels}, "feature_loss: needs_labels needs 'labels'.* name mask"),
        ({"head": Pointwise(3)}, r"feature_mean_squared_error|channels"),
    ],
)
@small.eagerly()
def test_what_can_not_be_exchanged(options, message):
    with pytest.raises(dskd_keras.InputError, match=message) as error:
        distiller = make(**options)
        distiller.fit(*small.images(4), verbose=0)
    assert "\n" not in str(error.value)


def test_losses_that_take_no_mask_are_refused_where_something_is_padded():
    def tagger(name):
        inputs = keras.Input((4,), dtype="int32")
        x = layers.Embedding(9, 5, mask_zero=True, name="block1")(inputs)
        x = layers.GlobalAveragePooling1D()(x)
        return keras.Model(inputs, layers.Dense(3, name="logits")(x), name=name)

    def per_image(y_true, y_pred):
        return keras.ops.mean(keras.ops.abs(y_true - y_pred), axis=(1, 2))

    class NoMask(heads.Head):
        def project(self, x, teacher_shape):
            return layers.Dense(teacher_shape[-1])(x)

    x, y = np.array([[1, 2, 0, 0]]), np.array([0])
    options = {"teacher_layer": "block1", "student_layers": ["block1"]}
    distiller = dskd_keras.Distiller(
        tagger("teacher"), tagger("student"), feature_loss=per_image, **options
    )
    distiller.compile("sgd", loss=small.crossentropy())
    with pytest.raises(dskd_keras.InputError, match="gives one value an image and takes no mask"):
        distiller.fit(x, y, verbose=0)
    with pytest.raises(dskd_keras.InputError, match=r"head: .*NoMask.project takes no mask"):
        dskd_keras.Distiller(tagger("teacher"), tagger("student"), head=NoMask(), **options)


# Numbers that change while it trains.


def test_a_number_that_is_assigned_changes_the_compiled_step():
    x, y = small.images(6)
    changed = make(temperature=2.0)
    before = step(changed, x, y)  # compiles
    # One after the other, so that one program shows it of all of them. Only a small temperature
    # changes the loss by more than its rounding.
    numbers = dict(zip(NAMES, (0.2, 3.0, 4.0, 5.0, 6.0), strict=True))
    for name, number in numbers.items():
        setattr(changed, name, number)
        changed.reset_metrics()
        after = step(changed, x, y)
        assert changed.get_config()[name] == getattr(changed, name) == number
        assert after["loss"] != pytest.approx(before["loss"], rel=1e-3), name
        if name != "temperature":
            term = before[name.replace("_weight", "_loss")]
            expected = before["loss"] + (number - 1.0) * term
            assert after["loss"] == pytest.approx(expected, rel=1e-4), name
        before = after
    for term, value in step(make(**numbers), x, y).items():
        assert after[term] == pytest.approx(value, rel=1e-4), term


def test_a_callback_schedules_them():
    x, y = small.images(8)
    distiller = make(weighting="uniform")
    seen = []

    class Schedule(keras.callbacks.Callback):
        def on_train_batch_begin(self, batch, logs=None):
            self.model.deep_feature_weight = float(batch)

        def on_train_batch_end(self, batch, logs=None):
            seen.append((self.model.deep_feature_weight, self.model.step_terms()))

    losses_of = []
    loss = keras.callbacks.LambdaCallback(
        on_train_batch_end=lambda batch, logs: losses_of.append(float(logs["loss"]))
    )
    distiller.fit(x, y, batch_size=4, shuffle=False, callbacks=[Schedule(), loss], verbose=0)
    assert [weight for weight, _ in seen] == [0.0, 1.0]
    totals = [
        sum(value * (weight if name == "deep_feature_loss" else 1) for name, value in terms.items()
            if "/" not in name)
        for weight, terms in seen
    ]  # fmt: skip
    # Keras's loss is the mean since the epoch began.
    assert losses_of[0] == pytest.approx(totals[0], rel=1e-4)
    assert losses_of[1] == pytest.approx(np.mean(totals), rel=1e-4)
    assert distiller.deep_feature_weight == 1.0


def test_they_are_saved_and_restored(tmp_path):
    distiller = make(["stage1"])
    distiller.temperature, distiller.label_weight = 0.1, 0.3
    distiller.save_weights(tmp_path / "d.weights.h5")
    other = make(["stage1"])
    other.load_weights(tmp_path / "d.weights.h5")
    assert (other.temperature, other.label_weight, other.prediction_weight) == (0.1, 0.3, 1.0)


def test_numbers_that_can_not_be_assigned():
    distiller = make(deep_feature_weight=0)
    for name, value, message in (
        ("temperature", 0, "temperature: 0 should be a positive number"),
        ("label_weight", -1, "label_weight: -1 should be a number of at least 0"),
        ("deep_feature_weight", 2, "it was 0 when the distiller was made"),
    ):
        with pytest.raises(dskd_keras.InputError, match=message):
            setattr(distiller, name, value)
    distiller.prediction_weight = 0
    assert distiller.prediction_weight == 0
    own = make(prediction_loss=losses.KLDivergence(2.0))
    with pytest.raises(dskd_keras.InputError, match="prediction_loss is an object, which has its"):
        own.temperature = 3.0
