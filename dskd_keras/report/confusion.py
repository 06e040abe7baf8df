"""The picture of a confusion matrix."""

from typing import TYPE_CHECKING, Any

import numpy as np

from dskd_keras import drawing

if TYPE_CHECKING:
    from dskd_keras.report.reading import Confusion

# More classes have no room for their names beside the matrix, or for counts in its cells.
_MOST_NAMED_CLASSES = 20
_MOST_COUNTED_CLASSES = 12
_MOST_PAIRS = 15
_MOST_LETTERS = 18
_SMALL: dict[str, Any] = {"labelsize": drawing.SIZE - 1, "colors": drawing.INK}


def picture(matrix: "Confusion") -> bytes:
    """Draws a confusion matrix, each row as shares of its true class.

    With more classes than can be named beside it, it names the most confused pairs.
    """
    classes = len(matrix.names)
    if classes <= _MOST_NAMED_CLASSES:
        side = max(4.2, 1.8 + 0.36 * classes)
        figure = drawing.new_figure(side + 1.4, side + 0.4)
        axes = figure.subplots()
        unit = ""
    else:
        figure = drawing.new_figure(11.4, 5.4)
        axes, bars = figure.subplots(1, 2, width_ratios=[1.75, 1])
        _draw_pairs(bars, matrix.pairs(_MOST_PAIRS))
        unit = f" (1 to {classes})"
    _draw_matrix(axes, matrix)
    axes.tick_params(**_SMALL, length=3 if unit else 0)
    if unit:
        step = next(step for step in (10, 20, 50, 100, 200, 500, 10**9) if classes / step <= 6)
        # The last class is a tick of its own.
        inner = [tick - 1 for tick in range(step, classes, step) if classes - tick > step / 3]
        ticks = [0, *inner, classes - 1]
        for axis in (axes.xaxis, axes.yaxis):
            axis.set_ticks(ticks, [str(tick + 1) for tick in ticks])
    else:
        names = drawing.short_all(matrix.names, _MOST_LETTERS)
        turned: Any = {} if max(map(len, names)) <= 3 else {"rotation": 45, "ha": "right"}
        axes.set_xticks(range(classes), names, parse_math=False, rotation_mode="anchor", **turned)
        axes.set_yticks(range(classes), names, parse_math=False)
    accuracy = matrix.counts.trace() / max(matrix.counts.sum(), 1)
    title = f"{100 * accuracy:.2f} % of {matrix.counts.sum():,} test images are right"
    drawing.name_axes(axes, title, x=f"predicted class{unit}", y=f"true class{unit}")
    return drawing.to_bytes(figure)


def _draw_matrix(axes: drawing.Axes, matrix: "Confusion") -> None:
    counts = matrix.counts
    shares = 100 * counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
    # The root brings out what is rare: next to the diagonal all errors would look alike.
    image = axes.imshow(
        np.ma.masked_equal(shares, 0), cmap="magma_r", norm=drawing.PowerNorm(0.5, 0, 100)
    )
    if len(counts) <= _MOST_COUNTED_CLASSES:
        for true, predicted in np.argwhere(counts):
            # Black can be read on what the root makes of the half of it.
            colour = "white" if shares[true, predicted] > 25 else drawing.INK
            axes.text(
                predicted, true, f"{counts[true, predicted]:,}", color=colour, ha="center",
                va="center", fontsize=drawing.SIZE - 2,
            )  # fmt: skip
    bar = axes.figure.colorbar(image, ax=axes, shrink=0.8, pad=0.02)
    bar.set_ticks([0, 1, 5, 10, 25, 50, 75, 100])
    bar.set_label("share of the true class (%)", fontsize=drawing.SIZE - 1, color=drawing.INK)
    bar.ax.tick_params(**_SMALL)
    bar.outline.set_edgecolor(drawing.EDGE)
    axes.spines[:].set_color(drawing.EDGE)


def _draw_pairs(axes: drawing.Axes, pairs: list[tuple[str, str, int, int]]) -> None:
    drawing.name_axes(axes, "most confused: true → predicted", x="test images" if pairs else "")
    if not pairs:
        axes.set_axis_off()
        axes.text(0, 0.95, "none", va="top", fontsize=drawing.SIZE, color=drawing.INK)
        return
    drawing.style(axes)
    axes.grid(False, axis="y")
    counts = [count for _, _, count, _ in pairs]
    bars = axes.barh(range(len(pairs)), counts, color=drawing.BLUE, height=0.7)
    axes.bar_label(
        bars, [f"{count} of {total}" for _, _, count, total in pairs], padding=3,
        fontsize=drawing.SIZE - 2, color=drawing.INK,
    )  # fmt: skip
    names = sorted({name for true, predicted, _, _ in pairs for name in (true, predicted)})
    short = dict(zip(names, drawing.short_all(names, _MOST_LETTERS), strict=True))
    axes.set_yticks(
        range(len(pairs)),
        [f"{short[true]} → {short[predicted]}" for true, predicted, _, _ in pairs],
        parse_math=False, fontsize=drawing.SIZE - 1,
    )  # fmt: skip
    axes.set_ylim(max(len(pairs), 8) - 0.4, -0.6)
    axes.tick_params(axis="y", length=0)
    axes.set_xlim(0, max(counts) * 1.3)
    axes.locator_params(axis="x", nbins=5, integer=True)
