"""The outcome of a run, and the table of outcomes."""

import dataclasses
import json
import statistics
import sys
from pathlib import Path

from rich import box
from rich.console import Console
from rich.table import Table

from dskd_keras.errors import InputError

_NUMBERS = (
    "parameters", "test_accuracy", "best_accuracy", "best_epoch", "images_per_second", "seconds",
    "epochs", "seed", "teacher_agreement", "latency_ms", "weight_bytes",
)  # fmt: skip
# Columns that the widest table takes, with names of some length.
_WIDTH = 120
_DICTS = ("versions", "teacher", "head_accuracies")


@dataclasses.dataclass(frozen=True)
class RunResult:
    """The outcome of one training run, as `metrics.json` holds it.

    Attributes:
        method: dskd, kd or ce; "teacher" for the teacher's row of the table.
        model: Name of the model.
        parameters: Number of its trainable parameters.
        test_accuracy: After the last epoch, 0 to 1.
        best_accuracy: Test accuracy after the best epoch, 0 to 1; None where there is none.
        best_epoch: That epoch, from 1.
        best_chosen_on: "validation" or "test": the images by which it is the best.
        images_per_second: Median over the epochs' training, without compilation or evaluation.
        seconds: Duration of the run.
        epochs: Epochs trained.
        seed: The run's seed.
        backend: Keras's backend.
        versions: Versions of the packages that computed it.
        teacher: The `RunResult` of the student's teacher as a dict; None without one.
        teacher_agreement: Share of the test images, 0 to 1, on which student and teacher predict
            the same class; None without a teacher.
        head_accuracies: Test accuracy, 0 to 1, of every auxiliary head by the layer's name.
        latency_ms: Median time to predict one image, in milliseconds.
        weight_bytes: Size of all the model's weights.
        command: The command that made it.
        dataset: Name of the data set.
    """

    method: str
    model: str
    parameters: int
    test_accuracy: float
    best_accuracy: float | None = None
    best_epoch: int | None = None
    best_chosen_on: str | None = None
    images_per_second: float | None = None
    seconds: float | None = None
    epochs: int | None = None
    seed: int | None = None
    backend: str | None = None
    versions: dict[str, str] = dataclasses.field(default_factory=dict)
    teacher: dict | None = None
    teacher_agreement: float | None = None
    head_accuracies: dict[str, float] = dataclasses.field(default_factory=dict)
    latency_ms: float | None = None
    weight_bytes: int | None = None
    command: str | None = None
    dataset: str | None = None

    @classmethod
    def from_dict(cls, values):
        """Returns the result that a dict holds, as `dataclasses.asdict` made it.

        Keys of other versions are passed over; what an older version lacked takes its default.

        Args:
            values: A dict, such as `metrics.json` or the field `teacher` holds.

        Raises:
            InputError: A field is missing or of another kind.
        """
        if not isinstance(values, dict):
            raise InputError(f"result should be a dict. Received: {type(values).__name__}.")
        known = {field.name: field for field in dataclasses.fields(cls)}
        values = {
            name: value
            for name, value in values.items()
            if name in known
            and not (value is None and known[name].default_factory is not dataclasses.MISSING)
        }
        for name in ("method", "model", "parameters", "test_accuracy"):
            if values.get(name) is None:
                raise InputError(f"result: the field '{name}' is missing.")
        for names, kinds, rule in (
            (_NUMBERS, (int, float), "a number"),
            (_DICTS, (dict,), "a dict"),
            ([name for name in known if name not in _NUMBERS + _DICTS], (str,), "a string"),
        ):
            for name in names:
                value = values.get(name)
                if value is not None and not isinstance(value, kinds):
                    raise InputError(f"result: '{name}' should be {rule}. Received: {value!r}.")
        for name, value in values.get("head_accuracies", {}).items():
            if not isinstance(value, (int, float)):
                raise InputError(
                    f"result: 'head_accuracies' of '{name}' should be a number. "
                    f"Received: {value!r}."
                )
        return cls(**values)

    @classmethod
    def read(cls, path):
        """Reads a `metrics.json`, also one of an older or a newer version.

        Args:
            path: The file.

        Raises:
            InputError: The file is missing or damaged.
        """
        path = Path(path)
        try:
            return cls.from_dict(json.loads(path.read_text(encoding="utf-8")))
        except OSError as error:
            raise InputError(f"result: can't read '{path}': {error.strerror}.") from None
        except InputError as error:
            raise InputError(f"{error} File: '{path}'.") from None
        except ValueError:
            raise InputError(f"result: '{path}' is damaged: not JSON.") from None


def results_table(title, results):
    """Returns a table with a row for each model and method.

    Agreement with the teacher, latency and size have a column where some result has them.

    Args:
        title: Its title.
        results: `RunResult` objects; those that differ in the seed alone share a row with mean and
            sample standard deviation.

    Returns:
        A `rich.table.Table`.
    """
    results = list(results)
    groups = {}
    for result in results:
        # The spread of a row is that of seeds, never that of two teachers.
        other = result.test_accuracy if result.method == "teacher" else None
        groups.setdefault((result.model, result.method, other), []).append(result)
    sentences = caption(results)
    table = Table(
        title=title,
        title_justify="left",
        caption_justify="left",
        box=box.SIMPLE_HEAD,
        padding=(0, 1, 0, 0),
        pad_edge=False,
    )
    for column in ("model", "method"):
        table.add_column(column, no_wrap=True, vertical="bottom")
    columns = [
        ("parameters", lambda runs: f"{runs[0].parameters:,}"),
        ("accuracy\n%", lambda runs: spread(percents(runs, "test_accuracy"), 2)),
        ("best\n%", lambda runs: spread(percents(runs, "best_accuracy"), 2)),
    ]
    if any(result.teacher_agreement is not None for result in results):
        columns.append(
            ("agreement\n%", lambda runs: spread(percents(runs, "teacher_agreement"), 1))
        )
    columns.append(("images/s", lambda runs: spread(known(runs, "images_per_second"), 0)))
    sentences.append("images/s: in the model's own training.")
    if any(result.latency_ms is not None for result in results):
        columns.append(("latency\nms", lambda runs: mean(known(runs, "latency_ms"), 2)))
        sentences.append("latency: of one image.")
    if any(result.weight_bytes is not None for result in results):
        columns.append(("size\nMiB", lambda runs: mean(mebibytes(runs), 2)))
    columns.append(
        ("seeds", lambda runs: " ".join(str(seed) for seed in known(runs, "seed")) or "–")
    )
    table.caption = " ".join(sentences)
    for column, _ in columns:
        # Wrapped in a narrow window, where an ellipsis would hide the numbers.
        table.add_column(column, justify="right", vertical="bottom")
    for (model, method, _), runs in groups.items():
        table.add_row(model, method, *(cell(runs) for _, cell in columns))
    return table


def console():
    """Returns a `rich.console.Console` for tables and for messages that hold paths."""
    # What goes to a file or a pipe is read in a wider window than the 80 columns that rich assumes.
    width = None if sys.stdout.isatty() else _WIDTH
    return Console(width=width, highlight=False, markup=False, soft_wrap=True)


def caption(results):
    """Returns the sentences that say what a table's accuracies are."""
    sentences = ["accuracy: on the test set, after the last epoch."]
    for chosen_on, held_out in (
        ("test", "the test set, which makes it optimistic"),
        ("validation", "the validation images, measured on the test set"),
    ):
        if any(result.best_chosen_on == chosen_on for result in results):
            sentences.append(f"best: after the epoch that is best on {held_out}.")
    if any(result.teacher_agreement is not None for result in results):
        sentences.append("agreement: test images on which student and teacher predict the same.")
    return sentences


def known(results, field):
    """Returns a field's values, without those that are None."""
    values = (getattr(result, field) for result in results)
    return [value for value in values if value is not None]


def percents(results, field):
    """Returns the known values of a share, times 100."""
    return [100 * value for value in known(results, field)]


def mebibytes(results):
    """Returns the known sizes of the weights, in MiB."""
    return [value / 2**20 for value in known(results, "weight_bytes")]


def mean(values, digits):
    """Returns the mean as text, "–" without any value."""
    return f"{statistics.mean(values):,.{digits}f}" if values else "–"


def spread(values, digits):
    """Returns mean ± sample standard deviation as text, the value alone where there is one."""
    if len(values) < 2:
        return mean(values, digits)
    return f"{mean(values, digits)} ± {statistics.stdev(values):,.{digits}f}"
