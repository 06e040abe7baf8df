"""Checkpoints: all that training changes, under a checksum, so that it goes on to the same numbers.

Keras's `BackupAndRestore` forgets the metrics and the place within an epoch, writes over its last
file and reads a damaged one without a word.
"""

import hashlib
import io
import json
import re
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import keras
import numpy as np

from dskd_keras import files
from dskd_keras.distiller import Distiller
from dskd_keras.errors import InputError, TrainingError
from dskd_keras.experiment import hosts
from dskd_keras.experiment.interruption import Interrupted, StopRequest
from dskd_keras.progress import Place, last_step, steps_before

# The newest, and the one before it in case the newest is damaged.
_KEPT = 2
_DAMAGED = ".damaged"
_NAME = re.compile(r"step-(\d+)\.([0-9a-f]{32})\.npz")


class Checkpoint(NamedTuple):
    """A training run at one moment; the notes are what JSON can hold."""

    place: Place
    variables: list[np.ndarray]  # the distiller's, without the frozen teacher's
    optimizer: list[np.ndarray]
    metrics: list[np.ndarray]  # empty between epochs
    best: list[np.ndarray]  # the student's weights after its best epoch
    notes: dict[str, Any]


class Record(Protocol):
    """What a checkpoint holds beside the model."""

    def snapshot(self) -> tuple[list[np.ndarray], dict[str, Any]]:
        """Returns `best` and `notes` of a `Checkpoint`."""
        ...


class CheckpointFolder:
    """The checkpoints of one training run.

    A checkpoint is an `.npz` file whose name holds the number of steps done and the BLAKE2b
    checksum (128 bits) of its content. It is written aside and renamed, so a file under this name
    is whole unless it was damaged later, which the checksum shows.
    """

    def __init__(self, path: Path):
        self.path = path

    def save(self, steps: int, checkpoint: Checkpoint) -> None:
        """Writes the checkpoint after so many steps, then removes all but the newest two."""
        arrays = {}
        for field in ("variables", "optimizer", "metrics", "best"):
            for index, value in enumerate(getattr(checkpoint, field)):
                # NumPy's file format doesn't know bfloat16.
                value = value.view(f"u{value.itemsize}") if value.dtype.kind == "V" else value
                arrays[f"{field}_{index:05d}"] = value
        notes = checkpoint.place._asdict() | checkpoint.notes
        file = io.BytesIO()
        np.savez(file, notes=np.frombuffer(json.dumps(notes).encode(), np.uint8), **arrays)
        content = file.getvalue()
        self.path.mkdir(parents=True, exist_ok=True)
        path = self.path / f"step-{steps:09d}.{_checksum(content)}.npz"
        files.write_bytes(path, content)
        for older in self._newest_first()[_KEPT:]:
            older.unlink()

    def newest(self, say: Callable[[str], object]) -> Checkpoint | None:
        """Returns the newest whole checkpoint, and renames damaged ones: they don't count."""
        for path in self._newest_first():
            try:
                content = path.read_bytes()
            except OSError as error:
                say(f"Can't read the checkpoint '{path}': {error.strerror}. Passing it over.")
                continue
            found = _read(content) if _checksum(content) == path.name.split(".")[1] else None
            if found is not None:
                return found
            aside = path.with_name(path.name + _DAMAGED)
            path.rename(aside)
            say(f"A checkpoint is damaged and passed over: '{aside}'.")
        return None

    def exist(self) -> bool:
        """Returns whether there are any, whole or damaged."""
        return self.path.is_dir() and any(
            _NAME.fullmatch(path.name.removesuffix(_DAMAGED)) for path in self.path.iterdir()
        )

    def clear(self) -> None:
        """Removes all checkpoints: the training is over and what came of it is saved."""
        shutil.rmtree(self.path, ignore_errors=True)

    def _newest_first(self) -> list[Path]:
        if not self.path.is_dir():
            return []
        found = [path for path in self.path.iterdir() if _NAME.fullmatch(path.name)]
        # Of two with the same number of steps the later one was written after a damaged one.
        return sorted(
            found, key=lambda path: (path.name[:14], path.stat().st_mtime_ns), reverse=True
        )


class Restorer(keras.callbacks.Callback):
    """Sets a training to where a checkpoint left it, in all processes that train together."""

    def __init__(self) -> None:
        super().__init__()
        self._metrics: list[np.ndarray] = []

    def restore(
        self, distiller: Distiller, checkpoint: Checkpoint | None, batches: keras.utils.PyDataset
    ) -> Place:
        """Sets a compiled distiller to where the checkpoint left it; returns where that is.

        Args:
            distiller: Compiled.
            checkpoint: None where there is none, and in a process that follows.
            batches: Of any labelled images.

        Raises:
            InputError: The checkpoint is of another model.
        """
        shared = hosts.here().shared
        (numbers,) = shared([np.array(Place() if checkpoint is None else checkpoint.place)])
        place = Place(*map(int, numbers))
        if place == Place():
            return place
        distiller.optimizer.build(distiller.trainable_variables)
        if place.step:
            # Keras builds compiled metrics on the first batch; `evaluate` changes nothing else.
            distiller.evaluate(batches, steps=1, verbose=0)
        held = checkpoint or Checkpoint(place, [], [], [], [], {})
        _assign(distiller.variables, shared(held.variables))
        _assign(distiller.optimizer.variables, shared(held.optimizer))
        # `fit` sets the metrics to zero before its first epoch begins.
        self._metrics = shared(held.metrics)
        return place

    def on_epoch_begin(self, epoch: int, logs: Any = None) -> None:
        """Restores the metrics where training goes on within an epoch."""
        if self._metrics:
            _assign(self.model.metrics_variables, self._metrics)
            self._metrics = []


class Checkpointer(keras.callbacks.Callback):
    """Saves a checkpoint every so many steps, after every epoch, and when asked to stop.

    It has to be the last callback: what it saves includes what the others hold.

    Raises:
        Interrupted: After a step at which the training was asked to stop, and its checkpoint.
        TrainingError: A weight is not finite; the checkpoints from before remain.
    """

    def __init__(
        self,
        folder: CheckpointFolder,
        every: int,
        steps_per_epoch: int,
        stop: StopRequest,
        record: Record,
    ):
        super().__init__()
        self._folder = folder
        self._every = every
        self._steps_per_epoch = steps_per_epoch
        self._stop = stop
        self._record = record
        self._epoch = 0
        self._saved = 0

    def on_train_begin(self, logs: Any = None) -> None:
        """Notes the steps that were done before."""
        self._saved = self.steps(getattr(self.model, "resumed_at", Place()))

    def on_epoch_begin(self, epoch: int, logs: Any = None) -> None:
        """Notes the epoch."""
        self._epoch = epoch

    def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
        """Saves where the number of steps says so, or a stop was asked for."""
        place = self.place_after(batch)
        # The end of the epoch's last step is the end of the epoch, evaluation included.
        if place.step == self._steps_per_epoch:
            return
        # Several steps may have run together.
        due = self.steps(place) // self._every > self._saved // self._every
        if due or self._stop.signum is not None:
            self._save(place)

    def on_epoch_end(self, epoch: int, logs: Any = None) -> None:
        """Saves."""
        self._save(Place(epoch + 1))

    def place_after(self, batch: int) -> Place:
        """Returns where the training stands after a batch, as `fit` counts the batches."""
        step = steps_before(self, self._epoch) + last_step(self, batch) + 1
        return Place(self._epoch, step)

    def steps(self, place: Place) -> int:
        """Returns how many steps of the whole training are done at a place."""
        return place.epoch * self._steps_per_epoch + place.step

    def _save(self, place: Place) -> None:
        if keras.backend.backend() == "jax":
            self.model.jax_state_sync()
        # The teacher is no layer of the distiller, so it is not among them.
        variables = self.model.variables
        values = _values(variables)
        for variable, value in zip(variables, values, strict=True):
            if value.dtype.kind in "fV" and not np.isfinite(value).all():
                raise TrainingError(
                    f"epoch {self._epoch + 1}, step {place.step or self._steps_per_epoch}: "
                    f"'{variable.path}' is no longer finite. Lower the learning_rate, in another "
                    "run_dir."
                )
        best, notes = self._record.snapshot()
        checkpoint = Checkpoint(
            place,
            values,
            _values(self.model.optimizer.variables),
            _values(self.model.metrics_variables) if place.step else [],
            best,
            notes,
        )
        self._folder.save(self.steps(place), checkpoint)
        self._saved = self.steps(place)
        if self._stop.signum is not None:
            raise Interrupted(self._stop.signum)


def _assign(variables: Sequence[keras.Variable], values: Sequence[np.ndarray]) -> None:
    present = _values(variables)
    if [value.shape for value in present] != [value.shape for value in values]:
        raise InputError(
            f"resume: the checkpoint holds {len(values)} arrays of other shapes than the "
            f"{len(present)} of this run. It was written by another version: choose another "
            "run_dir."
        )
    for variable, now, value in zip(variables, present, values, strict=True):
        variable.assign(value.view(now.dtype) if now.dtype.kind == "V" else value)


def _values(variables: Sequence[keras.Variable]) -> list[np.ndarray]:
    return [np.array(keras.ops.convert_to_numpy(variable)) for variable in variables]


def _read(content: bytes) -> Checkpoint | None:
    """Returns what a checkpoint's file holds, None where it is another file."""
    try:
        with np.load(io.BytesIO(content)) as arrays:
            notes = json.loads(arrays["notes"].tobytes())
            values = {
                field: [arrays[name] for name in sorted(arrays) if name.startswith(f"{field}_")]
                for field in ("variables", "optimizer", "metrics", "best")
            }
        place = Place(notes.pop("epoch"), notes.pop("step"))
    except Exception:  # NumPy and zipfile raise all kinds for another file
        return None
    return Checkpoint(place, notes=notes, **values)


def _checksum(content: bytes) -> str:
    return hashlib.blake2b(content, digest_size=16).hexdigest()
