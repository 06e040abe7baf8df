"""Writes the pictures of run folders and the page that shows them, one HTML file."""

import base64
import datetime
import importlib.resources
import statistics
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import jinja2
import numpy as np

from dskd_keras import files
from dskd_keras.errors import InputError
from dskd_keras.report import reading
from dskd_keras.report.reading import Run, SeedRun
from dskd_keras.report.run_result import RunResult
from dskd_keras.report.table import caption, known, mean, mebibytes, percents, spread

_TEMPLATE = "report.html.jinja"
_PAGE = "report.html"
_MOST_PAIRS = 10
_DASH = "–"

# By folder and name, the pictures that were drawn.
_Drawn = dict[tuple[Path, str], bytes]


def write(run_dirs: str | Path | Iterable[str | Path], output: str | Path | None = None) -> Path:
    """Writes the pictures and the report of run folders, from their files alone.

    `learning_curves.png` goes into each run folder, `layer_weights.png`, `layer_losses.png` and
    `confusion.png` into its `METHOD/seed-N/`, each where the run has something to show. What is
    unfinished is shown as far as it is; a damaged file is passed over, and the report says so.

    Args:
        run_dirs: Paths of run folders, or one path.
        output: Path of the HTML file; its folder is made. Defaults to `report.html` in the run
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
        output = runs[0].folder / _PAGE if len(runs) == 1 else Path(_PAGE)
    output = Path(output)
    if output.is_dir():
        raise InputError(
            f"output: '{output}' is a folder. Give a file, such as '{output / _PAGE}'."
        )
    # Matplotlib takes a second: a wrong folder is answered before.
    from dskd_keras.report import curves

    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        shown = [_write_pictures(run) for run in runs]
        compared = curves.compared_curves(runs) if len(runs) > 1 else None
        files.write_text(output, _render(runs, shown, compared))
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


def _render(runs: Sequence[Run], shown: Sequence[_Drawn], compared: bytes | None) -> str:
    template = importlib.resources.files(__package__).joinpath(_TEMPLATE)
    environment = jinja2.Environment(
        autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=jinja2.StrictUndefined
    )
    results = [seed.result for run in runs for seed in run.seeds if seed.result is not None]
    rows = [row for run in runs for row in _result_rows(run)]
    return environment.from_string(template.read_text(encoding="utf-8")).render(
        title=" · ".join(run.name for run in runs),
        several=len(runs) > 1,
        changed=_last_change(runs),
        problems=[
            f"{run.name}: {problem}" if len(runs) > 1 else problem
            for run in runs
            for problem in _problems(run)
        ],
        rows=rows,
        datasets=len({row["dataset"] for row in rows}) > 1,
        has={column: any(row[column] != _DASH for row in rows) for column in rows[0]},
        caption=caption(results) if results else [],
        compared=_picture(
            compared, "Accuracy by epoch, a panel for each run: " + "; ".join(_ends(runs))
        ),
        runs=[_described(run, png) for run, png in zip(runs, shown, strict=True)],
        configuration=_configuration(runs),
        software=_software(runs),
        commands=_commands(runs),
    )


def _described(run: Run, png: _Drawn) -> dict[str, Any]:
    """Returns what the template needs of one run."""
    labels = {seed.folder: f"{seed.method}, seed {seed.seed}" for seed in run.seeds}
    layers = []
    matrices = []
    # What the report is about comes first and is open.
    for seed in sorted(run.seeds, key=lambda seed: -reading.METHODS.index(seed.method)):
        label = labels[seed.folder]
        drawn = [
            _picture(png.get((seed.folder, name)), text)
            for name, text in (
                ("layer_weights", f"Allocation to the layers by epoch, {label}: {_shares(seed)}"),
                ("layer_losses", f"Losses of the layers by epoch, {label}"),
            )
        ]
        if any(drawn):
            layers.append(
                {"label": label, "state": seed.state, "pictures": list(filter(None, drawn))}
            )
        if seed.confusion is not None:
            pairs = seed.confusion.pairs(_MOST_PAIRS)
            matrices.append({
                "label": label,
                "pairs": [
                    (true, predicted, f"{count} of {total}", f"{100 * count / total:.1f}")
                    for true, predicted, count, total in pairs
                ],
                "picture": _picture(
                    png.get((seed.folder, "confusion")),
                    f"Confusion matrix of {len(seed.confusion.names)} classes, {label}",
                ),
            })  # fmt: skip
    return {
        "name": run.name,
        "summary": _summary(run),
        "curves": _picture(
            png.get((run.folder, "learning_curves")),
            f"Accuracy and training loss by epoch: {'; '.join(_ends([run]))}",
        ),
        "layers": layers,
        "heads": _heads(run),
        "sizes": _sizes(run),
        "matrices": matrices,
    }


def _summary(run: Run) -> str:
    dataset = ", ".join(dict.fromkeys(seed.dataset for seed in run.seeds))
    students = ", ".join(dict.fromkeys(seed.model for seed in run.seeds))
    teachers = {teacher.model for teacher in run.teachers()} or {
        str(seed.config["teacher"])
        for seed in run.seeds
        if seed.method != "ce" and "teacher" in seed.config
    }
    pair = f"{', '.join(sorted(teachers))} → {students}" if teachers else students
    return f"{pair} on {dataset}"


def _result_rows(run: Run) -> list[dict[str, str]]:
    """Returns the rows of the results' table, cells as text."""
    teachers = run.teachers()
    rows = [_result_row(run, [teacher], "teacher", teachers) for teacher in teachers]
    for method, seeds in run.by_method().items():
        by_model: dict[str, list[RunResult]] = {}
        for seed in seeds:
            if seed.result is not None:
                by_model.setdefault(seed.model, []).append(seed.result)
        rows += [_result_row(run, results, method, teachers) for results in by_model.values()]
        for seed in seeds:
            if seed.result is None:
                so_far = _DASH if seed.accuracy is None else f"{100 * seed.accuracy:.2f} so far"
                rows.append({
                    **dict.fromkeys(rows[0] if rows else _COLUMNS, _DASH),
                    "run": run.name, "dataset": seed.dataset, "model": seed.model,
                    "method": method, "seeds": str(seed.seed), "accuracy": so_far,
                    "state": seed.state,
                })  # fmt: skip
    return rows


_COLUMNS = (
    "run", "dataset", "model", "method", "seeds", "accuracy", "difference", "best", "agreement",
    "parameters", "speed", "state",
)  # fmt: skip


def _result_row(
    run: Run, results: Sequence[RunResult], method: str, teachers: Sequence[RunResult]
) -> dict[str, str]:
    accuracies = percents(results, "test_accuracy")
    difference = _DASH
    # Of several teachers nobody can say which one is meant.
    if method != "teacher" and len(teachers) == 1:
        difference = f"{statistics.mean(accuracies) - 100 * teachers[0].test_accuracy:+.2f}"
    cells = (
        run.name,
        run.seeds[0].dataset,
        results[0].model,
        method,
        " ".join(str(seed) for seed in known(results, "seed")) or _DASH,
        spread(accuracies, 2),
        difference.replace("-", "−"),
        spread(percents(results, "best_accuracy"), 2),
        spread(percents(results, "teacher_agreement"), 1),
        f"{results[0].parameters:,}",
        spread(known(results, "images_per_second"), 0),
        "",
    )
    return dict(zip(_COLUMNS, cells, strict=True))


def _heads(run: Run) -> list[dict[str, Any]]:
    """Returns the accuracies of the auxiliary heads beside those of the whole models."""
    tables = []
    for method, seeds in run.by_method().items():
        results = [seed.result for seed in seeds if seed.result and seed.result.head_accuracies]
        if not results:
            continue
        bars = [
            (f"head on {layer}", [result.head_accuracies[layer] for result in results])
            for layer in results[0].head_accuracies
            if all(layer in result.head_accuracies for result in results)
        ]
        bars.append(("the student itself", known(results, "test_accuracy")))
        bars += [("the teacher", [teacher.test_accuracy]) for teacher in run.teachers()]
        tables.append({
            "method": method,
            "bars": [
                {
                    "label": label,
                    "text": spread([100 * value for value in values], 2),
                    "width": f"{min(max(100 * statistics.mean(values), 0), 100):.2f}",
                }
                for label, values in bars
            ],
        })  # fmt: skip
    return tables


def _sizes(run: Run) -> list[dict[str, Any]]:
    """Returns rows on what the student costs, beside its teacher: value and ratio."""
    teachers = run.teachers()
    teacher = teachers[0] if len(teachers) == 1 else None
    rows = [_cost(f"teacher {each.model}", [each], None) for each in teachers]
    for method, seeds in run.by_method().items():
        results = [seed.result for seed in seeds if seed.result is not None]
        if results:
            rows.append(_cost(f"{results[0].model}, {method}", results, teacher))
    return rows


def _cost(label: str, results: Sequence[RunResult], teacher: RunResult | None) -> dict[str, Any]:
    of_teacher = [] if teacher is None else [teacher]
    cells = []
    for values, reference, digits, better in (
        (known(results, "parameters"), known(of_teacher, "parameters"), 0, "fewer"),
        (mebibytes(results), mebibytes(of_teacher), 2, "smaller"),
        (known(results, "latency_ms"), known(of_teacher, "latency_ms"), 2, "faster"),
    ):
        ratio = ""
        if values and reference and statistics.mean(values) > 0:
            ratio = f"{reference[0] / statistics.mean(values):.2g}× {better}"
        cells.append((mean(values, digits), ratio))
    cells.append((spread(percents(results, "teacher_agreement"), 1), ""))
    return {"label": label, "cells": cells}


def _columns(runs: Sequence[Run]) -> list[tuple[str, list[SeedRun]]]:
    """Returns `(name, seeds)` of each method of each run."""
    return [
        (f"{run.name}: {method}" if len(runs) > 1 else method, seeds)
        for run in runs
        for method, seeds in run.by_method().items()
    ]


def _configuration(runs: Sequence[Run]) -> dict[str, Any]:
    """Returns the fields of all configurations, those that differ apart from the rest."""
    columns = [(name, [s for s in seeds if s.config]) for name, seeds in _columns(runs)]
    columns = [(name, seeds) for name, seeds in columns if seeds]
    fields = dict.fromkeys(field for _, seeds in columns for seed in seeds for field in seed.config)
    differing, same = [], []
    for field in fields:
        cells = [_setting(field, seeds) for _, seeds in columns]
        if len(set(cells)) > 1:
            differing.append((field, cells))
        else:
            same.append((field, cells[0]))
    return {"columns": [name for name, _ in columns], "differing": differing, "same": same}


def _setting(field: str, seeds: Sequence[SeedRun]) -> str:
    if field == "seeds":
        return " ".join(str(seed.seed) for seed in seeds)
    values = {seed.seed: _plain(seed.config.get(field)) for seed in seeds}
    if len(set(values.values())) == 1:
        return next(iter(values.values()))
    return "; ".join(f"seed {seed}: {value}" for seed, value in values.items())


def _plain(value: Any) -> str:
    if value is None:
        return _DASH
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, list):
        return ", ".join(map(str, value)) or "none"
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


def _software(runs: Sequence[Run]) -> list[tuple[str, str, str]]:
    """Returns `(backend and packages, methods)`, one row where all runs had the same."""
    rows: dict[tuple[str, str], dict[str, None]] = {}
    for name, seeds in _columns(runs):
        for result in (seed.result for seed in seeds if seed.result is not None):
            packages = ", ".join(f"{key} {value}" for key, value in result.versions.items())
            rows.setdefault((result.backend or _DASH, packages or _DASH), {})[name] = None
    return [(backend, packages, ", ".join(names)) for (backend, packages), names in rows.items()]


def _commands(runs: Sequence[Run]) -> list[str]:
    return list(
        dict.fromkeys(
            seed.result.command
            for run in runs
            for seed in run.seeds
            if seed.result is not None and seed.result.command
        )
    )


def _last_change(runs: Sequence[Run]) -> str:
    times = [
        path.stat().st_mtime
        for run in runs
        for seed in run.seeds
        for name in ("config.yaml", "history.csv", "metrics.json")
        if (path := seed.folder / name).exists()
    ]
    if not times:
        return _DASH
    return f"{datetime.datetime.fromtimestamp(max(times), datetime.UTC):%Y-%m-%d %H:%M} UTC"


def _ends(runs: Sequence[Run]) -> list[str]:
    """Says how each run ended, for those who can't see the pictures."""
    return [
        f"{f'{run.name}: ' if len(runs) > 1 else ''}{seed.method} seed {seed.seed} "
        f"{100 * seed.accuracy:.2f} % ({seed.state})"
        for run in runs
        for seed in run.seeds
        if seed.accuracy is not None
    ]


def _shares(seed: SeedRun) -> str:
    return "; ".join(
        f"{label} at the end: "
        + ", ".join(
            f"{layer} {100 * values[np.isfinite(values)][-1]:.0f} %"
            for layer, values in layers.items()
        )
        for kind, label in (
            ("deep_prediction_allocation", "class predictions"),
            ("deep_feature_allocation", "feature maps"),
        )
        if (layers := seed.layers(kind))
    )


def _picture(png: bytes | None, text: str) -> dict[str, str] | None:
    return {"data": base64.b64encode(png).decode(), "text": text} if png else None
