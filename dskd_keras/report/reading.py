"""Reads run folders: whatever is there, in whatever state a run left it."""

import contextlib
import csv
import dataclasses
import functools
import io
import itertools
import os
import re
import statistics
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from dskd_keras import csv_cells, yaml_files
from dskd_keras.errors import InputError
from dskd_keras.report.run_result import RunResult, by_row, known

# In the order of tables: each adds something to the one before.
METHODS = ("ce", "kd", "dskd")

_SEED = re.compile(r"seed-(\d+)")
_MOST_NAMED = 5
# Larger numbers are none that a run wrote.
_MOST_COUNTED = 10**12
_LARGEST_FLOAT32 = 3.5e38

# `(path, method, seed)` of a training run.
_Place = tuple[Path, str, int]


@dataclasses.dataclass(frozen=True)
class Confusion:
    """How often images of one class were taken for another."""

    names: tuple[str, ...]  # of the classes, [C]
    counts: np.ndarray  # test images by true (row) and predicted class (column), [C, C]

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
    """One training run of a run folder, `METHOD/seed-N`."""

    folder: Path
    method: str
    seed: int
    config: dict[str, Any]  # {} where it can't be read
    history: dict[str, np.ndarray]  # [epochs] by column, NaN where a value is missing
    result: RunResult | None  # None in an unfinished run, as the confusion
    confusion: Confusion | None
    problems: tuple[str, ...]  # what couldn't be read, a sentence each

    @property
    def epochs(self) -> int:
        """The last epoch that is finished; the first one is 1, and 0 says that none is."""
        epochs = self.history["epoch"]
        return int(epochs[-1]) if len(epochs) else 0

    @property
    def state(self) -> str:
        """Says how far the run is."""
        return f"{self.progress}, unfinished" if self.result is None else "finished"

    @property
    def progress(self) -> str:
        """Says which epoch is the last that is finished."""
        total = self.config.get("epochs")
        return f"epoch {self.epochs}{f' of {total}' if total else ''}"

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
        values = values[(values >= 0) & (values <= 1)]
        return float(values[-1]) if len(values) else None

    def layers(self, quantity: str) -> dict[str, np.ndarray]:
        """Returns `{layer: values}` of the columns `QUANTITY/LAYER`, shallow layers first."""
        start = f"{quantity}/"
        columns = {
            name.removeprefix(start): values
            for name, values in self.history.items()
            if name.startswith(start) and np.isfinite(values).any()
        }
        # CSVLogger sorts its columns; the configuration knows the order of the layers.
        named = self.config.get("student_layers")
        order = [*map(str, named if isinstance(named, list) else ()), *columns]
        return {name: columns[name] for name in dict.fromkeys(order) if name in columns}


@dataclasses.dataclass(frozen=True)
class Run:
    """A run folder, with a name that tells it from the others."""

    name: str
    folder: Path
    seeds: tuple[SeedRun, ...]  # by method and seed

    def by_method(self) -> dict[str, list[SeedRun]]:
        """Returns `{method: [SeedRun]}`, in the order of tables."""
        groups = itertools.groupby(self.seeds, key=lambda seed: seed.method)
        return {method: list(seeds) for method, seeds in groups}

    @property
    def results(self) -> list[RunResult]:
        """The results of the finished runs."""
        return [seed.result for seed in self.seeds if seed.result is not None]

    def teachers(self) -> list[RunResult]:
        """Returns the `RunResult` of each teacher; a student's run repeats its own."""
        found = []
        for result in self.results:
            with contextlib.suppress(InputError):
                found += [RunResult.from_dict(result.teacher)] if result.teacher else []
        # The same teacher is timed anew in every run.
        return [
            dataclasses.replace(same[0], latency_ms=statistics.median(times) if times else None)
            for same in by_row(found)
            for times in [known(same, "latency_ms")]
        ]


def read_runs(run_dirs: str | Path | Iterable[str | Path]) -> list[Run]:
    """Reads run folders; raises `InputError` for a path that is none."""
    run_dirs = [run_dirs] if isinstance(run_dirs, str | Path) else run_dirs
    # By where they are: a folder can have several paths.
    folders: dict[Path, Path] = {}
    for run_dir in map(Path, run_dirs):
        folders.setdefault(run_dir.resolve(), run_dir)
    if not folders:
        raise InputError("run_dir: none given. Give one or more run folders, such as runs/PAIR.")
    found = [_seed_folders(run_dir) for run_dir in folders.values()]
    return [
        Run(_name(place, folders), run_dir, tuple(_read_seed(*seed) for seed in seeds))
        for (place, run_dir), seeds in zip(folders.items(), found, strict=True)
    ]


def _name(folder: Path, folders: Iterable[Path]) -> str:
    """Returns the shortest end of the path that no other path has."""
    others = [other.parts for other in folders if other != folder]
    ends = (folder.parts[-count:] for count in range(1, len(folder.parts) + 1))
    return "/".join(next(e for e in ends if all(other[-len(e) :] != e for other in others)))


def _seed_folders(folder: Path) -> list[_Place]:
    """Returns the training runs in a folder; where there is none, says which folder was meant."""
    if not folder.is_dir():
        kind = "is a file, not a run folder" if folder.exists() else "does not exist"
        beside = _described(_runs_in(folder.parent))
        hint = f" Runs beside it: {beside}." if beside else " Give a run folder, such as runs/PAIR."
        raise InputError(f"run_dir: '{folder}' {kind}.{hint}")
    if found := _seeds_in(folder):
        return found
    for kind, up in (("method", ".."), ("seed", "../..")):
        run = Path(os.path.normpath(folder / up))
        seeds = {path.resolve() for path, _, _ in _seeds_in(run)}
        if folder.resolve() in seeds | {seed.parent for seed in seeds}:
            raise InputError(
                f"run_dir: '{folder}' is the folder of one {kind}. Give the run folder, '{run}'."
            )
    if inside := _described(_runs_in(folder)):
        raise InputError(f"run_dir: '{folder}' is no run folder, but holds some: {inside}.")
    raise InputError(
        f"run_dir: '{folder}' holds no run. A run folder, such as runs/PAIR, has METHOD/seed-N "
        f"inside, with METHOD one of {', '.join(METHODS)}."
    )


def _seeds_in(folder: Path) -> list[_Place]:
    found = [
        (path, path.parent.name, int(match[1]))
        for path in folder.glob("*/seed-*")
        if (match := _SEED.fullmatch(path.name)) and path.parent.name in METHODS and path.is_dir()
    ]
    return sorted(found, key=lambda place: (METHODS.index(place[1]), place[2]))


def _runs_in(folder: Path) -> list[Path]:
    return [path for path in sorted(folder.glob("*")) if _seeds_in(path)]


def _described(folders: Sequence[Path]) -> str:
    more = f" and {len(folders) - _MOST_NAMED} more" if len(folders) > _MOST_NAMED else ""
    return ", ".join(f"'{folder}'" for folder in folders[:_MOST_NAMED]) + more


def _read_seed(folder: Path, method: str, seed: int) -> SeedRun:
    parts: list[Any] = []
    problems = []
    readers: dict[str, tuple[Callable[[Path], Any], Any]] = {
        "config.yaml": (functools.partial(yaml_files.read, "config"), {}),
        "history.csv": (_read_history, {"epoch": np.empty(0)}),
        "metrics.json": (RunResult.read, None),
        "confusion.csv": (_read_confusion, None),
    }
    for name, (read, otherwise) in readers.items():
        parts.append(otherwise)
        path = folder / name
        if path.exists() or path.is_symlink():
            try:
                if not path.is_file():
                    raise ValueError("a pipe may never end, nor may a device")
                parts[-1] = read(path)
            except (OSError, OverflowError, ValueError, csv.Error):
                problems.append(f"{method}/seed-{seed}/{name} is damaged and was passed over.")
    config, history, result, confusion = parts
    return SeedRun(folder, method, seed, config, history, result, confusion, tuple(problems))


def _read_history(path: Path) -> dict[str, np.ndarray]:
    """Returns the columns of a history.csv; its last line may be cut off.

    The first epoch is 1; files of older versions, where it is 0, are read as if it were.
    """
    text = path.read_bytes().decode("utf-8", errors="replace").replace("\0", "")
    # A line without its end may be cut within a number, which would still be read as one.
    header, *rows = list(csv.reader(io.StringIO(text[: text.rfind("\n") + 1]))) or [[]]
    if "epoch" not in header:
        return {"epoch": np.empty(0)}
    values = [[_number(cell) for cell in row] for row in rows if len(row) == len(header)]
    # A resumed run repeats epochs; the later row is the one that it went on from.
    rows_by_epoch = {row[header.index("epoch")]: row for row in values}
    ordered = [rows_by_epoch[e] for e in sorted(rows_by_epoch) if 0 <= e <= _MOST_COUNTED]
    history = dict(zip(header, np.reshape(ordered, (-1, len(header))).T, strict=True))
    if 0 in history["epoch"]:
        history["epoch"] += 1
    return history


def _number(text: str) -> float:
    try:
        number = float(text)
    except ValueError:
        return float("nan")
    return number if abs(number) < _LARGEST_FLOAT32 or np.isinf(number) else float("nan")


def _read_confusion(path: Path) -> Confusion:
    with open(path, newline="", encoding="utf-8") as file:
        header, *rows = csv.reader(file)
    counts = np.array([[int(value) for value in row[1:]] for row in rows], np.int64)
    names = tuple(csv_cells.read(name) for name in header[1:])
    if (
        not names
        or counts.shape != (len(names), len(names))
        or (abs(counts) > _MOST_COUNTED).any()
        or (counts < 0).any()
    ):
        raise ValueError("not a square of counts")
    return Confusion(names, counts)
