"""Trains a distiller by a configuration's protocol, from the start or from a checkpoint."""

import csv
import functools
import io
import math
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import keras
import numpy as np

from dskd_keras import data, files
from dskd_keras.callbacks import FadeOut, StopOnNonFiniteLoss, TensorBoardScalars, Throughput
from dskd_keras.distiller import Distiller
from dskd_keras.errors import InputError
from dskd_keras.experiment import device_images
from dskd_keras.experiment.checkpoints import (
    Checkpoint,
    Checkpointer,
    CheckpointFolder,
    Restorer,
)
from dskd_keras.experiment.config import ExperimentConfig
from dskd_keras.experiment.device_images import MovedBatches
from dskd_keras.experiment.devices import Devices
from dskd_keras.experiment.interruption import StopRequest
from dskd_keras.experiment.run import Run
from dskd_keras.optimizers import SGD
from dskd_keras.progress import Place

_EVALUATION_BATCH = 256
# Steps of a training in which a trace on PyTorch saves more than it takes.
_WORTH_A_TRACE = 100
# Steps left without heads in which leaving them out saves more than another compilation takes.
_WORTH_A_COMPILATION = 3000

# From the number of batches that are done to the batches that are left.
BatchesFrom = Callable[[int], data.TrainingBatches]


class Trained(NamedTuple):
    """What training leaves beside the distiller's weights."""

    history: dict[str, list[float]]  # the columns of history.csv
    best_weights: list[np.ndarray]  # the student's, after its best epoch
    images_per_second: float | None  # median over the epochs of this process
    seconds: float  # those of interrupted attempts included


def train(
    run: Run,
    distiller: Distiller,
    seed: int,
    folder: Path,
    batches: BatchesFrom | None = None,
    until: int | None = None,
    verbose: int | None = None,
) -> Trained:
    """Trains a distiller, with checkpoints, into a folder.

    `folder/history.csv` gets a row an epoch, `folder/tensorboard` the same as events, and
    `folder/checkpoints` what `resume` goes on from: weights, optimizer, metrics and place in the
    data, so that the numbers are those of a run that was never interrupted.

    The checkpoints remain until what came of it is saved.

    Args:
        run: The configuration and its images.
        distiller: Not compiled; made, and trained, within the scope of the run's devices.
        seed: Of the order and the augmentation of the images.
        folder: An existing folder.
        batches: Defaults to augmented ones.
        until: Train up to that epoch alone, on the schedule of all configured epochs.
        verbose: Defaults to a bar in a terminal, to a line an epoch elsewhere.

    Raises:
        InputError: The checkpoints are of other data, another backend or another model.
        Interrupted: Training was asked to stop; a checkpoint holds where.
        TrainingError: A loss or a weight is not finite, or the disk can't be written.
    """
    config = run.config
    plan = _plan(run, distiller, batches or functools.partial(training_batches, run, seed))
    steps = plan.steps
    found = checkpoint_to_resume(run, folder)
    record = _Record(folder / "history.csv", distiller.student, conditions(run.dataset), found)
    throughput = Throughput(len(run.dataset.x_train) / steps)
    stop = StopRequest(lambda: run.say("Stopping after this step; once more to stop at once."))
    checkpointer = Checkpointer(
        CheckpointFolder(folder / "checkpoints"), config.checkpoint_steps, steps, stop, record
    )
    epochs = config.epochs if until is None else until
    options = {
        "epochs": epochs,
        "validation_data": plan.held_out,
        "callbacks": [
            throughput,
            *plan.callbacks,
            _HistoryFile(record.path),
            TensorBoardScalars(folder / "tensorboard"),
            record,
            checkpointer,
        ],
        # The moving bar needs a terminal; a log gets one line an epoch.
        "verbose": (1 if sys.stdout.isatty() else 2) if verbose is None else verbose,
    }
    with stop, files.disk_errors_in_one_line(folder):
        place = plan.restorer.restore(distiller, found, plan.held_out)
        if found is not None:
            within = f", step {place.step} of {steps}." if place.step else "."
            run.say(f"Continuing after epoch {place.epoch} of {epochs}{within}")
        with run.devices.training(distiller):
            _fit_from(place, distiller, plan, options)
    return Trained(
        _columns(record.history()), record.best, throughput.images_per_second, record.seconds()
    )


def follow(run: Run, distiller: Distiller, seed: int) -> None:
    """Takes part in what `train` does in another process, with the same arguments."""
    plan = _plan(run, distiller, functools.partial(training_batches, run, seed))
    options = {
        "epochs": run.config.epochs,
        "validation_data": plan.held_out,
        "callbacks": plan.callbacks,
        "verbose": 0,
    }
    # The process that leads hears of a stop too, and has to finish its step.
    with StopRequest(lambda: None):
        place = plan.restorer.restore(distiller, None, plan.held_out)
        _fit_from(place, distiller, plan, options)


class _Plan(NamedTuple):
    """What all processes of a training have in common."""

    batches: Callable[[int], keras.utils.PyDataset]
    steps: int  # an epoch
    held_out: keras.utils.PyDataset
    restorer: Restorer
    callbacks: list[keras.callbacks.Callback]


def _plan(run: Run, distiller: Distiller, batches: BatchesFrom) -> _Plan:
    """Compiles a distiller and returns what trains it."""
    config = run.config
    steps = batches(0).steps_per_epoch
    part = "test" if run.dataset.x_validation is None else "validation"
    held_out = evaluation_batches(run.dataset, part, run.devices)
    distiller.compile(
        optimizer(config, steps * config.epochs),
        steps_per_execution=config.steps_per_execution,
        **compile_options(),
    )
    if (traced := distiller.traced_training) is not None:
        # Of the whole training, wherever it is begun: a trace rounds differently.
        traced.after = 0 if steps * config.epochs >= _WORTH_A_TRACE else math.inf
    restorer = Restorer()
    callbacks = [restorer, StopOnNonFiniteLoss()]
    if config.deep_supervision < 1 and config.method == "dskd":
        # Before a checkpoint restores coefficients that have fallen already.
        epochs = max(1, round(config.deep_supervision * config.epochs))
        callbacks.insert(0, FadeOut(distiller, epochs))
        distiller.recompiles = steps * (config.epochs - epochs) >= _WORTH_A_COMPILATION
    shares = run.devices.shares
    return _Plan(lambda first: shares(batches(first)), steps, shares(held_out), restorer, callbacks)


def _fit_from(place: Place, distiller: Distiller, plan: _Plan, options: dict[str, Any]) -> None:
    """Trains from a place to the end of all epochs."""
    if place.step:
        _fit(distiller, plan.batches, place, plan.steps, options)
        place = Place(place.epoch + 1)
    if place.epoch < options["epochs"]:
        _fit(distiller, plan.batches, place, plan.steps, options)


def _fit(
    distiller: Distiller,
    batches: Callable[[int], keras.utils.PyDataset],
    place: Place,
    steps: int,
    options: dict[str, Any],
) -> None:
    """Trains from the beginning of an epoch to the end, or from within an epoch to its end."""
    distiller.resumed_at = place
    together = distiller.steps_per_execution
    if place.step and (steps - place.step) % together:
        # Keras would run on into the next epoch.
        distiller.steps_per_execution = math.gcd(steps - place.step, together)
        distiller.make_train_function(force=True)

    def end_of_epoch(*_: object) -> None:
        # The rest of an epoch has fewer steps than the epochs after it.
        distiller.stop_training = place.step > 0

    first = keras.callbacks.LambdaCallback(on_epoch_end=end_of_epoch)
    distiller.fit(
        batches(place.epoch * steps + place.step),
        steps_per_epoch=steps - place.step,
        initial_epoch=place.epoch,
        shuffle=False,
        **options | {"callbacks": [first, *options["callbacks"]]},
    )
    if distiller.steps_per_execution != together:
        distiller.steps_per_execution = together
        distiller.make_train_function(force=True)


class _HistoryFile(keras.callbacks.CSVLogger):
    """`history.csv`: as Keras writes it, but for the epochs, which count from 1.

    The columns are those of the first epoch, "NA" where a later one has no value.
    """

    def __init__(self, path: Path):
        super().__init__(path, append=True)
        self._path = path

    def on_train_begin(self, logs: Any = None) -> None:
        super().on_train_begin(logs)
        with open(self._path, newline="", encoding="utf-8") as file:
            _, *columns = next(csv.reader(file), [""])
        if columns:
            self.keys = columns

    def on_epoch_end(self, epoch: int, logs: Any = None) -> None:
        super().on_epoch_end(epoch + 1, logs)


class _Record(keras.callbacks.Callback):
    """What a checkpoint holds beside the model: the history, the best weights, the time taken."""

    def __init__(
        self, path: Path, student: keras.Model, here: dict[str, str], found: Checkpoint | None
    ):
        super().__init__()
        self.path = path
        self.best: list[np.ndarray] = []
        self._best_accuracy: float | None = None
        self._student = student
        self._conditions = here
        self._start = time.perf_counter()
        history = ""
        if found is not None:
            self._start -= found.notes["seconds"]
            self._best_accuracy, self.best = found.notes["best"], found.best
            history = _counted_from_1(found.notes["history"])
        # An epoch may have been written that no checkpoint knows of.
        files.write_text(path, history)

    def on_epoch_end(self, epoch: int, logs: Any = None) -> None:
        """Keeps the student's weights of the epoch with the best validation accuracy."""
        if self._best_accuracy is None or logs["val_accuracy"] > self._best_accuracy:
            self._best_accuracy = float(logs["val_accuracy"])
            self.best = [np.array(weight) for weight in self._student.get_weights()]

    def snapshot(self) -> tuple[list[np.ndarray], dict[str, Any]]:
        """Returns `best` and `notes` of a `Checkpoint`."""
        return self.best, {
            "best": self._best_accuracy,
            "history": self.history(),
            "seconds": self.seconds(),
            "environment": self._conditions,
        }

    def history(self) -> str:
        """Returns the text of the history, its lines ending as the csv module ends them."""
        return self.path.read_bytes().decode()

    def seconds(self) -> float:
        """Returns the duration so far, that of interrupted attempts included."""
        return time.perf_counter() - self._start


def _counted_from_1(history: str) -> str:
    """Returns a history whose epochs count from 1; those of earlier versions did from 0."""
    header, *rows = history.splitlines(keepends=True) or [""]
    if not rows or not rows[0].startswith("0,"):
        return history
    parts = (row.partition(",") for row in rows)
    return header + "".join(f"{int(epoch) + 1},{values}" for epoch, _, values in parts)


def _columns(history: str) -> dict[str, list[float]]:
    rows = list(csv.DictReader(io.StringIO(history, newline="")))
    values = {name: [row[name] for row in rows] for name in rows[0]}
    return {
        name: [math.nan if text == "NA" else float(text) for text in texts]
        for name, texts in values.items()
    }


def checkpoint_to_resume(run: Run, folder: Path) -> Checkpoint | None:
    """Returns the checkpoint that the training in a folder goes on from, None for a new one.

    Raises:
        InputError: None of the checkpoints is whole, or they are of other data or another backend.
    """
    if not run.config.resume:
        return None
    checkpoints = CheckpointFolder(folder / "checkpoints")
    found = checkpoints.newest(run.say)
    if found is not None:
        check_conditions(folder, found.notes["environment"], conditions(run.dataset))
    elif checkpoints.exist():
        raise InputError(
            f"resume: no checkpoint in '{checkpoints.path}' can be used. Start without --resume, "
            "which sets aside what is there."
        )
    return found


def compile_options() -> dict[str, Any]:
    """Returns the loss and the metrics of all models here, as arguments of `compile`."""
    return {
        "loss": keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        "metrics": [keras.metrics.SparseCategoricalAccuracy(name="accuracy")],
    }


def optimizer(config: ExperimentConfig, steps: int) -> SGD:
    """Returns the optimizer for a training run of so many steps."""
    return SGD(
        learning_rate(config, steps),
        momentum=config.momentum,
        nesterov=config.nesterov,
        weight_decay=config.weight_decay,
    )


def learning_rate(
    config: ExperimentConfig, steps: int
) -> float | keras.optimizers.schedules.LearningRateSchedule:
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


def augmentation(run: Run) -> str:
    """Returns the augmentation's name: the configured one, or what suits the data set."""
    configured = run.config.augmentation
    return run.dataset.augmentation if configured == "auto" else configured


def check_backend(config: ExperimentConfig, devices: Devices) -> None:
    """Raises `InputError` where the backend can't run several steps together. Needs no images."""
    together = config.steps_per_execution
    if together == 1:
        return
    if keras.backend.backend() == "torch":
        raise InputError(
            f"steps_per_execution: {together}, but Keras runs steps one by one on PyTorch. Set it "
            "to 1, or set KERAS_BACKEND to jax or tensorflow."
        )
    if keras.backend.backend() == "tensorflow" and devices.count > 1:
        # Keras's loop over the steps has conditions within, at which the replicas' program fails.
        raise InputError(
            f"steps_per_execution: {together}, but on TensorFlow {devices.count} devices run "
            "steps one by one. Set it to 1, or devices to 1."
        )


def check_steps(run: Run) -> None:
    """Raises `InputError` where the images can't be trained on as, or where, it is configured."""
    if run.config.augment_on == "device":
        device_images.check(run.dataset, augmentation(run))
    together = run.config.steps_per_execution
    # Keras would run on into the next epoch.
    steps = training_batches(run, 0).steps_per_epoch
    if steps % together:
        divisors = [number for number in range(1, steps + 1) if steps % number == 0]
        near = sorted(divisors, key=lambda number: abs(number - together))[:3]
        raise InputError(
            f"steps_per_execution: {together}, but an epoch has {steps} steps. Take "
            f"{' or '.join(map(str, sorted(near)))}, which divide them, or another batch_size."
        )


def evaluation_batches(
    dataset: data.ImageDataset, part: str, devices: Devices | None = None
) -> data.EvaluationBatches:
    """Returns the batches of `"test"` or `"validation"`, for one device or several."""
    images = getattr(dataset, f"x_{part}")
    sizes = (devices or Devices()).sizes(len(images), _EVALUATION_BATCH)
    return data.EvaluationBatches(
        images,
        getattr(dataset, f"y_{part}"),
        sizes[0],
        dataset.mean,
        dataset.std,
    )


def training_batches(run: Run, seed: int, first_batch: int = 0) -> data.TrainingBatches:
    """Returns the augmented batches of a training run, from one of them on."""
    dataset = run.dataset
    on_device = run.config.augment_on == "device"
    return (MovedBatches if on_device else data.TrainingBatches)(
        dataset.x_train,
        dataset.y_train,
        run.config.batch_size,
        seed,
        dataset.mean,
        dataset.std,
        augmentation=augmentation(run),
        first_batch=first_batch,
    )


def conditions(dataset: data.ImageDataset) -> dict[str, str]:
    """Returns what a run has to find again, beside its configuration, to give the same numbers."""
    return {
        "KERAS_BACKEND": keras.backend.backend(),
        "image_data_format": keras.config.image_data_format(),
        "dtype_policy": keras.config.dtype_policy().name,
        "training images": dataset.fingerprint,
    }


def check_conditions(folder: Path, there: dict[str, str], here: dict[str, str]) -> None:
    """Raises `InputError` if the run in `folder` was begun under other conditions."""
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
