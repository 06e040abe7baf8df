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
        mean: `[N]`, the mean over the seeds.
        low: `[N]`, of the lowest seed.
        high: `[N]`, of the highest seed.
        seeds: How many they are.
        unfinished: Whether the run goes on, or broke off.
    """

    method: str
    label: str
    epochs: np.ndarray
    mean: np.ndarray
    low: np.ndarray
    high: np.ndarray
    seeds: int
    unfinished: bool

    def draw(self, axes: drawing.Axes) -> None:
        """Draws the line, and a band from the lowest to the highest seed."""
        style = _METHODS[self.method]
        few = len(self.epochs) <= drawing.MOST_MARKERS
        if self.seeds > 1:
            if len(self.epochs) == 1:
                axes.vlines(self.epochs, self.low, self.high, color=style["color"])
            axes.fill_between(
                self.epochs, self.low, self.high, color=style["color"], alpha=0.2, linewidth=0
            )
        axes.plot(
            self.epochs, self.mean, **style, linewidth=1.0 if self.unfinished else 1.8,
            marker="o" if few else None, markersize=4,
        )  # fmt: skip
        if self.unfinished:
            axes.plot(
                self.epochs[-1], self.mean[-1], color=style["color"], marker="x", markersize=8,
                markeredgewidth=2,
            )  # fmt: skip

    def end(self, text: str) -> tuple[float, str, Any]:
        """Returns what `drawing.label_ends` needs."""
        return float(self.mean[-1]), text, _METHODS[self.method]["color"]


def learning_curves(run: "Run") -> bytes | None:
    """Draws accuracy and training loss of all methods of a run folder by epoch.

    Methods with several finished seeds show their mean, in a band from the lowest to the highest;
    unfinished runs have a line of their own.

    Args:
        run: The run folder.

    Returns:
        The PNG; None if no epoch is finished yet.
    """
    rows = [
        (column, percent, curves, label)
        for column, percent, label in (
            ("val_accuracy", True, f"accuracy on the\n{_held_out(run)} (%)"),
            ("loss", False, "training loss\n(whole objective)"),
        )
        if (curves := _curves(run, column, 100 if percent else 1))
    ]
    if not rows:
        return None
    last = _last_epoch(curve for _, _, curves, _ in rows for curve in curves)
    figure = drawing.new_figure(8.6, 0.7 + 2.9 * len(rows))
    grid = figure.add_gridspec(len(rows), 2, width_ratios=[2.2, 1])
    teachers = run.teachers()
    ends: drawing.Ends = {}
    for row, (_, percent, curves, label) in enumerate(rows):
        # Losses of methods differ in their terms: only of accuracies do small differences count.
        enlarged = percent and last >= _ENLARGED_FROM
        places = [grid[row, 0], grid[row, 1]] if enlarged else [grid[row, :]]
        panels = [figure.add_subplot(place) for place in places]
        lines = [100 * teacher.test_accuracy for teacher in teachers] if percent else []
        for axes in panels:
            _draw(axes, curves, lines)
            drawing.count_axis(axes, 1, last, "epoch" if row == len(rows) - 1 else "")
        drawing.name_axes(panels[0], y=label)
        drawing.value_axis(panels[0], [*(curve.mean for curve in curves), lines], percent)
        if enlarged:
            _enlarge(panels[1], curves, lines, last)
        digits = 2 if percent else None
        ends[panels[-1]] = [
            curve.end(f"{curve.method} {drawing.number(curve.mean[-1], digits)}")
            for curve in curves
            if curve.epochs[-1] == last
        ]
        ends[panels[-1]] += [(line, f"teacher {line:.2f}", drawing.INK) for line in lines]
    curves = rows[0][2]
    handles = [
        drawing.line_handle(
            curve.label,
            **_METHODS[curve.method],
            **({"marker": "x", "linewidth": 1.0} if curve.unfinished else {"linewidth": 2}),
        )
        for curve in curves
    ]
    handles += [
        drawing.line_handle(
            f"teacher {drawing.short(teacher.model, 24)}, after its last epoch", **_TEACHER
        )
        for teacher in teachers
    ]
    if any(curve.seeds > 1 for curve in curves):
        label = "from the lowest to the highest seed"
        handles.append(drawing.line_handle(label, color="#bbbbbb", linewidth=7))
    drawing.legend(figure, handles, columns=2)
    drawing.label_ends(figure, ends)
    return drawing.to_bytes(figure)


def compared_curves(runs: "Sequence[Run]") -> bytes | None:
    """Draws the accuracies of several run folders by epoch, a panel for each.

    Args:
        runs: The run folders.

    Returns:
        The PNG; None if no epoch of any is finished yet.
    """
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
        _draw(axes, curves, lines)
        last = _last_epoch(curves)
        values = [*(values if same else []), *(curve.mean for curve in curves), lines]
        drawing.count_axis(axes, 1, last, "epoch")
        drawing.value_axis(axes, values, percent=True)
        label = "" if position % columns else f"accuracy on the\n{_held_out(run)} (%)"
        drawing.name_axes(axes, drawing.short(run.name, 30), y=label)
        axes.tick_params(labelleft=True)
        ends[axes] = [
            curve.end(f"{curve.mean[-1]:.1f}") for curve in curves if curve.epochs[-1] == last
        ]
        ends[axes] += [(line, f"{line:.1f}", drawing.INK) for line in lines]
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
    names = {False: "test images", True: "validation images"}
    return " or ".join(names[kind] for kind in sorted(kinds))


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
                total = f" of {seed.config['epochs']}" if seed.config.get("epochs") else ""
                label = f"{method} seed {seed.seed}: epoch {seed.epochs}{total}"
                curves.append(_curve(label, [seed], column, scale))
    return curves


def _curve(label: str, seeds: "list[SeedRun]", column: str, scale: float) -> Curve:
    epochs = np.unique(np.concatenate([seed.history["epoch"] for seed in seeds]))
    values = np.full((len(seeds), len(epochs)), np.nan)
    for row, seed in zip(values, seeds, strict=True):
        row[np.searchsorted(epochs, seed.history["epoch"])] = scale * seed.history[column]
    values[~np.isfinite(values)] = np.nan
    kept = np.isfinite(values).any(axis=0)
    values = values[:, kept]
    return Curve(
        method=seeds[0].method,
        label=label,
        epochs=epochs[kept],
        mean=np.nanmean(values, axis=0),
        low=np.nanmin(values, axis=0),
        high=np.nanmax(values, axis=0),
        seeds=len(seeds),
        unfinished=seeds[0].result is None,
    )


def _last_epoch(curves: Any) -> int:
    return int(max(curve.epochs[-1] for curve in curves))


def _draw(axes: drawing.Axes, curves: Sequence[Curve], teachers: Sequence[float]) -> None:
    drawing.style(axes)
    for curve in curves:
        curve.draw(axes)
    for value in teachers:
        axes.axhline(value, **_TEACHER)


def _enlarge(
    axes: drawing.Axes, curves: Sequence[Curve], lines: Sequence[float], last: int
) -> None:
    """Sets the limits to the last epochs, and to the values there."""
    first = last - max(last // 8, 5)
    drawing.count_axis(axes, first, last, most=4)
    axes.set_title("the last epochs", fontsize=drawing.SIZE - 1, color=drawing.INK, loc="left")
    values = np.concatenate(
        [part[curve.epochs >= first] for curve in curves for part in (curve.low, curve.high)]
    )
    if not len(values):
        return
    low, high = values.min(), values.max()
    near = max(1.5 * (high - low), 4.0)
    for line in lines:
        if low - near < line < high + near:
            low, high = min(low, line), max(high, line)
    room = 0.08 * (high - low) or 0.05 * abs(high) or 0.1
    axes.set_ylim(low - room, high + room)
    axes.locator_params(axis="y", nbins=6, steps=[1, 2, 5, 10])
