"""Figures without pyplot: their style, axes, labels and files.

Everything is set on the figures themselves: matplotlib's global settings are not touched, so a
program that draws pictures of its own is not disturbed.
"""

import io

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullLocator

INK, FAINT = "#222222", "#dddddd"
# Of the text, in points.
SIZE = 10
_DPI = 150


def new_figure(width, height):
    """Returns an empty figure, its size in inches."""
    figure = Figure(figsize=(width, height), dpi=_DPI, facecolor="white", layout="constrained")
    FigureCanvasAgg(figure)
    figure.get_layout_engine().set(w_pad=0.08, h_pad=0.06)
    return figure


def style(axes):
    """Takes away what distracts from the data."""
    axes.set_facecolor("white")
    axes.grid(True, color=FAINT, linewidth=0.8)
    axes.set_axisbelow(True)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    for side in ("bottom", "left"):
        axes.spines[side].set_color("#888888")
    axes.tick_params(labelsize=SIZE - 1, colors=INK, which="both")


def epoch_axis(axes, first, last, label=True, margin=None, most=6):
    """Sets the limits of the epochs, and whole numbers as their ticks."""
    room = max((last - first) * 0.015, 0.5 if last == first else 0.1) if margin is None else margin
    axes.set_xlim(first - room, last + room)
    axes.xaxis.set_major_locator(
        MaxNLocator(most, integer=True, min_n_ticks=1, steps=(1, 2, 5, 10))
    )
    if label:
        axes.set_xlabel("epoch", fontsize=SIZE, color=INK)


def value_axis(axes, series, scale):
    """Sets the limits for percentages (scale 100) or losses, which may differ by orders."""
    values = np.concatenate([np.asarray(part, dtype=float) for part in series])
    values = values[np.isfinite(values)]
    low, high = values.min(), values.max()
    if scale == 100:
        room = max(0.06 * (high - low), 2.0)
        axes.set_ylim(max(low - room, -1.0), min(high + room, 101.0))
        axes.yaxis.set_major_locator(MaxNLocator(6, steps=(1, 2, 5, 10)))
    elif low > 0 and high / low > 8:
        axes.set_yscale("log")
        axes.set_ylim(low / 1.2, high * 1.2)
        decades = np.log10(high / low)
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if decades < 2.5 else (1,)))
        axes.yaxis.set_minor_locator(NullLocator())
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    else:
        room = 0.08 * (high - low) or 0.1 * abs(high) or 0.1
        axes.set_ylim(low - room if low < 0 else max(low - room, 0), high + room)
        axes.yaxis.set_major_locator(MaxNLocator(6, steps=(1, 2, 5, 10)))


def label_ends(figure, ends):
    """Writes labels right of the axes beside the ends of their lines, none over another.

    Args:
        figure: The axes' figure, with everything else in it.
        ends: For each axes, which has its final limits, `(value, text, colour)` of each line.
    """
    annotations = {}
    for axes, lines in ends.items():
        to_axes = axes.transData + axes.transAxes.inverted()
        low, high = axes.get_ylim()
        annotations[axes] = [
            axes.annotate(
                text, (1, place), (22, 0), xycoords="axes fraction", textcoords="offset points",
                va="center", fontsize=SIZE - 1, color=INK, parse_math=False, annotation_clip=False,
                arrowprops={
                    "arrowstyle": "-", "color": colour, "linewidth": 1.4, "shrinkA": 1,
                    "shrinkB": 3, "relpos": (0, 0.5),
                },
            )
            for place, text, colour in sorted(
                (float(to_axes.transform((1, value))[1]), text, colour)
                for value, text, colour in lines
                if low <= value <= high
            )
        ]  # fmt: skip
    # Once, and kept: finding the layout takes as long as drawing.
    figure.get_layout_engine().execute(figure)
    figure.set_layout_engine("none")
    for axes, labels in annotations.items():
        height = axes.get_window_extent().height / figure.dpi * 72
        wanted = [label.xy[1] for label in labels]
        for label, place in zip(labels, _apart(wanted, 1.25 * (SIZE - 1) / height), strict=True):
            label.xyann = (22, (place - label.xy[1]) * height)


def _apart(places, gap):
    """Moves ascending places in 0 to 1 as little as needed to leave a gap between any two."""
    groups = []
    for place in places:
        groups.append((place, 1))
        while True:
            centre, count = groups.pop()
            reach = gap * (count - 1) / 2
            centre = max(min(centre, 1 - reach), reach)
            if not groups or centre - groups[-1][0] >= gap * (count + groups[-1][1]) / 2:
                groups.append((centre, count))
                break
            lower, below = groups.pop()
            both = count + below
            groups.append(((centre * count + lower * below) / both, both))
    return [
        centre + gap * (position - (count - 1) / 2)
        for centre, count in groups
        for position in range(count)
    ]


def legend(figure, handles, columns):
    """Puts a legend above all axes, where it covers no data."""
    legend = figure.legend(
        handles=handles, loc="outside upper left", ncols=columns, frameon=False,
        fontsize=SIZE - 1, handlelength=3.2, labelcolor=INK,
    )  # fmt: skip
    for text in legend.get_texts():
        text.set_parse_math(False)


def number(value, digits=None):
    """Returns a number with a fixed number of digits, or with three that count."""
    if digits is not None:
        return f"{value:.{digits}f}"
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:#.3g}".rstrip(".")


def short(text, most):
    """Leaves out the middle of a long name: its ends tell it from others."""
    if len(text) <= most:
        return text
    head = (most - 1) // 2
    return f"{text[:head]}…{text[len(text) - (most - 1 - head) :]}"


def short_all(names, most):
    """Shortens names in the way that leaves the most of them different."""
    ways = (
        lambda name: name if len(name) <= most else short(name.rpartition("/")[2], most),
        lambda name: short(name, most),
        lambda name: name if len(name) <= most else f"…{name[1 - most :]}",
        lambda name: name if len(name) <= most else f"{name[: most - 1]}…",
    )
    return max(([way(name) for name in names] for way in ways), key=lambda short: len(set(short)))


def to_png(figure):
    """Returns the bytes of a PNG file, the same ones for the same figure."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", metadata={"Software": None})
    return buffer.getvalue()
