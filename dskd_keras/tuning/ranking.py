"""What a search leaves to read: a table, `trials.csv`, and `best.yaml` for `train.py`."""

import csv
import dataclasses
import io
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from keras_tuner.engine.trial import Trial
from rich import box
from rich.table import Table

from dskd_keras import files
from dskd_keras.experiment.config import ExperimentConfig
from dskd_keras.tuning.config import SearchConfig
from dskd_keras.tuning.hypermodel import DistillationHyperModel
from dskd_keras.tuning.oracles import DurableOracle

# Rows of the table in a terminal; the file has all.
_MOST_ROWS = 30
_RESULT = "result.json"


@dataclasses.dataclass(frozen=True)
class TrialResult:
    """A trial that ended.

    Attributes:
        trial: Its id.
        values: What it tried, by name.
        val_accuracy: After the last epoch, 0 to 1, the mean over the seeds; None if it failed.
        best_val_accuracy: Of the best epoch.
        epochs: Epochs trained.
        seconds: Of training.
        peak_memory_mib: The most memory that its process had had by then.
        error: Why it failed, in a line; None if it did not.
    """

    trial: str
    values: dict[str, Any]
    val_accuracy: float | None
    best_val_accuracy: float | None = None
    epochs: int | None = None
    seconds: float | None = None
    peak_memory_mib: float | None = None
    error: str | None = None


def write_result(folder: Path, result: Mapping[str, float | None]) -> None:
    """Writes what is to be known of a trial beside its score.

    Args:
        folder: The trial's.
        result: The fields of `TrialResult` that it measured.
    """
    files.write_text(folder / _RESULT, json.dumps(result, indent=1) + "\n")


def collect(
    config: SearchConfig, oracle: DurableOracle, hypermodel: DistillationHyperModel
) -> list[TrialResult]:
    """Returns the trials that ended, the best first, the failed last."""
    rows = []
    for trial in oracle.ended():
        folder = config.trial_folder(trial.trial_id)
        measured: dict[str, Any] = {}
        if trial.score is None:
            measured["error"] = _error(trial, folder)
        elif (folder / _RESULT).is_file():
            measured = json.loads((folder / _RESULT).read_text(encoding="utf-8"))
        measured["val_accuracy"] = trial.score
        values = hypermodel.values(trial.hyperparameters)
        rows.append(TrialResult(trial.trial_id, values, **measured))
    return rows


def _error(trial: Trial, folder: Path) -> str:
    # KerasTuner's protocol hands on no message from a worker.
    text = trial.message or ""
    if (folder / "error.txt").is_file():
        text = (folder / "error.txt").read_text(encoding="utf-8")
    lines = text.strip().splitlines()
    return lines[-1] if lines else "unknown"


def names(rows: Sequence[TrialResult]) -> list[str]:
    """Returns the names of what was searched, in the order of the trials' values."""
    return list(dict.fromkeys(name for row in rows for name in row.values))


def table(rows: Sequence[TrialResult], title: str) -> Table:
    """Returns the ranked table of what `collect` returned."""
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
        ranked.add_column(_header(name), justify="right", vertical="bottom", overflow="fold")
    accuracies = [row.val_accuracy for row in rows if row.val_accuracy is not None]
    for row in rows[:_MOST_ROWS]:
        rank, accuracy = "–", "failed"
        if row.val_accuracy is not None:
            # Equal ones share a rank.
            rank = str(1 + accuracies.index(row.val_accuracy))
            accuracy = f"{100 * row.val_accuracy:.2f}"
        ranked.add_row(
            rank,
            row.trial,
            accuracy,
            "–" if row.epochs is None else str(row.epochs),
            "–" if row.seconds is None else f"{row.seconds:.0f}",
            *(_text(row.values[name], "\n") if name in row.values else "–" for name in searched),
        )
    return ranked


def _header(name: str) -> str:
    # Nine parameters are to fit beside one another.
    for long, short in (("_", "\n"), ("prediction", "predic-\ntion"), ("perature", "pe-\nrature")):
        name = name.replace(long, short)
    return name


def write_csv(path: Path, rows: Sequence[TrialResult]) -> None:
    """Writes all trials, ranked; the columns are the fields of `TrialResult` and the values."""
    columns = [field.name for field in dataclasses.fields(TrialResult) if field.name != "values"]
    searched = names(rows)
    text = io.StringIO(newline="")
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow([*columns, *searched])
    for row in rows:
        values = [format_value(row.values[name]) if name in row.values else "" for name in searched]
        writer.writerow([_cell(getattr(row, name)) for name in columns] + values)
    files.write_text(path, text.getvalue())


def write_best(path: Path, config: SearchConfig, best: TrialResult) -> ExperimentConfig:
    """Writes the best trial's settings as a configuration of `train.py`, on all training images.

    Args:
        path: The YAML file.
        config: The search's configuration.
        best: The best trial, which did not fail.
    """
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


def describe(values: Mapping[str, Any]) -> str:
    """Returns a trial's values in a line."""
    return ", ".join(f"{name} {format_value(value)}" for name, value in values.items())


def format_value(value: Any) -> str:
    """Returns one value as text."""
    return _text(value, "+")


def _text(value: Any, between: str) -> str:
    if isinstance(value, list):
        return between.join(value)
    return f"{value:g}" if isinstance(value, float) else str(value)


def _cell(value: Any) -> Any:
    if value is None:
        return ""
    return f"{value:.6g}" if isinstance(value, float) else value
