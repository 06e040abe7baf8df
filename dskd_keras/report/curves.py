"""The pictures of accuracy and loss by epoch, of one run folder and of several."""

import dataclasses
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from dskd_keras import drawing

if TYPE_CHECKING:
    from dskd_keras.report.reading import Run, SeedRun

_METHODS: dict[str, dict[str, Any]] = {
    "dskd": {"color": drawing.BLUE, "linestyle": drawing.SOLID},
    "kd": {"color": drawing.VERMILLION, "linestyle": drawing.DASHED},
    "ce": {"color": drawing.GREEN, "linestyle": drawing.DASH_DOTTED},
}
_TEACHER: dict[str, Any] = {"color": drawing.INK, "linestyle": ":", "linewidth": 1.6}

# From here on the end of the training, where methods differ by a point or less, is enlarged.
_ENLARGED_FROM = 40
# Panels beside one another where several run folders are compared.
_COLUMNS = 3


@dataclasses.dataclass(frozen=True)
class Curve:
    """A line: the finished seeds of a method, or one that is unfinished."""

    method: str
    label: str
    epochs: np.ndarray  # [N], ascending, from 1
    values: np.ndarray  # [seeds, N], NaN where one is missing
    unfinished: bool

    @property
    def mean(self) -> np.ndarray:
        """`[N]`, the mean over the seeds."""
        return np.nanmean(self.values, axis=0)

    def draw(self, axes: drawing.Axes) -> None:
        """Draws the line, and a band from the lowest to the highest seed."""
        style = _METHODS[self.method]
        colour = style["color"]
        if len(self.values) > 1:
            band = self.epochs, np.nanmin(self.values, axis=0), np.nanmax(self.values, axis=0)
            if len(self.epochs) == 1:
                axes.vlines(*band, color=colour)
            axes.fill_between(*band, color=colour, alpha=0.2, linewidth=0)
        few = len(self.epochs) <= drawing.MOST_MARKERS
        axes.plot(
            self.epochs, self.mean, **style, linewidth=1.0 if self.unfinished else 1.8,
            marker="o" if few else None, markersize=4,
        )  # fmt: skip
        if self.unfinished:
            end = self.epochs[-1], self.mean[-1]
            axes.plot(*end, color=colour, marker="x", markersize=8, markeredgewidth=2)


def learning_curves(run: "Run") -> bytes | None:
    """Draws accuracy and training loss of all methods by epoch; None before the first epoch's end.

    Methods with several finished seeds show their mean, in a band from the lowest to the highest;
    unfinished runs have a line of their own.
    """
    rows = [
        (label, percent, curves)
        for column, percent, label in (
            ("val_accuracy", True, _held_out(run)),
            ("loss", False, "training loss\n(whole objective)"),
        )
        if (curves := _curves(run, column, 100 if percent else 1))
    ]
    if not rows:
        return None
    last = _last_epoch([curve for _, _, curves in rows for curve in curves])
    figure = drawing.new_figure(8.6, 0.7 + 2.9 * len(rows))
    grid = figure.add_gridspec(len(rows), 2, width_ratios=[2.2, 1])
    teachers = run.teachers()
    ends: drawing.Ends = {}
    for row, (label, percent, curves) in enumerate(rows):
        # Losses of methods differ in their terms: only of accuracies do small differences count.
        enlarged = percent and last >= _ENLARGED_FROM
        places = [grid[row, 0], grid[row, 1]] if enlarged else [grid[row, :]]
        panels = [figure.add_subplot(place) for place in places]
        lines = [100 * teacher.test_accuracy for teacher in teachers] if percent else []
        for axes in panels:
            labels = _draw(axes, curves, lines, last, digits=2 if percent else None)
            drawing.name_axes(axes, x="epoch" if row == len(rows) - 1 else "")
        ends[panels[-1]] = labels
        drawing.name_axes(panels[0], y=label)
        drawing.value_axis(panels[0], [*(curve.mean for curve in curves), lines], percent)
        if enlarged:
            _enlarge(panels[1], curves, lines, last)
    curves = rows[0][2]
    handles = [
        drawing.line_handle(
            curve.label,
            **_METHODS[curve.method],
            **({"marker": "x", "linewidth": 1.0} if curve.unfinished else {"linewidth": 2}),
        )
        for curve in curves
    ]
    for teacher in teachers:
        name = drawing.short(teacher.model, 24)
        handles.append(drawing.line_handle(f"teacher {name}, after its last epoch", **_TEACHER))
    if any(len(curve.values) > 1 for curve in curves):
        label = "from the lowest to the highest seed"
        handles.append(drawing.line_handle(label, color="#bbbbbb", linewidth=7))
    drawing.legend(figure, handles, columns=2)
    drawing.label_ends(figure, ends)
    return drawing.to_bytes(figure)


def compared_curves(runs: "Sequence[Run]") -> bytes | None:
    """Draws the accuracies of run folders, a panel for each; None before the first epoch's end."""
    shown = [(run, curves) for run in runs if (curves := _curves(run, "val_accuracy", 100))]
    if not shown:
        return None
    columns = min(len(shown), _COLUMNS)
    rows = -(-len(shown) // columns)
    # Accuracies of the same images are to be compared from panel to panel.
    same = len({run.seeds[0].dataset for run, _ in shown}) == 1
    figure = drawing.new_figure(1.2 + 3.1 * columns, 0.7 + 2.7 * rows)
    panels = figure.subplots(rows, columns, squeeze=False, sharey=same).flatten()
    values: list[Any] = []
    ends: drawing.Ends = {}
    for position, (axes, (run, curves)) in enumerate(zip(panels, shown, strict=False)):
        lines = [100 * teacher.test_accuracy for teacher in run.teachers()]
        ends[axes] = _draw(axes, curves, lines, _last_epoch(curves), digits=1, named=False)
        values = [*(values if same else []), *(curve.mean for curve in curves), lines]
        drawing.value_axis(axes, values, percent=True)
        label = "" if position % columns else _held_out(run)
        drawing.name_axes(axes, drawing.short(run.name, 30), x="epoch", y=label)
        axes.tick_params(labelleft=True)
    for axes in panels[len(shown) :]:
        axes.set_axis_off()
    present = {seed.method for run, _ in shown for seed in run.seeds}
    handles = [
        drawing.line_handle(method, **style, linewidth=2)
        for method, style in _METHODS.items()
        if method in present
    ]
    if any(run.teachers() for run, _ in shown):
        handles.append(drawing.line_handle("teacher", **_TEACHER))
    if any(curve.unfinished for _, curves in shown for curve in curves):
        handles.append(drawing.line_handle("unfinished", linewidth=1, marker="x"))
    drawing.legend(figure, handles, columns=5)
    drawing.label_ends(figure, ends)
    return drawing.to_bytes(figure)


def _held_out(run: "Run") -> str:
    """Says on which images the accuracies by epoch were measured."""
    kinds = {bool(seed.config.get("validation_fraction")) for seed in run.seeds}
    names = " or ".join(("test images", "validation images")[kind] for kind in sorted(kinds))
    return f"accuracy on the\n{names} (%)"


def _curves(run: "Run", column: str, scale: float) -> list[Curve]:
    """Returns the lines of a column of `history.csv`, its values times `scale`."""
    curves = []
    for method, seeds in run.by_method().items():
        known = [seed for seed in seeds if np.isfinite(seed.history.get(column, [])).any()]
        finished = [seed for seed in known if seed.result is not None]
        if finished:
            label = f"{method} (mean of {len(finished)} seeds)" if len(finished) > 1 else method
            curves.append(_curve(label, finished, column, scale))
        for seed in known:
            if seed.result is None:
                label = f"{method} seed {seed.seed}: {seed.progress}"
                curves.append(_curve(label, [seed], column, scale))
    return curves


def _curve(label: str, seeds: "list[SeedRun]", column: str, scale: float) -> Curve:
    epochs = np.unique(np.concatenate([seed.history["epoch"] for seed in seeds]))
    values = np.full((len(seeds), len(epochs)), np.nan)
    for row, seed in zip(values, seeds, strict=True):
        row[np.searchsorted(epochs, seed.history["epoch"])] = scale * seed.history[column]
    values[~np.isfinite(values)] = np.nan
    kept = np.isfinite(values).any(axis=0)
    unfinished = seeds[0].result is None
    return Curve(seeds[0].method, label, epochs[kept], values[:, kept], unfinished)


def _last_epoch(curves: Sequence[Curve]) -> int:
    return int(max(curve.epochs[-1] for curve in curves))


def _draw(
    axes: drawing.Axes,
    curves: Sequence[Curve],
    teachers: Sequence[float],
    last: int,
    digits: int | None,
    named: bool = True,
) -> list[tuple[float, str, Any]]:
    """Draws all lines, and returns what `drawing.label_ends` needs of those that reach the end."""
    drawing.style(axes)
    drawing.count_axis(axes, 1, last)
    for curve in curves:
        curve.draw(axes)
    for value in teachers:
        axes.axhline(value, **_TEACHER)
    ends = [
        (float(curve.mean[-1]), curve.method, _METHODS[curve.method]["color"])
        for curve in curves
        if curve.epochs[-1] == last
    ]
    ends += [(value, "teacher", drawing.INK) for value in teachers]
    return [
        (value, f"{name if named else ''} {drawing.number(value, digits)}".strip(), colour)
        for value, name, colour in ends
    ]


def _enlarge(
    axes: drawing.Axes, curves: Sequence[Curve], teachers: Sequence[float], last: int
) -> None:
    """Sets the limits to the last epochs, and to the values there."""
    first = last - max(last // 8, 5)
    drawing.count_axis(axes, first, last, most=4)
    axes.set_title("the last epochs", fontsize=drawing.SIZE - 1, color=drawing.INK, loc="left")
    values = np.concatenate([curve.values[:, curve.epochs >= first].ravel() for curve in curves])
    if not len(values):
        return
    low, high = np.nanmin(values), np.nanmax(values)
    near = max(1.5 * (high - low), 4.0)
    for value in teachers:
        if low - near < value < high + near:
            low, high = min(low, value), max(high, value)
    room = 0.08 * (high - low) or 0.05 * abs(high) or 0.1
    axes.set_ylim(low - room, high + room)
    axes.locator_params(axis="y", nbins=6, steps=[1, 2, 5, 10])
