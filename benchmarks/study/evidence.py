"""What kept cells say: means over seeds, and differences to a baseline with the same seeds."""

import dataclasses
import math
import statistics
from typing import Any

from scipy import stats

from benchmarks.study import cells
from benchmarks.study.plan import Grid

_LEVEL = 0.95


@dataclasses.dataclass(frozen=True)
class Row:
    """The cells of one name.

    Attributes:
        name: Theirs.
        accuracies: In percent, by seed.
        mean: Of them.
        deviation: Their standard deviation, None for one.
        differences: To the baseline's with the same seed, in points.
        difference: Their mean, None without any.
        error: Its standard error, None for fewer than two.
        interval: Its 95 % confidence interval by Student's t, `(low, high)`, likewise.
        heads: Mean test accuracy of the heads by layer, in percent.
        minutes: Mean duration.
    """

    name: str
    accuracies: dict[int, float]
    mean: float
    deviation: float | None
    differences: list[float]
    difference: float | None
    error: float | None
    interval: tuple[float, float] | None
    heads: dict[str, float]
    minutes: float


def rows(grid: Grid) -> list[Row]:
    """Returns a row for every name of a grid of which a cell is kept."""
    kept = kept_cells(grid)
    baseline = _accuracies(grid, kept.get(grid.baseline, {}))
    return [
        _row(name, _accuracies(grid, found), found, baseline)
        for name, found in kept.items()
        if found
    ]


def kept_cells(grid: Grid) -> dict[str, dict[int, dict[str, Any]]]:
    """Returns what is kept of a grid's cells, by name and seed."""
    found: dict[str, dict[int, dict[str, Any]]] = {name: {} for name in grid.cells}
    for cell in grid.all_cells():
        if cells.is_kept(grid.scale, cell):
            found[cell.name][cell.seed] = cells.read(cell.kept(grid.scale))
    return found


def _accuracies(grid: Grid, kept: dict[int, dict[str, Any]]) -> dict[int, float]:
    if grid.measured_on == "validation":
        return {seed: 100 * cell["validation_accuracy"] for seed, cell in kept.items()}
    return {seed: 100 * cell["metrics"]["test_accuracy"] for seed, cell in kept.items()}


def _row(name, accuracies, kept, baseline) -> Row:
    values = list(accuracies.values())
    differences = [value - baseline[seed] for seed, value in accuracies.items() if seed in baseline]
    error, interval = paired(differences)
    heads: dict[str, list[float]] = {}
    for cell in kept.values():
        for layer, accuracy in cell["metrics"]["head_accuracies"].items():
            heads.setdefault(layer, []).append(100 * accuracy)
    return Row(
        name=name,
        accuracies=accuracies,
        mean=statistics.fmean(values),
        deviation=statistics.stdev(values) if len(values) > 1 else None,
        differences=differences,
        difference=statistics.fmean(differences) if differences else None,
        error=error,
        interval=interval,
        heads={layer: statistics.fmean(of_layer) for layer, of_layer in heads.items()},
        minutes=statistics.fmean(cell["metrics"]["seconds"] / 60 for cell in kept.values()),
    )


def paired(differences: list[float]) -> tuple[float | None, tuple[float, float] | None]:
    """Returns the standard error of the mean of paired differences, and its confidence interval.

    The interval is that of Student's t with n − 1 degrees of freedom, at 95 %. Both are None for
    fewer than two differences.
    """
    n = len(differences)
    if n < 2:
        return None, None
    error = statistics.stdev(differences) / math.sqrt(n)
    reach = float(stats.t.ppf((1 + _LEVEL) / 2, n - 1)) * error
    middle = statistics.fmean(differences)
    return error, (middle - reach, middle + reach)
