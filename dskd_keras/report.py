"""What a run leaves to be read: its results and the table of them."""

import dataclasses
import statistics

from rich.table import Table


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


def results_table(title, results):
    """Returns a table with a row for each model and method.

    Args:
        title: Its title.
        results: `RunResult` objects; those that differ in the seed alone share a row with mean and
            sample standard deviation.

    Returns:
        A `rich.table.Table`.
    """
    groups = {}
    for result in results:
        groups.setdefault((result.model, result.method), []).append(result)
    caption = "accuracy: on the test set, after the last epoch."
    for chosen_on, held_out in (
        ("test", "the test set, which makes it optimistic"),
        ("validation", "the validation images, measured on the test set"),
    ):
        if any(result.best_chosen_on == chosen_on for result in results):
            caption += f" best: after the epoch that is best on {held_out}."
    table = Table(title=title, title_justify="left", caption=caption, caption_justify="left")
    for column in ("model", "method"):
        table.add_column(column, no_wrap=True)
    for column in ("parameters", "accuracy %", "best %", "images/s", "seeds"):
        table.add_column(column, justify="right", no_wrap=True)
    for (model, method), runs in groups.items():
        table.add_row(
            model,
            method,
            f"{runs[0].parameters:,}",
            _mean_and_deviation([100 * run.test_accuracy for run in runs], 2),
            _mean_and_deviation(
                [100 * run.best_accuracy for run in runs if run.best_accuracy is not None], 2
            ),
            _mean_and_deviation(
                [run.images_per_second for run in runs if run.images_per_second is not None], 0
            ),
            " ".join(str(run.seed) for run in runs if run.seed is not None) or "–",
        )
    return table


def _mean_and_deviation(values, digits):
    if not values:
        return "–"
    mean = f"{statistics.mean(values):,.{digits}f}"
    return mean if len(values) == 1 else f"{mean} ± {statistics.stdev(values):.{digits}f}"
