"""How the supervised layers share the two deep terms while a distiller trains."""

import csv as csv_format
import io
import math
import os
import time
from array import array
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

import keras
import numpy as np

from dskd_keras import checks, files
from dskd_keras.callbacks.tensorboard import EventFile
from dskd_keras.errors import InputError
from dskd_keras.progress import last_step, steps_before

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

# Seconds between two pictures during the training; the last one comes at its end.
_PICTURE_EVERY = 60.0


class LayerWeightLogger(keras.callbacks.Callback):
    """Records the allocations to the supervised layers, and the losses they follow from.

    At the end of the training it prints a table of the layers' losses and allocations in the first
    and the last epoch. Files are written where they are asked for:

    - `csv`: a row a step with columns `epoch` and `step`, then every term of that step alone, as
      `Distiller.step_terms` names them (the logs of `fit` hold means over the epoch), `nan` for one
      that is not computed any more. The first epoch is 1, and so is the first step of the whole
      training. Every row is written at once, so a killed run leaves whole lines.
    - `picture`: allocations and losses over the steps. It is written aside and renamed, at the end
      of the training and, for longer ones, once a minute at the end of an epoch.
    - `tensorboard`: the terms of each step as scalars in `FOLDER/steps`, beside what
      `TensorBoardScalars` writes into the same folder; no TensorFlow is used. Its steps are
      Keras's own: the first one is 0.

    With `steps_per_execution` the last of the steps that ran together is recorded. Where `fit`
    goes on within an epoch, `Distiller.resumed_at` says how many of its steps were done before.

    Args:
        csv: Path of the CSV file. Defaults to none.
        picture: Path of the picture; its ending, as `.png`, is its format. Needs matplotlib.
            Defaults to none.
        tensorboard: Path of a folder for TensorBoard. Needs the `tensorboard` package. Defaults to
            none.
        every: Positive integer: steps between two records. Defaults to 1.
        summary: Whether to print the table at the end of `fit`. Defaults to True.
        append: Whether to go on with an existing CSV file, for a continued training with
            `initial_epoch`: its rows from the first new step on are removed, the others also appear
            in picture and table. Defaults to False: the file is replaced.
        console: A `rich.console.Console` for the table. Defaults to standard output.

    Raises:
        InputError: A package is missing; from `fit`, the model is no `Distiller` or supervises no
            layer, or the CSV file to append to has other columns.

    Example:

    ```python
    logger = dskd_keras.callbacks.LayerWeightLogger(csv="layers.csv", picture="layers.png")
    distiller.fit(x, y, epochs=3, callbacks=[logger])
    ```
    """

    def __init__(
        self,
        csv: str | os.PathLike[str] | None = None,
        picture: str | os.PathLike[str] | None = None,
        tensorboard: str | os.PathLike[str] | None = None,
        every: int = 1,
        summary: bool = True,
        append: bool = False,
        console: "Console | None" = None,
    ) -> None:
        super().__init__()
        self._every = checks.whole("every", every, 1)
        self._csv = None if csv is None else Path(csv)
        self._picture = None if picture is None else Path(picture)
        self._events = None if tensorboard is None else EventFile(Path(tensorboard, "steps"))
        self._summary = summary
        self._append = append
        self._console = console
        self._file: TextIO | None = None
        self._names: list[str] = []
        # For the picture, rows of epoch, step and terms, one after the other.
        self._records = array("d")
        self._epoch_means: dict[int, dict[str, float]] = {}
        # Epochs and steps are counted from 0 here, as Keras does.
        self._epoch: int | None = None
        self._start = self._steps = self._next = 0
        self._last_picture = 0.0
        if self._picture is not None:
            # Matplotlib is imported for those alone who want a picture.
            from dskd_keras import drawing

            drawing.check_format("picture", self._picture)

    def on_train_begin(self, logs: Mapping[str, Any] | None = None) -> None:
        """Checks the model."""
        names = getattr(self.model, "term_names", None)
        if names is None:
            raise InputError(
                f"LayerWeightLogger: the model {type(self.model).__name__} '{self.model.name}' "
                "should be a dskd_keras.Distiller."
            )
        if not any("/" in name for name in names):
            raise InputError(
                "LayerWeightLogger: this distiller supervises no layer, so there is nothing to "
                "log. Give the Distiller student_layers and a positive deep_prediction_weight or "
                "deep_feature_weight, or leave the callback out."
            )
        if not self._append or names != self._names:
            self._records, self._epoch_means = array("d"), {}
        self._names = list(names)
        self._epoch = None
        self._last_picture = time.monotonic()

    def on_epoch_begin(self, epoch: int, logs: Mapping[str, Any] | None = None) -> None:
        """Finds the epoch's place in the training; opens the CSV file in the first one."""
        if self._epoch is None:
            self._begin(epoch)
        else:
            self._start += self._steps
        self._epoch, self._steps = epoch, 0

    def on_train_batch_end(self, batch: int, logs: Mapping[str, Any] | None = None) -> None:
        """Records the step, where it is one of those to be recorded."""
        batch = last_step(self, batch)
        self._steps = batch + 1
        step = self._start + batch
        if step < self._next or not (self._csv or self._picture or self._events):
            return
        self._next = (step // self._every + 1) * self._every
        terms = self.model.step_terms()
        record = [float(self._epoch or 0), float(step), *self._row(terms)]
        if self._picture is not None:
            self._records.extend(record)
        if self._file is not None:
            self._file.write(_line(record))
        if self._events is not None:
            self._events.write(step, terms)

    def on_epoch_end(self, epoch: int, logs: Mapping[str, Any] | None = None) -> None:
        """Keeps the epoch's means."""
        self._epoch_means[epoch] = dict(zip(self._names, self._row(logs or {}), strict=True))
        if self._picture is not None and time.monotonic() - self._last_picture > _PICTURE_EVERY:
            self._draw(self._picture)
            self._last_picture = time.monotonic()

    def on_train_end(self, logs: Mapping[str, Any] | None = None) -> None:
        """Closes the files, draws the picture and prints the table."""
        if self._file is not None:
            self._file.close()
            self._file = None
        if self._events is not None:
            self._events.close()
        if self._picture is not None and self._records:
            self._draw(self._picture)
        if self._summary and self._epoch_means:
            from rich.console import Console

            (self._console or Console()).print(self.table())

    def table(self) -> "Table":
        """Returns a table of the layers' losses and allocations.

        A row for each layer and kind of term: means over the first and the last epoch that had the
        term, and the mean allocation over all such epochs. Epochs of before `append`, whose logs
        are gone, count with the mean of their rows in the CSV file.

        Raises:
            InputError: No epoch has ended yet.
        """
        from rich.table import Table

        if not self._epoch_means:
            raise InputError("table: no epoch has ended yet.")
        supervised = {
            epoch: means
            for epoch, means in sorted(self._epoch_means.items())
            if any("/" in name and math.isfinite(value) for name, value in means.items())
        }
        epochs, means = zip(*(supervised or self._epoch_means).items(), strict=True)
        table = Table(
            title=f"Supervised layers: means of epoch {epochs[0] + 1} → {epochs[-1] + 1}",
            title_justify="left",
        )
        table.add_column("layer", overflow="fold")
        table.add_column("term", no_wrap=True)
        for column in ("loss", "allocation", "mean allocation"):
            table.add_column(column, justify="right", no_wrap=True)
        for name in self._names:
            term, _, layer = name.partition("/")
            if layer and term.endswith("_loss"):
                kind = term.removeprefix("deep_").removesuffix("_loss")
                losses, allocations = (
                    [values[of] for values in means if math.isfinite(values[of])] or [math.nan]
                    for of in (name, f"deep_{kind}_allocation/{layer}")
                )
                table.add_row(
                    layer,
                    kind,
                    f"{losses[0]:.4g} → {losses[-1]:.4g}",
                    f"{allocations[0]:.3f} → {allocations[-1]:.3f}",
                    f"{np.mean(allocations):.3f}",
                )
        return table

    def _row(self, terms: Mapping[str, Any]) -> list[float]:
        """Returns the terms in the order of the columns, NaN for those that are not computed."""
        return [float(terms.get(name, math.nan)) for name in self._names]

    def _begin(self, epoch: int) -> None:
        """Finds the number of the first step, and takes up what there is of earlier ones."""
        earlier = np.array(self._records).reshape(-1, 2 + len(self._names))
        if self._append and self._csv is not None and self._csv.exists():
            earlier = self._read(self._csv)
        done = steps_before(self, epoch)
        steps = (self.params or {}).get("steps")
        if epoch == 0 or steps is not None:
            self._start = epoch * ((steps or 0) + done) + done
            earlier = earlier[earlier[:, 1] < self._start]
        else:
            # Keras does not know yet how many steps an epoch has.
            earlier = earlier[earlier[:, 0] < epoch]
            self._start = int(earlier[-1, 1]) + 1 if len(earlier) else 0
        if self._picture is not None:
            self._records = array("d", earlier.ravel())
        for of_epoch in {int(number) for number in earlier[:, 0]} - self._epoch_means.keys():
            values = earlier[earlier[:, 0] == of_epoch, 2:].mean(axis=0)
            self._epoch_means[of_epoch] = dict(zip(self._names, values.tolist(), strict=True))
        self._epoch_means = {e: means for e, means in self._epoch_means.items() if e < epoch}
        # The same multiples as in a training that was not interrupted.
        self._next = -(-self._start // self._every) * self._every
        if self._csv is not None:
            self._csv.parent.mkdir(parents=True, exist_ok=True)
            files.write_text(self._csv, "".join([self._header(), *map(_line, earlier)]))
            # Flushed after every line.
            self._file = open(self._csv, "a", buffering=1, encoding="utf-8")  # noqa: SIM115

    def _header(self) -> str:
        line = io.StringIO()
        # Names of layers may hold a comma.
        csv_format.writer(line, lineterminator="\n").writerow(["epoch", "step", *self._names])
        return line.getvalue()

    def _read(self, path: Path) -> np.ndarray:
        """Returns the whole lines of the CSV file, `[rows, 2 + terms]`, counted from 0."""
        header, *lines = path.read_text(encoding="utf-8").splitlines(keepends=True) or [""]
        if header not in ("", self._header()):
            raise InputError(
                f"csv: '{path}' has other columns than the terms of this distiller: "
                f"{header.strip()}. Choose another file, or append=False."
            )
        # The last line may be cut off, by a disk that was full.
        rows = [list(map(float, line.split(","))) for line in lines if line.endswith("\n")]
        values = np.array(rows).reshape(-1, 2 + len(self._names))
        # Older versions wrote them counted from 0.
        if len(values) and values[0, 0] > 0:
            values[:, :2] -= 1
        return values

    def _draw(self, path: Path) -> None:
        from dskd_keras.callbacks import layer_picture

        _, steps, *columns = np.array(self._records).reshape(-1, 2 + len(self._names)).T
        terms = dict(zip(self._names, columns, strict=True))
        path.parent.mkdir(parents=True, exist_ok=True)
        files.write_bytes(path, layer_picture.picture(steps + 1, terms, path.suffix[1:]))


def _line(record: Any) -> str:
    """Returns a line of the CSV file, where the first epoch and the first step are 1."""
    epoch, step, *values = record
    # Nine digits tell any two float32 apart.
    return f"{epoch + 1:.0f},{step + 1:.0f}," + ",".join(f"{value:.9g}" for value in values) + "\n"
