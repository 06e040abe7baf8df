"""The table of results, and how their numbers are written."""

import statistics
import sys
from collections.abc import Iterable, Sequence

from rich import box
from rich.console import Console
from rich.table import Table

from dskd_keras.report.run_result import RunResult, by_row, known

# Columns that the widest table takes, with names of some length.
_WIDTH = 120
DASH = "–"

# By field: the head of its column, what its values are multiplied by, their digits, and whether
# their spread over the seeds says something.
_FIELDS = {
    "parameters": ("parameters", 1, 0, False),
    "test_accuracy": ("accuracy\n%", 100, 2, True),
    "best_accuracy": ("best\n%", 100, 2, True),
    "teacher_agreement": ("agreement\n%", 100, 1, True),
    "images_per_second": ("images/s", 1, 0, True),
    "latency_ms": ("latency\nms", 1, 2, False),
    "weight_bytes": ("size\nMiB", 2**-20, 2, False),
}


def results_table(title: str, results: Iterable[RunResult]) -> Table:
    """Returns a table with a row for each model and method.

    A quantity has a column where some result has it.

    Args:
        title: Its title.
        results: Those that differ in the seed alone share a row with mean and sample standard
            deviation.
    """
    results = list(results)
    fields = [field for field in _FIELDS if known(results, field)]
    table = Table(
        title=title, title_justify="left", caption=" ".join(caption(results, fields)),
        caption_justify="left", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False,
    )  # fmt: skip
    for column in ("model", "method"):
        table.add_column(column, no_wrap=True, vertical="bottom")
    for column in (*(_FIELDS[field][0] for field in fields), "seeds"):
        # Wrapped in a narrow window, where an ellipsis would hide the numbers.
        table.add_column(column, justify="right", vertical="bottom")
    for row in by_row(results):
        cells = [cell(row, field) for field in fields]
        table.add_row(row[0].model, row[0].method, *cells, seeds(row))
    return table


def gained(results: Iterable[RunResult]) -> str | None:
    """Returns a sentence on the student beside its teacher, None where there is not one of each.

    Args:
        results: Those of one run; the seeds of its student are averaged.
    """
    rows = by_row(results)
    teachers = [row for row in rows if row[0].method == "teacher"]
    students = [row for row in rows if row[0].method != "teacher"]
    if len(teachers) != 1 or len(students) != 1:
        return None
    parts = []
    for field, text in (
        ("weight_bytes", "takes {:.2f} of the memory of {}"),
        ("latency_ms", "predicts one image in {:.2f} of its time"),
    ):
        of_teacher, of_student = (known(row, field) for row in (teachers[0], students[0]))
        if of_teacher and of_student:
            ratio = statistics.mean(of_student) / statistics.mean(of_teacher)
            parts.append(text.format(ratio, teachers[0][0].model))
    accuracies = [
        statistics.mean(known(row, "test_accuracy")) for row in (students[0], teachers[0])
    ]
    points = 100 * (accuracies[0] - accuracies[1])
    difference = f"{abs(points):.2f} points {'less' if points < 0 else 'more'}"
    parts.append(f"is {difference} accurate" if points else "is as accurate")
    listed = ", ".join(parts[:-1])
    return f"{students[0][0].model} {f'{listed} and ' if listed else ''}{parts[-1]}."


def console() -> Console:
    """Returns a console for tables and for messages that hold paths."""
    # What goes to a file or a pipe is read in a wider window than the 80 columns that rich assumes.
    width = None if sys.stdout.isatty() else _WIDTH
    return Console(width=width, highlight=False, markup=False, soft_wrap=True)


def caption(results: Sequence[RunResult], fields: Iterable[str]) -> list[str]:
    """Returns the sentences that say what the columns of some fields are."""
    best = "best: after the epoch that is best on the"
    agreement = "agreement: test images on which student and teacher predict the same."
    sentences = {
        "test_accuracy": "accuracy: on the test set, after the last epoch.",
        "best on test": f"{best} test set, which makes it optimistic.",
        "best on validation": f"{best} validation images, measured on the test set.",
        "teacher_agreement": agreement,
        "images_per_second": "images/s: in the model's own training.",
        "latency_ms": "latency: of one image.",
    }
    shown = [field for field in fields if known(results, field)]
    shown += [f"best on {images}" for images in known(results, "best_chosen_on")]
    return [sentence for subject, sentence in sentences.items() if subject in shown]


def cell(results: Sequence[RunResult], field: str) -> str:
    """Returns what the results of one row have in the column of a field."""
    _, scale, digits, with_spread = _FIELDS[field]
    return spread([scale * value for value in known(results, field)], digits, with_spread)


def seeds(results: Sequence[RunResult]) -> str:
    """Returns the seeds of one row."""
    return " ".join(map(str, known(results, "seed"))) or DASH


def spread(values: Sequence[float], digits: int, with_spread: bool = True) -> str:
    """Returns mean ± sample standard deviation as text, the value alone where there is one."""
    if not values:
        return DASH
    text = f"{statistics.mean(values):,.{digits}f}"
    if with_spread and len(values) > 1:
        text += f" ± {statistics.stdev(values):,.{digits}f}"
    return text
