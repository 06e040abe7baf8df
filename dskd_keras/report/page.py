"""Writes the pictures of run folders and the page that shows them, one HTML file."""

import base64
import datetime
import statistics
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import jinja2
import numpy as np

from dskd_keras import files
from dskd_keras.errors import InputError
from dskd_keras.report import reading, table
from dskd_keras.report.reading import Run, SeedRun
from dskd_keras.report.run_result import by_row, known

_PAGE = "report.html"
_METHODS = ("teacher", *reading.METHODS)
# Of a student beside its teacher: how it is better.
_COSTS = {"parameters": "fewer", "weight_bytes": "smaller", "latency_ms": "faster"}

# By folder and name, the pictures that were drawn.
_Drawn = dict[tuple[Path, str], bytes]


def write(run_dirs: str | Path | Iterable[str | Path], output: str | Path | None = None) -> Path:
    """Writes the pictures and the report of run folders, from their files alone.

    `learning_curves.png` goes into each run folder, `layer_weights.png`, `layer_losses.png` and
    `confusion.png` into its `METHOD/seed-N/`, each where the run has something to show. What is
    unfinished is shown as far as it is; a damaged file is passed over, and the report says so.

    Args:
        run_dirs: Paths of run folders, or one path.
        output: Path of the HTML file, in a folder that exists. Defaults to `report.html` in the run
            folder, or in the working directory for several.

    Returns:
        The path of the HTML file.

    Raises:
        InputError: A path is no run folder, or a file can't be written.
    """
    return write_runs(reading.read_runs(run_dirs), output)


def write_runs(runs: Sequence[Run], output: str | Path | None = None) -> Path:
    """Does the work of `write` for runs that are read already."""
    if output is None:
        output = runs[0].folder / _PAGE if len(runs) == 1 else _PAGE
    output = Path(output)
    if output.is_dir():
        raise InputError(
            f"output: '{output}' is a folder. Give a file, such as '{output / _PAGE}'."
        )
    # Renaming the page to it would replace a device.
    if output.exists() and not output.is_file():
        raise InputError(f"output: '{output}' is no regular file. Give the name of one.")
    if not output.parent.is_dir():
        raise InputError(f"output: there is no folder '{output.parent}'. Make it, or give another.")
    # Matplotlib takes a second: a wrong folder is answered before.
    from dskd_keras.report import curves

    try:
        drawn: _Drawn = {}
        for run in runs:
            drawn |= _write_pictures(run)
        compared = curves.compared_curves(runs) if len(runs) > 1 else None
        files.write_text(output, _render(runs, drawn, compared))
    except OSError as error:
        raise InputError(
            f"output: can't write '{error.filename or output}': {error.strerror}."
        ) from None
    return output


def _write_pictures(run: Run) -> _Drawn:
    """Writes a run's pictures, and returns them."""
    from dskd_keras.report import confusion, curves, layers

    pictures = {(run.folder, "learning_curves"): curves.learning_curves(run)}
    for seed in run.seeds:
        pictures[seed.folder, "layer_weights"] = layers.allocations(seed)
        pictures[seed.folder, "layer_losses"] = layers.losses(seed)
        if seed.confusion is not None:
            pictures[seed.folder, "confusion"] = confusion.picture(seed.confusion)
    drawn = {place: png for place, png in pictures.items() if png is not None}
    for (folder, name), png in drawn.items():
        files.write_bytes(folder / f"{name}.png", png)
    return drawn


def _render(runs: Sequence[Run], drawn: _Drawn, compared: bytes | None) -> str:
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("dskd_keras.report", ""),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    environment.filters |= {
        "base64": lambda png: base64.b64encode(png).decode(),
        "cell": table.cell,
        "ends": _ends,
        "shares": _shares,
    }
    several = len(runs) > 1
    results = [result for run in runs for result in run.results]
    rows = [row for run in runs for row in _rows(run)]
    columns = {
        f"{run.name}: {method}" if several else method: seeds
        for run in runs
        for method, seeds in run.by_method().items()
    }
    return environment.get_template(f"{_PAGE}.jinja").render(
        runs=[_described(run, drawn) for run in runs],
        drawn=drawn,
        compared=compared,
        several=several,
        changed=_last_change(runs),
        problems=[
            f"{run.name}: {problem}" if several else problem
            for run in runs
            for problem in _problems(run)
        ],
        rows=rows,
        datasets=len({row["dataset"] for row in rows}) > 1,
        differences=any(row["difference"] for row in rows),
        fields=[
            field
            for field in ("best_accuracy", "teacher_agreement", "images_per_second")
            if known(results, field)
        ],
        caption=table.caption(results, ("test_accuracy", "teacher_agreement")),
        configuration=_configuration(columns),
        software=_software(columns),
        commands=dict.fromkeys(known(results, "command")),
    )


def _described(run: Run, drawn: _Drawn) -> dict[str, Any]:
    """Returns what the template needs of one run."""
    # What the report is about comes first and is open.
    seeds = sorted(run.seeds, key=lambda seed: -_METHODS.index(seed.method))
    return {
        "run": run,
        "summary": _summary(run),
        "layers": [seed for seed in seeds if (seed.folder, "layer_losses") in drawn],
        "heads": _heads(run),
        "costs": _costs(run),
        "matrices": [seed for seed in seeds if seed.confusion is not None],
    }


def _summary(run: Run) -> str:
    datasets = ", ".join(dict.fromkeys(seed.dataset for seed in run.seeds))
    students = ", ".join(dict.fromkeys(seed.model for seed in run.seeds))
    teachers = {teacher.model for teacher in run.teachers()} or {
        str(seed.config["teacher"])
        for seed in run.seeds
        if seed.method != "ce" and "teacher" in seed.config
    }
    pair = f"{', '.join(sorted(teachers))} → {students}" if teachers else students
    return f"{pair} on {datasets}"


def _rows(run: Run) -> list[dict[str, Any]]:
    """Returns the rows of the results' table: the results of each, and what they don't say."""
    teachers = run.teachers()
    rows: list[dict[str, Any]] = []
    for results in by_row([*teachers, *run.results]):
        difference = ""
        # Of several teachers nobody can say which one is meant.
        if results[0].method != "teacher" and len(teachers) == 1:
            accuracy = statistics.mean(known(results, "test_accuracy"))
            difference = f"{100 * (accuracy - teachers[0].test_accuracy):+.2f}".replace("-", "−")
        rows.append({
            "run": run.name, "dataset": run.seeds[0].dataset, "model": results[0].model,
            "method": results[0].method, "seeds": table.seeds(results), "results": results,
            "accuracy": table.cell(results, "test_accuracy"), "difference": difference, "state": "",
        })  # fmt: skip
    for seed in run.seeds:
        if seed.result is None:
            so_far = "" if seed.accuracy is None else f"{100 * seed.accuracy:.2f} so far"
            rows.append({
                "run": run.name, "dataset": seed.dataset, "model": seed.model,
                "method": seed.method, "seeds": seed.seed, "results": [],
                "accuracy": so_far or table.DASH, "difference": "", "state": seed.state,
            })  # fmt: skip
    return sorted(rows, key=lambda row: _METHODS.index(row["method"]))


def _heads(run: Run) -> dict[str, list[tuple[str, str, float]]]:
    """Returns, by method, the accuracies of the auxiliary heads and of the whole models."""
    tables = {}
    for method, seeds in run.by_method().items():
        results = [seed.result for seed in seeds if seed.result and seed.result.head_accuracies]
        if not results:
            continue
        accuracies = {
            f"head on {layer}": [result.head_accuracies[layer] for result in results]
            for layer in results[0].head_accuracies
            if all(layer in result.head_accuracies for result in results)
        }
        accuracies["the student itself"] = known(results, "test_accuracy")
        bars = [*accuracies.items(), *(("the teacher", [t.test_accuracy]) for t in run.teachers())]
        percents = [(label, [100 * value for value in values]) for label, values in bars]
        tables[method] = [
            (label, table.spread(values, 2), statistics.mean(values)) for label, values in percents
        ]
    return tables


def _costs(run: Run) -> list[tuple[str, list[tuple[str, str]], str]]:
    """Returns what teachers and students cost: a name, `(value, ratio)` of each, and agreement."""
    teachers = run.teachers()
    rows = []
    for results in by_row([*teachers, *run.results]):
        of_teacher = results[0].method == "teacher"
        cells = []
        for field, better in _COSTS.items():
            ratio = ""
            values, reference = known(results, field), known(teachers, field)
            if not of_teacher and len(teachers) == 1 and values and reference and any(values):
                ratio = f"{reference[0] / statistics.mean(values):.2g}× {better}"
            cells.append((table.cell(results, field), ratio))
        model, method = results[0].model, results[0].method
        label = f"teacher {model}" if of_teacher else f"{model}, {method}"
        rows.append((label, cells, table.cell(results, "teacher_agreement")))
    return rows


def _configuration(columns: dict[str, list[SeedRun]]) -> dict[str, Any]:
    """Returns the fields of all configurations, those that differ apart from the rest."""
    columns = {name: [seed for seed in seeds if seed.config] for name, seeds in columns.items()}
    columns = {name: seeds for name, seeds in columns.items() if seeds}
    fields = dict.fromkeys(f for seeds in columns.values() for seed in seeds for f in seed.config)
    rows = {field: [_setting(field, seeds) for seeds in columns.values()] for field in fields}
    return {
        "columns": list(columns),
        "differing": {field: cells for field, cells in rows.items() if len(set(cells)) > 1},
        "same": {field: cells[0] for field, cells in rows.items() if len(set(cells)) == 1},
    }


def _setting(field: str, seeds: Sequence[SeedRun]) -> str:
    if field == "seeds":
        return " ".join(str(seed.seed) for seed in seeds)
    values = {seed.seed: _plain(seed.config.get(field)) for seed in seeds}
    if len(set(values.values())) == 1:
        return next(iter(values.values()))
    return "; ".join(f"seed {seed}: {value}" for seed, value in values.items())


def _plain(value: Any) -> str:
    if isinstance(value, list):
        return ", ".join(map(str, value)) or "none"
    if value is None or isinstance(value, bool):
        return {None: table.DASH, True: "yes", False: "no"}[value]
    return str(value)


def _problems(run: Run) -> list[str]:
    problems = [problem for seed in run.seeds for problem in seed.problems]
    for method, seeds in run.by_method().items():
        configs = [seed.config for seed in seeds if seed.config]
        differing = [
            field
            for field in (configs[0] if configs else ())
            if field != "seeds" and any(c.get(field) != configs[0][field] for c in configs)
        ]
        if differing:
            problems.append(
                f"The seeds of {method} were configured differently ({', '.join(differing)}): "
                "their mean and spread say little."
            )
    return problems


def _software(columns: dict[str, list[SeedRun]]) -> dict[tuple[str, str], dict[str, None]]:
    """Returns the columns that were computed by the same backend and packages."""
    names: dict[tuple[str, str], dict[str, None]] = {}
    for name, seeds in columns.items():
        for result in (seed.result for seed in seeds if seed.result is not None):
            packages = ", ".join(f"{key} {value}" for key, value in result.versions.items())
            same = names.setdefault((result.backend or table.DASH, packages or table.DASH), {})
            same[name] = None
    return names


def _last_change(runs: Sequence[Run]) -> str:
    times = [
        path.stat().st_mtime
        for run in runs
        for seed in run.seeds
        for name in ("config.yaml", "history.csv", "metrics.json")
        if (path := seed.folder / name).exists()
    ]
    if not times:
        return table.DASH
    return f"{datetime.datetime.fromtimestamp(max(times), datetime.UTC):%Y-%m-%d %H:%M} UTC"


def _ends(runs: Sequence[Run]) -> str:
    """Says how each run ended, for those who can't see the pictures."""
    return "; ".join(
        f"{f'{run.name}: ' if len(runs) > 1 else ''}{seed.method} seed {seed.seed} "
        f"{100 * seed.accuracy:.2f} % ({seed.state})"
        for run in runs
        for seed in run.seeds
        if seed.accuracy is not None
    )


def _shares(seed: SeedRun) -> str:
    """Says how the layers shared the deep terms at the end, for those who can't see it."""
    return "; ".join(
        f"{label} at the end: "
        + ", ".join(
            f"{layer} {100 * values[np.isfinite(values)][-1]:.0f} %"
            for layer, values in layers.items()
        )
        for kind, label in (("prediction", "class predictions"), ("feature", "feature maps"))
        if (layers := seed.layers(f"deep_{kind}_allocation"))
    )
