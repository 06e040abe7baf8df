"""The pictures of the supervised layers: their losses, and how they share the deep terms."""

from typing import TYPE_CHECKING, Any

import numpy as np

from dskd_keras import drawing

if TYPE_CHECKING:
    from dskd_keras.report.reading import SeedRun

_Panels = dict[drawing.Axes, dict[str, np.ndarray]]


def allocations(seed: "SeedRun") -> bytes | None:
    """Draws how the supervised layers share the two deep terms, by epoch.

    Args:
        seed: The run.

    Returns:
        The PNG; None if the run logged no allocation.
    """
    figure, panels = _panels(
        seed,
        ("deep_prediction_allocation", "allocation of the class-prediction term to the layers (%)"),
        ("deep_feature_allocation", "allocation of the feature-map term to the layers (%)"),
    )
    if not panels:
        return None
    epochs = seed.history["epoch"]
    # Each epoch is a step as wide as itself: one alone can be seen, too.
    edges = np.append(epochs - 0.5, epochs[-1] + 0.5)
    equal: dict[str, Any] = {"color": drawing.INK, "linestyle": ":", "linewidth": 1}
    ends: drawing.Ends = {}
    for axes, layers in panels.items():
        axes.grid(False)
        shares = 100 * np.array(list(layers.values()))
        tops = np.cumsum(np.nan_to_num(shares), axis=0)
        bases = np.vstack([np.zeros(len(epochs)), tops[:-1]])
        ends[axes] = []
        for position, name in enumerate(drawing.short_all(list(layers), drawing.MOST_LETTERS)):
            colour = drawing.layer_style(position)["color"]
            axes.stairs(
                tops[position], edges, baseline=bases[position], fill=True, color=colour, alpha=0.75
            )
            axes.stairs(tops[position], edges, baseline=None, color="white", linewidth=1)
            share = shares[position][np.isfinite(shares[position])][-1]
            middle = (bases[position, -1] + tops[position, -1]) / 2
            ends[axes].append((middle, f"{name} {share:.0f} %", colour))
        for part in range(1, len(layers)):
            axes.axhline(100 * part / len(layers), **equal)
        axes.set_ylim(0, 100)
        axes.locator_params(axis="y", nbins=5)
        drawing.count_axis(axes, edges[0], edges[-1], margin=0)
    if max(map(len, panels.values())) > 1:
        drawing.legend(figure, [drawing.line_handle("equal allocation", **equal)], columns=1)
    drawing.label_ends(figure, ends)
    return drawing.to_bytes(figure)


def losses(seed: "SeedRun") -> bytes | None:
    """Draws both kinds of losses of the supervised layers, by epoch.

    Args:
        seed: The run.

    Returns:
        The PNG; None if the run logged no such loss.
    """
    figure, panels = _panels(
        seed,
        ("deep_prediction_loss", "class predictions: divergence from the teacher (nats · τ²)"),
        ("deep_feature_loss", "feature maps: mean squared difference from the teacher"),
    )
    if not panels:
        return None
    epochs = seed.history["epoch"]
    ends: drawing.Ends = {}
    for axes, layers in panels.items():
        lines = drawing.layer_lines(axes, epochs, layers)
        ends[axes] = [
            (end, f"{line.get_label()} {drawing.number(end)}", line.get_color())
            for line in lines
            for end in [float(np.asarray(line.get_ydata())[-1])]
        ]
        drawing.value_axis(axes, list(layers.values()), percent=False)
        drawing.count_axis(axes, 1, epochs[-1])
    drawing.label_ends(figure, ends)
    return drawing.to_bytes(figure)


def _panels(seed: "SeedRun", *quantities: tuple[str, str]) -> tuple[drawing.Figure, _Panels]:
    """Returns a figure and `{axes: {layer: values}}`, empty if the run logged none of them.

    Args:
        seed: The run.
        *quantities: `(column, title)` of each panel.
    """
    kinds = [(layers, title) for name, title in quantities if (layers := seed.layers(name))]
    figure = drawing.new_figure(7.6, 0.5 + 2.5 * len(kinds))
    panels: _Panels = {}
    for position, (layers, title) in enumerate(kinds):
        axes = figure.add_subplot(len(kinds), 1, position + 1)
        drawing.style(axes)
        drawing.name_axes(axes, title, x="epoch" if position == len(kinds) - 1 else "")
        panels[axes] = layers
    return figure, panels
