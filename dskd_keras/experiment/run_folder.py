"""The folder of one training run: whose it is, whether it is finished, and who may write there."""

import contextlib
import dataclasses
from collections.abc import Callable, Container, Iterator, Mapping
from pathlib import Path
from typing import Any

import filelock

from dskd_keras import files, yaml_files
from dskd_keras.errors import InputError
from dskd_keras.experiment.config import ExperimentConfig
from dskd_keras.report.run_result import RunResult

# Fields that say where things are, which runs to make and what to leave, and where
# and how the same numbers are computed but for rounding; the rest shapes the numbers of a run.
_NO_NUMBERS = (
    "pair", "data_dir", "run_dir", "teacher_dir", "seeds", "export", "resume", "checkpoint_steps",
    "stream_workers", "augment_on", "devices", "steps_per_execution",
)  # fmt: skip
# What a run did that was made before a field was there.
_BEFORE = {
    "stream": None, "cached_views": 0,
    "dtype_policy": "float32", "fold_teacher": False, "teacher_dtype": "float32",
    "prediction_loss": "kl_divergence", "feature_loss": "feature_mean_squared_error",
    "head": "separable", "deep_supervision": 1.0, "teacher_layer": None,
}  # fmt: skip
# Seconds between two looks at a lock that is waited for.
_LOOK = 0.5


def finished_result(config: ExperimentConfig, folder: Path) -> RunResult | None:
    """Returns the result of a finished run, None where there is none; nor need the folder exist.

    Raises:
        InputError: The folder holds a run of another configuration; all differences are listed.
    """
    metrics = folder / "metrics.json"
    if not check_configuration(config, folder, _NO_NUMBERS) or not metrics.exists():
        return None
    return RunResult.read(metrics)


def check_configuration(config: ExperimentConfig, folder: Path, may_differ: Container[str]) -> bool:
    """Compares a configuration with the `config.yaml` of a folder; returns whether there is one.

    Raises:
        InputError: It is of another configuration; all differences are listed.
    """
    path = folder / "config.yaml"
    try:
        if not path.exists():
            return False
        known = yaml_files.read("run_dir", path)
    except OSError as error:
        raise InputError(f"run_dir: can't read '{folder}': {error.strerror}.") from None
    except InputError as error:
        raise InputError(f"{error} Choose another --run_dir.") from None
    known, wanted = _BEFORE | _flat(known), _flat(dataclasses.asdict(config))
    differences = [
        f"{field}: {known.get(field)!r} there, {wanted[field]!r} here"
        for field in wanted
        if field not in may_differ and known.get(field) != wanted[field]
    ]
    if differences:
        raise InputError(
            f"run_dir: '{folder}' holds a run of another configuration "
            f"({'; '.join(differences)}). Choose another --run_dir, or take its configuration: "
            f"--config {folder / 'config.yaml'}."
        )
    return True


def _flat(values: Mapping[str, Any]) -> dict[str, Any]:
    """Returns a dict without dicts inside: `outer.inner` are the keys of what they held."""
    flat: dict[str, Any] = {}
    for name, value in values.items():
        if isinstance(value, dict):
            flat |= {f"{name}.{inner}": part for inner, part in _flat(value).items()}
        else:
            flat[name] = value
    return flat


@contextlib.contextmanager
def claimed(
    field: str,
    folder: Path,
    say: Callable[[str], object],
    waiting: str | None = None,
) -> Iterator[None]:
    """Makes a folder this process's own, so that no other one writes into it.

    The folder is made. The lock is a file beside it, `.NAME.lock`, which stays there; a process
    that dies lets go of it. Where `waiting` is given, it is said before another process is waited
    for.

    Raises:
        InputError: It can't be written, or another process has it and is not waited for.
    """
    files.check_writable(field, folder)
    lock = filelock.FileLock(folder.with_name(f".{folder.name}.lock"))
    try:
        try:
            lock.acquire(blocking=False)
        except filelock.Timeout:
            if waiting is None:
                raise InputError(
                    f"{field}: another process is working in '{folder}'. Wait for it, or choose "
                    f"another --{field}."
                ) from None
            say(waiting)
            lock.acquire(poll_interval=_LOOK)
    except (OSError, NotImplementedError) as error:
        say(
            f"'{lock.lock_file}' can't be locked ({error}): make sure that no other process works "
            f"in '{folder}'."
        )
    try:
        for place in (folder, folder / "checkpoints"):
            files.remove_leftovers(place)
        yield
    finally:
        lock.release()


def set_aside(folder: Path, say: Callable[[str], object]) -> None:
    """Moves what an interrupted run left into a folder beside it, so that nothing is lost.

    That is `folder.unfinished-1`, or the next free number. The folder has to be claimed.
    """
    left = list(folder.iterdir())
    if not left:
        return
    attempt = 1
    while (aside := folder.with_name(f"{folder.name}.unfinished-{attempt}")).exists():
        attempt += 1
    aside.mkdir()
    for path in left:
        path.rename(aside / path.name)
    say(f"What was interrupted is set aside: {aside} (--resume would have gone on).")
