"""Trains a distiller by a configuration's protocol, from the start or from a checkpoint."""

import csv
import functools
import sys
import time
from typing import NamedTuple

import keras
import numpy as np

from dskd_keras import artifacts, data
from dskd_keras.callbacks import StopOnNonFiniteLoss, TensorBoardScalars, Throughput
from dskd_keras.checkpoints import Checkpointer, CheckpointFolder
from dskd_keras.errors import InputError
from dskd_keras.interruption import StopRequest
from dskd_keras.optimizers import SGD

_EVALUATION_BATCH = 256


class Trained(NamedTuple):
    """What training leaves beside the distiller's weights.

    Attributes:
        history: Values of every log by epoch, a dict of lists; the columns of `history.csv`.
        best_weights: The student's weights after its best epoch.
        images_per_second: Median over the epochs that were trained in this process.
        seconds: Duration, that of interrupted attempts included.
    """

    history: dict[str, list[float]]
    best_weights: list
    images_per_second: float | None
    seconds: float


def train(
    config, distiller, dataset, seed, folder, console, *, batches=None, until=None, verbose=None
):
    """Trains a distiller, with checkpoints, into a folder.

    `folder/history.csv` gets a row an epoch, `folder/tensorboard` the same as events, and
    `folder/checkpoints` what `config.resume` goes on from: weights, optimizer, metrics and place in
    the data, so that the numbers are those of a run that was never interrupted.

    Args:
        config: An `ExperimentConfig`.
        distiller: A `Distiller`, not compiled.
        dataset: The `data.Dataset`.
        seed: Of the order and the augmentation of the images.
        folder: An existing folder, a `pathlib.Path`.
        console: A `rich.console.Console` for messages.
        batches: A function that returns the training batches, given the number of batches that were
            done before. Defaults to augmented `data.TrainingBatches`.
        until: Train up to that epoch alone, on the schedule of all `config.epochs`. Defaults to
            all of them.
        verbose: As in `keras.Model.fit`. Defaults to a bar in a terminal, to a line an epoch
            elsewhere.

    Returns:
        `Trained`. The checkpoints remain, until what came of the training is saved.

    Raises:
        InputError: The checkpoints are of other data, another backend or another model.
        Interrupted: Training was asked to stop; a checkpoint holds where.
        TrainingError: A loss or a weight is not finite, or the disk can't be written.
    """
    start = time.perf_counter()
    if batches is None:
        batches = functools.partial(_training_batches, config, dataset, seed)
    if verbose is None:
        # The moving bar needs a terminal; a log gets one line an epoch.
        verbose = 1 if sys.stdout.isatty() else 2
    epochs = config.epochs if until is None else until
    steps = batches(0).steps_per_epoch
    held_out = "test" if dataset.x_validation is None else "validation"
    held_out = evaluation_batches(dataset, held_out)
    distiller.compile(
        optimizer=optimizer(config, steps * config.epochs),
        **compile_options(),
    )
    checkpoints = CheckpointFolder(folder / "checkpoints")
    found = checkpoint_to_resume(config, dataset, folder, console)
    here = environment(dataset)
    seconds_before, history = 0.0, ""
    best = _BestWeights(distiller.student)
    if found is not None:
        seconds_before, history = found.notes["seconds"], found.notes["history"]
        best.value, best.weights = found.notes["best"], found.best
    path = folder / "history.csv"
    # An epoch may have been written that no checkpoint knows of.
    artifacts.write_text(path, history)

    def held_elsewhere():
        return best.weights, {
            "best": best.value,
            # As it is: its lines end as the csv module ends them.
            "history": path.read_bytes().decode(),
            "seconds": seconds_before + time.perf_counter() - start,
            "environment": here,
        }

    throughput = Throughput(len(dataset.x_train) / steps)
    non_finite = StopOnNonFiniteLoss()
    with StopRequest(
        lambda: console.print("Stopping after this step; once more to stop at once.")
    ) as stop:
        checkpointer = Checkpointer(
            checkpoints, config.checkpoint_steps, steps, stop, held_elsewhere
        )
        callbacks = [
            throughput,
            non_finite,
            keras.callbacks.CSVLogger(path, append=True),
            TensorBoardScalars(folder / "tensorboard"),
            best,
            checkpointer,
        ]

        def fit(epoch, step):
            non_finite.first_step = step

            def end_of_epoch(*_):
                # The rest of an epoch has fewer steps than the epochs after it.
                distiller.stop_training = step > 0

            distiller.fit(
                batches(epoch * steps + step),
                steps_per_epoch=steps - step,
                initial_epoch=epoch,
                epochs=epochs,
                shuffle=False,
                validation_data=held_out,
                callbacks=[keras.callbacks.LambdaCallback(on_epoch_end=end_of_epoch), *callbacks],
                verbose=verbose,
            )

        epoch = step = 0
        with artifacts.disk_errors_in_one_line(folder):
            if found is not None:
                epoch, step = found.epoch, found.step
                checkpointer.restore(distiller, found, held_out)
                console.print(f"Continuing after epoch {epoch} of {epochs}"
                              + (f", step {step} of {steps}." if step else "."))  # fmt: skip
            if step:
                fit(epoch, step)
                epoch, step = epoch + 1, 0
            if epoch < epochs:
                fit(epoch, step)
    return Trained(
        _read_history(path),
        best.weights,
        throughput.images_per_second,
        seconds_before + time.perf_counter() - start,
    )


def checkpoint_to_resume(config, dataset, folder, console):
    """Returns the `Checkpoint` that the training in a folder goes on from, None for a new one.

    Args:
        config: An `ExperimentConfig`.
        dataset: The `data.Dataset`.
        folder: The training's folder, a `pathlib.Path`.
        console: A `rich.console.Console` for messages on damaged checkpoints.

    Raises:
        InputError: None of the checkpoints is whole, or they are of other data or another backend.
    """
    if not config.resume:
        return None
    checkpoints = CheckpointFolder(folder / "checkpoints")
    found = checkpoints.newest(console.print)
    if found is not None:
        check_environment(folder, found.notes["environment"], environment(dataset))
    elif checkpoints.exist():
        raise InputError(
            f"resume: no checkpoint in '{checkpoints.path}' can be used. Start without --resume, "
            "which sets aside what is there."
        )
    return found


def compile_options():
    """Returns the loss and the metrics of all models here, as arguments of `compile`."""
    return {
        "loss": keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        "metrics": [keras.metrics.SparseCategoricalAccuracy(name="accuracy")],
    }


def optimizer(config, steps):
    """Returns the optimizer for a training run of so many steps."""
    return SGD(
        learning_rate(config, steps),
        momentum=config.momentum,
        nesterov=config.nesterov,
        weight_decay=config.weight_decay,
    )


def learning_rate(config, steps):
    """Returns the rate, or its schedule over all steps of a training run.

    The places of the drops are shares of the training, so that a short run goes through the same
    schedule: 0.625, 0.75 and 0.875 are the 150th, 180th and 210th of 240 epochs.
    """
    if config.schedule == "cosine":
        return keras.optimizers.schedules.CosineDecay(config.learning_rate, decay_steps=steps)
    drops = sorted(config.decay_at)
    if not drops:
        return config.learning_rate
    # A boundary is the last step with the old rate.
    return keras.optimizers.schedules.PiecewiseConstantDecay(
        [round(share * steps) - 1 for share in drops],
        [config.learning_rate * config.decay_factor**k for k in range(len(drops) + 1)],
    )


def augmentation(config, dataset):
    """Returns the augmentation's name: the configured one, or what suits the data set."""
    return dataset.augmentation if config.augmentation == "auto" else config.augmentation


def evaluation_batches(dataset, part):
    """Returns the batches of `"test"` or `"validation"`."""
    return data.EvaluationBatches(
        getattr(dataset, f"x_{part}"),
        getattr(dataset, f"y_{part}"),
        _EVALUATION_BATCH,
        dataset.mean,
        dataset.std,
    )


def _training_batches(config, dataset, seed, first_batch=0):
    return data.TrainingBatches(
        dataset.x_train,
        dataset.y_train,
        config.batch_size,
        seed,
        dataset.mean,
        dataset.std,
        augmentation=augmentation(config, dataset),
        first_batch=first_batch,
    )


def environment(dataset):
    """Returns what a run has to find again, beside its configuration, to go on to the same numbers.

    Args:
        dataset: The `data.Dataset`.

    Returns:
        A dict of strings, to be kept for `check_environment`.
    """
    return {
        "KERAS_BACKEND": keras.backend.backend(),
        "image_data_format": keras.config.image_data_format(),
        "dtype_policy": keras.config.dtype_policy().name,
        "training images": dataset.fingerprint(),
    }


def check_environment(folder, there, here):
    """Raises `InputError` if a run in `folder` was begun where something else was the case.

    Args:
        folder: The run's folder, for the message.
        there: What `environment` returned then.
        here: What it returns now.
    """
    differences = [
        f"{name}: {there.get(name)} there, {value} here"
        for name, value in here.items()
        if there.get(name) != value
    ]
    if differences:
        raise InputError(
            f"resume: the run in '{folder}' was made with another {'; '.join(differences)}. Go on "
            "as it was begun, or choose another --run_dir."
        )


def _read_history(path):
    with open(path, newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    return {name: [float(row[name]) for row in rows] for name in rows[0]}


class _BestWeights(keras.callbacks.Callback):
    """Holds the student's weights after the epoch with the best validation accuracy, in memory."""

    def __init__(self, student):
        super().__init__()
        self._student = student
        self.value = None
        self.weights = []

    def on_epoch_end(self, epoch, logs=None):
        if self.value is None or logs["val_accuracy"] > self.value:
            self.value = float(logs["val_accuracy"])
            self.weights = [np.array(weight) for weight in self._student.get_weights()]
