"""Runs the trials of a search: each is a training run with checkpoints, in a folder of its own."""

import contextlib
import dataclasses
import os
import shutil
import signal
import sys
import threading
import time
import traceback
from pathlib import Path

import keras
import keras_tuner
from keras_tuner.engine.base_tuner import BaseTuner
from keras_tuner.src import config as keras_tuner_config

from dskd_keras import artifacts, run_folder, teacher_outputs, training
from dskd_keras.checkpoints import CheckpointFolder
from dskd_keras.errors import InputError, TrainingError
from dskd_keras.tuning import hparams, memory, results, workers

# Of a worker: how often it asks a chief that has nothing for it, and how often it gives a sign of
# life while it trains.
_ASK_AGAIN = 1.0
_SIGN_OF_LIFE = 5.0


class SearchEnded(TrainingError, keras_tuner.errors.FatalError):
    """Ends the search, where KerasTuner takes other errors for those of a single trial."""


class Trials(BaseTuner):
    """Trains a student for each trial and reports its validation accuracy after the last epoch.

    A trial is a training run as `train.py` makes it, on the images that are left for training: with
    several seeds it has a run for each and their mean. It has checkpoints of its own, so one that
    was interrupted goes on within its epoch, and one that Hyperband promotes goes on where the
    shorter one ended, with the optimizer's state and on the same schedule.

    Args:
        oracle: One of `oracles`.
        hypermodel: The `DistillationHyperModel`.
        config: The `SearchConfig`.
        epochs: Epochs of a trial that trains to the end.
        dataset: The `data.ImageDataset`, with validation images.
        cached: `(views, outputs)`, `data.FixedViews` and `TeacherOutputs`; None to run the teacher
            in every step.
        console: A `rich.console.Console` for messages.
        on_end: Called without arguments after each trial.
    """

    def __init__(self, oracle, hypermodel, config, epochs, dataset, cached, console, on_end):
        folder = config.search_folder()
        # Else KerasTuner prints the traceback of every failed trial, which error.txt has.
        keras_tuner_config.DEBUG = False
        # Without a hypermodel for KerasTuner: it would build models to find the parameters.
        super().__init__(oracle, directory=folder.parent, project_name=folder.name)
        self._hypermodel = hypermodel
        self._config = config
        self._epochs = epochs
        self._dataset = dataset
        self._cached = cached
        self._console = console
        self._on_end = on_end
        self._asked = False

    def pre_create_trial(self):
        """Waits before it asks again; KerasTuner asks without end."""
        if self._asked:
            time.sleep(_ASK_AGAIN)
        self._asked = True

    def on_trial_begin(self, trial):
        """Says which values are tried."""
        self._asked = False
        values = self._hypermodel.values(trial.hyperparameters)
        self._console.print(f"Trial {trial.trial_id}: {results.describe(values)}")

    def run_trial(self, trial):
        """Trains the trial's students.

        Args:
            trial: A `Trial`.

        Returns:
            A dict with the objective, `val_accuracy`, 0 to 1.

        Raises:
            keras_tuner.errors.FailedTrialError: The trial can't be trained; the search goes on.
            SearchEnded: No trial could: its folder can't be used, or the disk can't be written.
        """
        folder = Path(self.get_trial_dir(trial.trial_id))
        try:
            with self._sign_of_life(trial.trial_id), artifacts.disk_errors_in_one_line(folder):
                return self._train(trial, folder)
        except InputError as error:
            raise SearchEnded(str(error)) from error
        except Exception as error:
            if isinstance(error.__cause__, OSError):
                raise SearchEnded(str(error)) from error
            message = " ".join(str(error).split()) or type(error).__name__
            if not isinstance(error, TrainingError):
                message = f"{type(error).__name__}: {message}"
            artifacts.write_text(folder / "error.txt", f"{traceback.format_exc()}\n{message}\n")
            raise keras_tuner.errors.FailedTrialError(message) from error

    def on_trial_end(self, trial):
        """Reports the end; only then are the checkpoints no longer needed."""
        self.oracle.end_trial(trial)
        if "tuner/epochs" not in trial.hyperparameters.values:
            for place in Path(self.get_trial_dir(trial.trial_id)).glob("seed-*"):
                CheckpointFolder(place / "checkpoints").clear()
        self._on_end()

    def save(self):
        """Does nothing: the oracle has saved itself, and there is no other state."""

    def _train(self, trial, folder):
        hp = trial.hyperparameters
        until = hp.values.get("tuner/epochs", self._epochs)
        config = self._config.experiment(
            epochs=self._epochs, resume=True, **self._hypermodel.values(hp)
        )
        runs = []
        for seed in config.seeds:
            place = folder / f"seed-{seed}"
            # Where a worker was thought dead and is not, it finishes first.
            with run_folder.claimed("run_dir", place, self._waiting):
                self._take_over(hp.values.get("tuner/trial_id"), place)
                runs.append(self._train_one(config, hp, seed, place, until))
                hparams.write_values(
                    place / "tensorboard", trial.trial_id, self._hypermodel.values(hp)
                )
        accuracies = [run.history["val_accuracy"] for run in runs]
        result = {
            "val_accuracy": sum(values[-1] for values in accuracies) / len(accuracies),
            "best_val_accuracy": sum(max(values) for values in accuracies) / len(accuracies),
            "epochs": until,
            # That of earlier attempts, and of the shorter trial that it goes on with, included.
            "seconds": sum(run.seconds for run in runs),
            "peak_memory_mib": _peak_memory(),
        }
        values = dataclasses.replace(config, resume=False).to_yaml()
        artifacts.write_text(folder / "config.yaml", values)
        results.write_result(folder, result)
        return {"val_accuracy": result["val_accuracy"]}

    def _train_one(self, config, hp, seed, place, until):
        with memory.freed_afterwards():
            return self._build_and_train(config, hp, seed, place, until)

    def _build_and_train(self, config, hp, seed, place, until):
        # A function of its own: on its return nothing refers to the distiller any more.
        keras.utils.set_random_seed(seed)
        distiller = self._hypermodel.distiller(hp)
        return training.train(
            config,
            distiller,
            self._dataset,
            seed,
            place,
            self._console,
            batches=self._batches(config, distiller, seed),
            until=until,
            verbose=1 if sys.stdout.isatty() else 0,
        )

    def _batches(self, config, distiller, seed):
        if self._cached is None or distiller.teacher is None:
            return None
        return teacher_outputs.batches(
            *self._cached, distiller, self._dataset, config.batch_size, seed
        )

    def _take_over(self, earlier, place):
        """Copies the checkpoints of the shorter trial that this one goes on with."""
        there = place / "checkpoints"
        if earlier is None or there.exists():
            return
        source = Path(self.get_trial_dir(earlier)) / place.name / "checkpoints"
        # Without them it begins anew, to the same numbers.
        if source.is_dir():
            aside = place / ".checkpoints.tmp"
            shutil.rmtree(aside, ignore_errors=True)
            shutil.copytree(source, aside)
            aside.rename(there)

    def _waiting(self):
        self._console.print("Waiting for another process, which is training this trial.")

    @contextlib.contextmanager
    def _sign_of_life(self, trial_id):
        if not self._is_worker():
            yield
            return
        over = threading.Event()

        def repeat():
            while not over.wait(_SIGN_OF_LIFE):
                if workers.is_orphan():
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


def has_checkpoint(folder):
    """Returns whether a trial has got as far as a checkpoint.

    Args:
        folder: The trial's, a `pathlib.Path`.
    """
    return any(CheckpointFolder(path).exist() for path in folder.glob("seed-*/checkpoints"))


def _peak_memory():
    """Returns the most memory that this process has had so far, in MiB; None where unknown."""
    try:
        import resource
    except ModuleNotFoundError:  # not on Windows
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 2**20 if sys.platform == "darwin" else peak / 2**10
