"""A search for TensorBoard's HParams page, written without TensorFlow."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tensorboard.plugins.hparams import summary_v2 as hparams

from dskd_keras.callbacks.tensorboard import EventFile

# As `TensorBoardScalars` writes it into the trial's folder.
_METRIC = hparams.Metric("epoch_accuracy", group="validation", display_name="validation accuracy")


def write_ranges(folder: Path, ranges: Mapping[str, Sequence[Any]]) -> None:
    """Writes what is searched, pairs of numbers or lists of choices, at the root of all trials."""
    domains = [
        hparams.HParam(name, _domain(choices), description="") for name, choices in ranges.items()
    ]
    _write(folder, hparams.hparams_config_pb(domains, [_METRIC]))


def write_values(folder: Path, trial_id: str, values: Mapping[str, Any]) -> None:
    """Writes the values of a trial beside its scalars; the id joins the runs of several seeds."""
    plain = {name: _plain(value) for name, value in values.items()}
    _write(folder, hparams.hparams_pb(plain, trial_id))


def _write(folder: Path, summary: Any) -> None:
    file = EventFile(folder)
    file.write_summary(0, summary)
    file.close()


def _domain(choices: Sequence[Any]) -> Any:
    if all(isinstance(choice, int | float) for choice in choices):
        return hparams.RealInterval(*map(float, choices))
    return hparams.Discrete([_plain(choice) for choice in choices])


def _plain(value: Any) -> Any:
    return ", ".join(value) if isinstance(value, list) else value
