"""A search whose trials sleep: the package's chief, workers and protocol, without any training.

    python -m benchmarks.sleeping_trials JOURNALS SECONDS DEATHS FLAG…

The process is a search as `tune.py` makes it of the same flags: alone, as the chief of workers, or
as one of them. Only `Trials._train` is another one, so neither images nor models are needed.
`benchmarks.search_at_scale` and a test start it.

JOURNALS is a folder. Each process appends to a file of its own there, a JSON object a line, what it
does. What a process wrote before SIGKILL is kept by the system.

SECONDS is the mean length of a trial.

DEATHS is JSON: the moment at which the worker of a trial kills itself, by the trial's id. The
moments are `begun`, `reported` (its end is not yet sent), and `ended` (its end is accepted). It
happens in the first worker that gets there.
"""

import json
import math
import os
import random
import signal
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import keras_tuner
from keras_tuner.engine.trial import Trial
from rich.console import Console

from dskd_keras import files
from dskd_keras.answering import answer
from dskd_keras.experiment import run_folder
from dskd_keras.experiment.command_line import parse
from dskd_keras.tuning import ranking, search, search_pictures, trials, workers
from dskd_keras.tuning.config import SearchConfig


def accuracy(values: Mapping[str, Any]) -> float:
    """Returns what a trial of these values reports: smooth, and no two random trials share it."""
    numbers = [math.log(value) for value in values.values() if isinstance(value, float)]
    return math.exp(-sum((number - 2) ** 2 for number in numbers) / 100)


def command(journals: Path, seconds: float, deaths: Mapping[str, str], argv: list[str]):
    """Returns the command line of such a search's chief; to be run in the repository's root."""
    arguments = [str(journals), str(seconds), json.dumps(dict(deaths)), *argv]
    return [sys.executable, "-m", "benchmarks.sleeping_trials", *arguments]


class Journal:
    """Appends what a process does to a file of its own."""

    def __init__(self, folder: Path, name: str):
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)
        # Whole lines: a process that dies has written all of a line or nothing.
        path = folder / f"{name}.{os.getpid()}.jsonl"
        self._file = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT)

    def write(self, what: str, **fields: Any) -> None:
        """Notes an event with the time, and the processor time of this process so far."""
        line = {"what": what, "time": time.time(), "cpu": time.process_time(), **fields}
        os.write(self._file, json.dumps(line).encode() + b"\n")


class SleepingTrials(trials.Trials):
    """Trials that sleep and report a number that follows from their values."""

    def __init__(self, plan, run, journal, seconds, deaths):
        super().__init__(plan, run, None)
        self._journal, self._seconds, self._deaths = journal, seconds, deaths
        for name in ("create_trial", "get_trial", "update_trial", "end_trial"):
            self._measure(name)

    def _measure(self, name):
        """Notes how long the chief takes to answer one kind of request."""
        ask = getattr(self.oracle, name)

        def measured(*args, **kwargs):
            begin = time.perf_counter()
            answered = ask(*args, **kwargs)
            self._journal.write("asked", request=name, seconds=time.perf_counter() - begin)
            return answered

        setattr(self.oracle, name, measured)

    def on_trial_end(self, trial: Trial) -> None:
        """Ends the trial, unless this process is to die before."""
        self._reach("reported", trial)
        super().on_trial_end(trial)
        self._reach("ended", trial)

    def _reach(self, moment, trial):
        if self._deaths.get(trial.trial_id) != moment:
            return
        try:
            # For one worker only: the one that takes over must live.
            (self._journal.folder / f"died-{trial.trial_id}").touch(exist_ok=False)
        except FileExistsError:
            return
        os.kill(os.getpid(), signal.SIGKILL)

    def _train(self, trial: Trial, folder: Path) -> float:
        place = folder / "seed-0"
        # As a training has it: no two processes work on a trial at the same time.
        with run_folder.claimed("run_dir", place, self._run.say, "Waiting."):
            self._journal.write("begun", trial=trial.trial_id)
            self._reach("begun", trial)
            seconds = self._seconds * random.Random(trial.trial_id).uniform(0.5, 1.5)
            time.sleep(seconds / 2)
            # A training that has a checkpoint is no more taken for the reason of a death.
            (place / "checkpoints").mkdir(exist_ok=True)
            (place / "checkpoints" / f"step-{1:09}.{'0' * 32}.npz").touch()
            time.sleep(seconds / 2)
        values = self._hypermodel.values(trial.hyperparameters)
        reported = accuracy(values)
        result = {"val_accuracy": reported, "epochs": 1, "seconds": seconds}
        files.write_text(folder / ranking.RESULT, json.dumps(result) + "\n")
        self._journal.write("done", trial=trial.trial_id, accuracy=reported, values=values)
        return reported


class Stand:
    """What a worker has instead of a run with images."""

    def __init__(self, config: SearchConfig, console: Console):
        self.config = config.experiment()
        self.say = console.print


def _note_what_the_oracle_does(journal: Journal) -> None:
    """Notes which trial is handed to whom and which end counts, while the oracle is locked."""
    create_trial, end_trial = keras_tuner.Oracle.create_trial, keras_tuner.Oracle.end_trial

    def create(oracle, tuner_id):
        known = tuner_id in oracle.ongoing_trials
        trial = create_trial(oracle, tuner_id)
        if trial.status == "RUNNING":
            # A worker that is replaced asks for what its predecessor was given in vain.
            what = "given again" if known else "given"
            journal.write(what, trial=trial.trial_id, worker=tuner_id)
        return trial

    def end(oracle, trial):
        end_trial(oracle, trial)
        journal.write("ended", trial=trial.trial_id)

    keras_tuner.Oracle.create_trial, keras_tuner.Oracle.end_trial = create, end


def main() -> None:
    """Searches, as this process's arguments and KerasTuner's variables say."""
    journals, seconds, deaths, *argv = sys.argv[1:]
    config = parse(SearchConfig, argv, "benchmarks.sleeping_trials")
    # They take seconds.
    search_pictures.parameters = search_pictures.progress = lambda results: None
    name = os.environ.get("KERASTUNER_TUNER_ID", "chief")
    journal = Journal(Path(journals), name)
    console = Console(width=200)
    if workers.role() == "worker":
        trials.load = lambda config, console, command: Stand(config, console)
        trials.run_all = lambda plan, run: SleepingTrials(
            plan, run, journal, float(seconds), json.loads(deaths)
        ).search()
    else:
        _note_what_the_oracle_does(journal)
    worker_command = command(Path(journals), float(seconds), json.loads(deaths), argv)
    search.run(config, console, worker_command=worker_command)


if __name__ == "__main__":
    sys.exit(answer(main))
