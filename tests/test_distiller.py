import json

import keras
import numpy as np
import pytest
import small

import dskd_keras
from dskd_keras.progress import Place, steps_before

BACKEND = keras.backend.backend()
LAYERS = ["stage1", "stage2"]


def make(layers=LAYERS, optimizer=None, compile_options=None, **options):
    distiller = dskd_keras.Distiller(
        small.convnet("teacher", width=5), small.convnet("student"), layers, **options
    )
    distiller.compile(
        optimizer or keras.optimizers.SGD(0.05, momentum=0.9),
        loss=small.crossentropy(),
        **{"metrics": ["accuracy"], **(compile_options or {})},
    )
    return distiller


def labels_alone(**options):
    """Ordinary training of a model that compiles at once."""
    inputs = keras.Input((8, 8, 2))
    outputs = keras.layers.Dense(small.CLASSES)(keras.layers.Flatten()(inputs))
    student = keras.Model(inputs, outputs, name="linear")
    distiller = dskd_keras.Distiller(None, student, prediction_weight=0)
    distiller.compile(**{"optimizer": "sgd", "loss": small.crossentropy(), **options})
    return distiller


@pytest.fixture(scope="module")
def shared():
    """One compiled distiller for the tests that take the weights as they come."""
    keras.utils.set_random_seed(0)
    return make(optimizer=keras.optimizers.SGD(0.05))


def train(x, y, options=None, **fit):
    """The history and the student's weights: the same with every call."""
    keras.utils.set_random_seed(3)
    distiller = make(compile_options=options)
    fit = {"batch_size": 4, "shuffle": False, "verbose": 0, **fit}
    history = distiller.fit(x, y, **fit).history
    return history, small.values(distiller.student.weights)


@pytest.fixture(scope="module")
def plain():
    """What `train` gives with arrays, in the default way of running the step."""
    return train(*small.images())


def test_logs_of_fit_and_evaluate(shared):
    x, y = small.images()
    distiller = shared
    history = distiller.fit(x, y, validation_data=(x, y), epochs=2, batch_size=4, verbose=0).history
    layerwise = {
        f"deep_{kind}_{what}/{layer}"
        for kind in ("prediction", "feature")
        for what in ("loss", "allocation")
        for layer in LAYERS
    }
    assert set(history) == layerwise | {
        "loss", "label_loss", "prediction_loss", "deep_prediction_loss", "deep_feature_loss",
        "accuracy", "val_loss", "val_accuracy",
    }  # fmt: skip
    terms = ("label_loss", "prediction_loss", "deep_prediction_loss", "deep_feature_loss")
    np.testing.assert_allclose(
        np.sum([history[term] for term in terms], axis=0), history["loss"], rtol=1e-5
    )
    assert all(len(values) == 2 and np.isfinite(values).all() for values in history.values())
    for kind in ("prediction", "feature"):
        shares = [history[f"deep_{kind}_allocation/{layer}"] for layer in LAYERS]
        np.testing.assert_allclose(np.sum(shares, axis=0), 1.0, rtol=1e-6)
    results = distiller.evaluate(x, y, verbose=0, return_dict=True)
    assert set(results) == {"loss", "accuracy"}
    logits = distiller.predict(x, verbose=0)
    assert results["loss"] == pytest.approx(float(small.crossentropy()(y, logits)), rel=1e-5)
    assert results["accuracy"] == pytest.approx((logits.argmax(-1) == y).mean())


@small.eagerly()
def test_epoch_logs_are_means_over_images_not_over_batches():
    x, y = small.images(5)
    distiller = labels_alone(optimizer=keras.optimizers.SGD(0.0))
    parts = ((0, 4), (4, 5))  # a mean over batches would count the last image four times
    of_batches = []
    for i, j in parts:
        distiller.reset_metrics()
        logs = distiller.train_on_batch(x[i:j], y[i:j], return_dict=True)
        of_batches.append(float(logs["label_loss"]))
    logs = distiller.fit(x, y, batch_size=4, shuffle=False, verbose=0).history
    expected = (4 * of_batches[0] + of_batches[1]) / 5
    assert logs["label_loss"][0] == pytest.approx(expected, rel=1e-4)


def test_evaluate_and_predict_change_no_variable(shared):
    x, y = small.images()
    shared.fit(x, y, batch_size=4, verbose=0)
    everything = shared.weights + shared.teacher.variables
    before = small.values(everything)
    shared.evaluate(x, y, verbose=0)
    shared.predict(x, verbose=0)
    shared(x)
    small.assert_same_bits(before, small.values(everything))


@small.eagerly()
def test_teacher_keeps_its_bits():
    x, y = small.images()
    distiller = make(layers=["stage1"])
    distiller.trainable = False
    distiller.trainable = True  # thaws the student, not the teacher
    distiller.compile("adam", loss=small.crossentropy())
    before = small.values(distiller.teacher.variables)
    student = small.values(distiller.student.variables)
    distiller.fit(x, y, verbose=0)
    assert not distiller.teacher.model.trainable_variables
    small.assert_same_bits(before, small.values(distiller.teacher.variables))
    assert any(
        (a != b).any()
        for a, b in zip(student, small.values(distiller.student.variables), strict=True)
    )


class Counter(keras.layers.Layer):
    """Counts how often it is run."""

    calls = 0

    def call(self, x):
        self.calls += 1
        return x


def counted(name):
    inputs = keras.Input((8, 8, 2))
    counter = Counter(name="counter")
    x = counter(inputs)
    x = keras.layers.Conv2D(4, 3, name="stage1", data_format="channels_last")(x)
    x = keras.layers.GlobalAveragePooling2D(data_format="channels_last")(x)
    return keras.Model(inputs, keras.layers.Dense(small.CLASSES)(x), name=name), counter


@pytest.mark.skipif(BACKEND == "jax", reason="what follows counts the same in its program")
def test_student_and_teacher_run_once_a_step():
    (teacher, of_teacher), (student, of_student) = counted("teacher"), counted("student")
    distiller = dskd_keras.Distiller(teacher, student, ["stage1"])
    distiller.compile("sgd", loss=small.crossentropy(), run_eagerly=True)
    x, y = small.images(4)
    distiller.train_on_batch(x, y)  # builds, which runs models symbolically
    of_teacher.calls = of_student.calls = 0
    distiller.train_on_batch(x, y)
    # On PyTorch the teacher is traced by now: none of its Python is run.
    assert (of_teacher.calls, of_student.calls) == (int(BACKEND != "torch"), 1)
    of_teacher.calls = of_student.calls = 0
    distiller.test_on_batch(x, y)
    assert (of_teacher.calls, of_student.calls) == (0, 1)


def convolutions(model):
    """How many convolutions a forward pass of the model takes."""
    # JAX has products in the place of a depthwise one (dskd_keras.depthwise).
    kinds = {"Conv2D": 1, "SeparableConv2D": 1 if BACKEND == "jax" else 2}
    return sum(kinds.get(type(layer).__name__, 0) for layer in model.layers)


def convolutions_in_step(distiller, x, y, training):
    """How many forward convolutions the backend's training step holds, or its test step."""
    function = distiller.train_step if training else distiller.test_step
    if BACKEND == "tensorflow":
        import tensorflow as tf

        step = tf.function(function).get_concrete_function(
            (tf.TensorSpec(x.shape, "float32"), tf.TensorSpec(y.shape, "int32"))
        )
        kinds = [operation.type for operation in step.graph.get_operations()]
        return sum(kind in ("Conv2D", "DepthwiseConv2dNative") for kind in kinds)
    if BACKEND == "jax":
        import jax

        state = distiller._get_jax_state(
            trainable_variables=True,
            non_trainable_variables=True,
            optimizer_variables=training,
            metrics_variables=True,
        )
        jaxpr = jax.make_jaxpr(function)([part for part in state if part is not None], (x, y))
        forward_and_backward = str(jaxpr).count("conv_general_dilated[")
        # Each convolution of the student's is differentiated in its kernel and in its input, the
        # first one in its kernel alone.
        backward = 2 * convolutions(distiller.student_with_heads) - 1
        return forward_and_backward - (backward if training else 0)

    from torch.utils._python_dispatch import TorchDispatchMode

    class Count(TorchDispatchMode):
        forward = 0

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            self.forward += "convolution.default" in str(function)
            return function(*args, **(kwargs or {}))

    with Count() as count:
        function((keras.ops.convert_to_tensor(x), keras.ops.convert_to_tensor(y)))
    return count.forward


def test_compiled_steps_hold_one_forward_of_the_student_and_training_one_of_the_teacher(shared):
    x, y = small.images(4)
    shared.fit(x, y, batch_size=4, verbose=0)
    teacher, student = shared.teacher.model, shared.student
    assert convolutions(teacher) == convolutions(student) == 2
    of_training = convolutions(teacher) + convolutions(shared.student_with_heads)
    assert convolutions_in_step(shared, x, y, training=True) == of_training
    assert convolutions_in_step(shared, x, y, training=False) == 2


@pytest.mark.parametrize(
    "options",
    [
        pytest.param(
            {"run_eagerly": True},
            marks=pytest.mark.skipif(BACKEND == "jax", reason="takes long: JAX compiles each op"),
        ),
        pytest.param(
            {"jit_compile": True, "steps_per_execution": 3},
            marks=pytest.mark.skipif(
                BACKEND == "torch", reason="takes minutes to compile; Keras has no several steps"
            ),
        ),
    ],
    ids=" ".join,
)
def test_ways_of_running_the_step_give_the_same_numbers(options, plain):
    expected, weights = plain
    other, other_weights = train(*small.images(), options)
    assert set(expected) == set(other)
    for name, value in expected.items():
        np.testing.assert_allclose(other[name], value, rtol=1e-3, atol=1e-5, err_msg=name)
    for a, b in zip(weights, other_weights, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-5)


def test_gradient_accumulation_equals_one_large_batch():
    x, y = small.images(8)
    results = []
    for batch_size, steps in ((8, None), (4, 2)):
        keras.utils.set_random_seed(4)
        distiller = dskd_keras.Distiller(
            small.convnet("teacher"), small.convnet("student", batch_norm=False)
        )
        optimizer = keras.optimizers.SGD(0.1, gradient_accumulation_steps=steps)
        distiller.compile(optimizer, loss=small.crossentropy())
        distiller.fit(x, y, batch_size=batch_size, shuffle=False, verbose=0)
        results.append(small.values(distiller.student.weights))
    for a, b in zip(*results, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6)


def test_callbacks_checkpoint_and_restore_without_the_teacher(shared, tmp_path):
    x, y = small.images()
    distiller = shared
    path = tmp_path / "last.weights.h5"
    by_epoch = []
    callbacks = [
        keras.callbacks.ModelCheckpoint(path, save_weights_only=True),
        keras.callbacks.LambdaCallback(
            on_epoch_end=lambda epoch, logs: by_epoch.append(distiller.student.get_weights())
        ),
        # A loss that should rise: it stops after the second epoch and goes back to the first.
        keras.callbacks.EarlyStopping(monitor="loss", mode="max", restore_best_weights=True),
        keras.callbacks.CSVLogger(tmp_path / "history.csv"),
    ]
    distiller.fit(
        x, y, validation_data=(x, y), epochs=5, batch_size=4, callbacks=callbacks, verbose=0
    )
    logged = (tmp_path / "history.csv").read_text().splitlines()
    assert len(logged) == 3 and "deep_feature_allocation/stage1" in logged[0]
    small.assert_same_bits(by_epoch[0], distiller.student.get_weights())
    distiller.load_weights(path)
    small.assert_same_bits(by_epoch[1], distiller.student.get_weights())

    own = sum(w.size for w in distiller.get_weights())
    students = sum(w.size for w in distiller.student.get_weights())
    head = sum(w.size for w in distiller.student_with_heads.get_weights())
    assert own == head + 5 and head > students  # temperature and coefficients are weights
    import h5py

    sizes = []
    with h5py.File(path) as file:
        file.visititems(lambda _, item: sizes.append(getattr(item, "size", 0)))
    optimizer = sum(np.size(v) for v in small.values(distiller.optimizer.variables))
    metrics = sum(np.size(v) for v in small.values(distiller.metrics_variables))
    assert sum(sizes) <= own + optimizer + metrics + 2


@pytest.mark.parametrize("supervises", [True, False])
@small.eagerly()
def test_round_trip_of_the_whole_distiller(tmp_path, supervises):
    x, y = small.images(4)
    distiller = make(temperature=2.5, deep_feature_weight=3.0, weighting="proportional")
    if not supervises:
        distiller.deep_feature_weight = distiller.deep_prediction_weight = 0
    distiller.train_on_batch(x, y)
    distiller.save(tmp_path / "distiller.keras")
    loaded = keras.models.load_model(tmp_path / "distiller.keras")
    assert json.dumps(loaded.get_config()) == json.dumps(distiller.get_config())
    for variables in (lambda d: d.variables, lambda d: d.teacher.variables):
        small.assert_same_bits(small.values(variables(loaded)), small.values(variables(distiller)))
    # Training goes on as if nothing had happened: heads, optimizer and compiled loss are there.
    logs = []
    for each in (distiller, loaded):
        each.reset_metrics()
        logs.append(each.train_on_batch(x, y, return_dict=True))
    assert ("deep_feature_loss" in logs[0]) is supervises and logs[0].keys() == logs[1].keys()
    for name, value in logs[0].items():
        assert float(logs[1][name]) == pytest.approx(float(value), rel=1e-5), name
    for a, b in zip(*(small.values(each.student.weights) for each in (distiller, loaded)),
                    strict=True):  # fmt: skip
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-7)


@small.eagerly()
def test_a_teacher_trained_before_is_loaded_without_its_optimizer(tmp_path, recwarn):
    x, y = small.images(4)
    teacher = small.convnet("teacher")
    teacher.compile("adam", loss=small.crossentropy())
    teacher.train_on_batch(x, y)
    distiller = dskd_keras.Distiller(teacher, small.convnet("student"))
    distiller.compile("adam", loss=small.crossentropy())
    distiller.train_on_batch(x, y)
    distiller.save(tmp_path / "distiller.keras")
    loaded = keras.models.load_model(tmp_path / "distiller.keras")
    small.assert_same_bits(small.values(loaded.teacher.variables), small.values(teacher.variables))
    assert not [str(w.message) for w in recwarn if "optimizer" in str(w.message)]


@small.eagerly()
def test_only_the_students_regularisers_count():
    x, y = small.images(4)
    expected = []
    losses = []
    for regularizer in (None, keras.regularizers.L2(0.1)):
        keras.utils.set_random_seed(5)
        student = small.convnet("student", regularizer=regularizer)
        teacher = small.convnet("teacher", regularizer=regularizer)
        distiller = dskd_keras.Distiller(teacher, student)
        distiller.compile(keras.optimizers.SGD(0.0), loss=small.crossentropy())
        kernels = [layer.kernel for layer in student.layers if layer.name.endswith("conv")]
        expected.append(sum(0.1 * float(np.square(k).sum()) for k in small.values(kernels)))
        losses.append(float(distiller.train_on_batch(x, y, return_dict=True)["loss"]))
    assert expected[1] > 0.1
    assert losses[1] - losses[0] == pytest.approx(expected[1], rel=1e-4)


@small.eagerly()
def test_without_a_teacher_it_is_ordinary_training():
    x, y = small.images()
    results = []
    for wrap in (False, True):
        keras.utils.set_random_seed(6)
        student = small.convnet("student")
        model = dskd_keras.Distiller(None, student, prediction_weight=0) if wrap else student
        model.compile(keras.optimizers.SGD(0.1), loss=small.crossentropy(), metrics=["accuracy"])
        history = model.fit(x, y, validation_data=(x, y), shuffle=False, verbose=0).history
        results.append((history, small.values(student.weights)))
    (plain, plain_weights), (wrapped, wrapped_weights) = results
    for name, value in plain.items():
        assert wrapped[name] == pytest.approx(value, rel=1e-5)
    for a, b in zip(plain_weights, wrapped_weights, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)


@small.eagerly()
def test_a_teacher_that_no_term_needs_is_not_run():
    (teacher, of_teacher), (student, _) = counted("teacher"), counted("student")
    distiller = dskd_keras.Distiller(teacher, student, ["stage1"], prediction_weight=0,
                                     deep_prediction_weight=0, deep_feature_weight=0)  # fmt: skip
    distiller.compile("sgd", loss=small.crossentropy())
    of_teacher.calls = 0
    distiller.train_on_batch(*small.images(4))
    assert of_teacher.calls == 0 and distiller.teacher is None


@pytest.mark.parametrize("labels", [True, False])
def test_targets_computed_beforehand_train_as_a_live_teacher_does(labels):
    x, y = small.images()
    weight = np.linspace(0.0, 2.0, len(x)).astype("float32")
    results = []
    for beforehand in (False, True):
        keras.utils.set_random_seed(7)
        (teacher, of_teacher), (student, _) = counted("teacher"), counted("student")
        distiller = dskd_keras.Distiller(teacher, student, ["stage1"], label_weight=float(labels))
        distiller.compile(keras.optimizers.SGD(0.1), loss=small.crossentropy() if labels else None)
        given = y if labels else None
        targets = distiller.targets(x, given) if beforehand else given
        of_teacher.calls = 0
        history = distiller.fit(
            x, targets, sample_weight=weight, batch_size=4, shuffle=False, verbose=0
        ).history
        if labels:
            history["test"] = distiller.evaluate(
                x, targets, sample_weight=weight, verbose=0, return_dict=True
            )["loss"]
        if beforehand:
            assert of_teacher.calls == 0
        results.append((history, small.values(student.weights)))
    for name, value in results[0][0].items():
        np.testing.assert_allclose(results[1][0][name], value, rtol=1e-4)
    for a, b in zip(results[0][1], results[1][1], strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6)
    with pytest.raises(dskd_keras.InputError, match="class_weight: it can't be combined with T"):
        distiller.fit(x, distiller.targets(x, y), class_weight={0: 2.0}, verbose=0)


@small.eagerly()
def test_targets_pass_through_validation_and_streams(plain):
    x, y = small.images()
    keras.utils.set_random_seed(3)
    distiller = make()
    targets = distiller.targets(x, y)

    class Stream(keras.utils.PyDataset):
        def __len__(self):
            return 3

        def __getitem__(self, index):
            part = slice(4 * index, 4 * index + 4)
            return x[part], keras.tree.map_structure(lambda array: array[part], targets)

    history = distiller.fit(
        Stream(), validation_data=(x, targets), shuffle=False, verbose=0
    ).history
    for name, value in plain[0].items():
        np.testing.assert_allclose(history[name], value, rtol=1e-3, atol=1e-5, err_msg=name)
    assert history["val_loss"][0] == pytest.approx(
        distiller.evaluate(x, y, verbose=0, return_dict=True)["loss"], rel=1e-5
    )


@pytest.mark.parametrize("kind", ["tensorflow", "torch", "generator"])
@small.eagerly()
def test_any_data_that_keras_takes(kind, plain):
    x, y = small.images()
    if kind == "tensorflow":
        tf = pytest.importorskip("tensorflow")
        stream = tf.data.Dataset.from_tensor_slices((x, y)).batch(4)
    elif kind == "torch":
        torch = pytest.importorskip("torch")
        # A loader of its own shuffles; this one must not, to be comparable.
        pairs = torch.utils.data.TensorDataset(torch.from_numpy(x), torch.from_numpy(y))
        stream = torch.utils.data.DataLoader(pairs, batch_size=4)
    else:

        def batches():
            while True:
                for start in range(0, len(x), 4):
                    yield x[start : start + 4], y[start : start + 4]

        stream = batches()
    history, _ = train(
        stream, None, batch_size=None, steps_per_epoch=3 if kind == "generator" else None
    )
    for name, value in plain[0].items():
        np.testing.assert_allclose(history[name], value, rtol=1e-3, atol=1e-5, err_msg=name)


@small.eagerly()
def test_one_hot_labels_give_the_same_objective():
    x, y = small.images(4)
    losses = []
    for loss, labels in (
        (small.crossentropy(), y),
        (keras.losses.CategoricalCrossentropy(from_logits=True), np.eye(3, dtype="float32")[y]),
        (lambda y, z: keras.losses.sparse_categorical_crossentropy(y, z, from_logits=True), y),
    ):
        keras.utils.set_random_seed(8)
        distiller = labels_alone(loss=loss)
        losses.append(float(distiller.train_on_batch(x, labels, return_dict=True)["loss"]))
    assert losses[1:] == pytest.approx(losses[:1] * 2, rel=1e-5)


@keras.saving.register_keras_serializable("tests")
class MovingAverage(dskd_keras.weighting.Weighting):
    def build(self, shape):
        self.average = self.add_weight(shape=shape, initializer="zeros", trainable=False)

    def call(self, losses):
        self.average.assign(0.5 * self.average + 0.5 * losses)
        return self.average / keras.ops.sum(self.average)


def test_a_strategy_with_a_state_is_kept_and_saved(tmp_path):
    x, y = small.images(4)
    distiller = make(weighting=MovingAverage(), optimizer=keras.optimizers.SGD(0.0))
    logs = [distiller.train_on_batch(x, y, return_dict=True) for _ in range(2)]
    state = small.values([distiller.prediction_weighting.average])[0]
    of_layers = [float(logs[0][f"deep_prediction_loss/{layer}"]) for layer in LAYERS]
    np.testing.assert_allclose(state, 0.75 * np.array(of_layers), rtol=1e-3)
    assert not np.allclose(state, small.values([distiller.feature_weighting.average])[0])
    distiller.save_weights(tmp_path / "w.weights.h5")
    other = make(weighting=MovingAverage())
    other.load_weights(tmp_path / "w.weights.h5")
    np.testing.assert_array_equal(small.values([other.prediction_weighting.average])[0], state)


def test_half_precision_student_gets_loss_scaling_and_full_precision_losses():
    x, y = small.images(4)
    keras.config.set_dtype_policy("mixed_float16")
    try:
        student = small.convnet("student")
    finally:
        keras.config.set_dtype_policy("float32")
    distiller = dskd_keras.Distiller(small.convnet("teacher"), student, ["stage1"])
    distiller.compile("sgd", loss=small.crossentropy())
    assert isinstance(distiller.optimizer, keras.optimizers.LossScaleOptimizer)
    outputs = distiller(x, training=True)
    assert keras.backend.standardize_dtype(outputs.deep_features["stage1"].dtype) == "float16"
    before = small.values(student.trainable_variables)
    # The first steps may find the scale of the loss too large, and are left out.
    history = distiller.fit(x, y, epochs=8, verbose=0).history
    assert all(np.isfinite(values).all() for values in history.values())
    after = small.values(student.trainable_variables)
    assert any((a != b).any() for a, b in zip(before, after, strict=True))


@small.eagerly()
def test_two_distillers_of_one_student():
    x, y = small.images(4)
    teacher, student = small.convnet("teacher"), small.convnet("student")
    first, second = (dskd_keras.Distiller(teacher, student, [layer]) for layer in LAYERS)
    before = small.values(second.student.trainable_variables)
    first.compile("sgd", loss=small.crossentropy())
    assert np.isfinite(float(first.train_on_batch(x, y)[0]))
    after = small.values(second.student.trainable_variables)
    assert all((a != b).any() for a, b in zip(before, after, strict=True))
    assert student.get_layer("stage1").output.shape == (None, 8, 8, 4)


@small.eagerly()
def test_callbacks_learn_where_in_an_epoch_fit_goes_on():
    x, y = small.images()
    distiller = labels_alone()
    assert distiller.resumed_at == Place(epoch=0, step=0)
    before = []
    read = keras.callbacks.LambdaCallback(
        on_epoch_begin=lambda epoch, logs: before.append(steps_before(read, epoch))
    )
    distiller.resumed_at = Place(epoch=1, step=2)
    distiller.fit(x, y, batch_size=4, epochs=3, initial_epoch=1, callbacks=[read], verbose=0)
    assert before == [2, 0]
    assert Place() == labels_alone().resumed_at


def test_progress_bar_leaves_out_single_layers(shared, capsys):
    shared.fit(*small.images(), batch_size=4, verbose=2)
    line = capsys.readouterr().out
    assert "prediction_loss" in line and "accuracy" in line and "stage1" not in line


BAD = [
    ({"temperature": 0.0}, "temperature: 0.0 should be a positive number."),
    ({"temperature": float("nan")}, "temperature: nan should be a positive"),
    ({"label_weight": -1.0}, "label_weight: -1.0 should be a number of at least 0."),
    ({"deep_feature_weight": float("inf")}, "deep_feature_weight: inf should be a number of at"),
    ({"weighting": "sofmax"}, "weighting: 'sofmax' should be a known name. Did you mean 'softmax'"),
    ({"weighting": 3}, "weighting: 3 should be one of softmax, proportional"),
    ({"student_layers": ["stage11"]}, "student_layers: 'stage11' should be a known name. Did you"),
    ({"student_layers": ["stage1", "stage1"]}, "should be a list that names each layer once"),
    ({"teacher_layer": "stge2"}, "teacher_layer: 'stge2' should be a known name. Did you mean 'st"),
    ({"teacher": None}, "teacher: None, but"),
    (
        {"student_layer": ["stage1"]},
        "'student_layer' should be a known name. Did you mean 'student_",
    ),
    ({"teacher": "resnet56"}, "teacher: str should be a keras.Model."),
    (
        {"label_weight": 0, "prediction_weight": 0, "student_layers": []},
        "label_weight: 0.0 leaves no term. It should be positive",
    ),
]


@pytest.mark.parametrize("options, message", BAD, ids=[message[:30] for _, message in BAD])
def test_bad_settings(options, message):
    models = {"teacher": small.convnet("teacher"), "student": small.convnet("student")}
    with pytest.raises(dskd_keras.InputError) as error:
        dskd_keras.Distiller(**{**models, "student_layers": ["stage1"], **options})
    assert message in str(error.value) and "\n" not in str(error.value)


def softmax_ending(as_layer):
    inputs = keras.Input((8, 8, 2))
    x = keras.layers.Flatten()(inputs)
    if as_layer:
        x = keras.layers.Softmax(name="end")(keras.layers.Dense(3)(x))
    else:
        x = keras.layers.Dense(3, activation="softmax", name="end")(x)
    return keras.Model(inputs, x, name="ending")


def segmenting():
    inputs = keras.Input((8, 8, 2))
    return keras.Model(inputs, keras.layers.Dense(small.CLASSES)(inputs), name="dense")


class Subclassed(keras.Model):
    def call(self, x):
        return x


def test_bad_models():
    good = small.convnet("good")
    cases = [
        (Subclassed(), good, "teacher: Subclassed 'subclassed' has no graph of layers: wrap it"),
        (good, keras.Sequential([keras.layers.Dense(3)], name="s"), "begin it with keras.Input"),
        (softmax_ending(False), good, "teacher: 'ending' ends in a softmax (layer 'end')"),
        (good, softmax_ending(True), "Take dskd_keras.as_logits(student)"),
        (
            small.convnet("ten", classes=10),
            good,
            "teacher: 'ten' gives 10 logits, student 'good' 3",
        ),
        (small.convnet("big", size=16), good, "takes (16, 16, 2), student 'good' (8, 8, 2)"),
        (segmenting(), good, "its logits have the shape (None, 8, 8, 3), the student's (None, 3)"),
        (good, good, "share the weights of layer 'stage1_conv'"),
    ]
    for teacher, student, message in cases:
        with pytest.raises(dskd_keras.InputError) as error:
            dskd_keras.Distiller(teacher, student)
        assert message in str(error.value) and "\n" not in str(error.value)
    # The advice that the message gives is right.
    for as_layer in (False, True):
        dskd_keras.Distiller(dskd_keras.as_logits(softmax_ending(as_layer)), good)


@pytest.mark.parametrize(
    "loss, message",
    [
        ("sparse_categorical_crossentropy", "expects probabilities, but the student gives logits"),
        (keras.losses.CategoricalCrossentropy(), "expects probabilities"),
        (None, "loss: None, but label_weight needs one"),
        (
            keras.losses.SparseCategoricalCrossentropy(from_logits=True, reduction="sum"),
            "reduction='sum', but all terms",
        ),
        (lambda y, z: keras.ops.mean(z), "gives one value for the whole batch"),
    ],
)
def test_bad_losses(loss, message):
    distiller = dskd_keras.Distiller(small.convnet("teacher"), small.convnet("student"))
    distiller.compile("sgd", loss=loss)
    with pytest.raises(dskd_keras.InputError, match=message):
        distiller.fit(*small.images(), verbose=0)


def test_bad_labels():
    x, y = small.images(4)
    distiller = make()
    with pytest.raises(dskd_keras.InputError, match="label 3 is outside the student's 3 classes"):
        distiller.fit(x, y * 0 + 3, verbose=0)
    with pytest.raises(dskd_keras.InputError, match="label -1 is outside"):
        distiller.fit(x, y * 0 - 1, verbose=0)
    with pytest.raises(dskd_keras.InputError, match=r"Targets without the teacher's features"):
        distiller.fit(x, dskd_keras.Targets(y, {"logits": np.zeros((4, 3))}), verbose=0)
    distiller = make(compile_options={"metrics": []})
    with pytest.raises(dskd_keras.InputError, match=r"no labels, but label_weight=1.0 needs them"):
        distiller.fit(x, verbose=0)
