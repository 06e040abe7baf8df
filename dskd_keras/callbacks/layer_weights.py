"""How the supervised layers share the two deep terms while a distiller trains."""

import csv as csv_format
import io
import time
from array import array
from pathlib import Path

import keras
import numpy as np

from dskd_keras import artifacts
from dskd_keras.callbacks.progress import last_step
from dskd_keras.callbacks.tensorboard import EventFile
from dskd_keras.errors import InputError

_KINDS = {"prediction": "class predictions", "feature": "feature maps"}

# Okabe and Ito's colours, which colour-blind readers can tell apart, without the pale yellow; the
# line styles tell them apart in print. Their numbers share no divisor, so that pairs repeat late.
_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#000000")
_STYLES = ("-", "--", "-.", ":")

# More points than this are averaged in blocks: a picture has no room for them.
_POINTS = 300

# Seconds between two pictures during the training; the last one comes at its end.
_PICTURE_EVERY = 60.0


class LayerWeightLogger(keras.callbacks.Callback):
    """Records the weights that the supervised layers are given, and the losses they follow from.

    At the end of the training it prints a table of the layers' losses and weights in the first and
    the last epoch. Files are written where they are asked for:

    - `csv`: a row a step with columns `epoch` and `step`, both counted from 0, the step in the
      whole training, then every term of that step alone, as `Distiller.step_terms` names them (the
      logs of `fit` hold means over the epoch). Every row is written at once, so a killed run leaves
      whole lines.
    - `picture`: weights and losses over the steps. It is written aside and renamed, at the end of
      the training and, for longer ones, once a minute at the end of an epoch.
    - `tensorboard`: the terms of each step as scalars in `FOLDER/steps`, beside what
      `TensorBoardScalars` writes into the same folder; no TensorFlow is used.

    With `steps_per_execution` the last of the steps that ran together is recorded.

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
        first_step: Steps of the epoch that were done before, where `fit` continues within one and
            counts its batches from 0. It counts for the first epoch of the next `fit`, and may be
            set as an attribute before each. Defaults to 0.
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
        csv=None,
        picture=None,
        tensorboard=None,
        every=1,
        summary=True,
        append=False,
        first_step=0,
        console=None,
    ):
        super().__init__()
        if not isinstance(every, int) or every < 1:
            raise InputError(f"every should be a positive integer. Received: {every!r}.")
        self.first_step = first_step
        self._csv = None if csv is None else Path(csv)
        self._picture = None if picture is None else Path(picture)
        self._events = None if tensorboard is None else EventFile(Path(tensorboard, "steps"))
        self._every = every
        self._summary = summary
        self._append = append
        self._console = console
        self._file = None
        self._names = []
        # For the picture, rows of epoch, step and terms, one after the other.
        self._records = array("d")
        self._epoch_means = {}
        if self._picture is not None:
            formats = _figure().canvas.get_supported_filetypes()
            if self._picture.suffix[1:] not in formats:
                raise InputError(
                    f"picture: '{self._picture}' should end in .png or another format of "
                    f"matplotlib's: {', '.join(sorted(formats))}."
                )

    def on_train_begin(self, logs=None):
        """Checks the model."""
        names = getattr(self.model, "term_names", None)
        if names is None:
            raise InputError(
                f"LayerWeightLogger: the model should be a dskd_keras.Distiller. Received: "
                f"{type(self.model).__name__} '{self.model.name}'."
            )
        if not any("/" in name for name in names):
            raise InputError(
                "LayerWeightLogger: this distiller supervises no layer, so there is nothing to "
                "log. Give the Distiller student_layers and a positive deep_prediction_weight or "
                "deep_feature_weight, or leave the callback out."
            )
        if not self._append or names != self._names:
            self._records, self._epoch_means = array("d"), {}
        self._names = names
        self._epoch = self._start = None
        self._last_picture = time.monotonic()

    def on_epoch_begin(self, epoch, logs=None):
        """Finds the epoch's place in the training; opens the CSV file in the first one."""
        if self._epoch is None:
            self._begin(epoch)
        else:
            self._start += self._steps
        self._epoch, self._steps = epoch, 0

    def on_train_batch_end(self, batch, logs=None):
        """Records the step, where it is one of those to be recorded."""
        batch = last_step(self, batch)
        self._steps = batch + 1
        step = self._start + batch
        if step < self._next or not (self._csv or self._picture or self._events):
            return
        self._next = (step // self._every + 1) * self._every
        terms = self.model.step_terms()
        if self._picture is not None:
            self._records.extend((self._epoch, step, *terms.values()))
        if self._file is not None:
            # Nine digits tell any two float32 apart.
            values = ",".join(f"{value:.9g}" for value in terms.values())
            self._file.write(f"{self._epoch},{step},{values}\n")
        if self._events is not None:
            self._events.write(step, terms)

    def on_epoch_end(self, epoch, logs=None):
        """Keeps the epoch's means."""
        self._epoch_means[epoch] = {name: float(logs[name]) for name in self._names}
        # These steps are in the first epoch alone.
        self.first_step = 0
        if self._picture is not None and time.monotonic() - self._last_picture > _PICTURE_EVERY:
            self._draw()
            self._last_picture = time.monotonic()

    def on_train_end(self, logs=None):
        """Closes the files, draws the picture and prints the table."""
        for file in (self._file, self._events):
            if file is not None:
                file.close()
        self._file = None
        if self._records:
            self._draw()
        if self._summary and self._epoch_means:
            from rich.console import Console

            (self._console or Console()).print(self.table())

    def table(self):
        """Returns a table of the layers' losses and weights, a `rich.table.Table`.

        A row for each layer and kind of term: means over the first and the last epoch, and the mean
        weight over all epochs. Epochs of before `append`, whose logs are gone, count with the mean
        of their rows in the CSV file.

        Raises:
            InputError: No epoch has ended yet.
        """
        from rich.table import Table

        epochs = sorted(self._epoch_means)
        if not epochs:
            raise InputError("table: no epoch has ended yet.")
        first, last = (self._epoch_means[epoch] for epoch in (epochs[0], epochs[-1]))
        table = Table(
            title=f"Supervised layers: means of epoch {epochs[0] + 1} → {epochs[-1] + 1}",
            title_justify="left",
        )
        table.add_column("layer", overflow="fold")
        table.add_column("term", no_wrap=True)
        for column in ("loss", "weight", "mean weight"):
            table.add_column(column, justify="right", no_wrap=True)
        for kind in _KINDS:
            for layer in self._layers(kind):
                loss, weight = _of_layer(kind, layer)
                mean = np.mean([self._epoch_means[epoch][weight] for epoch in epochs])
                table.add_row(
                    layer,
                    kind,
                    f"{first[loss]:.4g} → {last[loss]:.4g}",
                    f"{first[weight]:.3f} → {last[weight]:.3f}",
                    f"{mean:.3f}",
                )
        return table

    def _layers(self, kind):
        start = f"deep_{kind}_loss/"
        return [name.removeprefix(start) for name in self._names if name.startswith(start)]

    def _header(self):
        line = io.StringIO()
        # Names of layers may hold a comma.
        csv_format.writer(line, lineterminator="\n").writerow(["epoch", "step", *self._names])
        return line.getvalue()

    def _begin(self, epoch):
        """Finds the number of the first step, and takes up what is there of earlier ones."""
        self._start = None
        if epoch == 0 or self.params.get("steps") is not None:
            steps_of_epoch = (self.params.get("steps") or 0) + self.first_step
            self._start = epoch * steps_of_epoch + self.first_step

        def is_earlier(of_epoch, step):
            # Keras may not know yet how many steps an epoch has.
            return of_epoch < epoch if self._start is None else step < self._start

        rows = []
        if self._append:
            rows = [row for row in self._rows() if is_earlier(*row[1][:2])]
            if rows and self._picture is not None:
                self._records = array("d", (value for _, values in rows for value in values))
            else:
                records = self._table_of_records()
                earlier = [is_earlier(*record[:2]) for record in records]
                self._records = array("d", records[earlier].ravel())
            for of_epoch in {values[0] for _, values in rows} - self._epoch_means.keys():
                values = [values[2:] for _, values in rows if values[0] == of_epoch]
                means = dict(zip(self._names, np.mean(values, axis=0).tolist(), strict=True))
                self._epoch_means[int(of_epoch)] = means
            self._epoch_means = {e: means for e, means in self._epoch_means.items() if e < epoch}
        if self._start is None:
            records = [values for _, values in rows] or self._table_of_records().tolist()
            self._start = int(records[-1][1]) + 1 if records else 0
        # The same multiples as in a training that was not interrupted.
        self._next = -(-self._start // self._every) * self._every
        if self._csv is not None:
            self._csv.parent.mkdir(parents=True, exist_ok=True)
            artifacts.write_text(self._csv, "".join([self._header(), *(line for line, _ in rows)]))
            # Flushed after every line.
            self._file = open(self._csv, "a", buffering=1, encoding="utf-8")  # noqa: SIM115

    def _rows(self):
        """Returns the CSV file's whole lines and their numbers, `[(line, [epoch, step, …])]`."""
        if self._csv is None or not self._csv.exists():
            return []
        lines = self._csv.read_text(encoding="utf-8").splitlines(keepends=True)
        if lines and lines[0] != self._header():
            raise InputError(
                f"csv: '{self._csv}' has other columns than the terms of this distiller: "
                f"{lines[0].strip()}. Choose another file, or append=False."
            )
        # The last line may be cut off, by a disk that was full.
        return [
            (line, [float(value) for value in line.split(",")])
            for line in lines[1:]
            if line.endswith("\n")
        ]

    def _table_of_records(self):
        return np.array(self._records).reshape(-1, 2 + len(self._names))

    def _draw(self):
        kinds = [kind for kind in _KINDS if self._layers(kind)]
        layers = list(dict.fromkeys(layer for kind in kinds for layer in self._layers(kind)))
        records = self._table_of_records()
        # Blocks of one size, or the noise would change along the line.
        size = -(-len(records) // _POINTS)
        blocks = np.split(records, range(size, len(records), size))
        _, steps, *columns = np.array([block.mean(axis=0) for block in blocks]).T
        columns = dict(zip(self._names, columns, strict=True))

        figure = _figure(figsize=(9, 0.8 + 2.6 * len(kinds)), dpi=150, layout="constrained")
        axes = figure.subplots(len(kinds), 2, sharex=True, squeeze=False)
        for (of_weights, of_losses), kind in zip(axes, kinds, strict=True):
            for layer in self._layers(kind):
                number = layers.index(layer)
                style = {
                    "color": _COLOURS[number % len(_COLOURS)],
                    "linestyle": _STYLES[number % len(_STYLES)],
                    "marker": "o" if len(steps) == 1 else None,
                    "label": layer,
                }
                loss, weight = _of_layer(kind, layer)
                of_weights.plot(steps, columns[weight], **style)
                of_losses.plot(steps, columns[loss], **style)
            of_weights.set_title(f"{_KINDS[kind]}: weights", loc="left", fontsize="medium")
            uniform = 1 / len(self._layers(kind))
            of_weights.axhline(uniform, color="0.6", linewidth=0.8, zorder=0, label="uniform")
            # Tiny differences shouldn't fill the axes.
            low, high = of_weights.get_ylim()
            of_weights.set_ylim(min(low, uniform - 0.05), max(high, uniform + 0.05))
            of_losses.set_title(f"{_KINDS[kind]}: losses", loc="left", fontsize="medium")
            losses = np.array([columns[_of_layer(kind, layer)[0]] for layer in self._layers(kind)])
            losses = losses[np.isfinite(losses)]
            if losses.size and losses.max() > 20 * losses.min() > 0:
                of_losses.set_yscale("log")
            else:
                of_losses.set_ylim(bottom=0)
        for axis in axes.ravel():
            axis.grid(alpha=0.3)
        label = "training step"
        if size > 1:
            label += f" (a point is the mean of {size} records)"
        figure.supxlabel(label, fontsize="medium")
        # Outside the axes, where there is no data.
        figure.legend(
            *axes[0, 0].get_legend_handles_labels(),
            loc="outside upper center",
            ncols=min(len(layers) + 1, 6),
        )
        content = io.BytesIO()
        figure.savefig(content, format=self._picture.suffix[1:])
        self._picture.parent.mkdir(parents=True, exist_ok=True)
        artifacts.write_bytes(self._picture, content.getvalue())


def _of_layer(kind, layer):
    return f"deep_{kind}_loss/{layer}", f"deep_{kind}_allocation/{layer}"


def _figure(**options):
    try:
        # Not pyplot: it would choose a window system, and keep every figure.
        from matplotlib.figure import Figure
    except ImportError:
        raise InputError(
            "picture: it needs the package matplotlib. Install it: pip install matplotlib."
        ) from None
    return Figure(**options)
