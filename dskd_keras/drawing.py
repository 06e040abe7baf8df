"""Figures without pyplot: their colours, style, axes, labels and files.

Everything is set on the figures themselves: matplotlib's global settings are not touched, so a
program that draws pictures of its own is not disturbed. Other modules take matplotlib from here,
where the error for its absence is raised.
"""

import io
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from dskd_keras.errors import missing_package, wrong

try:
    from matplotlib.axes import Axes
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.colors import PowerNorm as PowerNorm
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine
    from matplotlib.lines import Line2D
    from matplotlib.ticker import LogLocator, MaxNLocator, NullFormatter, NullLocator
except ModuleNotFoundError:
    raise missing_package("picture", "matplotlib", "train") from None

# Okabe and Ito's colours, which the colour-blind can tell apart, without the pale yellow.
BLUE, ORANGE, GREEN, PURPLE, SKY, VERMILLION, BLACK = (
    "#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#000000",
)  # fmt: skip
INK, FAINT, EDGE = "#222222", "#dddddd", "#888888"
# Of lines, which tell as much in grey: the number of dashes and the pauses between them, in points.
SOLID, DASHED, DOTTED, DASH_DOTTED = "-", (0, (6, 2)), (0, (2, 1.2)), (0, (7, 2, 1.5, 2))

# Layers are told apart by all three. Their numbers share no divisor, so that pairs repeat late.
_COLOURS = (BLUE, ORANGE, GREEN, PURPLE, SKY, VERMILLION, BLACK)
_STYLES = (SOLID, DASHED, DOTTED, DASH_DOTTED)
_MARKERS = ("o", "s", "^", "D", "v")
# Of the line at which all layers have the same.
EQUAL: dict[str, Any] = {"color": INK, "linestyle": ":", "linewidth": 1}

# Of the text, in points.
SIZE = 10
# Few values are points; many are a line.
MOST_MARKERS = 15
# Of a layer's name.
MOST_LETTERS = 26
_DPI = 150

# For each axes, `(value, text, colour)` of each line.
Ends = dict[Axes, list[tuple[float, str, Any]]]


def check_format(field: str, path: Path) -> None:
    """Raises `InputError` unless the path's ending is a format that matplotlib writes."""
    formats = Figure().canvas.get_supported_filetypes()
    if path.suffix[1:] not in formats:
        rule = f"a path that ends in one of matplotlib's formats: {', '.join(sorted(formats))}"
        raise wrong(field, str(path), rule)


def new_figure(width: float, height: float) -> Figure:
    """Returns an empty figure, its size in inches."""
    layout = ConstrainedLayoutEngine(w_pad=0.08, h_pad=0.06)
    figure = Figure(figsize=(width, height), dpi=_DPI, facecolor="white", layout=layout)
    FigureCanvasAgg(figure)
    return figure


def style(axes: Axes) -> None:
    """Takes away what distracts from the data."""
    axes.set_facecolor("white")
    axes.grid(True, color=FAINT, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["bottom", "left"]].set_color(EDGE)
    axes.tick_params(labelsize=SIZE - 1, colors=INK, which="both")


def name_axes(axes: Axes, title: str = "", x: str = "", y: str = "") -> None:
    """Writes the title of axes and the names of what they show."""
    text: dict[str, Any] = {"fontsize": SIZE, "color": INK, "parse_math": False}
    if title:
        axes.set_title(title, loc="left", **text)
    if x:
        axes.set_xlabel(x, **text)
    if y:
        axes.set_ylabel(y, **text)


def count_axis(
    axes: Axes, first: float, last: float, margin: float | None = None, most: int = 6
) -> None:
    """Sets the limits of epochs or steps, with `margin` left and right, and `most` whole ticks."""
    room = max((last - first) * 0.015, 0.5 if last == first else 0.1) if margin is None else margin
    axes.set_xlim(first - room, last + room)
    axes.xaxis.set_major_locator(
        MaxNLocator(most, integer=True, min_n_ticks=1, steps=(1, 2, 5, 10))
    )


def value_axis(axes: Axes, series: Iterable[Any], percent: bool) -> None:
    """Sets the limits for percentages, or for losses, which may differ by orders.

    Values in the arrays of `series` that are not finite are passed over.
    """
    values = np.concatenate([np.asarray(part, dtype=float).ravel() for part in series])
    values = values[np.isfinite(values)]
    if not len(values):
        return
    low, high = values.min(), values.max()
    if percent:
        room = max(0.06 * (high - low), 2.0)
        axes.set_ylim(max(low - room, -1.0), min(high + room, 101.0))
    elif low > 0 and high / low > 8:
        axes.set_yscale("log")
        axes.set_ylim(low / 1.2, high * 1.2)
        log_ticks(axes.yaxis, low, high)
        axes.yaxis.set_minor_locator(NullLocator())
        return
    else:
        room = 0.08 * (high - low) or 0.1 * abs(high) or 0.1
        axes.set_ylim(low - room if low < 0 else max(low - room, 0), high + room)
    axes.yaxis.set_major_locator(MaxNLocator(6, steps=(1, 2, 5, 10)))


def log_ticks(axis: Any, low: float, high: float, most: float = 2.5) -> None:
    """Sets the ticks of a logarithmic axis at 1, 2 and 5; over more decades at powers of ten."""
    decades = np.log10(high / low)
    axis.set_major_locator(LogLocator(subs=(1, 2, 5) if decades < most else (1,)))
    axis.set_major_formatter(lambda value, _: f"{value:g}")
    axis.set_minor_formatter(NullFormatter())


def layer_colour(position: int) -> str:
    """Returns the colour of a layer, the shallowest at position 0."""
    return _COLOURS[position % len(_COLOURS)]


def layer_lines(axes: Axes, places: np.ndarray, layers: Mapping[str, np.ndarray]) -> list[Line2D]:
    """Draws a line of the finite values of each layer, labelled with its name, shortened.

    Few values are points, too.
    """
    lines = []
    names = short_all(list(layers), MOST_LETTERS)
    for position, (name, values) in enumerate(zip(names, layers.values(), strict=True)):
        finite = np.isfinite(values)
        few = finite.sum() <= MOST_MARKERS
        lines += axes.plot(
            places[finite], values[finite], linewidth=1.8, markersize=5, label=name,
            color=layer_colour(position), linestyle=_STYLES[position % len(_STYLES)],
            marker=_MARKERS[position % len(_MARKERS)] if few else None,
        )  # fmt: skip
    return lines


def line_handle(label: str, **options: Any) -> Line2D:
    """Returns a line for a legend."""
    return Line2D([], [], label=label, **{"color": INK, **options})


def label_ends(figure: Figure, ends: Ends) -> None:
    """Writes labels right of the axes beside the ends of their lines, none over another.

    All else is in the figure already, and the axes have their limits.
    """
    line = {"arrowstyle": "-", "linewidth": 1.4, "shrinkA": 1, "shrinkB": 3, "relpos": (0, 0.5)}
    annotations: dict[Axes, list[Any]] = {}
    for axes, lines in ends.items():
        to_axes = axes.transData + axes.transAxes.inverted()
        low, high = axes.get_ylim()
        shown = [(value, text, colour) for value, text, colour in lines if low <= value <= high]
        annotations[axes] = [
            axes.annotate(
                text, (1, to_axes.transform((1, value))[1]), (22, 0), xycoords="axes fraction",
                textcoords="offset points", va="center", fontsize=SIZE - 1, color=INK,
                parse_math=False, annotation_clip=False, arrowprops={**line, "color": colour},
            )
            for value, text, colour in sorted(shown)
        ]  # fmt: skip
    # Once, and kept: finding the layout takes as long as drawing.
    layout: Any = figure.get_layout_engine()
    layout.execute(figure)
    figure.set_layout_engine("none")
    for axes, labels in annotations.items():
        height = axes.get_window_extent().height / figure.dpi * 72
        wanted = [label.xy[1] for label in labels]
        for label, place in zip(labels, _apart(wanted, 1.25 * (SIZE - 1) / height), strict=True):
            label.xyann = (22, (place - label.xy[1]) * height)


def _apart(places: Sequence[float], gap: float) -> np.ndarray:
    """Moves ascending places in 0 to 1 as little as needed to leave a gap between any two."""
    gaps = gap * np.arange(len(places))
    rest = np.asarray(places) - gaps
    # Without the gaps, the nearest places that don't fall: isotonic regression, by its min-max
    # formula.
    means = [[rest[i : k + 1].mean() for k in range(i, len(rest))] for i in range(len(rest))]
    nearest = [max(min(means[i][k - i :]) for i in range(k + 1)) for k in range(len(rest))]
    return np.clip(nearest, 0, max(1 - gap * (len(places) - 1), 0)) + gaps


def legend(figure: Figure, handles: Sequence[Any], columns: int) -> None:
    """Puts a legend above all axes, where it covers no data."""
    legend = figure.legend(
        handles=handles, loc="outside upper left", ncols=columns, frameon=False,
        fontsize=SIZE - 1, handlelength=3.2, labelcolor=INK,
    )  # fmt: skip
    for text in legend.get_texts():
        text.set_parse_math(False)


def number(value: float, digits: int | None = None) -> str:
    """Returns a number with a fixed number of digits, or with three that count."""
    if digits is not None:
        return f"{value:.{digits}f}"
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:#.3g}".rstrip(".")


def short(text: str, most: int) -> str:
    """Leaves out the middle of a long name: its ends tell it from others."""
    if len(text) <= most:
        return text
    head = (most - 1) // 2
    return f"{text[:head]}…{text[len(text) - (most - 1 - head) :]}"


def short_all(names: Sequence[str], most: int) -> list[str]:
    """Shortens names in the way that leaves the most of them different."""
    ways: tuple[Callable[[str], str], ...] = (
        lambda name: short(name.rpartition("/")[2], most),
        lambda name: short(name, most),
        lambda name: f"…{name[1 - most :]}",
        lambda name: f"{name[: most - 1]}…",
    )
    return max(
        ([name if len(name) <= most else way(name) for name in names] for way in ways),
        key=lambda shortened: len(set(shortened)),
    )


def to_bytes(figure: Figure, format: str = "png") -> bytes:
    """Returns the bytes of a picture's file, for a PNG the same ones for the same figure."""
    buffer = io.BytesIO()
    # The name of the program would change with its version.
    metadata: Any = {"Software": None} if format == "png" else None
    figure.savefig(buffer, format=format, metadata=metadata)
    return buffer.getvalue()
