"""From a configuration to a search and its results, in the one process that this is."""

import contextlib
import dataclasses
import json
import shutil
import time
from collections.abc import Sequence

from rich.console import Console

from dskd_keras import files, report
from dskd_keras.errors import InputError, TrainingError
from dskd_keras.experiment import pipeline, run_folder
from dskd_keras.experiment.checkpoints import CheckpointFolder
from dskd_keras.tuning import hparams, ranking, search_pictures, trials, workers
from dskd_keras.tuning.config import SearchConfig
from dskd_keras.tuning.plan import SearchPlan
from dskd_keras.tuning.ranking import TrialResult


def run(
    config: SearchConfig,
    console: Console | None = None,
    command: str | None = None,
    worker_command: Sequence[str] | None = None,
) -> list[TrialResult]:
    """Searches, alone, as the chief of workers, or as one of them; returns the trials, best first.

    Which one follows from `config.workers`, which needs the command line of a worker, and from
    KerasTuner's environment variables. A worker returns none. `command` is the command line that
    asked for the search, to be kept with the results.
    """
    console = console or report.console()
    config.check_files()
    role = workers.role()
    search = SearchPlan(config, console)
    if role == "worker":
        _run_worker(search, command)
        return []
    is_chief = role == "chief" or config.workers > 0
    loaded = None
    if not search.is_finished() and not is_chief:
        loaded = trials.load(config, console, command)
    with contextlib.ExitStack() as stack:
        stack.enter_context(files.disk_errors_in_one_line(search.folder))
        stack.enter_context(run_folder.claimed("run_dir", search.folder, console.print))
        # Looked at again: before the folder was claimed another process may have finished it.
        if search.is_finished():
            console.print(f"This search was finished before: {search.folder}")
            search.oracle.reload()
            return _finish(search, command)
        _begin(search)
        start = time.perf_counter()
        try:
            if is_chief:
                workers.Chief(search, worker_command if role is None else None).run()
            else:
                trials.run_all(search, loaded or trials.load(config, console, command))
        except KeyboardInterrupt:
            console.print("Interrupted; --resume goes on.")
            raise
        except InputError:
            if not search.oracle.trials:
                # What is mended now is another configuration, and the folder is free for it.
                for name in ("config.yaml", "environment.yaml"):
                    (search.folder / name).unlink(missing_ok=True)
                shutil.rmtree(search.folder / "teacher", ignore_errors=True)
            raise
        finally:
            search.oracle.requeue_all()
        if search.oracle.failure:
            raise TrainingError(
                f"the search stopped: {search.oracle.failure}. See '{search.folder}/trials.csv'; "
                "--resume goes on."
            )
        return _finish(search, command, time.perf_counter() - start)


def _begin(search: SearchPlan) -> None:
    """Goes on with what the folder holds, or makes it ready for a new search."""
    config, console = search.config, search.console
    if not config.resume:
        run_folder.set_aside(search.folder, console.print)
    if search.oracle.reload():
        search.oracle.unreported.clear()
        console.print(f"Continuing after {len(search.oracle.ended())} trial(s).")
    else:
        if any(search.folder.glob("trial_*")):
            raise InputError(
                f"resume: '{search.folder}/oracle.json', which says what the trials beside it are, "
                "is missing. Start without --resume, which sets aside what is there."
            )
        if config.resume:
            console.print(f"There is nothing to resume in '{search.folder}': a new search begins.")
        files.write_text(search.folder / "config.yaml", config.to_yaml())
    console.print(search.describe())


def _run_worker(search: SearchPlan, command: str | None) -> None:
    run = trials.load(search.config, search.console, command)
    search.check_configuration()
    workers.wait_for_chief(search.config.chief_timeout)
    with workers.chief_errors_in_one_line(), files.disk_errors_in_one_line(search.folder):
        trials.run_all(search, run)


def _finish(
    search: SearchPlan, command: str | None, seconds: float | None = None
) -> list[TrialResult]:
    """Writes and shows the results; then the final run, if it is asked for.

    Without `seconds`, the duration, the search was finished before.
    """
    config, folder, console = search.config, search.folder, search.console
    search.report_ended()
    results = search.results()
    best = search.write(results)
    for name, draw in (
        ("parameters.png", search_pictures.parameters),
        ("progress.png", search_pictures.progress),
    ):
        if (png := draw(results)) is not None:
            files.write_bytes(folder / name, png)
    if seconds is not None:
        _write_summary(search, len(results), seconds, command)
    console.print(ranking.table(results, f"{config.dataset}, {config.method}, {config.tuner}"))
    if best is None:
        raise TrainingError(f"no trial succeeded. See '{folder}/trials.csv'.")
    console.print(f"Best settings: {folder / 'best.yaml'}")
    if config.final:
        console.print("Training with them on all the training images", style="bold")
        pipeline.run(dataclasses.replace(best, resume=True), console, command)
    else:
        console.print(f"Train with them: python train.py --config {folder / 'best.yaml'}")
    return results


def _write_summary(search: SearchPlan, count: int, seconds: float, command: str | None) -> None:
    """Writes what says that the search is finished."""
    folder, most = search.folder, search.config.most_trials()
    ranges = search.config.ranges
    hparams.write_ranges(folder, {name: getattr(ranges, name) for name in search.searched})
    summary = {"trials": count, "max_trials": most, "seconds": seconds, "command": command}
    files.write_text(folder / "search.json", json.dumps(summary, indent=1) + "\n")
    if most is None:
        # Hyperband is through all its brackets and goes on with none of them.
        for place in folder.glob("trial_*/seed-*/checkpoints"):
            CheckpointFolder(place).clear()
