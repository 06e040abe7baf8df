"""Checkpoints: all that training changes, under a checksum, so that it goes on to the same numbers.

Keras's `BackupAndRestore` forgets the metrics and the place within an epoch, writes over its last
file and reads a damaged one without a word.
"""

import hashlib
import io
import json
import re
import shutil
from typing import Any, NamedTuple

import keras
import numpy as np

from dskd_keras import artifacts
from dskd_keras.errors import InputError, TrainingError
from dskd_keras.interruption import Interrupted

# The newest, and the one before it in case the newest is damaged.
_KEPT = 2
_DAMAGED = ".damaged"
_NAME = re.compile(r"step-(\d+)\.([0-9a-f]{32})\.npz")


class Checkpoint(NamedTuple):
    """A training run at one moment.

    Attributes:
        epoch: Epochs that are finished.
        step: Steps of the next epoch that are finished.
        variables: Values of the distiller's variables, the frozen teacher's left out.
        optimizer: Values of the optimizer's variables.
        metrics: Values of the metrics' variables; empty between epochs.
        best: Weights of the student after its best epoch; empty where none is kept.
        notes: What else is to be known, a dict that JSON can hold.
    """

    epoch: int
    step: int
    variables: list
    optimizer: list
    metrics: list
    best: list
    notes: dict[str, Any]


class CheckpointFolder:
    """The checkpoints of one training run.

    A checkpoint is an `.npz` file whose name holds the number of steps done and the BLAKE2b
    checksum (128 bits) of its content. It is written aside and renamed, so a file under this name
    is whole unless it was damaged later, which the checksum shows.

    Args:
        path: The folder, a `pathlib.Path`. It is made when the first checkpoint is saved.
    """

    def __init__(self, path):
        self.path = path

    def save(self, steps, checkpoint):
        """Writes a checkpoint, then removes all but the newest two.

        Args:
            steps: Steps of the whole training that are done: the order of the checkpoints.
            checkpoint: A `Checkpoint`.

        Raises:
            OSError: It can't be written; those that were there remain.
        """
        arrays = {}
        for field in ("variables", "optimizer", "metrics", "best"):
            for index, value in enumerate(getattr(checkpoint, field)):
                # NumPy's file format doesn't know bfloat16.
                value = value.view(f"u{value.itemsize}") if value.dtype.kind == "V" else value
                arrays[f"{field}_{index:05d}"] = value
        notes = {"epoch": checkpoint.epoch, "step": checkpoint.step, **checkpoint.notes}
        file = io.BytesIO()
        np.savez(file, notes=np.frombuffer(json.dumps(notes).encode(), np.uint8), **arrays)
        content = file.getvalue()
        self.path.mkdir(parents=True, exist_ok=True)
        path = self.path / f"step-{steps:09d}.{_checksum(content)}.npz"
        artifacts.write_bytes(path, content)
        for older in self._newest_first()[_KEPT:]:
            older.unlink()

    def newest(self, say):
        """Returns the newest whole `Checkpoint`, or None.

        Damaged ones are renamed, so that they don't count among the newest two.

        Args:
            say: Called with a line about each that can't be used.
        """
        for path in self._newest_first():
            try:
                content = path.read_bytes()
            except OSError as error:
                say(f"Can't read the checkpoint '{path}': {error.strerror}. Passing it over.")
                continue
            if _checksum(content) != _NAME.fullmatch(path.name)[2]:
                aside = path.with_name(path.name + _DAMAGED)
                path.rename(aside)
                say(f"A checkpoint is damaged and passed over: '{aside}'.")
                continue
            with np.load(io.BytesIO(content)) as arrays:
                notes = json.loads(arrays["notes"].tobytes())
                values = {
                    field: [arrays[name] for name in sorted(arrays) if name.startswith(f"{field}_")]
                    for field in ("variables", "optimizer", "metrics", "best")
                }
            return Checkpoint(notes.pop("epoch"), notes.pop("step"), notes=notes, **values)
        return None

    def exist(self):
        """Returns whether there are any, whole or damaged."""
        return self.path.is_dir() and any(
            _NAME.fullmatch(path.name.removesuffix(_DAMAGED)) for path in self.path.iterdir()
        )

    def clear(self):
        """Removes all checkpoints: the training is over and what came of it is saved."""
        shutil.rmtree(self.path, ignore_errors=True)

    def _newest_first(self):
        if not self.path.is_dir():
            return []
        found = [path for path in self.path.iterdir() if _NAME.fullmatch(path.name)]
        # Of two with the same number of steps the later one was written after a damaged one.
        return sorted(
            found, key=lambda path: (path.name[:14], path.stat().st_mtime_ns), reverse=True
        )


class Checkpointer(keras.callbacks.Callback):
    """Saves a checkpoint every so many steps, after every epoch, and when asked to stop.

    It has to be the last callback: what it saves includes what the others hold.

    Args:
        folder: A `CheckpointFolder`.
        every: Steps between two checkpoints within an epoch.
        steps_per_epoch: Steps of a whole epoch.
        stop: An `interruption.StopRequest`.
        held_elsewhere: Called without arguments, returns `(best, notes)` of the `Checkpoint`.

    Raises:
        Interrupted: After a step at which the training was asked to stop, and its checkpoint.
        TrainingError: A weight is not finite; the checkpoints from before remain.
    """

    def __init__(self, folder, every, steps_per_epoch, stop, held_elsewhere):
        super().__init__()
        self._folder = folder
        self._every = every
        self._steps_per_epoch = steps_per_epoch
        self._stop = stop
        self._held_elsewhere = held_elsewhere
        self._restored = None
        self._epoch = 0
        self._first_step = 0

    def restore(self, distiller, checkpoint, batches):
        """Sets a compiled distiller to where the checkpoint left it.

        Args:
            distiller: The `Distiller`, compiled as before.
            checkpoint: A `Checkpoint`.
            batches: Evaluation batches; one of them builds the metrics.

        Raises:
            InputError: The checkpoint is of another model.
        """
        distiller.optimizer.build(distiller.trainable_variables)
        if checkpoint.step:
            # Keras builds compiled metrics on the first batch; `evaluate` changes nothing else.
            distiller.evaluate(batches, steps=1, verbose=0)
        self._assign(distiller.variables, checkpoint.variables)
        self._assign(distiller.optimizer.variables, checkpoint.optimizer)
        # `fit` sets the metrics to zero before its first epoch begins.
        self._restored = checkpoint if checkpoint.step else None

    def on_epoch_begin(self, epoch, logs=None):
        """Restores the metrics where training goes on within an epoch."""
        self._epoch, self._first_step = epoch, 0
        if self._restored is not None:
            self._assign(self.model.metrics_variables, self._restored.metrics)
            self._first_step = self._restored.step
            self._restored = None

    def on_train_batch_end(self, batch, logs=None):
        """Saves where the number of steps says so, or a stop was asked for."""
        step = self._first_step + batch + 1
        # The end of the epoch's last step is the end of the epoch, evaluation included.
        if step == self._steps_per_epoch:
            return
        steps = self._epoch * self._steps_per_epoch + step
        if self._stop.signum is not None or steps % self._every == 0:
            self._save(self._epoch, step)

    def on_epoch_end(self, epoch, logs=None):
        """Saves."""
        self._save(epoch + 1, 0)

    def _save(self, epoch, step):
        if keras.backend.backend() == "jax":
            self.model.jax_state_sync()
        # The teacher is no layer of the distiller, so it is not among them.
        variables = self.model.variables
        values = _values(variables)
        for variable, value in zip(variables, values, strict=True):
            if value.dtype.kind in "fV" and not np.isfinite(value).all():
                raise TrainingError(
                    f"epoch {self._epoch + 1}, step {step or self._steps_per_epoch}: "
                    f"'{variable.path}' is no longer finite. Lower the learning_rate, in another "
                    "run_dir."
                )
        best, notes = self._held_elsewhere()
        checkpoint = Checkpoint(
            epoch,
            step,
            values,
            _values(self.model.optimizer.variables),
            _values(self.model.metrics_variables) if step else [],
            best,
            notes,
        )
        self._folder.save(epoch * self._steps_per_epoch + step, checkpoint)
        if self._stop.signum is not None:
            raise Interrupted(self._stop.signum)

    @staticmethod
    def _assign(variables, values):
        present = _values(variables)
        if [value.shape for value in present] != [value.shape for value in values]:
            raise InputError(
                f"resume: the checkpoint holds {len(values)} arrays of other shapes than the "
                f"{len(present)} of this run. It was written by another version: choose another "
                "run_dir."
            )
        for variable, now, value in zip(variables, present, values, strict=True):
            variable.assign(value.view(now.dtype) if now.dtype.kind == "V" else value)


def _values(variables):
    return [np.array(keras.ops.convert_to_numpy(variable)) for variable in variables]


def _checksum(content):
    return hashlib.blake2b(content, digest_size=16).hexdigest()
