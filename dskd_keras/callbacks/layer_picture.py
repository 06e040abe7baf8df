"""The picture of what `LayerWeightLogger` recorded."""

from collections.abc import Mapping

import numpy as np

from dskd_keras import drawing

_KINDS = {"prediction": "class predictions", "feature": "feature maps"}

# More points than this are averaged in blocks: a picture has no room for them.
_POINTS = 300


def picture(steps: np.ndarray, terms: Mapping[str, np.ndarray], format: str) -> bytes:
    """Draws the allocations and losses of the layers over the steps, the first of which is 1.

    `terms` holds `[N]` values by their names in `Distiller.step_terms`, `format` is such as "png".
    """
    # Blocks of one size, or the noise would change along the line.
    size = -(-len(steps) // _POINTS)
    steps = _block_means(steps, size)
    kinds = [
        kind for kind in _KINDS if any(name.startswith(f"deep_{kind}_loss/") for name in terms)
    ]
    figure = drawing.new_figure(9, 0.8 + 2.6 * len(kinds))
    grid = figure.subplots(len(kinds), 2, sharex=True, squeeze=False)
    handles: dict[str, drawing.Line2D] = {}
    for row, kind in zip(grid, kinds, strict=True):
        for axes, quantity in zip(row, ("allocation", "loss"), strict=True):
            start = f"deep_{kind}_{quantity}/"
            layers = {
                name.removeprefix(start): _block_means(values, size)
                for name, values in terms.items()
                if name.startswith(start)
            }
            drawing.style(axes)
            drawing.name_axes(axes, f"{_KINDS[kind]}: {quantity}")
            lines = drawing.layer_lines(axes, steps, layers)
            handles |= dict(zip(layers, lines, strict=True))
            if quantity == "allocation":
                equal = 1 / len(layers)
                axes.axhline(equal, **drawing.EQUAL)
                # Tiny differences shouldn't fill the axes.
                low, high = axes.get_ylim()
                axes.set_ylim(min(low, equal - 0.05), max(high, equal + 0.05))
            else:
                drawing.value_axis(axes, layers.values(), percent=False)
            drawing.count_axis(axes, steps[0], steps[-1])
    means = f" (a point is the mean of {size} records)" if size > 1 else ""
    figure.supxlabel(f"training step{means}", fontsize=drawing.SIZE, color=drawing.INK)
    equal_handle = drawing.line_handle("equal allocation", **drawing.EQUAL)
    drawing.legend(figure, [*handles.values(), equal_handle], columns=min(len(handles) + 1, 5))
    return drawing.to_bytes(figure, format)


def _block_means(values: np.ndarray, size: int) -> np.ndarray:
    return np.array([block.mean() for block in np.split(values, range(size, len(values), size))])
