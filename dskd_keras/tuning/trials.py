"""Runs the trials of a search: each is a training run with checkpoints, in a folder of its own."""

import contextlib
import dataclasses
import json
import os
import shutil
import signal
import sys
import threading
import time
import traceback
from collections.abc import Iterator
from pathlib import Path

import keras
import keras_tuner
import yaml
from keras_tuner.engine.base_tuner import BaseTuner
from keras_tuner.engine.trial import Trial, TrialStatus
from rich.console import Console

from dskd_keras import files, yaml_files
from dskd_keras.errors import InputError, TrainingError
from dskd_keras.experiment import build, cached_targets, run_folder, teachers, training
from dskd_keras.experiment.checkpoints import CheckpointFolder
from dskd_keras.experiment.run import Run
from dskd_keras.tuning import hparams, keras_tuner_internals, memory, plan, ranking, workers
from dskd_keras.tuning.config import SearchConfig
from dskd_keras.tuning.plan import SearchPlan

# Seconds of a worker: before it asks a chief again that has nothing for it, and between two signs
# of life while it trains.
_ASK_AGAIN = 1.0
_SIGN_OF_LIFE = 5.0


def load(config: SearchConfig, console: Console, command: str | None = None) -> Run:
    """Loads the images, and builds a distiller of every kind that a trial may need.

    What doesn't fit is so said before a teacher trains for hours.
    """
    run = Run(config.experiment(), build.load_data(config, console), console, command)
    teacher = build.create_teacher(run)
    for layers in config.ranges.student_layers or [config.student_layers]:
        build.distiller(run.replace(student_layers=layers), teacher, build.create_student(run))
    return run


def run_all(search: SearchPlan, run: Run) -> None:
    """Runs trials until there are no more, after the teacher is there and its outputs are cached.

    It is an `InputError` if the search was begun with another backend, other images or another
    teacher.
    """
    here, teacher = training.conditions(run.dataset), _teacher(search, run)
    if teacher is not None:
        here["teacher"] = cached_targets.key(teacher, None, run.dataset, None)
    path = search.folder / "environment.yaml"
    if path.is_file():
        there = yaml_files.read("resume", path)
        training.check_conditions(search.folder, there, here)
    else:
        files.write_text(path, yaml.safe_dump(here))
    Trials(search, run, teacher).search()


def _teacher(search: SearchPlan, run: Run) -> keras.Model | None:
    """Returns the teacher as it teaches, measured once in a search; None where none is needed."""
    if run.config.method == "ce":
        return None
    folder = search.folder / "teacher"
    waiting = "Waiting for another process, which prepares the teacher."
    with run_folder.claimed("run_dir", folder, run.say, waiting):
        if (folder / "metrics.json").is_file():
            return teachers.ready_to_teach(run, teachers.load(run)[0])
        teacher = teachers.obtain(run)
        files.write_text(folder / "metrics.json", teacher.result.to_json())
        return teacher.model


class SearchEnded(TrainingError, keras_tuner.errors.FatalError):
    """Ends the search, where KerasTuner takes other errors for those of a single trial."""


class Trials(BaseTuner):
    """Trains a student for each trial and reports its validation accuracy after the last epoch.

    A trial is a training run as `train.py` makes it, on the images that are left for training: with
    several seeds it has a run for each and their mean. It has checkpoints of its own, so one that
    was interrupted goes on within its epoch. One that Hyperband promotes goes on where the shorter
    one ended, with the optimizer's state and on the same schedule.
    """

    def __init__(self, search: SearchPlan, run: Run, teacher: keras.Model | None):
        # error.txt has them.
        keras_tuner_internals.print_no_tracebacks()
        # Without a hypermodel for KerasTuner: it would build models to find the parameters.
        super().__init__(
            search.oracle, directory=search.folder.parent, project_name=search.folder.name
        )
        self._search = search
        self._run = run
        self._hypermodel = plan.hypermodel(search.config, run, teacher)
        self._cached: cached_targets.CachedTargets | None = None
        if teacher is not None and search.config.cached_views:
            layer = build.teacher_layers(run.config, teacher)
            self._cached = cached_targets.obtain(run, teacher, search.config.cached_views, layer)
        self._has_asked = False

    def pre_create_trial(self) -> None:
        """Waits before it asks again; KerasTuner asks without end."""
        if self._has_asked:
            time.sleep(_ASK_AGAIN)
        self._has_asked = True

    def on_trial_begin(self, trial: Trial) -> None:
        """Says which values are tried."""
        self._has_asked = False
        values = self._hypermodel.values(trial.hyperparameters).items()
        tried = ", ".join(f"{name} {ranking.format_value(value)}" for name, value in values)
        self._run.say(f"Trial {trial.trial_id}: {tried}")

    def run_trial(self, trial: Trial) -> dict[str, float]:
        """Trains the trial's students and returns the objective.

        After a `FailedTrialError` the search goes on; `SearchEnded` says that no trial could.
        """
        folder = self._search.config.trial_folder(trial.trial_id)
        try:
            with self._signs_of_life(trial.trial_id), files.disk_errors_in_one_line(folder):
                folder.mkdir(parents=True, exist_ok=True)
                return {"val_accuracy": self._train(trial, folder)}
        except Exception as error:
            if isinstance(error, InputError) or isinstance(error.__cause__, OSError):
                raise SearchEnded(str(error)) from error
            message = " ".join(str(error).split()) or type(error).__name__
            if not isinstance(error, TrainingError):
                message = f"{type(error).__name__}: {message}"
            files.write_text(folder / "error.txt", f"{traceback.format_exc()}\n{message}\n")
            raise keras_tuner.errors.FailedTrialError(message) from error

    def on_trial_end(self, trial: Trial) -> None:
        """Reports the end; only then are the checkpoints no longer needed."""
        if trial.status == TrialStatus.INVALID and workers.role() == "worker":
            # No error of `run_trial` leads to this: KerasTuner takes for the trial's what went
            # wrong when its result was reported. It is no failure, but is to be reported again.
            raise workers.unanswered("a result could not be reported")
        self.oracle.end_trial(trial)
        if "tuner/epochs" not in trial.hyperparameters.values:
            for place in self._search.config.trial_folder(trial.trial_id).glob("seed-*"):
                CheckpointFolder(place / "checkpoints").clear()
        self._search.report_ended()

    def _train(self, trial: Trial, folder: Path) -> float:
        """Trains the trial's students and writes its results; returns its accuracy."""
        hp = trial.hyperparameters
        values = self._hypermodel.values(hp)
        epochs = self._search.config.longest_trial()
        until = hp.values.get("tuner/epochs", epochs)
        run = self._run.replace(epochs=epochs, resume=True, **values)
        waiting = "Waiting for another process, which is training this trial."
        runs = []
        for seed in run.config.seeds:
            place = folder / f"seed-{seed}"
            # Where a worker was thought dead and is not, it finishes first.
            with run_folder.claimed("run_dir", place, run.say, waiting):
                if "tuner/trial_id" in hp.values:
                    # Hyperband's: it goes on with a shorter trial.
                    shorter = self._search.config.trial_folder(hp.values["tuner/trial_id"])
                    _copy_checkpoints(shorter / place.name, place)
                with memory.clean_session():
                    runs.append(self._train_one(run, hp, seed, place, until))
                hparams.write_values(place / "tensorboard", trial.trial_id, values)
        accuracies = [trained.history["val_accuracy"] for trained in runs]
        accuracy = sum(of_seed[-1] for of_seed in accuracies) / len(accuracies)
        result = {
            "val_accuracy": accuracy,
            "best_val_accuracy": sum(max(of_seed) for of_seed in accuracies) / len(accuracies),
            "epochs": until,
            # That of earlier attempts, and of the shorter trial that it goes on with, included.
            "seconds": sum(trained.seconds for trained in runs),
            "peak_memory_mib": _peak_memory(),
        }
        config = dataclasses.replace(run.config, resume=False)
        files.write_text(folder / "config.yaml", config.to_yaml())
        files.write_text(folder / ranking.RESULT, json.dumps(result, indent=1) + "\n")
        return accuracy

    def _train_one(
        self, run: Run, hp: keras_tuner.HyperParameters, seed: int, place: Path, until: int
    ) -> training.Trained:
        # A function of its own: on its return nothing refers to the distiller any more.
        keras.utils.set_random_seed(seed)
        distiller = self._hypermodel.distiller(hp)
        batches = None
        if self._cached is not None and distiller.teacher is not None:
            batches = self._cached.batches(run, distiller, seed)
        verbose = 1 if sys.stdout.isatty() else 0
        return training.train(
            run, distiller, seed, place, batches=batches, until=until, verbose=verbose
        )

    @contextlib.contextmanager
    def _signs_of_life(self, trial_id: str) -> Iterator[None]:
        """A context in which a worker's chief hears of it now and then."""
        if workers.role() != "worker":
            yield
            return
        over = threading.Event()

        def repeat() -> None:
            while not over.wait(_SIGN_OF_LIFE):
                if workers.chief_has_ended():
                    # As if it had been asked to stop: the trial's checkpoint stays.
                    os.kill(os.getpid(), signal.SIGTERM)
                    return
                # Elsewhere a chief that is gone shows where the result is reported.
                with contextlib.suppress(Exception):
                    self.oracle.get_trial(trial_id)

        # Not waited for: it may be asking a chief that is no more, for a minute.
        threading.Thread(target=repeat, daemon=True).start()
        try:
            yield
        finally:
            over.set()


def _copy_checkpoints(source: Path, place: Path) -> None:
    there = place / "checkpoints"
    # Without them the longer trial begins anew, to the same numbers.
    if (source / "checkpoints").is_dir() and not there.exists():
        aside = place / ".checkpoints.tmp"
        shutil.rmtree(aside, ignore_errors=True)
        shutil.copytree(source / "checkpoints", aside)
        aside.rename(there)


def _peak_memory() -> float | None:
    """Returns the most memory that this process has had so far, in MiB; None where unknown."""
    try:
        import resource
    except ModuleNotFoundError:  # not on Windows
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 2**20 if sys.platform == "darwin" else peak / 2**10
