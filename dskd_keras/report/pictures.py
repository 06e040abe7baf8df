"""The pictures of a run, each as the bytes of a PNG file."""

import numpy as np
from matplotlib.colors import PowerNorm
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import MaxNLocator

from dskd_keras.report import drawing

# Okabe and Ito's colours, which the colour-blind can tell apart; the styles tell as much in grey.
_BLUE, _ORANGE, _GREEN, _PURPLE, _SKY, _VERMILLION = (
    "#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00",
)  # fmt: skip
_METHODS = {
    "dskd": (_BLUE, "-"),
    "kd": (_VERMILLION, (0, (6, 2))),
    "ce": (_GREEN, (0, (5, 1.5, 1.2, 1.5))),
}
_LAYERS = (
    (_BLUE, "-"), (_ORANGE, (0, (6, 2))), (_GREEN, (0, (2, 1.2))), (_PURPLE, (0, (7, 2, 1.5, 2))),
    (_SKY, "-"), (_VERMILLION, (0, (6, 2))),
)  # fmt: skip
_MARKERS = ("o", "s", "^", "D", "v", "P")

# Few epochs are points; many are a line.
_MOST_MARKERS = 15
# From here on the end of the training, where methods differ by a point or less, is enlarged.
_ENLARGED_FROM = 40
# More classes have no room for their names beside the matrix.
MOST_NAMED_CLASSES = 20
_MOST_COUNTED_CLASSES = 12
_MOST_PAIRS = 15


def learning_curves(run):
    """Draws accuracy and training loss of all methods of a run folder by epoch.

    Methods with several finished seeds show their mean, in a band from the lowest to the highest;
    unfinished runs have a line of their own.

    Args:
        run: A `folders.Run`.

    Returns:
        The PNG; None if no epoch is finished yet.
    """
    rows = [
        (column, scale, curves, label)
        for column, scale, label in (
            ("val_accuracy", 100, f"accuracy on the\n{held_out(run)} (%)"),
            ("loss", 1, "training loss\n(whole objective)"),
        )
        if (curves := _curves(run, column, scale))
    ]
    if not rows:
        return None
    last = max(curve["epochs"][-1] for _, _, curves, _ in rows for curve in curves)
    enlarged = last >= _ENLARGED_FROM
    figure = drawing.new_figure(8.6, 0.7 + 2.9 * len(rows))
    grid = figure.add_gridspec(len(rows), 2, width_ratios=[2.2, 1])
    teachers = [100 * teacher.test_accuracy for teacher in run.teachers()]
    ends = {}
    for row, (column, scale, curves, label) in enumerate(rows):
        lines = teachers if column == "val_accuracy" else []
        # Losses of methods differ in their terms: only of accuracies do small differences count.
        panels = [figure.add_subplot(grid[row, 0] if enlarged and scale == 100 else grid[row, :])]
        if enlarged and scale == 100:
            panels.append(figure.add_subplot(grid[row, 1]))
        for axes in panels:
            drawing.style(axes)
            for curve in curves:
                _draw(axes, curve)
            for value in lines:
                axes.axhline(value, color=drawing.INK, linestyle=":", linewidth=1.6)
        panels[0].set_ylabel(label, fontsize=drawing.SIZE, color=drawing.INK)
        for axes in panels:
            drawing.epoch_axis(axes, 1, last, label=row == len(rows) - 1)
        drawing.value_axis(panels[0], [curve["mean"] for curve in curves] + [lines], scale)
        if len(panels) > 1:
            first = last - max(int(last) // 8, 5)
            drawing.epoch_axis(panels[1], first, last, label=row == len(rows) - 1, most=4)
            _enlarge(panels[1], curves, lines, first)
            panels[1].set_title(
                "the last epochs", fontsize=drawing.SIZE - 1, color=drawing.INK, loc="left"
            )
        digits = 2 if scale == 100 else None
        ends[panels[-1]] = [
            (
                curve["mean"][-1],
                f"{curve['method']} {drawing.number(curve['mean'][-1], digits)}",
                curve["colour"],
            )
            for curve in curves
            if curve["epochs"][-1] == last
        ]
        ends[panels[-1]] += [
            (value, f"teacher {drawing.number(value, 2)}", drawing.INK) for value in lines
        ]
    handles = [_handle(curve) for curve in rows[0][2]]
    handles += [
        _teacher_handle(f"teacher {drawing.short(teacher.model, 24)}, after its last epoch")
        for teacher in run.teachers()
    ]
    if any(curve["band"] for curve in rows[0][2]):
        handles.append(Patch(color="#bbbbbb", label="from the lowest to the highest seed"))
    drawing.legend(figure, handles, columns=2)
    drawing.label_ends(figure, ends)
    return drawing.to_png(figure)


def compared_curves(runs):
    """Draws the accuracies of several run folders by epoch, a panel for each.

    Args:
        runs: `folders.Run` objects.

    Returns:
        The PNG; None if no epoch of any is finished yet.
    """
    runs = [(run, curves) for run in runs if (curves := _curves(run, "val_accuracy", 100))]
    if not runs:
        return None
    columns = min(len(runs), 3)
    rows = -(-len(runs) // columns)
    # Accuracies of the same images are to be compared from panel to panel.
    same = len({run.seeds[0].dataset for run, _ in runs}) == 1
    figure = drawing.new_figure(1.2 + 3.1 * columns, 0.7 + 2.7 * rows)
    panels = figure.subplots(rows, columns, squeeze=False, sharey=same).flatten()
    everything = []
    for axes, (run, curves) in zip(panels, runs, strict=False):
        drawing.style(axes)
        teachers = [100 * teacher.test_accuracy for teacher in run.teachers()]
        for curve in curves:
            _draw(axes, curve)
        for value in teachers:
            axes.axhline(value, color=drawing.INK, linestyle=":", linewidth=1.6)
        values = [curve["mean"] for curve in curves] + [teachers]
        everything += values
        last = max(curve["epochs"][-1] for curve in curves)
        drawing.epoch_axis(axes, 1, last)
        drawing.value_axis(axes, everything if same else values, 100)
        axes.set_title(
            drawing.short(run.name, 30),
            fontsize=drawing.SIZE,
            color=drawing.INK,
            loc="left",
            parse_math=False,
        )
        axes.tick_params(labelleft=True)
    ends = {}
    for position, (axes, (run, curves)) in enumerate(zip(panels, runs, strict=False)):
        if position % columns == 0:
            axes.set_ylabel(
                f"accuracy on the\n{held_out(run)} (%)", fontsize=drawing.SIZE, color=drawing.INK
            )
        last = max(curve["epochs"][-1] for curve in curves)
        ends[axes] = [
            (curve["mean"][-1], drawing.number(curve["mean"][-1], 1), curve["colour"])
            for curve in curves
            if curve["epochs"][-1] == last
        ]
        for teacher in run.teachers():
            value = 100 * teacher.test_accuracy
            ends[axes].append((value, drawing.number(value, 1), drawing.INK))
    for axes in panels[len(runs) :]:
        axes.set_axis_off()
    present = {seed.method for run, _ in runs for seed in run.seeds}
    handles = [
        Line2D([], [], color=colour, linestyle=style, linewidth=2, label=method)
        for method, (colour, style) in _METHODS.items()
        if method in present
    ]
    if any(run.teachers() for run, _ in runs):
        handles.append(_teacher_handle("teacher"))
    if any(curve["unfinished"] for _, curves in runs for curve in curves):
        handles.append(
            Line2D([], [], color=drawing.INK, linewidth=1, marker="x", label="unfinished")
        )
    drawing.legend(figure, handles, columns=5)
    drawing.label_ends(figure, ends)
    return drawing.to_png(figure)


def layer_weights(seed):
    """Draws how the shallow layers share the two deep terms, by epoch.

    Args:
        seed: A `folders.SeedRun`.

    Returns:
        The PNG; None if the run logged no allocation.
    """
    figure, panels = _layer_panels(
        seed,
        ("deep_prediction_allocation", "weight of each layer's class-prediction loss (%)"),
        ("deep_feature_allocation", "weight of each layer's feature-map loss (%)"),
    )
    if not panels:
        return None
    epochs = seed.history["epoch"]
    *_, last = panels
    ends = {}
    for axes, layers in panels.items():
        axes.grid(False)
        shares = 100 * np.array(list(layers.values()))
        tops = np.cumsum(np.nan_to_num(shares), axis=0)
        # Each epoch is a step as wide as itself: one alone can be seen, too.
        edges = np.append(epochs - 0.5, epochs[-1] + 0.5)
        ends[axes] = []
        for position, name in enumerate(drawing.short_all(list(layers), 26)):
            colour, _ = _LAYERS[position % len(_LAYERS)]
            base = tops[position - 1] if position else np.zeros(len(epochs))
            axes.stairs(tops[position], edges, baseline=base, fill=True, color=colour, alpha=0.75)
            axes.stairs(tops[position], edges, baseline=None, color="white", linewidth=1)
            share = shares[position][np.isfinite(shares[position])][-1]
            ends[axes].append(
                ((base[-1] + tops[position, -1]) / 2, f"{name} {share:.0f} %", colour)
            )
        for part in range(1, len(layers)):
            axes.axhline(100 * part / len(layers), color=drawing.INK, linestyle=":", linewidth=1)
        axes.set_ylim(0, 100)
        axes.yaxis.set_major_locator(MaxNLocator(5))
        drawing.epoch_axis(axes, edges[0], edges[-1], label=axes is last, margin=0)
    if max(map(len, panels.values())) > 1:
        drawing.legend(
            figure,
            [Line2D([], [], color=drawing.INK, linestyle=":", linewidth=1, label="equal weights")],
            columns=1,
        )
    drawing.label_ends(figure, ends)
    return drawing.to_png(figure)


def layer_losses(seed):
    """Draws both kinds of losses of the shallow layers, by epoch.

    Args:
        seed: A `folders.SeedRun`.

    Returns:
        The PNG; None if the run logged no such loss.
    """
    figure, panels = _layer_panels(
        seed,
        ("deep_prediction_loss", "class predictions: divergence from the teacher (nats · τ²)"),
        ("deep_feature_loss", "feature maps: mean squared difference from the teacher"),
    )
    if not panels:
        return None
    epochs = seed.history["epoch"]
    *_, last = panels
    ends = {}
    for axes, layers in panels.items():
        ends[axes] = []
        names = drawing.short_all(list(layers), 26)
        for position, (name, values) in enumerate(zip(names, layers.values(), strict=True)):
            finite = np.isfinite(values)
            colour, style = _LAYERS[position % len(_LAYERS)]
            axes.plot(
                epochs[finite], values[finite], color=colour, linestyle=style, linewidth=2,
                marker=_marker(finite.sum(), position), markersize=5,
            )  # fmt: skip
            end = values[finite][-1]
            ends[axes].append((end, f"{name} {drawing.number(end)}", colour))
        drawing.value_axis(axes, list(layers.values()), 1)
        drawing.epoch_axis(axes, 1, epochs[-1], label=axes is last)
    drawing.label_ends(figure, ends)
    return drawing.to_png(figure)


def _layer_panels(seed, *quantities):
    """Returns a figure and `{axes: {layer: values}}`, empty if the run logged none of them.

    Args:
        seed: A `folders.SeedRun`.
        *quantities: `(column, title)` of each panel.
    """
    kinds = [(layers, title) for name, title in quantities if (layers := seed.layers(name))]
    if not kinds:
        return None, {}
    figure = drawing.new_figure(7.6, 0.5 + 2.5 * len(kinds))
    panels = figure.subplots(len(kinds), 1, squeeze=False)[:, 0]
    for axes, (_, title) in zip(panels, kinds, strict=True):
        drawing.style(axes)
        axes.set_title(title, fontsize=drawing.SIZE, color=drawing.INK, loc="left")
    return figure, {axes: layers for axes, (layers, _) in zip(panels, kinds, strict=True)}


def confusion(matrix):
    """Draws a confusion matrix, each row as shares of its true class.

    Args:
        matrix: A `folders.Confusion`.

    Returns:
        The PNG. With more classes than can be named beside it, it names the most confused pairs.
    """
    classes = len(matrix.names)
    totals = matrix.counts.sum(axis=1, keepdims=True)
    shares = 100 * matrix.counts / np.maximum(totals, 1)
    named = classes <= MOST_NAMED_CLASSES
    pairs = [] if named else matrix.pairs(_MOST_PAIRS)
    if named:
        side = max(4.2, 1.8 + 0.36 * classes)
        figure = drawing.new_figure(side + 1.4, side + 0.4)
        axes = figure.subplots()
    else:
        figure = drawing.new_figure(11.4, 5.4)
        axes, bars = figure.subplots(1, 2, width_ratios=[1.75, 1])
    # The root brings out what is rare: next to the diagonal all errors would look alike.
    image = axes.imshow(
        np.ma.masked_equal(shares, 0),
        cmap="magma_r",
        norm=PowerNorm(0.5, 0, 100),
        interpolation="nearest",
        aspect="equal",
    )
    axes.tick_params(labelsize=drawing.SIZE - 1, colors=drawing.INK, length=0 if named else 3)
    for spine in axes.spines.values():
        spine.set_color("#888888")
    if named:
        names = drawing.short_all(matrix.names, 18)
        places = range(classes)
        flat = max(map(len, names)) <= 3
        axes.set_xticks(
            places, names, parse_math=False, rotation=0 if flat else 45,
            ha="center" if flat else "right", rotation_mode="anchor",
        )  # fmt: skip
        axes.set_yticks(places, names, parse_math=False)
    else:
        ticks = [0, *(tick - 1 for tick in _round_ticks(classes)), classes - 1]
        for axis in (axes.xaxis, axes.yaxis):
            axis.set_ticks(ticks, [str(tick + 1) for tick in ticks])
    unit = "" if named else f" (1 to {classes})"
    axes.set_xlabel(f"predicted class{unit}", fontsize=drawing.SIZE, color=drawing.INK)
    axes.set_ylabel(f"true class{unit}", fontsize=drawing.SIZE, color=drawing.INK)
    accuracy = matrix.counts.trace() / max(matrix.counts.sum(), 1)
    axes.set_title(
        f"{100 * accuracy:.2f} % of {matrix.counts.sum():,} test images are right",
        fontsize=drawing.SIZE, color=drawing.INK, loc="left",
    )  # fmt: skip
    if classes <= _MOST_COUNTED_CLASSES:
        for (true, predicted), count in np.ndenumerate(matrix.counts):
            if count:
                axes.text(
                    predicted, true, f"{count:,}", ha="center", va="center",
                    fontsize=drawing.SIZE - 2,
                    color="white" if shares[true, predicted] > 25 else drawing.INK,
                )  # fmt: skip
    bar = figure.colorbar(image, ax=axes, shrink=0.8, pad=0.02)
    bar.set_ticks([0, 1, 5, 10, 25, 50, 75, 100])
    bar.set_label("share of the true class (%)", fontsize=drawing.SIZE - 1, color=drawing.INK)
    bar.ax.tick_params(labelsize=drawing.SIZE - 1, colors=drawing.INK)
    bar.outline.set_edgecolor("#888888")
    if not named:
        _draw_pairs(bars, pairs)
    return drawing.to_png(figure)


def held_out(run):
    """Says on which images the accuracies by epoch were measured."""
    kinds = {bool(seed.config.get("validation_fraction")) for seed in run.seeds}
    names = {False: "test images", True: "validation images"}
    return " or ".join(names[kind] for kind in sorted(kinds))


def _draw_pairs(axes, pairs):
    axes.set_title(
        "most confused: true → predicted", fontsize=drawing.SIZE, color=drawing.INK, loc="left"
    )
    if not pairs:
        axes.set_axis_off()
        axes.text(
            0,
            0.95,
            "none",
            transform=axes.transAxes,
            va="top",
            fontsize=drawing.SIZE,
            color=drawing.INK,
        )
        return
    drawing.style(axes)
    axes.grid(False)
    axes.grid(True, axis="x", color=drawing.FAINT, linewidth=0.8)
    counts = [count for _, _, count, _ in pairs]
    places = np.arange(len(pairs))
    axes.barh(places, counts, color=_BLUE, height=0.7)
    names = sorted({name for true, predicted, _, _ in pairs for name in (true, predicted)})
    short = dict(zip(names, drawing.short_all(names, 18), strict=True))
    axes.set_yticks(
        places, [f"{short[true]} → {short[predicted]}" for true, predicted, _, _ in pairs],
        parse_math=False, fontsize=drawing.SIZE - 1,
    )  # fmt: skip
    axes.set_ylim(max(len(pairs), 8) - 0.4, -0.6)
    axes.tick_params(axis="y", length=0)
    axes.set_xlim(0, max(counts) * 1.3)
    axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))
    axes.set_xlabel("test images", fontsize=drawing.SIZE, color=drawing.INK)
    for place, (_, _, count, total) in zip(places, pairs, strict=True):
        axes.text(
            count + max(counts) * 0.02, place, f"{count} of {total}", va="center",
            fontsize=drawing.SIZE - 2, color=drawing.INK,
        )  # fmt: skip


def _round_ticks(classes):
    step = next(step for step in (10, 20, 50, 100, 200, 500, 10**9) if classes / step <= 6)
    # The last class is a tick of its own.
    return [tick for tick in range(step, classes, step) if classes - tick > step / 3]


def _curves(run, column, scale):
    """Returns what to draw of a column: a dict for each line."""
    curves = []
    for method, seeds in run.by_method().items():
        colour, style = _METHODS[method]
        known = [seed for seed in seeds if np.isfinite(seed.history.get(column, [])).any()]
        finished = [seed for seed in known if seed.result is not None]
        if finished:
            epochs = np.unique(np.concatenate([seed.history["epoch"] for seed in finished]))
            values = np.full((len(finished), len(epochs)), np.nan)
            for row, seed in zip(values, finished, strict=True):
                row[np.searchsorted(epochs, seed.history["epoch"])] = seed.history[column]
            finite = np.isfinite(values)
            kept = finite.any(axis=0)
            epochs, values, finite = epochs[kept], scale * values[:, kept], finite[:, kept]
            label = f"{method} (mean of {len(finished)} seeds)" if len(finished) > 1 else method
            curves.append({
                "epochs": epochs,
                "mean": np.where(finite, values, 0).sum(axis=0) / finite.sum(axis=0),
                "low": np.where(finite, values, np.inf).min(axis=0),
                "high": np.where(finite, values, -np.inf).max(axis=0),
                "band": len(finished) > 1,
                "colour": colour, "style": style, "label": label, "method": method,
                "unfinished": False,
            })  # fmt: skip
        for seed in known:
            if seed.result is None:
                finite = np.isfinite(seed.history[column])
                total = seed.config.get("epochs")
                curves.append({
                    "epochs": seed.history["epoch"][finite],
                    "mean": scale * seed.history[column][finite],
                    "band": False, "colour": colour, "style": style, "unfinished": True,
                    "method": method, "label": f"{method} seed {seed.seed}: epoch {seed.epochs}"
                    + (f" of {total}" if total else ""),
                })  # fmt: skip
    return curves


def _draw(axes, curve):
    few = len(curve["epochs"]) <= _MOST_MARKERS
    if curve["band"]:
        if few and len(curve["epochs"]) == 1:
            axes.vlines(curve["epochs"], curve["low"], curve["high"], color=curve["colour"])
        axes.fill_between(
            curve["epochs"], curve["low"], curve["high"], color=curve["colour"], alpha=0.2,
            linewidth=0,
        )  # fmt: skip
    axes.plot(
        curve["epochs"], curve["mean"], color=curve["colour"], linestyle=curve["style"],
        linewidth=1.0 if curve["unfinished"] else 1.8, marker="o" if few else None, markersize=4,
    )  # fmt: skip
    if curve["unfinished"]:
        axes.plot(
            curve["epochs"][-1], curve["mean"][-1], marker="x", markersize=8, markeredgewidth=2,
            color=curve["colour"],
        )  # fmt: skip


def _handle(curve):
    marks = {"marker": "x", "linewidth": 1.0} if curve["unfinished"] else {"linewidth": 2}
    return Line2D(
        [], [], color=curve["colour"], linestyle=curve["style"], label=curve["label"], **marks
    )


def _teacher_handle(label):
    return Line2D([], [], color=drawing.INK, linestyle=":", linewidth=1.6, label=label)


def _enlarge(axes, curves, lines, first):
    values = np.concatenate(
        [
            curve[kind][curve["epochs"] >= first]
            for curve in curves
            for kind in (("low", "high") if curve["band"] else ("mean",))
        ]
    )
    values = values[np.isfinite(values)]
    if not len(values):
        return
    low, high = values.min(), values.max()
    near = max(1.5 * (high - low), 4.0)
    for line in lines:
        if low - near < line < high + near:
            low, high = min(low, line), max(high, line)
    room = 0.08 * (high - low) or 0.05 * abs(high) or 0.1
    axes.set_ylim(low - room, high + room)
    axes.yaxis.set_major_locator(MaxNLocator(6, steps=(1, 2, 5, 10)))


def _marker(count, position):
    return _MARKERS[position % len(_MARKERS)] if count <= _MOST_MARKERS else None
