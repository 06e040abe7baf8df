"""The table of results, and how their numbers are written."""

import statistics
import sys
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from dskd_keras.report.run_result import RunResult

# Columns that the widest table takes, with names of some length.
_WIDTH = 120


def results_table(title: str, results: Iterable[RunResult]) -> Table:
    """Returns a table with a row for each model and method.

    Agreement with the teacher, latency and size have a column where some result has them.

    Args:
        title: Its title.
        results: Those that differ in the seed alone share a row with mean and sample standard
            deviation.
    """
    results = list(results)
    groups: dict[tuple[Any, ...], list[RunResult]] = {}
    for result in results:
        # The spread of a row is that of seeds, never that of two teachers.
        other = result.test_accuracy if result.method == "teacher" else None
        groups.setdefault((result.model, result.method, other), []).append(result)
    sentences = [*caption(results), "images/s: in the model's own training."]
    columns: dict[str, Callable[[list[RunResult]], str]] = {
        "parameters": lambda runs: f"{runs[0].parameters:,}",
        "accuracy\n%": lambda runs: spread(percents(runs, "test_accuracy"), 2),
        "best\n%": lambda runs: spread(percents(runs, "best_accuracy"), 2),
    }
    if known(results, "teacher_agreement"):
        columns["agreement\n%"] = lambda runs: spread(percents(runs, "teacher_agreement"), 1)
    columns["images/s"] = lambda runs: spread(known(runs, "images_per_second"), 0)
    if known(results, "latency_ms"):
        columns["latency\nms"] = lambda runs: mean(known(runs, "latency_ms"), 2)
        sentences.append("latency: of one image.")
    if known(results, "weight_bytes"):
        columns["size\nMiB"] = lambda runs: mean(mebibytes(runs), 2)
    columns["seeds"] = lambda runs: " ".join(map(str, known(runs, "seed"))) or "–"
    table = Table(
        title=title,
        title_justify="left",
        caption=" ".join(sentences),
        caption_justify="left",
        box=box.SIMPLE_HEAD,
        padding=(0, 1, 0, 0),
        pad_edge=False,
    )
    for column in ("model", "method"):
        table.add_column(column, no_wrap=True, vertical="bottom")
    for column in columns:
        # Wrapped in a narrow window, where an ellipsis would hide the numbers.
        table.add_column(column, justify="right", vertical="bottom")
    for (model, method, _), runs in groups.items():
        table.add_row(model, method, *(cell(runs) for cell in columns.values()))
    return table


def console() -> Console:
    """Returns a console for tables and for messages that hold paths."""
    # What goes to a file or a pipe is read in a wider window than the 80 columns that rich assumes.
    width = None if sys.stdout.isatty() else _WIDTH
    return Console(width=width, highlight=False, markup=False, soft_wrap=True)


def caption(results: Sequence[RunResult]) -> list[str]:
    """Returns the sentences that say what a table's accuracies are."""
    sentences = ["accuracy: on the test set, after the last epoch."]
    for chosen_on, held_out in (
        ("test", "the test set, which makes it optimistic"),
        ("validation", "the validation images, measured on the test set"),
    ):
        if any(result.best_chosen_on == chosen_on for result in results):
            sentences.append(f"best: after the epoch that is best on {held_out}.")
    if known(results, "teacher_agreement"):
        sentences.append("agreement: test images on which student and teacher predict the same.")
    return sentences


def known(results: Iterable[RunResult], field: str) -> list[Any]:
    """Returns a field's values, without those that are None."""
    values = (getattr(result, field) for result in results)
    return [value for value in values if value is not None]


def percents(results: Iterable[RunResult], field: str) -> list[float]:
    """Returns the known values of a share, times 100."""
    return [100 * value for value in known(results, field)]


def mebibytes(results: Iterable[RunResult]) -> list[float]:
    """Returns the known sizes of the weights, in MiB."""
    return [value / 2**20 for value in known(results, "weight_bytes")]


def mean(values: Sequence[float], digits: int) -> str:
    """Returns the mean as text, "–" without any value."""
    return f"{statistics.mean(values):,.{digits}f}" if values else "–"


def spread(values: Sequence[float], digits: int) -> str:
    """Returns mean ± sample standard deviation as text, the value alone where there is one."""
    if len(values) < 2:
        return mean(values, digits)
    return f"{mean(values, digits)} ± {statistics.stdev(values):,.{digits}f}"
