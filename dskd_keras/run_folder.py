"""The folder of one training run: whose it is, whether it is finished, and who may write there."""

import contextlib
import dataclasses

import yaml

from dskd_keras import artifacts, report
from dskd_keras.errors import InputError

# Fields that say where things are, which runs to make and what to leave; the rest shapes the
# numbers of a run.
_NO_NUMBERS = (
    "pair", "data_dir", "run_dir", "teacher_dir", "seeds", "export", "resume", "checkpoint_steps",
)  # fmt: skip


# What a run did that was made before a field was there.
_BEFORE = {"dtype_policy": "float32", "fold_teacher": False, "teacher_dtype": "float32"}


def finished_result(config, folder):
    """Returns the `report.RunResult` of a finished run, None where there is none.

    Args:
        config: The `ExperimentConfig` that is to be run.
        folder: The run's folder, a `pathlib.Path`, which need not exist.

    Raises:
        InputError: The folder holds a run of another configuration; all differences are listed.
    """
    metrics = folder / "metrics.json"
    if not check_configuration(config, folder, _NO_NUMBERS) or not metrics.exists():
        return None
    return report.RunResult.read(metrics)


def check_configuration(config, folder, may_differ):
    """Compares a configuration with the `config.yaml` of a folder.

    Args:
        config: The configuration that is to be run, a dataclass.
        folder: A `pathlib.Path`, which need not exist.
        may_differ: Names of the fields that don't count.

    Returns:
        Whether there is one.

    Raises:
        InputError: It is of another configuration; all differences are listed.
    """
    try:
        known = yaml.safe_load((folder / "config.yaml").read_text(encoding="utf-8"))
    except FileNotFoundError:
        return False
    except OSError as error:
        raise InputError(f"run_dir: can't read '{folder}': {error.strerror}.") from None
    except yaml.YAMLError:
        known = None
    if not isinstance(known, dict):
        raise InputError(f"run_dir: '{folder}/config.yaml' is damaged. Choose another --run_dir.")
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


def _flat(values):
    """Returns a dict without dicts inside: `outer.inner` are the keys of what they held."""
    flat = {}
    for name, value in values.items():
        if isinstance(value, dict):
            flat |= {f"{name}.{inner}": part for inner, part in _flat(value).items()}
        else:
            flat[name] = value
    return flat


@contextlib.contextmanager
def claimed(field, folder, waiting=None):
    """Makes a folder this process's own, so that no other one trains into it.

    Args:
        field: The setting that named the folder, for errors.
        folder: The run's folder, a `pathlib.Path`; it is made.
        waiting: Called without arguments if another process has to be waited for. Defaults to not
            waiting.

    Raises:
        InputError: It can't be written, or another process works there.
    """
    artifacts.check_writable(field, folder)
    with artifacts.locked(field, folder, waiting):
        for place in (folder, folder / "checkpoints"):
            artifacts.remove_leftovers(place)
        yield


def set_aside(folder):
    """Moves what an interrupted run left into a folder beside it, so that nothing is lost.

    Args:
        folder: The run's folder, claimed.

    Returns:
        `folder.unfinished-1`, or the next free number; None where there was nothing to move.
    """
    left = list(folder.iterdir())
    if not left:
        return None
    attempt = 1
    while (aside := folder.with_name(f"{folder.name}.unfinished-{attempt}")).exists():
        attempt += 1
    aside.mkdir()
    for path in left:
        path.rename(aside / path.name)
    return aside
