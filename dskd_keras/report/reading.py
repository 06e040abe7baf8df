"""Reads run folders: whatever is there, in whatever state a run left it."""

import csv
import dataclasses
import io
import os
import re
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from dskd_keras.errors import InputError
from dskd_keras.report.run_result import RunResult

# In the order of tables: each adds something to the one before.
METHODS = ("ce", "kd", "dskd")

_SEED = re.compile(r"seed-(\d+)")
_MOST_NAMED = 5

# `(path, method, seed)` of a training run.
_Place = tuple[Path, str, int]


@dataclasses.dataclass(frozen=True)
class Confusion:
    """How often images of one class were taken for another.

    Attributes:
        names: The classes' names, `[C]`.
        counts: Test images by true (row) and predicted class (column), `[C, C]`.
    """

    names: tuple[str, ...]
    counts: np.ndarray

    def pairs(self, most: int) -> list[tuple[str, str, int, int]]:
        """Returns the most confused pairs, `(true, predicted, count, images of the true class)`."""
        wrong = self.counts.copy()
        np.fill_diagonal(wrong, 0)
        totals = self.counts.sum(axis=1)
        order = np.argsort(-wrong, axis=None, kind="stable")[:most]
        cells = zip(*np.unravel_index(order, wrong.shape), strict=True)
        return [
            (self.names[true], self.names[predicted], int(count), int(totals[true]))
            for true, predicted in cells
            if (count := wrong[true, predicted]) > 0
        ]


@dataclasses.dataclass(frozen=True)
class SeedRun:
    """One training run of a run folder, `METHOD/seed-N`.

    Attributes:
        folder: Its path.
        method: dskd, kd or ce.
        seed: N.
        config: The fields of `config.yaml`; `{}` where it can't be read.
        history: `[epochs]` values by column, NaN where one is missing; the first `epoch` is 1.
        result: None in an unfinished run.
        confusion: None in an unfinished run.
        problems: What couldn't be read, a sentence each.
    """

    folder: Path
    method: str
    seed: int
    config: dict[str, Any]
    history: dict[str, np.ndarray]
    result: RunResult | None
    confusion: Confusion | None
    problems: tuple[str, ...]

    @property
    def epochs(self) -> int:
        """The last epoch that is finished; the first one is 1, and 0 says that none is."""
        epochs = self.history["epoch"]
        return int(epochs[-1]) if len(epochs) else 0

    @property
    def state(self) -> str:
        """Says how far the run is."""
        if self.result is not None:
            return "finished"
        total = self.config.get("epochs")
        return f"epoch {self.epochs}{f' of {total}' if total else ''}, unfinished"

    @property
    def model(self) -> str:
        """The student's name."""
        return self.result.model if self.result else str(self.config.get("student", "–"))

    @property
    def dataset(self) -> str:
        """The data set's name, "–" where nothing tells."""
        name = self.result.dataset if self.result else None
        return Path(name or str(self.config.get("dataset") or "–")).name

    @property
    def accuracy(self) -> float | None:
        """Accuracy after the last finished epoch, 0 to 1; None before it."""
        if self.result is not None:
            return self.result.test_accuracy
        values = self.history.get("val_accuracy", np.empty(0))
        values = values[np.isfinite(values)]
        return float(values[-1]) if len(values) else None

    def layers(self, quantity: str) -> dict[str, np.ndarray]:
        """Returns `{layer: values}` of the columns `QUANTITY/LAYER`, shallow layers first."""
        columns = {
            name.partition("/")[2]: values
            for name, values in self.history.items()
            if name.startswith(f"{quantity}/") and np.isfinite(values).any()
        }
        # CSVLogger sorts its columns; the configuration knows the order of the layers.
        named = self.config.get("student_layers")
        order = [str(name) for name in named] if isinstance(named, list) else []
        order += sorted(set(columns) - set(order))
        return {name: columns[name] for name in order if name in columns}


@dataclasses.dataclass(frozen=True)
class Run:
    """A run folder.

    Attributes:
        name: What tells it from the other run folders.
        folder: Its path.
        seeds: Its `SeedRun` objects, by method and seed.
    """

    name: str
    folder: Path
    seeds: tuple[SeedRun, ...]

    def by_method(self) -> dict[str, list[SeedRun]]:
        """Returns `{method: [SeedRun]}`, in the order of tables."""
        groups: dict[str, list[SeedRun]] = {}
        for seed in self.seeds:
            groups.setdefault(seed.method, []).append(seed)
        return groups

    def teachers(self) -> list[RunResult]:
        """Returns the `RunResult` of each teacher; a student's run repeats its own."""
        groups: dict[tuple[Any, ...], list[RunResult]] = {}
        for seed in self.seeds:
            if seed.result is None or not seed.result.teacher:
                continue
            try:
                teacher = RunResult.from_dict(seed.result.teacher)
            except InputError:
                continue
            key = (teacher.model, teacher.parameters, teacher.test_accuracy)
            groups.setdefault(key, []).append(teacher)
        # The same teacher is timed anew in every run.
        return [
            dataclasses.replace(
                teachers[0],
                latency_ms=float(np.median(times))
                if (times := [t.latency_ms for t in teachers if t.latency_ms is not None])
                else None,
            )
            for teachers in groups.values()
        ]


def read_runs(run_dirs: str | Path | Iterable[str | Path]) -> list[Run]:
    """Reads run folders.

    Args:
        run_dirs: Their paths, or one path.

    Returns:
        A `Run` for each.

    Raises:
        InputError: A path is no run folder.
    """
    by_folder: dict[Path, Path] = {}
    for run_dir in map(Path, [run_dirs] if isinstance(run_dirs, str | Path) else run_dirs):
        by_folder.setdefault(run_dir.resolve(), run_dir)
    if not by_folder:
        raise InputError("run_dir: none given. Give one or more run folders, such as runs/PAIR.")
    found = [_seed_folders(run_dir) for run_dir in by_folder.values()]
    return [
        Run(name, run_dir, tuple(_read_seed(*seed) for seed in seeds))
        for name, run_dir, seeds in zip(
            _names(list(by_folder)), by_folder.values(), found, strict=True
        )
    ]


def _names(folders: Sequence[Path]) -> list[str]:
    """Returns the shortest ends of the paths that differ."""
    ends = []
    for folder in folders:
        parts = 1
        while parts < len(folder.parts) and any(
            other != folder and other.parts[-parts:] == folder.parts[-parts:] for other in folders
        ):
            parts += 1
        ends.append("/".join(folder.parts[-parts:]))
    return ends


def _seed_folders(folder: Path) -> list[_Place]:
    """Returns the training runs in a folder.

    Raises:
        InputError: There is none; the message says which folder was meant.
    """
    if not folder.is_dir():
        kind = "is a file, not a run folder" if folder.exists() else "does not exist"
        beside = _described(_runs_in(folder.parent))
        hint = f" Runs beside it: {beside}." if beside else " Give a run folder, such as runs/PAIR."
        raise InputError(f"run_dir: '{folder}' {kind}.{hint}")
    found = _seeds_in(folder)
    if found:
        return found
    above = Path(os.path.normpath(folder / ".."))
    for kind, run in (("method", above), ("seed", Path(os.path.normpath(above / "..")))):
        parts = {path.parent if kind == "method" else path for path, _, _ in _seeds_in(run)}
        if folder.resolve() in {part.resolve() for part in parts}:
            raise InputError(
                f"run_dir: '{folder}' is the folder of one {kind}. Give the run folder, '{run}'."
            )
    inside = _described(_runs_in(folder))
    if inside:
        raise InputError(f"run_dir: '{folder}' is no run folder, but holds some: {inside}.")
    raise InputError(
        f"run_dir: '{folder}' holds no run. A run folder, such as runs/PAIR, has METHOD/seed-N "
        f"inside, with METHOD one of {', '.join(METHODS)}."
    )


def _seeds_in(folder: Path) -> list[_Place]:
    found: list[_Place] = []
    for method in METHODS:
        paths = list((folder / method).iterdir()) if (folder / method).is_dir() else []
        seeds = [
            (path, method, int(match[1]))
            for path in paths
            if (match := _SEED.fullmatch(path.name)) and path.is_dir()
        ]
        found += sorted(seeds, key=lambda seed: seed[2])
    return found


def _runs_in(folder: Path) -> list[Path]:
    try:
        return [path for path in sorted(folder.iterdir()) if path.is_dir() and _seeds_in(path)]
    except OSError:
        return []


def _described(folders: Sequence[Path]) -> str:
    more = f" and {len(folders) - _MOST_NAMED} more" if len(folders) > _MOST_NAMED else ""
    return ", ".join(f"'{folder}'" for folder in folders[:_MOST_NAMED]) + more


def _read_seed(folder: Path, method: str, seed: int) -> SeedRun:
    problems = []
    parts: dict[str, Any] = {}
    readers: tuple[tuple[str, Callable[[Path], Any], Any], ...] = (
        ("config.yaml", _read_config, {}),
        ("history.csv", _read_history, {"epoch": np.empty(0)}),
        ("metrics.json", RunResult.read, None),
        ("confusion.csv", _read_confusion, None),
    )
    for name, read, otherwise in readers:
        parts[name] = otherwise
        if (folder / name).exists():
            try:
                parts[name] = read(folder / name)
            except (OSError, ValueError, yaml.YAMLError, csv.Error):
                problems.append(f"{method}/seed-{seed}/{name} is damaged and was passed over.")
    return SeedRun(
        folder=folder,
        method=method,
        seed=seed,
        config=parts["config.yaml"],
        history=parts["history.csv"],
        result=parts["metrics.json"],
        confusion=parts["confusion.csv"],
        problems=tuple(problems),
    )


def _read_config(path: Path) -> dict[str, Any]:
    config = yaml.safe_load(path.read_text(encoding="utf-8"))
    if not isinstance(config, dict):
        raise ValueError("not a mapping")
    return config


def _read_history(path: Path) -> dict[str, np.ndarray]:
    """Returns the columns of a history.csv; its last line may be cut off.

    The first epoch is 1; files of older versions, where it is 0, are read as if it were.
    """
    text = path.read_bytes().decode("utf-8", errors="replace")
    # A line without its end may be cut within a number, which would still be read as one.
    lines = text[: text.rfind("\n") + 1]
    rows = csv.reader(io.StringIO(lines.replace("\0", "")))
    header = next(rows, [])
    if "epoch" not in header:
        return {"epoch": np.empty(0)}
    # A resumed run repeats epochs; the later row is the one that it went on from.
    by_epoch = {}
    for row in rows:
        values = dict(zip(header, map(_number, row), strict=False))
        if len(row) == len(header) and np.isfinite(values["epoch"]):
            by_epoch[values["epoch"]] = values
    ordered = [by_epoch[epoch] for epoch in sorted(by_epoch)]
    history = {name: np.array([row[name] for row in ordered], dtype=float) for name in header}
    if ordered and ordered[0]["epoch"] == 0:
        history["epoch"] += 1
    return history


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        return float("nan")


def _read_confusion(path: Path) -> Confusion:
    with open(path, newline="", encoding="utf-8") as file:
        header, *rows = csv.reader(file)
    counts = np.array([[int(value) for value in row[1:]] for row in rows])
    names = tuple(header[1:])
    if not names or counts.shape != (len(names), len(names)) or (counts < 0).any():
        raise ValueError("not a square of counts")
    return Confusion(names, counts)
