import csv
import functools
import io
import math
import os
import subprocess
import sys
from pathlib import Path

import keras
import numpy as np
import pytest
import small
from rich.console import Console
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import dskd_keras
from dskd_keras.callbacks import (
    FadeOut,
    LayerWeightLogger,
    StopOnNonFiniteLoss,
    TensorBoardScalars,
    Throughput,
)
from dskd_keras.errors import TrainingError
from dskd_keras.progress import Place

BACKEND = keras.backend.backend()
LAYERS = ["stage1", "stage2"]
BATCHES = (4, 4, 2)


def make(layers=LAYERS, learning_rate=None, compile_options=None, student=None, **options):
    keras.utils.set_random_seed(3)
    if learning_rate is None:
        learning_rate = keras.optimizers.schedules.ExponentialDecay(0.05, 1, decay_rate=0.9)
    teacher = small.convnet("teacher", width=5)
    distiller = dskd_keras.Distiller(
        teacher, student or small.convnet("student"), layers, **options
    )
    distiller.compile(
        keras.optimizers.SGD(learning_rate, momentum=0.9),
        loss=small.crossentropy(),
        **(compile_options or {}),
    )
    return distiller


@functools.cache
def compiled():
    """A distiller that has trained, and its variables with their first values."""
    distiller = make(compile_options={"metrics": ["accuracy"]})
    distiller.optimizer.build(distiller.trainable_variables)
    variables = [
        *distiller.variables, *distiller.teacher.variables, *distiller.optimizer.variables,
    ]  # fmt: skip
    values = small.values(variables)
    with small.eagerly():
        distiller.train_on_batch(*small.images(4))
    return distiller, list(zip(variables, values, strict=True))


def shared():
    """The one distiller, as it was made: compiling takes most of the time."""
    distiller, values = compiled()
    for variable, value in values:
        variable.assign(value)
    for variable in distiller.metrics_variables:
        variable.assign(np.zeros(variable.shape, variable.dtype))
    distiller.resumed_at = Place()
    return distiller


def fit(distiller, callbacks, epochs=2, **options):
    x, y = small.images(sum(BATCHES))
    options = {"batch_size": BATCHES[0], "shuffle": False, "verbose": 0, **options}
    return distiller.fit(x, y, epochs=epochs, callbacks=callbacks, **options).history


def rows(path):
    with open(path, newline="") as file:
        return [{name: float(value) for name, value in row.items()} for row in csv.DictReader(file)]


def scalars(folder):
    """`{tag: {step: value}}`, as TensorBoard reads it."""
    events = EventAccumulator(str(folder)).Reload()
    return {
        tag: {event.step: event.value for event in events.Scalars(tag)}
        for tag in events.Tags()["scalars"]
    }


def by_hand(epochs=2):
    """The terms of every step, from `train_on_batch` with metrics set to zero before each."""
    distiller, (x, y) = shared(), small.images(sum(BATCHES))
    found = []
    for _ in range(epochs):
        for stop in np.cumsum(BATCHES):
            begin = max(0, stop - 4) if stop < 10 else 8
            distiller.reset_metrics()
            with small.eagerly():
                logs = distiller.train_on_batch(x[begin:stop], y[begin:stop], return_dict=True)
            logs = {name: float(logs[name]) for name in distiller.term_names}
            assert distiller.step_terms() == pytest.approx(logs, rel=1e-6)
            found.append(logs)
    return found


def test_a_step_at_a_time_in_csv_and_tensorboard_and_picture_and_table(tmp_path):
    text = io.StringIO()
    logger = LayerWeightLogger(
        csv=tmp_path / "new" / "layers.csv",
        picture=tmp_path / "layers.png",
        tensorboard=tmp_path / "tensorboard",
        console=Console(file=text, width=100),
    )
    x, y = small.images(6)
    distiller = shared()
    history = fit(distiller, [logger], validation_data=(x, y))

    found = rows(tmp_path / "new" / "layers.csv")
    assert [(row["epoch"], row["step"]) for row in found] == [(i // 3 + 1, i + 1) for i in range(6)]
    expected = by_hand()
    assert list(found[0]) == ["epoch", "step", *distiller.term_names]
    assert set(distiller.term_names) == set(history) - {
        "loss", "accuracy", "val_loss", "val_accuracy",
    }  # fmt: skip
    for row, terms in zip(found, expected, strict=True):
        assert {name: row[name] for name in terms} == pytest.approx(terms, rel=1e-3, abs=1e-6)
        for kind in ("prediction", "feature"):
            of_layers = [
                (row[f"deep_{kind}_allocation/{layer}"], row[f"deep_{kind}_loss/{layer}"])
                for layer in LAYERS
            ]
            assert sum(part for part, _ in of_layers) == pytest.approx(1.0, abs=1e-6)
            assert sum(part * loss for part, loss in of_layers) == pytest.approx(
                row[f"deep_{kind}_loss"], rel=1e-5
            )
    for name in distiller.term_names:
        for epoch in (1, 2):
            of_epoch = [row[name] for row in found if row["epoch"] == epoch]
            assert np.average(of_epoch, weights=BATCHES) == pytest.approx(
                history[name][epoch - 1], rel=1e-5
            )

    events = scalars(tmp_path / "tensorboard" / "steps")
    assert set(events) == set(distiller.term_names)
    for tag, values in events.items():
        assert values == pytest.approx({int(row["step"]) - 1: row[tag] for row in found})
    assert (tmp_path / "layers.png").read_bytes().startswith(b"\x89PNG")
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "layers.png", "new", "tensorboard",
    ]  # fmt: skip

    lines = text.getvalue()
    assert "means of epoch 1 → 2" in lines and "mean allocation" in lines
    for kind in ("prediction", "feature"):
        loss, allocation = (
            history[f"deep_{kind}_{what}/stage2"] for what in ("loss", "allocation")
        )  # fmt: skip
        [line] = [line for line in lines.splitlines() if "stage2" in line and kind in line]
        assert f"{loss[0]:.4g} → {loss[1]:.4g}" in line
        assert f"{allocation[0]:.3f} → {allocation[1]:.3f}" in line
        assert f"{np.mean(allocation):.3f}" in line.rsplit("→", 1)[1]


@pytest.mark.skipif(BACKEND == "torch", reason="Keras has no steps_per_execution on PyTorch")
def test_several_steps_at_once_record_the_last_of_them(tmp_path):
    one, several = tmp_path / "one.csv", tmp_path / "several.csv"
    fit(shared(), [LayerWeightLogger(csv=one, summary=False)])
    distiller = make(compile_options={"steps_per_execution": 2})
    fit(distiller, [LayerWeightLogger(csv=several, summary=False)])
    one, several = rows(one), rows(several)
    assert [row["step"] for row in several] == [2, 3, 5, 6]
    for row in several:
        assert row == pytest.approx(one[int(row["step"]) - 1], rel=1e-3, abs=1e-6)
    x, y = small.images(10)
    x[5] = np.nan
    message, _ = stopped(distiller, x, y)
    assert message.startswith("epoch 1, steps 1 to 2:")


def test_every_few_steps(tmp_path):
    logger = LayerWeightLogger(csv=tmp_path / "l.csv", every=2, summary=False)
    fit(shared(), [logger], epochs=3)
    assert [row["step"] for row in rows(tmp_path / "l.csv")] == [1, 3, 5, 7, 9]


def test_continued_training_goes_on_with_the_file(tmp_path):
    paths = {name: tmp_path / f"{name}.csv" for name in ("whole", "parts")}
    fit(shared(), [LayerWeightLogger(csv=paths["whole"], summary=False)], epochs=4)
    whole = rows(paths["whole"])

    def logger(**options):
        return LayerWeightLogger(
            csv=paths["parts"], tensorboard=tmp_path, append=True, summary=False, **options
        )

    distiller = shared()
    fit(distiller, [logger()], epochs=2)
    # What a killed run may leave: a row that will come again, and a line that is not whole.
    with open(paths["parts"], "a") as file:
        file.write(",".join(["3", "7", *["9"] * len(distiller.term_names)]) + "\n3,8,0.1")
    continued = logger(picture=tmp_path / "l.png")
    fit(distiller, [continued], epochs=4, initial_epoch=2)
    found = rows(paths["parts"])
    assert len(found) == len(whole) == 12
    for row, expected in zip(found, whole, strict=True):
        assert row == pytest.approx(expected, rel=1e-3, abs=1e-6)
    assert list(scalars(tmp_path / "steps")["label_loss"]) == list(range(12))
    assert "means of epoch 1 → 4" in continued.table().title
    assert (tmp_path / "l.png").exists()

    # Within an epoch: the first batch of `fit` is the epoch's second.
    continued = logger()
    distiller.resumed_at = Place(2, 1)
    for initial_epoch in (2, 3):
        fit(
            distiller, [continued], epochs=initial_epoch + 1, initial_epoch=initial_epoch,
            steps_per_epoch=2 if initial_epoch == 2 else 3,
        )  # fmt: skip
    found = rows(paths["parts"])
    places = [(i // 3 + 1, i + 1) for i in range(12)]
    assert [(row["epoch"], row["step"]) for row in found] == places
    for row, expected in zip(found[:7], whole[:7], strict=True):
        assert row == pytest.approx(expected, rel=1e-3, abs=1e-6)

    # A file of an older version, whose epochs and steps count from 0.
    header, *lines = paths["parts"].read_text().splitlines(keepends=True)
    with open(paths["parts"], "w") as file:
        file.write(header)
        for line in lines[:6]:
            epoch, step, values = line.split(",", 2)
            file.write(f"{int(epoch) - 1},{int(step) - 1},{values}")
    distiller.resumed_at = Place()
    fit(distiller, [logger()], epochs=3, initial_epoch=2)
    found = rows(paths["parts"])
    assert [(row["epoch"], row["step"]) for row in found] == places[:9]
    assert found[5] == pytest.approx(whole[5], rel=1e-3, abs=1e-6)

    other = make(layers=["stage1"])
    with pytest.raises(dskd_keras.InputError, match="has other columns than the terms"):
        fit(other, [logger()])


@pytest.mark.once
@pytest.mark.parametrize("kind", ["prediction", "feature"])
def test_one_of_the_two_terms(tmp_path, kind):
    other = "feature" if kind == "prediction" else "prediction"
    distiller = make(**{f"deep_{other}_weight": 0.0})
    logger = LayerWeightLogger(
        csv=tmp_path / "l.csv", picture=tmp_path / "l.svg", console=Console(file=io.StringIO())
    )
    fit(distiller, [logger], epochs=1)
    names = [name for name in rows(tmp_path / "l.csv")[0] if "/" in name]
    assert len(names) == 4 and all(name.startswith(f"deep_{kind}") for name in names)
    assert logger.table().row_count == 2
    assert b"<svg" in (tmp_path / "l.svg").read_bytes()


def test_nothing_to_log():
    for distiller in (make(layers=()), make(deep_prediction_weight=0, deep_feature_weight=0)):
        with pytest.raises(dskd_keras.InputError, match="supervises no layer, so there is nothing"):
            fit(distiller, [LayerWeightLogger()])
    model = small.convnet("plain")
    model.compile("sgd", loss=small.crossentropy())
    with pytest.raises(dskd_keras.InputError, match=r"should be a dskd_keras\.Distiller"):
        fit(model, [LayerWeightLogger()])


def test_bad_arguments_and_missing_packages(tmp_path, monkeypatch):
    for options, message in (
        ({"every": 0}, "every: 0 should be a whole number of at least 1."),
        (
            {"picture": "l.pmg"},
            "picture: 'l.pmg' should be a path that ends in one of matplotlib's",
        ),
    ):
        with pytest.raises(dskd_keras.InputError) as error:
            LayerWeightLogger(**options)
        assert message in str(error.value) and "\n" not in str(error.value)
    monkeypatch.delitem(sys.modules, "dskd_keras.drawing")
    monkeypatch.delattr(dskd_keras, "drawing")
    monkeypatch.setitem(sys.modules, "matplotlib.axes", None)
    with pytest.raises(dskd_keras.InputError, match=r"^picture: the package matplotlib is not"):
        LayerWeightLogger(picture=tmp_path / "l.png")
    monkeypatch.setitem(sys.modules, "tensorboard.compat.proto", None)
    for make_callback in (TensorBoardScalars, lambda f: LayerWeightLogger(tensorboard=f)):
        with pytest.raises(dskd_keras.InputError, match="the package tensorboard is not"):
            make_callback(tmp_path)


def test_step_terms_outlive_evaluation_and_stay_out_of_files(tmp_path):
    x, y = small.images(4)
    distiller = shared()
    assert distiller.step_terms() == {}
    before = small.values(distiller.metrics_variables)
    with small.eagerly():
        distiller.train_on_batch(x, y)
    terms = distiller.step_terms()
    distiller.reset_metrics()
    distiller.evaluate(x, y, verbose=0)
    assert distiller.step_terms() == terms and set(terms) == set(distiller.term_names)
    distiller.reset_metrics()
    # Everything but the last step begins at zero again.
    after = small.values(distiller.metrics_variables)
    assert sum((a != 0).any() for a in after) == 1 and all((b == 0).all() for b in before)

    import h5py

    distiller.save_weights(tmp_path / "w.weights.h5")
    with h5py.File(tmp_path / "w.weights.h5") as file:
        [group] = [item for name, item in file.items() if "term_means" in name]
        assert [item.shape for item in group["vars"].values()] == [(len(terms),), ()]
    other = make()
    other.load_weights(tmp_path / "w.weights.h5")
    assert other.step_terms() == {}


def test_epochs_in_tensorboard(tmp_path):
    x, y = small.images(6)
    callbacks = [TensorBoardScalars(tmp_path / "ours")]
    if BACKEND == "tensorflow":
        callbacks.append(keras.callbacks.TensorBoard(tmp_path / "keras", write_graph=False))
    read = []
    callbacks.append(
        keras.callbacks.LambdaCallback(
            on_epoch_end=lambda epoch, logs: read.append(scalars(tmp_path / "ours" / "train"))
        )
    )
    history = fit(shared(), callbacks, validation_data=(x, y))
    ours = {part: scalars(tmp_path / "ours" / part) for part in ("train", "validation")}
    rates = ours["train"].pop("epoch_learning_rate")
    assert rates == pytest.approx({0: 0.05 * 0.9**3, 1: 0.05 * 0.9**6})
    expected = {"train": {}, "validation": {}}
    for name, values in history.items():
        part = "validation" if name.startswith("val_") else "train"
        expected[part][f"epoch_{name.removeprefix('val_')}"] = dict(enumerate(values))
    assert set(ours["validation"]) == {"epoch_loss", "epoch_accuracy"}
    for part, tags in expected.items():
        assert set(ours[part]) == set(tags)
        for tag, values in tags.items():
            assert ours[part][tag] == pytest.approx(values, rel=1e-6)
    # An epoch can be read as soon as it is over.
    assert [list(values["epoch_loss"]) for values in read] == [[0], [0, 1]]

    if BACKEND == "tensorflow":
        import tensorflow as tf

        ours["train"]["epoch_learning_rate"] = rates
        for part, tags in ours.items():
            # Keras's callback also writes the evaluation at every iteration.
            events = EventAccumulator(str(tmp_path / "keras" / part)).Reload()
            names = [n for n in events.Tags()["tensors"] if n.startswith("epoch_")]
            assert set(names) == set(tags)
            for tag in names:
                theirs = {
                    event.step: float(tf.make_ndarray(event.tensor_proto))
                    for event in events.Tensors(tag)
                }
                assert tags[tag] == pytest.approx(theirs, rel=1e-6)


def test_a_continued_run_replaces_epochs_in_tensorboard(tmp_path):
    distiller = shared()
    first = fit(distiller, [TensorBoardScalars(tmp_path)], epochs=3)
    second = fit(distiller, [TensorBoardScalars(tmp_path)], epochs=4, initial_epoch=1)
    losses = dict(enumerate([first["loss"][0], *second["loss"]]))
    assert scalars(tmp_path / "train")["epoch_loss"] == pytest.approx(losses)


def run_script(script, *arguments, **environment):
    here = Path(__file__).parent
    environment["PYTHONPATH"] = f"{here}{os.pathsep}{here.parent}"
    done = subprocess.run(
        [sys.executable, "-c", script, *map(str, arguments)],
        env={**os.environ, **environment}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.once
def test_tensorboard_without_tensorflow(tmp_path):
    run_script(
        "import sys; sys.modules['tensorflow'] = None\n"
        "import dskd_keras, small\n"
        "distiller = dskd_keras.Distiller(\n"
        "    small.convnet('teacher'), small.convnet('student'), ['stage1'])\n"
        "distiller.compile('sgd', loss=small.crossentropy())\n"
        "distiller.fit(*small.images(4), verbose=0, callbacks=[\n"
        "    dskd_keras.callbacks.TensorBoardScalars(sys.argv[1]),\n"
        "    dskd_keras.callbacks.LayerWeightLogger(tensorboard=sys.argv[1], summary=False)])\n",
        tmp_path,
    )
    epoch, step = scalars(tmp_path / "train"), scalars(tmp_path / "steps")
    assert step["label_loss"] == pytest.approx({0: epoch["epoch_label_loss"][0]})
    assert step["deep_feature_allocation/stage1"] == {0: 1.0}


def of_layers(what, layers=LAYERS):
    return [f"{what}/{layer}" for layer in layers]


EVERY_ROOT = [
    "label_loss", "prediction_loss", *of_layers("deep_prediction_loss"),
    *of_layers("deep_feature_loss"),
]  # fmt: skip


def stopped(distiller, x, y, epochs=1, callback=None, **options):
    """The message of the error, and the terms it names."""
    with pytest.raises(TrainingError) as error:
        distiller.fit(
            x, y, batch_size=4, epochs=epochs, shuffle=False, verbose=0,
            callbacks=[callback or StopOnNonFiniteLoss()], **options,
        )  # fmt: skip
    message = str(error.value)
    assert "\n" not in message
    terms = message.split("not finite: ")[1].split(". ")[0].split(", ")
    return message, [term.split("=")[0] for term in terms]


def break_variable(variable, value=np.nan):
    variable.assign(np.full(variable.shape, value))


@pytest.mark.parametrize("what", ["images", pytest.param("sample_weight", marks=pytest.mark.once)])
def test_nan_in_the_data_stops_at_its_step(what):
    x, y = small.images()
    weight = np.ones(len(x), "float32")
    (x if what == "images" else weight)[6] = np.nan
    options = {} if what == "images" else {"sample_weight": weight}
    message, terms = stopped(shared(), x, y, **options)
    assert message.startswith("epoch 1, step 2: the loss is not finite: ")
    assert terms == EVERY_ROOT and "look for NaN in the images, the sample weights" in message


def test_teacher_layer_and_epoch_are_named():
    x, y = small.images()
    distiller = shared()
    break_variable(distiller.teacher.model.get_layer("logits").kernel)
    message, terms = stopped(distiller, x, y)
    assert message.startswith("epoch 1, step 1:") and "NaN in the teacher's outputs" in message
    assert terms == ["prediction_loss", *of_layers("deep_prediction_loss")]

    # From the end of the first epoch on, the head of one layer is broken.
    distiller = shared()
    heads = distiller.student_with_heads
    own = {weight.path for weight in distiller.student.weights}
    broken = [weight for weight in heads.weights if weight.path not in own]
    broken = next(weight for weight in broken if "head_stage1_projection/kernel" in weight.path)
    callback = StopOnNonFiniteLoss()
    breaker = keras.callbacks.LambdaCallback(
        on_epoch_end=lambda epoch, logs: break_variable(broken, np.inf)
    )
    with pytest.raises(TrainingError, match=r"^epoch 2, step 1: ") as error:
        distiller.fit(x, y, batch_size=4, epochs=2, verbose=0, callbacks=[breaker, callback])
    assert "deep_feature_loss/stage1=" in str(error.value)
    assert "stage2" not in str(error.value) and "label_loss" not in str(error.value)


@keras.saving.register_keras_serializable("tests")
class Broken(dskd_keras.weighting.Weighting):
    def call(self, losses):
        return losses * np.nan


@pytest.mark.once
def test_other_sources():
    x, y = small.images()
    message, terms = stopped(make(weighting=Broken()), x, y)
    assert "look at the weighting" in message
    assert terms == [
        *of_layers("deep_prediction_allocation"), *of_layers("deep_feature_allocation")
    ]  # fmt: skip
    student = small.convnet("student", regularizer=keras.regularizers.L2(1e38))
    message, terms = stopped(make(learning_rate=0.0, student=student), x, y)
    assert terms == ["loss"] and "regularisation" in message and "loss=inf" in message
    # A finite loss with a step that ruins the weights shows in the next step.
    message, terms = stopped(make(learning_rate=1e38, layers=()), x, y)
    assert message.startswith("epoch 1, step 2:") and "Lower the learning_rate" in message
    assert "label_loss" in terms
    model = small.convnet("plain")
    model.compile("sgd", loss=small.crossentropy())
    x[5] = np.nan
    message, terms = stopped(model, x, y)
    assert message.startswith("epoch 1, step 2:") and terms == ["loss"]


def test_continued_epochs_count_on():
    x, y = small.images()
    x[-1] = np.nan
    callback = StopOnNonFiniteLoss()
    distiller = shared()
    distiller.resumed_at = Place(0, 10)
    message, _ = stopped(distiller, x, y, callback=callback)
    assert message.startswith("epoch 1, step 13:")
    distiller = shared()
    distiller.resumed_at = Place(0, 10)
    distiller.fit(x[:8], y[:8], batch_size=4, verbose=0, callbacks=[callback])
    message, _ = stopped(distiller, x, y, callback=callback, epochs=3, initial_epoch=1)
    assert message.startswith("epoch 2, step 3:")


def test_throughput_leaves_out_compilation_and_evaluation(monkeypatch):
    clock = 0.0
    monkeypatch.setattr("dskd_keras.callbacks.throughput.time.perf_counter", lambda: clock)
    throughput = Throughput(images_per_step=10)
    rates = []
    # Steps of an epoch, seconds of each: 100 for compiling and for every evaluation.
    for epoch, seconds in enumerate([[100.0], [2.0, 2.0, 2.0], [1.0]]):
        throughput.on_epoch_begin(epoch)
        for batch, duration in enumerate(seconds):
            clock += duration
            throughput.on_train_batch_end(batch, {"loss": 0.0})
        clock += 100.0
        throughput.on_epoch_end(epoch)
        rates.append(throughput.images_per_second)
    assert rates == [None, 5.0, 7.5]
    first = Throughput(images_per_step=10)
    first.on_epoch_begin(0)
    for batch, duration in enumerate([100.0, 4.0, 4.0]):
        clock += duration
        first.on_train_batch_end(batch, {"loss": 0.0})
    first.on_epoch_end(0)
    assert first.images_per_second == 2.5


def test_fade_out_ends_deep_supervision_before_the_training():
    distiller = shared()
    before = distiller.deep_prediction_weight, distiller.deep_feature_weight
    seen = []
    watch = keras.callbacks.LambdaCallback(
        on_epoch_end=lambda epoch, logs: seen.append(
            (distiller.deep_prediction_weight, distiller.deep_feature_weight)
        )
    )
    with small.eagerly():
        fit(distiller, [FadeOut(distiller, 2), watch], epochs=4)
    shares = [1.0, 0.5, 0.0, 0.0]
    np.testing.assert_allclose(seen, [[share * b for b in before] for share in shares], rtol=1e-6)
    with pytest.raises(dskd_keras.InputError, match="epochs: 0 should be"):
        FadeOut(distiller, 0)


def test_without_deep_supervision_a_step_has_no_heads_and_trains_to_the_same_student(tmp_path):
    trained, histories, calls = [], [], []
    path, console = tmp_path / "layers.csv", Console(file=io.StringIO(), width=100)
    head = next(
        layer
        for layer in shared().student_with_heads.layers
        if layer.name.startswith("head_stage1_")
    )
    original = head.call
    for recompiles in (False, True):
        distiller = shared()
        distiller.recompiles = recompiles
        count = []

        def counted(*args, count=count, **kwargs):
            count.append(1)
            return original(*args, **kwargs)

        head.call = counted
        logger = LayerWeightLogger(csv=path, console=console)
        with small.eagerly():
            callbacks = [FadeOut(distiller, 2), logger, StopOnNonFiniteLoss()]
            histories.append(fit(distiller, callbacks, epochs=4))
        trained.append(small.values(distiller.trainable_variables))
        calls.append(len(count))
    head.call = original
    for kept, left_out in zip(*trained, strict=True):
        np.testing.assert_allclose(left_out, kept, rtol=1e-5, atol=1e-6)
    with_heads, without = histories
    np.testing.assert_allclose(without["loss"], with_heads["loss"], rtol=1e-5)
    for name, values in with_heads.items():
        epochs = 2 if name.startswith("deep_") else 4
        np.testing.assert_allclose(without[name], values[:epochs], rtol=1e-5, err_msg=name)
    if BACKEND == "tensorflow":  # the one that runs layer by layer here
        assert calls[0] == 2 * calls[1] > 0
    deep = [name for name in distiller.term_names if name.startswith("deep_")]
    assert {name: len(values) for name, values in without.items() if name in deep} == dict.fromkeys(
        deep, 2
    )
    written = rows(path)
    assert all(math.isnan(float(row[name])) for row in written[6:] for name in deep)
    assert all(math.isfinite(float(row[name])) for row in written[:6] for name in deep)
    assert all(math.isfinite(float(row["label_loss"])) for row in written)
    assert "epoch 1 → 2" in console.file.getvalue().splitlines()[-9]
    # The heads come back.
    assert set(distiller.step_terms()) == {"label_loss", "prediction_loss"}
    distiller.deep_prediction_weight = 0.5
    with small.eagerly():
        distiller.train_on_batch(*small.images(4))
    assert set(distiller.step_terms()) == set(distiller.term_names)
    distiller.recompiles = True
