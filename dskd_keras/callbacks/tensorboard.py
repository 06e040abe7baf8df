"""Scalars for TensorBoard, written without TensorFlow."""

import itertools
import os
import socket
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO

import keras

from dskd_keras.errors import missing_package


class TensorBoardScalars(keras.callbacks.Callback):
    """Writes the logs of every epoch for TensorBoard, with the `tensorboard` package alone.

    `keras.callbacks.TensorBoard` runs TensorFlow, which a run on JAX or PyTorch may not have, or
    may not want: it would take the memory of the same GPU. Layout and names are those of Keras's
    callback: `FOLDER/train` and `FOLDER/validation` hold the same tags, `epoch_NAME`, with the
    epoch as the step, the first one 0; `epoch_learning_rate` is in `train`, also where it follows a
    schedule. Files are complete after every epoch. Where training goes on at a later epoch in the
    same folder, what an interrupted run wrote from that epoch on is no longer shown.

    Args:
        folder: Path of the folder to write into; `tensorboard --logdir FOLDER` shows it.

    Raises:
        InputError: The `tensorboard` package is missing.

    Example:

    ```python
    distiller.fit(x, y, callbacks=[dskd_keras.callbacks.TensorBoardScalars("runs/tensorboard")])
    ```
    """

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        super().__init__()
        self._train = EventFile(Path(folder, "train"))
        self._validation = EventFile(Path(folder, "validation"))

    def on_epoch_end(self, epoch: int, logs: Mapping[str, Any] | None = None) -> None:
        """Writes the epoch's logs."""
        logs = {**(logs or {}), **_learning_rates(self.model.optimizer)}
        train = {name: value for name, value in logs.items() if not name.startswith("val_")}
        validation = {name[4:]: logs[name] for name in logs.keys() - train.keys()}
        for file, values in ((self._train, train), (self._validation, validation)):
            if values:
                file.write(epoch, {f"epoch_{name}": value for name, value in values.items()})

    def on_train_end(self, logs: Mapping[str, Any] | None = None) -> None:
        """Closes the files; another `fit` writes into new ones."""
        self._train.close()
        self._validation.close()


def _learning_rates(optimizer: Any) -> dict[str, float]:
    # As Keras's callback names them.
    optimizer = getattr(optimizer, "inner_optimizer", optimizer)
    named = {f"learning_rate_{part.name}": part for part in getattr(optimizer, "optimizers", ())}
    return {
        name: float(keras.ops.convert_to_numpy(part.learning_rate))
        for name, part in (named or {"learning_rate": optimizer}).items()
    }


class EventFile:
    """Summaries of one run in TensorBoard's format, in a file that is made by the first of them.

    TensorBoard follows the newest file of a folder, so a folder wants one `EventFile` at a time.
    Where a file is new, TensorBoard drops what older files of the folder hold from its first step
    on: a run that was interrupted, and is continued here.
    """

    # Makes the names of a process's files differ; the later one sorts last.
    _numbers = itertools.count()

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        self._folder = Path(folder)
        self._file: BinaryIO | None = None
        self._records: Any = None
        _tensorboard()

    def write(self, step: int, scalars: Mapping[str, Any]) -> None:
        """Writes scalars of one step, by their tags, and flushes."""
        _, summaries, _ = _tensorboard()
        values = [
            summaries.Summary.Value(tag=tag, simple_value=float(value))
            for tag, value in scalars.items()
        ]
        self.write_summary(step, summaries.Summary(value=values))

    def write_summary(self, step: int, summary: Any) -> None:
        """Writes a `tensorboard.compat.proto.summary_pb2.Summary`, and flushes."""
        events, _, records = _tensorboard()
        if self._file is None:
            self._folder.mkdir(parents=True, exist_ok=True)
            name = (
                f"events.out.tfevents.{int(time.time()):010d}.{socket.gethostname()}."
                f"{os.getpid()}.{next(self._numbers):06d}"
            )
            # Not tensorboard's EventFileWriter: that one opens files through TensorFlow, if it is
            # there, and needs a thread.
            self._file = open(self._folder / name, "xb")  # noqa: SIM115
            self._records = records.RecordWriter(self._file)
            self._add(events.Event(file_version="brain.Event:2"))
            start = events.SessionLog(status=events.SessionLog.START)
            self._add(events.Event(step=step, session_log=start))
        self._add(events.Event(step=step, summary=summary))
        self._file.flush()

    def close(self) -> None:
        """Closes the file; a later `write` makes another."""
        if self._file is not None:
            self._file.close()
            self._file = None

    def _add(self, event: Any) -> None:
        event.wall_time = time.time()
        self._records.write(event.SerializeToString())


def _tensorboard() -> tuple[Any, Any, Any]:
    try:
        from tensorboard.compat.proto import event_pb2, summary_pb2
        from tensorboard.summary.writer import record_writer
    except ImportError:
        raise missing_package("tensorboard", "tensorboard", "train") from None
    return event_pb2, summary_pb2, record_writer
