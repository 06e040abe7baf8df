"""The picture of a confusion matrix."""

from typing import TYPE_CHECKING

import numpy as np

from dskd_keras import drawing

if TYPE_CHECKING:
    from dskd_keras.report.reading import Confusion

# More classes have no room for their names beside the matrix.
_MOST_NAMED_CLASSES = 20
_MOST_COUNTED_CLASSES = 12
_MOST_PAIRS = 15
_MOST_LETTERS = 18


def picture(matrix: "Confusion") -> bytes:
    """Draws a confusion matrix, each row as shares of its true class.

    Args:
        matrix: The matrix.

    Returns:
        The PNG. With more classes than can be named beside it, it names the most confused pairs.
    """
    classes = len(matrix.names)
    named = classes <= _MOST_NAMED_CLASSES
    if named:
        side = max(4.2, 1.8 + 0.36 * classes)
        figure = drawing.new_figure(side + 1.4, side + 0.4)
        axes = figure.subplots()
    else:
        figure = drawing.new_figure(11.4, 5.4)
        axes, bars = figure.subplots(1, 2, width_ratios=[1.75, 1])
        _draw_pairs(bars, matrix.pairs(_MOST_PAIRS))
    _draw_matrix(axes, matrix)
    axes.tick_params(labelsize=drawing.SIZE - 1, colors=drawing.INK, length=0 if named else 3)
    for spine in axes.spines.values():
        spine.set_color(drawing.EDGE)
    if named:
        names = drawing.short_all(matrix.names, _MOST_LETTERS)
        flat = max(map(len, names)) <= 3
        axes.set_xticks(
            range(classes), names, parse_math=False, rotation=0 if flat else 45,
            ha="center" if flat else "right", rotation_mode="anchor",
        )  # fmt: skip
        axes.set_yticks(range(classes), names, parse_math=False)
    else:
        ticks = [0, *(tick - 1 for tick in _round_ticks(classes)), classes - 1]
        for axis in (axes.xaxis, axes.yaxis):
            axis.set_ticks(ticks, [str(tick + 1) for tick in ticks])
    accuracy = matrix.counts.trace() / max(matrix.counts.sum(), 1)
    unit = "" if named else f" (1 to {classes})"
    drawing.name_axes(
        axes,
        f"{100 * accuracy:.2f} % of {matrix.counts.sum():,} test images are right",
        x=f"predicted class{unit}",
        y=f"true class{unit}",
    )
    return drawing.to_bytes(figure)


def _draw_matrix(axes: drawing.Axes, matrix: "Confusion") -> None:
    from sklearn.metrics import ConfusionMatrixDisplay

    totals = matrix.counts.sum(axis=1, keepdims=True)
    shares = 100 * matrix.counts / np.maximum(totals, 1)
    display = ConfusionMatrixDisplay(shares).plot(
        ax=axes,
        include_values=len(shares) <= _MOST_COUNTED_CLASSES,
        cmap="magma_r",
        colorbar=False,
        # The root brings out what is rare: next to the diagonal all errors would look alike.
        im_kw={"norm": drawing.PowerNorm(0.5, 0, 100)},
        text_kw={"fontsize": drawing.SIZE - 2},
    )
    display.im_.set_data(np.ma.masked_equal(shares, 0))
    if display.text_ is not None:
        for place, count in np.ndenumerate(matrix.counts):
            # Black can be read on what the root makes of the half of it.
            colour = "white" if shares[place] > 25 else drawing.INK
            display.text_[place].set(text=f"{count:,}" if count else "", color=colour)
    bar = display.figure_.colorbar(display.im_, ax=axes, shrink=0.8, pad=0.02)
    bar.set_ticks([0, 1, 5, 10, 25, 50, 75, 100])
    bar.set_label("share of the true class (%)", fontsize=drawing.SIZE - 1, color=drawing.INK)
    bar.ax.tick_params(labelsize=drawing.SIZE - 1, colors=drawing.INK)
    bar.outline.set_edgecolor(drawing.EDGE)


def _draw_pairs(axes: drawing.Axes, pairs: list[tuple[str, str, int, int]]) -> None:
    drawing.name_axes(axes, "most confused: true → predicted", x="test images" if pairs else "")
    if not pairs:
        axes.set_axis_off()
        axes.text(
            0, 0.95, "none", transform=axes.transAxes, va="top", fontsize=drawing.SIZE,
            color=drawing.INK,
        )  # fmt: skip
        return
    drawing.style(axes)
    axes.grid(False, axis="y")
    counts = [count for _, _, count, _ in pairs]
    places = np.arange(len(pairs))
    bars = axes.barh(places, counts, color=drawing.BLUE, height=0.7)
    axes.bar_label(
        bars, [f"{count} of {total}" for _, _, count, total in pairs], padding=3,
        fontsize=drawing.SIZE - 2, color=drawing.INK,
    )  # fmt: skip
    names = sorted({name for true, predicted, _, _ in pairs for name in (true, predicted)})
    short = dict(zip(names, drawing.short_all(names, _MOST_LETTERS), strict=True))
    axes.set_yticks(
        places, [f"{short[true]} → {short[predicted]}" for true, predicted, _, _ in pairs],
        parse_math=False, fontsize=drawing.SIZE - 1,
    )  # fmt: skip
    axes.set_ylim(max(len(pairs), 8) - 0.4, -0.6)
    axes.tick_params(axis="y", length=0)
    axes.set_xlim(0, max(counts) * 1.3)
    axes.locator_params(axis="x", nbins=5, integer=True)


def _round_ticks(classes: int) -> list[int]:
    step = next(step for step in (10, 20, 50, 100, 200, 500, 10**9) if classes / step <= 6)
    # The last class is a tick of its own.
    return [tick for tick in range(step, classes, step) if classes - tick > step / 3]
