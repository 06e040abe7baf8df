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
    """A line: the finished seeds of a method, or one that is unfinished.

    Attributes:
        method: dskd, kd or ce.
        label: Its text in the legend.
        epochs: `[N]`, ascending, from 1.
        values: `[seeds, N]`, NaN where one is missing.
        unfinished: Whether the run goes on, or broke off.
    """

    method: str
    label: str
    epochs: np.ndarray
    values: np.ndarray
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
            _draw(axes, curves, lines)
            drawing.count_axis(axes, 1, last)
            drawing.name_axes(axes, x="epoch" if row == len(rows) - 1 else "")
        drawing.name_axes(panels[0], y=label)
        drawing.value_axis(panels[0], [*(curve.mean for curve in curves), lines], percent)
        if enlarged:
            _enlarge(panels[1], curves, lines, last)
        digits = 2 if percent else None
        ends[panels[-1]] = _ends(
            curves,
            lambda curve, digits=digits: f"{curve.method} {drawing.number(curve.mean[-1], digits)}",
            {line: f"teacher {line:.2f}" for line in lines},
            last,
        )
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
