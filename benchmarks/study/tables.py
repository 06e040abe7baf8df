"""Tables, pictures and JSON of a grid."""

import dataclasses
import json
from pathlib import Path

from rich import box
from rich.table import Table

from benchmarks.study import evidence, plan
from benchmarks.study.evidence import Row
from benchmarks.study.plan import Grid
from dskd_keras import files

_PICTURE_INCHES = 7.0


def table(grid: Grid, rows: list[Row]) -> Table:
    """Returns the table of a grid for a terminal, or as Markdown."""
    shown = Table(title=f"{grid.name}: {grid.about}", box=box.MARKDOWN, title_justify="left")
    shown.add_column("cell", overflow="fold")  # a name that is cut off says nothing
    for heading in _headings(grid):
        shown.add_column(heading, justify="right")
    for row in sorted(rows, key=lambda row: -row.mean):
        shown.add_row(*_values(grid, row))
    return shown


def list_of_grids(grids: list[Grid]) -> Table:
    """Returns a table of grids: how many of their cells are kept, and what they ask."""
    shown = Table(box=box.MARKDOWN)
    shown.add_column("grid", no_wrap=True)
    shown.add_column("kept", justify="right", no_wrap=True)
    shown.add_column("what it asks", overflow="fold")
    for grid in grids:
        cells = grid.all_cells()
        kept = sum(cell.kept(grid.scale).is_file() for cell in cells)
        shown.add_row(grid.name, f"{kept} of {len(cells)}", grid.about)
    return shown


def _headings(grid: Grid) -> list[str]:
    to = f"− {grid.baseline}"
    return [
        f"{grid.measured_on}, %",
        "seeds",
        to,
        "standard error",
        "95 % interval",
        "heads, %",
        "min",
    ]


def _values(grid: Grid, row: Row) -> list[str]:
    spread = "" if row.deviation is None else f" ± {row.deviation:.2f}"
    compared = row.difference is not None and row.name != grid.baseline
    return [
        row.name,
        f"{row.mean:.2f}{spread}",
        str(len(row.accuracies)),
        f"{row.difference:+.2f}" if compared else "",
        f"{row.error:.2f}" if compared and row.error is not None else "",
        "{:+.2f} … {:+.2f}".format(*row.interval) if compared and row.interval else "",
        " ".join(f"{accuracy:.1f}" for accuracy in row.heads.values()),
        f"{row.minutes:.1f}",
    ]


def markdown(grid: Grid, rows: list[Row]) -> str:
    """Returns the table of a grid in Markdown."""
    headings = ["cell", *_headings(grid)]
    lines = [headings, ["---", *["--:"] * (len(headings) - 1)]]
    lines += [_values(grid, row) for row in sorted(rows, key=lambda row: -row.mean)]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def write(grid: Grid, rows: list[Row]) -> list[Path]:
    """Writes a grid's table, picture and JSON beside its kept cells; returns the files."""
    stem = plan.KEPT / grid.name
    paths = [stem.with_suffix(suffix) for suffix in (".md", ".json", ".svg")]
    text, numbers, picture = paths
    command = f"python -m benchmarks.study {grid.name}"
    files.write_text(text, f"{grid.about}\n\n`{command}`\n\n{markdown(grid, rows)}")
    found = evidence.kept_cells(grid)
    made_by = [cell["metrics"] for of_name in found.values() for cell in of_name.values()]
    content = {
        "grid": grid.name,
        "about": grid.about,
        "command": command,
        "scale": grid.scale.name,
        "measured_on": grid.measured_on,
        "baseline": grid.baseline,
        "versions": _different([metrics["versions"] for metrics in made_by]),
        "rows": [dataclasses.asdict(row) for row in rows],
    }
    files.write_text(numbers, json.dumps(content, indent=1) + "\n")
    _draw(grid, rows, picture)
    return paths


def _different(values: list[dict[str, str]]) -> list[dict[str, str]]:
    return [
        json.loads(text) for text in sorted({json.dumps(value, sort_keys=True) for value in values})
    ]


def _draw(grid: Grid, rows: list[Row], path: Path) -> None:
    """Draws the differences to the baseline, one point a seed, the mean and its interval."""
    import matplotlib
    from matplotlib.figure import Figure

    matplotlib.rcParams["svg.hashsalt"] = "study"  # the same picture from the same numbers
    shown = sorted((row for row in rows if row.differences), key=lambda row: row.difference or 0.0)
    figure = Figure((_PICTURE_INCHES, 0.9 + 0.3 * len(shown)), layout="constrained")
    axes = figure.subplots()
    axes.axvline(0, color="0.6", linewidth=1)
    for place, row in enumerate(shown):
        axes.plot(row.differences, [place] * len(row.differences), "o", color="0.6", markersize=4)
        if row.interval:
            axes.plot(row.interval, [place] * 2, color="C0", linewidth=1.5)
        axes.plot(row.difference, place, "D", color="C0", markersize=5)
    axes.set_yticks(range(len(shown)), [row.name for row in shown])
    axes.set_xlabel(f"{grid.measured_on} accuracy − that of {grid.baseline}, points, same seed")
    axes.spines[["top", "right"]].set_visible(False)
    with files.written_aside(path, path.suffix) as aside:
        figure.savefig(aside, metadata={"Date": None})
