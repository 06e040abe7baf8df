"""Runs cells with `train.py`, several side by side, and keeps what came of each."""

import csv
import dataclasses
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import Any

from benchmarks import timing
from benchmarks.study import plan
from benchmarks.study.plan import Cell, Scale
from dskd_keras import files
from dskd_keras.errors import InputError
from dskd_keras.report.run_result import RunResult

_ROOT = Path(__file__).parents[2]
# Where cells train. What is in there is not kept in the repository.
WORK = _ROOT / "runs" / "study"
_DIGITS = 5
# Fields that say where things are and what is left there; the rest shapes the numbers.
_PLACES = (
    "pair", "data_dir", "run_dir", "teacher_dir", "teacher_weights", "seeds", "export", "resume",
    "checkpoint_steps",
)  # fmt: skip
# Those that train now.
_processes: list[subprocess.Popen] = []
_DEFAULTS = {field.name: field.default for field in dataclasses.fields(plan.ExperimentConfig)}


@dataclasses.dataclass(frozen=True)
class Machine:
    """Where a machine has the images, and how it makes the batches: no setting of a cell.

    Attributes:
        images: An .npz file with the images of the scale's data set; None where it can be loaded by
            its name.
        on_device: Make the batches on the accelerator.
        steps_per_execution: Steps that run together.
    """

    images: str | None = None
    on_device: bool = False
    steps_per_execution: int = 1


class CellFailed(RuntimeError):
    """A cell's process ended with an error; the message is the end of what it said."""


def is_kept(scale: Scale, cell: Cell) -> bool:
    """Returns whether a cell was finished before.

    Raises:
        InputError: What is kept under its name was made with other settings.
    """
    path = cell.kept(scale)
    if not path.exists():
        return False
    kept, wanted = read(path)["settings"], settings(scale, cell)
    for field, value in wanted.items():
        # A cell that is older than a field was trained by its default. When that default changes,
        # the older cells have to be given the field.
        there = kept.get(field, _DEFAULTS.get(field))
        if there != value:
            raise InputError(
                f"cells: '{cell.name}' has {field} {value!r}, but the kept cell of that name has "
                f"{there!r}. Give it another name."
            )
    return True


def read(path: Path) -> dict[str, Any]:
    """Returns what is kept of a cell."""
    return json.loads(path.read_text(encoding="utf-8"))


def run(
    scale: Scale,
    cells: Sequence[Cell],
    machine: Machine,
    at_once: int,
    threads: int,
    say: Callable[[str], object],
) -> list[tuple[Cell, str]]:
    """Trains the cells that are not kept yet.

    Args:
        scale: Of the cells.
        cells: In the order in which they are begun.
        machine: This one.
        at_once: How many are trained side by side.
        threads: Threads of each.
        say: Called with a line of text now and then.

    Returns:
        The cells that failed, each with the end of what its process said.
    """
    left = [cell for cell in cells if not is_kept(scale, cell)]
    failed, start = [], time.perf_counter()
    with ThreadPoolExecutor(at_once) as pool:
        running = {pool.submit(train, scale, cell, machine, threads): cell for cell in left}
        try:
            for done, future in enumerate(as_completed(running), start=1):
                cell = running[future]
                try:
                    outcome = _line(future.result())
                except CellFailed as error:
                    failed.append((cell, str(error)))
                    outcome = "failed"
                pace = (time.perf_counter() - start) / done
                remaining = pace * (len(left) - done) / 60
                say(f"{cell.name}, seed {cell.seed}: {outcome}. Left: {remaining:.0f} min.")
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            for process in list(_processes):
                process.terminate()  # train.py saves a checkpoint first
            raise
    return failed


def _line(kept: dict[str, Any]) -> str:
    metrics = kept["metrics"]
    parts = [f"{metrics['seconds'] / 60:.1f} min"]
    if kept["validation_accuracy"] is not None:
        # Not the test's: what is chosen while cells come in must not see it.
        parts.insert(0, f"{100 * kept['validation_accuracy']:.2f} % on validation")
    return ", ".join(parts)


def train(scale: Scale, cell: Cell, machine: Machine, threads: int) -> dict[str, Any]:
    """Trains one cell, or goes on with it, and keeps what came of it.

    Returns:
        What is kept.

    Raises:
        CellFailed: Its process ended with an error.
    """
    folder = WORK / scale.name / f"{cell.name}-{cell.seed}"
    folder.mkdir(parents=True, exist_ok=True)
    config = plan.configuration(
        scale,
        cell.fields,
        seeds=[cell.seed],
        run_dir=str(folder),
        resume=True,
        **_places(scale, cell, machine),
    )
    wanted = folder / "wanted.yaml"
    files.write_text(wanted, config.to_yaml())
    log = folder / "log.txt"
    with open(log, "a", encoding="utf-8") as output:
        process = subprocess.Popen(
            [sys.executable, str(_ROOT / "train.py"), "--config", str(wanted)],
            cwd=_ROOT,
            env=os.environ | _threads(threads) | {"TF_CPP_MIN_LOG_LEVEL": "3"},
            stdout=output,
            stderr=subprocess.STDOUT,
            # Else a Ctrl-C reaches it too, and `run`'s signal is the second, at which it stops at
            # once.
            start_new_session=True,
        )
        _processes.append(process)
        try:
            code = process.wait()
        except BaseException:
            process.terminate()  # a teacher, which no other thread waits for
            process.wait()
            raise
        finally:
            _processes.remove(process)
    if code:
        raise CellFailed(log.read_text(encoding="utf-8", errors="replace")[-2000:])
    kept = _kept(scale, cell, config.seed_folder(cell.seed))
    path = cell.kept(scale)
    path.parent.mkdir(parents=True, exist_ok=True)
    files.write_text(path, _compact(kept))
    return kept


def student_file(scale: Scale, cell: Cell) -> Path:
    """Returns the model that a trained cell left."""
    config = plan.configuration(scale, cell.fields, run_dir=str(WORK / scale.name))
    return (
        WORK
        / scale.name
        / f"{cell.name}-{cell.seed}"
        / config.method
        / f"seed-{cell.seed}/student.keras"
    )


def _places(scale: Scale, cell: Cell, machine: Machine) -> dict[str, Any]:
    """Returns the fields that say where things are and happen on this machine."""
    found: dict[str, Any] = {"steps_per_execution": machine.steps_per_execution}
    if machine.on_device:
        found["augment_on"] = "device"
    if machine.images is not None:
        found["dataset"] = machine.images
    if scale.classes > 1:
        found["dataset"] = str(dataset_file(scale))
    if scale.trains_teacher() and plan.configuration(scale, cell.fields).method != "ce":
        found["teacher_weights"] = str(scale.teacher_weights())
    return found


def dataset_file(scale: Scale) -> Path:
    """Returns the file of a scale's images, for one that has not all classes."""
    return WORK / f"{scale.config['dataset']}-every-{scale.classes}.npz"


def _threads(count: int) -> dict[str, str]:
    names = ("OMP_NUM_THREADS", "TF_NUM_INTRAOP_THREADS", "TF_NUM_INTEROP_THREADS")
    return dict.fromkeys(names, str(count))


def settings(scale: Scale, cell: Cell) -> dict[str, Any]:
    """Returns everything that shapes a cell's numbers."""
    config = dataclasses.asdict(plan.configuration(scale, cell.fields))
    return {
        "classes": scale.classes,
        **{field: value for field, value in config.items() if field not in _PLACES},
    }


def _kept(scale: Scale, cell: Cell, folder: Path) -> dict[str, Any]:
    metrics = RunResult.read(folder / "metrics.json")
    history = _history(folder / "history.csv")
    validation = history["val_accuracy"][-1] if metrics.best_chosen_on == "validation" else None
    names = (
        "test_accuracy", "teacher_agreement", "head_accuracies", "images_per_second", "seconds",
        "epochs", "parameters", "backend", "versions",
    )  # fmt: skip
    machine = timing.machine()
    return {
        "settings": settings(scale, cell),
        "validation_accuracy": validation,
        "metrics": {name: getattr(metrics, name) for name in names},
        "processor": machine["processor"],
        "vector_instructions": machine["vector instructions"],
        "device": timing.device(),
        "history": history,
    }


def _history(path: Path) -> dict[str, list[float]]:
    """Returns the columns of a history; those of a term that ended are shorter, as Keras's are."""
    with open(path, encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    return {
        name: [float(f"{float(row[name]):.{_DIGITS}g}") for row in rows if row[name] != "NA"]
        for name in rows[0]
    }


def _compact(kept: dict[str, Any]) -> str:
    """Returns JSON with a line for each column of the history."""
    history = ",\n".join(
        f"  {json.dumps(name)}: {json.dumps(v)}" for name, v in kept["history"].items()
    )
    rest = {name: value for name, value in kept.items() if name != "history"}
    head = json.dumps(rest, indent=1).rstrip("}\n")
    return f'{head},\n "history": {{\n{history}\n }}\n}}\n'
