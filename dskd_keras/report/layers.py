"""The pictures of the supervised layers: their losses, and how they share the deep terms."""

from typing import TYPE_CHECKING

import numpy as np

from dskd_keras import drawing

if TYPE_CHECKING:
    from dskd_keras.report.reading import SeedRun

_Panels = dict[drawing.Axes, dict[str, np.ndarray]]


def allocations(seed: "SeedRun") -> bytes | None:
    """Draws the allocations to the layers by epoch; None if the run logged none."""
    figure, panels = _panels(seed, {
        "deep_prediction_allocation": "allocation of the class-prediction term to the layers (%)",
        "deep_feature_allocation": "allocation of the feature-map term to the layers (%)",
    })  # fmt: skip
    if not panels:
        return None
    epochs = seed.history["epoch"]
    # Each epoch is a step as wide as itself: one alone can be seen, too.
    edges = np.append(epochs - 0.5, epochs[-1] + 0.5)
    ends: drawing.Ends = {}
    for axes, layers in panels.items():
        axes.grid(False)
        ends[axes] = []
        names = drawing.short_all(list(layers), drawing.MOST_LETTERS)
        base = np.zeros(len(epochs))
        for position, (name, values) in enumerate(zip(names, layers.values(), strict=True)):
            colour = drawing.layer_colour(position)
            top = base + 100 * np.nan_to_num(values)
            axes.stairs(top, edges, baseline=base, fill=True, color=colour, alpha=0.75)
            axes.stairs(top, edges, baseline=None, color="white", linewidth=1)
            last = np.flatnonzero(np.isfinite(values))[-1]  # the terms may end before the training
            share = f"{name} {100 * values[last]:.0f} %"
            ends[axes].append(((base[last] + top[last]) / 2, share, colour))
            base = top
        for part in range(1, len(layers)):
            axes.axhline(100 * part / len(layers), **drawing.EQUAL)
        axes.set_ylim(0, 100)
        axes.locator_params(axis="y", nbins=5)
        drawing.count_axis(axes, edges[0], edges[-1], margin=0)
    if max(map(len, panels.values())) > 1:
        equal = drawing.line_handle("equal allocation", **drawing.EQUAL)
        drawing.legend(figure, [equal], columns=1)
    drawing.label_ends(figure, ends)
    return drawing.to_bytes(figure)


def losses(seed: "SeedRun") -> bytes | None:
    """Draws both kinds of losses of the layers by epoch; None if the run logged none."""
    figure, panels = _panels(seed, {
        "deep_prediction_loss": "class predictions: divergence from the teacher (nats · τ²)",
        "deep_feature_loss": "feature maps: mean squared difference from the teacher",
    })  # fmt: skip
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
        drawing.value_axis(axes, layers.values(), percent=False)
        drawing.count_axis(axes, 1, epochs[-1])
    drawing.label_ends(figure, ends)
    return drawing.to_bytes(figure)


def _panels(seed: "SeedRun", titles: dict[str, str]) -> tuple[drawing.Figure, _Panels]:
    """Returns a figure and the layers by its axes, which show what the run logged of `titles`."""
    shown = {title: layers for name, title in titles.items() if (layers := seed.layers(name))}
    figure = drawing.new_figure(7.6, 0.5 + 2.5 * len(shown))
    panels: _Panels = {}
    for position, (title, layers) in enumerate(shown.items()):
        axes = figure.add_subplot(len(shown), 1, position + 1)
        drawing.style(axes)
        drawing.name_axes(axes, title, x="epoch" if position == len(shown) - 1 else "")
        panels[axes] = layers
    return figure, panels
