"""Trains on one device and on two, in one process: `python on_two_devices.py DIR`.

It writes what test_devices looks at into `DIR/found.json`. Two logical CPU devices stand for two
accelerators.
"""

import contextlib
import csv
import io
import json
import os
import signal
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))
os.environ["XLA_FLAGS"] = (
    f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=2"
)

import keras
import numpy as np
import small

import dskd_keras
import train
from dskd_keras.data import TrainingBatches
from dskd_keras.experiment import build, checkpoints, devices, evaluation, pipeline, training
from dskd_keras.experiment.config import ExperimentConfig

TENSORFLOW = keras.backend.backend() == "tensorflow"
if TENSORFLOW:
    import tensorflow as tf

    cpu = tf.config.list_physical_devices("CPU")[0]
    tf.config.set_logical_device_configuration(cpu, [tf.config.LogicalDeviceConfiguration()] * 2)
else:
    import jax

NORMALIZATION = ((0.5,) * 3, (0.2,) * 3)
# The commands' models are as tiny, and what is not looked at takes no time.
build.models.create = small.created
pipeline.report.write = lambda folders: "no report"
evaluation._LATENCY_REPETITIONS = 1
# The second epoch has no heads.
training._WORTH_A_COMPILATION = 1


def images(count):
    """Noise and labels: no half of a batch is like the other."""
    rng = np.random.default_rng(count)
    return rng.integers(0, 256, (count, 8, 8, 3), "uint8"), np.arange(count) % small.CLASSES


def trained(count, scope, training=None):
    """What training on so many images of batches of 8 gives, as lists of numbers by name."""
    keras.utils.set_random_seed(0)
    x, y = images(count)
    steps = []
    with scope:
        teacher = small.convnet("teacher", channels=3)
        student = small.convnet("student", channels=3, regularizer=keras.regularizers.L2(0.01))
        rng = np.random.default_rng(0)
        # No moving statistic is at its start.
        for model in (teacher, student):
            weights = model.get_weights()
            model.set_weights([w + rng.random(w.shape).astype("float32") / 4 for w in weights])
        distiller = dskd_keras.Distiller(
            teacher, student, ["stage1", "stage2"], weighting="relative"
        )
        optimizer = dskd_keras.optimizers.SGD(0.05, momentum=0.9, weight_decay=1e-3)
        distiller.compile(optimizer, small.crossentropy(), metrics=["accuracy"])
        batches = TrainingBatches(x, y, 8, 0, *NORMALIZATION)
        step = keras.callbacks.LambdaCallback(
            on_train_batch_end=lambda batch, logs: steps.append(distiller.step_terms())
        )
        with contextlib.nullcontext() if training is None else training(distiller):
            history = distiller.fit(
                batches,
                steps_per_epoch=batches.steps_per_epoch,
                epochs=2,
                shuffle=False,
                verbose=0,
                callbacks=[step],
            ).history
    values = {variable.path: value for variable, value in zip(
        distiller.weights, distiller.get_weights(), strict=True
    )}  # fmt: skip
    return {
        **{f"history: {name}": values for name, values in history.items()},
        **{f"step: {name}": [step[name] for step in steps] for name in steps[0]},
        **{f"weight: {path}": np.ravel(value).tolist() for path, value in values.items()},
    }


def on(number):
    """The devices of train.py, for a batch size of 8."""
    return devices.find(ExperimentConfig("resnet8", "resnet8", batch_size=8, devices=number))


def of_user():
    """A scope of Keras's own."""
    return keras.distribution.DataParallel(devices=jax.devices()).scope()


def model_parallel():
    """A scope in which the kernel of a convolution is split over both devices."""
    mesh = keras.distribution.DeviceMesh((1, 2), ["batch", "model"], jax.devices())
    layout = keras.distribution.LayoutMap(mesh)
    layout["^stage2_conv/kernel"] = (None, None, None, "model")
    return keras.distribution.ModelParallel(layout_map=layout, batch_dim_name="batch").scope()


def alone():
    """No scope."""
    return contextlib.nullcontext()


def stop_after(steps):
    """Has the process ask itself to stop after so many steps, once."""
    original = checkpoints.Checkpointer.on_train_batch_end

    def hooked(self, batch, logs=None):
        if self.steps(self.place_after(batch)) == steps:
            checkpoints.Checkpointer.on_train_batch_end = original
            os.kill(os.getpid(), signal.SIGTERM)
        original(self, batch, logs)

    checkpoints.Checkpointer.on_train_batch_end = hooked


def command(folder, run, *more):
    """Runs train.py on 21 images, three steps an epoch; returns its exit status."""
    path = folder / "noise.npz"
    (x_train, y_train), (x_test, y_test) = images(21), images(13)
    np.savez(
        path, x_train=x_train, x_test=x_test, y_train=y_train.astype("uint8"),
        y_test=y_test.astype("uint8"),
    )  # fmt: skip
    return train.main([
        "--teacher", "resnet8", "--student", "resnet8", "--dataset", str(path), "--epochs", "2",
        "--batch_size", "8", "--run_dir", str(folder / run), "--teacher_dir",
        str(folder / "teachers"), "--teacher_epochs", "1", *more,
    ])  # fmt: skip


def outcome(folder):
    """What a finished run has left, as lists of numbers by name."""
    run = folder / "dskd" / "seed-0"
    rows = list(csv.DictReader(io.StringIO((run / "history.csv").read_text())))
    student = keras.models.load_model(run / "student.keras", compile=False)
    metrics = json.loads((run / "metrics.json").read_text())
    return {
        "synchronized": [float("synchronized\": true" in student.to_json())],
        "accuracy": [metrics["test_accuracy"], *metrics["head_accuracies"].values()],
        **{
            f"history: {name}": [float(row[name]) for row in rows if row[name] != "NA"]
            for name in rows[0]
        },
        **{
            f"weight: {weight.path}": np.ravel(value).tolist()
            for weight, value in zip(student.weights, student.get_weights(), strict=True)
        },
    }  # fmt: skip


def refused(**fields):
    """What is said of a configuration's devices."""
    config = ExperimentConfig("resnet8", "resnet8", **{"batch_size": 8, **fields})
    try:
        dataset = dskd_keras.data.ImageDataset(
            "noise", *images(17), *images(12), ("a", "b", "c"), *NORMALIZATION
        )
        devices.check_batches(devices.find(config), dataset, config)
    except dskd_keras.InputError as error:
        return str(error)
    return None


def main(folder):
    found = {"refused": [
        refused(devices=3), refused(devices="all", batch_size=5), refused(devices=2),
        refused(devices=2, batch_size=6), refused(devices="all"),
        refused(devices=2, prediction_loss="dist", batch_size=6),
    ]}  # fmt: skip
    two = on("all")
    assert two.count == 2
    # The last batch has one image on JAX, and on TensorFlow two on one device and one on the other.
    count = 19 if TENSORFLOW else 17
    found["one"] = trained(count, alone())
    found["two"] = trained(count, two.scope(), two.training)
    if not TENSORFLOW:
        # Batches that divide, as Keras's own distributions ask for them.
        found["one, divided"] = trained(16, alone())
        found["user's"] = trained(16, of_user())
        found["model parallel"] = trained(16, model_parallel())
    assert keras.distribution.distribution() is None

    status = [command(folder, "one")]
    stop_after(2)
    status.append(command(folder, "two", "--devices", "2"))
    stop_after(3)
    status.append(command(folder, "two", "--resume", "--devices", "1"))
    device = ["--augment_on", "device"]
    together = ["--steps_per_execution", "3"]
    if TENSORFLOW:
        status.append(command(folder, "two", "--resume", "--devices", "2", *together))
    else:
        device += together
    status.append(command(folder, "two", "--resume", "--devices", "2", *device))
    found["status"] = status
    found["run on one"], found["run on two"] = outcome(folder / "one"), outcome(folder / "two")
    (folder / "found.json").write_text(json.dumps(found))


main(Path(sys.argv[1]))
