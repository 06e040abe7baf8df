"""What a search leaves to read: a table, `trials.csv`, and `best.yaml` for `train.py`."""

import csv
import dataclasses
import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich import box
from rich.table import Table

from dskd_keras import csv_cells, files
from dskd_keras.experiment.config import ExperimentConfig
from dskd_keras.tuning.config import SearchConfig

# Rows of the table in a terminal; the file has all.
_MOST_ROWS = 30
# In a trial's folder, what is to be known of it beside its score.
RESULT = "result.json"


@dataclasses.dataclass(frozen=True)
class TrialResult:
    """A trial that ended."""

    trial: str
    values: dict[str, Any]  # what it tried, by name
    val_accuracy: float | None  # after the last epoch, the mean over the seeds; None if it failed
    best_val_accuracy: float | None = None  # of the best epoch
    epochs: int | None = None
    seconds: float | None = None  # of training
    peak_memory_mib: float | None = None  # the most that its process had had by then
    error: str | None = None  # why it failed, in a line


def names(rows: Sequence[TrialResult]) -> list[str]:
    """Returns the names of what was searched, in the order of the trials' values."""
    return list(dict.fromkeys(name for row in rows for name in row.values))


def table(rows: Sequence[TrialResult], title: str) -> Table:
    """Returns the ranked table of a search's results."""
    ranked = Table(
        title=title, title_justify="left", caption_justify="left", box=box.SIMPLE_HEAD,
        padding=(0, 1, 0, 0), pad_edge=False,
        caption="accuracy: on the validation images, after the trial's last epoch. Trial 0000 is "
        "the configuration as it was.",
    )  # fmt: skip
    searched = names(rows)
    for column in ("rank", "trial", "accuracy\n%", "epochs", "seconds"):
        ranked.add_column(column, justify="right", vertical="bottom", no_wrap=True)
    for name in searched:
        # Nine parameters are to fit beside one another.
        header = name.replace("_", "\n").replace("prediction", "predic-\ntion")
        header = header.replace("perature", "pe-\nrature")
        ranked.add_column(header, justify="right", vertical="bottom", overflow="fold")
    accuracies = [row.val_accuracy for row in rows]
    for row in rows[:_MOST_ROWS]:
        failed = row.val_accuracy is None
        ranked.add_row(
            # Equal ones share a rank.
            "–" if failed else str(1 + accuracies.index(row.val_accuracy)),
            row.trial,
            "failed" if row.val_accuracy is None else f"{100 * row.val_accuracy:.2f}",
            "–" if row.epochs is None else str(row.epochs),
            "–" if row.seconds is None else f"{row.seconds:.0f}",
            *(format_value(row.values.get(name, "–"), "\n") for name in searched),
        )
    return ranked


def write_csv(path: Path, rows: Sequence[TrialResult]) -> None:
    """Writes all trials, ranked; the columns are the fields of `TrialResult` and the values."""
    columns = [name for name in TrialResult.__dataclass_fields__ if name != "values"]
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, [*columns, *names(rows)], lineterminator="\n")
    writer.writeheader()
    for row in rows:
        cells = {name: getattr(row, name) for name in columns} | row.values
        # What is missing or None is an empty cell.
        writer.writerow({name: _cell(cell) for name, cell in cells.items() if cell is not None})
    files.write_text(path, text.getvalue())


def write_best(path: Path, config: SearchConfig, best: TrialResult) -> ExperimentConfig:
    """Writes the best trial's settings as a configuration of `train.py`, on all training images."""
    experiment = config.experiment(
        **best.values,
        validation_fraction=0.0,
        resume=False,
        # A folder of its own: another configuration may have been run beside the search.
        run_dir=str(config.search_folder() / f"best-{best.trial}"),
    )
    searched = config.tuner if best.epochs is None else f"{config.tuner}, {best.epochs} epoch(s)"
    accuracy = 100 * (best.val_accuracy or 0)
    files.write_text(
        path,
        f"# Trial {best.trial} of a search ({searched}): {accuracy:.2f} % on the "
        f"validation images.\n# Command:  python train.py --config {path}\n{experiment.to_yaml()}",
    )
    return experiment


def _cell(value: Any) -> str:
    text = format_value(value)
    return text if isinstance(value, int | float) else csv_cells.shown(text)


def format_value(value: Any, between: str = "+") -> str:
    """Returns one value as text; what a list holds is joined with `between`."""
    if isinstance(value, list):
        return between.join(value)
    return f"{value:g}" if isinstance(value, float) else str(value)
