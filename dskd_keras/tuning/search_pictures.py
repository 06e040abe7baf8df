"""Pictures of a search: accuracy over each parameter, and over the trials."""

from collections.abc import Sequence

import numpy as np

from dskd_keras import drawing
from dskd_keras.tuning import ranking
from dskd_keras.tuning.ranking import TrialResult

_COLUMNS = 3
# Beside one another the names of choices take more room than points.
_MOST_LETTERS = 22


def parameters(rows: Sequence[TrialResult]) -> bytes | None:
    """Draws the accuracy of all trials over each parameter; None if no trial succeeded.

    The best trial is the first row, as `SearchPlan.results` returns them.
    """
    rows = [row for row in rows if row.val_accuracy is not None]
    if not rows:
        return None
    names = ranking.names(rows)
    height = -(-len(names) // _COLUMNS)
    figure = drawing.new_figure(9.2, 0.5 + 2.4 * height)
    grid = figure.add_gridspec(height, min(_COLUMNS, len(names)))
    axes = None
    for index, name in enumerate(names):
        # One scale for all, or a narrow panel would look like a strong effect.
        axes = figure.add_subplot(grid[divmod(index, _COLUMNS)], sharey=axes)
        drawing.style(axes)
        known = [row for row in rows if name in row.values]
        values = [row.values[name] for row in known]
        if isinstance(values[0], float):
            places = values
            axes.set_xscale("log")
            drawing.log_ticks(axes.xaxis, min(values), max(values), most=1.5)
        else:
            places = _choices(axes, [ranking.format_value(value) for value in values])
        accuracies = [100 * (row.val_accuracy or 0) for row in known]
        axes.scatter(
            places, accuracies, s=26, color=drawing.BLUE, alpha=0.75, linewidths=0, zorder=3
        )
        if known[0] is rows[0]:
            axes.scatter(
                places[:1], accuracies[:1], s=90, facecolors="none", edgecolors=drawing.VERMILLION,
                linewidths=2, zorder=4,
            )  # fmt: skip
        axes.locator_params(axis="y", nbins=5)
        axes.margins(0.1)
        label = "" if index % _COLUMNS else "validation\naccuracy (%)"
        drawing.name_axes(axes, x=name.replace("_", " "), y=label)
    figure.suptitle(
        f"{len(rows)} trials; the best is circled", x=0.01, ha="left",
        fontsize=drawing.SIZE, color=drawing.INK,
    )  # fmt: skip
    return drawing.to_bytes(figure)


def progress(rows: Sequence[TrialResult]) -> bytes | None:
    """Draws the accuracy of the trials in their order, and the best so far.

    Returns None if no trial succeeded.
    """
    rows = sorted(rows, key=lambda row: row.trial)
    done = [row for row in rows if row.val_accuracy is not None]
    if not done:
        return None
    figure = drawing.new_figure(7.6, 3.4)
    axes = figure.add_subplot()
    drawing.style(axes)
    places = [int(row.trial) for row in done]
    accuracies = np.array([100 * (row.val_accuracy or 0) for row in done])
    axes.step(
        places, np.maximum.accumulate(accuracies), where="post", color=drawing.VERMILLION,
        linewidth=1.8, label="best so far", zorder=2,
    )  # fmt: skip
    epochs = np.array([row.epochs or 0 for row in done], dtype=float)
    # Hyperband's trials differ in their length.
    sizes = 26 if np.ptp(epochs) == 0 else 14 + 60 * epochs / epochs.max()
    label = "a trial" if np.ptp(epochs) == 0 else "a trial (larger: more epochs)"
    axes.scatter(
        places, accuracies, s=sizes, color=drawing.BLUE, linewidths=0, label=label, zorder=3
    )
    failed = [int(row.trial) for row in rows if row.val_accuracy is None]
    if failed:
        low = axes.get_ylim()[0]
        axes.scatter(failed, [low] * len(failed), marker="x", color=drawing.INK, label="failed")
    axes.locator_params(axis="x", nbins=12, integer=True)
    axes.locator_params(axis="y", nbins=6)
    drawing.name_axes(axes, x="trial", y="validation accuracy (%)")
    drawing.legend(figure, axes.get_legend_handles_labels()[0], columns=3)
    return drawing.to_bytes(figure)


def _choices(axes: drawing.Axes, texts: Sequence[str]) -> list[int]:
    """Gives each text a place of its own, and returns the places."""
    choices = sorted(set(texts))
    axes.set_xlim(-0.6, len(choices) - 0.4)
    axes.set_xticks(
        range(len(choices)), drawing.short_all(choices, _MOST_LETTERS), rotation=20, ha="right"
    )
    return [choices.index(text) for text in texts]
